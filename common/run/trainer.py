"""Lightning's trainer with two more commands, which stops between optimizer steps."""

from pathlib import Path

import lightning as L
from lightning.pytorch.strategies import ParallelStrategy

from common.data import BaseDataModule
from common.errors import InputError
from common.module import BaseModule
from common.run.export import export
from common.run.preflight import Preflight, preflight


class RecipeTrainer(L.Trainer):
    """The trainer of every recipe."""

    found: Preflight  # by the command ``preflight``
    in_step = False  # whether an optimizer step is begun, with the validation after it
    _stops = False

    @property
    def should_stop(self) -> bool:
        """Whether the run is to stop. What stops it, as the time given, waits for the end of an optimizer step.

        Before that Lightning would log values of an earlier step, and validate once more; a run that goes on does not.
        """
        return self._stops and not self.in_step

    @should_stop.setter
    def should_stop(self, value: bool) -> None:
        self._stops = value or (self.in_step and self._stops)

    def preflight(self, model: BaseModule, datamodule: BaseDataModule) -> None:
        """Print parameters, memory per rank, items per step and steps of a run, and keep them as ``found``."""
        self._attach(model, datamodule)
        self.found = preflight(self, model, datamodule)

    def export(self, model: BaseModule, datamodule: BaseDataModule, ckpt_path: str | None = None) -> None:
        """Write a checkpoint's net to ``export/`` in the run's folder: safetensors, as ``from_pretrained`` reads it.

        Args:
            model: the module.
            datamodule: its data; its tokenizer is written beside the net, as is what encodes the columns of a table.
            ckpt_path: ``best``, which is the default, ``last`` or a file.

        Raises:
            InputError: there is no checkpoint.
        """
        if ckpt_path is None:
            raise InputError("--ckpt_path: export takes no net as it is made; give best, last or a file")
        self._attach(model, datamodule)
        export(model, datamodule, ckpt_path, Path(self.default_root_dir) / "export")

    def _attach(self, model: BaseModule, datamodule: BaseDataModule) -> None:
        """What Lightning does before its own commands, without starting ranks."""
        model.trainer = datamodule.trainer = self
        self.datamodule = datamodule
        self.strategy.connect(model)
        if isinstance(self.strategy, ParallelStrategy) and self.strategy.cluster_environment is not None:
            self.strategy.cluster_environment.set_world_size(self.num_devices * self.num_nodes)
