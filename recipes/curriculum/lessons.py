"""Lessons: number, length and difficulty of a step's samples, by the tokens that training has seen.

A lesson depends on the count of tokens alone. The checkpoint holds that count, so a resumed run continues the lessons.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import lightning as L
import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from common.data import Positions, TrainSampler, batches_per_epoch, data_ranks, global_seed, step_seed
from common.errors import InputError


@dataclass
class Pacing:
    """A share that grows with the tokens seen: ``(t / T (1 - c^p) + c^p)^(1/p)``, 1 from ``T`` on.

    Competence of Platanios et al. 2019, equations 6 to 8 (https://aclanthology.org/N19-1119).

    Args:
        start: the share ``c`` in the beginning, above 0.
        tokens: how many tokens ``T`` the growth takes, over all ranks.
        power: ``p``; 1 grows linearly, 2 faster at first (root competence).

    Raises:
        InputError: an argument is out of its range.
    """

    start: float
    tokens: int
    power: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.start <= 1:
            raise InputError(f"start must be above 0 and at most 1, got '{self.start:g}'; it is a share")
        if self.tokens < 1:
            raise InputError(f"tokens must be at least 1, got '{self.tokens}'; null leaves the stages out")
        if not 0 < self.power < math.inf:
            raise InputError(f"power must be above 0, got '{self.power:g}'; 1 grows linearly")

    def __call__(self, seen: int) -> float:
        """The share after so many tokens."""
        begin = self.start**self.power
        share = (min(seen / self.tokens, 1.0) * (1 - begin) + begin) ** (1 / self.power)
        return min(max(share, self.start), 1.0)  # rounding must not leave these bounds


class Lesson(NamedTuple):
    """Number, length and difficulty of an optimizer step's samples."""

    batch_size: int  # samples per rank and micro-batch
    length: int  # tokens per sample
    competence: float  # share of the samples, easiest first, to draw from


@runtime_checkable
class Curriculum(Protocol):
    """A data module with lessons."""

    tokens_seen: int  # by the optimizer steps so far, over all ranks

    def lesson(self, seen: int) -> Lesson:
        """The lesson of the next step after ``seen`` tokens."""
        ...


def halvings(share: float) -> int:
    """The number of halvings that bring 1 down to ``share`` or below."""
    return math.ceil(-math.log2(share))


class CurriculumSampler(TrainSampler):
    """Micro-batches of the present lesson; as in :class:`TrainSampler`, a pure function of the seed and the position.

    Each optimizer step has its slot in the epoch's random order; a smaller batch takes the slot's first samples. The
    numbers in a slot are places in the order of difficulty, scaled down to the share to draw from. At full competence
    an epoch sees every sample once.

    Args:
        order: numbers of the samples, the easiest first.
        batch_size: the largest number of samples per rank and micro-batch.
        data: gives the lessons and the tokens seen.
        trainer: the trainer that uses it.
    """

    def __init__(self, order: Int64[np.ndarray, " samples"], batch_size: int, data: Curriculum, trainer: L.Trainer):
        super().__init__(len(order), batch_size, trainer)
        self.by_difficulty: Int64[Tensor, " samples"] = torch.from_numpy(order)
        self.data = data

    def __iter__(self) -> Iterator[Positions]:
        trainer, seed, (world, rank) = self.trainer, global_seed(), data_ranks(self.trainer)
        per_epoch, accumulate = batches_per_epoch(self.num_batches, trainer), trainer.accumulate_grad_batches
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress
        epoch, start = divmod(progress.total.processed, per_epoch)
        generator = torch.Generator().manual_seed(step_seed(seed, epoch))
        order = torch.randperm(self.num_samples, generator=generator)
        seen, lesson = self.data.tokens_seen, self.data.lesson(self.data.tokens_seen)
        for step in range(start, per_epoch):
            if step % accumulate == 0:  # an optimizer step averages over equal micro-batches
                lesson = self.data.lesson(seen)
                seen += accumulate * world * lesson.batch_size * lesson.length
            inside, size = step % accumulate, lesson.batch_size * world
            first = (step - inside) * self.global_batch + inside * size
            mine = order[first + rank : first + size : world]
            allowed = max(math.ceil(lesson.competence * self.num_samples), 1)
            indices = self.by_difficulty[mine * allowed // self.num_samples].tolist()
            yield Positions(indices, len(indices), step_seed(seed, epoch, step, rank))
