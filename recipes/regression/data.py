"""Rows of a table, split at random. Edit this file, or only ``data.source``, for your own data."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from common.data import BaseDataModule
from common.errors import InputError, speaking_of
from common.sources.tables import (
    Scaling,
    TableSource,
    encode,
    fit_columns,
    known_target,
    read_columns,
    read_target,
    split_rows,
)


class Batch(NamedTuple):
    """Encoded rows, their standardized target (NaN if unknown), their positions, and a mask of real rows."""

    numeric: Float[Tensor, "batch numeric"]
    categorical: Int64[Tensor, "batch categorical"]
    target: Float[Tensor, " batch"]
    index: Int64[Tensor, " batch"]
    mask: Bool[Tensor, " batch"]


class RowDataset(Dataset[Batch]):
    """Reads the given positions of encoded rows as batches."""

    def __init__(self, numeric: Tensor, categorical: Tensor, target: Tensor, positions: Tensor):
        self.rows, self.positions = (numeric, categorical, target), positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, indices: Sequence[int]) -> Batch:
        chosen = self.positions[indices]
        return Batch(*(values[chosen] for values in self.rows), index=chosen, mask=torch.ones_like(chosen).bool())


class RegressionData(BaseDataModule):
    """Rows of a source, encoded by facts of the training rows alone.

    Args:
        source: the rows, by class path: one of ``common.sources.tables``.
        predict_source: rows for ``predict``, with or without the target; None for the test part.
        columns_of: a checkpoint that encodes ``predict_source`` in place of ``source``, which may then be null.
        scaling: of numeric columns: ``quantile`` to a normal distribution, ``standard`` to zero mean and unit variance.
        rare: categories of fewer training rows share one class with unseen ones.
        val_fraction: share of all rows for validation.
        test_fraction: share of all rows for testing.
        split_seed: seed of the split alone, so runs with other seeds test on the same rows.
        batch_size: rows per rank and micro-batch.
        eval_batch_size: the same in evaluation.
        num_workers: reading processes.
    """

    def __init__(
        self,
        source: TableSource | None,
        predict_source: TableSource | None = None,
        columns_of: str | None = None,
        scaling: Scaling = "quantile",
        rare: int = 5,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        split_seed: int = 0,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
    ):
        super().__init__(batch_size, eval_batch_size, num_workers)
        self.predict_source, self.columns_of = predict_source, columns_of
        if columns_of is not None:
            if predict_source is None:
                raise InputError("data.columns_of: is for data.predict_source; name rows to predict, or remove it")
            self.columns = read_columns(columns_of)
            return
        if source is None:
            raise InputError("data.source is null; name a table, such as common.sources.tables.Table")
        # Read here: the module needs its facts, and mistakes show before ranks start.
        self.frame = source.read()
        self.target = read_target(self.frame, source)
        self.parts = parts = split_rows(len(self.frame), val_fraction, test_fraction, split_seed)
        self.columns = fit_columns(self.frame.iloc[parts.train], self.target[parts.train], source, scaling, rare)
        self.rows = self._encoded(self.frame, self.target, "data.source.path")

    def _encoded(self, frame: Any, target: np.ndarray, key: str) -> tuple[Tensor, Tensor, Tensor]:
        standardized = (target - self.columns["mean"]) / self.columns["std"]
        return *encode(frame, self.columns, key), torch.from_numpy(standardized).float()

    @override
    def setup(self, stage: str) -> None:
        if stage == "predict" and self.predict_source is not None:
            with speaking_of("data.predict_source", instead_of="data.source"):
                new = self.predict_source.read()
            rows = self._encoded(new, known_target(new, self.columns), "data.predict_source")
            self.predict_data = RowDataset(*rows, torch.arange(len(new)))
            return
        if self.columns_of is not None:
            raise InputError("data.columns_of: is for predict alone; remove it and name the table as data.source")
        self.train_data, self.val_data, self.test_data = (RowDataset(*self.rows, part) for part in self.parts)
        self.predict_data = self.test_data

    @override
    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        # Precision bf16-true has rounded the target too; metrics need the exact one.
        data: Any = self.predict_data if self._trainer.predicting else self.train_data
        return batch._replace(target=data.rows[2][batch.index])
