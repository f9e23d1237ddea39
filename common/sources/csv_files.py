"""CSV files, read as a whole: a column has one type, codes such as 007 keep their zeros, and NA is a word."""

import csv
import io
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, TypeAlias

from common.errors import InputError
from common.sources.compressed import ending, opened

DataFrame: TypeAlias = Any  # of pandas, which is imported where it is used
DELIMITERS = ",;\t|"
SNIFFED = 1000  # rows that show what stands between cells
EXACT = 2.0**53  # from here on floats lose whole numbers
_MAY_BE_PADDED = re.compile(rb'(?:^|[,;|\t"\r\n])\s*[-+]?0\d')
_PADDED = r"\s*[-+]?0\d+\s*"


def are_codes(names: Iterable[str]) -> bool:
    """Whether one of the names is a whole number with leading zeros."""
    return any(re.fullmatch(_PADDED, name) for name in names)


def csv_files(path: str) -> list[Path]:
    """The CSV files that a path or a glob means, by name; hidden ones only where it names them, as shells do."""
    local = Path(path).expanduser()
    if ending(local) not in (".csv", ".tsv"):
        return []
    found = local.parent.glob(local.name)
    return sorted(each for each in found if each.is_file() and (each.name[0] != "." or local.name[0] == "."))


def read_csv(
    path: str, files: Sequence[Path], codes: Container[str] = (), as_written: bool = False, encoding: str | None = None
) -> list[DataFrame]:
    """The rows of each file, read as one table: a column is of text if it is so in one of the files.

    An empty cell is a gap; words such as NA are text.

    Args:
        path: what stands for the files in messages.
        files: the files, one at least; they may be compressed.
        codes: columns whose whole numbers are text if one has leading zeros, or if floats would lose digits.
        as_written: leave all cells as their text.
        encoding: of the files; None for UTF-8, or UTF-16 where a file says so.

    Raises:
        InputError: a file repeats a column, has others than the first file, has rows with more or fewer cells or
            another encoding, or none has rows.
        ValueError: pandas cannot read it.
    """
    import pandas

    pd: Any = pandas
    how: dict[str, Any] = {"keep_default_na": False, "na_values": [] if as_written else [""], "low_memory": False}
    how |= {"dtype": str} if as_written else {}
    layouts = {file: _layout(file, path, encoding) for file in files}
    frames = [_whole(_read(file, path, layouts[file], **how), file, path, layouts[file]) for file in files]
    names = frames[0].columns
    for file, frame in zip(files, frames, strict=True):
        if other := {*frame.columns} ^ {*names}:
            problem = f"{file.name} and {files[0].name} differ in the column {min(other)!r}"
            raise InputError(f"data.source.path {path}: {problem}; give both the same columns")
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
        numbers = [name for name in names if name in codes and name not in text]
        text += padded(files, numbers, encoding)
        text += [name for name in numbers if name not in text and any(_loses(frame[name]) for frame in frames)]
        if text:
            how["dtype"] = dict.fromkeys(text, str)
            frames = [_read(file, path, layouts[file], **how) for file in files]
    if len(frames) == 1:
        return frames
    whole = pd.concat([frame for frame in frames if len(frame)], ignore_index=True)
    ends = list(accumulate(map(len, frames)))
    return [whole.iloc[end - len(frame) : end] for frame, end in zip(frames, ends, strict=True)]


def _read(file: Path, path: str, layout: Mapping[str, Any], **how: Any) -> DataFrame:
    import pandas

    try:
        with opened(file) as stream:
            return pandas.read_csv(stream, **layout, **how)
    except UnicodeDecodeError as error:
        raise _not_written_in(layout["encoding"], file, path, error) from error


def _not_written_in(encoding: str, file: Path, path: str, error: Exception) -> InputError:
    problem = f"{file.name} is not written in {encoding} ({str(error).split(' decode ')[-1]})"
    return InputError(f"data.source.path {path}: {problem}; give its encoding, such as data.source.encoding cp1252")


def first_rows(file: Path, count: int) -> DataFrame:
    """The first rows of a CSV file, as pandas reads them.

    Raises:
        InputError: the file has another encoding than UTF-8 or UTF-16.
        ValueError: pandas cannot read it.
    """
    import pandas

    layout = _layout(file, str(file), None)
    with opened(file) as stream:
        return pandas.read_csv(stream, nrows=count, **layout)


def _kind(cells: Any) -> str:
    """What a column holds: "string", "boolean", numbers of some kind, or nothing."""
    from pandas.api.types import infer_dtype

    return "empty" if cells.isna().all() else infer_dtype(cells, skipna=True)


def _loses(cells: Any) -> bool:
    """Whether a gap made floats of whole numbers that are too large for them."""
    return cells.dtype.kind == "f" and bool(cells.abs().between(EXACT, 2.0**64).any())


def padded(files: Sequence[Path], names: Sequence[str], encoding: str | None = None) -> dict[str, str]:
    """The columns that hold whole numbers with leading zeros, which a reader of numbers drops, and one such number.

    Args:
        files: CSV files.
        names: of the columns to look at.
        encoding: of the files, see :func:`read_csv`.
    """
    import pandas

    pd: Any = pandas
    found: dict[str, str] = {}
    for file in files if names else ():
        layout = _layout(file, str(file), encoding)
        if _may_hold_padded(file, layout["encoding"]):
            with opened(file) as stream:
                frame = pd.read_csv(stream, usecols=lambda name: name in names, dtype=str, **layout)
            for name, cells in frame.items():
                zeros = cells[cells.str.fullmatch(_PADDED, na=False)]
                if len(zeros):
                    found.setdefault(name, zeros.iloc[0])
    return found


def _may_hold_padded(file: Path, encoding: str) -> bool:
    """Whether a cell begins like a number with a leading zero; it takes a hundredth of the reading."""
    if encoding == "utf-16":
        return True
    with opened(file) as stream:
        last = b""
        while block := stream.read(1 << 24):
            if _MAY_BE_PADDED.search(last + block):
                return True
            last = block[-8:]
    return False


def _layout(file: Path, path: str, encoding: str | None) -> dict[str, Any]:
    """A file's encoding and what stands between its cells, as arguments of ``pandas.read_csv``.

    Raises:
        InputError: the file has another encoding, or repeats a column, which pandas renames silently.
    """
    with opened(file) as stream:
        own = "utf-16" if stream.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8"
    encoding = encoding or own
    with opened(file) as stream:
        try:
            text = io.TextIOWrapper(stream, "utf-8-sig" if encoding == "utf-8" else encoding, newline="")
            lines = list(islice(text, SNIFFED))
        except (UnicodeDecodeError, LookupError) as error:
            raise _not_written_in(encoding, file, path, error) from error
    fitting = [delimiter for delimiter in DELIMITERS if _width(lines, delimiter) > 1]
    if ending(file) == ".tsv":
        fitting = ["\t"]
    if len(fitting) > 1:
        problem = f"{fitting[0]!r} or {fitting[1]!r} may stand between the cells of {file.name}"
        raise InputError(f"data.source.path {path}: {problem}; put cells with the other one in quotes")
    delimiter = fitting[0] if fitting else ","
    names = next(csv.reader(lines, delimiter=delimiter), [])
    if repeated := [name for name in names if name and names.count(name) > 1]:
        raise InputError(f"data.source.path {path}: has two columns named {repeated[0]!r}; rename one")
    return {"encoding": encoding, "sep": delimiter}


def _width(lines: Sequence[str], delimiter: str) -> int:
    """The number of cells in each row, 0 if that differs; the last row may be cut."""
    try:
        rows = [*csv.reader(lines, delimiter=delimiter)]
    except csv.Error:
        return 0
    widths = {len(row) for row in rows[: -1 if len(lines) == SNIFFED else None] if row}
    return widths.pop() if len(widths) == 1 else 0


def _whole(frame: DataFrame, file: Path, path: str, layout: Mapping[str, Any]) -> DataFrame:
    """The frame, of which no row has more or fewer cells than the first line: pandas shifts or fills them silently."""
    from pandas import RangeIndex

    if not isinstance(frame.index, RangeIndex):  # pandas takes what is too much for names of the rows
        problem = f"rows of {file.name} have more cells than its first line"
        raise InputError(f"data.source.path {path}: {problem}; mend them")
    last = frame.iloc[:, -1]
    if len(frame.columns) > 1 and (last.isna() | (last == "")).any():
        with opened(file) as stream:
            rows = csv.reader(io.TextIOWrapper(stream, layout["encoding"], newline=""), delimiter=layout["sep"])
            for row in rows:
                if 0 < len(row) < len(frame.columns):
                    problem = f"line {rows.line_num} of {file.name} has {len(row)} cells, and the first line "
                    raise InputError(f"data.source.path {path}: {problem}{len(frame.columns)}; mend it")
    return frame
