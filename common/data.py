"""The shared DataModule: batches as a pure function of the seed, and evaluation that counts every sample once.

A data set here maps a list of positions to a whole batch, a ``NamedTuple`` whose last field is ``mask``. So one
vectorized read gathers arrays and token files, not one read per sample.
"""

import atexit
import ctypes
import functools
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from common.errors import ENDING, InputError
from common.parts import facts_of


@runtime_checkable
class BatchDataset(Protocol):
    """A recipe's data set: a length, and a batch for a list of positions.

    One whose reading takes time, as decoding images does, has a true attribute ``decodes``: workers read it.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Sequence[int], /) -> Any: ...


class Positions(NamedTuple):
    """One micro-batch of one rank: its samples, the number of real ones, and the seed of its randomness."""

    indices: list[int]
    num_real: int
    seed: int


def global_seed() -> int:
    """The run's seed (``seed_everything``), the same on every rank."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


@functools.lru_cache(maxsize=8)  # hooks and the net of one micro-batch ask for the same
def step_seed(*parts: int) -> int:
    """A seed in [0, 2**63) from whole numbers such as (seed, rank, step); sums of them would collide."""
    # Their number comes first: SeedSequence pads with zeros, so (seed,) and (seed, 0) would collide.
    return int(np.random.SeedSequence((len(parts), *parts)).generate_state(1, np.uint64)[0] >> 1)


def data_ranks(trainer: L.Trainer) -> tuple[int, int]:
    """World size and rank as samplers see them: ranks that share samples count as one."""
    asked = facts_of(trainer.strategy)
    together = asked.ranks_per_batch
    return rank_groups(trainer.world_size, together, asked.ranks_per_batch_key), trainer.global_rank // together


def rank_groups(ranks: int, together: int, key: str = "trainer.strategy.tensor_parallel") -> int:
    """The number of groups that ``ranks`` form if ``together`` of them share each sample; ``key`` is the setting.

    Raises:
        InputError: the ranks do not divide into such groups.
    """
    if together < 1:
        raise InputError(f"{key}: must be at least 1, got {together}")
    if ranks % together:
        problem = f"{together} is no divisor of {ranks} ranks"
        raise InputError(f"{key}: {problem}; take another, or --trainer.devices")
    return ranks // together


def seed_draws(seed: int, device: torch.device | None = None) -> None:
    """``torch.manual_seed`` for the host and, if given, one device.

    ``torch.manual_seed`` itself formats a stack trace for every missing kind of device: half a millisecond per batch.
    """
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def seed_all(seed: int, device: torch.device | None = None) -> None:
    """The same, and NumPy and Python's ``random``."""
    seed_draws(seed, device)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def batches_per_epoch(num_batches: int, trainer: L.Trainer) -> int:
    """Micro-batches of an epoch after ``trainer.limit_train_batches``, a number or a share.

    Raises:
        InputError: none is left, or the last optimizer step has fewer; its samples would weigh less.
    """
    limit, accumulate = trainer.limit_train_batches, trainer.accumulate_grad_batches
    if limit is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return num_batches
    left = min(num_batches, limit) if isinstance(limit, int) else int(num_batches * limit)
    if not left:
        raise InputError(f"trainer.limit_train_batches {limit} leaves none of {num_batches} batches; raise it")
    if left % accumulate:
        problem = f"leaves {left} micro-batches, no multiple of accumulate_grad_batches {accumulate}"
        raise InputError(f"trainer.limit_train_batches {limit} {problem}; try {left + accumulate - left % accumulate}")
    return left


class TrainSampler(Sampler[Positions]):
    """Micro-batches as a pure function of (seed, epoch, micro-step), so a run can stop and resume anywhere.

    The trainer's own counters give the position; nothing is saved. Rank r takes every world-th sample of each global
    batch, so the order does not depend on the number of ranks. An epoch holds only whole effective batches (batch size
    x ranks x accumulation), so every optimizer step averages the same number of samples. Ranks that share samples, as
    in tensor parallelism, count as one.

    Args:
        num_samples: size of the data set.
        batch_size: samples per rank and micro-batch.
        trainer: the trainer that uses it.

    Raises:
        InputError: the samples do not fill one effective batch.
    """

    def __init__(self, num_samples: int, batch_size: int, trainer: L.Trainer):
        self.num_samples, self.batch_size, self.trainer = num_samples, batch_size, trainer
        world, _ = data_ranks(trainer)
        self.global_batch = batch_size * world
        accumulate = trainer.accumulate_grad_batches
        self.num_batches = num_samples // (self.global_batch * accumulate) * accumulate
        if not self.num_batches:
            raise InputError(
                f"data.batch_size {batch_size} x {world} ranks x {accumulate} accumulated = "
                f"{self.global_batch * accumulate} > {num_samples} training samples; lower it"
            )

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Positions]:
        trainer, seed = self.trainer, global_seed()
        per_epoch = batches_per_epoch(self.num_batches, trainer)
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress
        epoch, start = divmod(progress.total.processed, per_epoch)
        generator = torch.Generator().manual_seed(step_seed(seed, epoch))
        order = torch.randperm(self.num_samples, generator=generator)
        world, rank = data_ranks(trainer)
        for step in range(start, per_epoch):
            first = step * self.global_batch
            mine = order[first + rank : first + self.global_batch : world]
            yield Positions(mine.tolist(), self.batch_size, step_seed(seed, epoch, step, rank))


def geometry(trainer: L.Trainer) -> dict[str, int]:
    """The sizes that give a position its meaning: samples per global batch, micro-batches per epoch and per step."""
    sampler: TrainSampler = trainer.datamodule.train_dataloader().sampler  # type: ignore[attr-defined]
    per_epoch = batches_per_epoch(sampler.num_batches, trainer)
    return {"batch": sampler.global_batch, "per_epoch": per_epoch, "per_step": trainer.accumulate_grad_batches}


def move_position(progress: dict[str, Any], before: dict[str, int], now: dict[str, int]) -> None:
    """Convert a checkpoint's count of micro-batches to another :func:`geometry`, rounded down to a whole step.

    Args:
        progress: state of Lightning's ``batch_progress``, changed in place.
        before: the checkpoint's geometry.
        now: this run's geometry.
    """
    epochs, inside = divmod(progress["total"]["processed"], before["per_epoch"])
    steps = inside * before["batch"] // (now["batch"] * now["per_step"])
    moved = min(steps * now["per_step"], now["per_epoch"])
    at_end = not inside and progress["current"]["processed"]
    for count, to in (
        (progress["total"], epochs * now["per_epoch"] + moved),
        (progress["current"], now["per_epoch"] if at_end else moved),
    ):
        shift = to - count["processed"]
        count.update({key: max(value + shift, 0) for key, value in count.items()})


class EvalSampler(Sampler[Positions]):
    """Every sample once, in order, with the same number of batches on every rank.

    A rank with a shorter share repeats the last sample; ``num_real`` masks the repetitions. Unequal counts would hang a
    sharded strategy; unmasked repetitions would count twice.
    """

    def __init__(self, num_samples: int, batch_size: int, trainer: L.Trainer):
        self.num_samples, self.batch_size, self.trainer = num_samples, batch_size, trainer

    def __len__(self) -> int:
        return -(-self.num_samples // (self.batch_size * data_ranks(self.trainer)[0]))

    def positions(self, batch: int, samples: int) -> list[int]:
        """Where the first samples of this rank's n-th batch are in the data set."""
        world, rank = data_ranks(self.trainer)
        return [rank + world * (batch * self.batch_size + k) for k in range(samples)]

    def __iter__(self) -> Iterator[Positions]:
        world, rank = data_ranks(self.trainer)
        per_rank = -(-self.num_samples // world)
        for first in range(0, per_rank, self.batch_size):
            wanted = [rank + world * k for k in range(first, min(first + self.batch_size, per_rank))]
            indices = [min(index, self.num_samples - 1) for index in wanted]
            yield Positions(indices, sum(index < self.num_samples for index in wanted), step_seed(global_seed(), first))


class _Batches(Dataset[Any]):
    """Reads one :class:`Positions` as a masked batch, under its seed."""

    def __init__(self, dataset: BatchDataset):
        self.dataset = dataset

    def __getitem__(self, positions: Positions) -> Any:
        # Random transforms in a data set then depend on the batch alone, not on the worker.
        seed_all(positions.seed)
        batch = self.dataset[positions.indices]
        return batch._replace(mask=torch.arange(len(positions.indices)) < positions.num_real)


@atexit.register
def _end_readers() -> None:
    """End reading processes that a fit has left in the middle of a loader; they ignore the signal that Python sends."""
    readers = [process for process in multiprocessing.active_children() if process.daemon]
    if readers and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where torch would say that one has ended
    for process in readers:
        process.kill()


LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # here: a forked process may not load it
PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Let the kernel end this process, which has just been made, when its parent is killed (prctl(2), on Linux)."""
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _begin_reading(worker: int) -> None:
    end_with_parent()
    # Terminals and launchers signal a whole process group; the training process ends its workers after it has saved.
    for name in ENDING:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class BaseDataModule(L.LightningDataModule):
    """Loaders over the data sets that a recipe's ``setup`` assigns.

    A subclass sets ``train_data``, ``val_data``, ``test_data`` and ``predict_data`` in :meth:`setup`, as it needs them.
    Without samples for testing ``test_data`` is ``val_data``.
    When it is made it sets ``facts``: what gives a net's inputs and outputs their meaning, such as class names or a
    tokenizer, as plain values. Checkpoints keep them. A data module with an argument ``facts_of`` gets the checkpoint
    that a command is about. For ``predict`` it may set ``kept``: columns of the source that are written beside the
    predictions, by their ``index``. ``other_steps`` is how many optimizer steps more a checkpoint was trained than its
    position in the data at hand says; below 0 if they have grown since.

    Args:
        batch_size: samples per rank and micro-batch in training.
        eval_batch_size: the same in evaluation; None for ``batch_size``.
        num_workers: reading processes per loader; 0 reads in the training process. None for this rank's share of the
            machine's cores if images are decoded, at most 8; of other data for 2 on GPUs, which would wait otherwise,
            else 0.

    Raises:
        InputError: a number is too small.
    """

    train_data: BatchDataset
    val_data: BatchDataset
    test_data: BatchDataset
    predict_data: BatchDataset
    facts: Mapping[str, Any] = {}
    kept: Mapping[str, Sequence[Any]] = {}
    other_steps: int = 0

    def __init__(self, batch_size: int = 32, eval_batch_size: int | None = None, num_workers: int | None = None):
        super().__init__()
        self.save_hyperparameters(logger=False, ignore=["facts_of", "init_from"])  # they are of one command
        self.batch_size, self.num_workers = batch_size, num_workers
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        for key, least in (("batch_size", 1), ("eval_batch_size", 1), ("num_workers", 0)):
            if (value := getattr(self, key)) is not None and value < least:
                raise InputError(f"data.{key} must be at least {least}, got {value}")

    @property
    def _trainer(self) -> L.Trainer:
        assert self.trainer is not None, "loaders are made by a Trainer"
        return self.trainer

    def loader(self, dataset: BatchDataset, sampler: Sampler[Positions]) -> DataLoader[Any]:
        """Batches of a data set, in a sampler's order."""
        on_gpu = torch.cuda.is_available() and self._trainer.strategy.root_device.type == "cuda"
        workers = 2 * on_gpu
        if getattr(dataset, "decodes", False):
            workers = max(1, min(8, num_cores() // self._trainer.num_devices))
        return DataLoader(
            _Batches(dataset),
            batch_size=None,
            sampler=sampler,
            num_workers=workers if self.num_workers is None else self.num_workers,
            pin_memory=on_gpu,
            persistent_workers=False,
            worker_init_fn=_begin_reading,
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """Seeded, resumable batches of the training data."""
        return self.loader(self.train_data, TrainSampler(len(self.train_data), self.batch_size, self._trainer))

    def _eval_loader(self, dataset: BatchDataset) -> DataLoader[Any]:
        return self.loader(dataset, EvalSampler(len(dataset), self.eval_batch_size, self._trainer))

    def val_dataloader(self) -> DataLoader[Any]:
        """Every validation sample once, padded and masked."""
        return self._eval_loader(self.val_data)

    def test_dataloader(self) -> DataLoader[Any]:
        """Every test sample once, padded and masked."""
        return self._eval_loader(self.test_data)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Every sample to predict once, padded and masked."""
        return self._eval_loader(self.predict_data)


def read_batch(trainer: L.Trainer, stage: str, first: int, count: int) -> Any:
    """Up to ``count`` samples of a stage from ``first`` on, as a batch on the run's device and in its precision."""
    data = getattr(trainer.datamodule, f"{stage}_data")  # type: ignore[attr-defined]
    return read_samples(trainer, stage, list(range(first, min(first + count, len(data)))))


def read_samples(trainer: L.Trainer, stage: str, positions: list[int]) -> Any:
    """The samples at some positions of a stage, likewise."""
    data = getattr(trainer.datamodule, f"{stage}_data")  # type: ignore[attr-defined]
    return trainer.precision_plugin.convert_input(trainer.strategy.batch_to_device(data[positions]))


def total_steps(trainer: L.Trainer) -> int:
    """Optimizer steps of the whole run by its settings; -1 if it has no end.

    ``trainer.estimated_stepping_batches`` would load the data before a checkpoint is restored, and a resumed run would
    lose its position.
    """
    limits = [trainer.max_steps] if trainer.max_steps >= 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        epoch = geometry(trainer)
        steps = epoch["per_epoch"] // epoch["per_step"] * trainer.max_epochs
        limits.append(steps + trainer.datamodule.other_steps)  # type: ignore[attr-defined]
    return min(limits, default=-1)
