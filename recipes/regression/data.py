"""Rows of a table, split at random. Edit this file, or only ``data.source``, for your own data."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from common.checkpoint import check_made_by, keys_as_known, read_facts, relabelled
from common.data import BaseDataModule
from common.errors import InputError, speaking_of
from common.sources.labelled import Parts, parts_facts
from common.sources.tables import (
    Columns,
    Scaling,
    TableSource,
    check_source,
    encode,
    fit_columns,
    known_targets,
    read_targets,
    row_numbers,
    same_rows,
    split_rows,
    tell_equal,
    tell_unknown,
)


class Batch(NamedTuple):
    """Encoded rows, their standardized targets (NaN if unknown), their positions, and a mask of real rows."""

    numeric: Float[Tensor, "batch numeric"]
    categorical: Int64[Tensor, "batch categorical"]
    target: Float[Tensor, "batch targets"]
    index: Int64[Tensor, " batch"]
    mask: Bool[Tensor, " batch"]


class Rows(NamedTuple):
    """The rows of a table: as they were read, their targets in their unit, and encoded, with standardized targets."""

    frame: Any
    target: Float[np.ndarray, "rows targets"]
    columns: Columns
    parts: Parts
    encoded: tuple[Tensor, Tensor, Tensor]


def _encoded(frame: Any, target: np.ndarray, columns: Columns, key: str) -> tuple[Tensor, Tensor, Tensor]:
    standardized = (target - columns["mean"]) / columns["std"]
    return *encode(frame, columns, key), torch.from_numpy(standardized).float()


class RowDataset(Dataset[Batch]):
    """Reads the given positions of encoded rows as batches."""

    def __init__(self, rows: tuple[Tensor, Tensor, Tensor], positions: Tensor):
        self.rows, self.positions = rows, positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, indices: Sequence[int]) -> Batch:
        chosen = self.positions[indices]
        return Batch(*(values[chosen] for values in self.rows), index=chosen, mask=torch.ones_like(chosen).bool())


def rows_to_predict(frame: Any, columns: Columns) -> RowDataset:
    """Rows of a frame, with or without the target, encoded by facts of the training rows.

    Raises:
        InputError: a column is missing, or holds other values than in training.
    """
    rows = _encoded(frame, known_targets(frame, columns), columns, "data.predict_source")
    return RowDataset(rows, torch.arange(len(frame)))


class RegressionData(BaseDataModule):
    """Rows of a source, encoded by facts of the training rows alone.

    Args:
        source: the rows, by class path: one of ``common.sources.tables``.
        predict_source: rows for ``predict``, with or without the targets; None for the test part.
        keep: columns of the source that ``predict`` writes beside the predictions, dropped ones too.
        scaling: of numeric columns: ``quantile`` to a normal distribution, ``standard`` to zero mean and unit variance.
        rare: categories of fewer training rows share one class with unseen ones.
        val_fraction: share of all rows for validation.
        test_fraction: share of all rows for testing.
        split_seed: seed of the split alone, so runs with other seeds test on the same rows.
        facts_of: a checkpoint whose encoding and parts hold; that of ``--ckpt_path`` if there is one. Without the table
            then: ``export``, and ``predict`` of other rows.
        batch_size: rows per rank and micro-batch.
        eval_batch_size: the same in evaluation.
        num_workers: reading processes.
    """

    def __init__(
        self,
        source: TableSource,
        predict_source: TableSource | None = None,
        keep: list[str] | None = None,
        scaling: Scaling = "quantile",
        rare: int = 5,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        split_seed: int = 0,
        facts_of: str | None = None,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
    ):
        super().__init__(batch_size, eval_batch_size, num_workers)
        self.source, self.predict_source, self.keep = source, predict_source, keep
        self.scaling: Scaling = scaling
        self.rare, self._split = rare, (val_fraction, test_fraction, split_seed)
        known = read_facts(facts_of)
        columns = known.get("columns", {})
        if columns and "targets" not in columns:
            raise InputError("data.source: the checkpoint is of an earlier version; begin a new run")
        if known and not (columns.get("targets") and columns["mean"]):
            raise InputError(
                "data.facts_of: the checkpoint was not trained on numbers of a table; name another, or null"
            )
        made_by = {
            "val_fraction": val_fraction, "test_fraction": test_fraction, "split_seed": split_seed, "scaling": scaling,
            "rare": rare, "source.categorical": list(source.categorical), "source.split": source.split,
            "source.group": source.group, "source.time": source.time,
        }  # fmt: skip
        check_made_by(known, made_by)
        self.facts: dict[str, Any] = {**known, "made_by": made_by}
        # Read here if no checkpoint has the facts: the module needs them, and mistakes show before ranks start.
        self.columns: Columns = known["columns"] if known else self.table.columns

    @cached_property
    def table(self) -> Rows:
        """The rows of the source, in parts."""
        source, known = self.source, self.facts
        if "columns" in known:
            source.take_over(known["columns"])
        frame = source.read()
        target = read_targets(frame, source)
        if "columns" in known:
            check_source(frame, source, known["columns"])
        parts, keys = split_rows(frame, source, *self._split)
        numbers = row_numbers(keys, frame, source)
        if "columns" in known:
            columns: Columns = known["columns"]
            changed = relabelled(numbers, known["parts"])
            if changed.any() and not rank_zero_only.rank:
                row, name = int(changed.nonzero()[0]), source.targets[0]
                such = f"such as row {row} ({name!r} is {frame[name].iloc[row]} now)"
                told = f"{int(changed.sum())} rows have another target than the checkpoint knows, {such}"
                print(f"data.source: {told}; the present ones count, and all stay in their parts", flush=True)
            keys = keys_as_known(changed, numbers, known["parts"])
            parts = same_rows(frame, source, keys, parts, known["parts"])
        else:
            tell_equal(keys, parts)
            columns = fit_columns(frame.iloc[parts.train], target[parts.train], source, self.scaling, self.rare)
        self.facts |= {"columns": columns, "parts": parts_facts(numbers, parts)}
        return Rows(frame, target, columns, parts, _encoded(frame, target, columns, "data.source.path"))

    @override
    def setup(self, stage: str) -> None:
        if stage == "predict" and self.predict_source is not None:
            self.predict_source.take_over(self.columns)
            with speaking_of("data.predict_source", instead_of="data.source"):
                new = self.predict_source.read()
                self.kept = self.predict_source.columns(self.keep) if self.keep else {}
            self.predict_data = rows_to_predict(new, self.columns)
            tell_unknown(new, self.columns, self.predict_data.rows[1])
            return
        self.train_data, self.val_data, self.test_data = (
            RowDataset(self.table.encoded, part) for part in self.table.parts
        )
        self.predict_data = self.test_data
        if stage == "predict" and self.keep:
            self.kept = self.source.columns(self.keep)

    @override
    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        # Precision bf16-true has rounded the target too; metrics need the exact one.
        data: Any = self.predict_data if self._trainer.predicting else self.train_data
        return batch._replace(target=data.rows[2][batch.index])
