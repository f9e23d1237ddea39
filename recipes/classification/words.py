"""Texts whose words have tags: read from files, or made of Python's own sources."""

import ast
import io
import re
import sysconfig
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor
from typing_extensions import override

from common.errors import InputError
from common.sources import Labelled, Source
from common.sources.files import (
    column,
    encode_texts,
    groups_of,
    load_splits,
    load_tokenizer,
    named_columns,
    refuse_both,
    tokenizer_facts,
)
from common.sources.tokenizers import BPE


class TaggedWords(Source):
    """Texts as lists of words, and a tag for each word, in JSONL, Parquet or CoNLL files or a hub data set.

    A word's first token has its tag, the others count for nothing.

    Args:
        path: a file or a glob, or a hub name.
        tokenizer: folder or hub name of a transformers tokenizer.
        words: name of the column of words.
        label: name of the column of tags; None for texts without tags, to predict.
        max_length: tokens kept of each text; all are padded to the longest.
        split: name of a column that says the part of each text: train, val or test.
        group: name of a column whose equal values stay together in a split, such as a document.
        columns: names of the columns of a CoNLL file, in their order; None for other files.
    """

    def __init__(
        self,
        path: str,
        tokenizer: str,
        words: str = "tokens",
        label: str | None = "tags",
        max_length: int = 128,
        split: str | None = None,
        group: str | None = None,
        columns: list[str] | None = None,
    ):
        if max_length < 1:
            raise InputError(f"data.source.max_length must be at least 1, got {max_length}")
        self.path, self.tokenizer, self.words, self.label, self.max_length = path, tokenizer, words, label, max_length
        self.split, self.group, self.conll = split, group, columns
        self.known: Mapping[str, Any] = {}  # the tokenizer of a checkpoint
        refuse_both(split, group)

    @override
    def read(self) -> Labelled:
        parts, num_val, num_test = load_splits(self.path, split=self.split, conll=self.conll)
        texts = _lists(parts, self.words, "data.source.words")
        tags, names = None, []
        if self.label is not None:
            tags, names = _numbers(_lists(parts, self.label, "data.source.label"), parts[0].features[self.label])
            for row, (text, its) in enumerate(zip(texts, tags, strict=True)):
                if len(text) != len(its):
                    problem = f"text {row} has {len(text)} words and {len(its)} tags"
                    raise InputError(f"data.source.label {self.label!r}: {problem}; give each word one")
        tokenizer = load_tokenizer(self.tokenizer, in_words=True, known=self.known)
        inputs, target, facts = aligned(texts, tags, tokenizer, self.max_length)
        return Labelled(
            inputs, target, names, num_test, num_val, facts, groups_of(parts, self.group), "words"
        )  # fmt: skip

    @override
    def take_over(self, facts: Mapping[str, Any]) -> None:
        self.known = facts["tokenizer"]

    @override
    def columns(self, names: Sequence[str]) -> dict[str, list[Any]]:
        return named_columns(load_splits(self.path, split=self.split, conll=self.conll).parts, names)


class PythonLines(Source):
    """Lines of Python's own package ``email``: their names are tagged with the part that they play in the line.

    The parts are those that the parser sees: ``MODULE`` is imported; ``CLASS`` is defined, derived from, raised or
    caught; ``CALL`` is what is called, ``PARAMETER`` what a function takes. A dotted name is one entity. Other versions
    of Python have other lines.

    Args:
        package: a package of the standard library.
        vocab_size: tokens of the byte-pair encoding, which is trained on the lines.
        max_length: tokens kept of each line; all are padded to the longest.
    """

    def __init__(self, package: str = "email", vocab_size: int = 1024, max_length: int = 64):
        if max_length < 1:
            raise InputError(f"data.source.max_length must be at least 1, got {max_length}")
        self.package, self.vocab_size, self.max_length = package, vocab_size, max_length

    def _lines(self) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
        """Words and tags of each different line."""
        library = Path(sysconfig.get_paths()["stdlib"])
        files = sorted((library / self.package).rglob("*.py")) if self.package else []
        if not files:
            raise InputError(f"data.source.package {self.package!r}: no package of the standard library; take email")
        return list(dict.fromkeys(line for file in files for line in tagged_lines(file.read_text(encoding="utf-8"))))

    @override
    def read(self) -> Labelled:
        from transformers import PreTrainedTokenizerFast

        texts, tags = zip(*self._lines(), strict=True)
        tokenizer = BPE(self.vocab_size)
        built = tokenizer.build(word for text in texts for word in text)
        fast = PreTrainedTokenizerFast(tokenizer_object=built, pad_token=tokenizer.eos_token)
        numbers, names = _numbers(tags, None)
        inputs, target, facts = aligned(texts, numbers, fast, self.max_length)
        return Labelled(inputs, target, names, tokenizer=facts, labels="words")

    @override
    def columns(self, names: Sequence[str]) -> dict[str, list[Any]]:
        if other := [name for name in names if name != "tokens"]:
            raise InputError(f"data.keep {other[0]!r}: no such column; there is one, tokens")
        return {"tokens": [list(words) for words, _ in self._lines()]}


def tagged_lines(source: str) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Words of each logical line of a Python source and their tags; lines of fewer than three words are left out."""
    kinds = {}  # of the place where a name begins: what it is, and where it ends
    for line, begin, end, kind in _named(ast.parse(source)):
        kinds.setdefault((line, begin), (end, kind))
    words, tags, until = [], [], ("", 0, 0)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        line, begin = token.start
        if token.type == tokenize.NEWLINE:
            if len(words) > 2:
                yield tuple(words), tuple(tags)
            words, tags = [], []
        elif token.string.strip() and token.type != tokenize.COMMENT:
            if (line, begin) in kinds:
                end, kind = kinds[line, begin]
                until = kind, line, end
                tags.append(f"B-{kind}")
            else:
                tags.append(f"I-{until[0]}" if until[1] == line and begin < until[2] else "O")
            words.append('""' if token.type == tokenize.STRING else token.string)


def _named(tree: ast.AST) -> Iterator[tuple[int, int, int, str]]:
    """Line, first column and the column after the last of each name that has a kind; the first kind counts."""
    classes, calls = [], []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.lineno, alias.col_offset, alias.col_offset + len(alias.name), "MODULE"
        elif isinstance(node, ast.ImportFrom) and node.module:
            begin = node.col_offset + len("from ") + node.level
            yield node.lineno, begin, begin + len(node.module), "MODULE"
        elif isinstance(node, ast.arg):
            yield node.lineno, node.col_offset, node.col_offset + len(node.arg), "PARAMETER"
        elif isinstance(node, ast.ClassDef):
            begin = node.col_offset + len("class ")
            yield node.lineno, begin, begin + len(node.name), "CLASS"
            classes += node.bases
        elif isinstance(node, ast.Raise):
            classes.append(node.exc.func if isinstance(node.exc, ast.Call) else node.exc)
        elif isinstance(node, ast.ExceptHandler):
            classes += node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        elif isinstance(node, ast.Call):
            calls.append(node.func)
    for kind, nodes in (("CLASS", classes), ("CALL", calls)):
        for node in nodes:
            if node is not None and re.fullmatch(r"\w+(\.\w+)*", ast.unparse(node)):
                yield node.lineno, node.col_offset, node.end_col_offset, kind


def aligned(
    texts: Sequence[Sequence[str]], tags: Sequence[Sequence[int]] | None, tokenizer: Any, max_length: int
) -> tuple[dict[str, Int64[Tensor, "texts time"]], Int64[Tensor, "texts time"], dict[str, Any]]:
    """Token numbers of texts, the tag of each word at its first token, and what the tokenizer is made from again.

    Words of which the tokenizer makes nothing are unknown ones. Words after ``max_length`` have no tag, which is said.

    Args:
        texts: the words.
        tags: numbers of their tags; None if they are not known.
        tokenizer: a fast one of transformers.
        max_length: tokens kept of each text.

    Raises:
        InputError: the tokenizer makes nothing of a word and has no unknown token, or nothing of a text is kept.
    """
    settings = {"truncation": True, "max_length": max_length, "padding": "longest", "is_split_into_words": True}
    facts = tokenizer_facts(tokenizer, max_length)
    if nothing := _without_token({word for text in texts for word in text}, tokenizer):
        if tokenizer.unk_token is None:
            problem = f"the tokenizer makes nothing of the word {min(nothing)!r} and knows no unknown one"
            raise InputError(f"data.source.words: {problem}; drop it")
        texts = [[tokenizer.unk_token if word in nothing else word for word in text] for text in texts]
    encoded = encode_texts(tokenizer, [list(text) for text in texts], **settings)
    inputs = {key: torch.tensor(encoded[key]) for key in ("input_ids", "attention_mask")}
    target = torch.full_like(inputs["input_ids"], -100)
    cut = []
    for row, text in enumerate(texts):
        words = encoded.word_ids(row)
        first = [place for place, (before, word) in enumerate(pairwise([None, *words])) if word not in (None, before)]
        if not first:
            problem = f"{max_length} leaves no word of text {row}" if text else f"text {row} has no word"
            raise InputError(
                f"data.source.{'max_length' if text else 'words'}: {problem}; {'raise' if text else 'drop'} it"
            )
        target[row, first] = -1 if tags is None else torch.tensor(tags[row][: len(first)])
        cut += [len(text) - len(first)] if len(text) > len(first) else []
    if cut and not rank_zero_only.rank:
        lost = f"leaves out the last {sum(cut)} words of {len(cut)} texts, which get no tag"
        print(f"data.source.max_length {max_length}: {lost}; raise it to have them", flush=True)
    return inputs, target, facts


def _without_token(words: set[str], tokenizer: Any) -> set[str]:
    settings = {"is_split_into_words": True, "add_special_tokens": False}
    encoded = encode_texts(tokenizer, [[word] for word in sorted(words)], **settings)
    return {word for word, ids in zip(sorted(words), encoded["input_ids"], strict=True) if not ids}


def _lists(parts: Sequence[Any], name: str, key: str) -> list[list[Any]]:
    values = [value for part in parts for value in column(part, name, key)]
    for row, value in enumerate(values):
        if not isinstance(value, list) or not all(isinstance(item, str | int) for item in value):
            there = "is missing" if value is None else f"holds {value!r:.30}"
            raise InputError(f"{key} {name!r}: text {row} {there}; give a list with one text for each word")
    return values


def _numbers(tags: Sequence[Sequence[Any]], feature: Any) -> tuple[list[list[int]], list[str]]:
    """Numbers of tags and their names: those of the column's own class labels, or else the sorted distinct values."""
    own: list[str] = list(getattr(getattr(feature, "feature", None), "names", ()))
    if own:
        return [list(row) for row in tags], own
    names = sorted({str(tag) for row in tags for tag in row})
    numbers = {name: number for number, name in enumerate(names)}
    return [[numbers[str(tag)] for tag in row] for row in tags], names
