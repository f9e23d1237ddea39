"""Numbers as people write them: with thousands, a decimal comma, per cent or a currency."""

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float

from common.errors import InputError

# pandas is imported where it is used.
DataFrame: TypeAlias = Any
Series: TypeAlias = Any

# What stands for a gap among numbers. Among words it is a word.
MISSING = frozenset((
    "", "NA", "N/A", "n/a", "#N/A", "#NA", "<NA>", "NaN", "nan", "-NaN", "-nan", "NULL", "Null", "null", "None", "none",
))  # fmt: skip
TRUTH = {"true": True, "false": False}
CURRENCY = "$€£¥₹₩₽₺₫₪฿₴₦"
GROUPS = ",.'’ \u00a0\u202f"  # marks between groups of digits
_BODY = rf"(?:\d[\d{GROUPS}]*(?<=\d)|[.,]\d+|\d+[.,])(?:[eE][-+]?\d+)?"
_NUMBER = rf"\s*(\(?)([-+−]?)\s*([{CURRENCY}]?)\s*([-+−]?)({_BODY})\s*([{CURRENCY}%]?)\s*(\)?)\s*"
UNITS = "holds numbers with units, such as {!r}; give the numbers alone, in one unit: mend "
AS_WORDS = "list the column in data.source.categorical"
_UNIT = rf"[^\W\d_]|[°µ%²³/{CURRENCY}]"
_WITH_UNIT = rf"\s*[-+−]?\s*[{CURRENCY}]?\s*{_BODY}\s*(?:{_UNIT}){{0,6}}\s*"


class _Column(NamedTuple):
    """What a column of text may mean.

    Attributes:
        readings: by the decimal mark that they take: a number for each cell, NaN for a gap.
        cell: a cell that shows how numbers are written, and where readings differ.
        place: its row.
        unit: what stands beside each number.
    """

    readings: dict[str, Float[np.ndarray, " rows"]]
    cell: str
    place: int
    unit: str

    @property
    def may_be_comma(self) -> bool:
        """Whether a comma may be the decimal mark, and makes a difference."""
        return "," in self.readings and ("." not in self.readings or self.at(".") != self.at(","))

    def at(self, mark: str) -> str:
        """The number of ``cell``, as programs write it."""
        return f"{self.readings[mark][self.place]:.15g}"


class Numbers(NamedTuple):
    """A table with numbers in place of text that writes numbers.

    Attributes:
        frame: the rows.
        told: for each column that is not written as programs do, what was read as which number.
        decimal: the decimal mark, if the columns show one.
    """

    frame: DataFrame
    told: dict[str, str]
    decimal: str | None


def read_numbers(
    frame: DataFrame,
    names: Collection[str],
    targets: Collection[str],
    decimal: str | None,
    known: str | None,
    written: Callable[[Sequence[str]], DataFrame] | None,
) -> Numbers:
    """Read the columns of text that hold numbers, or true and false.

    A table has one decimal mark. Columns with one reading show it, those with two follow them.

    Args:
        frame: the rows.
        names: columns to look at; others stay as they are.
        targets: those of them that are to be predicted, for messages.
        decimal: the decimal mark, ``.`` or ``,``; None for that which the columns show.
        known: that of the table which a checkpoint was trained on; it decides where none shows.
        written: gives columns as the file writes them, where a reader took them for numbers already; None if the file
            leaves no doubt about these.

    Raises:
        InputError: a column has two readings, is written otherwise than ``decimal`` says, holds numbers with units, or
            a few words among numbers.
    """
    from pandas.api.types import infer_dtype

    frame, columns, told = frame.copy(deep=False), {}, {}
    keys = {
        name: (f"data.source.target {name!r}", "it") if name in targets
        else (f"data.source.path: column {name!r}", f"it, or {AS_WORDS}") for name in names
    }  # fmt: skip
    for name in names:
        if infer_dtype(frame[name], skipna=True) == "string":
            if isinstance(found := _read(frame[name], *keys[name]), _Column):
                columns[name] = found
            else:
                frame[name] = found
    floats = [name for name in names if name not in columns and frame[name].dtype.kind == "f"]
    # A reader of numbers takes 1.234 for a fraction, also where it is a thousand.
    in_doubt = "," in (decimal, known) or any(column.may_be_comma for column in columns.values())
    if written and floats and in_doubt:
        cells = written(floats)
        found = {name: _read(cells[name], *keys[name]) for name in floats}
        columns |= {name: column for name, column in found.items() if isinstance(column, _Column)}
    shown = {mark for column in columns.values() if len(column.readings) == 1 for mark in column.readings}
    mark = decimal or (min(shown) if len(shown) == 1 else known)
    for name, column in columns.items():
        taken = _mark_of(column, keys[name][0], mark, decimal)
        frame[name] = column.readings[taken]
        if not _is_plain(column.cell, column.readings[taken][column.place]):
            per_cent = " per cent" if column.unit == "%" else ""
            told[name] = f"{column.cell.strip()!r} as {column.at(taken)}{per_cent}"
    return Numbers(frame, told, mark)


def _mark_of(column: _Column, key: str, mark: str | None, decimal: str | None) -> str:
    """The decimal mark that a column is read with.

    Raises:
        InputError: it has two readings, or another than ``decimal`` says.
    """
    first, *others = column.readings
    if decimal and decimal not in column.readings:
        problem = f"{column.cell.strip()!r} is no number whose decimal mark is {decimal!r}"
        raise InputError(f"{key}: {problem}; mend it, or data.source.decimal")
    if not others or column.at(first) == column.at(others[0]):
        return first
    if mark:
        return mark
    problem = f"{column.cell.strip()!r} is {column.at('.')} or {column.at(',')}"
    raise InputError(f"{key}: {problem}; say which mark is decimal: data.source.decimal '.' or ','")


def _is_plain(cell: str, number: float) -> bool:
    """Whether programs write the number as the cell does."""
    try:
        return bool(float(cell) == number)
    except ValueError:
        return False


def _read(cells: Series, key: str, fix: str) -> _Column | Series:
    """What a column of text may mean; the column, with true and false in place of these words, if that is no number.

    Raises:
        InputError: numbers have units, or a few cells are no numbers.
    """
    import pandas

    pd: Any = pandas
    places, distinct = pd.factorize(cells)
    distinct = pd.Series(distinct, dtype=object)
    filled = distinct[~distinct.isin(MISSING)]
    if len(filled) and filled.str.lower().isin(TRUTH).all():
        return cells.str.lower().map(TRUTH).astype(object).where(cells.notna(), None)
    if not filled.head(100).str.contains(r"\d").any():
        return cells
    parts = filled.str.extract(f"^{_NUMBER}$")
    bodies = parts[4].where((parts[0] == "(") == (parts[6] == ")")).fillna("")
    counts = np.bincount(places[places >= 0], minlength=len(distinct))
    are = {mark: _plainly(bodies, mark) for mark in ".,"}
    wrong = min((filled[plain == ""] for plain in are.values()), key=lambda them: counts[them.index].sum())
    if len(wrong):
        few = 2 * counts[wrong.index].sum() < counts[filled.index].sum()
        if wrong.str.fullmatch(_WITH_UNIT).all() and wrong.str.contains(_UNIT).all():
            raise InputError(f"{key}: {UNITS.format(wrong.iloc[0].strip()[:30])}{fix}")
        if few:
            row = cells.index[int((places == wrong.index[0]).argmax())]
            others = int(counts[wrong.index].sum()) - 1
            problem = f"{wrong.iloc[0][:20]!r} in row {row} is no number{f', nor are {others} others' * (others > 0)}"
            raise InputError(f"{key}: {problem}; mend {fix}")
        return cells
    units = parts[2] + parts[5]
    if (units != units.iloc[0]).any():
        unlike = filled[units != units.iloc[0]].iloc[0].strip()
        raise InputError(f"{key}: {UNITS.format(unlike[:30])}{fix}")
    sign = 1 - 2 * (parts[1].isin(("-", "−")) | parts[3].isin(("-", "−")) | (parts[0] == "("))
    numbers = {mark: plain.astype(float) * sign for mark, plain in are.items() if (plain != "").all()}
    readings = {mark: each.reindex(distinct.index).to_numpy()[places] for mark, each in numbers.items()}
    for each in readings.values():
        each[places < 0] = np.nan  # place -1 is the last one
    first, *others = numbers.values()
    plain: Any = pd.to_numeric(filled, errors="coerce")
    unlike = first[(first != others[0]) if others else (first != plain)]
    shows = next(iter([*unlike.index, *first[first != plain].index, *filled.index]))
    return _Column(readings, distinct[shows], int((places == shows).argmax()), units.iloc[0])


def _plainly(bodies: Series, mark: str) -> Series:
    """Numbers as programs write them, of those that take a decimal mark; empty for all that are no numbers then."""
    best = bodies.where(bodies.str.fullmatch(_pattern(mark, "")), "").str.replace(mark, ".", regex=False)
    for group in GROUPS.replace(mark, ""):
        if bodies.str.contains(group, regex=False).any():
            plain = bodies.where(bodies.str.fullmatch(_pattern(mark, group)), "")
            plain = plain.str.replace(group, "", regex=False).str.replace(mark, ".", regex=False)
            best = max(best, plain, key=lambda them: (them != "").sum())
    return best


def _pattern(mark: str, group: str) -> str:
    mark, group = re.escape(mark), re.escape(group)
    grouped = rf"|\d{{1,3}}(?:{group}\d{{3}})+" if group else ""
    grouped += r"|\d{1,2}(?:,\d{2})+,\d{3}" if group == "," else ""  # as in India
    return rf"(?:(?:\d+{grouped})(?:{mark}\d*)?|{mark}\d+)(?:[eE][-+]?\d+)?"
