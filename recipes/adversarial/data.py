"""Labelled samples, split by class. Edit this file, or only ``data.source``, for your own data."""

from dataclasses import replace

import torch
from typing_extensions import override

from common.checkpoint import read_facts
from common.data import BaseDataModule
from common.errors import speaking_of
from common.sources import Source
from common.sources.labelled import LabelledBatch, LabelledDataset, as_learnt, check_alike, split_by_class

Batch = LabelledBatch


class AdversarialData(BaseDataModule):
    """Samples of a source, split so that every part has the classes in the same proportion.

    Args:
        source: the samples, by class path: one of ``common.sources``.
        predict_source: samples for ``predict``, with or without labels; None for the test part.
        val_fraction: share of all samples for validation.
        test_fraction: share of all samples for testing, if the source has no test split of its own.
        split_seed: seed of the split alone, so runs with other seeds test on the same samples.
        facts_of: a checkpoint whose class numbers hold; that of ``--ckpt_path`` if there is one.
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
        facts_of: str | None = None,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
    ):
        super().__init__(batch_size, eval_batch_size, num_workers)
        self.predict_source = predict_source
        # Read here: the module needs its facts, and mistakes show before ranks start.
        read = source.read()
        drawn = split_by_class(read, val_fraction, test_fraction, split_seed)
        self.labelled, self.parts, self.facts = as_learnt(read, drawn, read_facts(facts_of))
        self.class_names = self.labelled.class_names
        pixels = self.labelled.inputs.get("pixel_values")
        self.input_range: list[float] = [] if pixels is None else [pixels.min().item(), pixels.max().item()]

    @override
    def setup(self, stage: str) -> None:
        if stage == "predict" and self.predict_source is not None:
            with speaking_of("data.predict_source", instead_of="data.source"):
                given = self.predict_source.read()
                check_alike(given, self.labelled)
            positions, unknown = torch.arange(len(given.target)), torch.full_like(given.target, -1)
            self.predict_data = LabelledDataset(replace(given, target=unknown), positions)
            return
        self.train_data = LabelledDataset(self.labelled, self.parts.train)
        self.val_data = LabelledDataset(self.labelled, self.parts.val)
        self.test_data = self.predict_data = LabelledDataset(self.labelled, self.parts.test)
