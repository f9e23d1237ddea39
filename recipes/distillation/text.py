"""Windows of text as labelled samples."""

from pathlib import Path

import torch
from typing_extensions import override

from common.errors import InputError
from common.sources import Labelled, Source
from common.sources.text import CACHE, Windows, prepare
from common.sources.tokenizers import TokenizerSource


class TextWindows(Source):
    """A corpus as samples of one length; the class of each position is its next token.

    The windows are held in memory, 16 bytes per token. The validation split is ``val_fraction`` of the documents.

    Args:
        tokenizer: the tokenizer, by class path: one of ``common.sources.tokenizers``.
        path: a text file, a folder, a glob, JSONL/Parquet/CSV, or a hub data set; None for the sources of Python's
            standard library.
        column: the text's column, in files and data sets with columns.
        context: length of a window in tokens.
        val_fraction: share of the documents for validation; of a single document, its end.
        cache_dir: folder of prepared corpora.
    """

    def __init__(
        self,
        tokenizer: TokenizerSource,
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
    def read(self) -> Labelled:
        corpus = prepare(
            self.path, self.tokenizer, column=self.column, val_fraction=self.val_fraction, cache_dir=self.cache_dir
        )
        train = Windows(corpus.train, self.context, keep_partial=False)
        val = Windows(corpus.val, self.context, keep_partial=True)
        parts = [windows[range(len(windows))] for windows in (train, val)]
        input_ids, target = (torch.cat(both) for both in zip(*parts, strict=True))
        names = [corpus.tokenizer.decode([number], skip_special_tokens=False) for number in range(corpus.vocab_size)]
        ends = corpus.tokenizer.id_to_token(corpus.eos_id)
        made_from = {"json": corpus.tokenizer.to_str(), "eos_token": ends, "pad_token": ends}
        made_from |= {"model_max_length": self.context}
        return Labelled(
            {"input_ids": input_ids}, target, names, num_val=len(val), tokenizer=made_from, labels="next token"
        )
