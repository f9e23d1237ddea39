"""Tables of numbers and categories: their sources, and rows as tensors.

:func:`fit_columns` fits each column's median, quantiles or categories on the training rows alone. The result is plain
values, so a checkpoint holds all that :func:`encode` needs for new rows.
"""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from numbers import Number
from pathlib import Path
from typing import Any, Literal, NotRequired, TypeAlias, TypedDict

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from lightning.fabric.utilities.rank_zero import rank_zero_only
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import QuantileTransformer
from torch import Tensor

from common.errors import InputError, nearest
from common.sources.compressed import ending
from common.sources.csv_files import are_codes, csv_files, padded
from common.sources.files import READERS, column, hashed, load_splits, named_columns, part_files, parts_named
from common.sources.labelled import Parts, check_split, one_of_each, same_parts, together
from common.sources.numerals import MISSING, read_numbers

# pandas is imported where it is used; its annotations fit neither the checker nor each other.
DataFrame: TypeAlias = Any
Series: TypeAlias = Any
Scaling = Literal["quantile", "standard"]
MAX_QUANTILES = 512
FILE = "(file)"  # the column that says in which file of a folder a row stands
BUNDLED = [f"load_{name}" for name in ("breast_cancer", "diabetes", "digits", "iris", "linnerud", "wine")]


class TableSource:
    """A source of rows, one per sample.

    Attributes:
        target: name of the column to predict, or names of several; None for rows without them.
        target_unit: divisor of every target; 1000 gives errors in thousands.
        categorical: names of numeric columns that hold categories.
        split: name of a column that says the part of each row: train, val or test. The net gets none of these three.
        group: name of a column whose equal values stay together in a split, such as a patient.
        time: name of a column of numbers or dates; the latest rows test, those before them validate.
        shown: the decimal mark that the rows' text shows, once they are read; None if it shows none.
    """

    target: list[str] | str | None = None
    target_unit: float = 1.0
    categorical: Sequence[str] = ()
    split: str | None = None
    group: str | None = None
    time: str | None = None
    shown: str | None = None

    @property
    def targets(self) -> list[str]:
        """Names of the columns to predict."""
        return [self.target] if isinstance(self.target, str) else list(self.target or ())

    def read(self) -> DataFrame:
        """Read everything.

        Raises:
            InputError: a file or a named column is missing or malformed.
        """
        raise NotImplementedError

    def take_over(self, columns: "Columns", class_names: Sequence[str] = ()) -> None:
        """Read codes as the training of a checkpoint did, whose facts these are; for sources that may lose them."""

    def columns(self, names: Sequence[str]) -> dict[str, list[Any]]:
        """Columns by name, in the order of the rows, those too that :meth:`read` leaves out.

        Raises:
            InputError: there is no such column.
        """
        raise InputError(f"data.keep: {type(self).__name__} has no columns to keep; remove it")


class Diabetes(TableSource):
    """The 442 patients that come with scikit-learn: ten measurements, and how far diabetes progressed in a year.

    Source: Efron et al., Least Angle Regression (https://arxiv.org/abs/math/0406456).
    """

    target, categorical = "progression", ("sex",)

    def read(self) -> DataFrame:  # noqa: D102
        from sklearn.datasets import load_diabetes

        data: Any = load_diabetes(as_frame=True, scaled=False)
        return data.frame.rename(columns={"target": "progression"})


class Table(TableSource):
    """Rows of CSV, JSONL or Parquet files, of a hub data set's train split, or of a data set of scikit-learn.

    Columns of numbers are numeric; columns of text or of true and false are categorical. Numbers may be written as
    ``1,200``, ``1.200,5``, ``45 %`` or ``$3``.

    Args:
        path: a file or a glob, a folder with files called train, val and test, a hub name, or a loader such as
            ``sklearn.datasets.load_wine``.
        target: name of the column to predict, or names of several; None for rows to predict, with or without them.
        target_unit: divisor of every target; 1000 gives errors in thousands.
        categorical: columns of numbers that are categories, such as postal codes.
        drop: columns to leave out.
        split: a column that says the part of each row: train, val or test. The net gets none of these three.
        group: a column whose equal values stay together in a split, such as a patient.
        time: a column of numbers or dates; the latest rows test, those before them validate.
        decimal: the decimal mark of numbers in text; None for that which the columns show.
        encoding: of CSV files; None for UTF-8, or UTF-16 where a file says so.

    Attributes:
        of_classes: whether the target is a class, whose words stay as they are.
    """

    of_classes = False

    def __init__(
        self,
        path: str,
        target: list[str] | str | None = None,
        target_unit: float = 1.0,
        categorical: Sequence[str] = (),
        drop: Sequence[str] = (),
        split: str | None = None,
        group: str | None = None,
        time: str | None = None,
        decimal: Literal[".", ","] | None = None,
        encoding: str | None = None,
    ):
        if not (np.isfinite(target_unit) and target_unit > 0):
            raise InputError(f"data.source.target_unit must be above 0, got {target_unit}")
        self.path, self.target, self.target_unit = path, target, target_unit
        for name in self.targets:
            if self.targets.count(name) > 1:
                raise InputError(f"data.source.target: lists {name!r} twice; list it once")
            if name in (*categorical, *drop):
                raise InputError(f"data.source.target {name!r} is also listed in categorical or drop; remove it there")
            if name in (split, group, time):
                raise InputError(f"data.source.target {name!r} also splits the rows; name another column for that")
        self.categorical, self.drop = categorical, drop
        self._parts = part_files(Path(path).expanduser())
        if self._parts and split:
            raise InputError(f"data.source.split {split!r}: the names of the files split the rows already; remove it")
        self.split, self.group, self.time = FILE if self._parts else split, group, time
        if len(both := [key for key in ("split", "group", "time") if getattr(self, key)]) > 1:
            raise InputError(f"data.source.{both[1]}: the rows are already split by {both[0]}; give one of them")
        if (by := self.split or group or time) in drop:
            raise InputError(f"data.source.drop: {by!r} splits the rows, and no net gets it; remove it here")
        self._codes = [*self.targets, *categorical, *filter(None, [group])]
        self.decimal, self.encoding = decimal, encoding
        self._numeric: Sequence[str] | None = None  # of the columns that a checkpoint knows

    def take_over(self, columns: "Columns", class_names: Sequence[str] = ()) -> None:  # noqa: D102
        targets = self.targets if are_codes(class_names) else ()
        self._codes = [*columns["categorical"], *targets, *filter(None, [self.group])]
        numbers = columns["targets"] if columns["mean"] else ()  # a class has no mean
        self._numeric, self.shown = [*columns["numeric"], *numbers], columns.get("decimal")

    def read(self) -> DataFrame:  # noqa: D102
        rows = self._load(self._codes)
        for key in ("target", "categorical", "drop", *["split", "group", "time"] * bool(self.targets)):
            names = getattr(self, key)
            for name in [names] if isinstance(names, str) else names or ():
                column(rows, name, f"data.source.{key}")
        # A row's number tells its place in the file, which may be sorted by the target.
        for name in rows.column_names if self.targets else ():
            if re.fullmatch(r"Unnamed: \d+|__index_level_\d+__", name) and name not in self.drop:
                problem = f"has a column without a name, {name!r}, as pandas writes an index"
                raise InputError(f"data.source.path {self.path}: {problem}; list it in data.source.drop or name it")
        frame = self._with_numbers(rows.remove_columns(list(self.drop)).to_pandas())
        if self.targets and self._numeric is None and not rank_zero_only.rank:
            known = {*self.targets, *self.categorical, *splitting(self)}
            numbers = [name for name in _numeric(frame) if name not in known]
            for name, code in padded(self._csv_files(), numbers, self.encoding).items():
                told = f"is read as numbers, and {code!r} as {int(code)}"
                fix = "list it in data.source.categorical if it holds codes"
                print(f"data.source: column {name!r} {told}; {fix}", flush=True)
        return frame

    def columns(self, names: Sequence[str]) -> dict[str, list[Any]]:  # noqa: D102
        return named_columns([self._load(as_written=True)], names)

    def _csv_files(self) -> list[Path]:
        files = self._parts.values() or csv_files(self.path)
        return [file for file in files if READERS[ending(file)] == "csv"]

    def _with_numbers(self, frame: DataFrame) -> DataFrame:
        """The rows with numbers in place of text that writes numbers, which is said once."""
        targets = () if self.of_classes else self.targets
        words = {*self.categorical, *splitting(self), *self.targets}
        names = [name for name in frame.columns if name not in words] if self._numeric is None else self._numeric
        names = [name for name in dict.fromkeys((*names, *targets)) if name in frame.columns]
        written = self._written if self._csv_files() else None
        frame, told, self.shown = read_numbers(frame, names, targets, self.decimal, self.shown, written)
        if told and self._numeric is None and not rank_zero_only.rank:
            some = ", ".join(f"{name!r} ({what})" for name, what in list(told.items())[:3])
            more = f" and {len(told) - 3} more" if len(told) > 3 else ""
            print(f"data.source: columns are read as numbers: {some}{more}", flush=True)
        return frame

    def _written(self, names: Sequence[str]) -> DataFrame:
        return self._load(as_written=True).select_columns(list(names)).to_pandas()

    def _load(self, codes: Sequence[str] = (), as_written: bool = False) -> Any:
        """The rows of a file or of a hub data set's train split, or those that a loader of scikit-learn gives."""
        import datasets
        import pandas

        package, _, name = self.path.rpartition(".")
        if package != "sklearn.datasets":
            splits = load_splits(self.path, as_written=as_written, codes=codes, encoding=self.encoding)
            if not self._parts:
                return splits.parts[0]
            frame = pandas.concat([part.to_pandas() for part in splits.parts], ignore_index=True)
            sizes = [len(frame) - splits.num_val - splits.num_test, splits.num_val, splits.num_test]
            frame[FILE] = np.repeat(["train", "val", "test"], sizes)
            return datasets.Dataset.from_pandas(frame, preserve_index=False)
        from sklearn import datasets as bundled

        if name not in BUNDLED:
            hint = nearest(name, BUNDLED) or f"; it has {', '.join(BUNDLED)}"
            raise InputError(f"data.source.path {self.path}: no such loader{hint}")
        data: Any = getattr(bundled, name)(as_frame=True)
        frame = data.frame
        if "target" in frame and "target_names" in data:
            frame["target"] = np.asarray(data.target_names)[frame["target"]]
        return datasets.Dataset.from_pandas(frame)


def _numeric(frame: DataFrame) -> list[str]:
    from pandas.api.types import is_numeric_dtype

    return [name for name in frame.columns if is_numeric_dtype(frame[name])]


class Numeric(TypedDict):
    """Facts of a numeric column in training: statistics, ascending quantiles, and whether values are missing."""

    median: float
    mean: float
    std: float
    quantiles: list[float]
    has_missing: bool


class Columns(TypedDict):
    """Facts for encoding rows, fitted on training rows; plain values, so a checkpoint can hold them.

    ``mean`` and ``std`` are those of each target, in the ``unit``; there are none if the target is a class.
    ``decimal`` is the decimal mark that numbers in text show; there is none in older checkpoints.
    ``categorical`` lists each column's categories; all others share one class, and missing values have another.
    """

    targets: list[str]
    unit: float
    mean: list[float]
    std: list[float]
    scaling: str
    numeric: dict[str, Numeric]
    categorical: dict[str, list[str]]
    decimal: NotRequired[str | None]


def row_keys(frame: DataFrame) -> Int64[Tensor, " rows"]:
    """A number for each row: rows of equal values have equal ones, and 007 equals 7.

    Gaps turn a column's whole numbers into floats, and one word all its numbers into text; neither changes a key. A
    word for a gap, such as NA, equals a gap.
    """
    import pandas

    pd: Any = pandas
    values = {}
    for name in sorted(frame.columns):
        cells = frame[name]
        values[f"number {name}"] = numbers = pd.to_numeric(cells, errors="coerce").astype(float)
        words = numbers.isna() & cells.notna() & ~cells.isin(MISSING)
        values[f"word {name}"] = cells.astype(str).where(words, "") if words.any() else ""
    hashed = pd.util.hash_pandas_object(pd.DataFrame(values), index=False)
    return torch.from_numpy(hashed.to_numpy().view(np.int64).copy())


def row_numbers(keys: Int64[Tensor, " rows"], frame: DataFrame, source: TableSource) -> dict[str, Tensor]:
    """What :func:`common.sources.labelled.sample_numbers` is of samples, with the keys of :func:`split_rows`."""
    whole = frame.drop(columns=source.split or [])
    labelled = row_keys(whole) if source.group else keys
    return {"keys": keys, "inputs": row_keys(whole.drop(columns=source.targets)), "labelled": labelled}


def tell_equal(keys: Int64[Tensor, " rows"], parts: Parts) -> None:
    """Say how many test rows equal a training row. They may by chance, and may make the test too easy."""
    equal = int(torch.isin(keys[parts.test], keys[parts.train]).sum())
    if equal and not rank_zero_only.rank:
        print(f"data.source: {equal} of {len(parts.test)} test rows equal a training row", flush=True)


def splitting(source: TableSource) -> list[str]:
    """The column by which the rows are split, which the net does not get."""
    return [name for name in (source.split, source.group, source.time) if name]


def split_rows(
    frame: DataFrame, source: TableSource, val_fraction: float, test_fraction: float, seed: int
) -> tuple[Parts, Int64[Tensor, " rows"]]:
    """Split rows by the source's column, or at random: first the test part, then the validation part from the rest.

    At random, ``train_test_split(rows, test_size=test_fraction, random_state=seed)`` gives the same test part. Where
    the column ``split`` names no row for validation or testing, they are drawn from those for training.

    Args:
        frame: the rows.
        source: names the column to split by, if there is one.
        val_fraction: share of all rows for validation; of groups, if the source has them.
        test_fraction: share of all rows for testing, likewise.
        seed: seed of the split alone, so runs with other seeds test on the same rows.

    Returns:
        The parts, and the rows' keys, see :func:`common.sources.labelled.same_parts`.

    Raises:
        InputError: the shares leave nothing to train on, the seed is out of range, there are too few rows, or the
            column cannot split them.
    """
    check_split(val_fraction, test_fraction, seed)
    parts, drawn, what = [np.arange(0)] * 3, np.arange(len(frame)), "rows"
    keys = row_keys(frame.drop(columns=source.split or []))
    if source.split:
        of = parts_named(frame[source.split].tolist(), source.split)
        parts = [np.flatnonzero(of == number) for number in range(3)]
        drawn, what = parts[0], f"rows for training by data.source.split {source.split!r}"
    elif source.group:
        keys = hashed(frame[source.group].tolist(), f"data.source.group {source.group!r}")
        drawn, what = one_of_each(keys).numpy(), f"values of data.source.group {source.group!r}"
    total = len(frame) if source.split else len(drawn)
    shares = {2: test_fraction * (not len(parts[2])), 1: val_fraction * (not len(parts[1]))}
    sizes = [len(drawn) - total * sum(shares.values()), *(total * share for share in shares.values() if share)]
    if min(sizes) < 2:
        raise InputError(f"data.source.path: {len(drawn)} {what} are too few: each part needs at least 2; add rows")
    if source.time:
        times = _times(frame[source.time], f"data.source.time {source.time!r}")
        order = np.argsort(times, kind="stable")
        test = total - round(test_fraction * total)
        ends = [test - round(val_fraction * total), test]
        ends = [int(np.searchsorted(times[order], times[order][end])) for end in ends]  # equal times go together
        if not 0 < ends[0] < ends[1]:
            raise InputError(f"data.source.time {source.time!r}: too many rows have the same time; take another column")
        train, val, test = np.split(order, ends)
        return Parts(*map(torch.from_numpy, (train, val, test))), keys
    for number, fraction in shares.items():
        if fraction:
            share = fraction if len(drawn) == total else fraction * total / len(drawn)
            rest, part = train_test_split(drawn, test_size=share, random_state=seed)
            drawn, parts[number] = np.asarray(rest), np.asarray(part)
    chosen = [torch.from_numpy(part) for part in (drawn, parts[1], parts[2])]
    return Parts(*(together(chosen, keys) if source.group else chosen)), keys


def same_rows(
    frame: DataFrame,
    source: TableSource,
    keys: Int64[Tensor, " rows"],
    parts: Parts,
    known: Mapping[str, Tensor],
    equal_together: bool = False,
    emptied: Sequence[str] = (),
) -> Parts:
    """The parts of :func:`split_rows`, except that rows which a checkpoint knows keep theirs.

    A new row that equals a known one goes with it if rows go in groups, or ``equal_together`` says so. ``emptied`` are
    the classes that no row has.

    Raises:
        InputError: those of :func:`common.sources.labelled.same_parts`, or rows in order of time are new.
    """
    if source.time and (new := int((~torch.isin(keys, known["keys"])).sum())):
        problem = f"{new} rows are new to the checkpoint, and the latest are there to test"
        raise InputError(f"data.source.time {source.time!r}: {problem}; begin a new run, or predict them")
    own = parts_named(frame[source.split].tolist(), source.split).tolist() if source.split else ()
    return same_parts(keys, parts, known, {*own} - {0}, equal_together or source.group is not None, emptied)


def _times(values: Series, key: str) -> np.ndarray:
    """Numbers in the order of a column of numbers or dates.

    Raises:
        InputError: a value is missing, or is neither; dates must all be written alike.
    """
    import pandas

    pd: Any = pandas
    if missing := int(values.isna().sum()):
        raise InputError(f"{key}: {missing} of {len(values)} values are missing; fill or drop those rows")
    times = pd.to_numeric(values, errors="coerce")
    if times.isna().any():
        days = values.astype(str).str.fullmatch(r"\s*\d{1,2}\D\d{1,2}\D\d{2,4}(\D.*)?")  # which pandas guesses
        if days.any():
            problem = "may begin with the day or with the month"
            raise InputError(f"{key}: {str(values[days].iloc[0])[:30]!r} {problem}; write dates as 2024-12-31")
        with warnings.catch_warnings(action="ignore"):  # of dates without one format, which are refused
            times = pd.to_datetime(values, errors="coerce", utc=True)  # by the format of the first
    if times.isna().any():
        wrong = str(values[times.isna()].iloc[0])[:30]
        raise InputError(f"{key}: {wrong!r} is neither a number nor a date as the others; write them as 2024-12-31")
    return times.to_numpy()


def read_targets(frame: DataFrame, source: TableSource) -> Float[np.ndarray, "rows targets"]:
    """The columns of numbers to predict, in their unit.

    Raises:
        InputError: the source names no target, a value is no finite number, or a target is a class.
    """
    _check_named(source)
    columns = []
    for name in source.targets:
        key = f"data.source.target {name!r}"
        _refuse_classes(frame[name], key)
        columns.append(target := _numbers(frame[name], key))
        if bad := int((~np.isfinite(target)).sum()):
            raise InputError(f"{key}: {bad} of {len(target)} values are missing or infinite; drop those rows")
        if len(set(target)) == 2:
            raise InputError(f"{key}: holds two values, {min(target):g} and {max(target):g}{CLASSES}")
    return np.stack(columns, 1) / source.target_unit


CLASSES = "; a class is for recipes/classification/train.py with --config recipes/classification/table.yaml"


def _refuse_classes(values: Series, key: str) -> None:
    """Refuse a target of words, or of true and false; one word among numbers is a mistake in the table."""
    from pandas import to_numeric

    known = values[values.notna()]
    if known.map(type).eq(bool).all():
        raise InputError(f"{key}: holds true and false{CLASSES}")
    if known.map(type).eq(str).all():
        numbers: Any = to_numeric(known, errors="coerce")
        words: Any = known[numbers.isna()]
        if 2 * len(words) > len(known):
            raise InputError(f"{key}: holds words, such as {words.iloc[0][:20]!r}{CLASSES}")


def read_classes(frame: DataFrame, source: TableSource) -> tuple[Int64[Tensor, " rows"], list[str]]:
    """Class numbers, and a name for each, of the column to predict; its values in order.

    Raises:
        InputError: the source names no target, a value is missing or of another kind than text or a whole number, or
            all are equal.
    """
    import pandas

    pd: Any = pandas
    _check_named(source)
    key = f"data.source.target {source.target!r}"
    values = frame[source.target]
    if missing := int(values.isna().sum()):
        raise InputError(f"{key}: {missing} of {len(values)} labels are missing; fill or drop those rows")
    _refuse_other_kinds(values, key, "where a class is needed")
    if pd.api.types.is_float_dtype(values) and (values % 1 != 0).any():
        problem = f"holds numbers, such as {values[values % 1 != 0].iloc[0]:g}, and a class is a word or a whole number"
        raise InputError(f"{key}: {problem}; for numbers see recipes/regression")
    numbers, distinct = pd.factorize(values, sort=True)
    names = _labels(pd.Series(distinct)).tolist()
    if len(names) < 2:
        raise InputError(f"{key}: {names[0]!r} is the only class; there is nothing to tell apart")
    return torch.from_numpy(numbers).long(), names


def _check_named(source: TableSource) -> None:
    if not source.targets:
        raise InputError("data.source.target is null, but training needs it; name the column to predict")


def known_targets(frame: DataFrame, columns: Columns) -> Float[np.ndarray, "rows targets"]:
    """The targets of rows to predict, in their unit; NaN where a value or the column is missing.

    Raises:
        InputError: a value is no finite number.
    """
    found = [
        _numbers(frame[name], f"data.predict_source: column {name!r}") if name in frame else np.full(len(frame), np.nan)
        for name in columns["targets"]
    ]
    return np.stack(found, 1) / columns["unit"]


def fit_columns(
    frame: DataFrame, target: Float[np.ndarray, "rows targets"], source: TableSource, scaling: Scaling, rare: int
) -> Columns:
    """Fit the facts that :func:`encode` needs.

    Args:
        frame: the training rows.
        target: their targets, in their unit; none of classes.
        source: their source; it names the targets and the columns of numbers that are categories.
        scaling: of numeric columns: ``quantile`` to a normal distribution, or ``standard`` to zero mean and unit
            variance.
        rare: categories of fewer rows share one class with unseen ones.

    Raises:
        InputError: ``rare`` is below 1, or a column has nothing to learn from or values that cannot be encoded.
    """
    if rare < 1:
        raise InputError(f"data.rare must be at least 1, got {rare}")
    numeric, categorical = {}, {}
    for name in frame.columns.drop([*source.targets, *splitting(source)]):
        values, key = frame[name], f"data.source.path: column {name!r}"
        if not values.notna().any():
            raise InputError(f"{key} has no value in the training rows; list it in data.source.drop")
        if name not in source.categorical and _holds_numbers(values, key):
            numeric[name] = _fit_numbers(_numbers(values, key), key)
        else:
            counts = _labels(values).value_counts()
            categorical[name] = sorted(counts.index[counts >= rare])
            if not categorical[name]:
                hint = "list it in data.source.drop, or lower data.rare"
                raise InputError(f"{key}: none of its {len(counts)} categories has {rare} training rows; {hint}")
    if not numeric and not categorical:
        raise InputError("data.source.path: has no column beside the target; there is nothing to predict it from")
    for name, values in zip(source.targets, target.T, strict=False):
        if not values.std() > 0:
            problem = f"is {values[0]:g} in every training row; there is nothing to learn"
            raise InputError(f"data.source.target {name!r}: {problem}")
    return Columns(
        targets=source.targets,
        unit=float(source.target_unit),
        mean=[float(values.mean()) for values in target.T],
        std=[float(values.std()) for values in target.T],
        scaling=scaling,
        numeric=numeric,
        categorical=categorical,
        decimal=source.shown,
    )


def _fit_numbers(values: Float[np.ndarray, " rows"], key: str) -> Numeric:
    known = values[~np.isnan(values)]
    if known.min() == known.max():
        raise InputError(f"{key} is {known[0]:g} in every training row; list it in data.source.drop")
    points = min(len(known), MAX_QUANTILES)
    quantiles: Any = QuantileTransformer(n_quantiles=points, subsample=len(known)).fit(known[:, None]).quantiles_
    return Numeric(
        median=float(np.median(known)),
        mean=float(known.mean()),
        std=float(known.std()),
        quantiles=quantiles[:, 0].tolist(),
        has_missing=len(known) < len(values),
    )


def _holds_numbers(values: Series, key: str) -> bool:
    """Whether a column holds numbers, rather than text or true and false."""
    from pandas import to_numeric
    from pandas.api.types import is_numeric_dtype

    known = values[values.notna()]
    if known.map(type).eq(bool).all():
        return False
    if is_numeric_dtype(values):
        return True
    _refuse_other_kinds(known, key, "neither numbers nor text; list it in data.source.drop")
    numbers: Any = to_numeric(known, errors="coerce")
    wrong = known[numbers.isna()]
    if len(wrong) and len(wrong) < len(known) / 2:
        problem = f"{len(wrong)} of {len(known)} values are no numbers, such as {str(wrong.iloc[0])[:20]!r}"
        raise InputError(f"{key}: {problem}; mend them, or list it in data.source.categorical")
    return not len(wrong)


def _refuse_other_kinds(known: Series, key: str, problem: str) -> None:
    """Refuse dates, durations and nested values; pandas silently makes numbers or NaN of them."""
    if kind := next((type(value).__name__ for value in known if not isinstance(value, str | Number)), ""):
        raise InputError(f"{key} holds {kind}, {problem}")


def _numbers(values: Series, key: str) -> Float[np.ndarray, " rows"]:
    """Finite numbers in fp64, NaN where a value is missing."""
    from pandas import to_numeric
    from pandas.api.types import is_numeric_dtype

    if not is_numeric_dtype(values):
        _refuse_other_kinds(values[values.notna()], key, "where numbers are needed")
    numbers: Any = to_numeric(values, errors="coerce")
    wrong = values[numbers.isna() & values.notna()]
    if len(wrong):
        raise InputError(f"{key}: {str(wrong.iloc[0])[:20]!r} in row {wrong.index[0]} is no number; mend it")
    array = numbers.to_numpy(np.float64, na_value=np.nan)
    if (infinite := np.isinf(array)).any():
        raise InputError(f"{key}: the number in row {values.index[int(infinite.argmax())]} is infinite; mend it")
    return array


def _labels(values: Series) -> Series:
    """Categories as text, None where missing; 3 and 3.0 are the same, since gaps turn whole numbers into floats."""

    def written(value: Any) -> str:
        if not isinstance(value, float | np.floating):
            return str(value)
        return str(int(value)) if float(value).is_integer() else f"{value:.15g}"

    if values.dtype == object or "float" in str(values.dtype).lower():
        return values.map(written, na_action="ignore").astype(object).where(values.notna(), None)
    return values.astype(str).astype(object).where(values.notna(), None)


def _number(label: str) -> str:
    """A whole number without leading zeros and decimals, as readers of numbers write it; other text as it is."""
    found = re.fullmatch(r"(-?)0*(\d+)(\.0*)?", label)
    return found[1] + found[2] if found else label


def _scaled(values: Float[np.ndarray, "rows numeric"], columns: Columns) -> Float[np.ndarray, "rows numeric"]:
    facts = list(columns["numeric"].values())
    if columns["scaling"] == "standard":
        return (values - [each["mean"] for each in facts]) / [each["std"] for each in facts]
    scaled = np.empty_like(values)
    for number, each in enumerate(facts):  # columns with gaps have fewer quantiles
        quantiles: Any = QuantileTransformer(output_distribution="normal")
        quantiles.quantiles_ = np.array(each["quantiles"])[:, None]
        quantiles.references_ = np.linspace(0, 1, len(each["quantiles"]))
        quantiles.n_features_in_ = 1
        scaled[:, number] = quantiles.transform(values[:, [number]])[:, 0]
    return scaled


def raw_numbers(frame: DataFrame, columns: Columns, key: str = "data.source.path") -> Float[np.ndarray, "rows numeric"]:
    """The numeric columns, unscaled; NaN where a value is missing.

    Raises:
        InputError: a column is missing, or a value is no finite number.
    """
    arrays = [_numbers(_column(frame, name, key), f"{key}: column {name!r}") for name in columns["numeric"]]
    return np.stack(arrays, 1) if arrays else np.empty((len(frame), 0))


def _column(frame: DataFrame, name: str, key: str) -> Series:
    if name not in frame.columns:
        hint = nearest(name, map(str, frame.columns))
        raise InputError(f"{key}: lacks the column {name!r}, which the net was trained with{hint}")
    return frame[name]


def frame_of(samples: Any) -> DataFrame:
    """A frame of pandas, or what becomes one, such as a list of records.

    Raises:
        InputError: it becomes none, or has no rows.
    """
    from pandas import DataFrame

    try:
        frame = DataFrame(samples)
    except (ValueError, TypeError) as error:
        raise InputError(f"samples: no rows of a table ({error}); give a frame of pandas") from error
    if not len(frame):
        raise InputError("samples: there are none to predict")
    return frame


def encode(
    frame: DataFrame, columns: Columns, key: str = "data.source.path"
) -> tuple[Float32[Tensor, "rows numeric"], Int64[Tensor, "rows categorical"]]:
    """Rows as tensors: numbers filled with the median and scaled, categories and gaps as class numbers.

    In a categorical column class 0 is a value that was rare or unseen in training, class 1 a missing one. After these
    columns comes one more for each numeric column with gaps in training: 1 where the value is missing, else 0.

    Args:
        frame: rows with at least the fitted columns.
        columns: the result of :func:`fit_columns`.
        key: the setting of the rows, for messages.

    Raises:
        InputError: a column is missing, holds text instead of numbers or numbers instead of true and false, or numbers
            where training had text with leading zeros.
    """
    from pandas import Index
    from pandas.api.types import is_numeric_dtype

    raw, facts = raw_numbers(frame, columns, key), columns["numeric"].values()
    filled = np.where(np.isnan(raw), [each["median"] for each in facts], raw)
    codes = []
    for name, categories in columns["categorical"].items():
        values = _column(frame, name, key)
        labels = _labels(values)
        labels = labels.where(~labels.isin(MISSING - {*categories}), None)  # gaps, if they were no words in training
        given, kept = {*labels[labels.notna()]}, {*categories}
        # Other readers of CSV files drop leading zeros from columns of digits.
        with_zeros = {_number(label): label for label in categories if re.fullmatch(r"0\d+", label)}
        if (lost := with_zeros.keys() & given - kept) and not any(re.fullmatch(r"0\d+", label) for label in given):
            kind = "number" if is_numeric_dtype(values) else "text"
            problem = f"holds the {kind} {min(lost)}, where training had the text {with_zeros[min(lost)]!r}"
            raise InputError(f"{key}: column {name!r} {problem}; give it as text, in a Parquet or JSONL file")
        # Where training had numbers, text such as 007 or 7.0 is the number that it writes.
        plain = {_number(label): label for label in categories if label not in with_zeros.values()}
        same = {} if with_zeros else {label: plain.get(_number(label), label) for label in given - kept}
        if same := {old: new for old, new in same.items() if old != new and new not in given}:
            labels = labels.map(lambda label, same=same: same.get(label, label), na_action="ignore")
        found = Index(categories, dtype=object).get_indexer(Index(labels, dtype=object))
        there = labels[labels.notna()]
        if len(there) and (found < 0).all() and _kind(there) != _kind(categories):
            problem = f"holds {_kind(there)}, such as {there.iloc[0]!r}, and in training {_kind(categories)}"
            raise InputError(f"{key}: column {name!r} {problem}, such as {categories[0]!r}; write them alike")
        codes.append(np.select([labels.isna(), found < 0], [1, 0], found + 2))
    codes += [np.isnan(raw[:, number]) for number, each in enumerate(facts) if each["has_missing"]]
    categorical = np.stack(codes, 1) if codes else np.empty((len(frame), 0))
    return torch.from_numpy(_scaled(filled, columns)).float(), torch.from_numpy(categorical).long()


def tell_unknown(frame: DataFrame, columns: Columns, categorical: Int64[Tensor, "rows categorical"]) -> None:
    """Say of each categorical column how many rows to predict have a value that training lacks, and name one.

    Args:
        frame: the rows.
        columns: facts of the training rows.
        categorical: the rows, the result of :func:`encode`.
    """
    for number, name in enumerate(columns["categorical"]):
        unknown = (categorical[:, number] == 0).nonzero()[:, 0]
        if len(unknown) and not rank_zero_only.rank:
            value = str(frame[name].iloc[int(unknown[0])])[:20]
            told = f"{len(unknown)} of {len(frame)} rows hold values that training has in too few rows or in none"
            print(f"data.predict_source: column {name!r:.60}: {told}, such as {value!r}", flush=True)


def _kind(labels: Iterable[str]) -> str:
    """What all of these categories are."""
    if {*labels} <= {"True", "False"}:
        return "true and false"
    return "numbers" if all(re.fullmatch(r"-?\d+(\.\d*)?(e[+-]?\d+)?", each) for each in labels) else "text"


def check_source(frame: DataFrame, source: TableSource, columns: Columns) -> None:
    """Refuse a table that is not as that of a checkpoint's training.

    Raises:
        InputError: it has another target or unit, or other columns.
    """
    if source.targets != columns["targets"]:
        now, before = (", ".join(names) or "null" for names in (source.targets, columns["targets"]))
        raise InputError(f"data.source.target: is {now}, and that of the checkpoint {before}; take that")
    if source.target_unit != columns["unit"]:
        problem = f"is {source.target_unit}, and that of the checkpoint {columns['unit']}"
        raise InputError(f"data.source.target_unit: {problem}; take that")
    for name in (*columns["numeric"], *columns["categorical"]):
        _column(frame, name, "data.source.path")
    known = {*columns["targets"], *splitting(source), *columns["numeric"], *columns["categorical"]}
    if new := [name for name in frame.columns if name not in known]:
        problem = f"the checkpoint was not trained with the column {new[0]!r}"
        raise InputError(f"data.source.path: {problem}; list it in data.source.drop")


def cardinalities(columns: Columns) -> list[int]:
    """Number of classes of each column in the categorical tensor of :func:`encode`."""
    gaps = [2 for each in columns["numeric"].values() if each["has_missing"]]
    return [len(categories) + 2 for categories in columns["categorical"].values()] + gaps


def scaled_quantiles(columns: Columns) -> Float32[Tensor, "quantiles numeric"]:
    """Evenly spaced quantiles of the training rows' scaled numeric columns, from which nets take their bins."""
    facts = columns["numeric"].values()
    size = max((len(each["quantiles"]) for each in facts), default=0)
    points = np.linspace(0, 1, size)
    grids = [np.interp(points, np.linspace(0, 1, len(q["quantiles"])), q["quantiles"]) for q in facts]
    return torch.from_numpy(_scaled(np.stack(grids, 1) if grids else np.empty((size, 0)), columns)).float()
