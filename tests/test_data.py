"""The order of training samples, evaluation that counts each sample once, and randomness that belongs to the batch."""

import itertools
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor

from common.data import (
    BaseDataModule,
    EvalSampler,
    Positions,
    TrainSampler,
    batches_per_epoch,
    move_position,
    seed_draws,
    step_seed,
    total_steps,
)
from common.errors import InputError
from tests.support import Rank


def epoch_of(samples: int, batch: int, **trainer: Any) -> list[Positions]:
    """The micro-batches that one rank reads from here to the end of its epoch."""
    return list(TrainSampler(samples, batch, Rank(**trainer)))


# Training


@pytest.mark.parametrize("samples", [64, 67, 130])
@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_ranks_share_each_global_batch(samples: int, accumulate: int) -> None:
    """However many ranks: the same samples in the same order, each once, in whole effective batches."""
    orders = {}
    for world in (1, 2, 4):
        ranks = [epoch_of(samples, 8 // world, world=world, rank=rank, accumulate=accumulate) for rank in range(world)]
        assert {len(batches) for batches in ranks} == {samples // (8 * accumulate) * accumulate}
        assert all(len(batch.indices) == batch.num_real == 8 // world for batches in ranks for batch in batches)
        global_batches = zip(*ranks, strict=True)
        shared = [zip(*(batch.indices for batch in batches), strict=True) for batches in global_batches]
        orders[world] = [index for batches in shared for row in batches for index in row]
    assert orders[1] == orders[2] == orders[4]
    assert len(set(orders[1])) == len(orders[1]) == samples // (8 * accumulate) * 8 * accumulate
    assert set(orders[1]) <= set(range(samples))
    assert orders[1] != sorted(orders[1])


def test_each_epoch_and_seed_has_its_own_order(monkeypatch: pytest.MonkeyPatch) -> None:
    orders = []
    for seed, epoch in ((1, 0), (1, 0), (1, 1), (2, 0)):
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        orders.append([batch.indices for batch in epoch_of(40, 4, processed=10 * epoch)])
    assert orders[0] == orders[1]
    assert orders[0] != orders[2] != orders[3] != orders[0]
    # No permutation prefers a place: over many epochs each sample comes first about as often.
    firsts = [epoch_of(8, 1, processed=8 * epoch)[0].indices[0] for epoch in range(800)]
    assert all(60 < count < 140 for count in np.bincount(firsts, minlength=8))


@pytest.mark.parametrize("limit", [1.0, None, 8, 0.5, 100])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_position_is_read_off_the_counters(limit: float | None, accumulate: int) -> None:
    settings: dict[str, Any] = {"accumulate": accumulate, "limit": limit}
    sampler = TrainSampler(50, 4, Rank(**settings))
    length = {1.0: 12, None: 12, 8: 8, 0.5: 6, 100: 12}[limit]
    assert len(sampler) == 12
    assert batches_per_epoch(12, Rank(**settings)) == length
    run = [batch for epoch in range(3) for batch in epoch_of(50, 4, processed=epoch * length, **settings)]
    assert len(run) == 3 * length
    for done in range(len(run)):
        rest = epoch_of(50, 4, processed=done, **settings)
        assert rest == run[done : (done // length + 1) * length]


def test_random_numbers_differ_between_steps_and_ranks() -> None:
    batches = [epoch_of(40, 4, world=2, rank=rank, processed=5 * epoch) for rank in (0, 1) for epoch in range(4)]
    seeds = [batch.seed for some in batches for batch in some]
    assert len(set(seeds)) == len(seeds) == 40
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seeds_do_not_collide_as_sums_do() -> None:
    seeds = {parts: step_seed(*parts) for parts in itertools.product(range(30), repeat=3)}
    assert len(set(seeds.values())) == len(seeds)
    assert step_seed(1) != step_seed(1, 0) != step_seed(1, 0, 0)
    assert step_seed(2**32 - 1, 3) == step_seed(2**32 - 1, 3) != step_seed(2**32 - 1, 2)


def test_draws_are_those_of_torchs_seed() -> None:
    for seed in (0, step_seed(3, 1)):
        torch.manual_seed(seed)
        expected = torch.rand(5)
        seed_draws(seed, torch.device("cpu"))
        assert torch.equal(torch.rand(5), expected)


def test_too_few_samples_are_refused() -> None:
    assert len(TrainSampler(24, 4, Rank(world=2, accumulate=3))) == 3
    with pytest.raises(InputError, match=r"data.batch_size 4 x 2 ranks x 3 accumulated = 24 > 23 training samples"):
        TrainSampler(23, 4, Rank(world=2, accumulate=3))


@pytest.mark.parametrize("limit", [0, 0.0, 0.05])
def test_an_epoch_must_keep_a_batch(limit: float) -> None:
    with pytest.raises(InputError, match=rf"trainer.limit_train_batches {limit} leaves none of 12 batches"):
        batches_per_epoch(12, Rank(limit=limit))


@pytest.mark.parametrize("limit", [7, 0.6])
def test_an_epoch_must_keep_whole_steps(limit: float) -> None:
    problem = rf"limit_train_batches {limit} leaves 7 micro-batches, no multiple of accumulate_grad_batches 2; try 8"
    with pytest.raises(InputError, match=problem):
        batches_per_epoch(12, Rank(limit=limit, accumulate=2))


def test_a_position_moves_with_the_samples() -> None:
    """Two ranks instead of one, and steps of two micro-batches: the next whole step takes the next samples."""
    before = {"batch": 4, "per_epoch": 12, "per_step": 1}
    now = {"batch": 8, "per_epoch": 6, "per_step": 2}
    for done, moved, at_end in [
        (0, 0, 0),
        (3, 0, 0),
        (4, 2, 0),
        (7, 2, 0),
        (11, 4, 0),
        (12, 6, 6),
        (16, 8, 0),
        (24, 12, 6),
    ]:
        inside = done % 12 or (12 if done else 0)
        counts = {"ready": 0, "started": 0, "processed": 0, "completed": -1}  # as when a step is saved
        progress: dict[str, Any] = {
            "total": {key: max(done + lag, 0) for key, lag in counts.items()},
            "current": {key: max(inside + lag, 0) for key, lag in counts.items()},
        }
        move_position(progress, before, now)
        assert progress["total"]["ready"] == progress["total"]["processed"] == moved, done
        assert progress["total"]["completed"] == max(moved - 1, 0), done
        assert progress["current"]["processed"] == (at_end or moved % 6), done
        assert moved * 8 <= done * 4 < (moved + 2) * 8
    progress = {"total": {"processed": 3}, "current": {"processed": 3}}
    move_position(progress, now, before)
    assert progress == {"total": {"processed": 6}, "current": {"processed": 6}}


# Evaluation


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_evaluation_counts_each_sample_once(world: int) -> None:
    for samples, batch in itertools.product([1, 2, 3, 5, 7, 8, 12, 29, 30, 31, 64, 97], [1, 2, 3, 4, 5, 8, 30, 200]):
        case = f"{samples} samples, batches of {batch}"
        samplers = [EvalSampler(samples, batch, Rank(world, rank)) for rank in range(world)]
        ranks = [list(sampler) for sampler in samplers]
        assert {len(batches) for batches in ranks} == {len(sampler) for sampler in samplers}, case
        assert len({len(batches) for batches in ranks}) == 1, case
        kept = [[index for b in batches for index in b.indices[: b.num_real]] for batches in ranks]
        assert sorted(itertools.chain(*kept)) == list(range(samples)), case
        assert all(indices == sorted(indices) for indices in kept), case
        everything = [b for batches in ranks for b in batches]
        assert all(0 < len(b.indices) <= batch for b in everything), case
        assert all(0 <= index < samples for b in everything for index in b.indices), case
        padding = sum(len(b.indices) - b.num_real for b in everything)
        assert padding < world, case


# Loaders


class Batch(NamedTuple):
    index: Tensor
    noise: Tensor
    mask: Tensor


class Noisy:
    """Samples with random numbers of each kind that a transform may draw."""

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, indices: Sequence[int]) -> Batch:
        noise = [[torch.rand(()).item(), np.random.rand(), random.random()] for _ in indices]
        return Batch(torch.tensor(indices), torch.tensor(noise), torch.ones(len(indices), dtype=torch.bool))


class NoisyData(BaseDataModule):
    def setup(self, stage: str) -> None:
        self.train_data = self.val_data = self.test_data = self.predict_data = Noisy(22)


def loaders(num_workers: int) -> dict[str, list[Batch]]:
    """What each loader gives to a trainer that has not started."""
    data = NoisyData(batch_size=4, eval_batch_size=5, num_workers=num_workers)
    data.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    data.setup("fit")
    return {stage: list(getattr(data, f"{stage}_dataloader")()) for stage in ("train", "val", "test", "predict")}


def test_random_transforms_do_not_depend_on_workers() -> None:
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    here, there = loaders(0), loaders(2)
    for stage, batches in here.items():
        assert len(batches) == len(there[stage]) == 5
        for some, other in zip(batches, there[stage], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(some, other, strict=True)), stage
        noise = torch.cat([batch.noise for batch in batches]).flatten()
        assert len(noise.unique()) == len(noise)  # no batch repeats another's
    assert [batch.mask.tolist() for batch in here["val"]][-1] == [True, True]
    assert torch.cat([batch.index for batch in here["val"]]).tolist() == list(range(22))


@pytest.mark.parametrize("key", ["batch_size", "eval_batch_size", "num_workers"])
def test_sizes_are_checked(key: str) -> None:
    with pytest.raises(InputError, match=rf"data.{key} must be at least [01], got -1"):
        NoisyData(**{key: -1})


@pytest.mark.parametrize("key", ["batch_size", "eval_batch_size"])
def test_no_batch_is_empty(key: str) -> None:
    with pytest.raises(InputError, match=rf"data.{key} must be at least 1, got 0"):
        NoisyData(**{key: 0})


def test_evaluation_takes_the_batch_size_of_training() -> None:
    assert NoisyData(batch_size=9).eval_batch_size == 9


# The length of a run


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"max_steps": 100}, 100),
        ({"max_epochs": 3}, 15),
        ({"max_epochs": 3, "max_steps": 7}, 7),
        ({"max_epochs": 3, "max_steps": 70}, 15),
        ({"max_epochs": 3, "limit_train_batches": 2}, 6),
        ({"max_epochs": 3, "limit_train_batches": 0.5}, 6),
        ({"max_epochs": 3, "accumulate_grad_batches": 2}, 6),
        ({"max_epochs": 3, "accumulate_grad_batches": 2, "limit_train_batches": 4}, 6),
        ({"max_epochs": -1}, -1),
        ({"max_epochs": -1, "max_steps": 9}, 9),
    ],
)
def test_total_steps(settings: dict[str, Any], steps: int) -> None:
    data = NoisyData(batch_size=4)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **settings)
    trainer.datamodule = data  # type: ignore[attr-defined]
    data.trainer = trainer
    data.setup("fit")
    assert total_steps(trainer) == steps
