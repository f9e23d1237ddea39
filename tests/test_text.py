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
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from jsonargparse import ArgumentParser
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from common.errors import InputError
from common.sources import documents, text
from common.sources.text import Corpus, Windows, prepare
from common.sources.tokenizers import BPE, EOS, Characters, KnownTokenizer, PretrainedTokenizer, TokenizerSource

SAMPLE = "def f(x):\n\n    return 'naïve – 🙂'\t# 東京\r\n\n" + "Once upon a time, there was a word. " * 5
WORDS = sorted({word for word in SAMPLE.split() if word.isascii()} | {f"word{i}" for i in range(15)})


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
    tokenizer = BPE(400).build([inspect.getsource(argparse)])
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
        corpus = prepare(str(file.parent), PretrainedTokenizer(str(name)), cache_dir=tmp_path / "cache")
        assert corpus.eos_id == 1  # </s>
        assert corpus.vocab_size == 300
        documents = read_documents(corpus, corpus.train) + read_documents(corpus, corpus.val)
        assert file.read_text() in documents  # more than the 8 tokens at which the saved one truncates


def test_pretrained_is_prepared_again_when_its_files_change(tmp_path: Path) -> None:
    folder, path = (
        save_tokenizer(tmp_path / "tokenizer"),
        str(write_folder(tmp_path / "t", write_documents(9))),
    )
    first = prepare(path, PretrainedTokenizer(str(folder)), cache_dir=tmp_path / "cache")
    save_tokenizer(folder, eos="<eos>")
    second = prepare(path, PretrainedTokenizer(str(folder)), cache_dir=tmp_path / "cache")
    assert first.folder != second.folder
    assert second.tokenizer.token_to_id("<eos>") == second.eos_id


def test_tokenizer_is_chosen_in_yaml(tmp_path: Path) -> None:
    parser = ArgumentParser()
    parser.add_argument("--tokenizer", type=TokenizerSource)
    config = tmp_path / "config.yaml"
    config.write_text("tokenizer: {class_path: common.sources.tokenizers.BPE, init_args: {vocab_size: 512}}\n")
    parser.add_argument("--config", action="config")
    chosen = parser.instantiate(parser.parse_args([f"--config={config}"])).tokenizer
    assert isinstance(chosen, BPE)
    assert chosen.vocab_size == 512
    for flags, kind in (
        (["--tokenizer=common.sources.tokenizers.Characters"], Characters),
        (["--tokenizer=common.sources.tokenizers.PretrainedTokenizer", "--tokenizer.name=gpt2"], PretrainedTokenizer),
    ):
        assert type(parser.instantiate(parser.parse_args(flags)).tokenizer) is kind


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
    assert corpus.documents == {"train": 1, "val": 1, "test": 0, "duplicates": 0}
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
    assert corpus.documents == {"train": len(train), "val": len(val), "test": 0, "duplicates": 7}
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
            assert corpus.documents == {"train": 1, "val": 1, "test": 0, "duplicates": 0}


def test_a_document_of_most_of_the_text_does_not_decide_how_much_validates(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "text", write_documents(30))
    (folder / "long.txt").write_text("words of a long text " * 20_000)
    for seed in range(4):
        corpus = prepare(str(folder), Characters(), seed=seed, cache_dir=tmp_path / "cache")
        share = len(corpus.val) / (len(corpus.val) + len(corpus.train))
        assert 0.08 < share < 0.12
        grown = write_folder(tmp_path / f"grown{seed}", [*write_documents(30), "new " * 200_000])
        (grown / "long.txt").write_text((folder / "long.txt").read_text())
        known = KnownTokenizer(corpus.tokenizer.to_str(), EOS)
        more = prepare(str(grown), Characters(), seed=seed, cache_dir=tmp_path / "cache", known=known, held=corpus.held)
        assert more.held.items() >= corpus.held.items()


def test_tokens_that_stand_for_unknown_characters_are_counted(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("abc" * 100)
    (tmp_path / "val.txt").write_text("ab?d")
    corpus = prepare(
        str(tmp_path / "own.txt"), Characters(), cache_dir=tmp_path / "cache", val_path=str(tmp_path / "val.txt")
    )
    assert corpus.unknown == {"val": 0.5, "test": 0.5}


@pytest.mark.parametrize("count", [1, 2, 3, 40])
def test_growing_text_moves_none(tmp_path: Path, count: int) -> None:
    """Ten times, by a document and at the end of one, from one that is cut, or whose side their number says."""
    documents, folder = write_documents(60), tmp_path / "text"
    folder.mkdir()
    (folder / "grows.txt").write_text("".join(write_documents(20, seed=9)))
    for number in range(1, count):
        (folder / f"{number}.txt").write_text(documents[number])
    source, cache = Bytes(), tmp_path / "cache"
    corpus = prepare(str(folder), source, val_fraction=0.1, cache_dir=cache)
    known = KnownTokenizer(corpus.tokenizer.to_str(), source.eos_token)
    for step in range(10):
        before = [read_documents(corpus, tokens) for tokens in (corpus.train, corpus.val)]
        (folder / f"new{step}.txt").write_text(documents[count + step])
        if count == 1:
            with (folder / "grows.txt").open("a") as file:
                file.write(f"added {step}")
        corpus = prepare(str(folder), source, val_fraction=0.1, cache_dir=cache, known=known, held=corpus.held)
        train, val = ([*read_documents(corpus, tokens)] for tokens in (corpus.train, corpus.val))
        if count > 1:
            assert set(before[0]) <= set(train)
        assert set(before[1]) <= set(val)
        assert not set(train) & set(val)
        assert not any(text in other for text in before[1] for other in train)


def test_texts_of_their_own_for_validation_and_testing(tmp_path: Path) -> None:
    documents, cache = write_documents(30), tmp_path / "cache"
    paths = [str(write_folder(tmp_path / name, part)) for name, part in zip(
        ("train", "val", "test"), (documents, documents[3:5], [documents[7], "one more"]), strict=True
    )]  # fmt: skip
    corpus = prepare(paths[0], Bytes(), val_path=paths[1], test_path=paths[2], cache_dir=cache)
    found = [read_documents(corpus, tokens) for tokens in (corpus.train, corpus.val, corpus.test)]
    assert [sorted(part) for part in found] == [
        sorted(text for text in documents if text not in (*documents[3:5], documents[7])),
        sorted(documents[3:5]),
        sorted([documents[7], "one more"]),
    ]
    assert corpus.documents == {"train": 27, "val": 2, "test": 2, "duplicates": 3}
    for side, part in zip(("val", "test"), found[1:], strict=True):
        tokens = len(getattr(corpus, side))
        assert corpus.bytes_per_token[side] == sum(len(text.encode()) for text in part) / tokens
    tested = prepare(paths[0], Bytes(), test_path=paths[2], cache_dir=cache)
    assert tested.has_test
    assert sorted(read_documents(tested, tested.test)) == sorted(found[2])
    assert not set(read_documents(tested, tested.val)) & {documents[7], "one more"}
    plain = prepare(paths[0], Bytes(), cache_dir=cache)
    assert not plain.has_test
    assert np.array_equal(plain.test, plain.val)
    assert plain.fingerprint == plain.whole == tested.whole != tested.fingerprint
    with pytest.raises(
        InputError,
        match=r"all its documents are in data.val_path or data.test_path as well, and",
    ):
        prepare(paths[1], Bytes(), val_path=paths[1], cache_dir=cache)


@pytest.mark.parametrize("count", [2, 3, 40])
def test_documents_to_test_on_that_would_train_are_counted(count: int, tmp_path: Path) -> None:
    """Those of the validation part would not. Of few documents the part of one is no matter of its hash."""
    documents, cache = write_documents(count), tmp_path / "cache"
    path = str(write_folder(tmp_path / "t", documents))
    plain = prepare(path, Bytes(), cache_dir=cache, val_fraction=0.3)
    train, val = (read_documents(plain, tokens) for tokens in (plain.train, plain.val))
    for number, texts in enumerate((val, [*val, *train[:-1]], train[:2])):
        held_out = str(write_folder(tmp_path / f"test{number}", [*texts, "one more, of other words"]))
        settings: dict[str, Any] = {"cache_dir": cache, "val_fraction": 0.3, "held": plain.held}
        known = KnownTokenizer(plain.tokenizer.to_str(), str(plain.tokenizer.id_to_token(plain.eos_id)))
        others = str(write_folder(tmp_path / "grown", [*documents, *write_documents(9, seed=8)]))
        both = [set(part) - set(texts) for part in (train, val)]
        for place in (path, others) if all(both) else (others,):
            tested = prepare(place, Bytes(), test_path=held_out, known=known, **settings)
            assert tested.trained == len(set(texts) & set(train))
            assert (tested.whole == plain.fingerprint) == (place == path)


def test_a_cache_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"XDG_CACHE_HOME: cannot make .*; set it to another folder"):
        prepare(str(write_folder(tmp_path / "texts", write_documents(20))), BPE(300), cache_dir=tmp_path / "file/cache")


def test_bytes_per_token_is_exact(tmp_path: Path) -> None:
    documents = [document + "é🙂" for document in write_documents(60)]
    corpus = prepare(str(write_folder(tmp_path / "text", documents)), BPE(400), cache_dir=tmp_path / "cache")
    val = read_documents(corpus, corpus.val)
    assert len(val) > 1
    assert corpus.bytes_per_token["val"] == sum(len(document.encode()) for document in val) / len(corpus.val)


def test_large_vocabulary_takes_32_bits(tmp_path: Path) -> None:
    class_vocab = {EOS: 0, "<unk>": 1} | {f"w{i}": i + 2 for i in range(70_000)}
    tokenizer = Tokenizer(models.WordLevel(class_vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("w69999 w1 " * 100)
    source = PretrainedTokenizer(str(tmp_path / "tokenizer.json"))
    corpus = prepare(str(tmp_path / "text.txt"), source, cache_dir=tmp_path / "cache")
    assert corpus.train.dtype == np.uint32
    assert corpus.train[:2].tolist() == [70_001, 3]


# Of Llama 3, and with GPT-4o's slash: it joins line ends to what stands before them.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize("kind", ["gpt2", "prefix", "llama3", "llama2", "metaspace", "characters"])
def test_cutting_long_documents_changes_no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str) -> None:
    content = inspect.getsource(argparse) + SAMPLE * 9
    if kind in ("gpt2", "llama3"):  # these can also be cut where no space is near
        content = "func(xs);\n\n/yes,\n\t\tgo_\n{\n.zoo,\n/to\n" * 999 + "words\n" * 999 + content
    if kind == "characters":
        tokenizer = Characters().build([content])
    else:
        split = {
            "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
            "prefix": pre_tokenizers.ByteLevel(add_prefix_space=True),
            "llama3": pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            ),
            "llama2": pre_tokenizers.Split("▁", "merged_with_next"),
            "metaspace": pre_tokenizers.Metaspace(),
        }[kind]
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = split
        tokenizer.normalizer = normalizers.NFC()
        if kind == "llama2":  # a mark before each text, and for each space
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.train_from_iterator([content], trainers.BpeTrainer(vocab_size=1500, show_progress=False))
    tokenizer.add_special_tokens([EOS])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text(content, newline="")
    whole = tokenizer.encode(content[: int(len(content) * 0.9)], add_special_tokens=False).ids
    monkeypatch.setattr(documents, "PIECE", 1000)
    source = PretrainedTokenizer(str(tmp_path / "tokenizer.json"))
    corpus = prepare(str(tmp_path / "text.txt"), source, cache_dir=tmp_path / "cache")
    assert corpus.train.tolist() == whole


# Sources


def write_table(file: Path, rows: list[dict]) -> None:
    frame, lines = pd.DataFrame(rows), "\n".join(map(json.dumps, rows))
    if file.suffix == ".csv":
        frame.to_csv(file, index=False)
    elif file.suffix == ".parquet":
        frame.to_parquet(file)
    elif file.suffix == ".gz":
        file.write_bytes(gzip.compress(lines.encode()))
    else:
        file.write_text(lines if file.suffix == ".jsonl" else json.dumps(rows))


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.jsonl", "a.JSONL.gz", "a.json", "odd [1] name*.jsonl"])
def test_tables(tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    documents = [*write_documents(50), "line\r\nends, \"quoted\" and 'naïve'\n"]
    rows = [{"id": i, "body": document} for i, document in enumerate([*documents, *documents[:5]])]
    write_table(tmp_path / name.replace("JSONL", "jsonl"), [*rows, {"id": -1, "body": None}])
    path = str(tmp_path / name.replace("JSONL", "jsonl"))
    corpus = prepare(path, BPE(300), column="body", cache_dir=tmp_path / "cache")
    found = read_documents(corpus, corpus.train) + read_documents(corpus, corpus.val)
    assert sorted(found) == sorted(documents)
    assert corpus.documents["duplicates"] == 5
    out, err = capfd.readouterr()
    assert "encoding" in out
    assert err == ""


def test_folder_glob_and_mixed_files(tmp_path: Path) -> None:
    documents = write_documents(30)
    folder = write_folder(tmp_path / "text", documents[:20])
    write_table(folder / "more.jsonl", [{"text": document} for document in documents[20:]])
    (folder / "code.PY").write_text("x = 1\n")
    (folder / "byte_order_mark.md").write_text("From Windows.\n", encoding="utf-8-sig")
    for hidden in (".git/config.txt", ".notes.txt", "image.png", "empty.txt", "empty.jsonl"):
        (folder / hidden).parent.mkdir(exist_ok=True)
        (folder / hidden).write_text("" if "empty" in hidden else "never read")
    (folder / "0.txt").symlink_to("nothing")
    whole = prepare(str(folder), BPE(300), cache_dir=tmp_path / "cache")
    found = read_documents(whole, whole.train) + read_documents(whole, whole.val)
    assert sorted(found) == sorted([*documents, "x = 1\n", "From Windows.\n"])
    some = prepare(str(folder / "**" / "000[0-4].txt"), BPE(300), cache_dir=tmp_path / "cache")
    assert sorted(read_documents(some, some.train) + read_documents(some, some.val)) == sorted(documents[:5])


def test_hub_data_set_from_its_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    documents = write_documents(30)
    (tmp_path / "words").mkdir()
    write_table(tmp_path / "words" / "train.jsonl", [{"text": document, "id": 1} for document in documents])
    made = datasets.load_dataset(str(tmp_path / "words"), split="train").cache_files[0]["filename"]
    cached = tmp_path / "hub" / "someone___words" / "default" / "0.0.0" / "0123abc"
    cached.parent.mkdir(parents=True)
    Path(made).parent.rename(cached)
    for name in ("someone/words", "someone/words/default"):
        corpus = prepare(name, BPE(300), cache_dir=tmp_path / "cache")
        found = read_documents(corpus, corpus.train) + read_documents(corpus, corpus.val)
        assert sorted(found) == sorted(documents)
    for name in ("someone/sentences", "someone/words/other"):
        with pytest.raises(InputError, match=rf"^data.path: {name}: no such path, and the hub says: "):
            prepare(name, BPE(300), cache_dir=tmp_path / "cache")


def test_standard_library_is_listed_in_order_without_tests() -> None:
    source = text._find(None, "text", "data.path")
    names = [name for name, _, _ in source.stamp]
    assert names == sorted(names, key=Path)
    assert {Path(name).suffix for name in names} == {".py"}
    assert any(name.endswith("pydoc_data/topics.py") for name in names)
    assert not any(part in name for name in names for part in ("site-packages", "/test/", "/tests/"))
    assert 9e6 < sum(size for _, size, _ in source.stamp) < 20e6
    assert len(next(source.read())[1]) > 100


# Reuse


def test_reuse_and_new_preparation(tmp_path: Path) -> None:
    file, cache = tmp_path / "a.txt", tmp_path / "cache"
    file.write_text("".join(write_documents(50)))
    first = prepare(str(file), BPE(300), cache_dir=cache)
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    second = prepare(str(file), BPE(300), cache_dir=cache)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before
    assert (second.folder, second.documents, second.eos_id) == (first.folder, first.documents, first.eos_id)
    assert np.array_equal(first.train, second.train)
    assert sorted(p.name for p in first.folder.iterdir()) == [
        "checksums.json",
        "meta.json",
        "tokenizer.json",
        "train.bin",
        "val.bin",
    ]

    folders = {first.folder}
    folders.add(prepare(str(file), BPE(300), cache_dir=cache, val_fraction=0.2).folder)
    folders.add(prepare(str(file), BPE(300), cache_dir=cache, seed=1).folder)
    folders.add(prepare(str(file), BPE(300), cache_dir=cache, column="body").folder)
    folders.add(prepare(str(file), BPE(301), cache_dir=cache).folder)
    folders.add(prepare(str(file), Characters(), cache_dir=cache).folder)
    os.utime(file, ns=(1, 1))
    folders.add(prepare(str(file), BPE(300), cache_dir=cache).folder)
    file.write_text("".join(write_documents(51)))
    folders.add(prepare(str(file), BPE(300), cache_dir=cache).folder)
    assert len(folders) == 8


def test_an_interrupted_preparation_is_made_again(tmp_path: Path) -> None:
    file, cache = tmp_path / "a.txt", tmp_path / "cache"
    file.write_text("".join(write_documents(50)))
    whole = prepare(str(file), BPE(300), cache_dir=cache)
    tokens = np.array(whole.train)
    whole.folder.rename(whole.folder.with_suffix(".part"))
    (whole.folder.with_suffix(".part") / "train.bin").write_bytes(b"half")
    assert np.array_equal(prepare(str(file), BPE(300), cache_dir=cache).train, tokens)
    assert not whole.folder.with_suffix(".part").exists()


RANK = """
import sys
from pathlib import Path
from torch.utils.data import DataLoader
from common.sources.text import Windows, prepare
from common.sources.tokenizers import BPE

class Encoded(Windows):
    def __getitem__(self, indices):
        return len(corpus.tokenizer.encode_batch(["one", "two"] * 99))  # hangs if the threads are still on

corpus = prepare(sys.argv[1], BPE(400), cache_dir=Path(sys.argv[2]))
data = Encoded(corpus.val, 16, keep_partial=False)
data[[0]]
list(DataLoader(data, batch_size=None, sampler=[[0], [1]], num_workers=1, multiprocessing_context="fork"))
print("heavy:", {"datasets", "transformers", "pandas"} & set(sys.modules))
print("folder:", corpus.folder)
"""


def test_ranks_that_start_at_once_prepare_once_and_can_fork(tmp_path: Path) -> None:
    file, root = tmp_path / "a.txt", Path(__file__).parents[1]
    file.write_text("".join(write_documents(5_000)))
    command = [sys.executable, "-W", "ignore", "-c", RANK, str(file), str(tmp_path / "cache")]
    ranks = [
        subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=60) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert [err for _, err in outputs] == ["", ""]
    assert sorted("encoding" in out for out, _ in outputs) == [False, True]
    assert all("heavy: set()" in out for out, _ in outputs)
    assert len({out.partition("folder:")[2] for out, _ in outputs}) == 1
    assert [path.suffix for path in sorted((tmp_path / "cache").iterdir())] == ["", ".lock"]


GROWTH = """
import resource, sys
from pathlib import Path
from common.sources import text, tokenizers
text.PIECE, text.BATCH = 1 << 12, 1 << 16
for name in ("small", "large"):
    text.prepare(f"{sys.argv[1]}/{name}", tokenizers.Characters(), cache_dir=Path(sys.argv[1]))
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.matrix
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit")
def test_memory_stays_flat(tmp_path: Path) -> None:
    for name, count in (("small", 2_000), ("large", 16_000)):
        documents = write_documents(count, words=25)
        (tmp_path / name).mkdir()
        (tmp_path / name / "one.txt").write_text("".join(documents))
        write_table(tmp_path / name / "rows.csv", [{"text": document} for document in documents])
    command = [sys.executable, "-c", GROWTH, str(tmp_path)]
    run = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    small, large = (int(line.split()[1]) for line in run.stdout.splitlines() if line.startswith("peak"))
    assert (tmp_path / "large" / "one.txt").stat().st_size > 2.5e6
    assert large - small < 40_000  # kB; all tokens of the large one at once would take ten times that


# Windows


@pytest.mark.parametrize(("count", "length"), [(2, 1), (17, 4), (18, 4), (20, 4), (21, 4), (5, 4), (100, 7)])
def test_every_token_but_the_first_is_a_target_once(count: int, length: int) -> None:
    tokens = np.arange(1000, 1000 + count, dtype=np.uint16)
    windows = Windows(tokens, length, keep_partial=True)
    input_ids, target = windows[range(len(windows))]
    assert input_ids.shape == target.shape == (math.ceil((count - 1) / length), length)
    real = target != -100
    assert target[real].tolist() == tokens[1:].tolist()
    assert torch.equal(input_ids[real], target[real] - 1)
    assert (input_ids[~real] == 0).all()
    full = Windows(tokens, length, keep_partial=False)
    assert len(full) == (count - 1) // length
    assert torch.equal(full[range(len(full))][1], target[: len(full)])


def test_windows_in_any_order_and_large_token_ids() -> None:
    tokens = np.array([3, 70_000, 5, 6, 2**32 - 1, 8, 9], dtype=np.uint32)
    input_ids, target = Windows(tokens, 2, keep_partial=False)[[2, 0, 2]]
    assert input_ids.tolist() == [[2**32 - 1, 8], [3, 70_000], [2**32 - 1, 8]]
    assert target.tolist() == [[8, 9], [70_000, 5], [8, 9]]


def test_windows_travel_by_file_name(tmp_path: Path) -> None:
    np.arange(100_000, dtype=np.uint16).tofile(tmp_path / "train.bin")
    mapped = np.memmap(tmp_path / "train.bin", np.uint16, "r")
    windows = Windows(mapped, 64, keep_partial=True)
    pickled = pickle.dumps(windows)
    assert len(pickled) < 1000
    copy = pickle.loads(pickled)
    assert isinstance(copy.tokens, np.memmap)
    assert torch.equal(copy[[5, 1]][1], windows[[5, 1]][1])
    part = pickle.loads(pickle.dumps(Windows(mapped[500:900], 64, keep_partial=True)))
    assert part[[0]][0][0, 0] == 500
    memory = pickle.loads(pickle.dumps(Windows(np.arange(50), 4, keep_partial=True)))
    assert memory[[1]][0].tolist() == [[4, 5, 6, 7]]


def test_windows_in_spawned_workers(tmp_path: Path) -> None:
    np.arange(1000, dtype=np.uint16).tofile(tmp_path / "train.bin")
    windows = Windows(np.memmap(tmp_path / "train.bin", np.uint16, "r"), 8, keep_partial=True)
    context = multiprocessing.get_context("spawn")
    order = [[3, 1], [0, 124]]
    loader = DataLoader(windows, batch_size=None, sampler=order, num_workers=1, multiprocessing_context=context)
    for indices, (input_ids, target) in zip(order, loader, strict=True):
        assert torch.equal(input_ids, windows[indices][0])
        assert torch.equal(target, windows[indices][1])


# Mistakes


def mistake(tmp_path: Path, path: str | None = None, source: TokenizerSource | None = None, **settings) -> str:
    with pytest.raises(InputError) as caught:
        prepare(path, source or BPE(300), cache_dir=tmp_path / "cache", **settings)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) <= 170
    return message


def test_a_mistyped_path_is_corrected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (write_folder(tmp_path / "data", write_documents(3)) / "shakespeare.txt").write_text("To be")
    assert mistake(tmp_path, "data/shakespear.txt") == (
        "data.path: data/shakespear.txt: no such file or folder; did you mean 'shakespeare.txt'?"
    )
    assert mistake(tmp_path, "dat/shakespeare.txt").endswith("; did you mean 'data'?")
    assert mistake(tmp_path, "data/part00/x/y.txt").endswith("did you mean 'part0'?")
    assert mistake(tmp_path, "nowhere") == "data.path: nowhere: no such file or folder"
    assert mistake(tmp_path, str(tmp_path / ("a" * 100) / ("b" * 100))).endswith("no such file or folder")
    assert "no text files there; '**'" in mistake(tmp_path, "data/*.rst")
    (tmp_path / "pictures").mkdir()
    assert mistake(tmp_path, "pictures").endswith("name other kinds by a pattern such as 'folder/**/*.log'")


def test_unreadable_text_is_named_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    for start in (0, 3, 9000, 70_000, 200_001):
        for marked in (b"", b"\xef\xbb\xbf"):
            content = marked + "é".encode() * 5 + b"a" * start
            file.write_bytes(content + "é".encode("latin1") + b"bc" * 50_000)
            assert f"latin.txt: not UTF-8 at byte {len(content)}; convert it" in mistake(tmp_path, str(file))
    file.write_bytes(b"cut short \xf0\x9f")
    assert "not UTF-8 at byte 10;" in mistake(tmp_path, str(file))


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl", "json"])
def test_missing_column_is_corrected(tmp_path: Path, suffix: str) -> None:
    write_table(tmp_path / f"a.{suffix}", [{"body": "one", "number": 1}, {"body": "two", "number": 2}])
    path = str(tmp_path / f"a.{suffix}")
    assert mistake(tmp_path, path, column="bodi").endswith(f"a.{suffix}: no column 'bodi'; did you mean 'body'?")
    assert mistake(tmp_path, path).endswith("no column 'text'; there are: body, number")
    if suffix != "csv":  # whose cells are all text
        place = "line" if suffix == "jsonl" else "row"
        problem = f"a.{suffix}: {place} 1: 'number' holds 1, which is no text; mend or remove it"
        assert mistake(tmp_path, path, column="number").endswith(problem)


def test_too_little_text(tmp_path: Path) -> None:
    for name, content in (("a.txt", ""), ("a.csv", "text,n\n"), ("a.jsonl", ""), ("b.json", "[]")):
        (tmp_path / name).write_text(content)
        assert f"{name}: there is no text in it; name a file" in mistake(tmp_path, str(tmp_path / name))
    (tmp_path / "a.txt").write_text("a")
    assert mistake(tmp_path, str(tmp_path / "a.txt")).endswith("tokens are too few to train and validate; add text")
    with pytest.raises(InputError, match=r"^5 tokens are too few for a window of 5 and its next; give more text"):
        Windows(np.arange(5), 5, keep_partial=False)
    with pytest.raises(InputError, match=r"^1 tokens are too few for a window"):
        Windows(np.arange(1), 5, keep_partial=True)
    with pytest.raises(InputError, match=r"^0 tokens are too few for a window"):
        Windows(np.arange(0), 1, keep_partial=False)


def test_wrong_settings(tmp_path: Path) -> None:
    for fraction in (0.0, 1.0, -0.1):
        assert mistake(tmp_path, val_fraction=fraction).startswith(f"val_fraction is {fraction}: give a share")
    with pytest.raises(InputError, match=r"^vocab_size is 256: .* at least 257$"):
        BPE(256)


def test_wrong_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "a.txt").write_text(SAMPLE)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.json").write_text("{}")
    fix = "; give a folder, a tokenizer.json or a hub name"
    for name in (
        tmp_path / "empty",
        tmp_path / "broken.json",
        tmp_path / "nothing",
        tmp_path / "a.txt",
        "some/one",
    ):
        message = mistake(tmp_path, str(tmp_path / "a.txt"), PretrainedTokenizer(str(name)))
        assert f"{Path(name).name}: no fast tokenizer there (" in message
        assert message.endswith(fix)
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1, "None": 2}, unk_token="<unk>"))
    tokenizer.save(str(tmp_path / "endless.json"))
    message = mistake(tmp_path, str(tmp_path / "a.txt"), PretrainedTokenizer(str(tmp_path / "endless.json")))
    assert message.endswith("no end-of-text token; set eos_token in its tokenizer_config.json")
