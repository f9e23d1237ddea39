"""Training as BaseModule does it, step by step against plain torch, and fine-tuning of a pretrained encoder."""

import csv
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from transformers import AutoModel
from typing_extensions import override

from common.checkpoint import read_checkpoint
from common.data import global_seed, step_seed
from common.errors import InputError
from common.losses import StepLosses, cross_entropy
from common.module import WeightedMean
from common.nets import ConvNet, PretrainedEncoder
from common.sources import Digits
from recipes.classification.data import Batch, ClassificationData
from recipes.classification.module import ClassificationModule
from tests.support import ROOT, TINY, logs, main_of, read_metrics, run_ranks, write_encoder

CLASSES = [str(number) for number in range(10)]


def small_net(num_classes: int) -> nn.Module:
    return ConvNet(num_classes, widths=(4,))


def sgd(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.1)


class Watched(ClassificationModule):
    """Remembers what happens in each micro-batch and step; its loss is broken at chosen micro-batches."""

    def __init__(self, broken: dict[int, float] | None = None, **settings: Any):
        super().__init__(**{"net": small_net, "class_names": CLASSES, "optimizer": sgd} | settings)
        self.broken = broken or {}
        self.losses: list[float] = []
        self.gradients: list[list[Tensor]] = []
        self.clipped: list[list[Tensor]] = []

    @override
    def shared_step(self, batch: Batch, stage: Any) -> tuple[Tensor, Tensor]:
        loss, count = super().shared_step(batch, stage)
        if stage == "train":
            loss = loss * self.broken.get(len(self.losses), 1.0)
            self.losses.append(loss.item())
        return loss, count

    def _gradients(self) -> list[Tensor]:
        return [p.grad.clone() for p in self.net.parameters() if p.grad is not None]

    @override
    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        self.gradients.append(self._gradients())
        super().configure_gradient_clipping(*args, **kwargs)
        self.clipped.append(self._gradients())


@pytest.fixture(scope="module")
def data() -> ClassificationData:
    return ClassificationData(Digits(), batch_size=16)


def fit(module: ClassificationModule, data: ClassificationData, folder: Path, **settings: Any) -> L.Trainer:
    trainer = L.Trainer(
        **{
            "accelerator": "cpu", "logger": CSVLogger(folder, name="", version=""), "log_every_n_steps": 1,
            "limit_val_batches": 0, "max_epochs": 1, "enable_checkpointing": False, "enable_progress_bar": False,
            "enable_model_summary": False, "use_distributed_sampler": False,
        } | settings
    )  # fmt: skip
    trainer.fit(module, data)
    return trainer


def rows(folder: Path, name: str) -> dict[int, float]:
    """The values of one column of a run's metrics by their step."""
    with (folder / "metrics.csv").open(newline="") as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


# The loss


def test_l1_is_minimized_and_not_logged(data: ClassificationData, tmp_path: Path) -> None:
    module = Watched(l1=0.01)
    fit(module, data, tmp_path, max_steps=4)
    logged = rows(tmp_path, "train/loss")
    assert [logged[step] for step in range(4)] == pytest.approx(module.losses, rel=1e-6)
    plain = Watched()
    fit(plain, data, tmp_path / "plain", max_steps=1)
    start = Watched()
    start.configure_model()
    for (name, p), without, with_l1 in zip(
        start.net.named_parameters(), plain.gradients[0], module.gradients[0], strict=True
    ):
        penalty = 0.01 * p.sign() if p.ndim >= 2 else torch.zeros_like(p)
        assert torch.allclose(with_l1 - without, penalty, atol=1e-6), name


def test_l1_must_not_be_negative() -> None:
    with pytest.raises(InputError, match=r"model.l1 must not be negative, got -0.1"):
        Watched(l1=-0.1)


def a_batch(data: ClassificationData, count: int = 60) -> Batch:
    inputs = {"pixel_values": data.samples.labelled.inputs["pixel_values"][:count]}
    return Batch(inputs, data.samples.labelled.target[:count], torch.arange(count), torch.ones(count, dtype=torch.bool))


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("balance", [False, True])
def test_smoothing_and_class_weights(smoothing: float, balance: bool, data: ClassificationData) -> None:
    counts = torch.tensor([5, 10, 15, 20, 25, 30, 35, 40, 45, 50])
    module = Watched(label_smoothing=smoothing, balance_classes=balance)
    if balance:
        assert module.class_weight is not None
        module.class_weight.copy_(counts.sum() / (10 * counts))
    module.configure_model()
    batch = a_batch(data)
    module.eval()  # batch norm aside
    log_p = module(batch).log_softmax(-1)
    wanted = F.one_hot(batch.target, 10) * (1 - smoothing) + smoothing / 10
    weight = counts.sum() / (10 * counts) if balance else torch.ones(10)
    expected = -(wanted * log_p * weight).sum() / len(batch.target)  # the same denominator in every micro-batch
    loss, count = module.shared_step(batch, "train")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert count == 60
    with torch.no_grad():
        plain, _ = validate(module, batch)
    assert plain == pytest.approx(-log_p.gather(1, batch.target[:, None]).mean().item(), rel=1e-5)


def test_losses_are_at_least_fp32() -> None:
    logits, target = torch.randn(50, 7, dtype=torch.bfloat16), torch.arange(50) % 7
    assert cross_entropy(logits, target).item() == F.cross_entropy(logits.float(), target).item()
    assert cross_entropy(logits.double(), target).dtype == torch.float64
    target[::3] = -100
    weight = torch.rand(7)
    losses = F.cross_entropy(logits.float(), target, weight, reduction="none")
    assert cross_entropy(logits, target, weight).item() == pytest.approx(losses[target != -100].mean().item())


def test_means_of_many_batches_stay_exact() -> None:
    """What bf16-true makes of a metric's state must not matter."""
    mean = WeightedMean().to(torch.bfloat16)
    values = torch.tensor([3.62, 4.12]).repeat(500)
    for value in values:
        mean.update(value, torch.tensor(8192))
    assert mean.compute().item() == pytest.approx(3.87, rel=1e-6)


def test_a_checkpoint_in_16_bits_becomes_an_encoder_in_32(reviews: "Reviews", tmp_path: Path) -> None:
    AutoModel.from_pretrained(reviews.encoder, dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert {p.dtype for p in PretrainedEncoder(2, str(tmp_path)).parameters()} == {torch.float32}


def validate(module: Watched, batch: Batch) -> tuple[float, int]:
    """The loss of a batch in evaluation, without a trainer to log to."""
    module.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign]
    loss, count = module.shared_step(batch, "val")
    return loss.item(), int(count)


class Three(SingleDeviceStrategy):
    """The mean over three ranks that have the same."""

    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return (tensor + tensor + tensor) / 3


def test_restored_losses_are_not_averaged_again() -> None:
    """The mean of three equal values may differ from them by a bit."""
    strategy: Any = Three()
    losses, again = StepLosses(), StepLosses()
    for step, loss in enumerate(torch.rand(100, generator=torch.Generator().manual_seed(1))):
        losses.add(step, loss)
    state = losses.state(strategy)
    again.restore(state, torch.device("cpu"))
    assert {step: values.tolist() for step, values in again.state(strategy).items()} == {
        step: values.tolist() for step, values in state.items()
    }
    assert again.take(strategy) == losses.take(strategy)


def test_padding_does_not_count(data: ClassificationData) -> None:
    module = Watched()
    module.configure_model()
    module.eval()
    batch = a_batch(data)
    padded = batch._replace(mask=torch.arange(60) < 40)
    with torch.no_grad():
        assert validate(module, padded) == pytest.approx(validate(module, a_batch(data, 40)))
    assert module.outcomes["val"].compute()["confusion"].sum() == 80


def test_the_validation_loss_is_the_mean_over_samples(tmp_path: Path) -> None:
    """180 of them, in batches of 50."""
    data = ClassificationData(Digits(), batch_size=16, eval_batch_size=50)
    module = Watched()
    fit(module, data, tmp_path, max_steps=3, limit_val_batches=1.0, num_sanity_val_steps=0, val_check_interval=3)
    batch = data.val_data[list(range(180))]
    module.eval()
    with torch.no_grad():
        expected = F.cross_entropy(module(batch), batch.target).item()
    assert rows(tmp_path, "val/loss")[2] == pytest.approx(expected, rel=1e-5)


def test_the_mean_loss_shows_nan() -> None:
    mean_loss = Watched().mean_loss["val"]
    mean_loss.update(torch.tensor(1.0), torch.tensor(7))
    mean_loss.update(torch.tensor(5.0), torch.tensor(1))
    assert mean_loss.compute() == 1.5
    mean_loss.update(torch.tensor(float("nan")), torch.tensor(1))
    assert mean_loss.compute().isnan()


def test_classes_are_balanced_by_what_is_trained_on(work: Path) -> None:
    args = ["--model.balance_classes", "true", "--trainer.max_steps", "1", "--trainer.logger", "false"]
    cli = main_of("classification")(["fit", *args, "--trainer.enable_progress_bar", "false"])
    samples = cli.datamodule.samples
    counts = torch.bincount(samples.labelled.target[samples.parts.train], minlength=10)
    assert torch.allclose(cli.model.class_weight, counts.sum() / (10 * counts))


# Logged rows


@pytest.mark.parametrize(
    ("accumulate", "every", "batches"), [(1, 1, 8), (1, 3, 8), (2, 1, 8), (2, 3, 8), (2, 2, 6), (3, 2, 6)]
)
def test_a_row_is_the_mean_since_the_last_one(
    accumulate: int, every: int, batches: int, data: ClassificationData, tmp_path: Path
) -> None:
    module = Watched()
    settings: dict[str, Any] = {"accumulate_grad_batches": accumulate, "limit_train_batches": batches}
    trainer = fit(module, data, tmp_path, max_epochs=2, log_every_n_steps=every, **settings)
    steps: list[list[float]] = []  # the losses of the micro-batches of each step
    for start in (0, batches):
        epoch = module.losses[start : start + batches]
        steps += [epoch[i : i + accumulate] for i in range(0, batches, accumulate)]
    assert trainer.global_step == len(steps)
    ends = range(every - 1, len(steps), every)
    expected = {end: mean([loss for step in steps[end - every + 1 : end + 1] for loss in step]) for end in ends}
    assert rows(tmp_path, "train/loss") == pytest.approx(expected, rel=1e-6)


# Gradients


@pytest.mark.parametrize("limit", [None, 0.5, 1000.0])
def test_clipping_by_norm(limit: float | None, data: ClassificationData, tmp_path: Path) -> None:
    module = Watched()
    fit(module, data, tmp_path, max_steps=3, gradient_clip_val=limit)
    norms = rows(tmp_path, "optim/grad_norm")
    for step, (before, after) in enumerate(zip(module.gradients, module.clipped, strict=True)):
        norm = torch.cat([g.flatten() for g in before]).norm().item()
        assert norm > 0.5
        assert norms[step] == pytest.approx(norm, rel=1e-5)
        plain = [nn.Parameter(torch.zeros_like(g)) for g in before]
        for p, g in zip(plain, before, strict=True):
            p.grad = g.clone()
        if limit:
            nn.utils.clip_grad_norm_(plain, limit)
            assert torch.cat([g.flatten() for g in after]).norm() <= limit * (1 + 1e-5)
        assert all(torch.equal(g, p.grad) for p, g in zip(plain, after, strict=True) if p.grad is not None)


def test_clipping_by_value(data: ClassificationData, tmp_path: Path) -> None:
    module = Watched()
    fit(module, data, tmp_path, max_steps=3, gradient_clip_val=0.01, gradient_clip_algorithm="value")
    for before, after in zip(module.gradients, module.clipped, strict=True):
        assert max(g.abs().max() for g in before) > 0.01
        assert all(torch.equal(g.clamp(-0.01, 0.01), h) for g, h in zip(before, after, strict=True))
    norm = torch.cat([g.flatten() for g in module.gradients[0]]).norm().item()
    assert rows(tmp_path, "optim/grad_norm")[0] == pytest.approx(norm, rel=1e-5)


# Initial weights


@pytest.mark.parametrize(
    "name",
    ["xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal", "orthogonal", "trunc_normal"],
)
def test_weight_init_changes_matrices_only(name: str) -> None:
    plain, module = Watched(), Watched(weight_init=name)
    plain.configure_model()
    module.configure_model()
    torch.manual_seed(step_seed(global_seed()))
    expected = small_net(10)
    for p in expected.parameters():
        if p.ndim >= 2:
            getattr(nn.init, f"{name}_")(p)
    for (key, p), own, wanted in zip(
        module.net.named_parameters(), plain.net.parameters(), expected.parameters(), strict=True
    ):
        assert torch.equal(p, wanted), key
        assert torch.equal(p, own) == (p.ndim < 2), key


def test_parameters_that_nothing_would_train_are_refused() -> None:
    module = Watched()
    module.temperature = nn.Parameter(torch.ones(()))
    with pytest.raises(InputError, match="temperature is no part of the net, which alone is trained; make it in build"):
        module.configure_model()
    frozen = Watched()
    frozen.temperature = nn.Parameter(torch.ones(()), requires_grad=False)
    frozen.configure_model()


def test_initial_weights_depend_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    nets = []
    for seed, draws in ((1, 0), (1, 5), (2, 0)):
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        torch.manual_seed(7)
        torch.rand(draws)
        before = torch.get_rng_state()
        module = Watched()
        module.configure_model()
        net = module.net
        module.configure_model()
        assert module.net is net  # once
        assert torch.equal(torch.get_rng_state(), before)
        nets.append(net.state_dict())
    assert all(torch.equal(nets[0][key], nets[1][key]) for key in nets[0])
    assert not torch.equal(nets[0]["0.weight"], nets[2]["0.weight"])


# Losses and weights that are not finite


@pytest.mark.parametrize("every", [1, 2, 50])
@pytest.mark.parametrize(("accumulate", "micro_batch"), [(1, 5), (2, 10), (2, 11)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(
    every: int, accumulate: int, micro_batch: int, value: float, data: ClassificationData, tmp_path: Path
) -> None:
    module = Watched(broken={micro_batch: value})
    settings: dict[str, Any] = {"accumulate_grad_batches": accumulate, "max_steps": 8}
    with pytest.raises(InputError, match=rf"^train/loss is {value} at step 5: lower model.optimizer.lr, "):
        fit(module, data, tmp_path, log_every_n_steps=every, **settings)
    if every < 50:
        assert len(module.losses) == {1: 6, 2: 6}[every] * accumulate  # it stops where the row would be written


def test_the_step_is_right_after_an_epoch(data: ClassificationData, tmp_path: Path) -> None:
    """Micro-batches 0 1 | 2 3 || 4 5 | 6 7."""
    module = Watched(broken={6: float("nan")})
    with pytest.raises(InputError, match="train/loss is nan at step 3"):
        fit(module, data, tmp_path, max_epochs=2, limit_train_batches=4, accumulate_grad_batches=2, log_every_n_steps=6)


DIVERGES = """
model:
  optimizer: {class_path: torch.optim.SGD, init_args: {lr: 1.0e-3}}
  lr_scheduler: {class_path: torch.optim.lr_scheduler.StepLR, init_args: {step_size: 4, gamma: 3.0e+41}}
  net: {class_path: common.nets.ConvNet, init_args: {widths: [4]}}
data: {batch_size: 8}
trainer:
  max_steps: 20
  limit_val_batches: 1
  enable_progress_bar: false
last: {every_n_train_steps: 2}
"""


def diverge(folder: Path, *args: str) -> dict[str, Any]:
    """A run whose fifth step, counted from 0 the fourth, throws the weights away; the checkpoint that it leaves."""
    Path("diverges.yaml").write_text(DIVERGES)
    with pytest.raises(SystemExit) as stop:
        main_of("classification")(["fit", "--config", "diverges.yaml", *args])
    assert stop.value.code == 2
    path = folder / "runs/classification/default/checkpoints/last.ckpt"
    module = ClassificationModule.load_from_checkpoint(path)
    assert all(p.isfinite().all() for p in module.parameters())
    return read_checkpoint(path)


@pytest.mark.parametrize("every", ["1", "50"])
def test_a_run_that_diverges_keeps_its_last_good_checkpoint(
    every: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert diverge(work, "--trainer.log_every_n_steps", every)["global_step"] == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "diverges.yaml:3: model.optimizer.init_args.lr: train/loss is nan at step 5: lower model.optimizer.lr, warm up "
        "longer or set trainer.gradient_clip_val; earlier checkpoints are intact"
    )


def test_weights_that_are_not_finite_are_not_saved(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The loss of the step before was still fine: only the weights give it away."""
    assert diverge(work, "--model.l1", "100", "--trainer.max_steps", "5")["global_step"] == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert "weights are not finite after step 4: " in line


def test_a_broken_checkpoint_is_not_written(data: ClassificationData, tmp_path: Path) -> None:
    module = Watched()
    trainer = fit(module, data, tmp_path, max_steps=1)
    trainer.save_checkpoint(tmp_path / "good.ckpt", weights_only=True)
    assert (tmp_path / "good.ckpt").exists()
    with torch.no_grad():
        next(module.net.parameters())[0] = float("inf")
    with pytest.raises(InputError, match="weights are not finite after step 0"):
        trainer.save_checkpoint(tmp_path / "bad.ckpt", weights_only=True)
    assert not (tmp_path / "bad.ckpt").exists()


# Blocks


def test_activation_checkpointing_changes_no_loss(work: Path, lm_args: list[str]) -> None:
    """With dropout, whose numbers have to be drawn again."""
    size = "--model.config.init_args.attention_dropout"
    for name, flag in (("plain", "false"), ("checkpointed", "true")):
        args = ["fit", *lm_args, *TINY, size, "0.1", "--name", name, "--model.activation_checkpointing", flag]
        module = main_of("lm")(args).model
    assert list(module.state_dict()) == list(
        read_checkpoint(work / "runs/lm/plain/checkpoints/last.ckpt")["state_dict"]
    )
    losses = [read_metrics(work / f"runs/lm/{name}/metrics.csv", "train/loss") for name in ("plain", "checkpointed")]
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # what dynamo warns of while it traces is not ours
def test_compiled_blocks_compute_the_same(work: Path, lm_args: list[str]) -> None:
    for name, flag in (("plain", "false"), ("compiled", "true")):
        main_of("lm")(["fit", *lm_args, *TINY, "--data.eval_batch_size", "4", "--name", name, "--model.compile", flag])
    plain, compiled = (
        read_checkpoint(work / f"runs/lm/{name}/checkpoints/last.ckpt") for name in ("plain", "compiled")
    )
    assert list(plain["state_dict"]) == list(compiled["state_dict"])
    losses = [read_metrics(work / f"runs/lm/{name}/metrics.csv", "train/loss") for name in ("plain", "compiled")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


# Samples of a language model


@pytest.mark.parametrize("length", [1, 31, 32, 70])
def test_text_goes_on_past_the_context(length: int, work: Path, lm_args: list[str]) -> None:
    """The net was trained on windows of 32; whatever it is given, it never sees more."""
    args = [
        "fit",
        *lm_args,
        "--trainer.max_steps",
        "1",
        "--trainer.limit_val_batches",
        "0",
        "--trainer.logger",
        "false",
    ]
    module = main_of("lm")([*args, "--model.sample_tokens", "50", "--trainer.enable_progress_bar", "false"]).model
    seen: list[int] = []
    module.net.register_forward_pre_hook(
        lambda _, __, inputs: seen.append(int(inputs["position_ids"].max()) + 1), with_kwargs=True
    )
    prompt = torch.arange(length)[None] % 20 + 2
    module.temperature = 0
    ids = module.generate(prompt)
    assert ids[:length] == prompt[0].tolist()
    assert len(ids) == length + 50 or ids[-1] == module.config.eos_token_id
    assert 0 < max(seen) <= 32
    module.sample_tokens = 0
    assert module.generate(prompt) == prompt[0].tolist()


# Callbacks from a layer


@pytest.mark.parametrize("every", ["null", "100"])
def test_early_stopping_as_a_layer(every: str, work: Path) -> None:
    stop = {"monitor": "val/loss", "patience": 2, "min_delta": 100.0}
    callback = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": stop}
    (work / "stop.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": [callback]}}))
    args = ["--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1", "--trainer.logger", "false"]
    args += ["--model.net.widths", "[4]", "--trainer.enable_progress_bar", "false", "--config", str(work / "stop.yaml")]
    args += ["--last.every_n_train_steps", every]
    trainer = main_of("classification")(["fit", *args]).trainer
    assert (trainer.current_epoch, trainer.max_epochs) == (3, 40)
    assert read_checkpoint(work / "runs/classification/default/checkpoints/last.ckpt")["global_step"] == 6


@pytest.mark.parametrize("end", [["--trainer.max_epochs", "2"], ["--trainer.max_steps", "5"]])
def test_the_end_of_training_is_saved(end: list[str], work: Path) -> None:
    args = [
        "--last.every_n_train_steps",
        "100",
        "--model.net.widths",
        "[4]",
        "--trainer.enable_progress_bar",
        "false",
        *end,
    ]
    args += ["--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "1", "--trainer.logger", "false"]
    trainer = main_of("classification")(["fit", *args]).trainer
    saved = read_checkpoint(work / "runs/classification/default/checkpoints/last.ckpt")["global_step"]
    assert saved == trainer.global_step > 4


# A pretrained encoder, fine-tuned


class Reviews(NamedTuple):
    """A table of labelled text, a pretrained encoder that knows its words, and arguments that make a run of both."""

    table: Path
    encoder: Path
    args: list[str]


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reviews]:
    folder = tmp_path_factory.mktemp("reviews")
    words = {"good": ("fine", "great", "lovely"), "bad": ("dull", "poor", "weak")}
    texts = [(f"a {words[label][number % 3]} film, number {number}", label) for number in range(40) for label in words]
    with (folder / "reviews.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *texts])
    encoder = write_encoder(folder / "encoder", [text for text, _ in texts])
    args = [
        "fit", "--config", str(ROOT / "recipes/classification/text.yaml"), "--data.source.path",
        str(folder / "reviews.csv"), "--data.source.tokenizer", str(encoder), "--model.net.name", str(encoder),
        "--data.batch_size", "8", "--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false",
        "--trainer.logger", "false", "--trainer.accelerator", "cpu",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        yield Reviews(folder / "reviews.csv", encoder, args)


def rates_of(optimizer: torch.optim.Optimizer, net: nn.Module) -> dict[str, set[float]]:
    """The rates of body and head before the schedule."""
    rates: dict[str, set[float]] = {"body": set(), "head": set()}
    part_of = {id(p): name.split(".")[0] for name, p in net.named_parameters()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            rates[part_of[id(p)]].add(group["initial_lr"])
    return rates


@pytest.mark.parametrize(("scale", "freeze"), [(0.1, False), (1.0, False), (0.1, True)])
def test_an_encoder_is_fine_tuned(scale: float, freeze: bool, reviews: Reviews, work: Path) -> None:
    settings = ["--model.body_lr_scale", str(scale), "--model.net.freeze", str(freeze).lower()]
    cli = main_of("classification")([*reviews.args, *settings])
    net, start = cli.model.net, PretrainedEncoder(2, str(reviews.encoder))
    rates = rates_of(cli.trainer.optimizers[0], net)
    assert {part: [pytest.approx(rate) for rate in values] for part, values in rates.items()} == {
        "body": [] if freeze else [5.0e-4 * scale], "head": [5.0e-4],
    }  # fmt: skip
    same = [torch.equal(p, q) for p, q in zip(net.body.parameters(), start.body.parameters(), strict=True)]
    assert all(same) if freeze else not any(same)
    assert net.head[0].p == 0.1  # its own default: the recipe's convolutional net has 0.2
    assert net.training
    assert net.body.training != freeze
    tokens = torch.arange(2, 12).view(2, 5)
    states = [net.body(tokens, torch.ones_like(tokens)).last_hidden_state for _ in range(2)]
    assert torch.equal(*states) == freeze  # dropout is off in a frozen body, on in one that learns
    first, again = (net(tokens, torch.ones_like(tokens)) for _ in range(2))
    assert not torch.equal(first, again)  # and on in the head


def test_padding_does_not_change_an_encoding(reviews: Reviews) -> None:
    net = PretrainedEncoder(2, str(reviews.encoder)).eval()
    tokens, mask = torch.arange(2, 12).view(2, 5), torch.ones(2, 5, dtype=torch.long)
    longer = F.pad(tokens, (0, 3), value=7), F.pad(mask, (0, 3))
    states = net.body(input_ids=tokens, attention_mask=mask).last_hidden_state
    assert torch.allclose(net(tokens, mask), net.head(states.mean(1)), atol=1e-6)
    assert torch.allclose(net(*longer), net(tokens, mask), atol=1e-6)


def test_an_encoder_learns_on_two_ranks(reviews: Reviews, work: Path) -> None:
    args = [*reviews.args, "--config", str(ROOT / "configs/strategy/ddp.yaml"), "--trainer.devices", "2"]
    assert run_ranks(main_of("classification"), [*args, "--trainer.max_steps", "2"], folder=work) == [0, 0], logs(work)


def test_texts_without_labels_are_predicted(reviews: Reviews, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main_of("classification")([*reviews.args, "--trainer.max_steps", "2"])
    (work / "new.csv").write_text("review\na fine film\na dull film\na weak film\n")
    args = [
        "predict", "--ckpt_path", "last", "--data.predict_source", "common.sources.TextTable",
        "--data.predict_source.path", "new.csv", "--data.predict_source.tokenizer", str(reviews.encoder),
        "--data.predict_source.label", "null",
    ]  # fmt: skip
    main_of("classification")([*args, "--data.predict_source.text", "review"])
    with (work / "runs/classification/default/predict-last/predictions.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["index"] for row in table] == ["0", "1", "2"]
    assert list(table[0]) == ["index", "prediction", "p(bad)", "p(good)"]
    with pytest.raises(SystemExit):
        main_of("classification")([*args, "--data.predict_source.text", "text"])
    assert capsys.readouterr().err == "--data.predict_source.text: 'text': no such column among ['review']\n"


def test_a_missing_encoder_is_named(
    reviews: Reviews, work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit):
        main_of("classification")([*reviews.args, "--model.net.name", "no/such"])
    assert "'no/such': neither a folder with an encoder in safetensors nor a hub name (" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["images", "text"])
def test_a_checkpoint_loads_with_equal_logits(
    kind: str, reviews: Reviews, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = ["fit", "--model.net.widths", "[4]", "--trainer.enable_progress_bar", "false", "--trainer.logger", "false"]
    args = [*(reviews.args if kind == "text" else images), "--trainer.max_steps", "3"]
    cli = main_of("classification")(args)
    monkeypatch.chdir("/")
    module = ClassificationModule.load_from_checkpoint(work / "runs/classification/default/checkpoints/last.ckpt")
    batch = next(iter(cli.datamodule.val_dataloader()))
    with torch.no_grad():
        assert torch.equal(module.eval()(batch), cli.model.eval()(batch))
