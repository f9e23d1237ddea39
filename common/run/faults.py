"""How ranks end together: at the same step when one is sent a signal, and soon when one of them is lost."""

import atexit
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from typing_extensions import override

from common.errors import LOST_RANK_EXIT, InputError, Stopped, signal_name
from common.run.callbacks import LastCheckpoint
from common.run.loop import EpochLoop
from common.run.signals import Signals

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


def compare_ranks(trainer: L.Trainer, facts: dict[str, Any]) -> None:
    """Refuse ranks that were started otherwise than rank 0.

    Args:
        trainer: the trainer; its strategy is set up.
        facts: what must be equal, at any depth.

    Raises:
        InputError: a fact differs on some rank.
    """
    mine = dict(_flat(facts))
    theirs = trainer.strategy.broadcast(mine)
    wrong = next((key for key in sorted({*mine, *theirs}) if mine.get(key) != theirs.get(key)), None)
    if not trainer.strategy.reduce_boolean_decision(wrong is None):
        problem = f"{wrong} is {mine.get(wrong)} here and {theirs.get(wrong)} on rank 0" if wrong else "one differs"
        fix = "start all ranks with the same command and code"
        raise InputError(f"rank {trainer.global_rank}: the ranks were started differently: {problem}; {fix}")


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else ()
    if not items:
        yield key, value
    for name, item in items:
        yield from _flat(item, f"{key}.{name}" if key else str(name))


ENDED = b"ended"  # the last sign of life of a rank that has done its work


class Ranks:
    """A line between all ranks beside their collectives: signs of life, and where to stop.

    A thread writes this rank's sign of life to a store of rank 0 and reads the others'. A second one ends the process
    when one of them is missing for too long, or when the store is: then the first one hangs. Collectives keep their own
    limits, so one that waits for a slow rank kills nobody.

    Ranks count ticks: optimizer steps and batches of validation, the same on all ranks. A rank that is asked to stop
    tells which tick it is in and begins no other. The latest of all is where all stop. No rank waits for one that
    waits for it, as collectives of that tick have been entered.

    Args:
        trainer: the trainer; its strategy is set up.
    """

    limit = 45.0  # seconds without a sign of life, after which a rank is given up

    def __init__(self, trainer: L.Trainer):
        self.rank, self.size = trainer.global_rank, trainer.world_size
        self.asked = 0  # the signal for which all ranks stop
        self._signal = 0  # that this rank has received
        self._tick, self._last_tick, self._stop_at = 0, -1, threading.Event()
        self._lock, self._ended, self._done = threading.Lock(), threading.Event(), False
        self._heard = time.monotonic()  # from the store
        self._lives = [(b"", self._heard)] * self.size  # sign of life of each rank, and since when it is the same
        self._places: list[str] = []
        self.every = max(0.5, self.size / 500)  # seconds between signs of life
        if self.size > 1:
            self._store = self._connect(trainer)
            self._talks = threading.Thread(target=self._talk, daemon=True)
            self._talks.start()
            threading.Thread(target=self._judge, daemon=True).start()

    def _connect(self, trainer: L.Trainer) -> TCPStore:
        limit = timedelta(seconds=300)
        server = (
            TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False, timeout=limit) if not self.rank else None
        )
        host = os.environ.get("MASTER_ADDR", socket.gethostname()) if trainer.num_nodes > 1 else "127.0.0.1"
        host, port = trainer.strategy.broadcast((host, server.port if server else 0))
        store = server or TCPStore(host, port, is_master=False, timeout=limit)
        store.set(f"life/{self.rank}", "0")
        place = str(os.getpid())
        with suppress(OSError):
            place = _place(os.getpid())
        store.set(f"place/{self.rank}", place)
        self._places = [place.decode() for place in store.multi_get([f"place/{rank}" for rank in range(self.size)])]
        return store

    def ask(self, number: int) -> None:
        """Ask all ranks to stop, as this one has received a signal."""
        self._signal = number
        if self.size == 1:
            self.asked, self._last_tick = number, self._tick
            self._stop_at.set()

    def tick(self) -> bool:
        """Count a tick; whether all ranks stop after it."""
        with self._lock:
            if not self.asked:
                self._tick += 1
                return False
        self._stop_at.wait()
        stops = self._tick >= self._last_tick
        self._tick += 1
        return stops

    def end(self, done: bool, patience: float = 600.0) -> None:
        """Leave.

        Args:
            done: whether this rank has done its work; then it tells the others, who may have more. One that has failed
                is given up by them.
            patience: seconds that rank 0, which has the store, waits for the others.
        """
        if self.size > 1 and done:
            self._done, until = True, time.monotonic() + patience
            while not self.rank and time.monotonic() < until and not all(map(self._has_left, self._lives[1:])):
                time.sleep(0.05)
        self._ended.set()
        if self.size > 1:
            self._talks.join(timeout=2.0)  # longer, and the store's rank is lost

    def _has_left(self, life: tuple[bytes, float]) -> bool:
        return life[0] == ENDED or time.monotonic() - life[1] > 10 * self.every

    def _talk(self) -> None:
        number, keys = 0, [f"life/{rank}" for rank in range(self.size)]
        with suppress(Exception):  # the store's rank has ended; _judge gives this one time to find out why
            while not self._ended.is_set():
                number += 1
                self._store.set(keys[self.rank], ENDED.decode() if self._done else str(number))
                if self._signal and not self.asked:
                    self._store.compare_set("signal", "", str(self._signal))
                now = time.monotonic()
                for rank, life in enumerate(self._store.multi_get(keys)):
                    if self._lives[rank][0] != life:
                        self._lives[rank] = life, now
                if not self._stop_at.is_set() and self._store.check(["signal"]):
                    self._agree()
                self._heard = time.monotonic()
                self._ended.wait(self.every)
            if self._done:
                self._store.set(keys[self.rank], ENDED.decode())

    def _agree(self) -> None:
        with self._lock:
            if not self.asked:
                self.asked = int(self._store.get("signal"))
                self._store.set(f"tick/{self.rank}", str(self._tick))
        keys = [f"tick/{rank}" for rank, (life, _) in enumerate(self._lives) if life != ENDED]
        if self._store.check(keys):
            self._last_tick = max(map(int, self._store.multi_get(keys)))
            self._stop_at.set()

    def _judge(self) -> None:
        before = time.monotonic()
        while not self._ended.wait(self.every):
            now = time.monotonic()
            if now - before > 10 * self.every:  # this process has slept, and with it perhaps all others
                self._heard, self._lives = now, [(life, now) for life, _ in self._lives]
            before = now
            since = [now if life == ENDED else since for life, since in self._lives]
            if self._lives[0][0] != ENDED:
                since[0] = self._heard  # rank 0 has the store
            if lost := [rank for rank, last in enumerate(since) if now - last > self.limit and rank != self.rank]:
                self._give_up(lost[0])

    def _give_up(self, lost: int) -> None:
        pid = int(self._places[lost].split()[0])
        with suppress(OSError):
            if _place(pid) == self._places[lost]:  # it may have been stopped, and would stay
                os.kill(pid, signal.SIGKILL)
        problem = f"no sign of life of rank {lost} for {self.limit:.0f} s"
        goes_on = "; --ckpt_path last goes on from the last checkpoint" if self._tick else ""
        sys.stderr.write(f"rank {self.rank}: another rank has ended ({problem}){goes_on}\n")
        sys.stderr.flush()
        os._exit(LOST_RANK_EXIT)  # the main thread waits for the lost one


def _place(pid: int) -> str:
    """What tells a process from all others, on other machines too; where there is no /proc, nothing does.

    Raises:
        OSError: there is no such process.
    """
    started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{pid} {started} {machine} {os.readlink(f'/proc/{pid}/ns/pid')}"


class Endings(Callback):
    """Ends training on all ranks at the same step, with a new ``last.ckpt``, when any of them is sent a signal.

    Lightning's own handler talks to other ranks from wherever the signal finds it, which can lock them up, hears rank 0
    only, and ends with exit code 0; it also makes every micro-batch wait for the device.

    Args:
        signals: what this process has received.
    """

    def __init__(self, signals: Signals):
        self.signals = signals
        self.ranks: Ranks | None = None

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        self.ranks = Ranks(trainer)
        self.signals.tell = self.ranks.ask

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._leave(done=True)

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        loop = trainer.fit_loop.epoch_loop
        if trainer.validating and isinstance(loop, EpochLoop) and loop.validation_to_come:
            checkpoint["callbacks"] = loop.states  # the resumed run repeats the whole validation

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._leave(done=isinstance(exception, Stopped), patience=10.0)  # all stop

    def _leave(self, done: bool, patience: float = 600.0) -> None:
        self.signals.waits, self.signals.tell = False, lambda number: None
        if self.ranks is not None:
            self.ranks.end(done, patience)
        self.ranks = None

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.signals.waits = True
        assert isinstance(trainer.fit_loop.epoch_loop, EpochLoop)
        trainer.fit_loop.epoch_loop.after_step = lambda: self._tick(trainer)

    @override
    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:  # type: ignore[override]
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._tick(trainer)

    def _tick(self, trainer: L.Trainer) -> None:
        """Stop here if all ranks do."""
        ranks, loop = self.ranks, trainer.fit_loop.epoch_loop
        assert ranks is not None
        assert isinstance(loop, EpochLoop)
        if not ranks.tick():
            return
        loop.validation_to_come = True
        saved = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, LastCheckpoint)]
        for callback in saved:
            callback.save(trainer)
        number = self.signals.received or ranks.asked
        who = f"rank {ranks.rank}: " if ranks.size > 1 else ""
        to = "" if ranks.size == 1 else " to this rank" if self.signals.received else " to another rank"
        hint = "; --ckpt_path last goes on from here" if saved and not trainer.fast_dev_run else ""  # type: ignore[attr-defined]
        raise Stopped(f"{who}{signal_name(number)}{to} after step {trainer.global_step}{hint}", 128 + number)
