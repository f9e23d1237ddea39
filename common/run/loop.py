"""The loops of training. A resumed run goes on exactly where its checkpoint was made."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from typing_extensions import override

from common.data import geometry


class EpochLoop(_TrainingEpochLoop):
    """The steps of an epoch. A resumed one begins with the validation that its checkpoint was made before."""

    after_step: Callable[[], None] = staticmethod(lambda: None)  # is called after each optimizer step
    validation_to_come = False  # whether the validation after the last step, if there is one, is not done
    metrics: Mapping[str, float] = {}  # that the checkpoint's run had logged

    @property
    def owes_validation(self) -> bool:
        """Whether a resumed run begins with a validation."""
        return self.restarting and self.validation_to_come and self._should_check_val_fx(None)  # type: ignore[arg-type]

    @property
    @override
    def done(self) -> bool:
        if self.owes_validation:
            return False
        # What stops a run, as the time given, waits for the end of an optimizer step.
        inside = self.batch_progress.current.ready > 0 and not self.trainer.lightning_module.ends_step
        return self._is_training_done if self.restarting or inside else super().done

    @override
    def run(self, data_fetcher: Any) -> None:
        super().run(data_fetcher)
        self.restarting = False  # where nothing of the epoch was left to do

    @override
    def advance(self, data_fetcher: Any) -> None:
        if self.owes_validation:
            self._batches_that_stepped -= 1  # which loggers count after the validation
            return  # on_advance_end validates
        self.restarting = False  # Lightning's own guesses about what has been done stay out
        self.validation_to_come = True
        super().advance(data_fetcher)
        if self.trainer.lightning_module.ends_step:
            self.after_step()

    @override
    def on_advance_end(self, data_fetcher: Any) -> None:
        self.validation_to_come = False
        super().on_advance_end(data_fetcher)

    @override
    def _should_check_val_fx(self, data_fetcher: Any) -> bool:
        # Lightning validates once more where a run is stopped, as by the time given. One that goes on has not done so.
        stops, self.trainer.should_stop = self.trainer.should_stop, False
        try:
            return super()._should_check_val_fx(data_fetcher)
        finally:
            self.trainer.should_stop = stops

    @override
    def on_save_checkpoint(self) -> dict[str, Any]:
        metrics = {name: value.item() for name, value in self.trainer.callback_metrics.items()}
        return {"metrics": metrics, "validation_to_come": self.validation_to_come}

    @override
    def on_load_checkpoint(self, state_dict: dict[str, Any]) -> None:
        self.metrics, self.validation_to_come = state_dict["metrics"], state_dict["validation_to_come"]

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
        self.trainer.should_stop = any(map(_has_stopped, self.trainer.early_stopping_callbacks))


def _has_stopped(callback: EarlyStopping) -> bool:
    """Whether a callback has ended the checkpoint's run, and the patience that is given now would end it too."""
    if callback.stopping_reason == EarlyStoppingReason.PATIENCE_EXHAUSTED:
        return callback.wait_count >= callback.patience
    return callback.stopping_reason != EarlyStoppingReason.NOT_STOPPED
