"""Attacks stay in their ball and agree with formulas and with another library; the recipe trains against them."""

import copy
import csv
import logging
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import stats
from torch import Tensor, nn

from common.errors import InputError
from common.figures import PALETTE
from common.nets import ConvNet, PretrainedEncoder
from common.run.cli import RecipeCLI
from recipes.adversarial.attacks import (
    PGD,
    UnderAttack,
    attackable,
    cross_entropy_to,
    logits_at,
    random_in_ball,
    under_attack,
)
from recipes.adversarial.objectives import TRADES, Adversarial, Free, Natural
from recipes.adversarial.pictures import adversarial_examples, robustness_curve
from tests.support import PLAIN, ROOT, TINY, halved, logs, main_of, run_ranks, write_encoder

pytestmark = pytest.mark.usefixtures("no_report")

ATTACK, EVAL = "--model.attack", "--model.eval_attack"
TEXT = ROOT / "recipes/adversarial/text.yaml"


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor, Tensor]:
    """The first digits: pixels, classes and places."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    pixels = torch.from_numpy(digits.images[:40]).float()[:, None] / 16
    return pixels, torch.from_numpy(digits.target[:40]).long(), torch.arange(40)


@pytest.fixture(scope="module")
def net(batch: tuple[Tensor, Tensor, Tensor]) -> nn.Module:
    """A small net with batch norm that has seen these digits a few times."""
    torch.manual_seed(0)
    net = ConvNet(10, widths=(8, 16))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(net(batch[0]), batch[1]).backward()
        optimizer.step()
    optimizer.zero_grad()
    return net


def gradient(net: nn.Module, pixels: Tensor, target: Tensor) -> Tensor:
    """Of the cross-entropy by the pixels, in evaluation mode."""
    net.eval()
    point = pixels.clone().requires_grad_()
    (found,) = torch.autograd.grad(F.cross_entropy(net(point), target, reduction="sum"), point)
    net.train()
    return found


# Attacks


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize(("eps", "steps"), [(0.1, 1), (0.1, 7), (0.7, 3)])
def test_attacked_inputs_lie_in_the_ball_and_in_the_range(
    norm: Any, random_start: bool, eps: float, steps: int, net: nn.Module, batch: Any
) -> None:
    pixels, target, index = batch
    attack = PGD(eps, steps, norm=norm, random_start=random_start)
    found = under_attack(net, attack, {"pixel_values": pixels}, target, index, 3)
    change = (found.points - pixels).flatten(1)
    length = change.abs().amax(1) if norm == "linf" else change.norm(dim=1)
    assert (length <= eps + 1e-6).all()
    assert (length > 0.1 * eps).all()
    assert found.points.min() >= 0
    assert found.points.max() <= 1
    losses = [F.cross_entropy(logits, target, reduction="none") for logits in (found.clean, found.logits)]
    assert losses[1].mean() > losses[0].mean()


def test_a_radius_of_zero_changes_nothing(net: nn.Module, batch: Any) -> None:
    pixels, target, index = batch
    for norm in ("linf", "l2"):
        found = under_attack(net, PGD(0.0, 3, norm=norm), {"pixel_values": pixels}, target, index, 0)
        assert torch.equal(found.points, pixels)
        assert torch.equal(found.logits, found.clean)


def test_one_step_is_the_fast_gradient_method(net: nn.Module, batch: Any) -> None:
    pixels, target, index = batch
    by_pixels = gradient(net, pixels, target)
    found = under_attack(net, PGD(0.1, 1, random_start=False), {"pixel_values": pixels}, target, index, 0)
    assert torch.allclose(found.points, (pixels + 0.1 * by_pixels.sign()).clamp(0, 1), atol=1e-7)
    attack = PGD(0.5, 1, norm="l2", random_start=False, clamp=None)
    found = under_attack(net, attack, {"pixel_values": pixels}, target, index, 0)
    expected = pixels + 0.5 * by_pixels / by_pixels.flatten(1).norm(dim=1)[:, None, None, None]
    assert torch.allclose(found.points, expected, atol=1e-6)


def test_the_usual_step_sizes() -> None:
    assert PGD(0.1, 1, random_start=False).step_size == pytest.approx(0.1)
    assert PGD(0.1, 1).step_size == pytest.approx(0.125)
    assert PGD(0.1, 10).step_size == pytest.approx(0.025)
    assert PGD(0.1, 10, step_size=0.01).at(0.2).step_size == pytest.approx(0.02)


def test_attacks_leave_gradients_statistics_and_modes_alone(net: nn.Module, batch: Any) -> None:
    pixels, target, index = batch
    net.train()
    next(net.children()).eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    with torch.inference_mode():
        under_attack(net, PGD(0.1, 3, restarts=2), {"pixel_values": pixels}, target, index, 0)
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes
    net.train()


def test_inference_mode_and_batches_change_nothing(net: nn.Module, batch: Any) -> None:
    """What is found for a sample does not depend on what stands beside it, nor on the caller's mode."""
    attack = PGD(0.1, 5, restarts=2, norm="l2")
    whole = under_attack(net, attack, {"pixel_values": batch[0]}, batch[1], batch[2], 5)
    with torch.inference_mode():
        pixels, target, index = (values[torch.tensor([9, 3, 30])] for values in batch)
        some = under_attack(net, attack, {"pixel_values": pixels}, target, index, 5)
    assert torch.allclose(some.points, whole.points[[9, 3, 30]], atol=1e-5)
    assert torch.allclose(some.logits, whole.logits[[9, 3, 30]], atol=1e-4)
    other = under_attack(net, attack, {"pixel_values": batch[0]}, batch[1], batch[2], 6)
    assert not torch.allclose(other.points, whole.points, atol=1e-3)


def test_the_worst_of_all_restarts_counts(net: nn.Module, batch: Any) -> None:
    pixels, target, index = batch
    attack = PGD(0.3, 1, step_size=0.02, restarts=6)  # which depends on its start
    inputs = {"pixel_values": pixels}
    found = under_attack(net, attack, inputs, target, index, 0)
    net.eval()
    loss = cross_entropy_to(target, lambda points: logits_at(net, inputs, points))
    with torch.no_grad():
        each = torch.stack([net(points).argmax(-1) == target for points in attack.search(loss, pixels, index, 0)])
        losses = torch.stack([loss(points) for points in attack.search(loss, pixels, index, 0)])
        assert torch.allclose(loss(attack(loss, pixels, index, 0)), losses.amax(0), atol=1e-6)
    net.train()
    assert each.all(0).sum() < each.sum(1).min(), "restarts differ"
    assert torch.equal(found.logits.argmax(-1) == target, each.all(0))


@pytest.mark.parametrize(("norm", "shape"), [("linf", (3, 4)), ("l2", (5,))])
def test_random_starts_are_uniform_and_belong_to_their_sample(norm: Any, shape: tuple[int, ...]) -> None:
    index = torch.arange(20_000)
    points = random_in_ball(norm, 7, index, torch.Size(shape)).flatten(1)
    size = points.shape[1]
    if norm == "linf":
        assert points.abs().max() < 1
        for column in points.T:
            assert stats.kstest(column.numpy(), "uniform", (-1, 2)).pvalue > 1e-3
    else:
        assert points.norm(dim=1).max() < 1
        assert stats.kstest((points.norm(dim=1) ** size).numpy(), "uniform").pvalue > 1e-3
        directions = points / points.norm(dim=1, keepdim=True)
        assert torch.allclose(directions.T @ directions / len(index), torch.eye(size) / size, atol=0.01)
    assert np.abs(np.corrcoef(points.T.numpy()) - np.eye(size)).max() < 0.04
    assert abs(np.corrcoef(points[:-1].flatten().numpy(), points[1:].flatten().numpy())[0, 1]) < 0.02
    assert torch.equal(random_in_ball(norm, 7, index[50:60], torch.Size(shape)).flatten(1), points[50:60])
    assert not torch.equal(random_in_ball(norm, 8, index[:1], torch.Size(shape)).flatten(1), points[:1])


def test_padding_changes_no_random_start() -> None:
    index, mask = torch.arange(20_000), torch.zeros(20_000, 8, 1, dtype=torch.bool)
    mask[:, :2] = True
    points = random_in_ball("l2", 7, index, torch.Size((8, 3)), mask)
    assert (points[:, 2:] == 0).all()
    lengths = points.flatten(1).norm(dim=1) ** 6  # uniform, in the six dimensions that are left
    assert stats.kstest(lengths.numpy(), "uniform").pvalue > 1e-3
    shorter = random_in_ball("l2", 7, index, torch.Size((5, 3)), mask[:, :5])
    assert torch.allclose(points[:, :5], shorter, rtol=1e-5)


def test_what_is_wrong_without_attack_is_not_robust(net: nn.Module, batch: Any) -> None:
    pixels, _, index = batch
    with torch.no_grad():
        guess = net.eval()(pixels).argmax(-1)
    net.train()
    found = under_attack(net, PGD(0.3, 1), {"pixel_values": pixels}, (guess + 1) % 10, index, 0)
    assert (found.logits.argmax(-1) == guess).all()
    assert torch.equal(found.points, pixels)


# Objectives


@pytest.mark.parametrize(
    "objective", [Natural(), Adversarial(), Adversarial(0.3), TRADES(4.0)], ids=lambda o: type(o).__name__
)
def test_objectives_equal_their_formulas(objective: Any, batch: Any) -> None:
    pixels, target, index = batch
    torch.manual_seed(1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).double()
    wrapped: Any = lambda pixel_values: net(pixel_values)  # noqa: E731
    net.forward = lambda pixel_values: nn.Sequential.forward(net, pixel_values)  # type: ignore[method-assign]
    attack, x = PGD(0.2, 3, step_size=0.1), pixels.double()
    loss = objective(net, attack, {"pixel_values": x}, target, index, 11)

    def inner(point: Tensor) -> Tensor:
        if isinstance(objective, TRADES):
            return F.kl_div(wrapped(point).log_softmax(-1), wrapped(x).softmax(-1).detach(), reduction="none").sum(-1)
        return F.cross_entropy(wrapped(point), target, reduction="none")

    worst = attack(inner, x, index, 11)
    clean, robust = wrapped(x), wrapped(worst)
    expected = {
        Natural: lambda: F.cross_entropy(clean, target),
        Adversarial: lambda: objective_mix(getattr(objective, "clean_weight", 0), clean, robust, target),
        TRADES: lambda: (
            F.cross_entropy(clean, target)
            + 4 * F.kl_div(robust.log_softmax(-1), clean.softmax(-1), reduction="batchmean")
        ),
    }[type(objective)]()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    grads = [torch.autograd.grad(value, list(net.parameters())) for value in (loss, expected)]
    assert all(torch.allclose(a, b, rtol=1e-8) for a, b in zip(*grads, strict=True))


def test_a_net_attacked_in_training_mode(net: nn.Module, batch: Any) -> None:
    """Batch norm uses the statistics of what is under attack, and keeps only those of what is trained on."""
    pixels, target, index = batch
    tried, plain, thrown_away = (copy.deepcopy(net).train() for _ in range(3))
    attack, inputs = PGD(0.1, 3), {"pixel_values": pixels}
    loss = Adversarial(attack_mode="train")(tried, attack, inputs, target, index, 11)
    worst = attack(cross_entropy_to(target, thrown_away), pixels, index, 11)
    assert torch.equal(loss, F.cross_entropy(plain(worst), target))
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in tried.state_dict().items())
    assert not torch.equal(loss, Adversarial()(tried, attack, inputs, target, index, 11))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_free_training_equals_its_algorithm(norm: Any, batch: Any) -> None:
    """Two batches of four replays: Shafahi et al. 2019, algorithm 1, with each batch's own random start."""
    pixels, target, index = (part.double() if part.is_floating_point() else part for part in batch)
    torch.manual_seed(1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).double()
    wanted = copy.deepcopy(net)
    net.forward = lambda pixel_values: nn.Sequential.forward(net, pixel_values)  # type: ignore[method-assign]
    attack, objective = PGD(0.2, 1, norm=norm), Free(4)
    ours, theirs = (torch.optim.SGD(each.parameters(), 0.5) for each in (net, wanted))
    for seed in (5, 6):
        objective.begin(1)
        delta = 0.2 * random_in_ball(norm, seed, index, pixels.shape[1:]).double()
        delta = (pixels + delta).clamp(0, 1) - pixels
        for replay in range(4):
            given = pixels if replay == 0 else pixels.flip(-1)  # an augmentation drawn anew, which replays do not see
            loss = objective(net, attack, {"pixel_values": given}, target, index, seed)
            ours.zero_grad()
            loss.backward()
            ours.step()
            point = (pixels + delta).requires_grad_()
            expected = F.cross_entropy(wanted(point), target)
            theirs.zero_grad()
            expected.backward()
            theirs.step()
            assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
            grad: Any = point.grad
            if norm == "linf":
                delta = (delta + 0.25 * grad.sign()).clamp(-0.2, 0.2)
            else:
                delta = delta + 0.25 * F.normalize(grad.flatten(1)).view_as(grad)
                delta = delta * (0.2 / delta.flatten(1).norm(dim=1)).clamp_max(1)[:, None, None, None]
            delta = (pixels + delta).clamp(0, 1) - pixels
    for p, q in zip(net.parameters(), wanted.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-10, atol=1e-12)


def test_free_training_outlives_an_overflow_of_fp16(net: nn.Module, batch: Any) -> None:
    pixels, target, index = batch
    attack, objective = PGD(0.5, 1, norm="l2"), Free(3)
    objective.begin(1)
    for value in (math.inf, math.nan, 1.0):
        loss = objective(copy.deepcopy(net), attack, {"pixel_values": pixels}, target, index, 11)
        assert loss.isfinite()
        loss.backward()
        assert objective._delta.grad is not None
        objective._delta.grad[:, 0, 0, 0] = value


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(("value", "moves"), [(math.inf, 0.25), (-math.inf, -0.25), (math.nan, 0.0)])
def test_an_overflow_keeps_its_sign(value: float, moves: float, norm: Any, net: nn.Module, batch: Any) -> None:
    pixels, target, index = torch.full_like(batch[0], 0.5), *batch[1:]
    attack, objective = PGD(0.25, 1, step_size=0.25, norm=norm, random_start=False), Free(2)
    objective.begin(1)
    objective(net, attack, {"pixel_values": pixels}, target, index, 11).backward()
    assert objective._delta.grad is not None
    objective._delta.grad[:, 0, 0, 0] = value
    objective(net, attack, {"pixel_values": pixels}, target, index, 11)
    assert (objective._delta[:, 0, 0, 0] == moves).all()
    assert math.isnan(value) is bool(objective._delta[:, 0, 1:].any()) or norm == "linf", "l2 goes the overflow's way"


@pytest.mark.matrix
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "deepspeed_zero2"])
def test_free_training_on_ranks(strategy: str, work: Path, plain_args: dict[str, list[str]]) -> None:
    """Losses equal one process's, each batch is four optimizer steps, and a resumed run ends with the same bits."""
    from common.checkpoint import read_checkpoint
    from tests.support import difference, read_metrics

    def fit(name: str, world: int, *args: str) -> Path:
        given = [
            "fit", "--config", str(ROOT / f"configs/strategy/{strategy}.yaml"), *PLAIN, *plain_args["adversarial"],
            "--name", name, "--model.objective", "Free", "--model.objective.replays", "4",
            f"{ATTACK}.steps", "1", "--data.batch_size", str(16 // world), "--trainer.devices", str(world),
            "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.limit_val_batches",
            "0", "--trainer.log_every_n_steps", "1", "--model.lr_scheduler", "common.optim.Constant", *args,
        ]  # fmt: skip
        codes = run_ranks(main_of("adversarial"), given, world=world, folder=work / name)
        assert codes == [0] * world, logs(work / name)
        return work / "runs/adversarial" / name

    one, two = (fit(str(world), world, "--trainer.max_steps", "6") for world in (1, 2))
    losses, expected = (read_metrics(path / "metrics.csv", "train/loss") for path in (two, one))
    assert len(expected) == 6
    assert difference(losses, expected) < 1e-5
    fit("again", 2, "--trainer.max_steps", "3")
    again = fit("again", 2, "--trainer.max_steps", "6", "--ckpt_path", "last")
    found, wanted = (read_checkpoint(path / "checkpoints/last.ckpt") for path in (again, two))
    states = wanted["optimizer_states"][0]["state"]
    assert wanted["global_step"] == 6
    assert {int(state["step"]) for state in states.values()} == {24}
    for number, state in states.items():
        for key, value in state.items():
            assert torch.equal(found["optimizer_states"][0]["state"][number][key], value), (number, key)
    for name, value in wanted["state_dict"].items():
        assert torch.equal(found["state_dict"][name], value), name


def objective_mix(weight: float, clean: Tensor, robust: Tensor, target: Tensor) -> Tensor:
    return weight * F.cross_entropy(clean, target) + (1 - weight) * F.cross_entropy(robust, target)


# Texts


WORDS = [f"a {'very ' * (n % 3)}{word} film" for n in range(60) for word in ("good", "bad", "dull one this")]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder"), WORDS)


@pytest.fixture
def text_args(encoder: Path, work: Path) -> list[str]:
    """The preset on a small table and encoder."""
    Path("reviews.csv").write_text("\n".join(["text,label", *(f"{text},{'good' in text}" for text in WORDS)]))
    return [
        "--config", str(TEXT), "--data.source.tokenizer", str(encoder), "--model.net.name", str(encoder), *TINY,
        "--trainer.accelerator", "cpu",
    ]  # fmt: skip


def test_fast_gradient_method_on_embeddings(encoder: Path) -> None:
    """Against the same with ``inputs_embeds``; padding stays as it is, and no hook is left."""
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    net = PretrainedEncoder(2, str(encoder), dropout=0.0).eval()
    encoded = AutoTokenizer.from_pretrained(encoder)(WORDS[:6], padding="longest", return_tensors="pt")
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    target, mask = net(**inputs).argmax(-1), inputs["attention_mask"][..., None]
    assert not mask.all()
    attack = PGD(0.5, 1, norm="l2", random_start=False, clamp=None)
    found = under_attack(net, attack, inputs, target, torch.arange(6), 0)
    embedded = net.body.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()

    def by_embeddings(vectors: Tensor) -> Tensor:
        states = net.body(inputs_embeds=vectors, attention_mask=inputs["attention_mask"]).last_hidden_state
        return net.head((states * mask).sum(1) / mask.sum(1))

    loss = F.cross_entropy(by_embeddings(embedded), target, reduction="sum")
    (slope,) = torch.autograd.grad(loss, embedded)
    delta = 0.5 * slope / slope.flatten(1).norm(dim=1)[:, None, None]
    assert torch.allclose(found.points, delta, atol=1e-5)
    assert torch.allclose(found.logits, by_embeddings(embedded + delta), atol=1e-5)
    assert not found.points.masked_select(mask == 0).any()
    start = under_attack(net, PGD(0.5, 3, norm="l2", clamp=None), inputs, target, torch.arange(6), 0).points
    assert not start.masked_select(mask == 0).any()
    assert (start.flatten(1).norm(dim=1) <= 0.5 + 1e-6).all()
    free, one = Free(3), PGD(0.5, 1, norm="l2", clamp=None)
    free.begin(1)
    for _ in range(3):
        free(net, one, inputs, target, torch.arange(6), 0).backward()
        assert not free._delta.masked_select(mask == 0).any()
        assert (free._delta.flatten(1).norm(dim=1) <= 0.5 + 1e-6).all()
        assert free._delta.grad is not None
        assert free._delta.grad.any()
    layer = net.body.get_input_embeddings()
    assert not layer._forward_hooks
    assert attackable(net, inputs)[0].shape == embedded.shape


def test_texts_train_test_and_predict(text_args: list[str], work: Path) -> None:
    main_of("adversarial")(["fit", *text_args, "--model.attack.steps", "2", "--model.attack.random_start", "true"])
    found = {}
    for eps in ("0", "100"):
        metrics = main_of("adversarial")(["test", "--model.test_attack.eps", eps]).trainer.callback_metrics
        found[eps] = metrics["test/accuracy"].item(), metrics["test/robust_accuracy"].item()
    assert found["0"][0] == found["0"][1] == found["100"][0] > 0, "nothing is moved, nothing is lost"
    assert found["100"][1] < found["100"][0], "an attack without bounds finds something"
    main_of("adversarial")(["predict"])
    run = work / "runs/adversarial/default"
    with (run / "predict/predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0].keys() == {"index", "target", "prediction", "attacked"}
    assert {path.name for path in (run / "figures").glob("val-*")} == {"val-robustness.png"}


# The recipe


@pytest.fixture(scope="module")
def robust(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The module of a run with FGSM-RS on the digits, tested, and its folder."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("robust")
        patch.chdir(folder)
        args = [
            "--model.net.widths", "[16, 32]", f"{ATTACK}.steps", "1", "--trainer.max_epochs", "5", f"{EVAL}.steps", "3",
            "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu",
        ]  # fmt: skip
        main_of("adversarial")(["fit", *args])
        cli = main_of("adversarial")(["test"])
    return cli, folder


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")  # ART's
@pytest.mark.matrix
def test_the_adversarial_robustness_toolbox_finds_the_same(
    robust: Any, record_property: Callable[[str, object], None]
) -> None:
    """Robust accuracy under their PGD and ours, with and without random starts, over a range of radii."""
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    module, data = robust[0].model, robust[0].datamodule.test_data
    net = module.net.eval()
    batch = data[list(range(len(data)))]
    pixels, target = batch.inputs["pixel_values"], batch.target
    theirs = PyTorchClassifier(net, nn.CrossEntropyLoss(), (1, 8, 8), 10, clip_values=(0.0, 1.0), device_type="cpu")
    np.random.seed(1)  # ART's random starts are of this stream
    for eps, starts in ((0.05, 0), (0.1, 0), (0.15, 0), (0.15, 2)):
        options = {"norm": np.inf, "eps": eps, "eps_step": eps / 4, "max_iter": 20, "num_random_init": starts}
        attack = PGD(eps, 20, eps / 4, restarts=max(starts, 1), random_start=starts > 0)
        accuracies = []
        # With two random starts an accuracy scatters by 0.8 points, the difference of the means of three draws by 0.6.
        for seed in range(3 if starts else 1):
            found = ProjectedGradientDescentPyTorch(theirs, batch_size=512, verbose=False, **options)
            attacked = torch.from_numpy(found.generate(pixels.numpy(), target.numpy()))
            with torch.no_grad():
                logits = under_attack(net, attack, batch.inputs, target, batch.index, seed).logits, net(attacked)
            accuracies.append([(each.argmax(-1) == target).float().mean().item() for each in logits])
        ours, expected = np.mean(accuracies, 0).tolist()
        record_property("summary", f"robust accuracy at {eps}, {starts} starts: {ours:.4f}, ART {expected:.4f}")
        assert ours == pytest.approx(expected, abs=0.02 if starts else 0.01)


def test_fp16_does_not_hide_gradients() -> None:
    """Of a sample that the net is sure of; 0 has no sign, and the attack would stay where it is."""
    net = ConvNet(2, widths=(4,)).eval()
    with torch.no_grad():
        net[-1].bias.copy_(torch.tensor([20.0, 0.0]))  # type: ignore[index, operator]
    pixels, target, index = torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.long), torch.arange(4)
    assert 0 < gradient(net, pixels, target).abs().max() < torch.finfo(torch.float16).smallest_normal / 1024
    attack = PGD(0.1, 1, random_start=False)
    expected = under_attack(net.eval(), attack, {"pixel_values": pixels}, target, index, 0).points
    with torch.autocast("cpu", torch.float16):
        found = under_attack(net, attack, {"pixel_values": pixels}, target, index, 0).points
    assert (expected != pixels).float().mean() > 0.9
    assert torch.equal(found, expected)
    with pytest.raises(InputError, match=r"vanish in a net of fp16 weights; take bf16-mixed"):
        under_attack(net.half(), attack, {"pixel_values": pixels.half()}, target, index, 0)


@pytest.mark.matrix
def test_training_against_attacks_makes_robust(robust: Any, work: Path) -> None:
    natural = ["--model.objective", "Natural", ATTACK, "null"]
    args = ["--model.net.widths", "[16, 32]", "--trainer.max_epochs", "5", "--trainer.accelerator", "cpu", *natural]
    main_of("adversarial")(["fit", *args, "--trainer.enable_progress_bar", "false"])
    plain = main_of("adversarial")(["test"]).trainer.callback_metrics
    found = robust[0].trainer.callback_metrics
    assert found["test/robust_accuracy"] > plain["test/robust_accuracy"] + 0.2
    assert found["test/accuracy"] > 0.9


def test_accuracy_falls_to_nothing_for_large_radii(robust: Any) -> None:
    """If gradients misled the attack, accuracy would stay up."""
    module, data = robust[0].model, robust[0].datamodule.test_data
    batch = data[list(range(len(data)))]
    right = []
    for eps in (0.0, 0.05, 0.1, 0.2, 0.4):
        found = under_attack(module.net, PGD(eps, 20), batch.inputs, batch.target, batch.index, 0)
        right.append((found.logits.argmax(-1) == batch.target).float().mean().item())
    assert right == sorted(right, reverse=True)
    assert right[0] > 0.9
    assert right[-1] < 0.02


def test_samples_without_labels_are_predicted_under_attack(robust: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(robust[1])
    Path("photos").mkdir()
    for number in range(5):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8), np.uint8)).save(f"photos/{number}.png")
    source = "--data.predict_source common.sources.ImageTable --data.predict_source.path photos"
    source += " --data.predict_source.label null --data.predict_source.size 8"
    main_of("adversarial")(["predict", *shlex.split(source)])
    with Path("runs/adversarial/default/predict/predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5
    assert rows[0].keys() == {"index", "prediction", "attacked"}
    assert any(row["prediction"] != row["attacked"] for row in rows), "noise is near every border"


def test_the_best_checkpoint_is_the_most_robust(robust: Any) -> None:
    from common.checkpoint import read_checkpoint
    from tests.support import read_metrics

    run = robust[1] / "runs/adversarial/default"
    callbacks = read_checkpoint(run / "checkpoints/best.ckpt")["callbacks"].values()
    (score,) = [state["best_model_score"].item() for state in callbacks if state.get("monitor")]
    assert score == pytest.approx(max(read_metrics(run / "metrics.csv", "val/robust_accuracy")))


def test_pictures(batch: Any) -> None:
    pixels, target, _ = batch
    attacked = (pixels + 0.1).clamp(0, 1)
    wrong = target.clone()
    wrong[[5, 7]] = (wrong[[5, 7]] + 1) % 10
    names = [f"class number {n} of ten" for n in range(10)]
    found = UnderAttack(F.one_hot(target, 10).float(), attacked, F.one_hot(wrong, 10).float())
    still = adversarial_examples(pixels, target, found._replace(points=pixels), names)
    assert "no change" in [axes.get_ylabel() for axes in still.axes]
    figure = adversarial_examples(pixels, target, found, names)
    assert len(figure.axes) == 24
    assert [axes.get_title() for axes in figure.axes[:2]] == ["class numbe…"] * 2
    colors = [axes.xaxis.label.get_color() for axes in figure.axes[16:]]
    assert colors == [PALETTE[1]] * 2 + [PALETTE[2]] * 6, "those that were turned come first"
    assert figure.axes[8].get_ylabel() == "change\n× 5"
    curve = robustness_curve([0.0, 0.1, 0.2], [1.0, 0.5, 0.0], 0.1).axes[0]
    assert np.asarray(curve.get_lines()[0].get_xydata()).tolist() == [[0, 1], [0.1, 0.5], [0.2, 0]]


def test_preflight_counts_no_graph_that_an_attack_has_dropped(work: Path) -> None:
    one, seven = (main_of("adversarial")(["preflight", *TINY, f"{ATTACK}.steps", k]).trainer.found for k in "17")
    assert one.activations == seven.activations > 1000


# Mistakes


# fmt: off
MISTAKES = [
    (f"{ATTACK}.eps=-0.1", f"{ATTACK}.eps: ", "eps must be a number of at least 0, got '-0.1'"),
    (f"{ATTACK}.eps=.nan", f"{ATTACK}.eps: ", "eps must be a number of at least 0, got 'nan'"),
    (f"{EVAL}.eps=-1", f"{EVAL}.eps: ", "eps must be a number of at least 0, got '-1'"),
    ("--model.test_attack.eps much", "--model.test_attack.eps: ", "expected float, got 'much'"),
    (f"{ATTACK}.step_size 0", f"{ATTACK}.step_size: ", "must be above 0, got '0'; null takes the usual one"),
    (f"{ATTACK}.steps 0", f"{ATTACK}.steps: ", "steps must be at least 1, got '0'"),
    (f"{EVAL}.steps=-3", f"{EVAL}.steps: ", "steps must be at least 1, got '-3'"),
    ("--model.test_attack.restarts 0", "--model.test_attack.restarts: ", "restarts must be at least 1, got '0'"),
    (f"{EVAL}.restarts 3 {EVAL}.random_start false", f"{EVAL}.restarts: ", "are all the same; give 1"),
    (f"{ATTACK}.norm l1", f"{ATTACK}.norm: ", "'l1'"),
    (f"{ATTACK}.clamp [1.0,0.0]", f"{ATTACK}.clamp: ", "clamp must be [smallest, largest], got [1.0, 0.0]"),
    (f"{ATTACK}.clamp [0.0]", f"{ATTACK}.clamp: ", "tuple"),
    (f"{ATTACK}.clamp [0.0,0.5]", f"{ATTACK}.clamp: ", "does not hold the images, which go from 0 to 1; widen it"),
    (f"{EVAL}.clamp [0.1,1.0]", f"{EVAL}.clamp: ", "does not hold the images"),
    ("--model.objective TRADES --model.objective.beta=-1", "--model.objective.beta: ",
     "must not be negative, got -1"),
    (f"--model.objective TRADES {ATTACK}.random_start false", f"{ATTACK}.random_start: ",
     "must be true for TRADES"),
    ("--model.objective Trades", "--model.objective: ", "did you mean 'TRADES'?"),
    ("--model.objective PGD", "--model.objective: ", "no class 'PGD'; it takes "),
    ("--model.objective.attack_mode test", "--model.objective.attack_mode: ", "'test'"),
    ("--model.objective Free --model.objective.replays 1", "--model.objective.replays: ",
     "must be at least 2, got 1"),
    (f"--model.objective Free {ATTACK}.steps 2", f"{ATTACK}.steps: ", "must be 1 for Free"),
    (f"--model.objective Free {ATTACK}.steps 1 {ATTACK}.restarts 2", f"{ATTACK}.restarts: ",
     "must be 1 for Free"),
    (f"--model.objective Free {ATTACK}.steps 1 --trainer.accumulate_grad_batches 2",
     "--trainer.accumulate_grad_batches: ", "must be 1: Free replays each batch"),
    (f"--model.objective Free {ATTACK} null", f"{ATTACK}: ", "Free needs one"),
    ("--model.objective.clean_weight 1", "--model.objective.clean_weight: ", "must be in [0, 1), got 1.0"),
    (f"{ATTACK} TRADES", f"{ATTACK}: ", "no class 'TRADES'; it takes "),
    (f"{ATTACK} null", f"{ATTACK}: ", "Adversarial needs one; give PGD"),
    (f"{EVAL} null", f"{EVAL}: ", "expected a class path, got 'None'"),
    (f"{ATTACK}.stepsize 0.1", f"{ATTACK}.stepsize: ", "did you mean 'step_size'?"),
    ("--model.input_range [0.0,1.0]", "--model.input_range: ", "is taken from data.input_range"),
]
TEXT_MISTAKES = [
    (f"{ATTACK}.clamp [0.0,1.0]", f"{ATTACK}.clamp: ", "must be null: embeddings of texts have no bounds"),
    ("--model.net common.nets.ConvNet", "--model.net: ", "ConvNet has no token embeddings to attack"),
    ("--model.net.freeze true", "--model.net.freeze: ", "this net passes none to its inputs"),
    ("--model.augmentation+ kornia.augmentation.RandomHorizontalFlip", "--model.augmentation", "is for images"),
]
# fmt: on


@pytest.fixture
def refuse(work: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Run ``fit``, see that it ends in one line on stderr, and that an earlier run of that name is left alone."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
    skip = RecipeCLI.subcommands()["fit"]
    monkeypatch.setattr(RecipeCLI, "subcommands", staticmethod(lambda: {"fit": skip}))
    kept = work / "runs/adversarial/default/kept"
    kept.parent.mkdir(parents=True)
    kept.write_text("weeks of work")

    def run(args: list[str], where: str, problem: str) -> None:
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main_of("adversarial")(["fit", *args])
        error = capfd.readouterr().err
        assert exit_.value.code == 2, error
        assert len(error.splitlines()) == 1, error
        assert len(error) <= 241
        assert error.startswith(where), error
        assert problem in error, error
        assert [path for path in (work / "runs").rglob("*") if path.is_file()] == [kept]

    return run


@pytest.mark.parametrize(("flags", "where", "problem"), halved(MISTAKES))
def test_mistakes_cost_a_line(flags: str, where: str, problem: str, refuse: Callable[..., None]) -> None:
    refuse([*TINY, "--trainer.accelerator", "cpu", *shlex.split(flags)], where, problem)


@pytest.mark.parametrize(("flags", "where", "problem"), TEXT_MISTAKES)
def test_mistakes_with_texts_cost_a_line(
    flags: str, where: str, problem: str, text_args: list[str], refuse: Callable[..., None]
) -> None:
    refuse([*text_args, *shlex.split(flags)], where, problem)


def test_a_strategy_that_cannot_differentiate_by_inputs_is_refused(
    work: Path, plain_args: dict[str, list[str]]
) -> None:
    layer = ["--config", str(ROOT / "configs/strategy/fsdp.yaml"), "--trainer.accelerator", "cpu"]
    args = ["fit", *layer, *plain_args["adversarial"], *TINY, "--trainer.devices", "2"]
    assert run_ranks(main_of("adversarial"), args, folder=work) == [2, 2], logs(work)
    for rank in (0, 1):
        line = (work / f"rank{rank}.log").read_text().splitlines()[-1]
        assert "fsdp.yaml:" in line
        assert "trainer.strategy: FSDP1 cannot differentiate by inputs" in line
    assert not (work / "runs/adversarial/default/checkpoints").exists()
