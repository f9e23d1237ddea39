"""Labelled samples, or windows of text whose labels are the next tokens. Edit this file, or only ``data.source``."""

import torch
from typing_extensions import override

from common.checkpoint import read_facts
from common.data import BaseDataModule
from common.errors import InputError
from common.sources import Source
from common.sources.labelled import LabelledBatch, LabelledDataset, Samples

from . import text  # noqa: F401  # lm.yaml names its class

Batch = LabelledBatch


class DistillationData(BaseDataModule):
    """Samples of a source in three parts; student and teacher learn from the training part.

    Args:
        source: the samples: one of ``common.sources`` by class path, or ``TextWindows`` by name.
        val_fraction: share of all samples for validation, if the source has no validation split of its own.
        test_fraction: share of all samples for testing, if the source has no test split of its own.
        train_fraction: share of the training samples to use.
        split_seed: seed of the split alone, so runs with other seeds test on the same samples.
        facts_of: a checkpoint whose class numbers and parts hold; that of ``--ckpt_path`` if there is one.
        batch_size: samples per rank and micro-batch.
        eval_batch_size: the same in evaluation.
        num_workers: reading processes.
    """

    def __init__(
        self,
        source: Source,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        train_fraction: float = 1.0,
        split_seed: int = 0,
        facts_of: str | None = None,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
    ):
        super().__init__(batch_size, eval_batch_size, num_workers)
        if not 0 < train_fraction <= 1:
            raise InputError(f"data.train_fraction must be in (0, 1], got {train_fraction}")
        # Read here if no checkpoint has the facts: the module needs them, and mistakes show before ranks start.
        self.samples = Samples(source, val_fraction, test_fraction, split_seed, read_facts(facts_of))
        self.train_fraction, self.split_seed, self.facts = train_fraction, split_seed, self.samples.facts
        self.class_names: list[str] = self.facts["class_names"]
        self.num_classes = len(self.class_names)

    @property
    def train_positions(self) -> torch.Tensor:
        """The training samples that are used."""
        labelled, train = self.samples.labelled, self.samples.parts.train
        if labelled.num_val and labelled.target.ndim == 1:  # in the order of a folder, which is that of classes
            train = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(self.split_seed))]
        return train[: max(round(len(train) * self.train_fraction), 1)]

    @override
    def setup(self, stage: str) -> None:
        _, self.val_data, self.test_data = self.samples.datasets()
        self.train_data, self.predict_data = (
            LabelledDataset(self.samples.labelled, self.train_positions),
            self.test_data,
        )
