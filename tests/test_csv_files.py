"""CSV files are read as a whole: types of columns, codes with zeros, files that differ."""

from pathlib import Path

import pandas as pd
import pytest

from common.errors import InputError
from common.sources.csv_files import padded, read_csv
from common.sources.files import TextTable, load_splits
from common.sources.tables import Table
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
    known.codes = ["code"]
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
    for name, codes in {"a": [7, 8], "b": ["A7", None]}.items():
        pd.DataFrame({"code": codes, "x": [1, 2]}).to_csv(tmp_path / f"{name}.csv", index=False)
    frame = load_splits(str(tmp_path / "*.csv")).parts[0].to_pandas()
    assert frame["code"].tolist()[:3] == ["7", "8", "A7"]
    assert frame["code"].isna().tolist() == [False, False, False, True]
    pd.DataFrame({"x": [1], "other": [2]}).to_csv(tmp_path / "c.csv", index=False)
    with pytest.raises(InputError, match=r"c\.csv and a.csv differ in the column 'code'; give both the same columns"):
        load_splits(str(tmp_path / "*.csv"))
