"""Windows of text as labelled samples."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from common.cache import CACHE
from common.checksums import is_shape
from common.errors import InputError, speaking_of
from common.nets.pretrained import check_tokens
from common.sources import Labelled, Source
from common.sources.text import Windows, prepare
from common.sources.tokenizers import KnownTokenizer, PretrainedTokenizer, TokenizerSource, chosen


class TextWindows(Source):
    """A corpus as samples of one length; the class of each position is its next token.

    The windows are held in memory, 16 bytes per token. The validation split is ``val_fraction`` of the documents.

    Args:
        tokenizer: the tokenizer, by class path: one of ``common.sources.tokenizers``; None for that of the
            student's ``weights``, or of a checkpoint.
        path: a text file, a folder, a glob, JSONL/Parquet/CSV, compressed or not, or a hub data set; None for the
            sources of Python's standard library.
        column: the text's column, in files and data sets with columns.
        context: length of a window in tokens.
        val_fraction: share of the documents for validation; of one that is most of the text, its end.
        cache_dir: folder of prepared corpora.
    """

    weights: str | None = None  # of the student, whose tokenizer holds
    known: KnownTokenizer | None = None  # of a checkpoint

    def __init__(
        self,
        tokenizer: TokenizerSource | None = None,
        path: str | None = None,
        column: str = "text",
        context: int = 128,
        val_fraction: float = 0.1,
        cache_dir: str = CACHE,
    ):
        if context < 1:
            raise InputError(f"data.source.context must be at least 1, got {context}")
        self.tokenizer, self.path, self.column, self.context = tokenizer, path, column, context
        self.val_fraction, self.cache_dir = val_fraction, Path(cache_dir).expanduser()

    @override
    def take_over(self, facts: Mapping[str, Any]) -> None:
        if self.tokenizer is None:
            self.known = KnownTokenizer(facts["tokenizer"]["json"], facts["tokenizer"]["eos_token"])
            # What it has prepared is found by the tokenizer's place, which may be gone.
            self.tokenizer = PretrainedTokenizer(self.weights) if self.weights else self.known
        self.weights = None  # the checkpoint's tokenizer holds

    @override
    def read(self) -> Labelled:
        with speaking_of("data.source.tokenizer", instead_of="data.tokenizer"):
            tokenizer = chosen(self.tokenizer, self.weights, {})
        with speaking_of("data.source.path", instead_of="data.path"):
            corpus = prepare(
                self.path, tokenizer, column=self.column, val_fraction=self.val_fraction, cache_dir=self.cache_dir,
                known=self.known,
            )  # fmt: skip
        if self.weights and self.tokenizer and not is_shape(self.weights):
            check_tokens(self.weights, corpus.tokenizer.get_vocab(), "model.weights")
        train = Windows(corpus.train, self.context, keep_partial=False)
        val = Windows(corpus.val, self.context, keep_partial=True)
        parts = [windows[range(len(windows))] for windows in (train, val)]
        input_ids, target = (torch.cat(both) for both in zip(*parts, strict=True))
        names = [corpus.tokenizer.decode([number], skip_special_tokens=False) for number in range(corpus.vocab_size)]
        ends = corpus.tokenizer.id_to_token(corpus.eos_id)
        special = (self.known or tokenizer).special() or {"pad_token": ends, "model_max_length": self.context}
        made_from = {**special, "eos_token": ends, "json": corpus.tokenizer.to_str()}
        return Labelled(
            {"input_ids": input_ids}, target, names, num_val=len(val), tokenizer=made_from, labels="next token"
        )
