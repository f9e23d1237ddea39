"""Labelled samples, split by class. Edit this file, or only ``data.source``, for your own data."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int64
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from common.data import BaseDataModule
from common.errors import InputError
from common.sources import Labelled, Source


class Batch(NamedTuple):
    """Samples as keyword arguments of the net, their classes and places in the source, and which are not padding."""

    inputs: Mapping[str, Tensor]
    target: Int64[Tensor, " batch"]
    index: Int64[Tensor, " batch"]
    mask: Bool[Tensor, " batch"]


class LabelledDataset(Dataset[Batch]):
    """Reads the given positions of labelled samples as batches."""

    def __init__(self, data: Labelled, positions: Int64[Tensor, " samples"]):
        self.data, self.positions = data, positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, indices: Sequence[int]) -> Batch:
        chosen = self.positions[indices]
        inputs = {name: values[chosen] for name, values in self.data.inputs.items()}
        return Batch(inputs, self.data.target[chosen], chosen, torch.ones(len(indices), dtype=torch.bool))


class ClassificationData(BaseDataModule):
    """Samples of a source, split so that every part has the classes in the same proportion.

    Args:
        source: where samples come from, by class path: one of ``common.sources``.
        predict_source: samples that ``predict`` classifies, with or without labels; None for the part that tests.
        val_fraction: share of all samples that validates.
        test_fraction: share of all samples that tests, if the source has no test split of its own.
        split_seed: of the split alone, so that no run with another seed tests on what this one trained on.
        batch_size: samples per rank and micro-batch.
        eval_batch_size: the same in evaluation.
        num_workers: reading processes.
    """

    def __init__(
        self,
        source: Source,
        predict_source: Source | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        split_seed: int = 0,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
    ):
        super().__init__(batch_size, eval_batch_size, num_workers)
        if val_fraction <= 0 or test_fraction <= 0 or val_fraction + test_fraction >= 1:
            shares = f"data.val_fraction {val_fraction} and data.test_fraction {test_fraction}"
            raise InputError(f"{shares} must be above 0 and leave samples to train on")
        self.predict_source, self.split_seed = predict_source, split_seed
        # Read here: the module needs its facts, and mistakes show before ranks start.
        self.labelled = source.read()
        self.class_names = self.labelled.class_names
        if not self.class_names:
            raise InputError("data.source.label is null, but training needs labels; name their column")
        counts = torch.bincount(self.labelled.target, minlength=len(self.class_names))
        if (rare := int(counts.argmin())) >= 0 and counts[rare] < 3:
            raise InputError(
                f"data.source: class {self.class_names[rare]!r} has {counts[rare]} samples; a split needs at least 3"
            )
        rest = torch.arange(len(self.labelled.target) - self.labelled.num_test)
        self.test = torch.arange(len(rest), len(self.labelled.target))
        if not self.labelled.num_test:
            rest, self.test = self._split(rest, test_fraction)
        self.train, self.val = self._split(rest, val_fraction * len(self.labelled.target) / len(rest))
        self.class_counts: list[int] = torch.bincount(self.labelled.target[self.train], minlength=len(counts)).tolist()

    def _split(self, positions: Tensor, fraction: float) -> Any:
        labels = self.labelled.target[positions]
        try:
            first, second = train_test_split(
                positions, test_size=fraction, stratify=labels, random_state=self.split_seed
            )
        except ValueError as error:
            raise InputError(f"data.source: {len(positions)} samples cannot be split by class: {error}") from error
        return first, second

    @override
    def setup(self, stage: str) -> None:
        if stage == "predict" and self.predict_source is not None:
            given = self.predict_source.read()
            positions, unknown = torch.arange(len(given.target)), torch.full_like(given.target, -1)
            self.predict_data = LabelledDataset(replace(given, target=unknown), positions)
            return
        self.train_data = LabelledDataset(self.labelled, self.train)
        self.val_data = LabelledDataset(self.labelled, self.val)
        self.test_data = self.predict_data = LabelledDataset(self.labelled, self.test)
