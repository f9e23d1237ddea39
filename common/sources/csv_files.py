"""CSV files, read as a whole: a column has one type, and codes such as 007 keep their zeros."""

import csv
import mmap
import re
from collections.abc import Container, Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeAlias

from common.errors import InputError

DataFrame: TypeAlias = Any  # of pandas, which is imported where it is used
_MAY_BE_PADDED = re.compile(rb'(?:^|[,"\r\n])\s*[-+]?0\d')
_PADDED = r"\s*[-+]?0\d+\s*"


def are_codes(names: Iterable[str]) -> bool:
    """Whether one of the names is a whole number with leading zeros."""
    return any(re.fullmatch(_PADDED, name) for name in names)


def csv_files(path: str) -> list[Path]:
    """The CSV files that a path or a glob means, by name; hidden ones only where it names them, as shells do."""
    local = Path(path).expanduser()
    if local.suffix.lower() != ".csv":
        return []
    found = local.parent.glob(local.name)
    return sorted(each for each in found if each.is_file() and (each.name[0] != "." or local.name[0] == "."))


def read_csv(path: str, files: Sequence[Path], codes: Container[str] = (), as_written: bool = False) -> list[DataFrame]:
    """The rows of each file, read as one table: a column is of text if it is so in one of the files.

    Args:
        path: what stands for the files in messages.
        files: the files, one at least.
        codes: columns whose whole numbers are text if one has leading zeros.
        as_written: leave all cells as their text.

    Raises:
        InputError: a file repeats a column, has others than the first file or rows with more cells, or none has rows.
        ValueError: pandas cannot read it.
    """
    import pandas

    pd: Any = pandas
    for file in files:
        _check_header(file, path)
    how: dict[str, Any] = {"dtype": str, "keep_default_na": False} if as_written else {"low_memory": False}
    frames = [pd.read_csv(file, **how) for file in files]
    names = frames[0].columns
    for file, frame in zip(files, frames, strict=True):
        if other := {*frame.columns} ^ {*names}:
            problem = f"{file.name} and {files[0].name} differ in the column {min(other)!r}"
            raise InputError(f"data.source.path {path}: {problem}; give both the same columns")
        if not isinstance(frame.index, pd.RangeIndex):  # pandas takes what is too much for names of the rows
            problem = f"rows of {file.name} have more cells than its first line"
            raise InputError(f"data.source.path {path}: {problem}; mend them")
    if not sum(map(len, frames)):
        raise InputError(f"data.source.path {path}: has no rows; name a file that has some")
    if not as_written:
        filled = [frame for frame in frames if len(frame)]
        kinds = {name: {_kind(frame[name]) for frame in filled} for name in names}
        text = [name for name, found in kinds.items() if "string" in found and found - {"string", "empty"}]
        mixed = [name for name, found in kinds.items() if "boolean" in found and found - {"boolean", "empty"}]
        if mixed := [name for name in mixed if name not in text]:
            problem = f"column {mixed[0]!r} holds true and false in one file, and numbers in another"
            raise InputError(f"data.source.path {path}: {problem}; write them alike")
        text += padded(files, [name for name in names if name in codes and name not in text])
        if text:
            how["dtype"] = dict.fromkeys(text, str)
            frames = [pd.read_csv(file, **how) for file in files]
    if len(frames) == 1:
        return frames
    whole = pd.concat([frame for frame in frames if len(frame)], ignore_index=True)
    ends = list(accumulate(map(len, frames)))
    return [whole.iloc[end - len(frame) : end] for frame, end in zip(frames, ends, strict=True)]


def _kind(cells: Any) -> str:
    """What a column holds: "string", "boolean", numbers of some kind, or nothing."""
    from pandas.api.types import infer_dtype

    return "empty" if cells.isna().all() else infer_dtype(cells, skipna=True)


def padded(files: Sequence[Path], names: Sequence[str]) -> dict[str, str]:
    """The columns that hold whole numbers with leading zeros, which a reader of numbers drops, and one such number.

    Args:
        files: CSV files.
        names: of the columns to look at.
    """
    import pandas

    pd: Any = pandas
    found: dict[str, str] = {}
    for file in files if names else ():
        if _may_hold_padded(file):
            for name, cells in pd.read_csv(file, usecols=lambda name: name in names, dtype=str).items():
                zeros = cells[cells.str.fullmatch(_PADDED, na=False)]
                if len(zeros):
                    found.setdefault(name, zeros.iloc[0])
    return found


def _may_hold_padded(file: Path) -> bool:
    """Whether a cell begins like a number with a leading zero; it takes a hundredth of the reading."""
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return _MAY_BE_PADDED.search(content) is not None


def _check_header(file: Path, path: str) -> None:
    """Refuse a second column of the same name; pandas renames it silently."""
    with file.open(newline="", encoding="utf-8-sig") as lines:
        try:
            names = next(csv.reader(lines), [])
        except (UnicodeDecodeError, csv.Error):
            return  # pandas reports it
    if repeated := [name for name in names if name and names.count(name) > 1]:
        raise InputError(f"data.source.path {path}: has two columns named {repeated[0]!r}; rename one")
