"""A run goes on from any checkpoint as the uninterrupted run went on: to the bit, whatever ends it and validates when.

A run keeps a checkpoint at every hook where one can be made; a resumed run of each ends with the same weights,
optimizer, schedule, counters and states of callbacks, and writes the same rows of metrics from there on.
"""

import csv
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from common.checkpoint import read_checkpoint
from tests.support import ROOT, covering, logs, main_of, run_ranks

pytestmark = pytest.mark.usefixtures("no_report")

# Values of each setting; a cell is one of each. 9 micro-batches are an epoch, or 8 where 2 or 4 make a step.
ENDS = {
    "epochs": ["--trainer.max_epochs", "3"],
    "steps": ["--trainer.max_epochs", "-1", "--trainer.max_steps", "20"],
    "epochs_first": ["--trainer.max_epochs", "3", "--trainer.max_steps", "77"],
    "steps_first": ["--trainer.max_epochs", "30", "--trainer.max_steps", "13"],
    "steps_at_an_end": ["--trainer.max_epochs", "3", "--trainer.max_steps", "8"],
}
VALIDATES = {
    "each_epoch": [],
    "twice": ["--trainer.val_check_interval", "0.5"],
    "every_4": ["--trainer.val_check_interval", "4"],
    "across_epochs": ["--trainer.val_check_interval", "12", "--trainer.check_val_every_n_epoch", "null"],
    "every_2_epochs": ["--trainer.check_val_every_n_epoch", "2"],
    "never": ["--trainer.limit_val_batches", "0"],
}
ACCUMULATES = {
    "1": [],
    "2": ["--trainer.accumulate_grad_batches", "2"],
    "4": ["--trainer.accumulate_grad_batches", "4"],
}
LIMITS = {"all": [], "4_batches": ["--trainer.limit_train_batches", "4"]}
STOPPING = "lightning.pytorch.callbacks.EarlyStopping"
WATCHES = {
    "none": [],
    "early_stopping": ["--trainer.callbacks+", f"{STOPPING}", "--trainer.callbacks.monitor", "val/loss",
                       "--trainer.callbacks.patience", "1", "--trainer.callbacks.min_delta", "0.02"],
    "plateau": ["--model.lr_scheduler", "lightning.pytorch.cli.ReduceLROnPlateau",
                "--model.lr_scheduler.monitor", "val/loss", "--model.lr_scheduler.patience", "0",
                "--model.lr_scheduler.threshold", "0.02"],
}  # fmt: skip
RUNS = {"one": (1, 0), "workers": (1, 2), "ranks": (2, 0)}
CELLS = covering(ENDS, VALIDATES, ACCUMULATES, LIMITS, WATCHES, RUNS)  # any two values of two settings meet
HOLE = ("epochs_first", "each_epoch", "1", "all", "none", "one")  # trained an epoch fewer, under Lightning's own loop
FAST = [HOLE]  # tests/test_resume.py has other places


HOOKS = ("on_train_batch_end", "on_validation_end", "on_train_epoch_end")


class Draws(Callback):
    """Draws a number at each hook, with each kind of generator, and keeps what they add up to."""

    def __init__(self) -> None:
        self.total, self.count, self.epochs = 0.0, 0, 0

    def draw(self) -> None:
        self.total = self.total / 2 + random.random() + np.random.rand() + torch.rand(()).item()
        self.count += 1

    def on_train_epoch_start(self, *_: Any) -> None:
        self.draw()

    def on_train_epoch_end(self, *_: Any) -> None:
        self.draw()
        self.epochs += 1

    def on_train_batch_start(self, *_: Any) -> None:  # type: ignore[override]
        self.draw()

    def on_train_batch_end(self, *_: Any) -> None:  # type: ignore[override]
        self.draw()

    def on_validation_start(self, trainer: Any, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.draw()

    def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:  # type: ignore[override]
        if not trainer.sanity_checking:
            self.draw()

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "count": self.count, "epochs": self.epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.total, self.count, self.epochs = state_dict["total"], state_dict["count"], state_dict["epochs"]


def add_noise() -> None:
    """Let the data module change each batch on the device, as augmentations of one's own do."""
    from common.data import BaseDataModule

    def noisy(self: Any, batch: Any, dataloader_idx: int) -> Any:
        return batch._replace(numeric=batch.numeric + torch.rand_like(batch.numeric) / 10)

    BaseDataModule.on_after_batch_transfer = noisy  # type: ignore[method-assign]  # in a forked process only


def keep_all_main(args: list[str], folder: Path) -> None:
    """Train, with a checkpoint kept at every hook where one can be made."""
    from common.run.callbacks import LastCheckpoint

    for hook in HOOKS:
        made = getattr(LastCheckpoint, hook)

        def keep(self: Any, trainer: Any, module: Any, *rest: Any, hook: str = hook, made: Any = made) -> None:
            made(self, trainer, module, *rest)
            if trainer.state.fn == "fit" and not trainer.sanity_checking and module.ends_step:
                trainer.save_checkpoint(folder / f"{trainer.global_step:03d}-{hook}.ckpt", weights_only=False)

        setattr(LastCheckpoint, hook, keep)  # in this forked process only
    add_noise()
    main_of("regression")(args)


def resume_main(args: list[str], checkpoints: list[Path]) -> None:
    """Go on from each checkpoint, one after another."""
    add_noise()
    for checkpoint in checkpoints:
        main_of("regression")([*args, "--name", checkpoint.stem, "--ckpt_path", str(checkpoint)])


def state(path: Path) -> dict[str, Any]:
    """All that a checkpoint holds but where it lies."""
    kept = read_checkpoint(path)
    callbacks = {name: each for name, each in kept["callbacks"].items() if "BestCheckpoint" not in name}
    keys = "epoch", "global_step", "state_dict", "optimizer_states", "lr_schedulers", "losses"
    # How far the last validation has come, and the last metrics, are no part of where a run goes on.
    hidden = "epoch_loop.val_loop", "epoch_loop.state_dict"
    loops = {key: value for key, value in kept["loops"]["fit_loop"].items() if not key.startswith(hidden)}
    return {key: kept[key] for key in keys} | {"callbacks": callbacks, "loops": loops}


def differs(value: Any, other: Any, where: str = "") -> list[str]:
    """Where two states differ."""
    if isinstance(value, dict) and isinstance(other, dict):
        keys = sorted({*value, *other}, key=str)
        return [line for key in keys for line in differs(value.get(key), other.get(key), f"{where}/{key}")]
    if isinstance(value, list | tuple):
        if len(value) != len(other):
            return [where]
        return [
            line for i, pair in enumerate(zip(value, other, strict=True)) for line in differs(*pair, f"{where}/{i}")
        ]
    if isinstance(value, torch.Tensor):
        return [] if value.equal(other) else [where]
    return [] if value == other or (value != value and other != other) else [f"{where}: {value} {other}"]


def rows(run: Path) -> list[dict[str, str]]:
    """What a run has logged, without speeds."""
    with (run / "metrics.csv").open(newline="") as file:
        kept = [{k: v for k, v in row.items() if v and not k.startswith("perf/")} for row in csv.DictReader(file)]
    return [row for row in kept if len(row) > 2]  # not only epoch and step


@pytest.mark.parametrize(
    ("ends", "validates", "accumulates", "limit", "watches", "runs"),
    [pytest.param(*cell, marks=[] if cell in FAST else pytest.mark.matrix) for cell in dict.fromkeys([HOLE, *CELLS])],
)
def test_goes_on_from_any_checkpoint(
    ends: str, validates: str, accumulates: str, limit: str, watches: str, runs: str,
    work: Path, record_property: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    world, workers = RUNS[runs]
    monkeypatch.setenv("RECIPES_ALLOW", "tests")
    net = {"class_path": "common.nets.tables.MLP", "init_args": {"d_block": 8, "n_blocks": 1}}
    args = [
        "fit", "--model.net", json.dumps(net), "--media.every_n_validations", "0",
        "--trainer.callbacks", "[]", "--trainer.callbacks+", "tests.test_goes_on.Draws", "--trainer.logger", "[]",
        "--trainer.log_every_n_steps", "3", "--trainer.enable_progress_bar", "false",
        "--trainer.enable_model_summary", "false", *ENDS[ends], *VALIDATES[validates], *ACCUMULATES[accumulates],
        *LIMITS[limit], *WATCHES[watches], "--data.num_workers", str(workers), "--data.batch_size", str(32 // world),
        "--trainer.accelerator", "cpu", "--trainer.devices", str(world),
    ]  # fmt: skip
    if world > 1:
        args += ["--config", str(ROOT / "configs/strategy/ddp.yaml")]
    kept = work / "kept"
    assert run_ranks(keep_all_main, args, kept, world=world, folder=work / "whole") == [0] * world, logs(work / "whole")
    whole = work / "runs/regression/default"
    # One in each third of the run, of each hook; in the last third the last, which a complete run ends with.
    hooks = [sorted(kept.glob(f"*-{hook}.ckpt")) for hook in HOOKS]
    places = {path for paths in hooks if paths for path in (*paths[:: -(-len(paths) // 3)], paths[-1])}
    checkpoints = sorted(places)
    record_property(
        "summary", f"{ends}, {validates}, {accumulates}, {limit}, {watches}, {runs}: {len(checkpoints)} equal"
    )
    codes = run_ranks(resume_main, args, checkpoints, world=world, folder=work / "resumed", timeout=600)
    assert codes == [0] * world, logs(work / "resumed")
    expected, all_rows = state(whole / "checkpoints/last.ckpt"), rows(whole)
    wrong = {}
    for checkpoint in checkpoints:
        run = work / "runs/regression" / checkpoint.stem
        last = run / "checkpoints/last.ckpt"
        if not last.exists():  # nothing was left to do
            assert read_checkpoint(checkpoint)["global_step"] == expected["global_step"]
            continue
        wrong[checkpoint.stem] = differs(expected, state(last))
        again = rows(run) if (run / "metrics.csv").exists() else []
        if again != all_rows[len(all_rows) - len(again) :]:
            wrong[checkpoint.stem].append(f"rows {again[:2]}")
        first = int(checkpoint.stem[:3])
        # A validation of the checkpoint's own step comes after what its batch's end has saved.
        owes = checkpoint.stem.endswith("on_train_batch_end")
        due = [
            row for row in all_rows
            if int(row["step"]) >= first or (owes and int(row["step"]) == first - 1 and "val/loss" in row)
        ]  # fmt: skip
        if len(again) < len(due):
            wrong[checkpoint.stem].append(f"{len(again)} rows of {len(due)}")
    assert not any(wrong.values()), {name: lines[:4] for name, lines in wrong.items() if lines}
