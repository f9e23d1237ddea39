"""What a run leaves in its folder: its config, environment and summary, and its report."""

import csv
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    ModelCheckpoint,
    Timer,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typing_extensions import override

from common.checkpoint import readable_facts
from common.data import data_ranks
from common.errors import InputError, Stopped, nearest
from common.module import BaseModule
from common.run.callbacks import BestCheckpoint, known_mode, likely_mode
from common.run.ending import early_end, is_out_of_time
from common.run.environment import code_hash, describe_environment, without_secrets
from common.run.faults import compare_ranks
from common.run.folder import RunFolder
from common.run.layers import to_yaml
from common.run.media import WORST
from common.run.output import spared
from common.run.report import LOWEST_LOSS, Best, checkpoint_name, write_report


class RunRecord(Callback):
    """Writes what the run is (config, versions, commit) when it starts, and its summary.

    Args:
        config: the resolved config.
        folder: where this command writes; for ``fit`` the folder in which it starts.
        run: the run's folder. ``fit`` touches it as soon as there is something to keep.
        checkpoint: that of this command, if there is one.
        command: the command line.
    """

    def __init__(
        self, config: dict[str, Any], folder: Path, run: RunFolder, checkpoint: str | None, command: Sequence[str]
    ):
        self.config, self.folder, self.run, self.checkpoint = config, folder, run, checkpoint
        self.command = without_secrets(command)
        self._began = datetime.now(UTC)
        self._settled = False

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.world_size > 1:
            step = {"the step of --ckpt_path": self.run.first_step}
            compare_ranks(trainer, {**self.config, **step, "the code": code_hash(type(pl_module))})
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_config(self.folder)
        environment = describe_environment()
        (self.folder / "environment.json").write_text(json.dumps(environment, indent=2), encoding="utf-8")
        if stage == "fit":
            facts = json.dumps(readable_facts(trainer.datamodule.facts), indent=1)  # type: ignore[attr-defined]
            (self.folder / "facts.json").write_text(facts, encoding="utf-8")
        start = {
            "time": self._began.isoformat(timespec="seconds"), "command": self.command, "host": platform.node(),
            "ranks": trainer.world_size, "checkpoint": self.checkpoint, "step": self.run.first_step,
            "parts": _sizes(trainer.datamodule), **environment,  # type: ignore[attr-defined]
        }  # fmt: skip
        earlier = self.run.path / "starts.jsonl"
        starts = earlier.read_bytes() if stage == "fit" and self.run.goes_on and earlier.exists() else b""
        (self.folder / "starts.jsonl").write_bytes(starts + f"{json.dumps(start)}\n".encode())
        for logger in trainer.loggers:
            if not isinstance(logger, CSVLogger):  # it would write config.yaml a second time
                # Names of files stay here: whoever sees a logger's page need not see the clone.
                told = {key: value for key, value in environment.items() if key != "uncommitted"}
                logger.log_hyperparams({**self.config, "environment": told})

    def _write_config(self, folder: Path) -> None:
        written = folder / ".config.yaml.tmp"  # a kill leaves the whole of one config
        written.write_text(to_yaml(self.config), encoding="utf-8")
        os.replace(written, folder / "config.yaml")

    def _settle(self, trainer: L.Trainer) -> None:
        """Begin to keep what the run makes."""
        if self._settled or trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._settled = True
        self.run.settle()
        self._keep_mode(trainer)
        self._summarize(trainer, "running")
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger) and trainer.is_global_zero:
                path = self.run.path / "metrics.csv"
                lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
                logger.experiment.metrics_file_path = str(path)  # type: ignore[attr-defined]
                logger.experiment.metrics_keys = next(csv.reader(lines), [])

    def _keep_mode(self, trainer: L.Trainer) -> None:
        """Write which value of the metric is the best, where it has said so itself: a run that goes on keeps it."""
        best, kept = _best(trainer), self.config["best"]
        if best is not None and best.is_decided and kept["mode"] != best.mode:
            kept["mode"] = best.mode
            if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
                self._write_config(self.run.path)

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: BaseModule, *_: Any) -> None:  # type: ignore[override]
        if pl_module.ends_step:
            self._settle(trainer)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._settle(trainer)  # a resumed run may begin with a validation
        if self._settled:
            self._keep_mode(trainer)  # without the check before training
        if trainer.state.fn == "validate":
            self._summarize(trainer, "complete", **self._measured(trainer))

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._settle(trainer)

    @override
    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        metrics = self.run.path / "metrics.csv"
        lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines()[:1] if metrics.exists() else []
        logged = next(csv.reader(lines), [])
        if trainer.state.fn == "fit" and self.run.goes_on and any(name.startswith("val/") for name in logged):
            _monitoring(trainer, logged)  # no validation comes first
        states = checkpoint.get("callbacks", {})
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EarlyStopping) and callback.state_key in states:
                states[callback.state_key]["patience"] = callback.patience  # the one given now wins
            elif isinstance(callback, Timer):  # trainer.max_time is that of this start
                states.pop(callback.state_key, None)

    @override
    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        best = _best(trainer)
        for callback in _monitoring(trainer, [*trainer.callback_metrics]):
            if isinstance(callback, BestCheckpoint):
                callback.decide(pl_module)
            mode = known_mode(str(callback.monitor), pl_module)
            if not isinstance(callback, BestCheckpoint) and callback.mode == "min":  # which may be no choice
                mode = mode or likely_mode(str(callback.monitor))
                if mode is None and best is not None and best.is_given and best.monitor == callback.monitor:
                    mode = best.mode
                if mode is None and trainer.is_global_zero:
                    told = (
                        f"takes the smallest {callback.monitor} for the best; set its mode to max if it is the largest"
                    )
                    print(f"trainer.callbacks: {type(callback).__name__} {told}", flush=True)
            if mode is not None and mode != callback.mode:
                is_best = isinstance(callback, BestCheckpoint)
                key = "best.mode" if is_best else f"trainer.callbacks: {type(callback).__name__}"
                problem = f"{callback.monitor} is best where it is {'smallest' if mode == 'min' else 'largest'}"
                fix = f"set {'it' if is_best else 'its mode'} to {mode}, not {callback.mode}"
                raise InputError(f"{key}: {problem}; {fix}")

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        best = _best(trainer)
        if best is not None and best.best_model_score is not None and trainer.is_global_zero:
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):  # its table of runs shows those with a score alone
                    logger.log_hyperparams(self.config, {f"best/{best.monitor}": best.best_model_score.item()})
        state = "out of time" if is_out_of_time(trainer) else "complete"
        self._summarize(trainer, state, ended_early=_why_early(trainer))

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self._settled:
            self._summarize(trainer, "stopped" if isinstance(exception, Stopped | KeyboardInterrupt) else "failed")

    def _summarize(self, trainer: L.Trainer, state: str, **more: Any) -> None:
        """Write what other programs ask of a run to ``summary.json``."""
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        best = _best(trainer)
        values = {name: value.item() for name, value in trainer.callback_metrics.items()}
        score = best.best_model_score if best else None
        summary = {
            "state": state,
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "metrics": {name: value if math.isfinite(value) else None for name, value in values.items()},
            "best": {best.monitor: score.item()} if best and score is not None else None,
            "checkpoints": sorted(path.name for path in (self.run.path / "checkpoints").glob("*.ckpt")),
            "seconds": round((datetime.now(UTC) - self._began).total_seconds(), 1),
            **more,
        }
        folder = self.run.path if trainer.state.fn == "fit" else self.folder
        with spared("summary.json"):
            written = folder / ".summary.json.tmp"
            try:
                written.write_text(json.dumps(summary, indent=2), encoding="utf-8")
                os.replace(written, folder / "summary.json")
            finally:
                written.unlink(missing_ok=True)

    @override
    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._summarize(trainer, "complete", **self._measured(trainer))

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._tell_measured(trainer)

    @override
    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._tell_measured(trainer)

    def _measured(self, trainer: L.Trainer) -> dict[str, Any]:
        """The checkpoint of an evaluation, its step, and the data."""
        data = source = source_of(self.config["data"], "test" if trainer.testing else "val")
        with spared("how many samples are evaluated"):  # a data set of one's own may have no length
            data = f"{_evaluated(trainer)} of {source}"
        test, val = (getattr(trainer.datamodule, f"{part}_data", None) for part in ("test", "val"))  # type: ignore[attr-defined]
        if trainer.testing and test is not None and test is val:
            data += " for validation, as none are for testing"
        return {"checkpoint": self.checkpoint, "step": self.run.first_step, "source": source, "data": data}

    def _tell_measured(self, trainer: L.Trainer) -> None:
        if trainer.is_global_zero:
            measured, name = self._measured(trainer), checkpoint_name(self.checkpoint, self.run.path)
            command = "test" if trainer.testing else "validate"
            print(f"{command}: {name}, step {measured['step']:,}, on {measured['data']}", flush=True)


def _why_early(trainer: L.Trainer) -> str | None:
    if trainer.is_global_zero:
        with spared("why the run has ended"):
            return early_end(trainer)
    return None


def _evaluated(trainer: L.Trainer) -> str:
    """How many samples an evaluation sees."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    there = len(data.test_data if trainer.testing else data.val_data)
    batches = trainer.num_test_batches if trainer.testing else trainer.num_val_batches
    seen = min(there, int(sum(batches)) * data.eval_batch_size * data_ranks(trainer)[0])
    return f"{seen:,} samples" if seen == there else f"{seen:,} of {there:,} samples"


def source_of(data: Mapping[str, Any], part: str) -> str:
    """What a config calls its data of a part, ``val`` or ``test``: the class of their source and its files."""
    source = data.get("source") or {}
    settings = {**data, **source.get("init_args", {})}
    keys = ("test_path", "val_path", "path") if part == "test" else ("val_path", "path")  # without a text to test on
    path = next(filter(None, map(settings.get, keys)), "")
    name = source.get("class_path", "").rpartition(".")[2]
    return f"{name} {path}".strip() or "the recipe's own data"


def _best(trainer: L.Trainer) -> BestCheckpoint | None:
    return next((each for each in trainer.checkpoint_callbacks if isinstance(each, BestCheckpoint)), None)


def _monitoring(trainer: L.Trainer, logged: Sequence[str]) -> list[ModelCheckpoint | EarlyStopping]:
    """The callbacks that monitor a metric.

    Raises:
        InputError: it is not logged.
    """
    kinds, known = ModelCheckpoint | EarlyStopping, [*logged, "train/loss", "step", "epoch"]
    found = [each for each in trainer.callbacks if isinstance(each, kinds) and each.monitor]  # type: ignore[attr-defined]
    for callback in found:
        if callback.monitor not in known:
            monitor, hint = callback.monitor, nearest(callback.monitor, known)
            if isinstance(callback, BestCheckpoint):
                raise InputError(f"best.monitor {monitor!r} is not logged{hint}")
            name = type(callback).__name__
            raise InputError(f"trainer.callbacks: {name} monitors {monitor!r}, which is not logged{hint}")
    return found


class RunReport(Callback):
    """Writes a run's report, and prints its metrics and texts, when everything else has been written."""

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if early := _why_early(trainer):
            print(f"fit: ended {early}", flush=True)
        best, tries = _best(trainer), trainer.fast_dev_run  # type: ignore[attr-defined]
        if trainer.is_global_zero and not tries and best is not None and not best.best_model_path:
            print("fit: no validation came before the end; test and predict take --ckpt_path last", flush=True)
        self._finish(trainer, "val")

    @override
    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._finish(trainer, "test")

    def _finish(self, trainer: L.Trainer, stage: str) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        for logger in trainer.loggers:
            logger.save()
        folder = Path(trainer.default_root_dir)
        # Train metrics change every step, so only a validation metric marks the best.
        monitored = [each for each in trainer.checkpoint_callbacks if isinstance(each, BestCheckpoint)]
        monitored = [each for each in monitored if str(each.monitor).startswith("val/")]
        best = Best(str(monitored[0].monitor), monitored[0].mode) if monitored else LOWEST_LOSS
        report = None
        with spared("the report"):
            report = write_report(folder, f"{folder.parent.name} / {folder.name}", best)
        console, table = Console(), Table(show_header=False, box=None)
        for name, value in trainer.callback_metrics.items():
            if name.startswith(("val/", "test/")):
                table.add_row(escape(name), f"{value.item():.4f}")
        console.print(table)
        for text in sorted((folder / "texts").glob(f"{stage}-*.txt")):
            if text.stem.endswith(WORST):
                continue  # a page for the report
            console.print(f"\n{text.stem}", style="bold", markup=False)
            console.print(text.read_text(encoding="utf-8"), markup=False, highlight=False)
        if report:
            console.print(f"report: {report}", soft_wrap=True, markup=False, highlight=False)


def _sizes(data: Any) -> dict[str, int]:
    """Samples of each part that a data module has read."""
    return {part: len(found) for part in ("train", "val", "test") if (found := getattr(data, f"{part}_data", None))}
