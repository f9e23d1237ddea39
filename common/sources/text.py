"""Text for language models: any source → documents → tokenizer → token files → windows of tokens.

A corpus is prepared once, in streaming passes that hold 24 bytes per document in memory. It is kept under a fingerprint
of its source and settings; later runs only map the files.
"""

import glob
import hashlib
import io
import json
import mmap
import multiprocessing
import os
import re
import shutil
import sys
import sysconfig
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from jaxtyping import Bool, Int64, Integer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

from common.cache import make_cache
from common.checksums import CHECKSUMS, check_files, checksums
from common.errors import InputError, nearest, short_path
from common.sources.compressed import ending
from common.sources.documents import TABLES, TEXTS, Piece, find_files, pieces, read_file
from common.sources.tokenizers import KnownTokenizer, TokenizerSource, chosen

FORMAT = 5  # bump when the same source and settings would give other tokens, or another `meta.json`
BATCH = 1 << 20  # characters for the tokenizer's threads to share
SplitPiece = tuple[str, bool, str]  # "train", "val" or "test", and a piece
Held = Mapping[str, Sequence[int]]  # by its hash a document's length, and how much of it trains, in characters


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus on disk: documents joined by the end-of-text token.

    Without a text of its own for testing, ``test`` is ``val``. ``bytes_per_token`` is UTF-8 bytes per token of
    ``val`` and ``test``: bits per byte are nats per token / ln 2 / ``bytes_per_token``. ``documents`` counts those
    of each side and dropped ``duplicates``; a single document is cut in two and counts on both sides.
    ``fingerprint`` is of those of ``train`` and ``val``, in any order. ``unknown`` is the share of the tokens of
    ``val`` and ``test`` that stand for what the tokenizer does not know, which bits per byte leave out. ``held``
    are those whose side their hash alone does not say. Documents of ``test`` are dropped from the text for
    training. With them its fingerprint is ``whole``; ``trained`` counts those of them that would train.
    """

    folder: Path
    tokenizer: Tokenizer
    train: Integer[np.ndarray, " train"]
    val: Integer[np.ndarray, " val"]
    test: Integer[np.ndarray, " test"]
    eos_id: int
    vocab_size: int
    bytes_per_token: dict[str, float]
    unknown: dict[str, float]
    documents: dict[str, int]
    fingerprint: str
    held: Held
    trained: int
    whole: str

    @property
    def has_test(self) -> bool:
        """Whether there is a text for testing alone."""
        return self.test is not self.val


def prepare(
    path: str | None,
    tokenizer: TokenizerSource,
    *,
    column: str = "text",
    val_fraction: float = 0.1,
    seed: int = 0,
    cache_dir: Path,
    val_path: str | None = None,
    test_path: str | None = None,
    known: KnownTokenizer | None = None,
    held: Held | None = None,
) -> Corpus:
    """Read, split and tokenize a corpus into ``cache_dir``, or open the result of an earlier call.

    Exact duplicates are dropped, those of ``val_path`` and ``test_path`` from the training text. A document's side of
    the split depends on its text and ``seed`` alone; each side gets at least one. A document of
    more than two thirds of all is cut by characters; its last ``val_fraction`` is for validation. Long documents are
    encoded in pieces, cut where byte-level, character and Metaspace tokenizers give the same tokens as for the whole.
    Several processes may call at once: one prepares, the others wait.

    Args:
        path: a text file; a table (JSON lines, JSON, CSV, Parquet), one document per row; a folder of these,
            recursively; a glob pattern; ``owner/name`` or ``owner/name/config`` for a hub data set's train
            split; None for the sources of Python's standard library.
        tokenizer: how to get the tokenizer.
        column: the text's column in tables and hub data sets.
        val_fraction: share of the documents for validation, in (0, 1).
        seed: another seed gives another split.
        cache_dir: a folder for prepared corpora.
        val_path: the text for validation, given like ``path``; None for a share of the text.
        test_path: the text for testing; None to test on that for validation.
        known: the tokenizer of a checkpoint; it is taken where the text would now give another one.
        held: ``held`` of a checkpoint's corpus: these documents stay on their sides; text that one got since trains.

    Raises:
        InputError: no such path or column, a file that cannot be read, or too little text.
    """
    if not 0 < val_fraction < 1:
        raise InputError(f"val_fraction is {val_fraction}: give a share between 0 and 1, such as 0.1")
    # Of equal documents the first stays.
    paths = {"test": test_path, "val": val_path}
    sources = {side: _find(own, column, f"data.{side}_path") for side, own in paths.items() if own is not None}
    sources["train"] = _find(path, column, "data.path")

    def folder_of(maker: TokenizerSource, held: Held | None) -> Path:
        kind = f"{type(maker).__module__}.{type(maker).__qualname__}"
        stamps = {side: source.stamp for side, source in sources.items()}
        facts = [FORMAT, stamps, column, kind, maker.settings(), val_fraction, seed, held and dict(held)]
        return Path(cache_dir) / hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    folder = folder_of(tokenizer, None)
    if known and not (folder.exists() and _is_of(folder, known, held)):
        tokenizer, folder = known, folder_of(known, held)
    try:
        if not folder.exists():
            make_cache(folder.parent)
            with FileLock(folder.with_suffix(".lock")):
                if not folder.exists():
                    _build(sources, tokenizer, val_fraction, seed, held, folder)
    finally:
        # A worker process forked after the threads were in use would warn, or hang using them.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    fix = f"remove the folder {folder}, and it is made anew"
    check_files(folder, fix=fix)
    meta = json.loads((folder / "meta.json").read_text())
    dtype = meta.pop("dtype")
    parts = {side: np.memmap(folder / f"{side}.bin", dtype, "r") for side in ("train", *meta["bytes_per_token"])}
    parts["test"] = parts.get("test", parts["val"])
    for key in ("bytes_per_token", "unknown"):
        meta[key].setdefault("test", meta[key]["val"])
    return Corpus(folder, _tokenizer_of(folder), **parts, **meta)


def _is_of(folder: Path, tokenizer: KnownTokenizer, held: Held | None) -> bool:
    found = json.loads((folder / "meta.json").read_text())["held"]
    same = held is None or found == {key: list(held[key]) for key in held}
    return _tokenizer_of(folder).to_str() == tokenizer.text and same


def _tokenizer_of(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


class Text:
    """A corpus and its tokenizer. Where the tokenizer is known the corpus is prepared when it is first asked for.

    Args:
        path: of the text.
        tokenizer: how to get the tokenizer; None for that of the checkpoint, or else of the weights.
        facts: those of the checkpoint that a command is about, whose tokenizer holds; empty if there is none.
        weights: folder or hub name of a net that is trained further; None for a new one.
        val_fraction: see :func:`prepare`.
        kwargs: further arguments of :func:`prepare`.

    Attributes:
        tokenizer: the tokenizer.
        eos_id: the token that ends a text.
        vocab_size: number of tokens.
        facts: the tokenizer, which token ends a text, further ``special`` settings, and by what it was made; of the
            corpus ``documents``, ``fingerprint`` and ``held``, and the ``val_fraction`` it is split by. All are plain
            values.
        has_changed: whether the corpus, once prepared, is another than that of the checkpoint.

    Raises:
        InputError: those of :func:`prepare` and :func:`common.sources.tokenizers.chosen`, or another tokenizer or share
            than that of the checkpoint is given.
    """

    def __init__(
        self,
        path: str | None,
        tokenizer: TokenizerSource | None,
        facts: Mapping[str, Any],
        weights: str | None = None,
        val_fraction: float = 0.1,
        **kwargs: Any,
    ):
        if facts and "eos_token" not in facts:
            raise InputError("data.facts_of: the checkpoint is of no text and has no tokenizer; name another, or null")
        source = chosen(tokenizer, weights, facts)
        given = {key: value for key, value in vars(source).items() if key != "eos_token"}
        # Checkpoints hold plain values alone; a class of one's own may have others.
        plain = {key: value if isinstance(value, int | float | str) else str(value) for key, value in given.items()}
        by = facts["made_by"] if facts and tokenizer is None else [type(source).__qualname__, plain]
        if facts and by != facts["made_by"]:
            problem = "the checkpoint was trained with {} {}, and this is another".format(*facts["made_by"])
            raise InputError(f"data.tokenizer: {problem}; remove it")
        if (before := facts.get("val_fraction", val_fraction)) != val_fraction:
            problem = f"the checkpoint's text was split by {before}, and its parts hold"
            raise InputError(f"data.val_fraction {val_fraction}: {problem}; give {before}, or begin a new run")
        known = KnownTokenizer(facts["tokenizer"], facts["eos_token"]) if facts else None
        kwargs |= {"val_fraction": val_fraction, "known": known, "held": facts.get("held", {}) if facts else None}
        self._prepare = partial(prepare, path, source, **kwargs)
        self.has_changed = False
        special = facts.get("special", {}) if facts else source.special()
        self.facts: dict[str, Any] = {**facts, "made_by": by, "special": special, "val_fraction": val_fraction}
        self.tokenizer = known.build([]) if known else self.corpus.tokenizer
        vocab = self.tokenizer.get_vocab()
        self.eos_id, self.vocab_size = vocab[known.eos_token] if known else self.corpus.eos_id, max(vocab.values()) + 1
        self.facts |= {"tokenizer": self.tokenizer.to_str(), "eos_token": self.tokenizer.id_to_token(self.eos_id)}

    @cached_property
    def corpus(self) -> Corpus:
        """The prepared text; says if it is another than that of the checkpoint."""
        from lightning.fabric.utilities.rank_zero import rank_zero_only

        corpus = self._prepare()
        if "fingerprint" not in self.facts and not rank_zero_only.rank:
            lost = (
                f"; the tokenizer does not know {corpus.unknown['val']:.1%} of these, and bits per byte leave them out"
            )
            counts = f"{len(corpus.train):,} tokens train, {len(corpus.val):,} validate"
            print(f"data.path: {counts}{lost if corpus.unknown['val'] else ''}", flush=True)
        known = self.facts.get("fingerprint", corpus.fingerprint)
        self.has_changed = known not in (corpus.fingerprint, corpus.whole)
        if known != corpus.fingerprint and corpus.trained and not rank_zero_only.rank:
            was = "may have been" if self.has_changed else "was"
            count = f"{corpus.trained} of its {corpus.documents['test']} documents"
            print(f"data.test_path: the net {was} trained with {count}", flush=True)
        if self.has_changed and not rank_zero_only.rank:
            then, now = self.facts["documents"], corpus.documents
            sides = ("train", "val", *["test"] * (now["test"] > 0))
            counts = ", ".join(f"{now[side]} for {side} ({then[side]} before)" for side in sides)
            stays = "those that it knew stay in their parts"
            if corpus.whole != corpus.fingerprint:
                stays = "others that it knew stay in their parts"
            elif self.facts["held"] and not any(key in corpus.held for key in self.facts["held"]):
                stays = "the one that it knew is gone or has changed, and parts are drawn anew"
            if not now["test"] and now["train"] + now["val"] < then["train"] + then["val"]:
                stays += "; data.test_path tests on the whole of another text"
            print(f"data.path: the text has changed since the checkpoint; documents: {counts}; {stays}", flush=True)
        kept = {name: getattr(corpus, name) for name in ("documents", "fingerprint")}
        self.facts |= kept | {"held": {key: list(value) for key, value in corpus.held.items()}}
        return corpus


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of ``length`` tokens and their next tokens: every token except the first is a target exactly once.

    Index it with a list of window numbers. Worker processes get a mapped token file by its name.

    Args:
        tokens: token ids.
        length: tokens per window.
        keep_partial: count the shorter last window too, padded.

    Raises:
        InputError: the tokens are too few for a window.
    """

    def __init__(self, tokens: Integer[np.ndarray, " tokens"], length: int, keep_partial: bool):
        self.tokens, self.length, self.keep_partial = tokens, length, keep_partial
        if not len(self):
            fix = "give more text or a shorter context"
            raise InputError(f"{len(tokens)} tokens are too few for a window of {length} and its next; {fix}")

    def __len__(self) -> int:
        return max(len(self.tokens) - 1 + (self.length - 1) * self.keep_partial, 0) // self.length

    def __getitem__(self, indices: Sequence[int]) -> tuple[Int64[Tensor, "batch time"], Int64[Tensor, "batch time"]]:
        """``input_ids`` and ``target``; 0 and -100 after the end of the text."""
        positions = np.asarray(indices)[:, None] * self.length + np.arange(self.length + 1)
        tokens = torch.from_numpy(self.tokens[positions.clip(max=len(self.tokens) - 1)].astype(np.int64))
        ended = torch.from_numpy(positions[:, 1:] >= len(self.tokens))
        return tokens[:, :-1].masked_fill(ended, 0), tokens[:, 1:].masked_fill(ended, -100)

    def __getstate__(self) -> dict[str, Any]:
        state, tokens = dict(vars(self)), self.tokens
        if isinstance(tokens, np.memmap) and isinstance(tokens.base, mmap.mmap):  # a whole file, not a slice
            state["tokens"] = str(tokens.filename), tokens.dtype
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(state["tokens"], tuple):
            state["tokens"] = np.memmap(*state["tokens"], mode="r")
        vars(self).update(state)


class TokenBatch(NamedTuple):
    """Windows of text; ``target`` is the next token of each position, -100 after the end."""

    input_ids: Int64[Tensor, "batch time"]
    target: Int64[Tensor, "batch time"]
    mask: Bool[Tensor, " batch"]


class TokenDataset(Dataset[TokenBatch]):
    """Reads windows of a token file as batches."""

    def __init__(self, windows: Windows):
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, indices: Sequence[int]) -> TokenBatch:
        input_ids, target = self.windows[indices]
        return TokenBatch(input_ids, target, torch.ones(len(indices), dtype=torch.bool))


class _Source(NamedTuple):
    name: str
    stamp: list[tuple[str, int, int]]  # changes when the text does
    read: Callable[[], Iterator[Piece]]  # every call starts anew
    said: str = ""  # of what is left out


def _find(path: str | None, column: str, key: str) -> _Source:
    if path is None:
        # Packages and tests differ between machines. The tables of encodings are nearly alike: some in training would
        # give away others in validation.
        skip = ("site-packages", "dist-packages", "test", "tests", "idle_test", "encodings")
        files = find_files(sysconfig.get_paths()["stdlib"], skip).files
        return _files("Python's library", [file for file in files if file.suffix == ".py"], column)
    place, name, fix = Path(path).expanduser(), short_path(path), "'**' in a pattern means any depth of folders"
    left_out: list[Path] = []
    if place.is_dir():
        files, left_out = find_files(place)
        fix = "name other kinds by a pattern such as 'folder/**/*.log'"
    elif place.exists() or not glob.has_magic(path):
        files = [place]
    else:
        files = sorted(filter(Path.is_file, map(Path, glob.glob(str(place), recursive=True))))
    if not files:
        raise InputError(f"{key}: {name}: no text files there; {fix}")
    if files[0].exists():
        some = f"{len(left_out)} of {len(files) + len(left_out)} files are left out, such as "
        said = f"{key}: {name}: {some}{short_path(left_out[0].name)}; {fix}" if left_out else ""
        return _files(name, files, column, said)
    while not place.parent.is_dir():
        place = place.parent  # the first missing folder of the path
    hub_name = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*){1,2}", path) and ending(Path(path)) not in TEXTS + TABLES
    if hub_name and place.name == path.split("/")[0]:
        return _hub(path, column, key)
    raise InputError(f"{key}: {name}: no such file or folder{nearest(place.name, os.listdir(place.parent))}")


def _stamp(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    stats = ((os.path.abspath(file), file.stat()) for file in files)
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def _files(name: str, files: Sequence[Path], column: str, said: str = "") -> _Source:
    def read() -> Iterator[Piece]:
        return chain.from_iterable(read_file(file, column) for file in files)

    return _Source(name, _stamp(files), read, said)


def _hub(name: str, column: str, key: str) -> _Source:
    owner, data, *config = name.split("/")
    try:
        rows = _load(f"{owner}/{data}", *config)
    except (OSError, ValueError) as error:
        reason = shorten(str(error), 60)
        raise InputError(f"{key}: {short_path(name)}: no such path, and the hub says: {reason}") from error
    stamp = _stamp(Path(file["filename"]) for file in rows.cache_files)
    return _Source(name, stamp, partial(_rows, rows, column, short_path(name)))


def _load(*args: str, **kwargs: Any) -> Any:
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)  # it also logs what it raises
    huggingface_hub.logging.set_verbosity_error()
    return datasets.load_dataset(*args, split="train", **kwargs)


def _rows(rows: Any, column: str, name: str) -> Iterator[Piece]:
    for batch in rows.with_format("arrow").iter(batch_size=100):
        if column not in batch.column_names:
            fix = nearest(column, batch.column_names) or f"; there are: {shorten(', '.join(batch.column_names), 60)}"
            raise InputError(f"{name}: no column {column!r}{fix}")
        for text in batch[column].to_pylist():
            if not isinstance(text, str | None):
                raise InputError(f"{name}: column {column!r} holds {type(text).__name__}; choose one of text")
            yield from pieces(io.StringIO(text or ""))


class _Plan(NamedTuple):
    cuts: np.ndarray  # characters of each document for training; -1 if it is dropped
    ends: np.ndarray  # characters up to which what follows them is for evaluation; what comes then trains again
    total: int  # characters kept
    documents: dict[str, int]
    fingerprint: str
    held: dict[str, list[int]]
    trained: int
    whole: str


def _read(sources: Mapping[str, _Source]) -> Iterator[SplitPiece]:
    for side, source in sources.items():
        for begins, text in source.read():
            yield side, begins, text


def _build(
    sources: Mapping[str, _Source],
    wanted: TokenizerSource,
    val_fraction: float,
    seed: int,
    held: Held | None,
    folder: Path,
) -> None:
    # A forked process lacks its parent's threads and would wait for them forever.
    forked = multiprocessing.parent_process() is not None
    os.environ["TOKENIZERS_PARALLELISM"] = "false" if forked else "true"
    look = TextColumn("{task.description:>18}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    for source in sources.values():
        if source.said:
            print(source.said, flush=True)
    with Progress(*look) as progress:
        plan = _plan(_track(_read(sources), progress, "reading", None), sources, val_fraction, seed, held)
        texts = _track(_split(_read(sources), plan), progress, "training tokenizer", plan.total)
        tokenizer = wanted.build(_sample(texts, plan.total, wanted.sample_chars))
        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)  # left by a killed process: the lock is ours
        part.mkdir()
        pieces = _track(_split(_read(sources), plan), progress, "encoding", plan.total)
        meta = _encode(pieces, sources, tokenizer, wanted.eos_token, part)
    tokenizer.save(str(part / "tokenizer.json"))
    meta |= {key: getattr(plan, key) for key in ("documents", "fingerprint", "held", "trained", "whole")}
    (part / "meta.json").write_text(json.dumps(meta))
    sums = checksums(part, [path.name for path in part.iterdir()])
    (part / CHECKSUMS).write_text(json.dumps(sums))
    part.rename(folder)


def _track(pieces: Iterable[SplitPiece], bars: Progress, what: str, total: int | None) -> Iterator[SplitPiece]:
    task = bars.add_task(what, total=total)
    for piece in pieces:
        yield piece
        bars.advance(task, len(piece[-1]))
    bars.update(task, total=bars.tasks[task].completed)


def _plan(
    pieces: Iterable[SplitPiece], sources: Mapping[str, _Source], val_fraction: float, seed: int, held: Held | None
) -> _Plan:
    is_new, held = held is None, held or {}
    digest, digests, lengths, marks = hashlib.blake2b(), bytearray(), array("q"), sorted({n for n, _ in held.values()})
    numbers = dict.fromkeys(sources, 0)
    known: dict[int, str] = {}  # the hash of a held document, by the number of the one that begins like it
    for side, begins, text in pieces:
        if begins:
            digest = hashlib.blake2b(digest_size=16, key=str(seed).encode())
            digests += bytes(16)
            lengths.append(0)
            numbers[side] += 1
        for mark in marks:
            if lengths[-1] < mark <= lengths[-1] + len(text):
                head = digest.copy()
                head.update(text[: mark - lengths[-1]].encode())
                if held.get(head.hexdigest(), [0])[0] == mark:
                    known[len(lengths) - 1] = head.hexdigest()
        digest.update(text.encode())
        digests[-16:] = digest.digest()
        lengths[-1] += len(text)
    for side, number in numbers.items():
        if not number:
            raise InputError(
                f"{sources[side].name}: there is no text in it; name a file, a folder or a column with text"
            )
    keys, length = np.frombuffer(digests, "<u8").reshape(-1, 2), np.array(lengths)
    order = np.lexsort(keys.T)  # stable: of equal documents the first stays
    repeated = order[1:][(keys[order[1:]] == keys[order[:-1]]).all(axis=1)]
    own = len(length) - numbers["train"]  # how many have a part of their own
    share = keys[:, 0] / 2.0**64  # uniform in [0, 1), from text and seed
    cuts, ends = np.where(share < val_fraction, 0, length), length.copy()
    if "val" in sources:
        cuts, known = length.copy(), {}
    cuts[:own] = 0
    for number, key in known.items():
        ends[number], cuts[number] = held[key]
    cuts[repeated] = -1
    kept = own + np.flatnonzero(cuts[own:] >= 0)
    if not len(kept):
        problem = "all its documents are in data.val_path or data.test_path as well, and none is left to train on"
        raise InputError(f"{sources['train'].name}: {problem}; add text")
    fixed = {int(number) for number in kept if number in known}
    longest = kept[length[kept].argmax()]
    is_most = 3 * length[longest] > 2 * length[kept].sum()  # its side alone would say how much validates
    if "val" not in sources and not fixed and (len(kept) == 1 or (is_new and is_most)):
        cuts[longest] = int(length[longest] * (1 - val_fraction))
        fixed.add(int(longest))
    elif "val" not in sources:  # both sides of a small corpus get a document
        free = kept[[number not in fixed for number in kept]]
        if len(free) and not (cuts[kept] < ends[kept]).any():
            first = int(free[share[free].argmin()])
            cuts[first] = 0
            fixed.add(first)
        if len(free) and not (cuts[kept] > 0).any():
            last = int(free[share[free].argmax()])
            cuts[last] = length[last]
            fixed.add(last)
    trains, evaluates = (cuts > 0) | ((cuts == 0) & (ends < length)), (cuts >= 0) & (cuts < ends)
    test = numbers.get("test", 0)
    counts = {"train": trains, "val": evaluates[test:], "test": evaluates[:test], "duplicates": cuts < 0}
    shared = evaluates[:test] & np.isin(keys[:test, 0], keys[test:, 0])
    trained = shared & ~np.isin(keys[:test, 0], keys[test:own, 0])
    trained &= (share[:test] >= val_fraction) | ("val" in sources)
    for number in known.keys() & {*range(test)}:
        trained[number] = shared[number] and held[known[number]][1] > 0
    ours = keys[test:][cuts[test:] >= 0, 0]
    return _Plan(
        cuts,
        ends,
        int(length[cuts >= 0].sum()),
        {key: int(count.sum()) for key, count in counts.items()},
        f"{ours.sum(dtype=np.uint64):016x}",
        {
            known.get(number, digests[16 * number : 16 * number + 16].hex()): [int(ends[number]), int(cuts[number])]
            for number in sorted(fixed)
        },
        int(trained.sum()),
        f"{np.append(ours, keys[:test][shared, 0]).sum(dtype=np.uint64):016x}",
    )


def _split(pieces: Iterable[SplitPiece], plan: _Plan) -> Iterator[SplitPiece]:
    cuts, ends, cut, end, position = iter(plan.cuts.tolist()), iter(plan.ends.tolist()), 0, 0, 0
    for side, begins, text in pieces:
        if begins:
            cut, end, position = next(cuts), next(ends), 0
        if cut >= 0 and side != "train":
            yield side, begins, text
        elif cut >= 0:
            for part, first, last in (("train", 0, cut), ("val", cut, end), ("train", end, sys.maxsize)):
                if some := text[max(first - position, 0) : max(last - position, 0)]:
                    yield part, position <= first, some
        position += len(text)


def _sample(pieces: Iterable[SplitPiece], total: int, limit: float) -> Iterator[str]:
    """The training text, evenly thinned to about ``limit`` characters if it is longer."""
    seen = taken = 0
    for side, _, text in pieces:
        seen += len(text)
        if side == "train" and taken * total <= limit * seen:
            taken += len(text)
            yield text


def _encode(
    pieces: Iterable[SplitPiece], sources: Mapping[str, _Source], tokenizer: Tokenizer, eos_token: str, folder: Path
) -> dict[str, Any]:
    eos_id, vocab_size = tokenizer.token_to_id(eos_token), max(tokenizer.get_vocab().values()) + 1
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    later = Tokenizer.from_str(json.dumps(_within(json.loads(tokenizer.to_str()))))
    for each in (tokenizer, later):
        each.encode_special_tokens = True  # a text that spells out the end-of-text token does not end there
    sides = {"train", "val", *sources}
    tokens, read, unknown = (dict.fromkeys(sides, 0) for _ in range(3))
    unk_id = tokenizer.token_to_id(getattr(tokenizer.model, "unk_token", None) or "")
    with ExitStack() as opened:
        files = {side: opened.enter_context((folder / f"{side}.bin").open("wb")) for side in sides}
        for batch in _batches(pieces):
            groups = {by: [text for _, begins, text in batch if begins is by] for by in (True, False)}
            encodings = {
                begins: iter((tokenizer if begins else later).encode_batch_fast(texts, add_special_tokens=False))
                for begins, texts in groups.items()
            }
            for side, begins, text in batch:
                encoding = next(encodings[begins])
                ids = [eos_id, *encoding.ids] if begins and tokens[side] else encoding.ids
                files[side].write(np.array(ids, dtype).tobytes())
                tokens[side] += len(ids)
                read[side] += len(text.encode())
                unknown[side] += ids.count(unk_id) if unk_id is not None and side != "train" else 0
    if tokens[least := min(tokens, key=lambda side: tokens[side])] < 2:
        name = sources.get(least, sources["train"]).name
        raise InputError(f"{name}: {sum(tokens.values())} tokens are too few to train and validate; add text")
    counts = {"bytes_per_token": read, "unknown": unknown}
    each = {
        key: {side: some[side] / tokens[side] for side in ("val", "test") if side in sides}
        for key, some in counts.items()
    }
    return {"eos_id": eos_id, "vocab_size": vocab_size, "dtype": dtype, **each}


def _within(tokenizer: Any) -> Any:
    """The parts of a ``tokenizer.json`` without the space that some put before each text, for what is within one."""
    if isinstance(tokenizer, list):
        return [_within(part) for part in tokenizer if not (isinstance(part, dict) and part.get("type") == "Prepend")]
    if not isinstance(tokenizer, dict):
        return tokenizer
    parts = {key: part if key in ("model", "added_tokens") else _within(part) for key, part in tokenizer.items()}
    if parts.get("type") == "Prepend":
        return None
    never = {"prepend_scheme": "never", "add_prefix_space": False}
    return parts | {key: value for key, value in never.items() if key in parts}


def _batches(pieces: Iterable[SplitPiece]) -> Iterator[list[SplitPiece]]:
    batch, length = [], 0
    for piece in pieces:
        batch.append(piece)
        length += len(piece[-1])
        if length >= BATCH:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch
