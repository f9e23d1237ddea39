"""CSV files, read as a whole: a column has one type, and codes such as 007 keep their zeros."""

import csv
import mmap
import re
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from common.errors import InputError

DataFrame: TypeAlias = Any  # of pandas, which is imported where it is used
_PADDED = re.compile(rb'(?:^|[,"\n])-?0\d')


def read_csv(path: str, codes: Container[str] = (), as_written: bool = False) -> DataFrame:
    """The rows of all files that match a path, in the order of the files' names.

    Args:
        path: a file or a glob.
        codes: columns whose whole numbers are text if one has leading zeros.
        as_written: leave all cells as their text.

    Raises:
        InputError: a file repeats a column, or has others than the first file, or none has rows.
        ValueError: pandas cannot read it.
    """
    import pandas

    pd: Any = pandas
    files = _files(path)
    if as_written:
        return pd.concat([pd.read_csv(file, dtype=str, keep_default_na=False) for file in files], ignore_index=True)
    for file in files:
        _refuse_repeated_names(file, path)
    frames = [pd.read_csv(file, low_memory=False) for file in files]
    if not sum(map(len, frames)):
        raise InputError(f"data.source.path {path}: has no rows")
    names = frames[0].columns
    for file, frame in zip(files, frames, strict=True):
        if other := {*frame.columns} ^ {*names}:
            problem = f"{file.name} and {files[0].name} differ in the column {min(other)!r}"
            raise InputError(f"data.source.path {path}: {problem}; give both the same columns")
    text = [name for name in names if len({pd.api.types.is_numeric_dtype(each[name]) for each in frames}) > 1]
    text += padded(path, [name for name in names if name in codes and name not in text])
    if text:
        frames = [pd.read_csv(file, low_memory=False, dtype=dict.fromkeys(text, str)) for file in files]
    return pd.concat(frames, ignore_index=True)


def padded(path: str, names: Sequence[str]) -> dict[str, str]:
    """The columns that hold whole numbers with leading zeros, which a reader of numbers drops, and one such number.

    Args:
        path: a file or a glob; there are none but in CSV files.
        names: of the columns to look at.
    """
    import pandas

    pd: Any = pandas
    found: dict[str, str] = {}
    for file in _files(path) if names else ():
        if _may_hold_padded(file):
            for name, cells in pd.read_csv(file, usecols=list(names), dtype=str).items():
                zeros = cells[cells.str.fullmatch(r"-?0\d+", na=False)]
                if len(zeros):
                    found.setdefault(name, zeros.iloc[0])
    return found


def _files(path: str) -> list[Path]:
    local = Path(path).expanduser()
    return sorted(local.parent.glob(local.name)) if local.suffix.lower() == ".csv" else []


def _may_hold_padded(file: Path) -> bool:
    """Whether a cell begins like a number with a leading zero; it takes a hundredth of the reading."""
    with file.open("rb") as content, mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ) as all_of_it:
        return _PADDED.search(all_of_it) is not None


def _refuse_repeated_names(file: Path, path: str) -> None:
    """Refuse a second column of the same name; pandas renames it silently."""
    with file.open(newline="", encoding="utf-8-sig") as lines:
        try:
            names = next(csv.reader(lines), [])
        except (UnicodeDecodeError, csv.Error):
            return  # pandas reports it
    if repeated := [name for name in names if names.count(name) > 1]:
        raise InputError(f"data.source.path {path}: has two columns named {repeated[0]!r}; rename one")
