"""The text pipeline, on real files, tokenizers and readers."""

import argparse
import gzip
import inspect
import json
import math
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from jsonargparse import ArgumentParser
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from common import text
from common.errors import InputError
from common.text import BPE, EOS, Characters, Corpus, Pretrained, TokenizerSource, Windows, prepare

SAMPLE = "def f(x):\n\n    return 'naïve – 🙂'\t# 東京\r\n\n" + "Once upon a time, there was a word. " * 5
WORDS = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma".split()
)


def write_documents(count: int, seed: int = 0, words: int = 40) -> list[str]:
    rng = random.Random(seed)
    return [f"Document {i}: " + " ".join(rng.choices(WORDS, k=words)) + ".\n" for i in range(count)]


def write_folder(folder: Path, documents: Sequence[str]) -> Path:
    for number, document in enumerate(documents):
        file = folder / f"part{number % 3}" / f"{number:04}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(document, encoding="utf-8", newline="")
    return folder


def read_documents(corpus: Corpus, tokens: np.ndarray) -> list[str]:
    """The texts of a side, split where the end-of-text token stands."""
    ends = np.flatnonzero(tokens == corpus.eos_id)
    return [corpus.tokenizer.decode(part[part != corpus.eos_id].tolist()) for part in np.split(tokens, ends)]


def save_tokenizer(folder: Path, eos: str = "</s>") -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<pad>", eos], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([SAMPLE], trainer)
    tokenizer.enable_truncation(8)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos).save_pretrained(folder)
    return folder


# Tokenizers


@pytest.mark.parametrize("source", [BPE(300), BPE(2000), Characters()])
def test_tokenizer_round_trip(source: TokenizerSource) -> None:
    tokenizer = source.build([SAMPLE[:70], SAMPLE[70:]])
    assert tokenizer.decode(tokenizer.encode(SAMPLE).ids) == SAMPLE
    assert tokenizer.token_to_id(EOS) is not None


def test_bpe_knows_every_byte_and_keeps_to_its_size() -> None:
    tokenizer = BPE(400).build([SAMPLE * 20 + " ".join(write_documents(50))])
    unseen = "ÿ\x00 ελληνικά\u2028 עברית 🏳️‍🌈"
    assert tokenizer.decode(tokenizer.encode(unseen).ids) == unseen
    assert tokenizer.get_vocab_size() == 400


def test_characters_are_one_token_each_and_others_unknown() -> None:
    tokenizer = Characters().build(["ab", "\n"])
    assert sorted(tokenizer.get_vocab()) == sorted(["<unk>", EOS, "a", "b", "\n"])
    assert tokenizer.encode("a\nzb").tokens == ["a", "\n", "<unk>", "b"]


def test_pretrained_from_folder_and_from_file(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path / "tokenizer")
    file = write_folder(tmp_path / "text", write_documents(20)) / "part0" / "0000.txt"
    for name in (folder, folder / "tokenizer.json"):
        corpus = prepare(str(file.parent), Pretrained(str(name)), cache_dir=tmp_path / "cache")
        assert corpus.eos_id == 1  # </s>
        assert corpus.vocab_size == 300
        documents = read_documents(corpus, corpus.train) + read_documents(corpus, corpus.val)
        assert file.read_text() in documents  # more than the 8 tokens at which the saved one truncates


def test_pretrained_is_prepared_again_when_its_files_change(tmp_path: Path) -> None:
    folder, path = (
        save_tokenizer(tmp_path / "tokenizer"),
        str(write_folder(tmp_path / "t", write_documents(9))),
    )
    first = prepare(path, Pretrained(str(folder)), cache_dir=tmp_path / "cache")
    save_tokenizer(folder, eos="<eos>")
    second = prepare(path, Pretrained(str(folder)), cache_dir=tmp_path / "cache")
    assert first.folder != second.folder
    assert second.tokenizer.token_to_id("<eos>") == second.eos_id


def test_tokenizer_is_chosen_in_yaml(tmp_path: Path) -> None:
    parser = ArgumentParser()
    parser.add_argument("--tokenizer", type=TokenizerSource)
    config = tmp_path / "config.yaml"
    config.write_text("tokenizer: {class_path: common.text.BPE, init_args: {vocab_size: 512}}\n")
    parser.add_argument("--config", action="config")
    chosen = parser.instantiate_classes(parser.parse_args([f"--config={config}"])).tokenizer
    assert isinstance(chosen, BPE)
    assert chosen.vocab_size == 512
    for flags, kind in (
        (["--tokenizer=common.text.Characters"], Characters),
        (["--tokenizer=common.text.Pretrained", "--tokenizer.name=gpt2"], Pretrained),
    ):
        assert type(parser.instantiate_classes(parser.parse_args(flags)).tokenizer) is kind


class Bytes(TokenizerSource):
    """A user's own tokenizer: bytes without merges."""

    eos_token = "<end>"

    def build(self, texts) -> Tokenizer:
        alphabet = [self.eos_token, *sorted(pre_tokenizers.ByteLevel.alphabet())]
        tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer


def test_own_tokenizer_source(tmp_path: Path) -> None:
    documents = write_documents(20)
    corpus = prepare(str(write_folder(tmp_path / "t", documents)), Bytes(), cache_dir=tmp_path / "cache")
    assert len(corpus.train) + len(corpus.val) == sum(len(d.encode()) for d in documents) + len(documents) - 2


# Preparation


def test_single_file_is_cut_by_characters(tmp_path: Path) -> None:
    content = "".join(write_documents(300)) + SAMPLE
    file = tmp_path / "all.txt"
    file.write_text(content, encoding="utf-8", newline="")
    corpus = prepare(str(file), Characters(), cache_dir=tmp_path / "cache")
    cut = int(len(content) * 0.9)
    assert corpus.tokenizer.decode(corpus.train.tolist()) == content[:cut]
    assert (len(corpus.train), len(corpus.val)) == (cut, len(content) - cut)
    assert corpus.train.dtype == np.uint16
    assert corpus.documents == {"train": 1, "val": 1, "duplicates": 0}
    assert corpus.eos_id not in corpus.train


@pytest.mark.parametrize("source", [BPE(500), Characters()])
def test_documents_are_kept_whole_on_one_side(tmp_path: Path, source: TokenizerSource) -> None:
    documents = [*write_documents(100), "Two\r\nline ends\n\n\n", f"A text that spells {EOS} out"]
    path = str(write_folder(tmp_path / "text", documents + documents[:7]))
    corpus = prepare(path, source, val_fraction=0.2, cache_dir=tmp_path / "cache")
    train, val = read_documents(corpus, corpus.train), read_documents(corpus, corpus.val)
    if isinstance(source, BPE):
        assert sorted(train + val) == sorted(documents)
    else:  # a character of the validation split may be unknown
        assert sorted(train) == sorted(set(train) & set(documents))
    assert not set(train) & set(val)
    assert corpus.documents == {"train": len(train), "val": len(val), "duplicates": 7}
    assert 8 <= len(val) <= 35
    again = prepare(path, source, val_fraction=0.2, cache_dir=tmp_path / "elsewhere")
    assert np.array_equal(again.train, corpus.train)
    assert np.array_equal(again.val, corpus.val)


def test_a_document_stays_on_its_side_when_others_come(tmp_path: Path) -> None:
    documents = write_documents(120)
    few = prepare(str(write_folder(tmp_path / "a", documents[:60])), BPE(300), cache_dir=tmp_path / "cache")
    many = prepare(str(write_folder(tmp_path / "b", documents[::-1])), BPE(300), cache_dir=tmp_path / "cache")
    other = prepare(str(tmp_path / "b"), BPE(300), seed=1, cache_dir=tmp_path / "cache")
    val = set(read_documents(many, many.val))
    assert set(read_documents(few, few.val)) == val & set(documents[:60])
    assert set(read_documents(other, other.val)) != val


def test_tiny_corpus_has_both_sides(tmp_path: Path) -> None:
    for seed in range(6):
        for fraction in (0.01, 0.99):
            path = str(write_folder(tmp_path / "text", write_documents(2)))
            corpus = prepare(path, BPE(300), val_fraction=fraction, seed=seed, cache_dir=tmp_path / "cache")
            assert corpus.documents == {"train": 1, "val": 1, "duplicates": 0}


def test_bytes_per_token_is_exact(tmp_path: Path) -> None:
    documents = [document + "é🙂" for document in write_documents(60)]
    corpus = prepare(str(write_folder(tmp_path / "text", documents)), BPE(400), cache_dir=tmp_path / "cache")
    val = read_documents(corpus, corpus.val)
    assert len(val) > 1
    assert corpus.bytes_per_token == sum(len(document.encode()) for document in val) / len(corpus.val)


def test_large_vocabulary_takes_32_bits(tmp_path: Path) -> None:
    class_vocab = {EOS: 0, "<unk>": 1} | {f"w{i}": i + 2 for i in range(70_000)}
    tokenizer = Tokenizer(models.WordLevel(class_vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("w69999 w1 " * 100)
    source = Pretrained(str(tmp_path / "tokenizer.json"))
    corpus = prepare(str(tmp_path / "text.txt"), source, cache_dir=tmp_path / "cache")
    assert corpus.train.dtype == np.uint32
    assert corpus.train[:2].tolist() == [70_001, 3]


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize("kind", ["gpt2", "prefix", "llama3", "metaspace", "characters"])
def test_cutting_long_documents_changes_no_token(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    content = inspect.getsource(argparse) + SAMPLE * 9
    if kind == "characters":
        tokenizer = Characters().build([content])
    else:
        split = {
            "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
            "prefix": pre_tokenizers.ByteLevel(add_prefix_space=True),
            "llama3": pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(text.Regex(LLAMA3), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            ),
            "metaspace": pre_tokenizers.Metaspace(),
        }[kind]
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = split
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.train_from_iterator([content], trainers.BpeTrainer(vocab_size=1500, show_progress=False))
    tokenizer.add_special_tokens([EOS])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text(content, newline="")
    whole = tokenizer.encode(content[: int(len(content) * 0.9)], add_special_tokens=False).ids
    monkeypatch.setattr(text, "PIECE", 200)
    source = Pretrained(str(tmp_path / "tokenizer.json"))
    corpus = prepare(str(tmp_path / "text.txt"), source, cache_dir=tmp_path / "cache")
    assert corpus.train.tolist() == whole
