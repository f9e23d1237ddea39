"""Callbacks of every recipe: throughput, pictures and texts, predictions, the run's record."""

import contextlib
import csv
import html
import importlib.metadata
import json
import math
import platform
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
import yaml
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch.callbacks import (
    BasePredictionWriter,
    Callback,
    EarlyStopping,
    ModelCheckpoint,
    RichProgressBar,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from rich.console import Console
from rich.table import Table
from typing_extensions import override

from common.data import data_ranks, global_seed, step_seed
from common.errors import InputError, nearest
from common.module import BaseModule

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
        metrics |= getattr(trainer.strategy, "train_metrics", dict)()
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
        values = [f"{name} {value:.4g}" for name, value in trainer.progress_bar_metrics.items()]
        print(", ".join([f"step {trainer.global_step:,}{of}", *values]), flush=True)

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


class LastCheckpoint(ModelCheckpoint):
    """Keeps ``checkpoints/last.ckpt``: after every epoch, or every so many optimizer steps, and when training ends.

    Args:
        every_n_train_steps: optimizer steps between two checkpoints; None for one per epoch.
    """

    def __init__(self, every_n_train_steps: int | None = None, dirpath: str = "checkpoints"):
        super().__init__(dirpath, "last", every_n_train_steps=every_n_train_steps, enable_version_counter=False)

    @override
    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        # Not when training ends: Lightning then counts an epoch that max_steps cut short as complete.
        batches = trainer.fit_loop.epoch_loop.batch_progress
        ends = trainer.current_epoch + 1 == trainer.max_epochs and batches.is_last_batch and self._every_n_train_steps
        stops = trainer.should_stop and not (batch_idx + 1) % trainer.accumulate_grad_batches  # max_time
        self._save_if(trainer, trainer.global_step == trainer.max_steps or bool(ends) or stops)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        self._save_if(trainer, trainer.state.fn == "fit" and trainer.should_stop)  # early stopping, or below

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        self._save_if(trainer, trainer.should_stop)

    def _save_if(self, trainer: L.Trainer, done: bool) -> None:
        fresh = self._last_global_step_saved == trainer.global_step or trainer.fast_dev_run  # type: ignore[attr-defined]
        if done and not fresh:
            self._save_none_monitor_checkpoint(trainer, self._monitor_candidates(trainer))


class Media(Callback):
    """Sends a module's pictures and texts to the run's folder and to every logger.

    Args:
        every_n_validations: how often during training; the last state is always sent when training ends.
    """

    def __init__(self, every_n_validations: int = 1):
        if every_n_validations < 1:
            problem = f"must be at least 1, got {every_n_validations}"
            raise InputError(f"trainer.callbacks: Media.every_n_validations {problem}")
        self.every_n_validations = every_n_validations
        self._validations = 0
        self._step = 0  # that of the metrics that were logged last

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: BaseModule) -> None:  # type: ignore[override]
        if trainer.sanity_checking:
            return
        self._validations += 1
        self._step = trainer.fit_loop.epoch_loop._batches_that_stepped
        if trainer.state.fn != "fit" or self._validations % self.every_n_validations == 0:
            self._publish(trainer, pl_module, "val")

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: BaseModule) -> None:  # type: ignore[override]
        if self._validations % self.every_n_validations:
            self._publish(trainer, pl_module, "val")

    @override
    def on_test_end(self, trainer: L.Trainer, pl_module: BaseModule) -> None:  # type: ignore[override]
        self._publish(trainer, pl_module, "test")

    def _publish(self, trainer: L.Trainer, module: BaseModule, stage: str) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        # A net that is sharded answers only when all ranks ask, and ask the same.
        torch.manual_seed(step_seed(global_seed(), self._step))
        with trainer.precision_plugin.forward_context():  # as in validation
            media = module.media(stage) | getattr(trainer.strategy, "media", dict)()
        for name, item in media.items() if trainer.is_global_zero else ():
            if isinstance(item, str):
                _write_text(trainer, f"{stage}-{name}", item, self._step)
            else:
                _write_figure(trainer, f"{stage}-{name}", item, self._step)


def _write_text(trainer: L.Trainer, name: str, text: str, step: int) -> None:
    path = run_folder(trainer) / "texts" / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    key = name.replace("-", "/", 1)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(key, f"```\n{text}\n```", step)
        elif isinstance(logger, WandbLogger):
            import wandb

            page = wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False)
            logger.log_metrics({key: page}, step)  # type: ignore[dict-item]


def _write_figure(trainer: L.Trainer, name: str, figure: "Figure", step: int) -> None:
    from common.report import save_figure

    path = run_folder(trainer) / "figures" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.set_dpi(120)
    pixels = save_figure(figure, path)
    key = name.replace("-", "/", 1)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(key, pixels, step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(key, [str(path)], step)


def run_folder(trainer: L.Trainer) -> Path:
    """Where the run's files lie: ``runs/<recipe>/<name>``."""
    return Path(trainer.default_root_dir)


class RunRecord(Callback):
    """Writes what the run is (config, versions, commit) when it starts and its report when it ends.

    Args:
        config: the resolved config.
        folder: where this command writes; the run's folder for ``fit``, a folder in it otherwise.
    """

    def __init__(self, config: dict[str, Any], folder: Path):
        self.config, self.folder = config, folder

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.yaml").write_text(yaml.safe_dump(self.config, sort_keys=False), encoding="utf-8")
        (self.folder / "hparams.yaml").unlink(missing_ok=True)  # TensorBoard's logger keeps an earlier one
        environment = describe_environment()
        (self.folder / "environment.json").write_text(json.dumps(environment, indent=2), encoding="utf-8")
        for logger in trainer.loggers:
            if not isinstance(logger, CSVLogger):  # it would write config.yaml a second time
                logger.log_hyperparams({**self.config, "environment": environment})

    @override
    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        states = checkpoint.get("callbacks", {})
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EarlyStopping) and callback.state_key in states:
                states[callback.state_key]["patience"] = callback.patience  # the one given now wins
        # In a run that was moved, callbacks would forget which checkpoint is the best: its folder is another.
        for state in states.values():
            before = state.get("dirpath", "")
            here = str(run_folder(trainer) / Path(before).name)
            if state.get("best_model_path") and Path(state["best_model_path"].replace(before, here)).exists():
                state.update({k: v.replace(before, here) for k, v in state.items() if isinstance(v, str)})
                scores = state["best_k_models"].items()
                state["best_k_models"] = {path.replace(before, here): score for path, score in scores}

    @override
    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            monitor = (
                getattr(callback, "monitor", None) if isinstance(callback, ModelCheckpoint | EarlyStopping) else None
            )
            known = [*trainer.callback_metrics, "train/loss"]
            if monitor is not None and monitor not in known:
                name = type(callback).__name__
                raise InputError(
                    f"trainer.callbacks: {name} monitors {monitor!r}, which is not logged{nearest(monitor, known)}"
                )

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._finish(trainer, "val")

    @override
    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._finish(trainer, "test")

    def _finish(self, trainer: L.Trainer, stage: str) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        from common.report import LOWEST_LOSS, Best, write_report

        for logger in trainer.loggers:
            logger.save()
        folder = run_folder(trainer)
        # Of a train metric every step is another: the best is that of validation.
        saving: list[Any] = trainer.checkpoint_callbacks
        monitored = [saved for saved in saving if (getattr(saved, "monitor", None) or "").startswith("val/")]
        best = Best(monitored[0].monitor, monitored[0].mode) if monitored else LOWEST_LOSS
        report = write_report(folder, f"{folder.parent.name} / {folder.name}", best)
        console, table = Console(), Table(show_header=False, box=None)
        for name, value in trainer.callback_metrics.items():
            if name.startswith(("val/", "test/")):
                table.add_row(name, f"{value.item():.4f}")
        console.print(table)
        for text in sorted((folder / "texts").glob(f"{stage}-*.txt")):
            console.print(f"\n{text.stem}", style="bold")
            console.print(text.read_text(encoding="utf-8"), markup=False, highlight=False)
        console.print(f"report: {report}", soft_wrap=True)


def describe_environment() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result, the machine and the git commit."""
    packages = (
        "torch",
        "lightning",
        "torchmetrics",
        "transformers",
        "tokenizers",
        "datasets",
        "deepspeed",
        "megatron-core",
        "ray",
        "horovod",
        "kornia",
        "numpy",
    )
    versions = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    commit = ""
    if git := shutil.which("git"):
        command = [git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        where = Path(__file__).parent
        commit = subprocess.run(command, capture_output=True, text=True, check=False, cwd=where).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"python": platform.python_version(), "device": device, "commit": commit, **versions}


def _readable(values: Sequence[Any]) -> list[Any]:
    """Numbers of fp32 without the digits that they do not have."""
    return [f"{value:.7g}" if isinstance(value, float) else value for value in values]


class PredictionWriter(BasePredictionWriter):
    """Collects what ``predict_step`` returns, a column name to values mapping, in one table ``predictions.csv``.

    Args:
        folder: where the table is written.
    """

    def __init__(self, folder: Path):
        super().__init__(write_interval="epoch")
        self.folder = folder

    @override
    def write_on_epoch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        predictions: Sequence[dict[str, Sequence[Any]]],
        batch_indices: Sequence[Any],
    ) -> None:
        everyone: list[Any] = [predictions]
        if trainer.world_size > 1:
            everyone = [None] * trainer.world_size
            torch.distributed.all_gather_object(everyone, list(predictions))
            everyone = everyone[:: trainer.world_size // data_ranks(trainer)[0]]  # one of each group
        if not trainer.is_global_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "predictions.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(everyone[0][0])
            for batches in zip(*everyone, strict=True):
                # Ranks took every world-th sample, so the rows interleave; zip stops where padding was masked out.
                rows = [list(zip(*map(_readable, batch.values()), strict=True)) for batch in batches]
                for position in range(len(rows[0])):
                    table.writerows(rank[position] for rank in rows if position < len(rank))
        Console().print(f"predictions: {path}", soft_wrap=True)
