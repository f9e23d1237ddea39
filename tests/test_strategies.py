"""Every strategy computes what a single process does, and its checkpoints go on under every other.

The recipes and the layers in ``configs/strategy`` are discovered: a new one is tested as it is.
"""

import csv
import sys
from collections.abc import Callable
from functools import partial
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import pytest
import pytorch_optimizer
import torch
import transformers
from torch import Tensor, nn

import common.optim
from common.checkpoint import read_checkpoint
from common.losses import precise
from common.parts import Memory
from common.strategies.fsdp import FSDP, FSDP2
from common.strategies.sharding import ELEMENTWISE, JOINING, SEPARABLE, is_elementwise, is_separable
from recipes.regression.heads import Head
from tests.support import (
    EXACT,
    PLAIN,
    RECIPES,
    ROOT,
    STRATEGIES,
    TINY,
    covering,
    difference,
    halved,
    is_refused,
    logs,
    main_of,
    per_rank,
    read_metrics,
    run_ranks,
    runs_on,
    strategies_of,
    under,
)
from tests.test_resume import digest

pytestmark = pytest.mark.usefixtures("no_report")

FAST = [(recipe, under(recipe), 2, 1 + i % 2) for i, recipe in enumerate(RECIPES)]
CELLS = dict.fromkeys([
    *FAST,
    *covering(RECIPES, EXACT, (1, 2), (1, 2), allowed=lambda cell: not is_refused(*cell[:2]) and runs_on(*cell[1:3])),
])  # fmt: skip

BINNED = ("auroc", "calibration_error")

TWENTY = ("--trainer.max_steps", "20", "--trainer.gradient_clip_val", "0.5")

Fit = Callable[..., Path]


@pytest.fixture
def fit(work: Path, plain_args: dict[str, list[str]]) -> Fit:
    """Train without randomness, 16 samples per step, and return the run's folder."""

    def run(recipe: str, strategy: str | None, world: int, *args: str, name: str, accumulate: int = 1) -> Path:
        layer = ["--config", str(ROOT / f"configs/strategy/{strategy}.yaml")] if strategy else []
        if "zero3" in (strategy or ""):  # which does not shard what is small, by default
            layer += ["--trainer.strategy.zero_optimization", "{stage3_param_persistence_threshold: 0}"]
        command = [
            "fit", *layer, *PLAIN, *plain_args[recipe], "--name", name,
            "--data.batch_size", str(per_rank(16, world, strategy) // accumulate),
            "--trainer.accumulate_grad_batches", str(accumulate), "--trainer.accelerator", "cpu",
            "--trainer.check_val_every_n_epoch", "null",
            "--trainer.devices", str(world), "--trainer.log_every_n_steps", "1",
            "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false", *args,
        ]  # fmt: skip
        folder = work / f"logs-{name}"
        codes = run_ranks(main_of(recipe), command, world=world, folder=folder)
        assert codes == [0] * world, logs(folder)
        return work / "runs" / recipe / name

    return run


def validated(path: Path) -> list[str]:
    """Names of the metrics of validation, without those that put probabilities into bins, as rounding moves those."""
    with path.open(newline="") as file:
        names = next(csv.reader(file))
    return [name for name in names if name.startswith("val/") and name.rpartition("/")[2] not in BINNED]


@pytest.mark.parametrize(
    ("recipe", "strategy", "world", "accumulate"),
    [pytest.param(*cell, marks=[] if cell in FAST else pytest.mark.matrix) for cell in CELLS],
)
def test_losses_equal_one_process(
    recipe: str,
    strategy: str,
    world: int,
    accumulate: int,
    fit: Fit,
    reference: Callable[[str], Path],
    record_property: Callable[[str, Any], None],
) -> None:
    """Losses, norms of the gradients, which are clipped, and validation in the middle and in the end."""
    validate = ("--trainer.val_check_interval", str(10 * accumulate))
    folder = fit(recipe, strategy, world, *TWENTY, *validate, name="run", accumulate=accumulate)
    runs = [path / "metrics.csv" for path in (folder, reference(recipe))]
    losses, expected = (read_metrics(path, "train/loss") for path in runs)
    assert len(expected) == 20
    worst = difference(losses, expected)
    cell = f"{recipe}, {strategy}, {world} ranks, accumulation {accumulate}"
    record_property("summary", f"largest relative difference of a loss: {worst:.1e} ({cell})")
    assert worst < 1e-5
    norms, expected = (read_metrics(path, "optim/grad_norm") for path in runs)
    assert sum(norm > 0.5 for norm in expected) > 5
    assert difference(norms, expected) < 1e-4
    names = validated(runs[1])
    assert "val/loss" in names
    for name in names:
        values, expected = (read_metrics(path, name) for path in runs)
        assert difference(values, expected) < 1e-5, name


@pytest.fixture(scope="module")
def _references() -> dict[str, Path]:
    return {}


@pytest.fixture
def reference(
    fit: Fit, _references: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A recipe's run in a single process, without any strategy; made once."""

    def run(recipe: str) -> Path:
        if recipe not in _references:
            made = fit(recipe, None, 1, *TWENTY, "--trainer.val_check_interval", "10", name="reference")
            _references[recipe] = made.rename(tmp_path_factory.mktemp(recipe) / "reference")
        return _references[recipe]

    return run


@pytest.mark.matrix
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_goes_on_under_every_strategy(recipe: str, fit: Fit, record_property: Callable[[str, Any], None]) -> None:
    """Two steps under each, one after the other, on one rank and on two, end where a single process does.

    With checkpointed activations where the net has blocks, which every strategy that shards wraps as well.
    """
    hops: list[tuple[str | None, int]] = [(name, 2) for name in strategies_of(recipe) if name in EXACT]
    hops = [(None, 1), *hops, (None, 1)]
    schedule = "torch.optim.lr_scheduler.LinearLR"  # the same however long the run is
    args = ["--model.lr_scheduler", schedule, "--trainer.val_check_interval", "2", "--trainer.max_steps"]
    whole = fit(recipe, None, 1, *args, str(2 * len(hops)), name="whole")
    folder, again = Path(), ["--model.activation_checkpointing", "true"] if recipe == "lm" else []
    for step, (strategy, world) in enumerate(hops, 1):
        resumed = ["--ckpt_path", "last"] if step > 1 else []
        given = ["--trainer.strategy", "auto"] if strategy is None else []
        folder = fit(recipe, strategy, world, *args, str(2 * step), *resumed, *given, *again, name="hops")
    end = read_metrics(folder / "metrics.csv", "val/loss")
    expected = read_metrics(whole / "metrics.csv", "val/loss")
    assert len(end) == len(hops)
    record_property("summary", f"{recipe}: val/loss through {len(hops)} strategies: {difference(end, expected):.1e}")
    assert difference(end, expected) < 1e-5
    last, wanted = (read_checkpoint(path / "checkpoints/last.ckpt") for path in (folder, whole))
    for name, value in wanted["state_dict"].items():
        # The bias of attention's keys changes no output: its gradient is rounding, which Adam scales up.
        assert name.endswith("k_proj.bias") or torch.allclose(last["state_dict"][name], value, atol=1e-5), name
    states, wanted_states = (c["optimizer_states"][0] for c in (last, wanted))
    assert states["param_groups"] == wanted_states["param_groups"]
    for number, state in wanted_states["state"].items():
        for key, value in state.items():
            assert torch.allclose(states["state"][number][key], value, atol=1e-5), (number, key)
    assert last["lr_schedulers"] == wanted["lr_schedulers"]


class Running(nn.Module, Head):
    """A loss that follows the scale of the residuals: its state is a buffer outside of the net."""

    num_outputs = 1

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(1.0))
        self.scale: Tensor

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        off = precise(outputs)[..., 0] - target[:, None]
        if torch.is_grad_enabled():
            with torch.no_grad():
                self.scale.mul_(0.9).add_(off.abs().median() * 0.1)
        return (off / self.scale.detach()).square().mean()

    def predict(self, outputs: Tensor) -> Tensor:
        return precise(outputs).mean(1)


@pytest.mark.matrix
@pytest.mark.parametrize(
    "strategy",
    [name for name in strategies_of("regression") if name in EXACT],
)
def test_ranks_share_the_state_of_a_loss(strategy: str, fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a resumed run would go on with that of rank 0 alone."""
    monkeypatch.setenv("RECIPES_ALLOW", "tests")
    args = ["--model.head", "tests.test_strategies.Running", "--model.lr_scheduler", "null"]
    for steps, name in ((4, "whole"), (2, "cut"), (4, "cut")):
        goes_on = ["--ckpt_path", "last"] if (steps, name) == (4, "cut") else []
        fit("regression", strategy, 2, *args, *goes_on, "--trainer.max_steps", str(steps), name=name)
    runs = [Path("runs/regression", name, "checkpoints/last.ckpt") for name in ("whole", "cut")]
    assert digest(runs[0]) == digest(runs[1])
    assert read_checkpoint(runs[0])["state_dict"]["head.scale"] != 1


@pytest.mark.parametrize(
    ("flags", "world"),
    halved(
        [
            (["sharding_strategy", "SHARD_GRAD_OP"], 2),
            (["sharding_strategy", "HYBRID_SHARD", "device_mesh", "[1, 2]"], 2),
            (["sharding_strategy", "HYBRID_SHARD", "device_mesh", "[2, 2]"], 4),
        ]
    ),
)
def test_choices_of_fsdp1(flags: list[str], world: int, fit: Fit, reference: Callable[[str], Path]) -> None:
    keys = [f"--trainer.strategy.{flag}" if i % 2 == 0 else flag for i, flag in enumerate(flags)]
    folder = fit("lm", "fsdp", world, *TWENTY, *keys, "--trainer.limit_val_batches", "0", name="run")
    losses, expected = (read_metrics(path / "metrics.csv", "train/loss") for path in (folder, reference("lm")))
    assert difference(losses, expected) < 1e-5
    last, wanted = (read_checkpoint(path / "checkpoints/last.ckpt") for path in (folder, reference("lm")))
    for name, value in wanted["state_dict"].items():
        assert torch.allclose(last["state_dict"][name], value, atol=1e-4), name
    assert last["optimizer_states"][0]["state"].keys() == wanted["optimizer_states"][0]["state"].keys()


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (FSDP(), (200, 200, 400)),
        (FSDP("SHARD_GRAD_OP"), (400, 200, 400)),
        (FSDP("HYBRID_SHARD", device_mesh=(2, 1)), (400, 400, 800)),
        (FSDP2(), (200, 200, 400)),
        (FSDP2(reshard_after_forward=False), (400, 200, 400)),
    ],
)
def test_shares_of_two_ranks(strategy: FSDP | FSDP2, expected: tuple[int, int, int]) -> None:
    assert strategy.memory_per_rank(Memory(400, 400, 800), 100, 2) == expected


@pytest.mark.matrix
@pytest.mark.parametrize("strategies", [["fsdp2", "pipeline"], STRATEGIES], ids=len)
def test_texts_and_metrics_do_not_depend_on_the_strategy(
    strategies: list[str], work: Path, plain_args: dict[str, list[str]], fit: Fit
) -> None:
    """Three prompts on two ranks, one of which has a padded row; ``validate`` counts the same windows."""
    fit("lm", None, 1, "--trainer.max_steps", "4", "--model.temperature", "0", name="run")
    run, found = work / "runs/lm/run", {}
    for strategy in (None, *strategies):
        layer = ["--config", str(ROOT / f"configs/strategy/{strategy}.yaml")] if strategy else []
        world = 2 if strategy else 1
        given = ["--name", "run", "--ckpt_path", "last", *layer, "--trainer.devices", str(world)]
        prompts = ["--data.prompts", '["The import", "a", "An object"]']
        for command in (["predict", *given, *prompts], ["validate", *given]):
            codes = run_ranks(main_of("lm"), command, world=world, folder=work / "logs")
            assert codes == [0] * world, logs(work / "logs")
        losses = read_metrics(run / "validate-last/metrics.csv", "val/loss")
        found[strategy] = (run / "predict-last/predictions.csv").read_text(), losses[-1]
    texts, loss = found.pop(None)
    assert len(texts.splitlines()) > 3
    for strategy, (text, value) in found.items():
        assert text == texts, strategy
        assert value == pytest.approx(loss, rel=1e-6), strategy


MUON = ["--model.optimizer", "common.optim.MuonAdamW"]


@pytest.mark.matrix
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_optimizers_of_whole_matrices_and_l1_equal_one_process(strategy: str, fit: Fit) -> None:
    args = (*MUON, "--model.l1", "1.0e-4", "--trainer.max_steps", "20", "--trainer.limit_val_batches", "0")
    runs = [fit("lm", None, 1, *args, name="single"), fit("lm", strategy, 2, *args, name="ranks")]
    expected, losses = (read_metrics(run / "metrics.csv", "train/loss") for run in runs)
    assert difference(losses, expected) < 1e-5
    states = [read_checkpoint(run / "checkpoints/last.ckpt")["optimizer_states"][0]["state"] for run in runs]
    assert any("momentum_buffer" in state for state in states[0].values())
    assert all(states[0][number].keys() == states[1][number].keys() for number in states[0])


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (torch.optim.AdamW, True),
        (partial(torch.optim.AdamW, fused=True), True),
        (partial(torch.optim.SGD, momentum=0.9, nesterov=True), True),
        (torch.optim.RMSprop, True),
        (pytorch_optimizer.Lion, True),
        (torch.optim.Muon, False),
        (torch.optim.Adafactor, False),
        (partial(transformers.Adafactor, lr=1e-3, relative_step=False), False),
        (torch.optim.LBFGS, False),
        (pytorch_optimizer.Lamb, False),
        (pytorch_optimizer.LARS, False),
        (pytorch_optimizer.SOAP, False),
        (partial(torch.optim.AdamW, capturable=True), True),
        (pytorch_optimizer.ScheduleFreeAdamW, True),
        (pytorch_optimizer.Prodigy, False),
        (pytorch_optimizer.DAdaptAdam, False),
        (pytorch_optimizer.DAdaptSGD, False),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_which_optimizers_work_on_flat_pieces(make: Any, expected: bool) -> None:
    weight = torch.nn.Parameter(torch.zeros(5, 3))
    optimizer = make([weight])
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)  # a warm-up from nothing
    assert is_elementwise(optimizer) is expected
    assert not weight.any()
    assert not optimizer.state
    assert optimizer.param_groups[0]["lr"] == 0


LIBRARIES = {
    "torch": torch.optim, "pytorch_optimizer": pytorch_optimizer, "transformers": transformers, "common": common.optim,
}  # fmt: skip
KNOWN = [
    getattr(LIBRARIES[library], name)
    for known in (ELEMENTWISE, SEPARABLE)
    for library, names in known.items()
    for name in sorted(names)
]
Piece = tuple[slice, tuple[int, ...]]  # of 24 numbers, and its shape
MATRIX: list[Piece] = [(slice(24), (4, 6))]
FLAT: list[Piece] = [(slice(10), (10,)), (slice(10, 24), (14,))]
MATRICES: list[Piece] = [(slice(12), (3, 4)), (slice(12, 24), (3, 4))]


def moves_alike(make: Any, together: list[Piece], alone: list[Piece]) -> bool:
    """Whether an optimizer of some pieces as its parameters moves them as one optimizer for each of others does."""
    start, goal = torch.randn(2, 24, generator=torch.Generator().manual_seed(0))

    def moved(pieces: list[Piece]) -> Tensor:
        params = [nn.Parameter(start[part].view(shape).clone()) for part, shape in pieces]
        optimizer = make(params)
        for _ in range(30):
            for p, (part, shape) in zip(params, pieces, strict=True):
                p.grad = p.detach() - goal[part].view(shape)
            optimizer.step()
        return torch.cat([p.detach().flatten() - start[part] for p, (part, _) in zip(params, pieces, strict=True)])

    whole = moved(together)
    assert whole.abs().max() > 1e-4
    return bool((torch.cat([moved([piece]) for piece in alone]) - whole).abs().max() < 1e-4 * whole.abs().max())


@pytest.mark.parametrize("kind", KNOWN, ids=lambda kind: f"{kind.__module__.partition('.')[0]}.{kind.__name__}")
def test_what_is_known_of_optimizers_is_true(kind: Any) -> None:
    """By their steps: of a matrix against flat pieces of it, of two matrices against each alone."""
    own = {"relative_step": False} if kind is transformers.Adafactor else {}  # else it takes no rate
    make = partial(kind, lr=0.1, **own)
    optimizer = make([nn.Parameter(torch.zeros(3, 4))])
    assert is_separable(optimizer)
    assert moves_alike(make, MATRICES, MATRICES)
    try:
        on_pieces = moves_alike(make, MATRIX, FLAT)
    except ValueError:  # it takes matrices alone
        on_pieces = False
    assert is_elementwise(optimizer) is on_pieces


@pytest.mark.parametrize("setting", JOINING)
def test_settings_that_join_elements(setting: str) -> None:
    make: Any = {"stable_adamw": pytorch_optimizer.ADOPT}.get(setting, pytorch_optimizer.Lion)
    optimizer = make([nn.Parameter(torch.zeros(3, 4))], lr=0.1, **{setting: True})
    assert not is_elementwise(optimizer)
    assert is_separable(optimizer)


class OwnStep(torch.optim.AdamW):
    """One that goes by a norm of all."""

    def step(self, closure: Any = None) -> Any:
        nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 1.0)
        return super().step(closure)


class Says(OwnStep):
    elementwise = True


class SaysLess(OwnStep):
    separable = True


class OwnDefaults(torch.optim.AdamW):
    def __init__(self, params: Any):
        super().__init__(params, lr=1.0)


@pytest.mark.parametrize(
    ("kind", "elementwise", "separable"),
    [(OwnStep, False, False), (Says, True, True), (SaysLess, False, True), (OwnDefaults, True, True)],
)
def test_what_an_optimizer_says_of_itself(kind: Any, elementwise: bool, separable: bool) -> None:
    optimizer = kind([nn.Parameter(torch.zeros(3, 4))])
    assert (is_elementwise(optimizer), is_separable(optimizer)) == (elementwise, separable)


@pytest.mark.parametrize(
    ("strategy", "flags", "line"),
    [
        ("deepspeed_zero2", MUON, "model.optimizer: MuonAdamW needs whole tensors"),
        ("fsdp", MUON, "model.optimizer: MuonAdamW needs whole tensors"),
        ("fsdp", ["--model.optimizer", "torch.optim.Adafactor"], "model.optimizer: Adafactor needs whole tensors"),
        (
            "deepspeed_zero1",
            ["--model.optimizer", "pytorch_optimizer.Lamb"],
            "model.optimizer: Lamb needs whole tensors",
        ),
        (
            "deepspeed_zero2",
            ["--trainer.sync_batchnorm", "true"],
            "trainer.sync_batchnorm: DeepSpeed does not support it",
        ),
        ("fsdp2", ["--trainer.sync_batchnorm", "true"], "trainer.sync_batchnorm: FSDP2 does not support it"),
        ("fsdp", ["--trainer.strategy.device_mesh", "[1, 2]"], "is for sharding_strategy HYBRID_SHARD"),
        (
            "fsdp",
            ["--trainer.strategy.sharding_strategy", "HYBRID_SHARD", "--trainer.strategy.device_mesh", "[2, 1]"],
            "device_mesh: FSDP1 would not average gradients over replicas of one rank",
        ),
        ("deepspeed_zero2", ["--model.l1", "0.1"], "model.l1: DeepSpeed keeps gradients to itself"),
        (
            "deepspeed_zero2",
            ["--trainer.gradient_clip_algorithm", "value"],
            "DeepSpeed does not support clipping gradients by value",
        ),
    ],
)
def test_what_a_strategy_would_leave_out_is_refused(
    strategy: str, flags: list[str], line: str, work: Path, plain_args: dict[str, list[str]]
) -> None:
    layer = ["--config", str(ROOT / f"configs/strategy/{strategy}.yaml"), "--trainer.accelerator", "cpu"]
    codes = run_ranks(main_of("lm"), ["fit", *layer, *plain_args["lm"], *flags], world=1, folder=work)
    assert codes == [2], logs(work)
    assert line in (work / "rank0.log").read_text().splitlines()[-1]
    assert not (work / "runs/lm/default/checkpoints").exists()


@pytest.mark.matrix
def test_batch_norm_in_16_bits(work: Path) -> None:
    """Its statistics are in fp32 under FSDP2 as under DDP; DeepSpeed, which cannot, says so."""
    losses = {}
    cells = (("ddp", "bf16-mixed"), ("fsdp2", "bf16-mixed"), ("deepspeed_zero2", "bf16-true"), ("fsdp2", "bf16-true"))
    for strategy, precision in (*cells, ("deepspeed_zero2", "bf16-mixed")):
        layers = [str(ROOT / f"configs/{name}.yaml") for name in (f"strategy/{strategy}", f"precision/{precision}")]
        args = [
            "fit",
            *TINY,
            *(part for layer in layers for part in ("--config", layer)),
            "--model.augmentation",
            "null",
        ]
        args += ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--name", f"{strategy}-{precision}"]
        codes = run_ranks(main_of("classification"), args, folder=work)
        if (strategy, precision) not in cells:
            assert codes == [2, 2], logs(work)
            assert "trainer.precision: DeepSpeed would run batch norm" in (work / "rank0.log").read_text()
            continue
        assert codes == [0, 0], logs(work)
        table = work / f"runs/classification/{strategy}-{precision}/metrics.csv"
        losses[strategy, precision] = read_metrics(table, "train/loss") + read_metrics(table, "val/loss")
    assert losses["fsdp2", "bf16-mixed"] == pytest.approx(losses["ddp", "bf16-mixed"], rel=1e-2)
    assert losses["fsdp2", "bf16-true"] == pytest.approx(losses["deepspeed_zero2", "bf16-true"], rel=2e-2)


def test_a_missing_engine_is_named_with_its_command(work: Path, plain_args: dict[str, list[str]]) -> None:
    """In an environment whose path has everything but DeepSpeed."""
    layer = ["--config", str(ROOT / "configs/strategy/deepspeed_zero2.yaml")]
    assert run_ranks(without_deepspeed, ["fit", *layer, *plain_args["lm"]], world=1, folder=work) == [2], logs(work)
    last = (work / "rank0.log").read_text().splitlines()[-1]
    assert "trainer.strategy: DeepSpeed is not installed; run pip install -e '.[deepspeed]'" in last


def without_deepspeed(args: list[str]) -> None:
    """Run the recipe where DeepSpeed cannot be found."""
    for name in [name for name in sys.modules if name.split(".")[0] == "deepspeed"]:
        del sys.modules[name]

    class Hide(PathFinder):
        @classmethod
        def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
            return None if name.split(".")[0] == "deepspeed" else PathFinder.find_spec(name, path, target)

    sys.meta_path = [finder for finder in sys.meta_path if finder is not PathFinder]
    sys.meta_path.append(Hide)
    main_of("lm")(args)
