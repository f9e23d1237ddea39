"""Text as packed windows of tokens. Edit this file, or only ``data.path``, for your own corpus."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int64
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from common.cache import CACHE
from common.checkpoint import read_facts
from common.checksums import is_shape
from common.data import BaseDataModule
from common.errors import InputError, speaking_of
from common.nets.pretrained import check_tokens
from common.sources.files import column, load_splits, named_columns
from common.sources.text import Corpus, Text, TokenBatch, TokenDataset, Windows
from common.sources.tokenizers import TokenizerSource

Batch = TokenBatch


class PromptBatch(NamedTuple):
    """A single prompt, its position among all, and whether it is a real one."""

    input_ids: Int64[Tensor, "1 time"]
    index: Int64[Tensor, " 1"]
    mask: Bool[Tensor, " 1"]


class PromptDataset(Dataset[PromptBatch]):
    """Reads prompts one at a time, so that none needs padding.

    Args:
        prompts: the texts.
        tokenizer: of the net.

    Raises:
        InputError: there is none, or one has no token; ``key`` is for messages.
    """

    def __init__(self, prompts: Sequence[str], tokenizer: Tokenizer, key: str):
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise InputError(f"{key}: at least one text is needed, and each must be a text; try '[\"def \"]'")
        self.prompts = [each.ids for each in tokenizer.encode_batch(list(prompts), add_special_tokens=False)]
        if not all(self.prompts):
            raise InputError(f"{key}: none may be empty, as number {self.prompts.index([])} is, counted from 0")

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, indices: Sequence[int]) -> PromptBatch:
        (index,) = indices
        return PromptBatch(torch.tensor([self.prompts[index]]), torch.tensor([index]), torch.ones(1, dtype=torch.bool))


def read_prompts(path: str, name: str, keep: Sequence[str] | None) -> tuple[list[str], dict[str, list[Any]]]:
    """Prompts of a file, and further columns of it.

    Args:
        path: a text file with a prompt in each line, or CSV, JSONL or Parquet files.
        name: the prompts' column.
        keep: names of the other columns.

    Raises:
        InputError: the file cannot be read, or has no such column.
    """
    if Path(path).suffix.lower() == ".txt":
        if keep:
            raise InputError("data.keep: a text file has no columns; remove it, or give a table of prompts")
        try:
            return Path(path).expanduser().read_text(encoding="utf-8-sig").splitlines(), {}
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise InputError(f"data.prompts_path {path}: cannot be read ({reason}); name another file") from error
    with speaking_of("data.prompts_path", instead_of="data.source.path"):
        parts = load_splits(path, as_written=True).parts[:1]
    prompts = list(column(parts[0], name, "data.prompts_column"))
    if missing := sum(prompt is None for prompt in prompts):
        raise InputError(f"data.prompts_column {name!r}: {missing} of {len(prompts)} are missing; drop those rows")
    return [str(prompt) for prompt in prompts], named_columns(parts, keep or ())


class LMData(BaseDataModule):
    """A corpus, tokenized once and packed.

    Args:
        tokenizer: the tokenizer, by class path: one of ``common.sources.tokenizers``; None for that of the weights.
        path: a text file, a folder, a glob, JSONL/Parquet/CSV, compressed or not, or a hub data set; None for the
            sources of Python's standard library.
        column: the text's column, in files and data sets with columns.
        context: length of a window in tokens.
        val_fraction: share of the documents for validation; of one that is most of the text, its end.
        val_path: a text for validation, given like ``path``, in place of that share.
        test_path: a text for testing, given like ``path``; None to test on that for validation.
        prompts: texts for ``predict`` to continue.
        prompts_path: a file of prompts in their place: one in each line of a text file, or CSV, JSONL or Parquet.
        prompts_column: the prompts' column in such a table.
        keep: its columns that ``predict`` writes beside the texts.
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
        val_path: str | None = None,
        test_path: str | None = None,
        prompts: list[str] = ["def "],  # noqa: B006
        prompts_path: str | None = None,
        prompts_column: str = "prompt",
        keep: list[str] | None = None,
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
        if keep and prompts_path is None:
            raise InputError("data.keep: names columns of data.prompts_path; give that, or remove it")
        self.context, self.prompts = context, prompts
        self.prompts_path, self.prompts_column, self.keep = prompts_path, prompts_column, keep
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
            if self.prompts_path is None:
                self.predict_data = PromptDataset(self.prompts, self.tokenizer, "data.prompts")
                return
            prompts, self.kept = read_prompts(self.prompts_path, self.prompts_column, self.keep)
            self.predict_data = PromptDataset(prompts, self.tokenizer, "data.prompts_path")
            return
        self._check_context()
        self.train_data = TokenDataset(Windows(self.corpus.train, self.context, keep_partial=False))
        self.val_data = TokenDataset(Windows(self.corpus.val, self.context, keep_partial=True))
        self.test_data = self.val_data
        if self.corpus.has_test:
            self.test_data = TokenDataset(Windows(self.corpus.test, self.context, keep_partial=True))
