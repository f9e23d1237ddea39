"""Other ways to train in parallel: what they compute, what they send, and how near to DDP they end."""

import copy
import json
import math
import statistics
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig

from common.errors import InputError
from common.nets import causal_lm
from common.strategies.ddp import PowerSGD, ring_all_reduce
from common.strategies.sharding import Memory
from common.strategies.tensor_parallel import check_sizes, plan_of, share_like, slice_layers
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
        ("min_compression", "0", "must be at least 1, got 0"),
    ],
)
def test_mistakes_of_power_sgd(flag: str, value: str, line: str, work: Path, lm_args: list[str]) -> None:
    layer = ["--config", str(ROOT / "configs/strategy/ddp_powersgd.yaml"), "--trainer.accelerator", "cpu"]
    args = ["fit", *layer, *lm_args, f"--trainer.strategy.{flag}", value]
    assert run_ranks(main_of("lm"), args, world=1, folder=work) == [2], logs(work)
    last = (work / "rank0.log").read_text().splitlines()[-1]
    assert f"trainer.strategy.{flag}: {line}" in last
    assert not (work / "runs/lm/default/checkpoints").exists()


class Own(nn.Module):
    """A net of one's own that says how it can be sliced, with a shared weight and a layer of no plan."""

    PLAN: ClassVar = {"layers.*.up": "colwise", "layers.*.down": "rowwise", "head": "colwise_gather_output"}

    def __init__(self, plan: dict[str, str] | None = None):
        super().__init__()
        self._tp_plan = plan or self.PLAN
        blocks = [nn.ModuleDict({"up": nn.Linear(6, 8), "down": nn.Linear(8, 6)}) for _ in range(2)]
        self.layers, self.norm, self.head = nn.ModuleList(blocks), nn.LayerNorm(6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer["down"](layer["up"](x).relu())  # type: ignore[index]
        return self.head(self.norm(x))


def sliced_and_whole(path: Path) -> None:
    """Outputs and gradients of a sliced net and of the same one whole."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(1)
    whole, x = Own(), torch.randn(3, 6)
    sliced = copy.deepcopy(whole)
    slice_layers(sliced, plan_of(sliced), mesh)
    outputs = [net(x) for net in (sliced, whole)]
    assert torch.allclose(*outputs, atol=1e-6)
    for output in outputs:
        output.square().sum().backward()
    for (name, p), q in zip(sliced.named_parameters(), whole.parameters(), strict=True):
        assert isinstance(p, DTensor)
        assert isinstance(p.grad, DTensor)
        assert torch.allclose(p.grad.full_tensor(), q.grad, atol=1e-5), name  # type: ignore[arg-type]
        assert torch.equal(share_like(p, q.detach()).to_local(), p.to_local()), name
    sizes = {name: p.to_local().numel() / p.numel() for name, p in sliced.named_parameters()}  # type: ignore[union-attr]
    path.with_suffix(f".{dist.get_rank()}").write_text(json.dumps(sizes))


def test_sliced_layers_compute_what_whole_ones_do(work: Path) -> None:
    assert run_ranks(sliced_and_whole, work / "sizes", folder=work) == [0, 0], logs(work)
    for rank in range(2):
        sizes = json.loads((work / f"sizes.{rank}").read_text())
        whole = {name for name, size in sizes.items() if size == 1}
        assert whole == {"norm.weight", "norm.bias", "layers.0.down.bias", "layers.1.down.bias"}
        assert {size for name, size in sizes.items() if name not in whole} == {0.5}


def test_plans_of_nets(lm_args: list[str]) -> None:
    net = causal_lm(LlamaConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, tie_word_embeddings=True), 9)
    plan = plan_of(net)
    assert len(plan) == 2 * 7, "the head shares its weight with the embedding, which is whole"
    assert plan["model.layers.1.mlp.down_proj"] == "rowwise"
    assert plan_of(nn.Sequential(net))["0.model.layers.0.self_attn.q_proj"] == "colwise"
    check_sizes(net, plan, 2)
    with pytest.raises(InputError, match="num_attention_heads: 2 is no multiple of tensor_parallel 4"):
        check_sizes(net, plan, 4)
    with pytest.raises(InputError, match="Linear has no plan"):
        plan_of(nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"wants norm \(LayerNorm\) colwise, which is not supported"):
        plan_of(Own({"norm": "colwise"}))
    with pytest.raises(InputError, match=r"head has a weight of \[4, 6\], whose axis 0 is no multiple of 3"):
        check_sizes(Own(), {"head": "colwise"}, 3)


def test_two_dimensions(work: Path, lm_args: list[str], record_property: object) -> None:
    """Four ranks, in two groups of two: losses, norms and validation of one process, and a run to go on from."""
    runs = []
    for name, world in (("one", 1), ("four", 4)):
        layer = ["--config", str(ROOT / "configs/strategy/tensor_parallel.yaml")] if world > 1 else []
        args = [
            "fit", *layer, *lm_args, "--name", name, "--data.batch_size", str(8 if world == 1 else 4),
            "--trainer.accelerator", "cpu", "--trainer.devices", str(world), "--trainer.log_every_n_steps", "1",
            "--trainer.val_check_interval", "5", "--trainer.check_val_every_n_epoch", "null",
            "--model.lr_scheduler", "common.optim.Constant", "--trainer.enable_progress_bar", "false",
        ]  # fmt: skip
        assert (
            run_ranks(main_of("lm"), [*args, "--trainer.max_steps", "10"], world=world, folder=work) == [0] * world
        ), logs(work)
        table = work / "runs/lm" / name / "metrics.csv"
        runs.append({key: read_metrics(table, key) for key in ("train/loss", "optim/grad_norm", "val/loss")})
        if world > 1:
            again = [*args, "--trainer.max_steps", "12", "--ckpt_path", "last"]
            assert run_ranks(main_of("lm"), again, world=world, folder=work) == [0] * world, logs(work)
    one, four = runs
    assert len(one["train/loss"]) == 10
    worst = {key: difference(four[key], one[key]) for key in one}
    record_property("summary", f"2 x 2 ranks: {worst['train/loss']:.1e}")  # type: ignore[operator]
    assert max(worst.values()) < 1e-5


@pytest.mark.parametrize(
    ("recipe", "flags", "line"),
    [
        ("lm", ["--trainer.strategy.tensor_parallel", "3"], "tensor_parallel: 3 is no divisor of 2 ranks"),
        ("lm", ["--trainer.strategy.tensor_parallel", "0"], "tensor_parallel: 0 is no divisor of 2 ranks"),
        ("lm", ["--model.config.init_args.num_attention_heads", "1"], "num_attention_heads: 1 is no multiple of"),
        ("lm", ["--model.config", "transformers.GPT2Config"], "GPT2LMHeadModel has no plan (_tp_plan)"),
        ("classification", [], "ConvNet has no plan (_tp_plan)"),
    ],
)
def test_mistakes_of_tensor_parallel(
    recipe: str, flags: list[str], line: str, work: Path, plain_args: dict[str, list[str]]
) -> None:
    layer = ["--config", str(ROOT / "configs/strategy/tensor_parallel.yaml"), "--trainer.accelerator", "cpu"]
    own = plain_args["lm"] if recipe == "lm" else []
    args = ["fit", *layer, *own, *flags, "--trainer.devices", "2"]
    assert run_ranks(main_of(recipe), args, folder=work) == [2, 2], logs(work)
    last = (work / "rank0.log").read_text().splitlines()[-1]
    assert line in last
    assert not (work / f"runs/{recipe}/default/checkpoints").exists()
