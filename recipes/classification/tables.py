"""Tables whose rows each have a class: their source, and their rows as samples."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from typing_extensions import override

from common.checkpoint import check_made_by
from common.errors import InputError, speaking_of
from common.sources import Labelled, Source
from common.sources.files import encode_label_columns, encode_label_lists, hashed, parts_named, separated
from common.sources.labelled import (
    LabelledDataset,
    Parts,
    Samples,
    as_known,
    check_split,
    classes_without,
    differ_enough,
    drawn_parts,
    known_keys,
    one_of_each,
    parts_facts,
    sample_numbers,
)
from common.sources.tables import (
    DataFrame,
    Scaling,
    Table,
    check_source,
    encode,
    fit_columns,
    read_classes,
    row_keys,
    row_numbers,
    same_rows,
    split_rows,
    splitting,
    tell_equal,
    tell_unknown,
)

INPUTS = "numeric", "categorical"  # of the nets of common.nets.tables


class LabelledTable(Source):
    """Rows of CSV, JSONL or Parquet files, of a hub data set's train split, or of a data set of scikit-learn.

    Columns of numbers are numeric; columns of text or of true and false are categorical. Numbers may be written as
    ``1,200``, ``1.200,5``, ``45 %`` or ``$3``.

    Args:
        path: a file or a glob, a folder with files called train, val and test, a hub name, or a loader such as
            ``sklearn.datasets.load_wine``.
        label: name of the column of classes; or a list of columns of 0 and 1, one per label; None for rows to predict,
            with or without it.
        categorical: columns of numbers that are categories, such as postal codes.
        drop: columns to leave out.
        split: a column that says the part of each row: train, val or test. The net gets none of these three.
        group: a column whose equal values stay together in a split, such as a patient.
        time: a column of numbers or dates; the latest rows test, those before them validate.
        scaling: of numeric columns: ``quantile`` to a normal distribution, ``standard`` to zero mean and unit variance.
        rare: categories of fewer training rows share one class with unseen ones.
        separator: what stands between several labels in a cell of text; None if a cell is one label.
        decimal: the decimal mark of numbers in text; None for that which the columns show.
        encoding: of CSV files; None for UTF-8, or UTF-16 where a file says so.
    """

    def __init__(
        self,
        path: str,
        label: list[str] | str | None = None,
        categorical: Sequence[str] = (),
        drop: Sequence[str] = (),
        split: str | None = None,
        group: str | None = None,
        time: str | None = None,
        scaling: Scaling = "quantile",
        rare: int = 5,
        separator: str | None = None,
        decimal: Literal[".", ","] | None = None,
        encoding: str | None = None,
    ):
        with speaking():
            self.table = Table(path, label, 1.0, categorical, drop, split, group, time, decimal, encoding)
        self.table.of_classes = True
        self.split, self.group = self.table.split, group
        self.scaling: Scaling = scaling
        self.rare, self.separator = rare, separator

    @override
    def read(self) -> Labelled:
        raise InputError(
            "data.source: is a table, which is encoded by its training rows; classification alone takes it"
        )

    @override
    def columns(self, names: Sequence[str]) -> dict[str, list[Any]]:
        return self.table.columns(names)

    def classes(self, frame: DataFrame) -> Labelled:
        """The rows' classes, without the rows.

        Raises:
            InputError: no column of them is named, or a value is no class.
        """
        label = self.table.target
        if isinstance(label, list):
            found = [frame[name].tolist() for name in label]
            return Labelled({}, *encode_label_columns(label, found), labels="several")
        if label is not None and self.separator is not None:
            cells = zip(frame[label], frame[label].isna(), strict=True)
            lists = [separated(None if missing else cell, self.separator) for cell, missing in cells]
            return Labelled({}, *encode_label_lists(lists), labels="several")
        return Labelled({}, *read_classes(frame, self.table))


@contextmanager
def speaking() -> Iterator[None]:
    """Name the settings of :class:`LabelledTable` in messages of code that regression shares."""
    with speaking_of("data.source.label", "data.source.target"), speaking_of("data.source.rare", "data.rare"):
        yield


class TableSamples(Samples):
    """Rows in three parts, encoded by facts of the training rows alone.

    Args:
        source: the rows.
        val_fraction: see :func:`common.sources.labelled.split_by_class`.
        test_fraction: the same.
        seed: the same.
        known: facts of the checkpoint; empty if there is none.
        may_grow: whether classes that are new to the checkpoint come after its own.

    Attributes:
        facts: what they are ``made_by``, the arguments of split and encoding; ``class_names``, ``columns`` and
            ``parts``.

    Raises:
        InputError: the table cannot be read, encoded or split, or is not as that of the checkpoint.
    """

    def __init__(
        self,
        source: LabelledTable,
        val_fraction: float,
        test_fraction: float,
        seed: int,
        known: Mapping[str, Any],
        may_grow: bool = False,
    ):
        if known and not {"columns", "class_names"} <= known.keys():
            problem = "the checkpoint was not trained on classes of a table"
            raise InputError(f"data.facts_of: {problem}; name another, or null")
        table = source.table
        made_by = {
            "val_fraction": val_fraction, "test_fraction": test_fraction, "split_seed": seed,
            "source.scaling": source.scaling, "source.rare": source.rare, "source.categorical": list(table.categorical),
            "source.split": table.split, "source.group": table.group, "source.time": table.time,
            "source.separator": source.separator,
        }  # fmt: skip
        check_made_by(known, made_by)
        self._source, self._split = source, (val_fraction, test_fraction, seed)
        self.facts: dict[str, Any] = {**known, "made_by": made_by}
        self._may_grow = may_grow
        if not known or may_grow:
            self._read  # noqa: B018

    @cached_property
    def _read(self) -> tuple[Labelled, Parts]:
        source, known = self._source.table, self.facts.get("parts")
        if known is not None:
            source.take_over(self.facts["columns"], self.facts["class_names"])
        with speaking():
            frame = source.read()
            data = self._source.classes(frame)
            if known is not None:
                check_source(frame, source, self.facts["columns"])
                data = as_known(data, self.facts["class_names"], self._may_grow)
                self.facts["class_names"] = data.class_names
            parts, numbers, keys = self._drawn(frame, data, known)
            if known is not None:
                together = self.facts["equal_together"]
                parts = same_rows(frame, source, keys, parts, known, together, classes_without(data))
            else:
                tell_equal(keys, parts)
                train, no_numbers = frame.iloc[parts.train], np.empty((len(parts.train), 0))
                columns = fit_columns(train, no_numbers, source, self._source.scaling, self._source.rare)
                self.facts |= {"columns": columns, "class_names": data.class_names, "labels": data.labels}
        self.facts["parts"] = parts_facts(numbers, parts)
        return replace(data, inputs=self._inputs(frame)), parts

    def _drawn(
        self, frame: DataFrame, data: Labelled, known: Mapping[str, Tensor] | None
    ) -> tuple[Parts, dict[str, Tensor], Int64[Tensor, " rows"]]:
        """The parts, in order of time or with the classes in the same proportion; the rows' numbers, and known keys.

        Equal rows stay together, unless most rows have an equal one: then they are no copies, but of few columns.
        """
        source = self._source.table
        if source.time:
            self.facts["equal_together"] = False
            parts, keys = split_rows(frame, source, *self._split)
            numbers = row_numbers(keys, frame, source)
            return parts, numbers, known_keys(numbers, known, data)
        inputs = row_keys(frame.drop(columns=[*source.targets, *splitting(source)]))
        groups = hashed(frame[source.group].tolist(), f"data.source.group {source.group!r}") if source.group else None
        own = parts_named(frame[source.split].tolist(), source.split) if source.split else np.zeros(len(frame), int)
        order = torch.from_numpy(np.argsort(own, kind="stable"))
        num_train, num_val, num_test = np.bincount(own, minlength=3).tolist()
        if not num_train:
            raise InputError(f"data.source.split {source.split!r}: names no row for training; name some train")
        data = replace(data, groups=groups)
        its_groups = groups if groups is None else groups[order]
        ordered = replace(data, target=data.target[order], num_test=num_test, num_val=num_val, groups=its_groups)
        val_fraction, test_fraction, seed = self._split
        check_split(val_fraction, test_fraction, seed)
        if "equal_together" not in self.facts:
            copies = bool(source.group) or 2 * len(one_of_each(inputs)) > len(inputs)
            self.facts["equal_together"] = copies and differ_enough(ordered, val_fraction, test_fraction, inputs[order])
        numbers = sample_numbers(data, inputs, self.facts["equal_together"])
        keys = known_keys(numbers, known, data)
        alike = numbers["keys"][order] if self.facts["equal_together"] else torch.arange(len(order))
        drawn = drawn_parts(ordered, self._split, alike, keys, known)
        return Parts(*(order[part] for part in drawn)), numbers, keys

    def _inputs(self, frame: DataFrame) -> dict[str, Tensor]:
        return dict(zip(INPUTS, encode(frame, self.facts["columns"]), strict=True))

    @override
    def to_predict(self, source: Any) -> LabelledDataset:
        """A data set of other rows, whose labels are not looked at.

        Raises:
            InputError: they cannot be read, or not be encoded as those of the training.
        """
        source.table.take_over(self.facts["columns"])
        with speaking_of("data.predict_source", instead_of="data.source"), speaking():
            frame = source.table.read()
            rows = rows_to_predict(frame, self.facts)
        tell_unknown(frame, self.facts["columns"], rows.data.inputs["categorical"])
        return rows


def rows_to_predict(frame: DataFrame, facts: Mapping[str, Any]) -> LabelledDataset:
    """A data set of the rows of a frame, whose labels are not looked at.

    Args:
        frame: the rows.
        facts: of the net's data.

    Raises:
        InputError: they cannot be encoded as those of the training.
    """
    inputs: dict[str, Tensor] = dict(zip(INPUTS, encode(frame, facts["columns"]), strict=True))
    data = Labelled(inputs, torch.full((len(frame),), -1), facts["class_names"])
    return LabelledDataset(data, torch.arange(len(frame)))
