"""The loops of training. A resumed run goes on exactly where its checkpoint was made."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from typing_extensions import override

from common.data import data_ranks, geometry, global_seed, seed_all, step_seed
from common.run.ending import has_stopped, is_out_of_time
from common.run.trainer import RecipeTrainer


class EpochLoop(_TrainingEpochLoop):
    """The steps of an epoch. A resumed one begins with the validation that its checkpoint was made before.

    What hooks draw, with torch, NumPy or ``random``, is a function of the run's position.
    """

    after_step: Callable[[], None] = staticmethod(lambda: None)  # is called after each optimizer step
    validation_to_come = False  # whether the validation after the last step, if there is one, is not done
    trainer: RecipeTrainer
    metrics: Mapping[str, float] = {}  # that the checkpoint's run had logged
    states: Mapping[str, Any] = {}  # of callbacks, before a validation that is not done
    limits: Mapping[str, Any] = {}  # of early stopping, when the checkpoint was made

    @property
    def owes_validation(self) -> bool:
        """Whether a resumed run begins with a validation."""
        return self.restarting and self.validation_to_come and self._should_check_val_fx(None)  # type: ignore[arg-type]

    @property
    @override
    def done(self) -> bool:
        if self.owes_validation:
            return False
        return self._is_training_done if self.restarting else super().done

    @override
    def run(self, data_fetcher: Any) -> None:
        try:
            super().run(data_fetcher)
        finally:
            self.trainer.in_step = False
        self.restarting = False  # where nothing of the epoch was left to do

    @override
    def advance(self, data_fetcher: Any) -> None:
        trainer = self.trainer
        trainer.in_step = True
        if self.owes_validation:
            self._batches_that_stepped -= 1  # which loggers count after the validation
            return  # on_advance_end validates
        self.restarting = False  # Lightning's own guesses about what has been done stay out
        self.validation_to_come = True
        # As the module's own seed, which it sets again once the batch is read.
        seed = step_seed(global_seed(), data_ranks(trainer)[1], self.total_batch_idx + 1)
        seed_all(seed, trainer.strategy.root_device)
        super().advance(data_fetcher)
        if trainer.lightning_module.ends_step:
            self.after_step()

    @override
    def on_advance_end(self, data_fetcher: Any) -> None:
        self.validation_to_come = False
        if self._should_check_val_fx(data_fetcher):
            # A run that is stopped inside a validation repeats it.
            states = {each.state_key: each.state_dict() for each in self.trainer.callbacks}  # type: ignore[attr-defined]
            states = {key: state for key, state in states.items() if state}
            self.states = copy.deepcopy(move_data_to_device(states, torch.device("cpu")))
            _seed(self.trainer, 1)
        super().on_advance_end(data_fetcher)
        self.states = {}
        self.trainer.in_step = not self.trainer.lightning_module.ends_step

    @override
    def on_save_checkpoint(self) -> dict[str, Any]:
        metrics = {name: value.item() for name, value in self.trainer.callback_metrics.items()}
        limits = {each.state_key: _limits(each) for each in self.trainer.early_stopping_callbacks}
        return {"metrics": metrics, "limits": limits, "validation_to_come": self.validation_to_come}

    @override
    def on_load_checkpoint(self, state_dict: dict[str, Any]) -> None:
        self.metrics, self.limits = state_dict["metrics"], state_dict.get("limits", {})
        self.validation_to_come = state_dict["validation_to_come"]

    @override
    def _broadcast_sigterm_tensor(self) -> None:
        """Lightning's makes every micro-batch wait for the device."""


class FitLoop(_FitLoop):
    """The epochs of a run.

    Where a resumed run goes on follows from one number, the micro-batches that have been trained. Lightning guesses it
    from several counters: with ``max_epochs`` and ``max_steps`` given, a run that went on from an epoch's end trained
    an epoch fewer.
    """

    epoch_loop: EpochLoop  # type: ignore[assignment]

    @property
    @override
    def done(self) -> bool:
        ends = self.epoch_loop.restarting and self.epoch_loop.batch_progress.is_last_batch
        # What comes after the last step of an epoch, or of the run, is still to be done.
        return not (ends or self.epoch_loop.owes_validation) and super().done

    @override
    def on_run_start(self) -> None:
        # What stops a run at the end of an epoch reads them. The sanity check has cleared them.
        known = self.epoch_loop.metrics
        metrics = {name: torch.tensor(value, dtype=torch.float64) for name, value in known.items()}
        self.trainer.callback_metrics.update(metrics)
        super().on_run_start()

    @override
    def on_advance_start(self) -> None:
        _seed(self.trainer, 2)
        super().on_advance_start()

    @override
    def on_advance_end(self) -> None:
        if is_out_of_time(self.trainer) and not self.epoch_loop.batch_progress.is_last_batch:
            return  # the next start goes on in this epoch
        _seed(self.trainer, 3)
        super().on_advance_end()

    @override
    def load_state_dict(self, state_dict: dict[str, Any], prefix: str = "") -> None:
        super().load_state_dict(state_dict, prefix)
        steps, per_epoch = self.epoch_loop, geometry(self.trainer)["per_epoch"]
        epochs: Any = self.epoch_progress
        batches: Any = steps.batch_progress
        trained = batches.total.processed
        epoch, inside = divmod(trained, per_epoch)
        if trained and not inside and epochs.total.processed < epoch:
            epoch, inside = epoch - 1, per_epoch  # made before the epoch's end was told to callbacks
        batches.is_last_batch = inside == per_epoch
        begun = epoch + (inside > 0)
        for counts in (epochs.total, epochs.current):
            counts.ready, counts.started, counts.processed, counts.completed = begun, begun, epoch, epoch
        for counts, number in ((batches.total, trained), (batches.current, inside)):
            counts.ready = counts.started = counts.processed = counts.completed = number
        steps._batches_that_stepped = steps.global_step
        EpochLoop.restarting.fset(self, False)  # type: ignore[attr-defined]  # of all loops
        self._restarting = steps._restarting = inside > 0
        for callback in self.trainer.early_stopping_callbacks:
            if steps.limits.get(callback.state_key) != _limits(callback) and callback.wait_count < callback.patience:
                callback.stopping_reason = EarlyStoppingReason.NOT_STOPPED  # the limits that are given now win
        self.trainer.should_stop = any(map(has_stopped, self.trainer.early_stopping_callbacks))


def _seed(trainer: L.Trainer, place: int) -> None:
    """Seed what hooks between steps draw, on all ranks alike; ``place`` tells apart hooks of one position."""
    step = trainer.fit_loop.epoch_loop.total_batch_idx + 1  # 0 before the first
    seed_all(step_seed(global_seed(), 0, 0, step, place), trainer.strategy.root_device)


def _limits(callback: EarlyStopping) -> list[Any]:
    return [callback.patience, callback.stopping_threshold, callback.divergence_threshold]
