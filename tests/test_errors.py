"""Mistakes in configs, flags, data and checkpoints: each ends in one line with place and remedy, and loses nothing."""

import gzip
import importlib.util
import io
import logging
import os
import random
import re
import shlex
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import torch
import yaml

from common.checkpoint import read_checkpoint
from common.run.cli import RecipeCLI, _is_unknown_token
from common.run.layers import locate
from tests.support import MEASURED, ROOT, TINY, halved, main_of, refused

pytestmark = pytest.mark.usefixtures("no_report")

LM, CLASSES = "lm", "classification"
OPTIMIZER, SCHEDULE, NET = "--model.optimizer", "--model.lr_scheduler", "--model.config.init_args"
TOKENIZER = "--data.tokenizer"
CALLBACK = "trainer:\n  callbacks+:\n    - class_path: lightning.pytorch.callbacks."
LOGGER = "trainer:\n  logger+:\n    - class_path: lightning.pytorch.loggers."
IDX = "--data.source common.sources.IDX --data.source.class_names [a,b] --data.source.path files"
TABLE = "--data.source common.sources.TextTable --data.source.tokenizer no --data.source.path table.csv"


@pytest.fixture(autouse=True)
def _only_our_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Lightning logs goes to stdout in a process of its own; here it would stand on stderr."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])


@pytest.fixture
def fit_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the parsers of the other commands out: making them would take most of the time of these tests."""
    skip = RecipeCLI.subcommands()["fit"]
    monkeypatch.setattr(RecipeCLI, "subcommands", staticmethod(lambda: {"fit": skip}))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def check(line: str, where: str, key: str, hint: str | None) -> None:
    assert line.startswith(f"{where}: " if where else ""), line
    assert key in line
    assert re.findall(r"did you mean '([^']*)'", line) == ([hint] if hint else []), line


def case(recipe: str, text: str, flags: str, where: str, key: str, hint: str | None = None) -> Any:
    """A config ``bad.yaml``, flags, and what the line begins with, names and suggests."""
    return pytest.param(recipe, text, shlex.split(flags), where, key, hint, id=f"{recipe} {where} {key}")


STRATEGY = ROOT / "configs/strategy"

# fmt: off
WRONG_KEYS = [
    case(LM, "trainr:\n  max_steps: 3\n", "", "bad.yaml:2", "trainr.max_steps", "trainer.max_steps"),
    case(LM, "trainer:\n  max_step: 3\n", "", "bad.yaml:2", "trainer.max_step", "trainer.max_steps"),
    case(CLASSES, "model:\n  l1: 0.1\n  optimiser: x\n", "", "bad.yaml:3", "model.optimiser", "model.optimizer"),
    case(CLASSES, "data: {batchsize: 3}\n", "", "bad.yaml:1", "data.batchsize", "data.batch_size"),
    case(LM, "seed: 3\n", "", "bad.yaml:1", "seed", "seed_everything"),
    case(LM, "max_epochs: 3\n", "", "bad.yaml:1", "max_epochs", "trainer.max_epochs"),
    case(LM, "trainer:\n  batch_size: 3\n", "", "bad.yaml:2", "trainer.batch_size", "data.batch_size"),
    case(LM, "trainer:\n  callback+: []\n", "", "bad.yaml:2", "trainer.callback", "trainer.callbacks"),
    case(LM, "", "--trainer.max_step 3", "--trainer.max_step", "no such key", "trainer.max_steps"),
    case(LM, "", "--trainer.max_step=3", "--trainer.max_step", "no such key", "trainer.max_steps"),
    case(CLASSES, "", "--nam x", "--nam", "no such key", "name"),
    case(LM, "best:\n  monitr: val/loss\n", "", "bad.yaml:2", "best.monitr: no such key", "best.monitor"),
    case(LM, "", "--model.optimzer.lr 3", "--model.optimzer.lr", "no such key", "model.optimizer.lr"),
    case(LM, "", "--config '{trainer: {max_step: 3}}'", "--config", "trainer.max_step: no such key",
         "trainer.max_steps"),
    case(LM, "model:\n  optimizer:\n    init_args:\n      weight_deca: 3\n", "", "bad.yaml:4",
         "model.optimizer.init_args.weight_deca: no such argument of torch.optim.AdamW", "weight_decay"),
    case(LM, "", f"{OPTIMIZER}.weight_deca=3 {OPTIMIZER}.lr=1", f"{OPTIMIZER}.weight_deca", "AdamW", "weight_decay"),
    case(LM, "", f"{NET}.hiden_size 3", f"{NET}.hiden_size", "LlamaConfig", "hidden_size"),
    case(LM, "model:\n  lr_scheduler:\n    class_path: common.optim.Linear\n    init_args: {warmups: 3}\n", "",
         "bad.yaml:4", "model.lr_scheduler.init_args.warmups", "warmup"),
    case(CLASSES, "model:\n  net:\n    init_args: {width: [3]}\n", "", "bad.yaml:3", "model.net.init_args.width",
         "widths"),
    case(CLASSES,
         "model:\n  augmentation:\n    - class_path: kornia.augmentation.RandomAffine\n      init_args: {degree: 3}\n",
         "", "bad.yaml:4", "model.augmentation[0].init_args.degree", "degrees"),
    case(LM, CALLBACK + "EarlyStopping\n      init_args: {monitor: val/loss, patienc: 3}\n", "", "bad.yaml:4",
         "trainer.callbacks[0].init_args.patienc", "patience"),
    case(CLASSES, LOGGER + "CSVLogger\n      init_args: {save_dirr: .}\n", "", "bad.yaml:4",
         "trainer.logger[0].init_args.save_dirr", "save_dir"),
    case(LM,
         "trainer:\n  strategy:\n    class_path: lightning.pytorch.strategies.DDPStrategy\n"
         "    init_args: {static_grap: true}\n",
         "", "bad.yaml:4", "trainer.strategy.init_args.static_grap", "static_graph"),
    case(LM, "data:\n  tokenizer:\n    class_pat: x\n", "", "bad.yaml:3", "data.tokenizer.class_pat: no such",
         "class_path"),
    case(LM, CALLBACK + "EarlyStopping\n      init_arg: {monitor: val/loss}\n", "", "bad.yaml:4",
         "trainer.callbacks[0].init_arg", "init_args"),
    case(LM, "model:\n  optimizer:\n    class_path: torch.optim.SGD\n    lr: 3\n", "", "bad.yaml:3",
         "model.optimizer.class_path: the arguments of a class belong in init_args"),
]
WRONG_TYPES = [
    case(LM, "trainer:\n  max_steps: many\n", "", "bad.yaml:2", "trainer.max_steps: expected int, got 'many'"),
    case(LM, "", "--trainer.max_steps 1.5", "--trainer.max_steps", "expected int, got '1.5'"),
    case(LM, "data:\n  batch_size: [3]\n", "", "bad.yaml:2", "data.batch_size: expected int"),
    case(CLASSES, "", "--model.balance_classes perhaps", "--model.balance_classes", "expected bool, got 'perhaps'"),
    case(LM, "trainer:\n  gradient_clip_val: x\n", "", "bad.yaml:2",
         "trainer.gradient_clip_val: expected int or float"),
    case(LM, "data:\n  prompts: 3\n", "", "bad.yaml:2", "data.prompts: expected list, got '3'; if it is a text, put"),
    case(LM, "model:\n  optimizer: {class_path: torch.optim.SGD, init_args: {lr: fast}}\n", "", "bad.yaml:2",
         "model.optimizer.init_args.lr: expected float, got 'fast'"),
    case(CLASSES, "", "--model.net.widths [x]", "--model.net.widths", "expected int, got 'x'"),
    case(LM, CALLBACK + "EarlyStopping\n      init_args:\n        monitor: val/loss\n        patience: long\n", "",
         "bad.yaml:6", "trainer.callbacks[0].init_args.patience: expected int, got 'long'"),
    case(LM, "trainer: 3\n", "", "bad.yaml:1", "trainer: holds no keys"),
    case(CLASSES, "model:\n", "", "bad.yaml:1", "model: holds no keys"),
    case(LM, "trainer:\n  callbacks: 3\n", "", "bad.yaml:2", "trainer.callbacks: expected a class path, got '3'"),
    case(LM, "", "--data x", "--data", "no such file 'x'"),
]
WRONG_CLASSES = [
    case(LM, "model:\n  optimizer:\n    class_path: torch.optim.AdamWW\n", "", "bad.yaml:3",
         "model.optimizer.class_path: no 'AdamWW' in torch.optim", "AdamW"),
    case(LM, "model:\n  optimizer:\n    class_path: torch.optin.SGD\n", "", "bad.yaml:3",
         "model.optimizer.class_path: no 'optin' in torch", "optim"),
    case(LM, "", f"{OPTIMIZER} AdamWW", OPTIMIZER, "no class 'AdamWW'", "AdamW"),
    case(LM, "", f"{SCHEDULE} comon.optim.Linear", SCHEDULE, "no module named 'comon'", "common"),
    case(LM, "", f"{SCHEDULE} ReduceLROnPlateau", SCHEDULE, "Give the full class path to avoid ambiguity: torch.optim"),
    case(CLASSES, "", "--model.net common.nets.ConvNett", "--model.net", "no 'ConvNett' in common.nets", "ConvNet"),
    case(CLASSES, "data:\n  source: Digit\n", "", "bad.yaml:2", "data.source: no class 'Digit'", "Digits"),
    case(LM, "data:\n  tokenizer: common.sources.tokens.BPE\n", "", "bad.yaml:2",
         "data.tokenizer: no 'tokens' in common.sources", "tokenizers"),
    case(LM, "model:\n  config:\n    class_path: transformers.LlamaConfg\n", "", "bad.yaml:3", "model.config",
         "LlamaConfig"),
    case(LM, CALLBACK + "EarlyStoping\n", "", "bad.yaml:3", "trainer.callbacks[0].class_path", "EarlyStopping"),
    case(LM, "trainer:\n  callbacks+: [EarlyStoping]\n", "", "bad.yaml:2", "trainer.callbacks[0]", "EarlyStopping"),
    case(CLASSES, LOGGER + "CSVLoger\n", "", "bad.yaml:3", "trainer.logger[0].class_path", "CSVLogger"),
    case(LM, "model:\n  optimizer:\n    class_path: os.system\n", "", "bad.yaml:3", "os.system may not be imported"),
    case(LM, "", f"{OPTIMIZER} subprocess.run", OPTIMIZER, "subprocess.run may not be imported"),
    case(LM, "trainer:\n  callbacks+: [{class_path: os.system, init_args: {command: touch executed}}]\n", "",
         "bad.yaml:2",
         "trainer.callbacks[0].class_path: os.system may not be imported; allow your own package"),
    case(CLASSES, "", "--data.source sklearn.datasets.load_digits", "--data.source", "RECIPES_ALLOW=sklearn"),
    case(LM, "", f"{OPTIMIZER} common.optim.Cosine", OPTIMIZER, "common.optim.Cosine is no Optimizer"),
    case(CLASSES, "", "--model.net common.sources.Digits", "--model.net", "common.sources.Digits is no Module"),
    case(LM, CALLBACK.replace("callbacks.", "loggers.") + "CSVLogger\n", "", "bad.yaml:3", "CSVLogger is no Callback"),
    case(LM, CALLBACK + "EarlyStopping\n", "", "bad.yaml:3", "EarlyStopping needs monitor"),
    case(LM, CALLBACK + "ModelCheckpoint\n      init_args: {monitor: x}\n    - EarlyStopping\n", "", "bad.yaml:5",
         "trainer.callbacks[1]: lightning.pytorch.callbacks.EarlyStopping needs monitor"),
    case(CLASSES, "", "--data.source common.sources.IDX", "--data.source", "needs path, class_names"),
    case(CLASSES, "", "--model.net.num_classes 3", "--model.net.num_classes", "comes from the recipe itself"),
]
WRONG_CHOICES = [
    case(LM, "trainer:\n  precision: bf16-mixd\n", "", "bad.yaml:2", "trainer.precision: 'bf16-mixd'", "bf16-mixed"),
    case(LM, "", "--model.weight_init kaiming_unifrom", "--model.weight_init", "kaiming_unifrom", "kaiming_uniform"),
    case(LM, "", "--model.weight_init zzz", "--model.weight_init", "choose from xavier_uniform, xavier_normal"),
    case(LM, "", "--trainer.max_steps", "--trainer.max_steps", "needs a value"),
    case(LM, "", "--config", "--config", "needs a value"),
    case(LM, "", "max_steps=3", "command line", "'max_steps=3' is no flag; arguments look like --"),
    case(LM, "", "--name a/b", "", "--name 'a/b' must be a plain folder name"),
    case(LM, "", "--name ..", "", "--name '..' must be a plain folder name"),
    case(LM, "", "--seed_everything -5", "--seed_everything", "must be in [0, 2**32), got -5"),
    case(LM, "trainer: {overfit_batches: 2}\n", "", "bad.yaml:1", "trainer.overfit_batches: is not supported"),
    case(LM, "trainer:\n  val_check_interval: 0\n", "", "bad.yaml:2", "trainer.val_check_interval: must be above 0"),
    case(LM, "", "--trainer.accumulate_grad_batches 0", "--trainer.accumulate_grad_batches", "must be above 0, got 0"),
    case(CLASSES, "", "--ckpt_path best", "", "best.ckpt does not exist (found: none); run fit first"),
    case(CLASSES, "", "--ckpt_path other.ckpt", "", "--ckpt_path other.ckpt: no such file"),
]
WRONG_YAML = [
    case(LM, "trainer:\n  max_steps: 3\n  max_steps: 4\n", "", "bad.yaml:3", "repeats the key of bad.yaml:2"),
    case(CLASSES, "model:\n  net:\n    init_args:\n      dropout: 0.1\n      widths: [8]\n      dropout: 0.2\n", "",
         "bad.yaml:6", "model.net.init_args.dropout: repeats the key of bad.yaml:4"),
    case(LM, CALLBACK + "Timer\n      init_args: {duration: x, duration: y}\n", "", "bad.yaml:4",
         "callbacks[0].init_args"),
    case(LM, "", "--trainer '{max_steps: 3, max_steps: 4}'", "--trainer", "trainer.max_steps: repeats the key"),
    case(LM, "model:\n  vocab_size: 3\n", "", "bad.yaml:2", "model.vocab_size: is taken from data.vocab_size"),
    case(LM, "data: {weights: ./nowhere}\n", "", "bad.yaml:1", "data.weights: is taken from model.weights and"),
    case(LM, "", "--model.vocab_size=3", "--model.vocab_size", "is taken from data.vocab_size"),
    case(CLASSES, "", "--model='{class_names: [a]}'", "--model", "model.class_names: is taken from"),
    case(LM, "trainer:\n  max_steps: [3\n", "", "bad.yaml:3", "not valid YAML"),
    case(LM, "trainer:\n\tmax_steps: 3\n", "", "bad.yaml:2", "not valid YAML: found character '\\t'"),
    case(LM, "trainer: !!python/object/apply:os.system [touch executed]\n", "", "bad.yaml:1", "not valid YAML"),
    case(LM, "trainer:\n  max_steps:3\n", "", "bad.yaml:1", "trainer: holds no keys"),
    case(LM, "- trainer\n", "", "bad.yaml:1", "a config is a mapping"),
    case(LM, "# nothing\n", "", "bad.yaml:1", "a config is a mapping"),
    case(LM, "", "--config baad.yaml", "", "--config baad.yaml: no such file"),
    case(LM, "", "--config .", "", "--config .: is a folder"),
]
# fmt: on
CASES = [*WRONG_KEYS, *WRONG_TYPES, *WRONG_CLASSES, *WRONG_CHOICES, *WRONG_YAML]


@pytest.fixture
def earlier(work: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """The folder of a finished run, which no mistake may touch."""
    folder = work / "runs" / request.getfixturevalue("recipe") / "default"
    folder.mkdir(parents=True)
    (folder / "kept").write_text("weeks of work")
    yield folder
    assert not (work / "executed").exists()


@pytest.mark.parametrize(("recipe", "text", "flags", "where", "key", "hint"), halved(CASES))
def test_refused_before_anything_is_built(
    recipe: str, text: str, flags: list[str], where: str, key: str, hint: str | None,
    earlier: Path, fit_only: None, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if text:
        Path("bad.yaml").write_text(text)
        flags = ["--config", "bad.yaml", *flags]
    check(refused(recipe, ["fit", *flags], capfd), where, key, hint)
    assert contents(Path("runs")) == {f"{recipe}/default/kept": b"weeks of work"}
    assert os.listdir(f"runs/{recipe}") == ["default"]


# Data and runs


def write(files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())


def idx_files(labels: bytes = b"\0\1" * 20, **changed: bytes | None) -> dict[str, str | bytes]:
    """Images and labels like MNIST's; ``train_images`` and so on may be changed, or left out by None."""
    images = struct.pack(">IIII", 0x803, len(labels), 8, 8) + bytes(64 * len(labels))
    files = {"images-idx3-ubyte": images, "labels-idx1-ubyte": struct.pack(">II", 0x801, len(labels)) + labels}
    both = {f"files/{part}-{name}": content for part in ("train", "t10k") for name, content in files.items()}
    for name, content in changed.items():
        both[next(file for file in both if file.startswith(f"files/{name.replace('_', '-')}"))] = content  # type: ignore[assignment]
    return {name: content for name, content in both.items() if content is not None}


CSV = "text,label\n" + "".join(f"word {n},{'ab'[n % 2]}\n" for n in range(40))
IMAGES = idx_files()["files/train-images-idx3-ubyte"]
assert isinstance(IMAGES, bytes)


def built(recipe: str, files: dict[str, str | bytes], flags: str, where: str, key: str, hint: str | None = None) -> Any:
    """Files that are there, flags, and the line, as in :func:`case`."""
    return pytest.param(recipe, files, shlex.split(flags), where, key, hint, id=f"{recipe} {where} {key}")


# fmt: off
WRONG_NUMBERS = [
    built(LM, {}, "--data.batch_size 0", "--data.batch_size", "must be at least 1, got 0"),
    built(LM, {}, "--data.eval_batch_size 0", "--data.eval_batch_size", "must be at least 1, got 0"),
    built(LM, {}, "--data.context 0", "--data.context", "must be at least 1, got 0"),
    built(LM, {}, "--data.context 100000", "--data.context", "100000 is too long for 54000 tokens"),
    built(LM, {}, "--data.val_fraction 1.5", "--data.val_fraction", "give a share between 0 and 1"),
    built(CLASSES, {}, "--data.val_fraction 0", "--data.val_fraction", "must be above 0"),
    built(LM, {}, "--model.l1=-1", "--model.l1", "must not be negative, got -1.0"),
    built(LM, {}, "--trainer.precision 16-mixed", "--trainer.precision", "16-mixed needs a GPU"),
    built(LM, {}, f"--config {STRATEGY}/fsdp2.yaml --trainer.precision 64-true", "--trainer.precision",
          "64-true does not go with this strategy; take one of 32-true"),
    built(LM, {}, "--model.sample_tokens=-1", "--model.sample_tokens", "-1 is negative"),
    built(LM, {}, "--model.temperature=-0.5", "--model.temperature", "-0.5 is negative"),
    built(CLASSES, {}, "--model.label_smoothing 1", "--model.label_smoothing", "must be in [0, 1), got 1.0"),
    built(LM, {}, "--trainer.max_steps=-5", "--trainer.max_steps", "must be a non-negative integer or -1"),
    built(LM, {}, "--trainer.devices 0", "--trainer.devices", "is not a valid input using cpu accelerator"),
    built(LM, {}, "--trainer.accelerator cpuu", "--trainer.accelerator", "no accelerator is named 'cpuu'", "cpu"),
    built(LM, {}, "--trainer.strategy=dpp", "--trainer.strategy", "no strategy is named 'dpp'", "ddp"),
    built(LM, {}, "--trainer.strategy pipeline", "--trainer.strategy",
          "no strategy is named 'pipeline'; take --config configs/strategy/pipeline.yaml"),
    built(LM, {}, f"{NET}.num_attention_heads 3", f"{NET}.num_attention_heads", "is not a multiple of the number of"),
    built(LM, {"bad.yaml": CALLBACK + "EarlyStopping\n      init_args: {monitor: val/loss, mode: mni}\n"},
         "--config bad.yaml", "bad.yaml:4", "trainer.callbacks[0].init_args.mode: `mode` can be min, max"),
    built(LM, {"bad.yaml": "media:\n  every_n_validations: -1\n"}, "--config bad.yaml", "bad.yaml:2",
          "media.every_n_validations: must be at least 0, got -1"),
    built(LM, {}, "--last.every_n_train_steps 0", "--last.every_n_train_steps", "must be at least 1, got 0"),
]
WRONG_DATA = [
    built(LM, {"book.txt": "x"}, "--data.path bok.txt", "--data.path", "bok.txt: no such file or folder", "book.txt"),
    built(LM, {"e.txt": ""}, "--data.path e.txt", "--data.path", "there is no text in it"),
    built(LM, {"e.txt": "abc"}, "--data.path e.txt", "--data.path", "3 tokens are too few"),
    built(LM, {"e.txt": b"caf\xe9 " * 99}, "--data.path e.txt", "--data.path", "not UTF-8 at byte 3"),
    built(LM, {"e.jsonl": '{"txt": "a"}\n'}, "--data.path e.jsonl", "--data.path", "no column 'text'", "txt"),
    built(LM, {"e.jsonl": '{"text": 3}\n'}, "--data.path e.jsonl", "--data.path", "line 1: 'text' holds 3"),
    built(LM, {"e.jsonl": '{"text": 3\n'}, "--data.path e.jsonl", "--data.path", "line 1 is no JSON"),
    built(LM, {"e.csv": "txt,b\nabc,d\n"}, "--data.path e.csv --data.column body", "--data.column",
         "no column 'body'; there are: txt, b"),
    built(LM, {"t.json": "{}"}, f"{TOKENIZER} common.sources.tokenizers.PretrainedTokenizer {TOKENIZER}.name t.json",
          f"{TOKENIZER}.name", "no fast tokenizer there"),
    built(LM, {}, f"{TOKENIZER} common.sources.tokenizers.BPE {TOKENIZER}.vocab_size 3", f"{TOKENIZER}.vocab_size",
          "at least 257"),
    built(CLASSES, {}, IDX, "--data.source.path", "no file train-images-idx3-ubyte[.gz] in files"),
    built(CLASSES, idx_files(t10k_labels=None), IDX, "--data.source.path", "no file t10k-labels-idx1-ubyte"),
    built(CLASSES, idx_files(t10k_images=IMAGES[:-5]), IDX, "--data.source.path", "t10k-images-idx3-ubyte is no IDX"),
    built(CLASSES, idx_files(b"\0\2" * 20), IDX, "--data.source.class_names", "label 2 of files has no name"),
    built(CLASSES, idx_files(b"\0" * 40), IDX, "--data.source.class_names", "class 'b' has 0 samples"),
    built(CLASSES, idx_files(train_labels=struct.pack(">II", 0x801, 2) + b"\0\1"), IDX, "--data.source.path",
         "do not belong together"),
    built(CLASSES, idx_files(train_images=None) | {"files/train-images-idx3-ubyte.gz": gzip.compress(IMAGES)[:-9]}, IDX,
         "--data.source.path", "train-images-idx3-ubyte.gz is cut short"),
    built(CLASSES, {"tabel.csv": CSV}, TABLE, "--data.source.path", "table.csv: no such file", "tabel.csv"),
    built(CLASSES, {"table.csv": CSV}, f"{TABLE} --data.source.text txt", "--data.source.text", "no such column",
         "text"),
    built(CLASSES, {"table.csv": CSV}, f"{TABLE} --data.source.label labl", "--data.source.label", "no such", "label"),
    built(CLASSES, {"table.csv": CSV + "odd,\n"}, TABLE, "--data.source", "1 of 41 labels are missing"),
    built(CLASSES, {"table.csv": ""}, TABLE, "--data.source.path", "table.csv: cannot be read"),
]
# fmt: on


def small(recipe: str, request: pytest.FixtureRequest) -> list[str]:
    return [*TINY, *(request.getfixturevalue("lm_args") if recipe == LM else []), "--trainer.accelerator", "cpu"]


@pytest.mark.parametrize(("recipe", "files", "flags", "where", "key", "hint"), [*WRONG_NUMBERS, *WRONG_DATA])
def test_refused_before_the_run_starts(
    recipe: str, files: dict[str, str | bytes], flags: list[str], where: str, key: str, hint: str | None,
    earlier: Path, fit_only: None, request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    write(files)
    check(refused(recipe, ["fit", *small(recipe, request), *flags], capfd), where, key, hint)
    assert contents(Path("runs")) == {f"{recipe}/default/kept": b"weeks of work"}
    assert os.listdir(f"runs/{recipe}") == ["default"]


TABLE_ROWS = "rooms,area,price\n" + "1,2.5,3\n" * 20
REVIEWS = "text,label\n" + "a thing that one may well see,a\n" * 20
PHOTOS: dict[str, str | bytes] = {"photos/1.png": b"", "photos/2.png": b""}
CLASSIFY, TABLES, WORDS = (f"python {ROOT}/recipes/{name}/train.py fit" for name in (CLASSES, "regression", LM))
IMAGE, ROWS = "--data.source common.sources.ImageTable", "--data.source Table"
# fmt: off
READERS = [  # files, flags, and the whole line
    (CLASSES, PHOTOS, "--data.source.path photos",
     f"--data.source.path: photos holds images; give {IMAGE} --data.source.path photos"),
    (CLASSES, PHOTOS, "photos", f"command line: photos holds images; give {IMAGE} --data.source.path photos"),
    (CLASSES, PHOTOS, "--data.source.path phots",
     "--data.source.path: phots: no such file or folder; did you mean 'photos'?"),
    (CLASSES, {}, "--data.source.path me/photos",
     "--data.source.path: me/photos: no such file or folder; for a hub name give --data.source too, one of "),
    (CLASSES, {"reviews.csv": REVIEWS}, "--data reviews.csv",
     f"--data: reviews.csv holds text in a table; give --config {ROOT}/recipes/classification/text.yaml "
     "--data.source.path reviews.csv"),
    (CLASSES, {"files/train-images-idx3-ubyte": b""}, "--data.source files",
     "--data.source: files holds images in IDX files; give --data.source common.sources.IDX --data.source.path files "
     "--data.source.class_names CLASS_NAMES"),
    (CLASSES, {"book.txt": "words"}, "--data.source.path book.txt",
     f"--data.source.path: book.txt holds text; another recipe takes it: {WORDS} --data.path book.txt"),
    (LM, {"book.txt": "words"}, "--data.source.path book.txt", "--data.source.path: give --data.path book.txt"),
    (LM, PHOTOS, "--data.path photos",
     f"--data.path: photos holds images; another recipe takes it: {CLASSIFY} --data.source.path photos"),
    ("regression", {"house.csv": TABLE_ROWS}, "--path house.csv",
     f"--path: house.csv holds a table; give {ROWS} --data.source.path house.csv --data.source.target COLUMN"),
    ("multitask", {"house.csv": TABLE_ROWS}, "--data.source.path house.csv",
     f"--data.source.path: house.csv holds a table; another recipe takes it: {TABLES} --data.source.path house.csv"),
    (CLASSES, {}, "--data.source common.sources.TextTable --data.source.path table.csv",
     "--data.source: common.sources.TextTable needs tokenizer; give --data.source.tokenizer"),
]
# What a line says next where a first try is wrong.
NEXT = [
    (CLASSES, "--lr 0.1", "--lr: no such key; did you mean 'model.optimizer.lr'?"),
    (CLASSES, "--batch-size 3", "--batch-size: no such key; did you mean 'data.batch_size'?"),
    (LM, "--trainer.gpus 1", "--trainer.gpus: no such key; did you mean 'trainer.devices'?"),
    (CLASSES, "--zzzz 1", "--zzzz: no such key; --help lists them"),
    (LM, "--config tiny", f"--config tiny: no such file; there is {ROOT}/configs/tiny.yaml"),
    (CLASSES, "--model.net.widths 4,5", "--model.net.widths: expected list, got '4,5'; write [4,5]"),
    (CLASSES, "--data.keep [a", "--data.keep: expected list or null, got '[a'"),
    (CLASSES, "--model.net timm.models.ResNet",
     "--model.net: timm is not installed; add its folder to PYTHONPATH, or, if you trust it, pip install timm"),
    (LM, "--monitor", "--monitor: needs a value"),
]
# fmt: on


@pytest.mark.parametrize(("recipe", "files", "flags", "line"), [*READERS, *((r, {}, f, line) for r, f, line in NEXT)])
def test_a_line_says_the_next_command(
    recipe: str, files: dict[str, str | bytes], flags: str, line: str,
    work: Path, fit_only: None, request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    write(files)
    assert refused(recipe, ["fit", *shlex.split(flags)], capfd).startswith(line)


@pytest.mark.parametrize(
    ("rows", "recipe", "flags", "line"),
    [
        (REVIEWS, CLASSES, "--data.source.path data.parquet", "holds text in a table; give --config"),
        (TABLE_ROWS, "regression", "--data.path data.parquet", "holds a table; give --data.source Table"),
    ],
)
def test_parquet_is_looked_into(
    rows: str, recipe: str, flags: str, line: str, work: Path, fit_only: None, capfd: pytest.CaptureFixture[str]
) -> None:
    import pandas

    pandas.read_csv(io.StringIO(rows)).to_parquet("data.parquet")
    assert line in refused(recipe, ["fit", *flags.split()], capfd)


def test_looking_into_data_hides_no_mistake(work: Path, fit_only: None, capfd: pytest.CaptureFixture[str]) -> None:
    import pandas

    Path("lists.jsonl").write_text("[1, 2]\n[3, 4]\n")
    pandas.DataFrame({"a": []}).to_parquet("empty.parquet")
    long = "x" * 300
    for recipe, args, start in (
        (CLASSES, ["--data.source", "lists.jsonl"], "--data.source: "),
        (CLASSES, ["--data.source", "empty.parquet"], "--data.source: "),
        (CLASSES, ["--data.source.path", "~nobody_here/x"], "--data.source.path: "),
        (CLASSES, [long], "command line: "),
        (CLASSES, ["--config", long], "--config "),
        (CLASSES, ["--ckpt_path", long], "--ckpt_path "),
        (CLASSES, ["--init_from", "~nobody_here/x"], "--init_from ~nobody_here/x: no run"),
    ):
        assert refused(recipe, ["fit", *args], capfd).startswith(start)


def test_a_bare_value_is_a_list_of_one(work: Path, fit_only: None, capfd: pytest.CaptureFixture[str]) -> None:
    """In flags and files, for words, numbers and classes; a text with commas or spaces stays one."""
    Path("name").write_text("a file is not read")
    Path("layer.yaml").write_text("data:\n  keep: name\nmodel:\n  net:\n    init_args: {widths: 4}\n")
    flip = "kornia.augmentation.RandomHorizontalFlip"
    for recipe, args, found in (
        (CLASSES, ["--data.keep", "a, b "], {"keep": ["a, b "]}),
        (CLASSES, ["--data.keep", "[a, b]"], {"keep": ["a", "b"]}),
        (CLASSES, ["--config", "layer.yaml"], {"keep": ["name"], "widths": [4]}),
        (CLASSES, ["--model.net.widths", "8", "--model.augmentation", flip], {"widths": [8], "augmentation": [flip]}),
        (CLASSES, ["--trainer.devices", "2"], {"devices": "2"}),  # as before: a number, not the list of one GPU
        (LM, ["--data.prompts", "def "], {"prompts": ["def "]}),
        (LM, ["--data.prompts", "3"], {"prompts": ["3"]}),
        *((LM, ["--data.prompts", text], {"prompts": [text]}) for text in ("- x", "# Title", "Question: who?", "yes")),
    ):
        capfd.readouterr()
        with pytest.raises(SystemExit):
            main_of(recipe)(["fit", *args, "--print_config"])
        config = yaml.safe_load(capfd.readouterr().out)
        net = config["model"].get("net", {}).get("init_args", {})
        augmentation = [each["class_path"] for each in config["model"].get("augmentation") or ()]
        everything = config["data"] | config["trainer"] | net | {"augmentation": augmentation}
        assert {key: everything[key] for key in found} == found, args
    another = jsonargparse.ArgumentParser(exit_on_error=False)
    another.add_argument("--words", type=list[str])
    with pytest.raises(jsonargparse.ArgumentError):  # of somebody else, and as it was
        another.parse_args(["--words", "a"])


MONITOR = CALLBACK + "{}\n      init_args: {{monitor: val/los}}\n"
# fmt: off
WRONG_RUNS = [
    built(LM, {}, "--model.float8 true", "--model.float8", "needs a GPU with float8"),
    built(CLASSES, {}, "--model.compile true", "--model.compile", "ConvNet names no blocks"),
    built(CLASSES, {}, "--model.activation_checkpointing true", "--model.activation_checkpointing", "names no blocks"),
    built(LM, {}, f"--config {STRATEGY}/fsdp.yaml --trainer.precision bf16-mixed", "--trainer.precision",
          "under FSDP1 needs a GPU"),
    built(LM, {}, f"--config {STRATEGY}/fsdp.yaml --trainer.strategy.cpu_offload true",
          "--trainer.strategy.cpu_offload", "takes parameters out of a GPU's memory; take false on a CPU"),
    built(LM, {}, f"--config {STRATEGY}/fsdp2.yaml --trainer.strategy.cpu_offload true",
          "--trainer.strategy.cpu_offload", "takes parameters out of a GPU's memory; take false on a CPU"),
    built(LM, {}, "--data.batch_size 100000", "--data.batch_size", "> 1687 training samples; lower it"),
    built(CLASSES, {}, "--data.batch_size 100000", "--data.batch_size", "> 1257 training samples; lower it"),
    built(LM, {}, f"{SCHEDULE}.warmup 500", f"{SCHEDULE}.warmup", "500 does not fit into 4 steps"),
    built(LM, {}, f"{OPTIMIZER}.lr=-1", f"{OPTIMIZER}.lr", "Invalid learning rate: -1.0"),
    built(LM, {}, f"{OPTIMIZER} torch.optim.LBFGS", OPTIMIZER, "LBFGS doesn't support per-parameter options"),
    built(LM, {}, f"{OPTIMIZER} torch.optim.Muon", OPTIMIZER, "common.optim.MuonAdamW"),
    built(LM, {}, f"{SCHEDULE} torch.optim.lr_scheduler.OneCycleLR {SCHEDULE}.max_lr 1", f"{SCHEDULE}.max_lr",
         "total_steps"),
    built(LM, {}, f"{NET}.hidden_act gelux", f"{NET}.hidden_act", "'gelux'"),
    built(CLASSES, {}, "--model.net torch.nn.Identity", "", "model: every parameter is frozen"),
    built(LM, {"bad.yaml": MONITOR.format("EarlyStopping")}, "--config bad.yaml", "bad.yaml:4",
         "trainer.callbacks[0].init_args.monitor: EarlyStopping monitors 'val/los'", "val/loss"),
    built(CLASSES, {}, "--monitor val/f", "--monitor", "'val/f' is not logged", "val/f1"),
    built("adversarial", {}, "--monitor val/accuracy --best.mode min", "--best.mode",
          "val/accuracy is best where it is largest; set it"),
    *(built(CLASSES, {}, f"--monitor step{more}", "", "best.mode: nothing says whether a small or a large step is the")
      for more in ("", " --trainer.num_sanity_val_steps 0")),
    built(CLASSES, {"bad.yaml": MONITOR.format("EarlyStopping").replace("los", "auroc")}, "--config bad.yaml",
         "bad.yaml:2", "trainer.callbacks: EarlyStopping: val/auroc is best where it is largest; set its mode to"),
    built(CLASSES, {}, "--trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor val/f1 "
          "--trainer.callbacks.patience 2", "--trainer.callbacks", "EarlyStopping: val/f1 is best where it is largest"),
    built(CLASSES, {}, "--monitor step --best.mode max --trainer.callbacks+=EarlyStopping "
          "--trainer.callbacks.monitor step", "--trainer.callbacks", "EarlyStopping: step is best where it is largest"),
    built(CLASSES, {"bad.yaml": MONITOR.format("ModelCheckpoint")}, "--config bad.yaml", "bad.yaml:4",
         "trainer.callbacks[0].init_args.monitor: ModelCheckpoint monitors 'val/los'", "val/loss"),
]
# fmt: on


@pytest.mark.parametrize(("recipe", "files", "flags", "where", "key", "hint"), halved(WRONG_RUNS))
def test_refused_when_the_run_starts(
    recipe: str, files: dict[str, str | bytes], flags: list[str], where: str, key: str, hint: str | None,
    earlier: Path, fit_only: None, request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """What only shows when net, optimizer and loaders are there: the earlier run was moved aside, and is put back."""
    write(files)
    check(refused(recipe, ["fit", *small(recipe, request), *flags], capfd), where, key, hint)
    assert contents(earlier) == {"kept": b"weeks of work"}
    assert list(earlier.parent.iterdir()) == [earlier]


# Checkpoints


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, lm_args: list[str]) -> Path:
    """A working directory with a finished run of the lm recipe."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main_of(LM)(["fit", *TINY, *lm_args, "--trainer.accelerator", "cpu"])
    return folder


@pytest.fixture
def resumable(trained: Path, work: Path) -> Iterator[Path]:
    """A copy of that run, whose folder must stay where a mistake finds it."""
    shutil.copytree(trained / "runs", work / "runs")
    run = work / "runs/lm/default"
    yield run
    assert os.listdir(work / "runs/lm") == ["default"]
    assert not (work / "executed").exists()


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


def damage(path: Path, kind: str) -> None:
    if kind == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("no archive")
    elif kind == "evil":
        torch.save({"state_dict": {}, "object": Evil()}, path)
    else:
        torch.save({"weight": torch.zeros(2)}, path)


@pytest.mark.parametrize(
    ("command", "kind", "problem"),
    [
        ("fit", "cut", "cut short, damaged or no checkpoint"),
        ("test", "empty", "cut short, damaged or no checkpoint"),
        ("predict", "text", "cut short, damaged or no checkpoint"),
        ("fit", "evil", "holds objects, not only weights"),
        ("test", "evil", "holds objects, not only weights"),
        ("fit", "weights", "no checkpoint of a run"),
    ],
)
def test_damaged_checkpoint(
    command: str, kind: str, problem: str, resumable: Path, lm_args: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    last = resumable / "checkpoints/last.ckpt"
    damage(last, kind)
    before = contents(resumable)
    line = refused(LM, [command, *TINY, *lm_args, "--ckpt_path", "last"], capfd)
    assert "last.ckpt: " in line
    assert problem in line
    assert before.items() <= contents(resumable).items()


def test_where_there_is_no_best_checkpoint_the_last_is_named(
    resumable: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A net without training would be tested otherwise."""
    (resumable / "checkpoints/best.ckpt").unlink(missing_ok=True)
    shutil.copy(resumable / "checkpoints/last.ckpt", resumable / "checkpoints/an-earlier.ckpt")
    for command in ("test", "export"):
        line = refused(LM, [command, "--trainer.accelerator", "cpu"], capfd)
        assert line.endswith("best.ckpt does not exist (found: an-earlier, last); --ckpt_path an-earlier is the newest")


TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
SRUN = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_NAME": "train"}
SRUN |= {"SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize("launcher", [TORCHRUN, SRUN], ids=["torchrun", "srun"])
@pytest.mark.parametrize("layer", ["--trainer.strategy=auto", f"--config={ROOT / 'configs/strategy/ddp.yaml'}"])
def test_launchers_need_a_strategy_and_devices(
    launcher: dict[str, str], layer: str, work: Path, lm_args: list[str], monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Their processes would each train a net of their own otherwise, or end in a traceback."""
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    line = refused(LM, ["fit", layer, *TINY, *lm_args, "--trainer.accelerator", "cpu"], capfd)
    assert line.startswith("trainer.devices: 2 processes were started, and this config trains with 1; give ")
    assert not Path("runs").exists()


def test_checkpoint_of_another_recipe(resumable: Path, lm_args: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    before, checkpoint = contents(resumable), resumable / "checkpoints/last.ckpt"
    for path in (checkpoint, shutil.copy(checkpoint, "alone.ckpt")):
        line = refused(CLASSES, ["fit", *TINY, "--ckpt_path", str(path)], capfd)
        assert "--ckpt_path: its config is not one of classification (" in line
    assert before == contents(resumable)
    assert not Path("runs/classification").exists()


def test_checkpoint_of_another_shape(resumable: Path, lm_args: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    before, wider = contents(resumable), ["--ckpt_path", "last", f"{NET}.hidden_size", "64"]
    for command in ("fit", "test"):
        more = ["--trainer.max_steps", "6"] if command == "fit" else []
        line = refused(LM, [command, *TINY, *lm_args, *wider, *more], capfd)
        assert line.startswith("--ckpt_path: does not fit")
        assert "size mismatch for net.model." in line
    assert before.items() <= contents(resumable).items()
    main_of(LM)(["test", "--trainer.limit_test_batches", "1", "--trainer.accelerator", "cpu"])


def test_a_refused_start_from_another_run_puts_the_earlier_one_back(
    resumable: Path, lm_args: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    """The counter of steps has been restored when training turns out to be impossible."""
    before, other = contents(resumable), Path("runs/lm/other")
    shutil.copytree(resumable, other)
    args = ["--ckpt_path", str(other / "checkpoints/last.ckpt"), "--name", "default", "--trainer.max_steps", "6"]
    wrong = ["--trainer.accumulate_grad_batches", "2", "--trainer.val_check_interval", "3"]
    line = refused(LM, ["fit", *args, *wrong], capfd)
    assert "trainer.val_check_interval: 3 micro-batches are no multiple" in line
    shutil.rmtree(other)
    assert contents(resumable) == before


@pytest.mark.matrix
def test_a_copy_needs_a_name_that_python_can_import(work: Path) -> None:
    folder = Path(shutil.copytree(ROOT / "recipes/regression", work / "my-table"))
    command = [sys.executable, "-W", "ignore", str(folder / "train.py"), "fit"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "'my-table' cannot be the name of a Python package; take letters" in done.stderr


def test_a_number_alone_names_no_key(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The message of a constructor starts with its argument; other keys may have the same number."""
    Path("layer.yaml").write_text("trainer: {max_steps: -1}\nmodel: {attack: {init_args: {eps: -1.0}}}\n")
    line = refused("adversarial", ["fit", "--config", "layer.yaml"], capfd)
    assert line.startswith("layer.yaml:2: model.attack.init_args.eps: eps must be a number of at least 0")
    Path("layer.yaml").write_text("model:\n  eval_attack: null\n")
    line = refused("adversarial", ["fit", "--config", "layer.yaml"], capfd)
    assert line == "layer.yaml:2: model.eval_attack: is null; it needs a value"


def test_flags_may_be_for_a_class_of_the_run(work: Path, lm_args: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    sgd = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.1"]
    main_of(LM)(["fit", *TINY, *lm_args, *sgd, "--trainer.max_steps", "2", "--trainer.accelerator", "cpu"])
    more = ["fit", "--ckpt_path", "last", "--model.optimizer.nesterov", "false", "--trainer.max_steps", "3"]
    assert main_of(LM)(more).trainer.global_step == 3
    anew = ["fit", "--ckpt_path", "null", *TINY, *lm_args, *sgd, "--trainer.max_steps", "1"]
    assert main_of(LM)(anew).trainer.global_step == 1  # flags count where no checkpoint is found either
    line = refused(LM, [*more[:3], "--model.optimizer.fooeach", "true"], capfd)
    assert "--model.optimizer.fooeach" in line
    assert "foreach" in line


def test_missing_checkpoint_names_those_found(
    resumable: Path, lm_args: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    (resumable / "checkpoints/best.ckpt").unlink()
    line = refused(LM, ["test", *TINY, *lm_args, "--ckpt_path", "best"], capfd)
    assert line.startswith("--ckpt_path best: ")
    assert "(found: last)" in line


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ("[]", "at least one text is needed, and each must be a text; try '[\"def \"]'"),
        ("['']", "none may be empty, as number 0 is, counted from 0"),
    ],
)
def test_empty_prompts(
    prompts: str, said: str, resumable: Path, lm_args: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ["--ckpt_path", "last", "--data.prompts", prompts]
    line = refused(LM, ["predict", *TINY, *lm_args, *flags], capfd)
    assert line == f"--data.prompts: {said}"


def test_run_folder_that_cannot_be_made(
    work: Path, request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]
) -> None:
    for place in ("runs", "out/runs"):
        Path(place).parent.mkdir(exist_ok=True)
        Path(place).write_text("a file")
        flags = ["test", "--ckpt_path", "null", "--trainer.default_root_dir", "out"] if "out" in place else ["fit"]
        line = refused(CLASSES, [*flags, *small(CLASSES, request)], capfd)
        assert "trainer.default_root_dir: cannot make the run's folder (Not a directory: " in line
        assert Path(place).read_text() == "a file"


def test_loss_that_is_not_finite(work: Path, request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]) -> None:
    """The line names step and value, and the checkpoint from before still loads."""
    each = (
        CALLBACK + "ModelCheckpoint\n      init_args: {dirpath: checkpoints, filename: each, every_n_train_steps: 1}\n"
    )
    Path("each.yaml").write_text(each)
    flags = ["--config", "each.yaml", OPTIMIZER, "torch.optim.SGD", f"{OPTIMIZER}.lr", "1e30", SCHEDULE, "null"]
    line = refused(CLASSES, ["fit", *small(CLASSES, request), *flags], capfd)
    check(line, f"{OPTIMIZER}.lr", "train/loss is nan at step 1: lower model.optimizer.lr", None)
    checkpoint = read_checkpoint("runs/classification/default/checkpoints/each.ckpt")
    assert checkpoint["global_step"] == 1
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


# Other commands, bugs, and the rate of right suggestions


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["ft"], "'ft' is no command; did you mean 'fit'?"),
        ([], "the command is missing; give one of fit, validate, test, predict, preflight, export"),
        (
            ["--trainer.max_steps", "3"],
            "the command is missing; give one of fit, validate, test, predict, preflight, export",
        ),
        (["validate", "--trainer.max_step=3"], "--trainer.max_step: no such key; did you mean 'trainer.max_steps'?"),
        (["predict", "--ckpt_pth", "best"], "--ckpt_pth: no such key; did you mean 'ckpt_path'?"),
        (
            ["--config", "fit.yaml", "fit"],
            "fit.yaml:3: trainer.max_step: no such key; did you mean 'trainer.max_steps'?",
        ),
        (
            ["--config", "top.yaml", "fit"],
            "top.yaml:2: trainer.max_steps: is a key of fit; give this --config after the command",
        ),
    ],
)
def test_command_line(args: list[str], line: str, work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("fit.yaml").write_text("fit:\n  trainer:\n    max_step: 3\n")
    Path("top.yaml").write_text("trainer:\n  max_steps: 3\n")
    assert refused(LM, args, capfd) == line


def test_places_in_the_configs_that_every_command_loads() -> None:
    shared, own = ROOT / "configs/defaults.yaml", ROOT / "recipes/lm/config.yaml"
    for path, key in ((shared, "best.monitor"), (own, "last.every_n_train_steps"), (shared, "trainer.logger")):
        start = f"  {key.split('.')[1]}:" if key == "trainer.logger" else f"{key.split('.')[0]}:"
        number = next(n for n, line in enumerate(path.read_text().splitlines(), 1) if line.startswith(start))
        assert locate([], [shared, own], key, [], []) == (f"{path}:{number}", key)


def test_long_lines_keep_their_suggestion(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = Path("x" * 100, "y" * 120)
    folder.mkdir(parents=True)
    (folder / "bad.yaml").write_text("model:\n  optimizer:\n    init_args:\n      weight_deca: 3\n")
    line = refused(LM, ["fit", "--config", str(folder / "bad.yaml")], capfd)
    assert len(line) == 240
    assert line.endswith("…; did you mean 'weight_decay'?")


BROKEN = """
import torch

class Broken(torch.nn.Linear):
    def __init__(self, num_classes: int):
        super().__init__(64, num_classes)

    def forward(self, pixel_values):
        raise RuntimeError("a bug of mine")
"""


TRAIN = [
    sys.executable, str(ROOT / "recipes/classification/train.py"), "fit", *TINY, "--trainer.accelerator", "cpu",
]  # fmt: skip


def test_ranks_say_the_same_mistake_once(work: Path) -> None:
    """Of the ranks that Lightning starts the others end with the first one, which finds it as they do."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    for flags, line in (
        (["pipeline.yaml", "--trainer.strategy.stages", "3"], "--trainer.strategy.stages: 3 is no divisor of 2 ranks"),
        (["ddp.yaml", "--model.optimizer.lr=-1"], "--model.optimizer.lr: Invalid learning rate: -1.0"),
    ):
        command = [*TRAIN, "--trainer.devices", "2", "--config", f"{ROOT}/configs/strategy/{flags[0]}", *flags[1:]]
        # Returns when nobody holds the pipes any more.
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 2
        (said,) = done.stderr.splitlines()
        assert said.startswith(line)


def test_a_run_that_is_beyond_its_last_step(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    main = main_of("classification")
    main(["fit", *TINY, "--trainer.max_steps", "4"])
    main(["fit", *TINY, "--trainer.max_steps", "4", "--ckpt_path", "last"])  # nothing is left to do
    before = contents(work / "runs/classification/default")
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["fit", *TINY, "--trainer.max_steps", "3", "--ckpt_path", "last"])
    assert stop.value.code == 2
    assert capfd.readouterr().err == "--trainer.max_steps: 3 is below the 4 of --ckpt_path; raise it\n"
    assert contents(work / "runs/classification/default") == before


def test_a_package_that_is_not_installed(
    work: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECIPES_ALLOW", "my_optimizers")
    with pytest.raises(SystemExit) as stop:
        main_of("classification")(["fit", "--model.optimizer", "my_optimizers.Prodigy"])
    assert stop.value.code == 2
    line = "--model.optimizer: my_optimizers is not installed; run pip install my_optimizers"
    assert capfd.readouterr().err == f"{line}\n"


def test_bugs_keep_their_traceback(work: Path) -> None:
    """In processes of their own: a mistake on stderr as a line, the same with --debug, and a bug in somebody's net."""
    Path("mine.py").write_text(BROKEN)
    monitor = CALLBACK + "EarlyStopping\n      init_args: {monitor: val/los}\n"
    Path("bad.yaml").write_text(monitor)
    env = os.environ | {"PYTHONPATH": ".", "RECIPES_ALLOW": "mine", "OMP_NUM_THREADS": "1"}
    commands = [
        [*TRAIN, "--config", "bad.yaml", "--name", "mistake"],
        [*TRAIN, "--data.batchsize", "3", "--debug"],
        [*TRAIN, "--model.net", "mine.Broken", "--name", "bug"],
    ]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    processes = [subprocess.Popen(command, **pipe) for command in commands]  # type: ignore[call-overload]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 1, 1], errors
    line = "trainer.callbacks[0].init_args.monitor: EarlyStopping monitors 'val/los', which is not logged"
    assert errors[0] == f"bad.yaml:4: {line}; did you mean 'val/loss'?\n"
    assert "Traceback (most recent call last)" in errors[1]
    assert "unrecognized arguments: --data.batchsize" in errors[1]
    assert "Traceback (most recent call last)" in errors[2]
    assert "mine.py" in errors[2]
    assert errors[2].rstrip().endswith("RuntimeError: a bug of mine")


class Places(torch.nn.Module):
    """Adds an embedding of tokens to one of four places."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = torch.nn.Embedding(9, 2), torch.nn.Embedding(4, 2)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.words(input_ids) + self.places(torch.arange(input_ids.shape[1]))


@pytest.mark.parametrize(("ids", "told"), [([[8, 9]], True), ([[8, 8, 8, 8, 8]], False), ([[8, -1]], False)])
def test_only_unknown_tokens_blame_the_tokenizer(ids: list[list[int]], told: bool) -> None:
    with pytest.raises(IndexError) as error:
        Places()(torch.tensor(ids))
    assert _is_unknown_token(error.value) == told


def mistype(word: str, dice: random.Random) -> str:
    """A word with one slip of the hand: a letter left out, doubled, wrong, or swapped with the next."""
    at = dice.randrange(1, len(word) - 1)
    before, here, after = word[:at], word[at], word[at + 1 :]
    slips = [before + after, before + here + here + after, before + dice.choice("aeionrst") + after]
    return dice.choice([*slips, before + after[:1] + here + after[1:]])


def arguments(recipe: str, capfd: pytest.CaptureFixture[str]) -> list[str]:
    """All arguments of a recipe's default config, in full."""
    capfd.readouterr()
    with pytest.raises(SystemExit):
        main_of(recipe)(["fit", "--print_config"])

    def below(node: Any, prefix: str) -> Iterator[str]:
        for key, value in node.items():
            yield f"{prefix}{key}"
            if isinstance(value, dict):
                yield from below(value, f"{prefix}{key}.")

    config = yaml.safe_load(capfd.readouterr().out)
    names = [name for group in ("trainer", "model", "data") for name in below(config[group], f"{group}.")]
    return [name for name in names if len(name.rpartition(".")[2]) > 3 and "class_path" not in name]


def test_typos_get_the_right_suggestion(
    work: Path, fit_only: None, capfd: pytest.CaptureFixture[str], record_property: Callable[[str, object], None]
) -> None:
    """One slip in the last part of a key, half of them in flags and half in a file; the goal is 95 %."""
    dice, wrong, count = random.Random(0), [], 40
    keys = {recipe: arguments(recipe, capfd) for recipe in (LM, CLASSES)}
    for number in range(count):
        recipe = (LM, CLASSES)[number % 2]
        key = dice.choice(keys[recipe])
        group, _, name = key.rpartition(".")
        while (typo := mistype(name, dice)) == name or f"{group}.{typo}" in keys[recipe]:
            pass
        if number % 4 < 2:
            args = [f"--{group}.{typo}=1"]
        else:
            nested: Any = {typo: 1}
            for part in reversed(group.split(".")):
                nested = {part: nested}
            Path("typo.yaml").write_text(yaml.safe_dump(nested))
            args = ["--config", "typo.yaml"]
        line = refused(recipe, ["fit", *args], capfd)
        hint = re.search(r"did you mean '(?:[^']*\.)?(\w+)'", line)
        if not hint or hint[1] != name:
            wrong.append((key, line))
    record_property("summary", f"typos: {count - len(wrong)} of {count} got the right suggestion")
    assert len(wrong) <= 0.05 * count, wrong


@pytest.mark.parametrize("recipe", MEASURED)
def test_every_recipe_is_given_mistakes(recipe: str) -> None:
    """Those of the first recipes are here, those of another in the file of its own tests."""
    mistakes = [case for case in (*CASES, *WRONG_NUMBERS, *WRONG_DATA, *WRONG_RUNS) if case.values[0] == recipe]
    if importlib.util.find_spec(f"tests.test_{recipe}"):
        mistakes += importlib.import_module(f"tests.test_{recipe}").MISTAKES
    assert len(mistakes) >= 15


def test_a_mistyped_name_is_no_untrained_net(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    main = main_of("classification")
    problem = "no run of this name has a checkpoint (--ckpt_path null takes the net as it is made)"
    assert refused("classification", ["test"], capfd) == f"--name default: {problem}; run fit first"
    main(["fit", *TINY])
    capfd.readouterr()
    for command in ("test", "validate", "predict", "export"):
        with pytest.raises(SystemExit) as stop:
            main([command, "--name", "defualt"])
        assert stop.value.code == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert line == f"--name defualt: {problem}; did you mean 'default'?"
    assert not (work / "runs/classification/defualt").exists()
    for name in ("fresh", "default"):  # also where there is a checkpoint
        main(["validate", "--name", name, "--ckpt_path", "null"])
        assert "validate: no checkpoint of" in capfd.readouterr().out


@pytest.mark.usefixtures("no_report")
def test_what_comes_from_a_run_is_found_in_its_config(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever command takes it over; the line names the flag that wins over it, or a checkpoint without a run."""
    Path("rows.csv").write_text("a,y\n" + "".join(f"{n % 7},{n}\n" for n in range(40)))
    table = ["--data.source", "common.sources.tables.Table", "--data.source.path", "rows.csv"]
    small = ["--config", str(ROOT / "recipes/regression/small.yaml"), *TINY, "--data.source.target", "y"]
    main_of("regression")(["fit", *table, *small])
    config = Path("runs/regression/default/config.yaml")
    text = config.read_text()
    places = {line.split(":")[0].strip(): f"{config}:{n}" for n, line in enumerate(text.splitlines(), 1)}
    Path("rows.csv").rename("gone.parquet")
    for command in (["test"], ["validate"], ["fit", "--ckpt_path", "last"]):
        line = refused("regression", command, capfd)
        assert line.startswith(f"{places['path']}: data.source.init_args.path: rows.csv: no such file"), line
    config.write_text(text.replace("  batch_size: 4\n", "  batch_size: 0\n"))
    wrong = "data.batch_size: must be at least 1, got"
    assert refused("regression", ["predict"], capfd) == f"{places['batch_size']}: {wrong} 0"
    assert refused("regression", ["predict", "--data.batch_size", "-3"], capfd) == f"--{wrong} -3"
    config.write_text(text.replace("  batch_size: 4\n", "  batch_size: many\n"))
    assert f"({places['batch_size']}: data.batch_size: expected int, got" in refused("regression", ["test"], capfd)
    shutil.copy("runs/regression/default/checkpoints/best.ckpt", "away.ckpt")
    line = refused("regression", ["test", "--name", "new", "--ckpt_path", "away.ckpt"], capfd)
    assert re.match(r"--ckpt_path \S*away\.ckpt: data\.source\.init_args\.path: rows\.csv: no such file", line), line
