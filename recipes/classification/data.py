"""Labelled samples, split by class. Edit this file, or only ``data.source``, for your own data."""

import torch
from jaxtyping import Int64
from torch import Tensor
from typing_extensions import override

from common.checkpoint import read_facts
from common.data import BaseDataModule
from common.errors import InputError
from common.sources import Source
from common.sources.files import Labels
from common.sources.labelled import LabelledBatch, Samples
from common.sources.tables import Columns

from .tables import LabelledTable, TableSamples
from .words import PythonLines, TaggedWords  # noqa: F401  # for YAML

Batch = LabelledBatch


class ClassificationData(BaseDataModule):
    """Samples of a source, split so that every part has the classes in the same proportion.

    Args:
        source: the samples: one of ``common.sources`` by class path, or ``LabelledTable`` by name.
        predict_source: samples for ``predict``, with or without labels; None for the test part.
        keep: columns of the source that ``predict`` writes beside the predictions; that of images as file names.
        val_fraction: share of all samples for validation.
        test_fraction: share of all samples for testing, if the source has no test split of its own.
        split_seed: seed of the split alone, so runs with other seeds test on the same samples.
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
        split_seed: int = 0,
        facts_of: str | None = None,
        init_from: str | None = None,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
    ):
        super().__init__(batch_size, eval_batch_size, num_workers)
        self.source, self.predict_source, self.keep = source, predict_source, keep
        # Read here if no checkpoint has the facts: the module needs them, and mistakes show before ranks start.
        known, may_grow = read_facts(facts_of), init_from is not None
        self.samples: Samples
        if of_table := isinstance(source, LabelledTable):
            self.samples = TableSamples(source, val_fraction, test_fraction, split_seed, known, may_grow)
        else:
            every: tuple[Labels, ...] = "one", "several", "words"
            self.samples = Samples(source, val_fraction, test_fraction, split_seed, known, every, may_grow)
        self.facts, self.class_names = self.samples.facts, self.samples.facts["class_names"]
        self.labels: Labels = self.facts.get("labels", "one")  # runs of before have no other
        self.columns: Columns | None = self.facts.get("columns")  # of a table
        if predict_source is not None and isinstance(predict_source, LabelledTable) != of_table:
            given, trained = (type(each).__name__ for each in (predict_source, source))
            raise InputError(f"data.predict_source: is {given}, and that of the training {trained}; take the same kind")

    def class_counts(self) -> Int64[Tensor, " classes"]:
        """Training samples, or words, of each class."""
        target = self.samples.labelled.target[self.samples.parts.train]
        if self.labels == "several":
            return target.sum(0)
        return torch.bincount(target[target >= 0], minlength=len(self.class_names))

    @override
    def setup(self, stage: str) -> None:
        if stage == "predict":
            self.predict_data, self.kept = self.samples.for_predict(self.predict_source, self.keep)
            return
        self.train_data, self.val_data, self.test_data = self.samples.datasets()
