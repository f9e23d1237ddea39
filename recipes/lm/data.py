"""Text as packed windows of tokens. Edit this file, or only ``data.path``, for your own corpus."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import Dataset
from typing_extensions import override

from common.checkpoint import read_facts
from common.checksums import is_shape
from common.data import BaseDataModule
from common.errors import InputError
from common.nets.pretrained import check_tokens
from common.sources.text import CACHE, Corpus, Text, TokenBatch, TokenDataset, Windows
from common.sources.tokenizers import TokenizerSource

Batch = TokenBatch


class PromptDataset(Dataset[Batch]):
    """Reads prompts one at a time, so that none needs padding."""

    def __init__(self, prompts: Sequence[Sequence[int]]):
        self.prompts = prompts

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, indices: Sequence[int]) -> Batch:
        (index,) = indices
        input_ids = torch.tensor([self.prompts[index]])
        return Batch(input_ids, torch.full_like(input_ids, -100), torch.ones(1, dtype=torch.bool))


class LMData(BaseDataModule):
    """A corpus, tokenized once and packed.

    Args:
        tokenizer: the tokenizer, by class path: one of ``common.sources.tokenizers``; None for that of the weights.
        path: a text file, a folder, a glob, JSONL/Parquet/CSV, or a hub data set; None for the sources of Python's
            standard library.
        column: the text's column, in files and data sets with columns.
        context: length of a window in tokens.
        val_fraction: share of the documents for validation; of a single document, its end.
        prompts: texts for ``predict`` to continue.
        cache_dir: folder of prepared corpora.
        weights: folder or hub name of a net that is trained further; comes from the model.
        facts_of: a checkpoint whose tokenizer holds; that of ``--ckpt_path`` if there is one. Without the text then:
            ``predict`` and ``export``.
        batch_size: windows per rank and micro-batch.
        eval_batch_size: the same in evaluation.
        num_workers: reading processes.
    """

    def __init__(
        self,
        tokenizer: TokenizerSource | None = None,
        path: str | None = None,
        column: str = "text",
        context: int = 128,
        val_fraction: float = 0.1,
        prompts: list[str] = ["def "],  # noqa: B006
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
        self.context, self.prompts = context, prompts
        # Prepared here and not in `prepare_data`: the module needs its facts, and mistakes show before ranks start.
        self.text = Text(
            path, tokenizer, read_facts(facts_of), weights,
            column=column, val_fraction=val_fraction, cache_dir=Path(cache_dir).expanduser(),
        )  # fmt: skip
        self.tokenizer, self.facts = self.text.tokenizer, self.text.facts
        self.eos_id, self.vocab_size = self.text.eos_id, self.text.vocab_size
        if weights and tokenizer and facts_of is None and not is_shape(weights):
            check_tokens(weights, self.tokenizer.get_vocab(), "model.weights")

        if facts_of is None:
            self._check_context()

    @property
    def corpus(self) -> Corpus:
        """The prepared text."""
        return self.text.corpus

    def _check_context(self) -> None:
        if (tokens := len(self.corpus.train)) <= self.context:
            raise InputError(f"data.context {self.context} is too long for {tokens} tokens; shorten it or add text")

    @override
    def setup(self, stage: str) -> None:
        if stage == "predict":
            self.eval_batch_size = 1
            encoded = self.tokenizer.encode_batch(self.prompts, add_special_tokens=False)
            if not encoded or not all(prompt.ids for prompt in encoded):
                raise InputError("data.prompts: at least one is needed, and none may be empty; try '[\"def \"]'")
            self.predict_data = PromptDataset([prompt.ids for prompt in encoded])
            return
        self._check_context()
        self.train_data = TokenDataset(Windows(self.corpus.train, self.context, keep_partial=False))
        self.val_data = self.test_data = TokenDataset(Windows(self.corpus.val, self.context, keep_partial=True))
