"""Runs that are ended from outside: SIGTERM, and ranks that are lost. How ranks leave one another at the end."""

import atexit
import re
import signal
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from common.errors import SIGTERM_EXIT, Stopped
from common.run.callbacks import LastCheckpoint

# What gloo, NCCL and Horovod say when the other end is gone.
_LOST = re.compile(
    r"Connection (?:closed|reset|refused)(?: by peer)?|Broken pipe|remote process (?:has )?exited|"
    r"[Tt]imed out|Timeout|Socket closed|Horovod has been shut down"
)


@atexit.register
def _leave_ranks() -> None:
    """Give gloo's threads the time to let go of the last tensors that they have sent.

    For that they need the interpreter's lock, and a process whose interpreter ends meanwhile is aborted.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        time.sleep(0.05)  # without the lock; more than one of the threads may be waiting for it


def lost_rank(error: Exception) -> str | None:
    """What an error says about the loss of another rank; None if it is about anything else."""
    message = str(error)
    found = _LOST.search(message)
    about_ranks = isinstance(error, torch.distributed.DistError) or "gloo" in message or "Horovod" in message
    return found[0] if found and about_ranks else None


class StopOnSigterm(Callback):
    """Ends training on all ranks at the same step, with a new ``last.ckpt``, when any of them is sent SIGTERM.

    Lightning's own handler talks to other ranks from wherever the signal finds it, which can lock them up, hears rank 0
    only, and ends with exit code 0; it also makes every micro-batch wait for the device. Here the ranks ask one another
    after the first step and about every five seconds from then on.
    """

    seconds = 5.0

    def __init__(self) -> None:
        self._received = False

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        connector: Any = trainer._signal_connector
        connector._original_handlers = connector._get_current_signal_handlers()  # which Lightning puts back at the end
        connector._register_signal(signal.SIGTERM, self._note)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step, self._since, self._due = trainer.global_step, time.perf_counter(), trainer.global_step + 1

    def _note(self, *_: Any) -> None:
        self._received = True

    @override
    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step < self._due:
            return
        elapsed = time.perf_counter() - self._since
        mine = torch.tensor([float(self._received), elapsed], device=trainer.strategy.root_device)
        received, elapsed = trainer.strategy.reduce(mine, reduce_op="max").tolist()
        if received:
            saved = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, LastCheckpoint)]
            for callback in saved:
                callback.save(trainer)
            where = "this rank" if self._received else "another rank"
            hint = "; --ckpt_path last goes on from here" if saved else ""
            raise Stopped(f"rank {trainer.global_rank}: SIGTERM to {where} after step {step}{hint}", SIGTERM_EXIT)
        self._due = step + max(int(self.seconds * (step - self._step) / elapsed), 1)
        self._step, self._since = step, time.perf_counter()
