"""CSV files are read as a whole: types of columns, codes with zeros, files that differ."""

import re
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from common.errors import InputError
from common.sources.csv_files import padded, read_csv
from common.sources.files import ImageTable, TextTable, load_splits
from common.sources.tables import Columns, Table
from tests.support import write_encoder


def write(folder: Path, **columns: list[str]) -> str:
    pd.DataFrame(columns).to_csv(folder / "rows.csv", index=False)
    return str(folder / "rows.csv")


def test_codes_keep_their_zeros(tmp_path: Path) -> None:
    path = write(tmp_path, code=["007", "7", "", "012"], number=["007", "8", "9", "10"], plain=["7", "8", "9", "10"])
    frame = read_csv(path, codes=["code", "plain"])
    assert frame["code"].dropna().tolist() == ["007", "7", "012"]
    assert frame["code"].isna().sum() == 1
    assert frame["number"].tolist() == [7, 8, 9, 10]
    assert frame["plain"].tolist() == [7, 8, 9, 10], "has no zeros to lose"
    assert padded(path, ["code", "number", "plain"]) == {"code": "007", "number": "007"}
    assert padded(write(tmp_path, day=["2024-01-05"], hour=["08:30"], half=["0.5"]), ["day", "hour", "half"]) == {}


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
    assert len(read_csv(str(tmp_path / ".a.csv"))) == 2, "it is named"


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
    (tmp_path / "b.csv").write_text(second)
    with pytest.raises(InputError, match=re.escape(line)):
        load_splits(path)


def test_codes_of_a_folder_of_images_are_refused(tmp_path: Path) -> None:
    """``datasets`` reads its ``metadata.csv``, and makes numbers of them."""
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,kind,scene,key\na.png,02,007,0012\n")
    path, line = str(tmp_path), "metadata.csv holds codes such as {!r} in the column {!r}, which become numbers there"
    for settings, code, name in (
        ({"label": "kind"}, "02", "kind"),
        ({"label": None, "group": "scene"}, "007", "scene"),
    ):
        with pytest.raises(InputError, match=re.escape(line.format(code, name))):
            ImageTable(path, **settings).read()
    with pytest.raises(InputError, match=re.escape(line.format("0012", "key"))):
        ImageTable(path, label=None).columns(["key"])


def test_a_number_too_large_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path, number=["99999999999999999999", "1"])
    with pytest.raises(InputError, match="cannot be read"):
        load_splits(path)


def test_classes_of_before_are_read_as_they_were(tmp_path: Path) -> None:
    """A checkpoint of an earlier version knows the class 007 as 7."""
    path = write(tmp_path, size=["1", "2"], kind=["007", "12"])
    table = Table(path, "kind")
    for names, found in ((["12", "7"], [7, 12]), (["007", "12"], ["007", "12"])):
        table.take_over(Columns(categorical={}), names)  # type: ignore[typeddict-item]
        assert table.read()["kind"].tolist() == found
