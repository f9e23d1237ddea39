"""Schedules, parameter groups and optimizers against closed forms, plain torch and runs of a recipe."""

import copy
import inspect
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from transformers import AutoModelForCausalLM, LlamaConfig

from common.errors import InputError
from common.nets import ConvNet
from common.nets.tables import FTTransformer, TabM
from common.optim import (
    WSD,
    Constant,
    Cosine,
    Exponential,
    Linear,
    MuonAdamW,
    Schedule,
    Step,
    param_groups,
    scale_lr,
)
from common.run.cli import RecipeCLI
from tests.support import halved, main_of, read_metrics

pytestmark = pytest.mark.usefixtures("no_report")

SMALL = [
    "--model.net.widths", "[4]", "--data.batch_size", "8", "--trainer.limit_val_batches", "1",
    "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
]  # fmt: skip
NO_FILES = ["--trainer.logger", "false", "--trainer.enable_checkpointing", "false"]
CSV = ["--trainer.logger", "[]", "--trainer.log_every_n_steps", "1"]


def fit(*args: str) -> RecipeCLI:
    """Run the classification recipe on few small batches."""
    return main_of("classification")(["fit", *SMALL, *args])


def lr_of_steps(*args: str) -> list[float]:
    """The learning rate of each step of a run, as its metrics.csv has it."""
    cli = fit(*CSV, *args)
    return read_metrics(cli.run.path / "metrics.csv", "optim/lr")


def layer(folder: Path, **model: Any) -> list[str]:
    """A config with settings of the model, written to a file."""
    path = folder / f"{'_'.join(model)}.yaml"
    path.write_text(yaml.safe_dump({"model": model}))
    return ["--config", str(path)]


def a_class(path: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": path, "init_args": init_args}


# Schedules


def trace(make: Callable[[torch.optim.Optimizer], LRScheduler], steps: int, lr: float = 2.0) -> list[float]:
    """The learning rate of each step and the one after the last."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr, momentum=0.9)
    scheduler = make(optimizer)
    if isinstance(scheduler, Schedule):
        scheduler.start(steps)
    rates = [optimizer.param_groups[0]["lr"]]
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize(
    ("kind", "settings", "shape"),
    [
        (Constant, {}, lambda t: 1.0),
        (Constant, {"end": 0.5}, lambda t: 1.0),
        (Linear, {}, lambda t: 1 - t),
        (Linear, {"end": 0.2}, lambda t: 1 - 0.8 * t),
        (Cosine, {}, lambda t: (1 + math.cos(math.pi * t)) / 2),
        (Cosine, {"end": 0.1}, lambda t: 0.1 + 0.45 * (1 + math.cos(math.pi * t))),
        (Exponential, {}, lambda t: math.exp(math.log(0.01) * t)),
        (Exponential, {"end": 0.5}, lambda t: math.exp(math.log(0.5) * t)),
        (Step, {}, lambda t: 1.0 if t < 0.5 else 0.1 if t < 0.75 else 0.01),
        (Step, {"milestones": (0.25, 0.5, 0.75), "gamma": 0.5}, lambda t: 0.5 ** int(4 * min(t, 0.99))),
        (WSD, {}, lambda t: 1.0 if t < 0.8 else (1 - t) / 0.2),
        (WSD, {"end": 0.1, "decay_fraction": 0.5}, lambda t: 1.0 if t < 0.5 else 0.1 + 0.9 * (1 - t) / 0.5),
        (WSD, {"end": 0.1, "decay_fraction": 0.0}, lambda t: 1.0),
        (WSD, {"decay_fraction": 1.0}, lambda t: 1 - t),
    ],
)
@pytest.mark.parametrize(("warmup", "warm_steps"), [(0, 0), (4, 4), (0.2, 4), (1, 1), (0.0, 0)])
def test_schedules_have_their_closed_form(
    kind: type[Schedule], settings: Any, shape: Callable[[float], float], warmup: float, warm_steps: int
) -> None:
    steps = 20
    climb = [2.0 * (step + 1) / (warm_steps + 1) for step in range(warm_steps)]
    rest = steps - warm_steps
    expected = climb + [2.0 * shape(step / rest) for step in range(rest + 1)]
    rates = trace(lambda optimizer: kind(optimizer, warmup=warmup, **settings), steps)
    assert rates == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_every_group_keeps_its_share_of_the_rate() -> None:
    optimizer = torch.optim.SGD(
        [{"params": [nn.Parameter(torch.zeros(1))], "lr_scale": scale} for scale in (1.0, 0.1)], lr=3.0
    )
    scale_lr(optimizer)
    schedule = Linear(optimizer, warmup=1)
    schedule.start(3)
    rates = []
    for _ in range(4):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert torch.tensor(rates).allclose(torch.tensor([[1.5, 0.15], [3.0, 0.3], [1.5, 0.15], [0.0, 0.0]]))


def test_a_warm_up_may_be_the_whole_run_and_no_longer() -> None:
    assert trace(lambda optimizer: Cosine(optimizer, warmup=4), 4) == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    with pytest.raises(InputError, match=r"model.lr_scheduler.warmup 5 does not fit into 4 steps"):
        trace(lambda optimizer: Cosine(optimizer, warmup=5), 4)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda optimizer: Cosine(optimizer, warmup=-1), r"model.lr_scheduler.warmup .* got -1"),
        (lambda optimizer: Cosine(optimizer, warmup=1.5), r"model.lr_scheduler.warmup .* got 1.5"),
        (lambda optimizer: Linear(optimizer, end=1.1), r"model.lr_scheduler.end .* got 1.1"),
        (lambda optimizer: Linear(optimizer, end=-0.1), r"model.lr_scheduler.end .* got -0.1"),
        (lambda optimizer: Exponential(optimizer, end=0.0), r"model.lr_scheduler.end .* above 0, got 0"),
        (
            lambda optimizer: Step(optimizer, milestones=(100.0,)),
            r"model.lr_scheduler.milestones .* got \(100.0,\)",
        ),
        (
            lambda optimizer: WSD(optimizer, decay_fraction=2.0),
            r"model.lr_scheduler.decay_fraction .* got 2.0",
        ),
    ],
)
def test_arguments_out_of_range_are_refused(make: Callable[..., Schedule], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        trace(make, 10)


def test_a_schedule_goes_on_where_it_stood() -> None:
    """Also in a longer run, with another rate: the config decides, the checkpoint only says where it stands."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = Cosine(optimizer)
    schedule.start(4)
    for _ in range(4):
        optimizer.step()
        schedule.step()
    saved, rate = (
        copy.deepcopy((schedule.state_dict(), optimizer.state_dict())),
        optimizer.param_groups[0]["lr"],
    )
    assert rate == 0
    for steps, lr in ((4, 2.0), (8, 2.0), (8, 6.0)):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
        schedule = Cosine(optimizer)
        schedule.start(steps)
        optimizer.load_state_dict(saved[1])
        schedule.load_state_dict(saved[0])
        whole = trace(Cosine, steps, lr)
        assert optimizer.param_groups[0]["lr"] == whole[4] == schedule.get_last_lr()[0]
        if steps == 8:
            optimizer.step()
            schedule.step()
            assert optimizer.param_groups[0]["lr"] == whole[5]


# The length of a run


@pytest.mark.parametrize(
    ("settings", "steps"),
    halved(
        [
            ({"max_steps": 5}, 5),
            ({"max_epochs": 2, "limit_train_batches": 3}, 6),
            ({"max_epochs": 2, "limit_train_batches": 0.05}, 2 * 7),  # of 157 batches
            ({"max_epochs": 2, "limit_train_batches": 6, "accumulate_grad_batches": 2}, 6),
            ({"max_epochs": 3, "limit_train_batches": 4, "accumulate_grad_batches": 2, "max_steps": 5}, 5),
            ({"max_epochs": 1, "max_steps": 1000, "limit_train_batches": 2}, 2),
        ]
    ),
)
def test_a_schedule_ends_with_the_run(settings: dict[str, Any], steps: int, work: Path) -> None:
    flags = [part for key, value in settings.items() for part in (f"--trainer.{key}", str(value))]
    cli = fit(*NO_FILES, "--model.lr_scheduler.end", "0.25", *flags)
    schedule = cli.trainer.lr_scheduler_configs[0].scheduler
    assert isinstance(schedule, Cosine)
    assert cli.trainer.global_step == schedule.last_epoch == schedule.total_steps == steps
    lr = cli.trainer.optimizers[0].param_groups[0]["lr"]
    assert lr == schedule.get_last_lr()[0] == pytest.approx(3.0e-3 * 0.25)


def test_a_run_without_an_end_is_refused(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fit(*NO_FILES, "--trainer.max_epochs", "-1")
    assert "model.lr_scheduler: needs a run with an end: set trainer.max_steps" in capsys.readouterr().err


def test_a_resumed_run_follows_its_new_length_and_rate(work: Path) -> None:
    schedule = ["--model.lr_scheduler.warmup", "0"]
    first = lr_of_steps(*schedule, "--trainer.max_steps", "4")
    longer = lr_of_steps(*schedule, "--trainer.max_steps", "8", "--ckpt_path", "last")
    faster = lr_of_steps(*schedule, "--trainer.max_steps", "12", "--ckpt_path", "last", "--model.optimizer.lr", "0.01")
    assert first == pytest.approx(trace(Cosine, 4, 3.0e-3)[:4])
    assert longer[4:] == pytest.approx(trace(Cosine, 8, 3.0e-3)[4:8])
    assert faster[8:] == pytest.approx(trace(Cosine, 12, 0.01)[8:12])


# Schedulers of torch and Lightning


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("StepLR", {"step_size": 2, "gamma": 0.5}),
        ("ExponentialLR", {"gamma": 0.7}),
        ("CosineAnnealingLR", {"T_max": 6}),
        ("OneCycleLR", {"max_lr": 0.1, "total_steps": 6}),
        ("CyclicLR", {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 2}),
        ("LinearLR", {"start_factor": 0.25, "total_iters": 4}),
    ],
)
def test_schedulers_of_torch_step_as_in_a_plain_loop(name: str, settings: dict[str, Any], work: Path) -> None:
    kind = getattr(torch.optim.lr_scheduler, name)
    rates = lr_of_steps(
        *layer(work, lr_scheduler=a_class(f"torch.optim.lr_scheduler.{name}", **settings)),
        *layer(work, optimizer=a_class("torch.optim.SGD", lr=0.5, momentum=0.9)),
        "--trainer.max_steps", "6",
    )  # fmt: skip
    plain = trace(lambda optimizer: kind(optimizer, **settings), 6 if kind is not OneCycleLR else 5, 0.5)[:6]
    assert rates == pytest.approx(plain, rel=1e-6)
    assert len(set(rates)) > 2


@pytest.mark.parametrize(
    ("settings", "validations"),
    [  # the number of validations before each step
        ({"max_epochs": 4, "limit_train_batches": 2}, [0, 0, 1, 1, 2, 2, 3, 3]),
        ({"max_epochs": 4, "limit_train_batches": 2, "check_val_every_n_epoch": 2}, [0, 0, 0, 0, 1, 1, 1, 1]),
        ({"max_epochs": 2, "limit_train_batches": 4, "val_check_interval": 0.5}, [0, 0, 1, 1, 2, 2, 3, 3]),
        (
            {
                "max_steps": 8,
                "limit_train_batches": 2,
                "val_check_interval": 3,
                "check_val_every_n_epoch": "null",
            },
            [0, 0, 0, 1, 1, 1, 2, 2],
        ),
        (
            {
                "max_epochs": 2,
                "limit_train_batches": 6,
                "val_check_interval": 2,
                "accumulate_grad_batches": 2,
            },
            [0, 1, 2, 3, 4, 5],
        ),
    ],
)
def test_reduce_on_plateau_follows_the_validations(
    settings: dict[str, Any], validations: list[int], work: Path
) -> None:
    never_better = {"threshold": 1.0e9, "threshold_mode": "abs", "patience": 0, "factor": 0.5}
    monitor = {"monitor": "val/accuracy", "mode": "max"}
    plateau = a_class("lightning.pytorch.cli.ReduceLROnPlateau", **never_better, **monitor)
    flags = [part for key, value in settings.items() for part in (f"--trainer.{key}", str(value))]
    rates = lr_of_steps(*layer(work, lr_scheduler=plateau), "--model.optimizer.lr", "0.8", *flags)
    assert rates == pytest.approx([0.8 * 0.5 ** max(number - 1, 0) for number in validations])


def test_reduce_on_plateau_is_resumed(work: Path) -> None:
    """Torch's own, which monitors val/loss, from a checkpoint that was written in a validation it stepped after."""
    never_better = {"threshold": 1.0e9, "threshold_mode": "abs", "patience": 0, "factor": 0.5}
    plateau = layer(work, lr_scheduler=a_class("torch.optim.lr_scheduler.ReduceLROnPlateau", **never_better))
    args = [*plateau, "--model.optimizer.lr", "0.8", "--trainer.limit_train_batches", "2"]
    best = work / "runs/classification/default/checkpoints/best.ckpt"
    first = lr_of_steps(*args, "--trainer.max_epochs", "3")
    saved = torch.load(best, weights_only=True)["global_step"]
    rest = lr_of_steps(*args, "--trainer.max_epochs", "5", "--ckpt_path", "best")[saved:]
    assert first == pytest.approx([0.8, 0.8, 0.8, 0.8, 0.4, 0.4])
    assert rest == pytest.approx([*first, 0.2, 0.2, 0.1, 0.1][saved:])


def test_a_mistyped_monitor_is_corrected(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plateau = layer(work, lr_scheduler=a_class("lightning.pytorch.cli.ReduceLROnPlateau", monitor="val/acuracy"))
    with pytest.raises(SystemExit):
        fit(*NO_FILES, *plateau, "--trainer.max_steps", "1")
    assert capsys.readouterr().err == (
        f"{plateau[1]}:5: model.lr_scheduler.init_args.monitor: 'val/acuracy' is not logged; "
        "did you mean 'val/accuracy'?\n"
    )


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"max_lr": 0.1, "total_steps": 3}, "total_steps: 3 is less than the run's 4"),
        ({"max_lr": 0.1}, "You must define either total_steps OR (epochs AND steps_per_epoch)"),
    ],
)
def test_one_cycle_must_reach_the_end(
    settings: dict[str, Any], problem: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cycle = layer(work, lr_scheduler=a_class("torch.optim.lr_scheduler.OneCycleLR", **settings))
    with pytest.raises(SystemExit):
        fit(*NO_FILES, *cycle, "--trainer.max_steps", "4")
    error = capsys.readouterr().err
    assert error.startswith(str(cycle[1]))
    assert error.endswith(f"{problem}\n")


# Parameter groups


class Parts(nn.Module):
    """One of each kind of part: a table, a convolution, norms, hidden layers, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.norm = nn.LayerNorm(6)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6, bias=False))
        self.head = nn.Linear(6, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        states = self.conv(self.table(tokens).transpose(1, 2)).transpose(1, 2)
        return self.head(self.body(self.norm(states)))


def names_where(net: nn.Module, groups: list[dict[str, Any]], **facts: Any) -> set[str]:
    """Names of the parameters in groups with these settings."""
    names = {id(p): name for name, p in net.named_parameters()}
    chosen = [group for group in groups if all(group.get(key) == value for key, value in facts.items())]
    return {names[id(p)] for group in chosen for p in group["params"]}


def test_norms_and_biases_do_not_decay_and_muon_gets_hidden_matrices() -> None:
    net = Parts()
    groups = param_groups(net)
    assert names_where(net, groups, weight_decay=0.0) == {
        "conv.bias", "norm.weight", "norm.bias", "body.0.bias", "head.bias",
    }  # fmt: skip
    assert names_where(net, groups, use_muon=True) == {"body.0.weight", "body.2.weight"}
    assert all("weight_decay" not in group for group in groups if group.get("weight_decay") != 0.0)
    everything = [id(p) for group in groups for p in group["params"]]
    assert sorted(everything) == sorted(id(p) for p in net.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_language_model_heads_and_embeddings_are_left_to_adamw(tied: bool) -> None:
    config = LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    net = AutoModelForCausalLM.from_config(config)
    groups = param_groups(net)
    hidden = names_where(net, groups, use_muon=True)
    assert hidden == {
        f"model.layers.0.{name}.weight"
        for name in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
        )
    }  # fmt: skip
    tables = {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    assert names_where(net, groups, use_muon=False) - names_where(net, groups, weight_decay=0.0) == tables
    everything = [id(p) for group in groups for p in group["params"]]
    assert len(everything) == len(set(everything)) == len(list(net.parameters()))


@pytest.mark.parametrize(
    ("kind", "hidden", "factors"),
    [
        (TabM, {"blocks.0.0.weight", "blocks.1.0.weight"}, {f"blocks.{n}.0.{leaf}" for n in (0, 1) for leaf in "rs"}),
        (FTTransformer, {f"blocks.{n}.attention.W_{m}.weight" for n in (0, 1) for m in ("q", "k", "v", "out")}
         | {f"blocks.{n}.ffn.linear{m}.weight" for n in (0, 1) for m in (1, 2)}, set()),
    ],
)  # fmt: skip
def test_biases_and_embeddings_with_two_axes_are_no_matrices(kind: Any, hidden: set[str], factors: set[str]) -> None:
    """Members of an ensemble and columns of a table have vectors of their own; factors decay, as in TabM's own code."""
    net = kind(2, [3], torch.linspace(-2, 2, 50)[:, None].expand(-1, 2))
    groups = param_groups(net)
    assert names_where(net, groups, use_muon=True) == {f"net.backbone.{name}" for name in hidden}
    still = names_where(net, groups, weight_decay=0.0)
    assert still == {name for name, p in net.named_parameters() if p.ndim < 2 or name.endswith("bias")}
    assert {f"net.backbone.{name}" for name in factors} <= set(dict(net.named_parameters())) - still


def test_the_head_of_a_small_net_is_left_to_adamw() -> None:
    net = ConvNet(3, widths=(4,))
    assert names_where(net, param_groups(net), use_muon=True) == set()


def test_frozen_parameters_are_left_out() -> None:
    net = Parts()
    net.body.requires_grad_(False)
    groups = param_groups(net)
    assert not any(name.startswith("body") for name in names_where(net, groups))
    assert param_groups(Parts().requires_grad_(False)) == []


def test_prefixes_scale_the_rate() -> None:
    net = Parts()
    groups = param_groups(net, {"body.": 0.1, "table.": 0.5})
    optimizer = torch.optim.SGD(groups, lr=2.0)
    scale_lr(optimizer)
    rates = {
        name: {g["lr"] for g in optimizer.param_groups if name in names_where(net, [g])}
        for name in dict(net.named_parameters())
    }
    assert rates.pop("table.weight") == {1.0}
    assert all(rates.pop(name) == {0.2} for name in ("body.0.weight", "body.0.bias", "body.2.weight"))
    assert set(map(frozenset, rates.values())) == {frozenset({2.0})}


def test_a_factor_for_nothing_is_refused() -> None:
    with pytest.raises(InputError, match=r"model.body_lr_scale 0.1: the net has no part 'boddy.' to scale; give 1"):
        param_groups(Parts(), {"boddy.": 0.1})
    param_groups(Parts(), {"boddy.": 1.0})


# Muon with AdamW


def train(net: nn.Module, optimizers: list[torch.optim.Optimizer], lr: list[float], start: int = 0) -> None:
    """A step for each learning rate, on data that depends on the step's number alone."""
    for step, rate in enumerate(lr, start):
        tokens = torch.randint(5, (4, 7), generator=torch.Generator().manual_seed(step))
        F.cross_entropy(net(tokens).flatten(0, 1), tokens.flatten()).backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()


def test_muon_with_adamw_is_both_of_them() -> None:
    torch.manual_seed(1)
    net = Parts()
    twin = copy.deepcopy(net)
    groups, lr = param_groups(twin), trace(lambda optimizer: Cosine(optimizer, warmup=2), 8, 0.02)[:8]
    hidden = [group for group in groups if group["use_muon"]]
    others = [group for group in groups if not group["use_muon"]]
    train(net, [MuonAdamW(param_groups(net), weight_decay=0.3, momentum=0.9, betas=(0.8, 0.9))], lr)
    muon = torch.optim.Muon(hidden, weight_decay=0.3, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    train(twin, [muon, torch.optim.AdamW(others, weight_decay=0.3, betas=(0.8, 0.9))], lr)
    for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_muon_with_adamw_goes_on_from_its_state() -> None:
    torch.manual_seed(1)
    net = Parts()
    optimizer = MuonAdamW(param_groups(net), lr=0.02)
    train(net, [optimizer], [0.02, 0.01, 0.03])
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    twin = Parts()
    other = MuonAdamW(param_groups(twin), lr=0.5)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    twin.load_state_dict(saved["net"])
    other.load_state_dict(saved["optimizer"])
    assert [g["lr"] for g in other.param_groups] == [g["lr"] for g in optimizer.param_groups]
    train(net, [optimizer], [0.02, 0.01, 0.03], start=3)
    train(twin, [other], [0.02, 0.01, 0.03], start=3)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twin.parameters(), strict=True))


def test_muon_with_adamw_takes_groups_later_and_closures() -> None:
    net = Parts()
    optimizer = MuonAdamW([{"params": list(net.head.parameters()), "use_muon": False}], lr=0.1)
    optimizer.add_param_group({"params": [net.body[0].weight]})
    optimizer.add_param_group({"params": [net.norm.weight], "lr": 0.01})
    assert [group["use_muon"] for group in optimizer.param_groups] == [False, True, False]
    before = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    tokens = torch.arange(5)[None]

    def closure() -> Tensor:
        loss = F.cross_entropy(net(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    after = [p for group in optimizer.param_groups for p in group["params"]]
    assert not any(torch.equal(p, q) for p, q in zip(before, after, strict=True))


@pytest.mark.parametrize("settings", [{"lr": -1.0}, {"weight_decay": -1.0}, {"momentum": -1.0}, {"betas": (1.5, 0.9)}])
def test_muon_with_adamw_refuses_values_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"(?i)invalid|should be >= ?0"):
        MuonAdamW(param_groups(Parts()), **settings)


# Optimizers by class path


def run_optimizer(path: str, settings: dict[str, Any], work: Path) -> torch.optim.Optimizer:
    """Two steps with an optimizer that a config names; the second changes the weights of the first."""
    cli = fit(*layer(work, optimizer=a_class(path, **settings)), *CSV, "--trainer.max_steps", "2")
    losses = read_metrics(cli.run.path / "metrics.csv", "train/loss")
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)
    saved = torch.load(cli.run.path / "checkpoints/last.ckpt", weights_only=True)
    before = copy.deepcopy(cli.model)
    del before.net
    before.configure_model()
    weights = dict(before.net.named_parameters())
    for name, p in cli.model.net.named_parameters():
        assert torch.equal(saved["state_dict"][f"net.{name}"], p)
        assert not torch.equal(weights[name], p), name
    (optimizer,) = cli.trainer.optimizers
    return getattr(optimizer, "optimizer", optimizer)


@pytest.mark.parametrize(
    ("path", "settings"),
    [
        ("torch.optim.SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
        ("torch.optim.Adagrad", {"lr": 0.01}),
        ("torch.optim.RMSprop", {"lr": 0.001}),
        ("torch.optim.Adam", {"lr": 0.001}),
        ("torch.optim.AdamW", {"lr": 0.001}),
        ("common.optim.MuonAdamW", {"lr": 0.01}),
    ],
)
def test_optimizers_train_from_a_config(path: str, settings: dict[str, Any], work: Path) -> None:
    optimizer = run_optimizer(path, settings, work)
    assert path.endswith(f".{type(optimizer).__name__}")
    assert {key: optimizer.param_groups[0][key] for key in settings if key != "lr"} == {
        key: value for key, value in settings.items() if key != "lr"
    }


def test_optimizers_of_another_library_train_from_a_config(work: Path) -> None:
    library = pytest.importorskip("pytorch_optimizer")
    optimizer = run_optimizer("pytorch_optimizer.Lion", {"lr": 0.001}, work)
    assert isinstance(optimizer, library.Lion)


@pytest.mark.parametrize("path", ["torch.optim.Muon", "torch.optim.LBFGS"])
def test_optimizers_that_refuse_the_groups_are_reported(
    path: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        fit(*NO_FILES, "--model.optimizer", path, "--trainer.max_steps", "1")
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"--model.optimizer: {path.split('.')[-1]} ")


# Another class takes nothing over from the one that the recipe's config names


def default(kind: Any, name: str) -> Any:
    return inspect.signature(kind).parameters[name].default


@pytest.mark.parametrize("by_flag", [True, False])
def test_another_optimizer_inherits_no_argument(by_flag: bool, work: Path) -> None:
    flags = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.momentum", "0.9"]
    named = flags if by_flag else layer(work, optimizer=a_class("torch.optim.SGD", momentum=0.9))
    cli = fit(*NO_FILES, *named, "--model.lr_scheduler", "common.optim.Constant", "--trainer.max_steps", "1")
    (optimizer,) = cli.trainer.optimizers
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["weight_decay"] == default(torch.optim.SGD, "weight_decay") == 0
    assert optimizer.defaults["lr"] == default(torch.optim.SGD, "lr") == 1e-3  # the recipe's is 3e-3
    assert optimizer.defaults["momentum"] == 0.9


@pytest.mark.parametrize("by_flag", [True, False])
def test_another_schedule_inherits_no_argument(by_flag: bool, work: Path) -> None:
    flags = ["--model.lr_scheduler", "common.optim.WSD", "--model.lr_scheduler.decay_fraction", "0.5"]
    named = flags if by_flag else layer(work, lr_scheduler=a_class("common.optim.WSD", decay_fraction=0.5))
    schedule = fit(*NO_FILES, *named, "--trainer.max_steps", "1").trainer.lr_scheduler_configs[0].scheduler
    assert isinstance(schedule, WSD)
    assert schedule.warmup == default(WSD, "warmup") == 0  # the recipe's is 0.1
    assert schedule.decay_fraction == 0.5


def test_another_net_inherits_no_argument(work: Path) -> None:
    """Neither the net nor the config in it, in a second layer over a first."""
    sizes = {"image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 8, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 1, "intermediate_size": 8}
    vit = a_class("transformers.ViTConfig", hidden_act="relu", layer_norm_eps=0.5, **sizes)
    next_sizes = {"num_channels": 1, "patch_size": 2, "num_stages": 1, "hidden_sizes": [8], "depths": [1]}
    first = layer(work, net=a_class("common.nets.ImageClassifier", config=vit))
    config = a_class("transformers.ConvNextConfig", **next_sizes)
    (work / "second").mkdir()
    second = layer(work / "second", net=a_class("common.nets.ImageClassifier", config=config))
    args = ["fit", *SMALL[2:], *NO_FILES, *first, *second, "--trainer.max_steps", "1"]
    net = main_of("classification")(args).model.net
    assert net.model.config.model_type == "convnext"
    assert net.model.config.hidden_act == "gelu"
    assert net.model.config.layer_norm_eps == 1e-12
    # A flag names a net without a config, which jsonargparse looks for in arguments that were not given.
    args = ["fit", *SMALL[2:], *NO_FILES, *first, "--model.net", "common.nets.ConvNet", "--trainer.max_steps", "1"]
    assert isinstance(main_of("classification")(args).model.net, ConvNet)
