"""Labelled samples, split by class. Edit this file, or only ``data.source``, for your own data."""

from typing_extensions import override

from common.checkpoint import read_facts
from common.data import BaseDataModule
from common.sources import Source
from common.sources.labelled import LabelledBatch, Samples

Batch = LabelledBatch


class AdversarialData(BaseDataModule):
    """Samples of a source, split so that every part has the classes in the same proportion.

    Args:
        source: the samples, by class path: one of ``common.sources``.
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
        self.samples = Samples(source, val_fraction, test_fraction, split_seed, known, may_grow=may_grow)
        self.facts = facts = self.samples.facts
        self.class_names: list[str] = facts["class_names"]
        self.input_range: list[float] = facts["range"]

    @override
    def setup(self, stage: str) -> None:
        if stage == "predict":
            self.predict_data, self.kept = self.samples.for_predict(self.predict_source, self.keep)
            return
        self.train_data, self.val_data, self.test_data = self.samples.datasets()
