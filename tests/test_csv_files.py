"""CSV files are read as a whole: types of columns, codes with zeros, files that differ."""

import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from common.errors import InputError
from common.sources.csv_files import padded, read_csv
from common.sources.files import ImageTable, TextTable, load_splits
from common.sources.tables import FILE, Columns, Table
from recipes.classification.tables import LabelledTable, TableSamples
from tests.support import TINY, main_of, refused, write_encoder


def write(folder: Path, **columns: list[str]) -> str:
    pd.DataFrame(columns).to_csv(folder / "rows.csv", index=False)
    return str(folder / "rows.csv")


def test_codes_keep_their_zeros(tmp_path: Path) -> None:
    path = write(tmp_path, code=["007", "7", "", "012"], number=["007", "8", "9", "10"], plain=["7", "8", "9", "10"])
    (frame,) = read_csv(path, [Path(path)], codes=["code", "plain"])
    assert frame["code"].dropna().tolist() == ["007", "7", "012"]
    assert frame["code"].isna().sum() == 1
    assert frame["number"].tolist() == [7, 8, 9, 10]
    assert frame["plain"].tolist() == [7, 8, 9, 10], "has no zeros to lose"
    assert padded([Path(path)], ["code", "number", "plain"]) == {"code": "007", "number": "007"}
    path = write(tmp_path, day=["2024-01-05"], hour=["08:30"], half=["0.5"])
    assert padded([Path(path)], ["day", "hour", "half"]) == {}


def test_zeros_that_are_dropped_are_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, code=["007", "12"], size=["1.5", "2"], rent=["0100", "200"])
    Table(path, "rent").read()
    line = "data.source: column 'code' is read as numbers, and '007' as 7; list it in data.source.categorical"
    assert capfd.readouterr().out == f"{line} if it holds codes\n"
    assert Table(path, "rent", categorical=["code"]).read()["code"].tolist() == ["007", "12"]
    known = Table(path, "rent")
    known.take_over({"categorical": {"code": ["007", "12"]}})  # type: ignore[typeddict-item]
    assert known.read()["code"].tolist() == ["007", "12"], "as the checkpoint's"
    assert not capfd.readouterr().out


def test_labels_of_texts_keep_their_zeros(tmp_path: Path) -> None:
    path = write(tmp_path, text=["a b", "b c", "c d"], label=["007", "7", "012"])
    encoder = write_encoder(tmp_path / "encoder", ["a b c d"])
    assert TextTable(path, str(encoder)).read().class_names == ["007", "012", "7"]


@pytest.mark.parametrize("late", ["A12", "1.5", ""])
def test_a_column_has_one_type_in_long_files(late: str, tmp_path: Path) -> None:
    """datasets takes it from the first 10,000 rows, and refuses others."""
    path = write(tmp_path, code=["7"] * 25_000 + [late], x=["1"] * 25_001)
    column = load_splits(path).parts[0].to_pandas()["code"]
    assert column.iloc[0] == ("7" if late == "A12" else 7)
    assert pd.isna(column.iloc[-1]) if late == "" else str(column.iloc[-1]) == late


def test_files_of_a_glob_are_one_table(tmp_path: Path) -> None:
    """Of all that are not hidden, with rows or without; a column of text in one of them is text."""
    for name, codes in {"a": [7, 8], "b": ["A7", None], ".a": [1, 2]}.items():
        pd.DataFrame({"code": codes, "x": [1, 2]}).to_csv(tmp_path / f"{name}.csv", index=False)
    (tmp_path / "empty.csv").write_text("code,x\n")
    frame = load_splits(str(tmp_path / "*.csv")).parts[0].to_pandas()
    assert frame["code"].tolist()[:3] == ["7", "8", "A7"]
    assert frame["code"].isna().tolist() == [False, False, False, True]
    assert frame["x"].tolist() == [1, 2, 1, 2]
    assert frame["x"].dtype.kind == "i", "a file without rows says nothing"
    assert len(load_splits(str(tmp_path / ".a.csv")).parts[0]) == 2, "it is named"


@pytest.mark.parametrize(
    ("second", "line"),
    [
        ("x,other\n1,2\n", "b.csv and a.csv differ in the column 'flag'; give both the same columns"),
        ("flag,x\n1,2\n", "column 'flag' holds true and false in one file, and numbers in another; write them alike"),
        ("flag,x\nTrue,2,\n", "rows of b.csv have more cells than its first line; mend them"),
        ("flag,x\n99999999999999999999,2\n", "column 'flag' holds true and false in one file, and numbers in"),
        ("flag,flag\n1,2\n", "has two columns named 'flag'; rename one"),
    ],
)
def test_files_that_differ_are_one_line(second: str, line: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("flag,x\nTrue,1\n,2\n")
    path = str(tmp_path / "*.csv")
    (tmp_path / "b.csv").write_text("flag,x\n,3\nFalse,4\n")
    assert load_splits(path).parts[0].to_pandas()["flag"].tolist() == [True, None, None, False]
    (tmp_path / "b.csv").write_text("flag,x\n,3\n,4\n")
    assert load_splits(path).parts[0].to_pandas()["flag"].tolist() == [True, None, None, None]
    (tmp_path / "b.csv").write_text(second)
    with pytest.raises(InputError, match=re.escape(line)):
        load_splits(path)


def write_parts(folder: Path, ending: str, **sizes: int) -> str:
    """A folder with a table for each part; a class of codes, and numbers that the class shifts."""
    folder.mkdir()
    for seed, (name, size) in enumerate(sizes.items()):
        random = np.random.default_rng(seed)
        kind = random.integers(0, 2, size)
        rows = pd.DataFrame({
            "text": [f"{name} {n} of {size}" for n in range(size)], "size": kind + random.random(size),
            "kind": np.array(["007", "12"])[kind], "rent": kind * 2 + random.random(size),
        })  # fmt: skip
        if ending == "csv":
            rows.to_csv(folder / f"{name}.csv", index=False)
        else:
            rows.to_json(folder / f"{name}.jsonl", orient="records", lines=True)
    return str(folder)


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_files_of_a_folder_are_parts(ending: str, tmp_path: Path) -> None:
    path = write_parts(tmp_path / "parts", ending, train=60, valid=20, test=30)
    encoder = write_encoder(tmp_path / "encoder", ["train valid test of 1 2 3"])
    texts = TextTable(path, str(encoder), label="kind").read()
    assert (len(texts.target), texts.num_val, texts.num_test) == (110, 20, 30)
    assert texts.class_names == ["007", "12"]
    with pytest.raises(InputError, match="'kind': the names of the files split the rows already; remove it"):
        TextTable(path, str(encoder), label="kind", split="kind").read()
    frame = Table(path, "rent", drop=["text"], categorical=["kind"]).read()
    assert frame[FILE].value_counts().to_dict() == {"train": 60, "test": 30, "val": 20}
    assert sorted(frame["kind"].unique()) == ["007", "12"]
    samples = TableSamples(LabelledTable(path, "kind", drop=["text"]), 0.1, 0.2, 0, {})
    assert [len(part) for part in samples.parts] == [60, 20, 30]
    assert samples.facts["columns"]["numeric"].keys() == {"size", "rent"}
    assert samples.facts["class_names"] == ["007", "12"]
    Path(path, f"valid.{ending}").unlink()
    samples = TableSamples(LabelledTable(path, "kind", drop=["text"]), 0.1, 0.2, 0, {})
    assert [len(part) for part in samples.parts] == [51, 9, 30], "a share of the rows for training"


def test_files_of_a_folder_train_and_test(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Another file to test on takes the place of the first; the rows for training stay."""
    path = write_parts(work / "parts", "csv", train=60, val=20, test=30)
    source = ["--data.source", "common.sources.tables.Table", "--data.source.path", path]
    source += ["--data.source.target", "rent", "--data.source.drop", "[text]", "--data.source.categorical", "[kind]"]
    every = ["--trainer.limit_test_batches", "1.0", "--trainer.limit_predict_batches", "1.0"]
    fitted = main_of("regression")(["fit", *TINY, "--trainer.accelerator", "cpu", *source, "--data.batch_size", "8"])
    parts = fitted.datamodule.table.parts
    assert [len(part) for part in parts] == [60, 20, 30]
    main_of("regression")(["predict", *every, "--data.keep", "[text, kind]"])
    rows = pd.read_csv("runs/regression/default/predict/predictions.csv", dtype=str)
    assert rows["text"].tolist() == [f"test {n} of 30" for n in range(30)]
    assert {*rows["kind"]} == {"007", "12"}
    shutil.copytree(path, work / "others")
    shutil.copy(write_parts(work / "new", "csv", other=11) + "/other.csv", work / "others/test.csv")
    tested = main_of("regression")(["test", *every, "--data.source.path", str(work / "others")]).datamodule
    assert [len(part) for part in tested.table.parts] == [60, 20, 11]
    assert "on 11 samples of Table" in capfd.readouterr().out
    line = refused("regression", ["fit", *TINY, "--data.source.path", path], capfd)
    assert "another recipe takes it: python" in line, "it has texts"
    for more, line in (
        (["--data.source.split", "kind"], "'kind': the names of the files split the rows already; remove it"),
        (["--data.source.group", "kind"], "the rows are already split by"),
    ):
        assert line in refused("regression", ["fit", *TINY, *source, *more], capfd)
    shutil.copy(work / "parts/val.csv", work / "parts/dev.csv")
    assert "dev.csv and val.csv are of one part" in refused("regression", ["fit", *TINY, *source], capfd)
    (work / "parts/dev.csv").unlink()
    shutil.move(work / "parts/val.csv", work / "parts/val.parquet")
    assert "are of several kinds; give files of one kind" in refused("regression", ["fit", *TINY, *source], capfd)


def test_codes_of_a_folder_of_images_are_refused(tmp_path: Path) -> None:
    """``datasets`` reads its ``metadata.csv``, and makes numbers of them."""
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,kind,scene,key\na.png,02,007,0012\n")
    path, line = str(tmp_path), "metadata.csv holds codes such as {!r} in the column {!r}, which become numbers there"
    for label, group, code, name in (("kind", None, "02", "kind"), (None, "scene", "007", "scene")):
        with pytest.raises(InputError, match=re.escape(line.format(code, name))):
            ImageTable(path, label=label, group=group).read()
    with pytest.raises(InputError, match=re.escape(line.format("0012", "key"))):
        ImageTable(path, label=None).columns(["key"])


def test_a_number_too_large_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path, number=["99999999999999999999", "1"])
    with pytest.raises(InputError, match="cannot be read"):
        load_splits(path)


def test_groups_of_codes_are_the_same_at_a_resume(tmp_path: Path) -> None:
    """Also where the classes are no codes, of which a checkpoint says how to read them."""
    path = write(tmp_path, text=["a", "b", "c"], size=["1", "2", "3"], kind=["x", "y", "x"], scene=["007", "7", "12"])
    encoder = write_encoder(tmp_path / "encoder", ["a b c"])
    texts = TextTable(path, str(encoder), label="kind", group="scene")
    table = Table(path, "kind", drop=["text"], group="scene")
    before = texts.read()
    assert before.groups is not None
    assert len(before.groups.unique()) == 3
    assert table.read()["scene"].tolist() == ["007", "7", "12"]
    texts.take_over({"tokenizer": before.tokenizer, "class_names": before.class_names})
    again = texts.read()
    assert again.groups is not None
    assert again.groups.equal(before.groups)
    table.take_over(Columns(categorical={}), before.class_names)  # type: ignore[typeddict-item]
    assert table.read()["scene"].tolist() == ["007", "7", "12"]


def test_classes_of_before_are_read_as_they_were(tmp_path: Path) -> None:
    """A checkpoint of an earlier version knows the class 007 as 7."""
    path = write(tmp_path, size=["1", "2"], kind=["007", "12"])
    table = Table(path, "kind")
    for names, found in ((["12", "7"], [7, 12]), (["007", "12"], ["007", "12"])):
        table.take_over(Columns(categorical={}), names)  # type: ignore[typeddict-item]
        assert table.read()["kind"].tolist() == found
