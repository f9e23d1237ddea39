"""Labelled samples, or windows of text whose labels are the next tokens. Edit this file, or only ``data.source``."""

import torch
from typing_extensions import override

from common.checkpoint import read_facts
from common.data import BaseDataModule
from common.errors import InputError
from common.sources import Source
from common.sources.labelled import LabelledBatch, LabelledDataset, Samples

from .text import TextWindows

Batch = LabelledBatch


class DistillationData(BaseDataModule):
    """Samples of a source in three parts; student and teacher learn from the training part.

    Args:
        source: the samples: one of ``common.sources`` by class path, or ``TextWindows`` by name.
        predict_source: samples for ``predict``, with or without labels; None for the test part.
        keep: columns of the source that ``predict`` writes beside the predictions; that of images as file names.
        val_fraction: share of all samples for validation, if the source has no validation split of its own.
        test_fraction: share of all samples for testing, if the source has no test split of its own.
        train_fraction: share of the training samples to use.
        split_seed: seed of the split alone, so runs with other seeds test on the same samples.
        weights: folder or hub name of a net that is trained further; comes from the model.
        facts_of: a checkpoint whose class numbers and parts hold; that of ``--ckpt_path`` if there is one.
        init_from: weights that the run begins with, whose classes may be fewer; comes from ``--init_from``.
        batch_size: samples per rank and micro-batch.
        eval_batch_size: the same in evaluation.
        num_workers: reading processes.
    """

    def __init__(
        self,
        source: Source,
        predict_source: Source | None = None,
        keep: list[str] | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        train_fraction: float = 1.0,
        split_seed: int = 0,
        weights: str | None = None,
        facts_of: str | None = None,
        init_from: str | None = None,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
    ):
        super().__init__(batch_size, eval_batch_size, num_workers)
        if not 0 < train_fraction <= 1:
            raise InputError(f"data.train_fraction must be in (0, 1], got {train_fraction}")
        if weights is not None:
            if not isinstance(source, TextWindows):
                problem = f"is for texts of TextWindows, not for {type(source).__name__}"
                raise InputError(f"model.weights: {problem}; give --model.net common.nets.Pretrained --model.net.name")
            source.weights = weights
        # Read here if no checkpoint has the facts: the module needs them, and mistakes show before ranks start.
        known, may_grow = read_facts(facts_of), init_from is not None
        self.samples = Samples(source, val_fraction, test_fraction, split_seed, known, may_grow=may_grow)
        self.train_fraction, self.split_seed, self.facts = train_fraction, split_seed, self.samples.facts
        self.source, self.predict_source, self.keep = source, predict_source, keep
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
        if stage == "predict":
            self.predict_data, self.kept = self.samples.for_predict(self.predict_source, self.keep)
            return
        _, self.val_data, self.test_data = self.samples.datasets()
        self.train_data = LabelledDataset(self.samples.labelled, self.train_positions)
