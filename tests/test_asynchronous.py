"""Ranks that do not wait for one another: local SGD, DiLoCo and the parameter server."""

import copy
import json
import math
import statistics
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.constants import default_pg_timeout

from common.checkpoint import read_checkpoint
from common.parts import Memory
from common.strategies.local_sgd import LocalSGD
from common.strategies.parameter_server import ParameterServer, Server
from common.strategies.sharding import share_weights
from tests.support import MISSING, ROOT, TINY, difference, halved, logs, main_of, read_metrics, run_ranks
from tests.test_parallel import fit
from tests.test_resume import digest

pytestmark = pytest.mark.usefixtures("no_report")

SGD = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.1"]
BOUND = 0.1  # what is lost, at most, of the way that DDP went


def counted_main(args: list[str], path: Path) -> None:
    """Train, and keep this rank's weights as a sum and how often the ranks have met."""
    cli = main_of("lm")(args)
    weights = sum(p.double().sum().item() for p in cli.model.parameters())
    syncs = getattr(cli.trainer.strategy, "syncs", None)
    path.with_suffix(f".{cli.trainer.global_rank}").write_text(json.dumps([weights, syncs]))


def far_from(plain: Path, other: Path) -> float:
    """How much of the way that one run went another did not go; below 0 where it went further."""
    first = statistics.mean(read_metrics(plain / "metrics.csv", "train/loss")[:3])
    ends = [read_metrics(path / "metrics.csv", "val/loss")[-1] for path in (plain, other)]
    return (ends[1] - ends[0]) / (first - ends[0])


def test_averaging_after_each_step_of_sgd_is_ddp(work: Path, lm_args: list[str]) -> None:
    """Then the average of the weights is a step by the average of the gradients."""
    args = [*SGD, "--model.lr_scheduler", "common.optim.Constant", "--trainer.max_steps", "20"]
    args += ["--trainer.gradient_clip_val", "null"]
    plain = fit(work, lm_args, "plain", "ddp", *args)
    local = fit(work, lm_args, "local", "local_sgd", *args, "--trainer.strategy.sync_every", "1", main=counted_main)
    for key in ("train/loss", "val/loss"):
        losses, expected = (read_metrics(path / "metrics.csv", key) for path in (local, plain))
        assert len(expected) == (20 if key == "train/loss" else 1)
        assert difference(losses, expected) < 1e-5
    assert json.loads((work / "local.0").read_text())[1] == 20


def outer_steps(strategy: LocalSGD, path: Path) -> None:
    """Let two ranks move in ways of their own, three times, and compare with the algorithm as the paper has it."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    shapes = [(3, 2), (4,)]
    generator = torch.Generator().manual_seed(5)
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    moves = torch.randn(3, 2, 10, generator=generator)  # (round, rank, element)
    net = nn.Module()
    net.register_buffer("seen", torch.tensor([float(rank)]))
    params = [nn.Parameter(value.clone()) for value in start]
    strategy._lightning_module = module = L.LightningModule()
    module.net = net
    strategy.start(params)
    theta, momentum = torch.cat([value.flatten() for value in start]), torch.zeros(10)
    for move in moves:
        with torch.no_grad():
            for p, part in zip(params, move[rank].split([6, 4]), strict=True):
                p.add_(part.view_as(p))
        strategy._since = 1
        strategy._agree()
        gradient = -move.mean(0)
        momentum = 0.9 * momentum + gradient
        theta = theta - 0.7 * (gradient + 0.9 * momentum)
        assert torch.allclose(torch.cat([p.detach().flatten() for p in params]), theta, atol=1e-6)
    assert not net.get_buffer("seen"), "that of rank 0"
    strategy._agree()
    assert strategy.syncs == 3, "nothing has moved since"


def test_outer_steps_are_those_of_diloco(work: Path) -> None:
    assert run_ranks(outer_steps, LocalSGD(8, 0, 0.7, 0.9, True), work, folder=work) == [0, 0], logs(work)


@pytest.mark.matrix
def test_local_sgd_and_diloco_end_near_ddp(work: Path, lm_args: list[str], record_property: Any) -> None:
    plain = fit(work, lm_args, "plain", "ddp")
    # 60 steps, three validations with an averaging each, two or none before it; a row is written before validation.
    for name, strategy, flags, syncs, logged in (
        ("local", "local_sgd", ["--trainer.strategy.sync_every", "8"], 9, 8),
        ("warm", "local_sgd", ["--trainer.strategy.sync_every", "8", "--trainer.strategy.warmup_steps", "10"], 18, 17),
        ("outer", "diloco", ["--trainer.strategy.sync_every", "10"], 6, 6),
    ):
        run = fit(work, lm_args, name, strategy, *flags, main=counted_main)
        (weights, counted), (others, _) = (json.loads((work / f"{name}.{rank}").read_text()) for rank in range(2))
        assert weights == others, "ranks have the same weights"
        assert counted == syncs
        assert read_metrics(run / "metrics.csv", "perf/syncs")[-1] == logged
        lost = far_from(plain, run)
        record_property("summary", f"{strategy} {' '.join(flags)}: {syncs} syncs for 60, {lost:+.1%} of DDP's way")
        assert lost < BOUND


@pytest.mark.matrix
def test_diloco_goes_on_from_a_checkpoint(work: Path, lm_args: list[str]) -> None:
    """Ranks start from the optimizer of rank 0, and the outer one has its momentum."""
    short = ["--model.lr_scheduler", "common.optim.Constant", "--trainer.strategy.sync_every", "10"]
    whole = fit(work, lm_args, "whole", "diloco", *short, "--trainer.max_steps", "40")
    fit(work, lm_args, "cut", "diloco", *short, "--trainer.max_steps", "30")
    last = work / "runs/lm/cut/checkpoints/last.ckpt"
    momentum = read_checkpoint(last)["outer_optimizer"]["state"][0]["momentum_buffer"]
    assert momentum.abs().sum() > 0
    again = fit(work, lm_args, "cut", "diloco", *short, "--trainer.max_steps", "40", "--ckpt_path", "last")
    losses, expected = (read_metrics(path / "metrics.csv", "train/loss")[30:] for path in (again, whole))
    assert len(losses) == 10
    assert difference(losses[:1], expected[:1]) < 1e-5, "weights and data are those of the whole run"
    assert difference(losses, expected) < 0.05


def served_main(args: list[str], path: Path, delay: float) -> None:
    """Train with a rank 1 that waits ``delay`` of its own steps before each, and keep what the server has counted."""
    from common.module import BaseModule

    start, went_on = BaseModule.on_train_batch_start, 0.0

    def slow_start(self: BaseModule, batch: Any, batch_idx: int) -> None:
        nonlocal went_on
        time.sleep(delay * self.global_rank * (time.perf_counter() - went_on if went_on else 0))
        went_on = time.perf_counter()
        start(self, batch, batch_idx)

    BaseModule.on_train_batch_start = slow_start  # type: ignore[method-assign]  # in this forked process only
    cli = main_of("lm")(args)
    weights = sum(p.double().sum().item() for p in cli.model.parameters())
    strategy: ParameterServer = cli.trainer.strategy
    found: list[Any] = [weights]
    if server := strategy.server:
        assert not any(thread.is_alive() for thread in strategy._threads), "the server has shut down"
        found += [server.updates, server.clock, sorted(server.staleness.items())]
    path.with_suffix(f".{cli.trainer.global_rank}").write_text(json.dumps(found))


def in_step(args: list[str], path: Path) -> None:
    """Without a slow rank."""
    served_main(args, path, 0)


def with_a_slow_rank(args: list[str], path: Path) -> None:
    """Which takes several times as long for a step as the other."""
    served_main(args, path, 9)


@pytest.mark.matrix
def test_server_counts_staleness_and_ends_near_ddp(work: Path, lm_args: list[str], record_property: Any) -> None:
    rows = ["--trainer.log_every_n_steps", "20"]  # ranks meet there
    plain = fit(work, lm_args, "plain", "ddp")
    found = {}
    for name, staleness in (("step", "0"), ("bounded", "2"), ("free", "null")):
        flags = ["--trainer.strategy.max_staleness", staleness, *(rows if staleness != "0" else [])]
        main = in_step if staleness == "0" else with_a_slow_rank
        run = fit(work, lm_args, name, "parameter_server", *flags, main=main)
        (weights, updates, clock, counts), (others,) = (
            json.loads((work / f"{name}.{rank}").read_text()) for rank in range(2)
        )
        assert weights == others, "ranks have the same weights"
        assert clock == [60, 60]
        assert sum(number for _, number in counts) == 120
        assert updates == (60 if staleness == "0" else 120)
        assert (run / "figures/val-staleness.png").stat().st_size > 10_000
        found[name] = dict(counts)
        mean = sum(late * number for late, number in counts) / 120
        assert read_metrics(run / "metrics.csv", "perf/staleness")[-1] == pytest.approx(mean, abs=0.1)
        lost = far_from(plain, run)
        record_property("summary", f"server, max_staleness {staleness}: {found[name]}, {lost:+.1%} of DDP's way")
        assert lost < BOUND
        if staleness == "0":  # later, what Adam makes of rounding parts them
            losses, expected = (read_metrics(path / "metrics.csv", "train/loss")[:20] for path in (run, plain))
            assert difference(losses, expected) < 1e-5
    assert found["step"] == {0: 120}
    assert 2 <= max(found["bounded"]) <= 2 * 2 + 1, "from two steps behind to two ahead, and the one under way"
    assert max(found["free"]) > 5


def test_server_goes_on_from_the_checkpoint_of_any_and_any_from_its(work: Path, lm_args: list[str]) -> None:
    """Asynchronous or not, its checkpoints are those of a single process."""
    short = ["--model.lr_scheduler", "common.optim.Constant", "--trainer.max_steps"]
    fit(work, lm_args, "hops", "ddp", *short, "10")
    free = ["--trainer.strategy.max_staleness", "null", "--ckpt_path", "last"]
    fit(work, lm_args, "hops", "parameter_server", *free, *short, "20")
    last = read_checkpoint(work / "runs/lm/hops/checkpoints/last.ckpt")
    steps = {int(state["step"]) for state in last["optimizer_states"][0]["state"].values()}
    assert steps == {10 + 2 * 10}, "the server has stepped for each rank"
    run = fit(work, lm_args, "hops", "ddp", "--ckpt_path", "last", *short, "30")
    losses = read_metrics(run / "metrics.csv", "train/loss")
    assert len(losses) == 30
    assert all(loss < 4 for loss in losses[20:])


@pytest.mark.matrix
def test_the_server_saves_the_rate_that_a_schedule_has_set(work: Path, lm_args: list[str]) -> None:
    """One of torch's, which goes on from the rate that it finds."""
    schedule = ["--model.lr_scheduler", "torch.optim.lr_scheduler.LinearLR", "--trainer.max_steps"]
    rates = []
    for strategy in ("parameter_server", "ddp"):
        whole = fit(work, lm_args, f"{strategy}-whole", strategy, *schedule, "5")
        fit(work, lm_args, f"{strategy}-cut", strategy, *schedule, "3")
        cut = fit(work, lm_args, f"{strategy}-cut", strategy, *schedule, "5", "--ckpt_path", "last")
        ends = [read_checkpoint(run / "checkpoints/last.ckpt") for run in (whole, cut)]
        assert digest(whole / "checkpoints/last.ckpt") == digest(cut / "checkpoints/last.ckpt")
        rates += [end["optimizer_states"][0]["param_groups"][0]["lr"] for end in ends]
    assert rates == [rates[0]] * 4


def save_after_validation(args: list[str], path: Path) -> None:
    cli = main_of("lm")(args)
    cli.trainer.save_checkpoint(path)


@pytest.mark.parametrize("strategy", ["local_sgd", "parameter_server"])
def test_what_has_only_been_evaluated_can_be_saved(strategy: str, work: Path, lm_args: list[str]) -> None:
    layer = ["--config", str(ROOT / f"configs/strategy/{strategy}.yaml"), "--trainer.accelerator", "cpu"]
    args = ["validate", "--ckpt_path", "null", *TINY, *layer, *lm_args, "--trainer.devices", "2"]
    assert run_ranks(save_after_validation, args, work / "net.ckpt", folder=work) == [0, 0], logs(work)
    assert "net.lm_head.weight" in read_checkpoint(work / "net.ckpt")["state_dict"]


def test_the_server_counts_updates_since_a_rank_had_its_weights() -> None:
    server = Server(torch.optim.SGD([nn.Parameter(torch.ones(2))], 0.5), 3, None, default_pg_timeout)
    for rank in (0, 0, 1, 0, 2, 1):
        server.exchange(rank, torch.ones(2))
    assert sorted(server.staleness.elements()) == [0, 0, 1, 2, 2, 4]
    assert server.clock == [3, 2, 1]
    late = Server(torch.optim.SGD([nn.Parameter(torch.ones(2))], 0.5), 2, 1, timedelta(seconds=0.1))
    late.exchange(0, torch.ones(2))
    with pytest.raises(dist.DistError, match="Timed out: another rank has sent no gradient"):
        late.exchange(0, torch.ones(2))


def test_staleness_starts_anew_where_all_ranks_get_the_weights(work: Path, lm_args: list[str]) -> None:
    """The server in step, then validation, then one rank alone: nothing is stale."""
    strategy = ParameterServer(None)
    strategy.server = Server(torch.optim.SGD([nn.Parameter(torch.ones(2))], 0.5), 2, None, default_pg_timeout)
    for rank in (0, 0, 0, 1):
        strategy.server.exchange(rank, torch.ones(2))
    assert max(strategy.server.staleness) == 3
    assert run_ranks(refreshed, strategy, world=1, folder=work) == [0], logs(work)


def refreshed(strategy: ParameterServer) -> None:
    """As a validation does, on the one rank that there is."""
    strategy._params, strategy.model = [nn.Parameter(torch.ones(2))], nn.Module()
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    server = strategy.server
    assert server is not None
    ParameterServer.world_size, ParameterServer.barrier = property(lambda _: 2), lambda *_: None  # type: ignore
    strategy._refresh()
    server.exchange(0, torch.ones(2))
    assert server.staleness == {0: 4, 3: 1}, "rank 0 had not seen the update of rank 1"
    assert torch.equal(strategy._params[0], torch.full((2,), 1 - 0.5 * 4))


@pytest.mark.matrix
def test_the_server_in_16_bits(work: Path, lm_args: list[str]) -> None:
    args = ["--trainer.precision", "bf16-true", "--trainer.max_steps", "20"]
    runs = [fit(work, lm_args, name, name, *args) for name in ("ddp", "parameter_server")]
    expected, losses = (read_metrics(run / "metrics.csv", "train/loss") for run in runs)
    assert len(losses) == 20
    assert difference(losses, expected) < 2e-2


def norm_of_ways(path: Path) -> None:
    """Each rank has used another parameter."""
    dist.init_process_group("gloo")
    rank, strategy = dist.get_rank(), ParameterServer()
    strategy._params = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))]
    strategy._params[rank].grad = torch.ones_like(strategy._params[rank])
    ParameterServer.world_size = property(lambda _: 2)  # type: ignore  # in this forked process only
    norm = strategy.total_norm([torch.ones_like(strategy._params[rank])])
    assert norm.item() == pytest.approx(math.sqrt(5 * 0.25))
    assert [p.grad.tolist() for p in strategy._params] == [[0.5] * 2, [0.5] * 3]  # type: ignore[union-attr]


def test_ranks_may_use_different_parameters(work: Path) -> None:
    assert run_ranks(norm_of_ways, work, folder=work) == [0, 0], logs(work)


def late_main(args: list[str]) -> None:
    """Rank 1 comes to its second step after all patience."""
    from common.module import BaseModule

    start = BaseModule.on_train_batch_start

    def wait(self: BaseModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1 and self.global_rank == 1:
            time.sleep(10)
        start(self, batch, batch_idx)

    BaseModule.on_train_batch_start = wait  # type: ignore[method-assign]  # in this forked process only
    main_of("lm")(args)


HOROVOD = pytest.param("horovod", marks=pytest.mark.skipif("horovod" in MISSING, reason="Horovod is not installed"))


@pytest.mark.matrix
@pytest.mark.parametrize("strategy", ["parameter_server", "tensor_parallel", "pipeline", HOROVOD])
def test_a_rank_that_waits_for_another_gives_up(strategy: str, work: Path, lm_args: list[str]) -> None:
    """Also in the groups of a mesh."""
    layer = ["--config", str(ROOT / f"configs/strategy/{strategy}.yaml"), "--trainer.strategy.timeout", "0:00:03"]
    args = ["fit", *TINY, *layer, *lm_args, "--trainer.accelerator", "cpu", "--trainer.devices", "2"]
    began = time.monotonic()
    codes = run_ranks(late_main, [*args, "--trainer.limit_val_batches", "0"], folder=work)
    assert codes == [3, 3], logs(work)
    assert time.monotonic() - began < 40
    assert "rank 0: another rank has ended (" in (work / "rank0.log").read_text().splitlines()[-1]


def test_schedules_reach_the_server() -> None:
    """What changes in rank 0's optimizer, and nothing else."""
    weight = nn.Parameter(torch.ones(2))
    mine, theirs = (torch.optim.SGD([p], 0.5, momentum=0.9) for p in (weight, copy.deepcopy(weight)))
    strategy = ParameterServer()
    strategy._optimizer, strategy._told = mine, [dict(group) for group in mine.param_groups]
    strategy.server = Server(theirs, 1, 0, default_pg_timeout)
    theirs.param_groups[0]["momentum"] = 0.8  # as an optimizer that keeps its state there
    mine.param_groups[0]["lr"] = 0.25
    weights = strategy.server.exchange(0, torch.ones(2), strategy._tell)
    assert weights.tolist() == [0.75, 0.75]
    assert theirs.param_groups[0]["momentum"] == 0.8


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (LocalSGD(), (800, 400, 800)),
        (LocalSGD(outer_momentum=0.9), (800, 400, 1200)),
        (ParameterServer(), (800, 800, 800)),
    ],
)
def test_memory_of_two_ranks(strategy: LocalSGD | ParameterServer, expected: tuple[int, int, int]) -> None:
    assert strategy.memory_per_rank(Memory(400, 400, 800), 100, 2) == expected


@pytest.mark.parametrize(
    ("strategy", "flags", "line"),
    halved(
        [
            ("local_sgd", ["sync_every", "0"], ".sync_every: must be at least 1, got 0"),
            ("local_sgd", ["warmup_steps", "-1"], ".warmup_steps: must be at least 0, got -1"),
            ("diloco", ["outer_lr", "0"], ".outer_lr: must be above 0, got 0.0"),
            ("diloco", ["outer_momentum", "1"], ".outer_momentum: must be below 1, got 1.0"),
            ("diloco", ["outer_momentum", "0"], ".outer_nesterov: needs outer_momentum"),
            ("parameter_server", ["max_staleness", "-1"], "max_staleness: must be at least 0, or null, got -1"),
        ]
    ),
)
def test_mistakes(strategy: str, flags: list[str], line: str, work: Path, lm_args: list[str]) -> None:
    layer = ["--config", str(ROOT / f"configs/strategy/{strategy}.yaml"), "--trainer.accelerator", "cpu"]
    args = ["fit", *layer, *lm_args, f"--trainer.strategy.{flags[0]}", flags[1]]
    assert run_ranks(main_of("lm"), args, world=1, folder=work) == [2], logs(work)
    assert line in (work / "rank0.log").read_text().splitlines()[-1]
    assert not (work / "runs/lm/default/checkpoints").exists()


@pytest.mark.parametrize("strategy", ["local_sgd", "parameter_server"])
def test_batch_norm_that_waits_for_all_ranks_is_refused(strategy: str, work: Path, lm_args: list[str]) -> None:
    layer = ["--config", str(ROOT / f"configs/strategy/{strategy}.yaml"), "--trainer.accelerator", "cpu"]
    args = ["fit", *layer, *lm_args, "--trainer.sync_batchnorm", "true"]
    assert run_ranks(main_of("lm"), args, world=1, folder=work) == [2], logs(work)
    name = {"local_sgd": "LocalSGD", "parameter_server": "ParameterServer"}[strategy]
    line = f"trainer.sync_batchnorm: {name} does not support it; take false"
    assert line in (work / "rank0.log").read_text().splitlines()[-1]


def shared_weights(path: Path) -> None:
    """Ranks that begin with others, of several types, one of them not in the order of its memory, one empty."""
    dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())
    net = nn.Sequential(nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last), nn.BatchNorm2d(3))  # type: ignore
    net.register_buffer("seen", torch.tensor([dist.get_rank() == 0]))
    net.register_buffer("none", torch.zeros(0), persistent=False)
    net[1].running_mean += torch.rand(3)  # type: ignore[operator, union-attr]
    share_weights(net)
    assert all(p.requires_grad for p in net.parameters())
    torch.save([p.detach() for p in (*net.parameters(), *net.buffers())], path.with_suffix(f".{dist.get_rank()}"))


def test_all_ranks_begin_with_the_weights_of_the_first(work: Path) -> None:
    assert run_ranks(shared_weights, work / "net", folder=work) == [0, 0], logs(work)
    first, second = (torch.load(work / f"net.{rank}") for rank in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    torch.manual_seed(0)
    assert torch.equal(first[0], nn.Conv2d(2, 3, 3).weight)
