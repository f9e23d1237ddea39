"""Multi-task learning: weightings and aggregated gradients against other implementations, ranks, resume, mistakes."""

import contextlib
import logging
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchjd import aggregation, scalarization
from torchjd.aggregation import MGDA, Aggregator, AlignedMTL, ConFIG, FairGrad, GradDrop, Mean, PCGrad, Sum, UPGrad
from torchjd.autojac import jac_to_grad, mtl_backward

from benchmarks.multitask import delta_m
from common.checkpoint import read_checkpoint
from common.errors import InputError
from common.run.cli import RecipeCLI
from recipes.multitask.gradients import SUMMING, NNLSProjector, TaskGradients, cosines, make_aggregator, task_gradients
from recipes.multitask.net import MultiTaskNet
from recipes.multitask.pairs import draw_pairs
from recipes.multitask.tasks import Task, TaskDataset, TaskMetrics, task_loss, task_losses
from recipes.multitask.weighting import FAMO, DynamicWeightAverage, Fixed, Uncertainty, Weighting
from tests.support import EXACT, PLAIN, ROOT, TINY, halved, logs, main_of, read_metrics, run_ranks, strategies_of
from tests.test_resume import digest, killed_main, write_config

pytestmark = pytest.mark.usefixtures("no_report")

TASKS: list[Task] = [
    {"name": "left", "kind": "classification", "width": 10},
    {"name": "right", "kind": "classification", "width": 4},
    {"name": "offset", "kind": "regression", "width": 2},
]


def a_batch(count: int = 24) -> tuple[Tensor, dict[str, Tensor]]:
    """Inputs and targets of all tasks."""
    torch.manual_seed(0)
    target = {
        "left": torch.randint(10, (count,)),
        "right": torch.randint(4, (count,)),
        "offset": torch.randn(count, 2),
    }
    return torch.randn(count, 1, 6), target


def a_net(weighting: Weighting | None = None) -> MultiTaskNet:
    """A body of two layers with three heads."""
    torch.manual_seed(1)
    body = nn.Sequential(nn.Flatten(), nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 8))
    return MultiTaskNet(body, 8, TASKS, weighting or Fixed(TASKS))


def losses_of(net: MultiTaskNet, inputs: Tensor, target: dict[str, Tensor]) -> Tensor:
    return task_losses(TASKS, net(input=inputs)[0], target)


def test_pictures_hold_both_images_where_they_are_said_to_be() -> None:
    images = torch.rand(50, 1, 8, 6) + 0.1
    made = draw_pairs(images, torch.arange(5, 50), 300, 15, 2, seed=3)
    pictures = made[torch.arange(300)]
    assert (len(made), pictures.shape) == (300, (300, 1, 15, 15))
    assert made.chosen.unique().tolist() == list(range(5, 50))
    for pair in range(0, 300, 37):
        plain = torch.zeros(15, 15)
        for chosen, (row, column) in zip(made.chosen[:, pair], made.corner[:, pair].tolist(), strict=True):
            part = plain[row : row + 8, column : column + 6]
            part.copy_(torch.maximum(part, images[chosen, 0]))
        assert torch.equal(pictures[pair, 0], plain)
    columns = made.corner[..., 1]
    assert [columns[0].min(), columns[0].max(), columns[1].min(), columns[1].max()] == [0, 2, 7, 9]
    assert made.corner[..., 0].unique().tolist() == list(range(8))
    again, other = (draw_pairs(images, torch.arange(5, 50), 300, 15, 2, seed=seed) for seed in (3, 4))
    assert torch.equal(again[torch.tensor([7, 4])], pictures[[7, 4]])
    assert not torch.equal(other.chosen, made.chosen)


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ({"age": torch.zeros(5), "kind": torch.arange(5)}, r"target of task 'age' has the shape \(5,\), not \(5, 1\)"),
        ({"age": torch.zeros(5, 1), "kind": torch.arange(5) + 1}, r"'kind' has classes from 1 to 5 and width 5"),
        ({"agee": torch.zeros(5, 1)}, r"task 'age' has no target; did you mean 'agee'\?; mend data.py"),
    ],
)
def test_targets_that_do_not_fit_their_task(target: dict[str, Tensor], problem: str) -> None:
    tasks: list[Task] = [
        {"name": "age", "kind": "regression", "width": 1},
        {"name": "kind", "kind": "classification", "width": 5},
    ]
    with pytest.raises(InputError, match=problem):
        TaskDataset({"x": torch.zeros(5, 2)}, target, tasks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_metrics_are_those_of_their_formulas(dtype: torch.dtype) -> None:
    inputs, target = a_batch()
    net = a_net()
    outputs, _ = net(input=inputs)
    losses = task_losses(TASKS, outputs, target)
    log_p = outputs["left"].log_softmax(-1)[torch.arange(24), target["left"]]
    assert losses[0].item() == pytest.approx(-log_p.mean().item(), rel=1e-6)
    assert losses[2].item() == pytest.approx((outputs["offset"] - target["offset"]).square().mean().item(), rel=1e-6)
    metrics = TaskMetrics(TASKS).to(dtype)  # the sums stay exact
    for part in (slice(0, 10), slice(10, 24), slice(0, 0)):  # the last one is all padding
        some = [{name: values[part] for name, values in group.items()} for group in (outputs, target)]
        metrics.update(task_losses(TASKS, *some).detach(), *some)
    found = {name: metric.compute().item() for name, metric in metrics.named("val").items()}
    assert found["val/loss_right"] == pytest.approx(losses[1].item(), rel=1e-6)
    assert found["val/rmse_offset"] == pytest.approx(math.sqrt(losses[2].item()), rel=1e-6)
    right = (outputs["right"].argmax(-1) == target["right"]).double().mean().item()
    assert found["val/accuracy_right"] == pytest.approx(right)


def test_uncertainty_is_torchjds_for_regression_and_kendalls_for_classes() -> None:
    numbers: list[Task] = [{"name": name, "kind": "regression", "width": 1} for name in "abc"]
    losses = torch.tensor([0.3, 2.0, 5.0])
    ours, theirs = Uncertainty(numbers), scalarization.UW(3)
    start = torch.tensor([0.2, -1.0, 0.5])
    with torch.no_grad():
        ours.log_variance.copy_(start)
        theirs.log_var.copy_(start)
    state = ours()
    loss, expected = ours.combine(losses, ours.weights(state, losses), state), theirs(losses) / 3
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    expected.backward()
    assert torch.allclose(ours.log_variance.grad, theirs.log_var.grad)  # type: ignore[arg-type]
    mixed = Uncertainty(TASKS, initial=math.log(0.25))
    assert mixed.weights(mixed(), losses).tolist() == pytest.approx([4.0, 4.0, 2.0])


def test_dynamic_weight_average_is_torchjds_over_epochs() -> None:
    ours, theirs = DynamicWeightAverage(TASKS, temperature=0.7), scalarization.DWA(temperature=0.7)
    torch.manual_seed(0)
    weights = torch.ones(3)
    for epoch in range(5):
        for step in range(4):
            losses = torch.rand(3) + 2 / (epoch + 1) * torch.tensor([1.0, 0.3, 0.6])
            weights = ours.weights(ours(), losses)
            assert (weights * losses).mean().item() == pytest.approx(theirs(losses).item() / 3, rel=1e-6)
            ours.observe(losses, ends_epoch=step == 3)
        theirs.step()
    assert weights.std() > 0.05


def test_famo_is_torchjds_over_steps() -> None:
    ours, theirs = FAMO(TASKS, lr=0.1, weight_decay=0.01), scalarization.FAMO(3, lr=0.1, weight_decay=0.01)
    torch.manual_seed(0)
    for _ in range(30):
        losses = (torch.rand(3) * torch.tensor([1.0, 5.0, 0.1]) + 0.05).requires_grad_()
        (expected,) = torch.autograd.grad(theirs(losses), losses)
        weights = ours.weights(ours(), losses.detach())
        assert torch.allclose(weights.float() / 3, expected, rtol=1e-4)
        after = losses.detach() * torch.tensor([0.9, 0.7, 0.99])
        theirs.update(after)
        ours.look_back(losses.detach(), after)
    assert ours.logits.std() > 0.3


@pytest.mark.parametrize("weighting", [DynamicWeightAverage, FAMO])
def test_what_a_weighting_remembers_stays_exact_in_16_bits(weighting: Any) -> None:
    ours, saved = weighting(TASKS), weighting(TASKS)
    with torch.no_grad():
        for buffer in saved.buffers():
            buffer.copy_(torch.rand_like(buffer))
    ours.load_state_dict(saved.state_dict())
    ours.to(torch.bfloat16)
    assert {buffer.dtype for buffer in ours.buffers()} == {torch.float64}
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), saved.buffers(), strict=True))


def test_weights_that_are_learned_are_optimized_without_decay() -> None:
    from common.optim import param_groups

    net = a_net(Uncertainty(TASKS))
    (group,) = [g for g in param_groups(net) if any(p is net.weighting.log_variance for p in g["params"])]
    assert group["weight_decay"] == 0
    assert "weighting.log_variance" in net.state_dict()


def collect(aggregator: Aggregator, parts: int = 1, weighting: Weighting | None = None) -> tuple[list[Tensor], Any]:
    """Gradients of all parameters from a batch in so many micro-batches, and the tasks' weights."""
    inputs, target = a_batch()
    net = a_net(weighting)
    gradients = TaskGradients(aggregator, net)
    for part in torch.arange(24).chunk(parts):
        losses = losses_of(net, inputs[part], {name: values[part] for name, values in target.items()})
        weights = net.weighting.weights(net.weighting(), losses.detach()).to(losses.dtype)
        gradients.add(net.weighting.combine(losses, weights, net.weighting()) / parts, losses)
    weights = gradients.finish(lambda flat: flat, seed=5)
    return [p.grad.clone() for p in net.parameters() if p.grad is not None], weights


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("aggregator", [Mean(), Sum()], ids=str)
def test_the_mean_of_the_tasks_gradients_is_the_gradient_of_the_mean(parts: int, aggregator: Aggregator) -> None:
    """And so is their sum, divided by their number, so that body and heads are on one scale."""
    fixed = Fixed(TASKS, {"left": 2.0, "right": 0.5, "offset": 0.1})
    found, weights = collect(aggregator, parts, fixed)
    inputs, target = a_batch()
    net = a_net()
    (torch.tensor([2.0, 0.5, 0.1]) * losses_of(net, inputs, target)).mean().backward()
    for gradient, p in zip(found, net.parameters(), strict=True):
        assert torch.allclose(gradient, p.grad, atol=1e-7)  # type: ignore[arg-type]
    assert weights.tolist() == pytest.approx([1, 1, 1])


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize(
    "aggregator",
    [PCGrad(), FairGrad(alpha=1.0), GradDrop(), MGDA(), AlignedMTL(), ConFIG(), UPGrad(projector=NNLSProjector())],
    ids=str,
)
def test_aggregated_gradients_are_those_of_torchjds_engine(aggregator: Aggregator, parts: int) -> None:
    """Micro-batches give what the whole batch gives: it is their mean gradients that are aggregated."""
    found, _ = collect(aggregator, parts)
    inputs, target = a_batch()
    net = a_net()
    features = net.body(inputs)
    outputs = {name: head(features.relu()) for name, head in net.heads.items()}
    losses = [task_loss(task, outputs[task["name"]], target[task["name"]]) for task in TASKS]
    heads = [head.parameters() for head in net.heads.values()]
    mtl_backward(losses, features, shared_params=net.body.parameters(), tasks_params=heads)
    torch.manual_seed(5)
    jac_to_grad(net.body.parameters(), aggregator)
    # The loss is the mean over tasks, and so is what these sum up.
    for p in (
        net.parameters() if isinstance(aggregator, PCGrad | ConFIG | FairGrad | GradDrop) else net.heads.parameters()
    ):
        p.grad /= 3  # type: ignore[operator]
    for gradient, p in zip(found, net.parameters(), strict=True):
        assert torch.allclose(gradient, p.grad, atol=1e-5)  # type: ignore[arg-type]


def test_amp_scales_what_is_aggregated_and_overflow_passes_through() -> None:
    inputs, target = a_batch()
    plain, _ = collect(MGDA())
    net = a_net()
    gradients = TaskGradients(MGDA(), net)
    losses = losses_of(net, inputs, target)
    gradients.add(1024 * losses.mean(), losses)
    gradients.finish(lambda flat: flat, seed=5, scale=1024.0)
    for gradient, p in zip(plain, net.parameters(), strict=True):
        assert torch.allclose(1024 * gradient, p.grad, rtol=1e-4, atol=1e-6)  # type: ignore[arg-type]
    losses = losses_of(net, inputs, target)
    gradients.add(math.inf * losses.mean(), losses)
    gradients.finish(lambda flat: flat, seed=5, scale=1024.0)
    assert not torch.cat([p.grad.flatten() for p in net.parameters()]).isfinite().all()  # type: ignore[union-attr]


def test_the_projector_solves_upgrads_problem() -> None:
    """Against the conditions that only the solution meets: feasible, dual feasible, complementary."""
    torch.manual_seed(0)
    for tasks in (2, 3, 7):
        rows = torch.randn(tasks, 20, dtype=torch.float64)
        gramian, wanted = rows @ rows.T, torch.eye(tasks, dtype=torch.float64) / tasks
        solved = NNLSProjector()(wanted, gramian)
        slack, force = solved - wanted, solved @ gramian
        assert slack.min() > -1e-12
        assert force.min() > -1e-9  # no loss rises along the projected gradient
        assert (slack * force).abs().max() < 1e-9
    upgrad = UPGrad(projector=NNLSProjector())
    against = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    assert upgrad(against).tolist() == pytest.approx([0.2929, 1.9004, 1.9004], abs=1e-3)  # torchjd's, regularized


def test_cosines_of_gradients() -> None:
    inputs, target = a_batch()
    net = a_net()
    losses = losses_of(net, inputs, target)
    rows = task_gradients(losses, list(net.body.parameters()), torch.ones(3))
    found = cosines(rows)
    assert found.diagonal().tolist() == pytest.approx([1, 1, 1], abs=1e-6)
    assert found[0, 2].item() == pytest.approx(F.cosine_similarity(rows[0], rows[2], dim=0).item(), abs=1e-6)


def test_delta_m_has_the_sign_of_each_metric() -> None:
    single, both = {"a": 0.8, "b": 2.0}, {"a": 0.84, "b": 2.2}
    assert delta_m(both, single, {"a": True, "b": False}) == pytest.approx((5 - 10) / 2)
    assert delta_m(single, single, {"a": True, "b": False}) == 0


METHODS = {
    "uncertainty": ["--model.weighting", "Uncertainty"],
    "dwa": ["--model.weighting", "DynamicWeightAverage", "--model.weighting.temperature", "0.1"],
    "famo": ["--model.weighting", "FAMO", "--model.weighting.lr", "0.2"],
    "pcgrad": ["--model.aggregator", "torchjd.aggregation.PCGrad"],
    "upgrad": [
        "--model.aggregator", "torchjd.aggregation.UPGrad", "--model.aggregator.projector",
        "NNLSProjector",
    ],
}  # fmt: skip


def test_looking_back_is_no_second_step_of_batch_norm(work: Path) -> None:
    cli = main_of("multitask")(["fit", *TINY, "--data.pairs", "[40, 8, 8]", *METHODS["famo"]])
    norms = [module for module in cli.model.net.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert all(norm.num_batches_tracked == cli.trainer.global_step > 0 for norm in norms)
    assert (work / "runs/multitask/default/figures/val-weights.png").is_file()


WEIGHTS = [f"optim/weight_{task}" for task in ("left", "right", "offset")]


def fit(work: Path, name: str, flags: list[str], world: int, strategy: str = "ddp", batch: int = 16) -> dict[str, Any]:
    """Train twenty steps in epochs of five at the same global batch; losses and weights of the tasks."""
    args = [
        "fit", *PLAIN, "--config", str(ROOT / f"configs/strategy/{strategy}.yaml"), "--config",
        str(ROOT / "recipes/multitask/small.yaml"), "--name", name, "--data.batch_size", str(batch // world),
        "--trainer.accelerator", "cpu", "--trainer.devices", str(world), "--trainer.max_epochs", "4",
        "--trainer.limit_train_batches", "5", "--trainer.log_every_n_steps", "1", "--trainer.limit_val_batches", "2",
        "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false", *flags,
    ]  # fmt: skip
    codes = run_ranks(main_of("multitask"), args, world=world, folder=work / name)
    assert codes == [0] * world, logs(work / name)
    path = work / "runs/multitask" / name / "metrics.csv"
    return {key: read_metrics(path, key) for key in ("train/loss", "val/loss", *WEIGHTS)}


# One that keeps state of its own; the others run with the matrix.
SAME = [("famo", "fsdp")]
REST = [
    (m, s)
    for m in METHODS
    for s in (strategies_of("multitask") if m in ("uncertainty", "dwa", "famo") else ["ddp"])
    if s in EXACT and (m, s) not in SAME
]


@pytest.mark.parametrize(
    ("method", "strategy"), [*SAME, *(pytest.param(*cell, marks=pytest.mark.matrix) for cell in REST)]
)
def test_ranks_do_not_change_losses_or_weights(method: str, strategy: str, work: Path) -> None:
    one, two = (fit(work, str(world), METHODS[method], world, strategy) for world in (1, 2))
    worst = {key: max(abs(a / b - 1) for a, b in zip(two[key], one[key], strict=True)) for key in one}
    assert len(one["train/loss"]) == 20
    assert max(worst.values()) < 1e-4
    assert worst["train/loss"] < 1e-5
    assert max(abs(weight - 1) for key in WEIGHTS for weight in one[key]) > 0.01, "the method does something"


class TooWide(nn.Module):
    """A body that gives one number more than it was asked for."""

    def __init__(self, features: int):
        super().__init__()
        self.linear = nn.Linear(14 * 14, features + 1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.linear(pixel_values.flatten(1))


@pytest.fixture
def fit_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the parser of ``fit``, and no log of Lightning's on stderr, where it would stand in this process."""
    skip = RecipeCLI.subcommands()["fit"]
    monkeypatch.setattr(RecipeCLI, "subcommands", staticmethod(lambda: {"fit": skip}))
    for name in ("lightning.pytorch", "lightning.fabric"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])


WEIGHTING, AGGREGATOR = "--model.weighting ", "--model.aggregator torchjd.aggregation."
MISTAKES = [
    ("--data.tasks [lefft]", "no task is named 'lefft'; did you mean 'left'?"),
    ("--data.tasks []", "--data.tasks: is empty"),
    ("--data.tasks [left,right,left]", "names 'left' twice"),
    ("--data.pairs [100,0,100]", "--data.pairs: must be at least 1"),
    ("--data.pairs [100,100]", "data.pairs"),
    ("--data.canvas 12", "data.canvas: 12 has no place for two images of 8 pixels with data.max_shift 2"),
    ("--data.max_shift -1", "--data.max_shift: must be at least 0, got -1"),
    ("--data.val_fraction 0.9", "--data.val_fraction: 0.9 and"),
    ("--data.test_fraction -0.1", "--data.test_fraction: must be above 0 and below 1, got -0.1"),
    ("--model.features 0", "--model.features: must be at least 1"),
    ("--model.conflict_batches -1", "--model.conflict_batches: must be at least 0"),
    ("--model.tasks [left]", "model.tasks"),
    ("--model.weighting.weights '{lft: 1, right: 1, offset: 1}'", "no task is named 'lft'"),
    ("--data.tasks [left] --model.weighting.weights '{left: 1, right: 1}'", "no task is named 'right'"),
    ("--model.weighting.weights '{left: 1, right: 1}'", "task 'offset' has none"),
    ("--model.weighting.weights '{left: 1, right: -1, offset: 1}'", "that of 'right' must be at least 0, got -1.0"),
    ("--model.weighting.weights '{left: 0, right: 0, offset: 0}'", "--model.weighting.weights: all are 0"),
    ("--model.weighting.weights '{left: .inf, right: 0, offset: 0}'", "that of 'left' must be at least 0, got inf"),
    (f"{WEIGHTING}Uncertainty --model.weighting.initial .nan", "--model.weighting.initial: must be a finite"),
    (f"{WEIGHTING}DynamicWeightAverage --model.weighting.temperature 0", "temperature: must be above 0"),
    (f"{WEIGHTING}DynamicWeightAverage --model.weighting.temprature 1", "did you mean 'temperature'?"),
    (f"{WEIGHTING}FAMO --model.weighting.lr -0.1", "--model.weighting.lr: must be above 0, got -0.1"),
    (f"{WEIGHTING}FAMO --model.weighting.weight_decay -1", "--model.weighting.weight_decay: must be at least 0"),
    (f"{WEIGHTING}FAM0", "no class 'FAM0'; did you mean 'FAMO'?"),
    ("--model.weighting torch.nn.ReLU", "model.weighting"),
    ("--model.aggregator torch.nn.ReLU", "model.aggregator"),
    (f"{AGGREGATOR}MGDAWeighting", "model.aggregator"),
    (f"{AGGREGATOR}PCGrd", "no 'PCGrd' in torchjd.aggregation; did you mean 'PCGrad'?"),
    (f"{AGGREGATOR}MGDA --model.aggregator.epsilon -1", "--model.aggregator.epsilon: epsilon must be positive"),
    (f"{AGGREGATOR}GradVac", "model.aggregator: GradVac remembers earlier steps"),
    (f"{AGGREGATOR}MGDA --model.weighting.weights '{{left: 1, right: 0, offset: 1}}'", "leave it out of data.tasks"),
    (f"{AGGREGATOR}PCGrad {WEIGHTING}FAMO", "PCGrad does not go with model.weighting FAMO"),
    (f"{AGGREGATOR}PCGrad {WEIGHTING}Uncertainty", "PCGrad does not go with model.weighting Uncertainty"),
    ("--model.net.widths [8,16,32,64]", "--model.net.widths: has 4 stages"),
    ("--model.net tests.test_multitask.TooWide", "model.net: TooWide gives (4, 129), not (batch, 128)"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "line"), halved(MISTAKES), ids=[flags for flags, _ in MISTAKES])
def test_mistakes_cost_a_line(
    flags: str,
    line: str,
    work: Path,
    fit_only: None,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RECIPES_ALLOW", "tests")
    args = ["fit", *TINY, "--data.pairs", "[40, 8, 8]", "--data.eval_batch_size", "4", *shlex.split(flags)]
    with pytest.raises(SystemExit) as exit_:
        main_of("multitask")(args)
    error = capfd.readouterr().err
    assert exit_.value.code == 2, error
    assert len(error.splitlines()) == 1, error
    assert len(error) <= 241
    assert line in error


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2", "deepspeed_zero1", "deepspeed_zero3"])
def test_aggregators_refuse_strategies_that_shard(strategy: str, work: Path) -> None:
    args = ["fit", *TINY, "--config", str(ROOT / f"configs/strategy/{strategy}.yaml"), "--trainer.accelerator", "cpu"]
    args += [*METHODS["pcgrad"], "--data.pairs", "[40, 8, 8]"]
    assert run_ranks(main_of("multitask"), args, world=1, folder=work) == [2], logs(work)
    line = (work / "rank0.log").read_text().strip().splitlines()[-1]
    assert "model.aggregator: needs the whole gradient of each task" in line
    assert len(line) <= 200
    assert not list(work.glob("runs/*/*/checkpoints/*"))


def test_gradients_that_agree_keep_their_length() -> None:
    """Under each aggregator that needs no argument: those that sum gradients up are known."""
    gradient, tried = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64), []
    for name, kind in vars(aggregation).items():
        if not (isinstance(kind, type) and issubclass(kind, Aggregator)):
            continue
        with contextlib.suppress(InputError, NotImplementedError):  # it needs an argument, a package or a memory
            aggregator = make_aggregator(kind, Fixed(TASKS))
            length = aggregator(gradient.expand(3, 3).clone()) / gradient
            assert length.tolist() == pytest.approx([3.0 if isinstance(aggregator, SUMMING) else 1.0] * 3), name
            tried.append(name)
    assert len(tried) >= 9, tried


def test_another_list_of_tasks_does_not_fit_the_checkpoint(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    main, small = main_of("multitask"), ["--data.pairs", "[40, 8, 8]"]
    main(["fit", *TINY, *small])
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(["test", "--ckpt_path", "best", "--data.tasks", "[left]"])
    assert exit_.value.code == 2
    assert "--ckpt_path: does not fit this model" in capfd.readouterr().err
    drawn = [path.stem for path in (work / "runs/multitask/default/figures").glob("val-*.png")]
    assert sorted(drawn) == ["val-angles", "val-samples"], "weights that never change are no picture"
    main(["predict", "--ckpt_path", "best"])
    head, *rows = (work / "runs/multitask/default/predict/predictions.csv").read_text().splitlines()
    assert head.split(",") == [
        "index", "left", "left_prediction", "left_probability", "right", "right_prediction", "right_probability",
        "offset0", "offset0_prediction", "offset1", "offset1_prediction",
    ]  # fmt: skip
    assert len(rows) == 8


@pytest.mark.parametrize(
    "method", ["famo", *(pytest.param(name, marks=pytest.mark.matrix) for name in ("dwa", "uncertainty", "pcgrad"))]
)
def test_a_killed_run_goes_on_to_the_bit(method: str, work: Path) -> None:
    """In the midst of an epoch, of which DynamicWeightAverage has seen two, on two ranks."""
    args = [
        "fit", "--config", str(write_config(work, {"every_n_train_steps": 3})), "--config",
        str(ROOT / "configs/strategy/ddp.yaml"), "--config", str(ROOT / "recipes/multitask/small.yaml"),
        "--data.batch_size", "4", "--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.max_epochs", "4",
        "--trainer.limit_train_batches", "4", "--trainer.limit_val_batches", "1", *METHODS[method],
        "--trainer.enable_progress_bar", "false",
    ]  # fmt: skip
    main, folder = main_of("multitask"), work / "runs/multitask"
    assert run_ranks(main, [*args, "--name", "whole"], world=2, folder=work / "a") == [0, 0], logs(work / "a")
    cut = [*args, "--name", "cut"]
    assert run_ranks(killed_main, "multitask", cut, 12, world=2, folder=work / "b") == [-9, -9], logs(work / "b")
    last = folder / "cut/checkpoints/last.ckpt"
    assert 8 < read_checkpoint(last)["global_step"] < 12
    assert run_ranks(main, [*cut, "--ckpt_path", "last"], world=2, folder=work / "c") == [0, 0], logs(work / "c")
    assert digest(last) == digest(folder / "whole/checkpoints/last.ckpt")
    state = read_checkpoint(last)["state_dict"]
    assert any(key.startswith("net.weighting.") for key in state)
