"""Pictures and texts of a run, in its folder and in its loggers."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from typing_extensions import override

from common.data import global_seed, seed_all, step_seed
from common.errors import InputError
from common.module import BaseModule
from common.parts import facts_of
from common.run.output import spared
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
