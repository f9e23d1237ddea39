"""Callbacks of every recipe: throughput, the progress bar, the best and the last checkpoint."""

import errno
import math
import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch.callbacks import (
    Callback,
    Checkpoint,
    ModelCheckpoint,
    RichProgressBar,
)
from rich.console import Console
from typing_extensions import override

from common.data import data_ranks
from common.errors import InputError
from common.module import BaseModule
from common.parts import facts_of


class Throughput(Callback):
    """Logs ``perf/``: samples or tokens per second over all ranks, step time, peak memory, and MFU where known.

    What a strategy counts by itself is logged with it.

    Times are taken between two logged steps, validation left out, so no step waits for the device. MFU is the share of
    the device's peak that the net's own operations reach (PaLM, appendix B, https://arxiv.org/abs/2204.02311).
    """

    def __init__(self) -> None:
        self._items, self._steps, self._since = 0, 0, 0.0
        self._paused: float | None = None
        self._peak: float | None = None

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: BaseModule) -> None:  # type: ignore[override]
        self._items, self._steps, self._since = 0, trainer.global_step, time.perf_counter()
        self._paused = None  # by the sanity check, which is over
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            half = "16" in str(trainer.precision)
            self._peak = get_available_flops(pl_module.device, torch.bfloat16 if half else torch.float32)

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._paused = time.perf_counter()

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._paused is not None:  # what other callbacks do after a validation is no training either
            self._since += time.perf_counter() - self._paused
            self._paused = None

    @override
    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: BaseModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._items += pl_module.num_items(batch)
        steps = trainer.global_step - self._steps
        if steps < trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        now = time.perf_counter()
        rate = self._items / (now - self._since) * data_ranks(trainer)[0]
        metrics = {
            f"perf/{pl_module.unit}_per_s": rate,
            "perf/step_ms": (now - self._since) / steps * 1e3,
        }
        if pl_module.device.type == "cuda":
            metrics["perf/peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        else:
            import resource  # not on Windows

            unit = 1 if platform.system() == "Darwin" else 1024
            metrics["perf/peak_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
        if self._peak and (flops := pl_module.flops_per_item()):
            metrics["perf/mfu"] = rate * flops / (self._peak * trainer.world_size)
        metrics |= facts_of(trainer.strategy).train_metrics()
        pl_module.log_dict(metrics)
        self._items, self._steps, self._since = 0, trainer.global_step, now


class RunProgressBar(RichProgressBar):
    """Counts to the end of the run where ``max_steps`` ends it within an epoch; Lightning's counts the whole epoch.

    Where the output is no terminal, as in a job's log, it prints a line at each validation and about once a minute.
    """

    seconds = 60.0
    _told = 0.0  # when the last line was printed

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._told = time.monotonic()

    @property
    @override
    def total_train_batches(self) -> int | float:
        """Micro-batches of the epoch that are trained."""
        trainer = self.trainer
        epoch = trainer.num_training_batches
        if trainer.max_steps < 0:
            return epoch
        done = trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
        return min(epoch, done + (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches)

    @override
    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Showing metrics waits for the device: only where there are new ones, in the step after they were logged.
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.global_step % every == 1 % every or self.train_progress_bar_id is None or self.progress is None:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            if time.monotonic() - self._told >= self.seconds:
                self._tell(trainer)
        else:
            self.progress.update(self.train_progress_bar_id, completed=batch_idx + 1)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._tell(trainer)

    def _tell(self, trainer: L.Trainer) -> None:
        self._told = time.monotonic()
        if self.is_disabled or Console().is_terminal:
            return
        total = trainer.estimated_stepping_batches
        of = f" of {total:,}" if 0 < total < math.inf else ""  # where an end is known
        shown = trainer.progress_bar_metrics | _watched(trainer)
        values = [f"{name} {value:.4g}" for name, value in shown.items()]
        print(", ".join([f"step {trainer.global_step:,}{of}", *values]), flush=True)

    @override
    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:  # type: ignore[override]
        return super().get_metrics(trainer, pl_module) | _watched(trainer)

    @override
    def _get_train_description(self, current_epoch: int) -> str:
        # max_epochs says nothing where max_steps decides.
        ends_by_steps = self.trainer.max_steps >= 0
        return f"Epoch {current_epoch}" if ends_by_steps else super()._get_train_description(current_epoch)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop_progress()  # what is printed from here on stands below the bar

    @override
    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_test_end(trainer, pl_module)
        self._stop_progress()


def _watched(trainer: L.Trainer) -> dict[str, float]:
    """The metrics that choose a checkpoint or stop the run, where they are logged already."""
    watching = [*trainer.checkpoint_callbacks, *trainer.early_stopping_callbacks]
    names, metrics = [getattr(each, "monitor", None) for each in watching], trainer.callback_metrics
    return {name: metrics[name].item() for name in names if name in metrics}


# Words in the names of metrics: of these the smallest value is the best, of those the largest.
LOWER = {"loss", "error", "mse", "rmse", "mae", "perplexity", "bits"}
HIGHER = {"accuracy", "auroc", "f1", "precision", "r2", "recall"}


def known_mode(metric: str, pl_module: L.LightningModule) -> Literal["min", "max"] | None:
    """Which value of a metric torchmetrics calls the best; None if it is no metric of it, or not logged yet."""
    higher = getattr(pl_module, "higher_is_better", {}).get(metric)
    return None if higher is None else "max" if higher else "min"


def likely_mode(metric: str) -> Literal["min", "max"] | None:
    """Which value the name of a metric calls the best; None if it does not say."""
    words = set(re.split(r"\W|_", metric))
    return "min" if LOWER & words else "max" if HIGHER & words else None


class BestCheckpoint(ModelCheckpoint):
    """Keeps ``checkpoints/best.ckpt``: that of the validation with the best value of a metric.

    Args:
        monitor: the metric.
        mode: whether its smallest or its largest value is the best; None where the metric says so itself.
    """

    def __init__(self, monitor: str = "val/loss", mode: Literal["min", "max"] | None = None):
        settings = {"save_on_train_epoch_end": False, "enable_version_counter": False}
        super().__init__(filename="best", monitor=monitor, mode=mode or "min", **settings)  # type: ignore[arg-type]
        self.is_given = self.is_decided = mode is not None

    def decide(self, pl_module: L.LightningModule) -> None:
        """Take the direction of the metric, if none is given: what torchmetrics says, or else its name.

        Raises:
            InputError: nothing says which one it is.
        """
        if self.is_given:
            return
        if (mode := known_mode(str(self.monitor), pl_module) or likely_mode(str(self.monitor))) is None:
            problem = f"nothing says whether a small or a large {self.monitor} is the best"
            raise InputError(f"best.mode: {problem}; give --best.mode min or max")
        if not self.is_decided or self.mode != mode:
            self.mode, self.kth_value = mode, torch.tensor(math.inf if mode == "min" else -math.inf)
        self.is_decided = True

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.dirpath = str(checkpoints_of(trainer))
        self._trainer = trainer  # which knows the checkpoint when it is read
        is_told = not trainer.enable_validation or trainer.num_sanity_val_steps  # by the check before training
        if likely_mode(str(self.monitor)) or not (stage != "fit" or is_told or trainer.fast_dev_run):  # type: ignore[attr-defined]
            self.decide(pl_module)
        super().setup(trainer, pl_module, stage)

    @override
    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit":
            self.decide(pl_module)  # no validation comes first

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.decide(pl_module)
        super().on_validation_end(trainer, pl_module)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # A run that was moved keeps its best, in another folder than before. One that goes on from another run's
        # checkpoint begins without, also where an earlier run of its name has a best.
        here = Path(str(self.dirpath), "best.ckpt")
        goes_on = Path(str(self._trainer.ckpt_path)).resolve().parent == here.resolve().parent
        if state_dict["best_model_path"] and here.is_file() and goes_on:
            path, score = str(here), state_dict["best_model_score"]
            places = {"best_model_path": path, "kth_best_model_path": path, "last_model_path": ""}
            super().load_state_dict(state_dict | places | {"dirpath": self.dirpath, "best_k_models": {path: score}})
        elif state_dict["best_model_path"] and goes_on and self._trainer.training and self._trainer.is_global_zero:
            print(f"fit: {here} is gone; the best of the validations from here on takes its place", flush=True)


class LastCheckpoint(Checkpoint):
    """Keeps ``checkpoints/last.ckpt``: after every epoch and validation, or every N steps, and when training ends.

    The one before it stays as ``previous.ckpt``, for the case that ``last.ckpt`` is damaged.

    Args:
        every_n_train_steps: optimizer steps between two checkpoints; None for one per epoch and validation.
    """

    def __init__(self, every_n_train_steps: int | None = None):
        if every_n_train_steps is not None and every_n_train_steps < 1:
            raise InputError(f"last.every_n_train_steps must be at least 1, got {every_n_train_steps}")
        self.every_n_train_steps = every_n_train_steps
        self._is_saved = False  # whether the checkpoint holds all that has been done
        self._wrote = False  # whether it is of this process

    def save(self, trainer: L.Trainer) -> None:
        """Write the checkpoint."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        last = checkpoints_of(trainer) / "last.ckpt"
        # One that was damaged must not take the place of a whole one.
        goes_on = self._wrote or (trainer.ckpt_path is not None and Path(trainer.ckpt_path).name == last.name)
        with _keeping(last) if trainer.is_global_zero and last.exists() and goes_on else nullcontext():
            trainer.save_checkpoint(last, weights_only=False)
        self._is_saved = self._wrote = True

    @override
    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: BaseModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._is_saved = False
        every = self.every_n_train_steps
        if every and pl_module.ends_step and trainer.global_step % every == 0:
            self.save(trainer)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._is_saved = False
        if not self.every_n_train_steps and not trainer.is_last_batch:  # an epoch's end follows at once
            self.save(trainer)

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.every_n_train_steps:
            self.save(trainer)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._is_saved:
            self.save(trainer)


@contextmanager
def _keeping(last: Path) -> Iterator[None]:
    """Keep a checkpoint as ``previous.ckpt`` when a new one has been written in its place."""
    linked, previous = last.with_name(".previous.tmp"), last.with_name("previous.ckpt")
    linked.unlink(missing_ok=True)
    try:
        os.link(last, linked)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS):
            raise
        os.replace(last, previous)  # a disk without links
    try:
        yield
    except BaseException:
        linked.unlink(missing_ok=True)
        if not last.exists():
            os.replace(previous, last)
        raise
    if linked.exists():
        os.replace(linked, previous)


def checkpoints_of(trainer: L.Trainer) -> Path:
    """Where a run's checkpoints are."""
    return Path(trainer.default_root_dir) / "checkpoints"
