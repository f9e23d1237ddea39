"""CSV files are read as a whole: types of columns, codes with zeros, files that differ."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from common.errors import InputError
from common.sources.compressed import COMPRESSED
from common.sources.csv_files import padded, read_csv
from common.sources.files import ImageTable, TextTable, load_splits
from common.sources.numerals import read_numbers
from common.sources.tables import FILE, Columns, Table, fit_columns
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
    known.take_over({"targets": [], "mean": [], "numeric": {}, "categorical": {"code": ["007", "12"]}})  # type: ignore[typeddict-item]
    assert known.read()["code"].tolist() == ["007", "12"], "as the checkpoint's"
    assert not capfd.readouterr().out


def test_labels_of_texts_keep_their_zeros(tmp_path: Path) -> None:
    path = write(tmp_path, text=["a b", "b c", "c d"], label=["007", "7", "012"])
    encoder = write_encoder(tmp_path / "encoder", ["a b c d"])
    assert TextTable(path, str(encoder)).read().class_names == ["007", "012", "7"]


def test_words_that_readers_take_for_gaps_stay_words(tmp_path: Path) -> None:
    path = write(tmp_path, text=["null", "NA", "a b"], label=["None", "mild", "None"])
    encoder = write_encoder(tmp_path / "encoder", ["null NA a b"])
    read = TextTable(path, str(encoder)).read()
    assert (read.class_names, read.target.tolist()) == (["None", "mild"], [0, 1, 0])
    path = write(tmp_path, text=["", "NA", "a b"], label=["None", "mild", "None"])
    with pytest.raises(InputError, match="1 of 3 texts are missing"):
        TextTable(path, str(encoder)).read()


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
    table.take_over(Columns(targets=[], mean=[], numeric={}, categorical={}), before.class_names)  # type: ignore[typeddict-item]
    assert table.read()["scene"].tolist() == ["007", "7", "12"]


def test_classes_of_before_are_read_as_they_were(tmp_path: Path) -> None:
    """A checkpoint of an earlier version knows the class 007 as 7."""
    path = write(tmp_path, size=["1", "2"], kind=["007", "12"])
    table = Table(path, "kind")
    table.of_classes = True
    for names, found in ((["12", "7"], [7, 12]), (["007", "12"], ["007", "12"])):
        table.take_over(Columns(targets=[], mean=[], numeric={}, categorical={}), names)  # type: ignore[typeddict-item]
        assert table.read()["kind"].tolist() == found


@pytest.mark.parametrize(
    ("cells", "numbers", "told"),
    [
        (["1,200.5", "3"], [1200.5, 3], "'1,200.5' as 1200.5"),
        (["1.200,5", "3"], [1200.5, 3], "'1.200,5' as 1200.5"),
        (["1,5", "1.200"], [1.5, 1200], "'1,5' as 1.5"),
        (["1 234 567", "12"], [1234567, 12], "'1 234 567' as 1234567"),
        (["12,34,567", "5"], [1234567, 5], "'12,34,567' as 1234567"),
        (["1.234.567", "5"], [1234567, 5], "'1.234.567' as 1234567"),
        (["45.1%", "3 %"], [45.1, 3], "'45.1%' as 45.1 per cent"),
        (["$1,200.50", "$3"], [1200.5, 3], "'$1,200.50' as 1200.5"),
        (["3,50 €", "(1,25 €)"], [3.5, -1.25], "'3,50 €' as 3.5"),
        (["−4", "5"], [-4, 5], "'−4' as -4"),
        (["NA", "5"], [np.nan, 5], None),
        (["1e3", ".5"], [1000, 0.5], None),
    ],
)
def test_numbers_as_people_write_them(cells: list[str], numbers: list[float], told: str | None, tmp_path: Path) -> None:
    read = read_numbers(pd.DataFrame({"a": cells}), ["a"], (), None, None, None)
    assert np.array_equal(read.frame["a"].to_numpy(float), numbers, equal_nan=True)
    assert read.told.get("a") == told
    path = write(tmp_path, a=cells, y=["word", "NA"])
    frame = Table(path).read()
    assert np.array_equal(frame["a"].to_numpy(float), numbers, equal_nan=True)
    assert frame["y"].tolist() == ["word", "NA"], "among words it is a word"


@pytest.mark.parametrize("words", [["1.2.3", "2.0.1"], ["30-40", "50-60"], ["2024-01-01", "x"], ["A1", "7", "B2"]])
def test_words_with_digits_stay_words(words: list[str]) -> None:
    read = read_numbers(pd.DataFrame({"a": words}), ["a"], (), None, None, None)
    assert read.frame["a"].tolist() == words
    assert not read.told


@pytest.mark.parametrize(
    ("text", "flags", "line"),
    [
        ('a,b\n"1,200",x\n"3,400",y\n', {}, "column 'a': '1,200' is 1200 or 1.2; say which mark is decimal: "),
        ('a,b\n"1,200",0.50\n"3,400",1\n', {}, [1200, 3400]),
        ('a,b\n"1,200","0,50"\n"3,400",1\n', {}, [1.2, 3.4]),
        ('a,b\n"1,200",x\n"3,400",y\n', {"decimal": ","}, [1.2, 3.4]),
        ('a,b\n"1,200",x\n"3,400",y\n', {"decimal": "."}, [1200, 3400]),
        ("a;b\n1.234;0,5\n2.500;1\n", {}, [1234, 2500]),
        ("a;b\n1.234;x\n2.500;y\n", {"decimal": ","}, [1234, 2500]),
        ("a;b\n1.234;x\n2.500;y\n", {}, [1.234, 2.5]),
        (
            "a;b\n1.5;x\n2.5;y\n",
            {"decimal": ","},
            "'1.5' is no number whose decimal mark is ','; mend it, or data.source",
        ),
        ("a,b\n61 kg,x\n7 kg,y\n", {}, "column 'a': holds numbers with units, such as '61 kg'; give the numbers alone"),
        ("a,b\n61 kg,x\n7,y\n", {}, "column 'a': holds numbers with units, such as '61 kg'"),
        ("a,b\n$3,x\n€7,y\n", {}, "column 'a': holds numbers with units, such as '€7'"),
        ("a,b\n61 kg,x\n7 kg,y\n", {"categorical": ["a"]}, ["61 kg", "7 kg"]),
        ("a,b\n1,x\n2,y\n?,z\n", {}, "column 'a': '?' in row 2 is no number; mend it, or list the column in data."),
    ],
)
def test_a_number_has_one_reading_or_is_a_line(
    text: str, flags: dict[str, Any], line: str | list[Any], tmp_path: Path
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(text)
    if isinstance(line, str):
        with pytest.raises(InputError, match=re.escape(line)):
            Table(str(path), **flags).read()
    else:
        assert Table(str(path), **flags).read()["a"].tolist() == line


def test_a_checkpoint_knows_the_decimal_mark(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A table to predict may show none."""
    path = tmp_path / "rows.csv"
    path.write_text("a;b;y\n" + "".join(f"{n}.{n}00;{n},5;{n}\n" for n in range(1, 10)))
    trained = Table(str(path), "y")
    frame = trained.read()
    assert (
        capfd.readouterr().out
        == "data.source: columns are read as numbers: 'b' ('1,5' as 1.5), 'a' ('1.100' as 1100)\n"
    )
    columns = fit_columns(frame, frame[["y"]].to_numpy(float), trained, "standard", 1)
    assert columns.get("decimal") == ","
    path.write_text("a;b;y\n1.500;2;3,50 €\n")
    new = Table(str(path))
    new.take_over(columns)
    assert new.read()[["a", "y"]].to_numpy().tolist() == [[1500, 3.5]], "the target too, which may be there"
    assert not capfd.readouterr().out


@pytest.mark.parametrize("name", ["rows.csv", "rows.CSV", "rows.tsv", "rows.csv.gz", "rows.csv.bz2", "rows.csv.XZ"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_files_are_read_as_their_names_say(name: str, encoding: str, tmp_path: Path) -> None:
    delimiter = "\t" if ".tsv" in name else ";"
    rows = f"größe{delimiter}art\r\n1{delimiter}Höhe, hoch\r\n2{delimiter}null\r\n".encode(encoding)
    with COMPRESSED.get(Path(name).suffix.lower(), open)(tmp_path / name, "wb") as file:
        file.write(rows)
    frame = load_splits(str(tmp_path / name)).parts[0].to_pandas()
    assert frame.to_dict("list") == {"größe": [1, 2], "art": ["Höhe, hoch", "null"]}


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (
            "größe,b\n1,2\n".encode("latin1"),
            "rows.csv is not written in utf-8 (byte 0xf6 in position 2: invalid start byte); give its",
        ),
        (b"a,b\n" + b"1,2\n" * 2000 + b"\xe9,2\n", "rows.csv is not written in utf-8"),
        (b"a,b,c\n1,2,3\n4,5\n", "line 3 of rows.csv has 2 cells, and the first line 3; mend it"),
        (b"a,b\n1,2,3\n", "rows of rows.csv have more cells than its first line; mend them"),
        (
            b"a, x;b\n1,5;2\n",
            "',' or ';' may stand between the cells of rows.csv; put cells with the other one in quotes",
        ),
        (b"a;a\n1;2\n", "has two columns named 'a'; rename one"),
    ],
)
def test_a_file_that_is_not_as_it_says_is_one_line(content: bytes, line: str, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(content)
    with pytest.raises(InputError, match=re.escape(line)):
        load_splits(str(tmp_path / "rows.csv"))


def test_another_encoding_is_an_argument(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes("größe;y\n1,5;2\n".encode("cp1252"))
    assert Table(str(tmp_path / "rows.csv"), encoding="cp1252").read().to_dict("list") == {"größe": [1.5], "y": [2]}
    with pytest.raises(InputError, match="not written in nonsense"):
        Table(str(tmp_path / "rows.csv"), encoding="nonsense").read()


def test_ids_keep_their_digits(tmp_path: Path) -> None:
    """Floats would make these two the same, and a gap makes floats of all."""
    ids = ["9223372036854775807", "9223372036854775806", ""]
    frame = Table(write(tmp_path, id=ids, y=["1", "2", "3"]), "y", categorical=["id"]).read()
    assert frame["id"].tolist()[:2] == ids[:2]


def test_a_spreadsheet_of_another_country(work: Path) -> None:
    """As it is exported: semicolons, decimal commas, a currency, per cent, codes, and the encoding of Windows."""
    random = np.random.default_rng(0)
    area, kind = random.uniform(20, 150, 80), random.integers(0, 2, 80)
    cells = zip(area, area * 12 + kind * 100, random.integers(1, 99, 80), kind, strict=True)
    rows = [f"{a:.1f};{r:,.2f} €;{s} %;{('01004', '01005')[k]}" for a, r, s, k in cells]
    lines = ["Fläche;Miete;Anteil;PLZ", *(row.translate(str.maketrans(",.", ".,")) for row in rows)]
    (work / "mieten.csv").write_bytes("\r\n".join(lines).encode("cp1252"))
    source = ["common.sources.tables.Table", ".path", "mieten.csv", ".encoding", "cp1252"]
    given = ["--data.source", source[0], *(f"--data.source{word}" if word[0] == "." else word for word in source[1:])]
    more = ["--data.source.target", "Miete", "--data.source.categorical", "[PLZ]", "--data.batch_size", "8"]
    fitted = main_of("regression")(["fit", *TINY, "--trainer.accelerator", "cpu", *given, *more])
    columns = fitted.datamodule.columns
    assert columns["numeric"].keys() == {"Fläche", "Anteil"}
    assert columns["categorical"] == {"PLZ": ["01004", "01005"]}
    assert fitted.datamodule.table.target[:, 0] == pytest.approx(np.round(area * 12 + kind * 100, 2))
    (work / "mieten.csv").write_bytes("\r\n".join(lines[:2]).encode("cp1252"))
    every = ["--trainer.limit_predict_batches", "1.0"]
    main_of("regression")(["predict", *every, *(word.replace("data.source", "data.predict_source") for word in given)])
    rows = pd.read_csv("runs/regression/default/predict/predictions.csv")
    assert rows["target"].tolist() == pytest.approx([round(area[0] * 12 + kind[0] * 100, 2)])
