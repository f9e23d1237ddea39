"""Losses against plain formulas, the teacher's place outside of the module, and the teacher that is trained first."""

import csv
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import yaml
from scipy.special import rel_entr, softmax
from torch import nn
from transformers import AutoTokenizer, LlamaConfig

from common.checkpoint import read_checkpoint
from common.errors import InputError
from common.nets import CausalLM, ConvNet, Pretrained
from common.run.cli import RecipeCLI
from common.sources import Digits
from common.sources.labelled import fingerprint
from common.sources.tokenizers import Characters
from recipes.distillation.compare import compare_models, gap_closed
from recipes.distillation.losses import AttentionTransfer, LogitError, SimilarityPreserving, SoftTargets
from recipes.distillation.teacher import Features
from recipes.distillation.text import TextWindows
from tests.support import (
    PLAIN,
    ROOT,
    TINY,
    halved,
    logs,
    main_of,
    read_metrics,
    run_ranks,
    tokens_until_the_end,
    write_decoder,
    write_encoder,
)
from tests.test_resume import digest, killed_main, write_config

pytestmark = pytest.mark.usefixtures("no_report")

RECIPE = "distillation"
LAYER = ["--config", str(ROOT / "recipes/distillation/small.yaml")]
# After four steps the net has learned so little that rounding decides, on some processors otherwise than on others.
LONGER = ["--trainer.max_steps", "20", "--trainer.val_check_interval", "20"]
SHORT = str(ROOT / "recipes/distillation/small_teacher.yaml")
CPU = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
SMALL = [*LAYER, *TINY, *CPU]
CONVS = [
    *TINY,
    *CPU,
    "--model.teacher.widths",
    "[8, 8]",
    "--model.net.widths",
    "[4]",
    "--model.teacher_training",
    SHORT,
]
ALL = torch.ones(7, dtype=torch.bool)


LAYER_CONFIG: dict[str, Any] = yaml.safe_load(Path(LAYER[1]).read_text())


@pytest.fixture(autouse=True)
def _only_our_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Lightning logs goes to stdout in a process of its own; here it would stand on stderr."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])


def refused(args: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """The one line that a command line ends in."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main_of(RECIPE)(args)
    error = capfd.readouterr().err
    assert exit_.value.code == 2, error
    assert len(error.splitlines()) == 1, error
    assert len(error) <= 241, error
    return error.strip()


def text_args(text: Path) -> list[str]:
    """The lm preset with small nets on a small text; the student's net is the one of the lm recipe's small runs."""
    sizes = "{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}"
    flags = ["--config", str(ROOT / "recipes/distillation/lm.yaml"), *TINY, "--trainer.accelerator", "cpu"]
    for net in ("net", "teacher"):
        flags += [f"--model.{net}.config", f"{{class_path: transformers.LlamaConfig, init_args: {sizes}}}"]
    source = "--data.source.init_args"
    flags += [
        f"{source}.path",
        str(text),
        f"{source}.tokenizer",
        "common.sources.tokenizers.Characters",
        f"{source}.context",
        "32",
    ]
    return [*flags, "--model.teacher_training", SHORT]


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(7, 5), torch.randn(7, 5) * 3


# Losses


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_soft_targets_are_hintons(temperature: float, logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    student, teacher = (softmax(values.double().numpy() / temperature, axis=-1) for values in logits)
    expected = temperature**2 * rel_entr(teacher, student).sum(-1).mean()
    assert SoftTargets(temperature)(*logits, ALL).item() == pytest.approx(expected, rel=1e-5)


def test_soft_targets_match_logits_at_high_temperature(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Equation 4 of the paper: the gradient tends to the difference of centred logits over the number of classes."""
    student, teacher = (values.double() - values.double().mean(-1, keepdim=True) for values in logits)
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(SoftTargets(1e5)(student, teacher, ALL), student)
    torch.testing.assert_close(gradient, (student - teacher).detach() / 5 / 7, rtol=1e-3, atol=1e-5)


def test_logit_error(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    expected = np.mean((logits[0].numpy() - logits[1].numpy()) ** 2)
    assert LogitError()(*logits, ALL).item() == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("loss", [SoftTargets(2.0), LogitError()], ids=["soft", "error"])
def test_items_that_do_not_count(loss: Any, logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    counts = torch.tensor([True, False, True, True, False, True, False])
    some = loss(*(values[counts] for values in logits), ALL[:4])
    assert loss(*logits, counts).item() == pytest.approx(some.item(), rel=1e-6)
    assert loss(logits[0], logits[0], ALL).item() == pytest.approx(0, abs=1e-6)


def test_halves_average_to_the_whole() -> None:
    """What accumulation and ranks rely on; similarities compare the samples of one batch, and do change."""
    torch.manual_seed(0)
    student, teacher = torch.randn(8, 3, 4), torch.randn(8, 5, 4)
    for loss, exact in ((AttentionTransfer(), True), (SimilarityPreserving(), False)):
        pair = student.transpose(1, 2), teacher.transpose(1, 2)
        halves = [loss(pair[0][part], pair[1][part]) for part in (slice(0, 4), slice(4, 8))]
        difference = abs(torch.stack(halves).mean().item() - loss(*pair).item())
        assert (difference < 1e-6) == exact


def test_attention_transfer_takes_maps_and_hidden_states() -> None:
    torch.manual_seed(0)
    maps = torch.randn(3, 4, 2, 5), torch.randn(3, 6, 2, 5)
    expected = 0.0
    for sample in range(3):
        vectors = [(values[sample].numpy() ** 2).mean(0).ravel() for values in maps]
        ours, theirs = (vector / np.linalg.norm(vector) for vector in vectors)
        expected += ((ours - theirs) ** 2).sum() / 3
    assert AttentionTransfer()(*maps).item() == pytest.approx(expected, rel=1e-5)
    states = [values.flatten(2).transpose(1, 2) for values in maps]
    assert AttentionTransfer()(*states).item() == pytest.approx(expected, rel=1e-5)


def test_similarity_preserving() -> None:
    torch.manual_seed(0)
    layers = torch.randn(4, 3, 2), torch.randn(4, 7)
    grams = []
    for values in layers:
        flat = values.flatten(1).double().numpy()
        gram = np.array([[float(a @ b) for b in flat] for a in flat])
        grams.append(gram / np.linalg.norm(gram, axis=1, keepdims=True))
    expected = np.linalg.norm(grams[0] - grams[1]) ** 2 / 16
    assert SimilarityPreserving()(*layers).item() == pytest.approx(expected, rel=1e-5)


def test_features_are_the_layers_outputs_in_order() -> None:
    net = ConvNet(3, widths=(2, 4)).eval()
    features, pixels = Features(net, ["13", "6", "13"]), torch.randn(2, 1, 8, 8)
    net(pixels)
    first, second, again = features.take()
    layers = list(net)
    torch.testing.assert_close(second, nn.Sequential(*layers[:7])(pixels))
    torch.testing.assert_close(first, nn.Sequential(*layers[7:14])(second))
    assert again is first
    net(pixels)
    features.take()
    with pytest.raises(InputError, match=r"model.features: this rank's part of the net has no output of '13'"):
        features.take()
    with pytest.raises(InputError, match=r"ConvNet has no layer '66'; did you mean '6'"):
        Features(net, ["66"])


def test_fingerprint_changes_with_the_samples() -> None:
    data = Digits().read()
    before = fingerprint(data)
    assert before == fingerprint(Digits().read())
    data.inputs["pixel_values"][5, 0, 3, 3] += 0.5
    assert fingerprint(data) != before


def test_text_windows(small_text: Path, tmp_path: Path) -> None:
    source = TextWindows(Characters(), str(small_text), context=32, cache_dir=str(tmp_path))
    data = source.read()
    text, ids = small_text.read_text(), data.inputs["input_ids"]
    assert "".join(data.class_names[n] for n in ids[0].tolist()) == text[:32]
    assert "".join(data.class_names[n] for n in data.target[0].tolist()) == text[1:33]
    val = data.target[-data.num_val :]
    assert torch.equal(data.target[: -data.num_val, :-1], ids[: -data.num_val, 1:])
    assert (val >= 0).sum() == 6000 - 1, "every token of the last tenth but the first is a target"
    assert (data.target[: -data.num_val] >= 0).all()


# The teacher


def fit(*args: str, name: str = "default") -> Any:
    return main_of(RECIPE)(["fit", *SMALL, "--name", name, *args])


def loss_rows(name: str) -> list[float]:
    return read_metrics(Path("runs/distillation", name, "metrics.csv"), "train/loss")


def kept() -> dict[str, int]:
    """The teachers in the cache, and when their checkpoint was written."""
    return {path.name: (run_of(path) / "checkpoints/best.ckpt").stat().st_mtime_ns for path in teachers()}


def teachers() -> list[Path]:
    folder = Path(os.environ["XDG_CACHE_HOME"], "lightning-recipes/teachers")
    return [path for path in folder.glob("*") if (path / "done").exists()]


def run_of(teacher: Path) -> Path:
    """The folder of the run that trained it."""
    return teacher / (teacher / "done").read_text()


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache without any teacher."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("recipes.distillation.training.CACHE", str(tmp_path / "cache/lightning-recipes"))


@pytest.mark.matrix
def test_teacher_is_trained_once(work: Path, cache: None) -> None:
    """Whatever is changed of the student; another width or other data train another."""
    cli = fit()
    first = kept()
    assert len(first) == 1
    assert "teacher: null" in (run_of(teachers()[0]) / "config.yaml").read_text()
    assert not cli.model.teacher.net.training
    fit("--model.optimizer.lr", "0.1", "--data.batch_size", "8", "--seed_everything", "5", "--model.alpha", "0.5")
    assert kept() == first
    fit("--model.teacher.widths", "[4]")
    assert len(kept()) == 2
    assert kept().items() > first.items()
    half = teachers()[0].parent / next(iter(first))
    (half / "done").unlink()  # as a killed process leaves it
    shutil.rmtree(half / "runs")
    fit()
    second = kept()
    assert second.keys() > first.keys()
    assert not second.items() & first.items(), "half a teacher was taken"


def teachers_processes() -> set[str]:
    """Numbers of this process's children that train a teacher."""
    numbers = {number for task in Path("/proc/self/task").glob("*/children") for number in task.read_text().split()}
    return {number for number in numbers if b"--name\0teacher" in Path(f"/proc/{number}/cmdline").read_bytes()}


@pytest.mark.matrix
def test_sigterm_ends_the_training_of_a_teacher(work: Path, cache: None, capfd: pytest.CaptureFixture[str]) -> None:
    """Its process ends too; the next fit goes on with the teacher."""
    before = signal.getsignal(signal.SIGTERM)
    found: set[str] = set()

    def end() -> None:
        ends = time.monotonic() + 60
        while not found and time.monotonic() < ends:
            time.sleep(0.05)
            found.update(teachers_processes())
        if signal.getsignal(signal.SIGTERM) != before:  # else it would end the tests
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=end)
    thread.start()
    with pytest.raises(SystemExit) as stop:
        fit()
    thread.join()
    assert stop.value.code == 143
    assert capfd.readouterr().err.endswith("stopped by SIGTERM\n")
    assert signal.getsignal(signal.SIGTERM) == before
    assert len(found) == 1
    assert not teachers_processes()
    assert kept() == {}
    fit()
    assert len(kept()) == 1


@pytest.mark.matrix
def test_a_resumed_run_keeps_its_teacher(work: Path, cache: None) -> None:
    """Whatever has been edited since, in the layer that trained it."""
    layer = Path("mine.yaml")
    layer.write_text("trainer: {max_epochs: 1, check_val_every_n_epoch: 1}\nmodel: {augmentation: null}\n")
    fit("--model.teacher_training", str(layer.resolve()))
    first = kept()
    layer.write_text("trainer: {max_epochs: 2, check_val_every_n_epoch: 1}\nmodel: {augmentation: null}\n")
    cli = main_of(RECIPE)(["fit", "--ckpt_path", "last", "--trainer.max_steps", "6"])
    assert kept() == first
    assert next(iter(first)) in cli.model.teacher_checkpoint


@pytest.mark.matrix
def test_texts_are_not_augmented(work: Path, cache: None, small_text: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("reviews.csv").write_text("\n".join(["text,label", *(f"a {w} film,{w}" for w in ("good", "bad") * 30)]))
    encoder = str(write_encoder(work / "encoder", ["a good bad film"]).resolve())
    source = ["--data.source", "common.sources.TextTable", "--data.source.path", "reviews.csv"]
    source += ["--data.source.tokenizer", encoder]

    def net_of(key: str) -> list[str]:
        return [f"--model.{key}", "common.nets.PretrainedEncoder", f"--model.{key}.name", encoder]

    layer = Path("mine.yaml")
    layer.write_text("trainer: {max_epochs: 1, check_val_every_n_epoch: 1}\ndata: {batch_size: 8}\n")
    texts = [*source, *net_of("net"), *net_of("teacher"), *TINY, *CPU, "--model.teacher_training", str(layer.resolve())]
    main_of(RECIPE)(["fit", *texts, "--model.augmentation", "null"])
    assert len(kept()) == 1
    affine = "[{class_path: kornia.augmentation.RandomAffine, init_args: {degrees: 10.0}}]"
    line = refused(["fit", *texts, "--model.augmentation", affine, "--model.teacher", "null"], capfd)
    assert line.startswith("--model.augmentation: is for images, and data.source has none")
    with pytest.raises(SystemExit):
        main_of("classification")(["fit", *source, *net_of("net"), *TINY, "--model.augmentation", affine])
    assert capfd.readouterr().err.startswith("--model.augmentation: is for images, and data.source has none")


@pytest.mark.matrix
def test_failed_teacher_leaves_nothing(work: Path, cache: None, capfd: pytest.CaptureFixture[str]) -> None:
    Path("hot.yaml").write_text("model:\n  optimizer: {class_path: torch.optim.SGD, init_args: {lr: 1.0e+30}}\n")
    line = refused(["fit", *SMALL, "--model.teacher_training", str(Path("hot.yaml").resolve())], capfd)
    assert line.startswith("hot.yaml:2: model.optimizer.lr: train/loss is nan at step 1: lower model.optimizer.lr")
    assert kept() == {}
    assert not Path("runs").exists()


def test_teacher_is_in_no_checkpoint_optimizer_or_parameters(work: Path) -> None:
    cli = fit()
    assert not [name for name, _ in cli.model.named_parameters() if not name.startswith("net.")]
    saved = read_checkpoint("runs/distillation/default/checkpoints/last.ckpt")["state_dict"]
    assert saved.keys() == {f"net.{name}" for name in cli.model.net.state_dict()}
    trained = {id(p) for group in cli.trainer.optimizers[0].param_groups for p in group["params"]}
    assert trained == {id(p) for p in cli.model.net.parameters()}
    source = read_checkpoint(cli.model.teacher_checkpoint)["state_dict"]
    for name, value in cli.model.teacher.net.state_dict().items():
        assert torch.equal(value, source[f"net.{name}"]), "training has not touched it, its batch norms included"
    assert not any(p.requires_grad or p.grad is not None for p in cli.model.teacher.net.parameters())


@pytest.mark.matrix
def test_student_alone_stands_beside(work: Path) -> None:
    """It is only asked, and changes no loss. Its accuracy is that of its own run, and gives the share closed."""
    alone = fit("--model.teacher", "null", "--trainer.max_steps", "4", name="alone")
    checkpoint = str(Path("runs/distillation/alone/checkpoints/last.ckpt").resolve())
    fit(name="plain")
    cli = fit("--model.alone_checkpoint", checkpoint)
    assert loss_rows("plain") == loss_rows("default")
    found = {name: value.item() for name, value in cli.trainer.callback_metrics.items()}
    assert found["val/alone_accuracy"] == alone.trainer.callback_metrics["val/accuracy"].item()
    assert not [name for name in cli.model.state_dict() if not name.startswith("net.")]
    parts = compare_models(cli.model, "val")
    _, teacher, beside, student, _, closed = str(parts["models_table"]).splitlines()
    assert [line[:13].strip() for line in (teacher, beside, student)] == ["teacher", "student alone", "student"]
    assert closed == gap_closed(*(found[f"val/{name}"] for name in ("teacher_accuracy", "alone_accuracy", "accuracy")))


def test_gap_closed() -> None:
    assert gap_closed(0.9, 0.5, 0.7) == "gap between teacher and student alone: 50% closed"
    assert gap_closed(0.9, 0.5, 0.4) == "gap between teacher and student alone: -25% closed"
    assert gap_closed(0.5, 0.5, 0.7).startswith("no gap")


@pytest.mark.matrix
def test_own_teacher(work: Path) -> None:
    """A student whose teacher is its own checkpoint agrees with it from the first evaluation on."""
    fit("--model.teacher", "null")
    checkpoint = str(Path("runs/distillation/default/checkpoints/last.ckpt").resolve())
    net = LAYER_CONFIG["model"]["net"]
    Path("own.yaml").write_text(json.dumps({"model": {"teacher": net, "teacher_checkpoint": checkpoint}}))
    shutil.copy(checkpoint, "copy.ckpt")
    frozen = ["--model.optimizer.lr", "0", "--model.alpha", "1", "--trainer.max_steps", "6"]
    cli = fit("--config", "own.yaml", "--ckpt_path", "copy.ckpt", *frozen, name="own")
    assert cli.trainer.callback_metrics["val/agreement"] == 1
    assert abs(read_metrics(Path("runs/distillation/own/metrics.csv"), "train/loss")[-1]) < 1e-6
    assert read_metrics(Path("runs/distillation/own/metrics.csv"), "val/loss")[-1] > 1


@pytest.mark.matrix
def test_checkpoints_of_other_recipes_teach(work: Path, lm_args: list[str], small_text: Path) -> None:
    same = ["--data.test_fraction", "0.4"]
    main_of("classification")(["fit", *TINY, "--model.net.widths", "[8]", "--trainer.accelerator", "cpu", *same])
    path = "runs/classification/default/checkpoints/best.ckpt"
    cli = fit("--model.teacher_checkpoint", path, *same)
    state = read_checkpoint(path)["state_dict"]
    for name, value in cli.model.teacher.net.state_dict().items():
        assert torch.equal(value, state[f"net.{name}"]), name
    main_of("lm")(["fit", *TINY, *lm_args, "--trainer.accelerator", "cpu"])
    fit(*text_args(small_text), "--model.teacher_checkpoint", "runs/lm/default/checkpoints/best.ckpt")


@pytest.mark.matrix
@pytest.mark.parametrize("loss", ["AttentionTransfer", "SimilarityPreserving"])
def test_features_teach(loss: str, work: Path) -> None:
    """Their loss comes on top of the other, with the weight that is given, and training lowers it."""
    args = ["--data.batch_size", "32", "--model.alpha", "0", "--trainer.limit_val_batches", "0"]
    args += ["--model.feature_loss", loss, "--model.features", "[['0', '3'], [6, 6]]"]
    losses = {}
    for weight, steps in (("0", "1"), ("10", "1"), ("20", "40")):
        own = ["--model.feature_weight", weight, "--trainer.max_steps", steps, "--name", weight]
        main_of(RECIPE)(["fit", *CONVS, *args, *own])
        losses[weight] = read_metrics(Path(f"runs/distillation/{weight}/metrics.csv"), "train/loss")
    once, twice = losses["10"][0] - losses["0"][0], losses["20"][0] - losses["0"][0]
    assert 0.001 < once == pytest.approx(twice / 2, rel=1e-3)
    assert losses["20"][-1] < losses["20"][0]


# Ranks and resume


def losses_of(strategy: str | None, precision: str, args: list[str], work: Path) -> list[float]:
    world, name = (2, strategy) if strategy else (1, "single")
    layer = ["--config", str(ROOT / f"configs/strategy/{strategy}.yaml")] if strategy else []
    command = [
        "fit", *PLAIN, *LAYER, *layer, "--trainer.precision", precision, "--name", name,
        "--data.batch_size", str(16 // world),
        "--trainer.accelerator", "cpu", "--trainer.devices", str(world), "--trainer.max_steps", "20",
        "--trainer.log_every_n_steps", "1", "--trainer.check_val_every_n_epoch", "null",
        "--trainer.val_check_interval", "10", "--trainer.enable_progress_bar", "false",
        "--trainer.enable_model_summary", "false", *args,
    ]  # fmt: skip
    codes = run_ranks(main_of(RECIPE), command, world=world, folder=work / name)
    assert codes == [0] * world, logs(work / name)
    return read_metrics(work / f"runs/distillation/{name}/metrics.csv", "train/loss")


@pytest.mark.matrix
@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-5), ("bf16-mixed", 2e-2)])
def test_strategies_agree(precision: str, tolerance: float, work: Path, record_property: Any) -> None:
    """Under each the teacher is whole, and computes in the precision of the run."""
    main_of(RECIPE)(["fit", *SMALL, "--name", "first"])  # the teacher, before ranks wait for it
    single = losses_of(None, precision, [], work)
    assert len(single) == 20
    for strategy in ("ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3"):
        both = losses_of(strategy, precision, [], work)
        worst = max(abs(loss / wanted - 1) for loss, wanted in zip(both, single, strict=True))
        record_property("summary", f"distillation, {strategy}, {precision}: losses differ by {worst:.0e}")
        assert worst < tolerance, strategy


@pytest.mark.matrix
@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_zero2"])
def test_killed_run_goes_on_to_the_bit(strategy: str, work: Path) -> None:
    """With augmentation and dropout, whose numbers decide what the teacher is asked."""
    main_of(RECIPE)(["fit", *SMALL, "--name", "first"])
    args = [
        "fit", *LAYER, "--config", str(write_config(work, {"every_n_train_steps": 5})),
        "--config", str(ROOT / f"configs/strategy/{strategy}.yaml"), "--trainer.accelerator", "cpu",
        "--trainer.devices", "2", "--trainer.max_steps", "20", "--data.batch_size", "4",
        "--model.net.config.hidden_dropout_prob", "0.1", "--trainer.enable_progress_bar", "false",
        "--model.augmentation", "[{class_path: kornia.augmentation.RandomAffine, init_args: {degrees: 10.0}}]",
    ]  # fmt: skip
    main = main_of(RECIPE)
    assert run_ranks(main, [*args, "--name", "whole"], folder=work / "whole") == [0, 0], logs(work / "whole")
    killed = run_ranks(killed_main, RECIPE, [*args, "--name", "cut"], 13, folder=work / "killed")
    assert killed == [-signal.SIGKILL] * 2, logs(work / "killed")
    again = [*args, "--name", "cut", "--ckpt_path", "last"]
    assert run_ranks(main, again, folder=work / "resumed") == [0, 0], logs(work / "resumed")
    runs = work / "runs/distillation"
    assert digest(runs / "cut/checkpoints/last.ckpt") == digest(runs / "whole/checkpoints/last.ckpt")


@pytest.mark.matrix
def test_ranks_wait_for_one_teacher(work: Path, cache: None) -> None:
    """Both are started at once, as torchrun does."""
    args = ["fit", *SMALL, "--trainer.devices", "2", "--config", str(ROOT / "configs/strategy/ddp.yaml")]
    assert run_ranks(main_of(RECIPE), args, folder=work / "ranks", timeout=300) == [0, 0], logs(work / "ranks")
    assert len(kept()) == 1
    assert logs(work / "ranks").count("teacher: trained first") == 1


# Text


@pytest.mark.matrix
def test_language_models(work: Path, small_text: Path) -> None:
    cli = main_of(RECIPE)(["fit", *text_args(small_text), *LONGER])
    metrics = {name: value.item() for name, value in cli.trainer.callback_metrics.items()}
    assert metrics["val/loss"] < math.log(len(cli.datamodule.class_names)) - 0.3  # that of a net that knows nothing
    assert metrics["val/agreement"] > metrics["val/accuracy"]
    assert {"val/accuracy", "val/teacher_accuracy", "val/agreement"} < metrics.keys()
    main_of(RECIPE)(["predict", "--ckpt_path", "last"])
    with Path("runs/distillation/default/predict-last/predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16
    assert {len(row["target"].replace("<unk>", "?")) for row in rows} == {32}


def test_loss_of_language_models_counts_tokens(work: Path, small_text: Path) -> None:
    """As the lm recipe's: the mean over all next tokens, of the shorter last window too."""
    cli = main_of(RECIPE)(
        ["fit", *text_args(small_text), "--model.teacher", "null", "--trainer.limit_val_batches", "1.0"]
    )
    data = cli.datamodule.samples.labelled
    ids, target = data.inputs["input_ids"][-data.num_val :], data.target[-data.num_val :]
    with torch.no_grad():
        loss = nn.functional.cross_entropy(cli.model.net.eval()(ids).flatten(0, 1), target.flatten())
    assert cli.trainer.callback_metrics["val/loss"].item() == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.matrix
def test_windows_with_a_pretrained_tokenizer(work: Path, small_text: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """An export keeps it as it was; a run goes on with more text, in windows of the same length."""
    write_decoder(work / "net", small_text.read_text()[:20_000])
    mine = AutoTokenizer.from_pretrained("net", model_max_length=77)
    mine.chat_template = "{{ messages[0].content }}"
    mine.save_pretrained("net")
    Path("texts").mkdir()
    Path("texts/a.txt").write_text(small_text.read_text()[:10_000])
    args = [*text_args(small_text), "--model.teacher", "null", "--data.source.path", "texts"]
    args += ["--data.source.tokenizer", "common.sources.tokenizers.PretrainedTokenizer"]
    main_of(RECIPE)(["fit", *args, "--data.source.tokenizer.name", "net"])
    main_of(RECIPE)(["export"])
    there = AutoTokenizer.from_pretrained("runs/distillation/default/export")
    for name in ("bos_token", "eos_token", "pad_token", "chat_template", "model_max_length"):
        assert getattr(there, name) == getattr(mine, name), name
    assert tokens_until_the_end(Path("runs/distillation/default/export")) == 1
    capfd.readouterr()
    main_of(RECIPE)(["test"])
    assert "has changed" not in capfd.readouterr().out
    Path("texts/b.txt").write_text(small_text.read_text()[10_000:])
    data = main_of(RECIPE)(["fit", "--ckpt_path", "last", "--trainer.max_steps", "6"]).datamodule
    train, val = (len(part) for part in data.samples.parts[:2])
    told = re.search(r"the text has changed since the checkpoint; windows: (.*)\n", capfd.readouterr().out)
    assert told is not None
    assert re.fullmatch(rf"{train} for training \(\d+ before\), {val} for validation \(\d+ before\)", told[1])
    other = ["--data.predict_source", "TextWindows", "--data.predict_source.path", "texts"]
    line = refused(["predict", *other, "--data.predict_source.context", "16"], capfd)
    assert line.endswith("data.predict_source.context: is 16, and that of the training 32; take that")


# Nets


def test_a_net_that_does_not_take_the_data(work: Path) -> None:
    """In a process of its own, as the suite's checks of shapes would speak first."""
    Path("short.txt").write_text("A short text. " * 60)
    flags = f"{SOURCE} --data.source.path short.txt --data.source.context 8 {TEACHER} null --model.augmentation null"
    command = [sys.executable, str(ROOT / "recipes/distillation/train.py"), "fit", *TINY, *CPU, *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.endswith("model.net: ConvNet takes no 'input_ids', which the data has; name another\n")
    assert len(done.stderr.splitlines()) == 1
    assert not Path("runs/distillation/default/checkpoints").exists()


def test_pretrained_net_teaches(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A net that transformers saved, with its own weights; a checkpoint takes none of them along, but knows them."""
    from transformers import ViTConfig, ViTForImageClassification

    config = LAYER_CONFIG["model"]["net"]["init_args"]["config"]["init_args"]
    ViTForImageClassification(ViTConfig.from_dict({**config, "num_labels": 10})).save_pretrained("vit")
    cli = fit(
        "--model.teacher", "common.nets.Pretrained", "--model.teacher.name", "vit", "--model.teacher_training", "null"
    )
    assert cli.model.teacher_checkpoint is None
    torch.testing.assert_close(cli.model.teacher.net.state_dict(), Pretrained(10, "vit").state_dict())
    again = ["fit", "--ckpt_path", "last", "--trainer.max_steps", "6"]
    main_of(RECIPE)(again)
    ViTForImageClassification(ViTConfig.from_dict({**config, "num_labels": 10})).save_pretrained("vit")
    assert "model.teacher: its weights are not those that the run has learnt from" in refused([*again[:-1], "8"], capfd)


def test_a_pretrained_net_has_its_own_order_of_classes_and_scale(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """They stand beside it, in ``config.json`` and ``preprocessor_config.json``."""
    from transformers import ViTConfig, ViTForImageClassification

    config = LAYER_CONFIG["model"]["net"]["init_args"]["config"]["init_args"]
    labels = {number: str(9 - number) for number in range(10)}
    net = ViTForImageClassification(ViTConfig.from_dict({**config, "id2label": labels})).eval()
    net.save_pretrained("vit")
    scale = {"image_mean": [0.25], "image_std": [0.5]}
    scale |= {"do_normalize": True, "image_processor_type": "ViTImageProcessor"}
    Path("vit/preprocessor_config.json").write_text(json.dumps(scale))
    args = [
        "--model.teacher",
        "common.nets.Pretrained",
        "--model.teacher.name",
        "vit",
        "--model.teacher_training",
        "null",
    ]
    teacher, images = fit(*args).model.teacher, torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        expected = net(pixel_values=(images - 0.25) / 0.5).logits.flip(1)
    torch.testing.assert_close(teacher({"pixel_values": images})[0], expected)
    net.config.id2label = {**labels, 3: "six"}
    net.save_pretrained("vit")
    with pytest.raises(SystemExit):
        fit(*args)
    assert "model.teacher.name: 'vit' has no class '6'; it has 9, 8, 7, six, 5" in capfd.readouterr().err


def test_a_teacher_of_another_tokenizer_is_refused(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Also where it knows as many tokens."""
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    Path("a.txt").write_text("abc abd " * 400)
    Path("b.txt").write_text("abc abe " * 400)
    source = [*SOURCE.split(), "--data.source.context", "8", "--model.augmentation", "null"]
    net = ["--model.net", "common.nets.CausalLM", "--model.net.config", "transformers.LlamaConfig"]
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    net += [part for name, size in sizes.items() for part in (f"--model.net.config.{name}", str(size))]
    for text in ("a", "b"):
        data = fit(*source, "--data.source.path", f"{text}.txt", *net, "--model.teacher", "null").datamodule
        made_from = dict(data.facts["tokenizer"])
        tokenizer = tokenizers.Tokenizer.from_str(made_from.pop("json"))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **made_from).save_pretrained("llama")
    LlamaForCausalLM(LlamaConfig(vocab_size=data.num_classes, **sizes)).save_pretrained("llama")
    teacher = ["--model.teacher", "common.nets.Pretrained", "--model.teacher.name", "llama", "--model.teacher_training"]
    teacher += ["null", "--model.teacher.task", "next token"]
    assert fit(*source, "--data.source.path", "b.txt", *net, *teacher).model.teacher is not None
    with pytest.raises(SystemExit):
        fit(*source, "--data.source.path", "a.txt", *net, *teacher)
    assert "model.teacher.name: 'llama': has another tokenizer, token 'd' is not there" in capfd.readouterr().err


def test_pretrained_language_model_may_know_more_tokens(work: Path) -> None:
    from transformers import LlamaForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    whole = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).eval()
    whole.save_pretrained("llama")
    ids = torch.arange(12)[None]
    logits = Pretrained(40, "llama", "next token").eval()(input_ids=ids)
    torch.testing.assert_close(logits, whole(ids).logits[..., :40])
    assert CausalLM(40, LlamaConfig(**sizes))(ids).shape == (1, 12, 40)


# Mistakes

NET, TEACHER = "--model.net", "--model.teacher"
SOURCE = "--data.source TextWindows --data.source.tokenizer common.sources.tokenizers.Characters"
PAIR = "--model.teacher_training null --model.features"
PRETRAINED = f"--model.teacher_training null {TEACHER} common.nets.Pretrained {TEACHER}.name"
# fmt: off
MISTAKES = [
    ("--model.alpha 1.5", "--model.alpha", "must be in [0, 1], got 1.5"),
    ("--model.alpha much", "--model.alpha", "expected float, got 'much'"),
    ("--model.loss.temperature 0", "--model.loss.temperature", "must be above 0, got 0.0"),
    ("--model.loss.temperature -2", "--model.loss.temperature", "must be above 0, got -2.0"),
    ("--model.loss SoftTarget", "--model.loss", "did you mean 'SoftTargets'?"),
    ("--model.feature_weight -1", "--model.feature_weight", "must be a number from 0 on, got -1.0"),
    ("--model.feature_loss LogitError", "--model.feature_loss", "no class 'LogitError'; it takes "),
    ("--model.teacher null --model.teacher_checkpoint a.ckpt", "--model.teacher_checkpoint", "model.teacher is null"),
    ("--model.teacher_checkpoint some.ckpt", "--model.teacher_checkpoint", "some.ckpt: no such checkpoint"),
    ("--model.teacher_checkpoint text.ckpt", "--model.teacher_checkpoint", "cut short, damaged or no checkpoint"),
    ("--model.teacher_checkpoint other.ckpt", "--model.teacher_checkpoint", "does not fit model.teacher"),
    ("--model.teacher_checkpoint classes.ckpt", "--model.teacher_checkpoint", "size mismatch for 17.weight"),
    ("--model.teacher_checkpoint split.ckpt", "--model.teacher_checkpoint", "another split of the same data, with"),
    ("--model.alone_checkpoint split.ckpt", "--model.alone_checkpoint", "split_seed 9; give --data.split_seed 9"),
    (f"{SOURCE} --data.source.path ./short.txt --data.source.context 8 --model.teacher_checkpoint windows.ckpt",
     "--model.teacher_checkpoint", "val_fraction 0.3; give --data.source.val_fraction 0.3"),
    (f"--model.teacher_training null {TEACHER}.in_channels 3", f"{TEACHER}.in_channels", "is 3, but the images have 1"),
    (f"{TEACHER}.in_channels 3", "--model.teacher_training", "model.teacher.in_channels: is 3, but the images have 1"),
    ("--model.teacher null --model.alone_checkpoint a.ckpt", "--model.alone_checkpoint", "model.teacher is null"),
    ("--model.alone_checkpoint some.ckpt", "--model.alone_checkpoint", "some.ckpt: no such checkpoint"),
    ("--model.alone_checkpoint classes.ckpt", "--model.alone_checkpoint", "does not fit model.net"),
    ("--model.teacher_training teachr.yaml", "--model.teacher_training", "did you mean 'teacher.yaml'?"),
    ("--model.teacher null --model.body_lr_scale 0.1", "--model.body_lr_scale", "the net has no part 'body.' to scale"),
    (f"{PRETRAINED} nowhere/at-all", TEACHER, "neither"),
    (f"{PRETRAINED} vit", TEACHER, "has 7 classes"),
    (f"{TEACHER}.widths []", f"{TEACHER}.widths", "is empty"),
    (f"{PAIR} [['77','3']]", "--model.features", "ConvNet has no layer '77'"),
    (f"{PAIR} [['3','conv']]", "--model.features", "ConvNet has no layer 'conv'"),
    (f"{PAIR} [['6','3']]", "--model.features", "pair layers with the same height and width"),
    (f"{PAIR} [['10','17']]", "--model.features", "which has no places"),
    (f"{PAIR} [['6']]", "--model.features", "tuple"),
    (f"{PAIR} 6", "--model.features", "list"),
    ("--data.train_fraction 0", "--data.train_fraction", "must be in (0, 1], got 0.0"),
    ("--model.teacher null --data.train_fraction 0.001", "data.batch_size", "> 1 training samples; lower it"),
    ("--data.val_fraction 0", "--data.val_fraction", "must be above 0"),
    ("--data.test_fraction 0.95", "data.val_fraction", "leave samples to train on"),
    (f"{SOURCE} --data.source.path no.txt", "", "no.txt: no such file or folder"),
    (f"{SOURCE} --data.source.context 0", "--data.source.context", "must be at least 1, got 0"),
    (f"{SOURCE} --data.source.path short.txt --data.source.context 90", "", "too few for a window of 90"),
    (f"{SOURCE} --data.source.path short.txt --data.source.val_fraction 1", "val_fraction", "give a share between"),
    (f"{SOURCE} --data.source.path short.txt --data.source.context 8 {NET} common.nets.CausalLM "
     f"{NET}.config transformers.ViTConfig {TEACHER} null", NET, "ViTConfig makes no language model"),
]
# fmt: on


@pytest.mark.parametrize(("flags", "where", "problem"), halved(MISTAKES), ids=[case[0][-60:] for case in MISTAKES])
def test_mistakes_cost_a_line(
    flags: str, where: str, problem: str, work: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    skip = RecipeCLI.subcommands()["fit"]
    monkeypatch.setattr(RecipeCLI, "subcommands", staticmethod(lambda: {"fit": skip}))
    Path("text.ckpt").write_text("no archive")
    Path("short.txt").write_text("A short text. " * 6)
    for name, net in (("other", CausalLM(5, LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1))),
                      ("classes", ConvNet(7, widths=[8, 8]))):  # fmt: skip
        state = {f"net.{key}": value for key, value in net.state_dict().items()}
        torch.save({"state_dict": state, "global_step": 1}, f"{name}.ckpt")
    data = {"source": {"class_path": "common.sources.Digits"}, "split_seed": 9}
    torch.save({"state_dict": {}, "global_step": 1, "datamodule_hyper_parameters": data}, "split.ckpt")
    source = {"class_path": "TextWindows", "init_args": {"path": "short.txt", "val_fraction": 0.3}}
    data = {"source": source, "split_seed": 0}
    torch.save({"state_dict": {}, "global_step": 1, "datamodule_hyper_parameters": data}, "windows.ckpt")
    if ".name vit" in flags:
        from transformers import ViTConfig, ViTForImageClassification

        config = LAYER_CONFIG["model"]["net"]["init_args"]["config"]["init_args"]
        ViTForImageClassification(ViTConfig.from_dict({**config, "num_labels": 7})).save_pretrained("vit")
        capfd.readouterr()
    earlier = Path("runs/distillation/default/kept")
    earlier.parent.mkdir(parents=True)
    earlier.write_text("weeks of work")
    line = refused(["fit", *CONVS, *shlex.split(flags)], capfd)
    assert where in line
    assert problem in line
    assert earlier.read_text() == "weeks of work"
    assert os.listdir("runs/distillation") == ["default"]
