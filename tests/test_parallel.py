"""Other ways to average gradients: what they compute, what they send, and how near to DDP they end."""

import json
import math
import statistics
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from common.strategies.ddp import PowerSGD, ring_all_reduce
from common.strategies.sharding import Memory
from tests.support import ROOT, difference, logs, main_of, read_metrics, run_ranks

pytestmark = pytest.mark.usefixtures("no_report")


def sum_by_ring(path: Path, world: int) -> None:
    """Compare with gloo's own, and count what is sent."""
    where = {"rank": 0, "world_size": 1, "init_method": f"file://{path}"} if world == 1 else {}
    dist.init_process_group("gloo", **where)
    rank, size = dist.get_rank(), dist.get_world_size()
    sent = 0
    exchange = dist.batch_isend_irecv

    def counted(pair: list[dist.P2POp]) -> list[dist.Work]:
        nonlocal sent
        sent += sum(op.tensor.numel() for op in pair if op.op is dist.isend)
        assert {op.peer for op in pair} == {(rank + 1) % size, (rank - 1) % size}, "its neighbours alone"
        return exchange(pair)

    dist.batch_isend_irecv = counted  # in this forked process only
    for number in (1, 2, size, 7, 1000):
        for dtype in (torch.int64, torch.float32, torch.bfloat16):
            values = torch.arange(number).mul(rank + 1).to(dtype) % 50
            expected = values.clone()
            dist.all_reduce(expected)
            assert ring_all_reduce(values) is values
            assert torch.equal(values, expected)
    sent = 0
    ring_all_reduce(torch.ones(600))
    path.with_suffix(f".{rank}").write_text(str(sent))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_ring_adds_up_and_sends_what_the_paper_says(world: int, work: Path) -> None:
    assert run_ranks(sum_by_ring, work / "sent", world, world=world, folder=work) == [0] * world, logs(work)
    sent = [int((work / f"sent.{rank}").read_text()) for rank in range(world)]
    assert sent == [2 * (world - 1) * 600 // world] * world


def fit(work: Path, lm_args: list[str], name: str, strategy: str, *args: str) -> Path:
    command = [
        "fit", "--config", str(ROOT / f"configs/strategy/{strategy}.yaml"), *lm_args, "--name", name,
        "--data.batch_size", "8", "--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.max_steps", "60",
        "--trainer.val_check_interval", "20", "--trainer.check_val_every_n_epoch", "null",
        "--trainer.limit_val_batches", "20", "--trainer.log_every_n_steps", "1", "--model.sample_tokens", "0",
        "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false", *args,
    ]  # fmt: skip
    assert run_ranks(noted_main, command, work / f"{name}.json", folder=work / name) == [0, 0], logs(work / name)
    return work / "runs/lm" / name


def noted_main(args: list[str], path: Path) -> None:
    """Train, and keep this rank's weights as a sum, their shapes, and what PowerSGD has counted."""
    cli = main_of("lm")(args)
    params, strategy = list(cli.model.parameters()), cli.trainer.strategy
    numbers = strategy.state.compression_stats() if isinstance(strategy, PowerSGD) else ()
    found = sum(p.double().sum().item() for p in params), [tuple(p.shape) for p in params], numbers
    path.with_suffix(f".{cli.trainer.global_rank}").write_text(json.dumps(found))


def test_power_sgd_sends_less_and_ends_near_ddp(work: Path, lm_args: list[str], record_property: object) -> None:
    """On CPUs too, where Lightning leaves hooks of DDP out."""
    plain = fit(work, lm_args, "plain", "ddp")
    near = fit(work, lm_args, "near", "ddp_powersgd", "--trainer.strategy.start_step", "10")
    (weights, shapes, (rate, before, after)), (others, *_) = (
        json.loads((work / f"near.{rank}").read_text()) for rank in range(2)
    )
    assert weights == others, "ranks have the same weights"
    assert before == 50 * sum(math.prod(shape) for shape in shapes)
    small = [4 * sum(shape) if len(shape) > 1 else math.inf for shape in shapes]  # rank 4
    sent = (n if 2 * n < math.prod(shape) else math.prod(shape) for n, shape in zip(small, shapes, strict=True))
    assert after == 50 * sum(sent)
    assert rate > 1.5
    losses = {path.name: read_metrics(path / "metrics.csv", "val/loss")[-1] for path in (plain, near)}
    first = statistics.mean(read_metrics(plain / "metrics.csv", "train/loss")[:3])
    record_property(  # type: ignore[operator]
        "summary", f"PowerSGD: 1/{rate:.1f} of the bytes, val/loss {losses['near']:.3f}, DDP {losses['plain']:.3f}"
    )
    steps = [read_metrics(path / "metrics.csv", "train/loss") for path in (plain, near)]
    assert steps[0][:10] == steps[1][:10], "it starts as DDP"
    assert steps[0][12:] != steps[1][12:]
    assert abs(losses["near"] - losses["plain"]) < 0.1 * (first - losses["plain"]), "of the way that DDP went"


def test_power_sgd_goes_on_from_a_checkpoint(work: Path, lm_args: list[str]) -> None:
    short = ["--trainer.strategy.start_step", "10", "--trainer.max_steps"]
    short = ["--model.lr_scheduler", "common.optim.Constant", *short]
    whole = fit(work, lm_args, "whole", "ddp_powersgd", *short, "40")
    fit(work, lm_args, "cut", "ddp_powersgd", *short, "30")
    again = fit(work, lm_args, "cut", "ddp_powersgd", *short, "40", "--ckpt_path", "last")
    losses, expected = (read_metrics(path / "metrics.csv", "train/loss") for path in (again, whole))
    assert len(losses) == 10
    assert difference(losses[:1], expected[30:31]) < 1e-5, "weights, optimizer and data are those of the whole run"
    assert difference(losses, expected[30:]) < 0.05


def test_memory_of_power_sgd() -> None:
    assert PowerSGD().memory_per_rank(Memory(400, 400, 800), 100, 2) == Memory(400, 800, 800)


@pytest.mark.parametrize(
    ("flag", "value", "line"),
    [
        ("rank", "0", "must be at least 1, got 0"),
        ("start_step", "1", "must be at least 2, got 1"),
        ("min_compression", "0.5", "must be at least 1, got 0.5"),
    ],
)
def test_mistakes_of_power_sgd(flag: str, value: str, line: str, work: Path, lm_args: list[str]) -> None:
    layer = ["--config", str(ROOT / "configs/strategy/ddp_powersgd.yaml"), "--trainer.accelerator", "cpu"]
    args = ["fit", *layer, *lm_args, f"--trainer.strategy.{flag}", value]
    assert run_ranks(main_of("lm"), args, world=1, folder=work) == [2], logs(work)
    last = (work / "rank0.log").read_text().splitlines()[-1]
    assert f"trainer.strategy.{flag}: {line}" in last
    assert not (work / "runs/lm/default/checkpoints").exists()
