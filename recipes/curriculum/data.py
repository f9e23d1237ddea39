"""Windows of text in lessons. Edit this file, or only ``data.path`` and ``data.difficulty``, for your own."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader
from typing_extensions import override

from common.cache import CACHE
from common.checkpoint import read_facts
from common.checksums import is_shape
from common.data import BaseDataModule
from common.errors import InputError
from common.nets.pretrained import check_tokens
from common.sources.text import Corpus, Text, TokenBatch, TokenDataset, Windows
from common.sources.tokenizers import TokenizerSource

from .difficulty import Difficulty, check_order, order_digest
from .lessons import CurriculumSampler, Lesson, Pacing, halvings

Batch = TokenBatch


class CurriculumData(BaseDataModule):
    """A corpus, tokenized once and packed; its lessons grow with the tokens that training has seen.

    Args:
        tokenizer: the tokenizer, by class path: one of ``common.sources.tokenizers``; None for that of the weights.
        path: a text file, a folder, a glob, JSONL/Parquet/CSV, compressed or not, or a hub data set; None for the
            sources of Python's standard library.
        column: the text's column, in files and data sets with columns.
        context: length of a window in tokens.
        length: share of ``context`` that a step trains on, from the start of each window; None for all of it
            (https://arxiv.org/abs/2108.06084).
        batch: share of ``batch_size`` in a step, rounded down to 1/2, 1/4, …; None for all of it
            (https://arxiv.org/abs/1711.00489).
        competence: share of the windows, easiest first, that a step draws from; None for all of them.
        difficulty: the windows' scores, by name: ``DocumentLength``, ``Rarity``, ``ReferenceLoss`` or ``ScoreFile``.
        val_fraction: share of the documents for validation; of one that is most of the text, its end.
        val_path: a text for validation, given like ``path``, in place of that share.
        test_path: a text for testing, given like ``path``; None to test on that for validation.
        cache_dir: folder of prepared corpora.
        weights: folder or hub name of a net that is trained further; comes from the model.
        facts_of: a checkpoint whose tokenizer holds; that of ``--ckpt_path`` if there is one. Without the text then:
            ``export``.
        batch_size: windows per rank and micro-batch at full size.
        eval_batch_size: the same in evaluation.
        num_workers: reading processes.
    """

    def __init__(
        self,
        tokenizer: TokenizerSource | None = None,
        path: str | None = None,
        column: str = "text",
        context: int = 128,
        length: Pacing | None = None,
        batch: Pacing | None = None,
        competence: Pacing | None = None,
        difficulty: Difficulty | None = None,
        val_fraction: float = 0.1,
        val_path: str | None = None,
        test_path: str | None = None,
        cache_dir: str = CACHE,
        weights: str | None = None,
        facts_of: str | None = None,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
    ):
        super().__init__(batch_size, eval_batch_size, num_workers)
        if context < 1:
            raise InputError(f"data.context must be at least 1, got {context}")
        if competence and not difficulty:
            raise InputError("data.competence needs data.difficulty; take Rarity")
        # With rounded sizes, another number of ranks would give other steps.
        parts = 2 ** halvings(batch.start) if batch else 1
        if batch and batch_size % parts:
            problem = f"{batch_size} is no multiple of {parts}, into which data.batch.start {batch.start} divides it"
            raise InputError(f"data.batch_size {problem}; take {-(-batch_size // parts) * parts} or a larger start")
        self.context, self.length, self.batch, self.competence = context, length, batch, competence
        self.difficulty, self.tokens_seen = difficulty, 0
        # Prepared here and not in `prepare_data`: the module needs its facts, and mistakes show before ranks start.
        self.text = Text(
            path, tokenizer, read_facts(facts_of), weights,
            column=column, val_fraction=val_fraction, val_path=val_path, test_path=test_path,
            cache_dir=Path(cache_dir).expanduser(),
        )  # fmt: skip
        self.tokenizer, self.facts = self.text.tokenizer, self.text.facts
        self.facts["context"] = context
        self.eos_id, self.vocab_size = self.text.eos_id, self.text.vocab_size
        if weights and tokenizer and facts_of is None and not is_shape(weights):
            check_tokens(weights, self.tokenizer.get_vocab(), "model.weights")
        if facts_of is None:
            len(self.windows)  # too little text shows before ranks start

    @property
    def corpus(self) -> Corpus:
        """The prepared text."""
        return self.text.corpus

    @cached_property
    def windows(self) -> Windows:
        """Of the training text."""
        return Windows(self.corpus.train, self.context, keep_partial=False)

    def lesson(self, seen: int) -> Lesson:
        """The lesson after ``seen`` tokens; batches double, lengths below ``context`` are multiples of 8."""
        batch, length, competence = (p(seen) if p else 1.0 for p in (self.batch, self.length, self.competence))
        rounded = min(8 * max(round(self.context * length / 8), 1), self.context)
        return Lesson(self.batch_size >> halvings(batch), rounded if length < 1 else self.context, competence)

    @override
    def setup(self, stage: str) -> None:
        self.train_data = TokenDataset(self.windows)
        self.val_data = TokenDataset(Windows(self.corpus.val, self.context, keep_partial=True))
        self.test_data = self.val_data
        if self.corpus.has_test:
            self.test_data = TokenDataset(Windows(self.corpus.test, self.context, keep_partial=True))
        self.predict_data = self.test_data
        if stage == "fit":
            if self.difficulty:
                self.difficulty.check(self.tokenizer.get_vocab())
            scores = self.difficulty and self.difficulty.scores(self.windows, self.eos_id)
            self.order = np.arange(len(self.windows)) if scores is None else np.argsort(scores, kind="stable")
            self._check_order(self._trainer.strategy.broadcast(order_digest(self.order)), "those of rank 0")

    def _check_order(self, digest: str, whose: str) -> None:
        check_order(self.order, digest, whose, by_scores=self.difficulty is not None)

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader(self.train_data, CurriculumSampler(self.order, self.batch_size, self, self._trainer))

    @override
    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        if not self._trainer.training:
            return batch
        length = self.lesson(self.tokens_seen).length
        return batch._replace(input_ids=batch.input_ids[:, :length], target=batch.target[:, :length])

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"tokens_seen": self.tokens_seen, "order": order_digest(self.order)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens_seen = state_dict["tokens_seen"]
        if self._trainer.state.fn == "fit" and not self.text.has_changed:  # windows of another text have another order
            self._check_order(state_dict["order"], "those of the checkpoint")
