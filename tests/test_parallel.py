"""Other ways to train in parallel: what they compute, what they send, and how near to DDP they end."""

import copy
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig

from common.checkpoint import read_checkpoint
from common.errors import InputError
from common.nets import causal_lm
from common.parts import Memory
from common.strategies.ddp import PowerSGD, ring_all_reduce
from common.strategies.tensor_parallel import plan_slices, share_like, slice_layers
from tests.support import ROOT, difference, halved, logs, main_of, read_metrics, run_ranks

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


def fit(
    work: Path, lm_args: list[str], name: str, strategy: str, *args: str, main: Callable[..., None] | None = None
) -> Path:
    """Train on two ranks and return the run's folder; ``main`` gets the command and ``<name>.json``."""
    command = [
        "fit", "--config", str(ROOT / f"configs/strategy/{strategy}.yaml"), *lm_args, "--name", name,
        "--data.batch_size", "8", "--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.max_steps", "60",
        "--trainer.val_check_interval", "20", "--trainer.check_val_every_n_epoch", "null",
        "--trainer.limit_val_batches", "20", "--trainer.log_every_n_steps", "1", "--model.sample_tokens", "0",
        "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false", *args,
    ]  # fmt: skip
    assert run_ranks(main or noted_main, command, work / f"{name}.json", folder=work / name) == [0, 0], logs(
        work / name
    )
    return work / "runs/lm" / name


def noted_main(args: list[str], path: Path) -> None:
    """Train, and keep this rank's weights as a sum, their shapes, and what PowerSGD has counted."""
    cli = main_of("lm")(args)
    params, strategy = list(cli.model.parameters()), cli.trainer.strategy
    numbers = strategy.state.compression_stats() if isinstance(strategy, PowerSGD) else ()
    found = sum(p.double().sum().item() for p in params), [tuple(p.shape) for p in params], numbers
    path.with_suffix(f".{cli.trainer.global_rank}").write_text(json.dumps(found))


@pytest.mark.matrix
def test_power_sgd_sends_less_and_ends_near_ddp(work: Path, lm_args: list[str], record_property: Any) -> None:
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
    record_property(
        "summary", f"PowerSGD: 1/{rate:.1f} of the bytes, val/loss {losses['near']:.3f}, DDP {losses['plain']:.3f}"
    )
    steps = [read_metrics(path / "metrics.csv", "train/loss") for path in (plain, near)]
    assert steps[0][:10] == steps[1][:10], "it starts as DDP"
    assert steps[0][12:] != steps[1][12:]
    assert abs(losses["near"] - losses["plain"]) < 0.1 * (first - losses["plain"]), "of the way that DDP went"


@pytest.mark.matrix
def test_power_sgd_goes_on_from_a_checkpoint(work: Path, lm_args: list[str]) -> None:
    short = ["--trainer.strategy.start_step", "10", "--trainer.max_steps"]
    short = ["--model.lr_scheduler", "common.optim.Constant", *short]
    whole = fit(work, lm_args, "whole", "ddp_powersgd", *short, "40")
    fit(work, lm_args, "cut", "ddp_powersgd", *short, "30")
    again = fit(work, lm_args, "cut", "ddp_powersgd", *short, "40", "--ckpt_path", "last")
    losses, expected = (read_metrics(path / "metrics.csv", "train/loss")[30:] for path in (again, whole))
    assert len(losses) == 10
    assert difference(losses[:1], expected[:1]) < 1e-5, "weights, optimizer and data are those of the whole run"
    assert difference(losses, expected) < 0.05


def zero_gradient(path: Path) -> None:
    """One step of PowerSGD of rank 1 where a matrix has no gradient at first."""
    dist.init_process_group("gloo")
    net = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    strategy = PowerSGD(1, 2)
    model = DistributedDataParallel(net)
    strategy.register_hook(model)
    for step in range(4):
        model(torch.zeros(2, 16) if step < 3 else torch.ones(2, 16)).sum().backward()
        assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None), step


def test_power_sgd_survives_a_gradient_of_zero(work: Path) -> None:
    assert run_ranks(zero_gradient, work, folder=work) == [0, 0], logs(work)


def many_buckets(path: Path) -> None:
    """Steps of PowerSGD with more buckets than fit into one message, of unlike sizes."""
    dist.init_process_group("gloo")
    torch.manual_seed(1)
    net = nn.Sequential(*(nn.Linear(*sizes) for sizes in ((16, 200), (200, 30), (30, 150), (150, 16)) * 3))
    strategy = PowerSGD(2, 2)
    model = DistributedDataParallel(net, bucket_cap_mb=0.02)
    strategy.register_hook(model)
    for _ in range(40):
        model(torch.randn(2, 16)).square().sum().backward()
    assert strategy.state.compression_stats()[0] > 2


def test_power_sgd_keeps_buckets_apart(work: Path) -> None:
    assert run_ranks(many_buckets, work, folder=work) == [0, 0], logs(work)


def test_power_sgd_does_not_scale_gradients() -> None:
    strategy = PowerSGD()
    strategy._precision_plugin = SimpleNamespace(precision="16-mixed")  # type: ignore[assignment]  # which needs a GPU
    with pytest.raises(InputError, match=r"trainer.precision: 16-mixed .*; take bf16-mixed"):
        strategy.setup_environment()


@pytest.mark.parametrize("strategy", ["ring_allreduce", "ddp_powersgd"])
def test_what_averages_gradients_itself_takes_plain_ddp(
    strategy: str, work: Path, plain_args: dict[str, list[str]]
) -> None:
    layer = ["--config", str(ROOT / f"configs/strategy/{strategy}.yaml"), "--trainer.accelerator", "cpu"]
    args = ["fit", *layer, *plain_args["multitask"], "--model.aggregator", "torchjd.aggregation.Mean"]
    assert run_ranks(main_of("multitask"), [*args, "--trainer.devices", "2"], folder=work) == [2, 2], logs(work)
    assert "model.aggregator: averages gradients by itself" in (work / "rank0.log").read_text().splitlines()[-1]


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
        self.tp_plan = plan or self.PLAN
        blocks = [nn.ModuleDict({"up": nn.Linear(6, 8), "act": nn.ReLU(), "down": nn.Linear(8, 6)}) for _ in range(2)]
        self.layers, self.norm, self.head = nn.ModuleList(blocks), nn.LayerNorm(6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer["down"](layer["act"](layer["up"](x)))  # type: ignore[index]
        return self.head(self.norm(x))


def sliced_and_whole(path: Path) -> None:
    """Outputs and gradients of a sliced net and of the same one whole; a parameter between slices is refused."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(1)
    whole, x = Own(), torch.randn(3, 6)
    sliced, seen = copy.deepcopy(whole), []
    sliced.head.register_forward_hook(lambda _, __, output: seen.append(output))
    slice_layers(sliced, plan_slices(sliced, 2), mesh)
    outputs = [net(x) for net in (sliced, whole)]
    assert type(seen[0]) is torch.Tensor, "hooks from before see what the net sees"
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
    between = Own()
    between.layers[0]["act"] = nn.PReLU()  # type: ignore[index]
    slice_layers(between, plan_slices(between, 2), mesh)
    with pytest.raises(
        InputError, match=r"layers.0.act \(PReLU\) has parameters, is not in the plan, and gets a slice"
    ):
        between(x)
    norms = nn.Sequential(Own(), nn.BatchNorm1d(4))
    with pytest.raises(InputError, match=r"1 \(BatchNorm1d\) has parameters that cannot be kept whole"):
        slice_layers(norms, plan_slices(norms, 2), mesh)


def test_sliced_layers_compute_what_whole_ones_do(work: Path) -> None:
    assert run_ranks(sliced_and_whole, work / "sizes", folder=work) == [0, 0], logs(work)
    for rank in range(2):
        sizes = json.loads((work / f"sizes.{rank}").read_text())
        whole = {name for name, size in sizes.items() if size == 1}
        assert whole == {"norm.weight", "norm.bias", "layers.0.down.bias", "layers.1.down.bias"}
        assert {size for name, size in sizes.items() if name not in whole} == {0.5}


def test_plans_of_nets() -> None:
    sizes: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    net = causal_lm(LlamaConfig(**sizes, tie_word_embeddings=True), 10)
    plan = plan_slices(net, 2)
    assert len(plan) == 2 * 7, "the head shares its weight with the embedding, which is whole"
    assert plan["model.layers.1.mlp.down_proj"] == "rowwise"
    assert plan_slices(nn.Sequential(net), 2)["0.model.layers.0.self_attn.q_proj"] == "colwise"
    untied = causal_lm(LlamaConfig(**sizes, tie_word_embeddings=False), 10)
    assert plan_slices(untied, 2)["lm_head"] == "colwise_gather_output"


@pytest.mark.parametrize(
    ("make", "ranks", "line"),
    [
        (lambda: nn.Linear(2, 2), 2, "Linear has no plan"),
        (lambda: Own({"norm": "colwise"}), 2, r"wants norm \(LayerNorm\) colwise, which is not supported"),
        (lambda: Own({"head": "packed"}), 2, r"wants head \(Linear\) packed, which is not supported"),
        (lambda: Own({"head": "colwise"}), 3, "head has 4 features, no multiple of 3"),
        (lambda: Own({"layers.*.dwn": "rowwise"}), 2, "dwn names no layer; did you mean 'layers.*.down'?"),
        (
            lambda: nn.Sequential(causal_lm(LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2), 9)),
            4,
            "num_attention_heads of LlamaConfig is 2, no multiple of 4",
        ),
    ],
)
def test_plans_that_do_not_fit(make: Callable[[], nn.Module], ranks: int, line: str) -> None:
    with pytest.raises(InputError, match=line):
        plan_slices(make(), ranks)


@pytest.mark.matrix
def test_two_dimensions(work: Path, lm_args: list[str], record_property: Any) -> None:
    """Four ranks, two groups of two, stopped and gone on with: all that one process has computed, uneven shares too."""
    net = "--model.config.init_args"
    found: dict[str, dict[str, list[float]]] = {}
    for name, world in (("one", 1), ("four", 4)):
        layer = ["--config", str(ROOT / "configs/strategy/tensor_parallel.yaml")] if world > 1 else []
        args = [
            "fit", *layer, *lm_args, "--name", name, "--data.batch_size", str(8 if world == 1 else 4),
            f"{net}.intermediate_size", "66", f"{net}.num_attention_heads", "4", f"{net}.num_key_value_heads", "2",
            "--trainer.accelerator", "cpu", "--trainer.devices", str(world), "--trainer.log_every_n_steps", "1",
            "--trainer.val_check_interval", "5", "--trainer.check_val_every_n_epoch", "null",
            "--model.lr_scheduler", "common.optim.Constant", "--trainer.enable_progress_bar", "false",
        ]  # fmt: skip
        values = found[name] = {"train/loss": [], "optim/grad_norm": [], "val/loss": []}
        for more in (["--trainer.max_steps", "10"], ["--trainer.max_steps", "20", "--ckpt_path", "last"]):
            assert run_ranks(main_of("lm"), [*args, *more], world=world, folder=work) == [0] * world, logs(work)
        for key, column in values.items():
            column += read_metrics(work / "runs/lm" / name / "metrics.csv", key)
    assert len(found["one"]["train/loss"]) == 20
    worst = max(difference(found["four"][key], found["one"][key]) for key in found["one"])
    record_property("summary", f"2 x 2 ranks: {worst:.1e}")
    assert worst < 1e-5
    one, four = (read_checkpoint(work / "runs/lm" / name / "checkpoints/last.ckpt") for name in found)
    for name, value in one["state_dict"].items():
        assert torch.allclose(four["state_dict"][name], value, atol=1e-5), name
    states, others = (checkpoint["optimizer_states"][0]["state"] for checkpoint in (one, four))
    assert states.keys() == others.keys()
    for number, state in states.items():
        for key, value in state.items():
            assert torch.allclose(others[number][key], value, atol=1e-5), (number, key)


@pytest.mark.parametrize(
    ("recipe", "flags", "line"),
    halved(
        [
            ("lm", ["--trainer.strategy.tensor_parallel", "3"], "tensor_parallel: 3 is no divisor of 2 ranks"),
            ("lm", ["--trainer.strategy.tensor_parallel", "0"], "tensor_parallel: must be at least 1, got 0"),
            (
                "lm",
                ["--model.config.init_args.num_attention_heads", "1"],
                "num_attention_heads of LlamaConfig is 1, no",
            ),
            ("lm", ["--model.config", "transformers.GPT2Config"], "GPT2LMHeadModel has no plan (tp_plan)"),
            ("classification", [], "ConvNet has no plan (tp_plan)"),
        ]
    ),
)
def test_mistakes_of_tensor_parallel(
    recipe: str, flags: list[str], line: str, work: Path, plain_args: dict[str, list[str]]
) -> None:
    layer = ["--config", str(ROOT / "configs/strategy/tensor_parallel.yaml"), "--trainer.accelerator", "cpu"]
    own = plain_args["lm"] if recipe == "lm" else []
    args = [*layer, *own, *flags, "--trainer.devices", "2"]
    assert run_ranks(main_of(recipe), ["fit", *args], folder=work) == [2, 2], logs(work)
    assert line in (work / "rank0.log").read_text().splitlines()[-1]
    assert run_ranks(main_of(recipe), ["preflight", *args], world=1, folder=work) == [2], logs(work)
    assert line in (work / "rank0.log").read_text().splitlines()[-1]
    assert not (work / f"runs/{recipe}/default/checkpoints").exists()
