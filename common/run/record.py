"""What a run leaves in its folder: pictures and texts, its config and environment, its report, its predictions."""

import contextlib
import csv
import hashlib
import html
import importlib.metadata
import inspect
import json
import math
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.callbacks import (
    BasePredictionWriter,
    Callback,
    EarlyStopping,
    ModelCheckpoint,
    Timer,
)
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typing_extensions import override

from common.checkpoint import readable_facts
from common.data import data_ranks, global_seed, seed_all, step_seed
from common.errors import InputError, Stopped, nearest
from common.module import BaseModule
from common.parts import facts_of
from common.run.callbacks import BestCheckpoint, known_mode, likely_mode
from common.run.faults import compare_ranks
from common.run.folder import RunFolder
from common.run.layers import to_yaml
from common.run.loop import early_end, is_out_of_time
from common.run.output import spared
from common.run.report import checkpoint_name
from common.run.samples import FirstBatch, draw_samples, labels, worst_samples

if TYPE_CHECKING:
    from matplotlib.figure import Figure


WORST = "worst_samples"


class Media(Callback):
    """Sends a module's pictures and texts to the run's folder and to every logger.

    To the folder alone it adds samples of the data: the first batch that the net gets, and, after training and test,
    those with the highest losses.

    Args:
        every_n_validations: how often during training; that of the last validation is always sent when training ends.
            0 for none at all, in tests too.
    """

    def __init__(self, every_n_validations: int = 1):
        if every_n_validations < 0:
            raise InputError(f"media.every_n_validations must be at least 0, got {every_n_validations}")
        self.every_n_validations = every_n_validations
        self._validations = 0
        self._waits = False  # whether the state of the last validation is to be sent
        self._step = 0  # that of the metrics that were logged last
        self._first: FirstBatch | None = None
        self._worst: tuple[dict[str, torch.Tensor], list[str]] | None = None  # samples of the last evaluation

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: BaseModule) -> None:  # type: ignore[override]
        wanted = self.every_n_validations and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if wanted and trainer.is_global_zero and not trainer.global_step:
            with spared("the first batch"):
                self._first = FirstBatch(pl_module.net)

    @override
    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: BaseModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._first is None:
            return
        with spared("the first batch"):
            if not batch_idx:
                self._labels = labels(batch, pl_module.facts)
            if pl_module.ends_step:  # the run's folder is there
                first, self._first = self._first, None
                shown = draw_samples(first.take(), self._labels, pl_module.facts, "a batch as the net sees it")
                _write(trainer, [], "train-first_batch", shown, 0)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: BaseModule) -> None:  # type: ignore[override]
        if trainer.sanity_checking:
            return
        self._validations += 1
        self._step = trainer.fit_loop.epoch_loop._batches_that_stepped
        due = self.every_n_validations > 0 and self._validations % self.every_n_validations == 0
        self._waits = trainer.state.fn == "fit" and not due
        if not self._waits:
            self._publish(trainer, pl_module, "val")

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: BaseModule) -> None:  # type: ignore[override]
        if self._waits:
            self._publish(trainer, pl_module, "val")
        self._send_worst(trainer, pl_module, "val")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"validations": self._validations}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validations = state_dict["validations"]

    @override
    def on_test_end(self, trainer: L.Trainer, pl_module: BaseModule) -> None:  # type: ignore[override]
        self._publish(trainer, pl_module, "test")

    def _publish(self, trainer: L.Trainer, module: BaseModule, stage: str) -> None:
        if trainer.fast_dev_run or not self.every_n_validations:  # type: ignore[attr-defined]
            return
        # A net that is sharded answers only when all ranks ask, and ask the same.
        seed_all(step_seed(global_seed(), self._step), module.device)
        with spared("a picture of the recipe"):
            with trainer.precision_plugin.forward_context():  # as in validation
                media = module.media(stage) | facts_of(trainer.strategy).media()
            for name, item in media.items() if trainer.is_global_zero else ():
                _write(trainer, trainer.loggers, f"{stage}-{name}", item, self._step)
        with spared("the worst samples"), trainer.precision_plugin.forward_context():
            self._worst = worst_samples(module, stage)
        if trainer.state.fn != "fit":
            self._send_worst(trainer, module, stage)

    def _send_worst(self, trainer: L.Trainer, module: BaseModule, stage: str) -> None:
        """Draw the samples with the highest losses; in training once, at its end."""
        worst, self._worst = self._worst, None
        if worst is not None and trainer.is_global_zero:
            with spared("the worst samples"):
                how = ": target → prediction" if any("→" in caption for caption in worst[1]) else ""
                shown = draw_samples(*worst, module.facts, f"the highest losses{how}")
                _write(trainer, [], f"{stage}-{WORST}", shown, self._step)


def _write(trainer: L.Trainer, loggers: Sequence[Logger], name: str, item: "Figure | str | None", step: int) -> None:
    folder = Path(trainer.default_root_dir)
    with spared(f"the picture {name}"):
        if isinstance(item, str):
            _write_text(folder, loggers, name, item, step)
        elif item is not None:
            _write_figure(folder, loggers, name, item, step)


def _write_text(folder: Path, loggers: Sequence[Logger], name: str, text: str, step: int) -> None:
    path = folder / "texts" / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    key = name.replace("-", "/", 1)
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(key, f"```\n{text}\n```", step)
        elif isinstance(logger, WandbLogger):
            import wandb

            page = wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False)
            logger.log_metrics({key: page}, step)  # type: ignore[dict-item]


def _write_figure(folder: Path, loggers: Sequence[Logger], name: str, figure: "Figure", step: int) -> None:
    from common.figures import save_figure

    path = folder / "figures" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.set_dpi(120)
    pixels = save_figure(figure, path)
    key = name.replace("-", "/", 1)
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(key, pixels, step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(key, [str(path)], step)


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
            compare_ranks(trainer, {**self.config, **step, "the code": _code(type(pl_module))})
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
        for callback in _monitoring(trainer, [*trainer.callback_metrics]):
            if isinstance(callback, BestCheckpoint):
                callback.decide(pl_module)
            mode = known_mode(str(callback.monitor), pl_module)
            if not isinstance(callback, BestCheckpoint) and callback.mode == "min":  # which may be no choice
                mode = mode or likely_mode(str(callback.monitor))
            if mode is not None and mode != callback.mode:
                name = type(callback).__name__
                key = "best.mode" if isinstance(callback, BestCheckpoint) else f"trainer.callbacks: mode of {name}"
                problem = f"{callback.monitor} is best where it is {'smallest' if mode == 'min' else 'largest'}"
                raise InputError(f"{key}: {problem}; set it to {mode}, not {callback.mode}")

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        best = _best(trainer)
        if best is not None and best.best_model_score is not None and trainer.is_global_zero:
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):  # its table of runs shows those with a score alone
                    logger.log_hyperparams(self.config, {f"best/{best.monitor}": best.best_model_score.item()})
        state = "out of time" if is_out_of_time(trainer) else "complete"
        self._summarize(trainer, state, ended_early=early_end(trainer) if trainer.is_global_zero else None)

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
        """What an evaluation is about: which checkpoint, of which step, on which data."""
        data = f"{_evaluated(trainer)} of {_source(self.config['data'])}"
        return {"checkpoint": self.checkpoint, "step": self.run.first_step, "data": data}

    def _tell_measured(self, trainer: L.Trainer) -> None:
        measured, name = self._measured(trainer), checkpoint_name(self.checkpoint, self.run.path)
        if trainer.is_global_zero:
            command = "test" if trainer.testing else "validate"
            print(f"{command}: {name}, step {measured['step']:,}, on {measured['data']}", flush=True)


def _evaluated(trainer: L.Trainer) -> str:
    """How many samples an evaluation sees."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    there = len(data.test_data if trainer.testing else data.val_data)
    batches = trainer.num_test_batches if trainer.testing else trainer.num_val_batches
    seen = min(there, int(sum(batches)) * data.eval_batch_size * data_ranks(trainer)[0])
    return f"{seen:,} samples" if seen == there else f"{seen:,} of {there:,} samples"


def _source(data: Mapping[str, Any]) -> str:
    """What a config calls its data: the class of their source and its files."""
    source = data.get("source") or {}
    settings = {**data, **source.get("init_args", {})}
    paths = [str(settings[key]) for key in ("path", "val_path", "test_path") if settings.get(key)]
    name = source.get("class_path", "").rpartition(".")[2]
    return " ".join(filter(None, [name, ", ".join(paths)])) or "the recipe's own data"


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
        if trainer.is_global_zero and (end := early_end(trainer)):
            print(f"fit: ended {end}", flush=True)
        self._finish(trainer, "val")

    @override
    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._finish(trainer, "test")

    def _finish(self, trainer: L.Trainer, stage: str) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        from common.run.report import LOWEST_LOSS, Best, write_report

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


def without_secrets(command: Sequence[str]) -> list[str]:
    """A command line without the values of secrets."""
    words, secret = list(command), re.compile(r"(--\S*(?:key|token|secret|password))(?:=.*)?", re.IGNORECASE)
    for place, word in enumerate(command):
        if found := secret.fullmatch(word):
            words[place : place + 1 + ("=" not in word)] = [f"{found[1]}=…"] if "=" in word else [word, "…"]
    return words


def _sizes(data: Any) -> dict[str, int]:
    """Samples of each part that a data module has read."""
    return {part: len(found) for part in ("train", "val", "test") if (found := getattr(data, f"{part}_data", None))}


def _code(recipe: type) -> str:
    """A hash of the code of a module's recipe and of ``common``."""
    sha = hashlib.sha256()
    common, own = Path(__file__).resolve().parents[1], Path(inspect.getfile(recipe)).resolve().parent
    for path in sorted([*common.rglob("*.py"), *own.glob("*.py")]):
        sha.update(path.read_bytes())
    return sha.hexdigest()[:12]


def describe_environment() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result, the machine, the git commit and what it lacks."""
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
        # Whoever owns the clone; files that git does not know yet make it dirty as well.
        command = [git, "-c", "safe.directory=*"]
        about = {"capture_output": True, "text": True, "check": False, "cwd": Path(__file__).resolve().parents[2]}
        commit = subprocess.run([*command, "rev-parse", "HEAD"], **about).stdout.strip()
        if commit and (changed := subprocess.run([*command, "status", "--porcelain"], **about).stdout.rstrip()):
            commit += "-dirty"
            names = [line[3:] for line in changed.splitlines()]
            versions["uncommitted"] = ", ".join(names[:20]) + f" and {len(names) - 20} more" * (len(names) > 20)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"python": platform.python_version(), "device": device, "commit": commit, **versions}


def _readable(values: Sequence[Any]) -> list[Any]:
    """Numbers of fp32 without the digits that they do not have, and lists as JSON."""
    texts = [json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value for value in values]
    return [f"{value:.7g}" if isinstance(value, float) else value for value in texts]


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
        everyone: list[Any] = [list(predictions)]
        if trainer.world_size > 1:
            everyone = [None] * trainer.world_size
            torch.distributed.all_gather_object(everyone, list(predictions))
            everyone = everyone[:: trainer.world_size // data_ranks(trainer)[0]]  # one of each group
        if not trainer.is_global_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "predictions.csv"
        earlier = ", in place of the earlier ones" if path.exists() else ""
        kept = trainer.datamodule.kept  # type: ignore[attr-defined]
        if twice := kept.keys() & everyone[0][0].keys():
            raise InputError(f"data.keep: {min(twice)!r} is also a column of the predictions; rename it in the data")
        for batches in everyone if kept else ():
            for number, batch in enumerate(batches):
                # Numbers as they are, in all their digits.
                cells = {name: [column[i] for i in batch["index"]] for name, column in kept.items()}
                beside = {k: [repr(v) if isinstance(v, float) else v for v in values] for k, values in cells.items()}
                batches[number] = {"index": batch["index"], **beside, **batch}
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(everyone[0][0])
            for batches in zip(*everyone, strict=True):
                # Ranks took every world-th sample, so the rows interleave; zip stops where padding was masked out.
                rows = [list(zip(*map(_readable, batch.values()), strict=True)) for batch in batches]
                for position in range(len(rows[0])):
                    table.writerows(rank[position] for rank in rows if position < len(rank))
        Console().print(f"predictions: {path}{earlier}", soft_wrap=True, markup=False, highlight=False)
