"""What every recipe promises, checked on each that is found."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.callbacks import LearningRateMonitor

from tests.support import MEASURED, PLAIN, RECIPES, ROOT, TINY, logs, main_of, read_metrics, run_ranks, text_args

FILES = {"__init__.py", "README.md", "config.yaml", "data.py", "module.py", "results.yaml", "small.yaml", "train.py"}
PYTHON = [sys.executable, "-W", "ignore"]
# For what is the same code under all recipes; the matrix and `make test-all` have the others.
SOME = [name if name == "lm" else pytest.param(name, marks=pytest.mark.matrix) for name in RECIPES]
# Starts each script in a fork of a process that has imported what takes longer than such a training.
RUN = """
import gc, json, os, runpy, sys
import datasets, kornia, lightning.pytorch.cli, matplotlib.pyplot, sklearn.model_selection, transformers
import tensorboard, torchmetrics.classification, torch.distributed.fsdp, torch.distributed.tensor
for command, home in json.loads(sys.argv[1]):
    if not os.fork():
        sys.argv, sys.path[0] = command, os.path.dirname(command[0])
        runpy.run_path(command[0], run_name="__main__")
        assert gc.isenabled()
        assert sys.modules["common.run.cli"].__file__ == home + "/common/run/cli.py", "of another clone"
        sys.exit()
    if os.wait()[1]:
        sys.exit(f"{command} failed")
"""
# Where a run finds the classes of its recipe.
HOMES = {"regression": "recipes.regression", "mine": "recipes.mine", "prices": "prices"}
LOAD = """
import importlib, sys
from common.module import BaseModule
for recipe in sys.argv[1:]:
    module = importlib.import_module(f"recipes.copy_of_{recipe}.module")
    kinds = [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, BaseModule)]
    kind = next(kind for kind in kinds if kind.__module__ == module.__name__)
    net = kind.load_from_checkpoint(f"runs/copy_of_{recipe}/default/checkpoints/last.ckpt").net
    print(sum(p.numel() for p in net.parameters()))
"""


@pytest.mark.parametrize("recipe", RECIPES)
def test_anatomy(recipe: str) -> None:
    """Every recipe has the same files, and what it has beside them is named after the idea."""
    found = {path.name for path in (ROOT / "recipes" / recipe).iterdir() if path.is_file()}
    assert FILES - {"results.yaml"} <= found
    assert not found & {"utils.py", "helpers.py", "misc.py", "common.py", "base.py"}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes").rglob("*.yaml")) + sorted((ROOT / "configs").rglob("*.yaml")), ids=str
)
def test_configs_say_what_they_are_for(path: Path) -> None:
    """The head comment of a recipe's config is its command, that of a layer says when to take it and what it costs."""
    head = " ".join(line.removeprefix("# ") for line in path.read_text().splitlines() if line.startswith("# "))
    assert isinstance(yaml.safe_load(path.read_text()), dict)
    if path.stem in ("small", "results") or path.stem.endswith("teacher"):
        assert re.match(r"For tests: |What `make results` measures: |How [\w' .]*teacher", head), head
    elif path.is_relative_to(ROOT / "recipes"):
        own = "" if path.name == "config.yaml" else rf" --config recipes/\w+/{path.name}"
        assert re.match(rf"python recipes/\w+/train\.py fit{own}\b", head), head
    elif path.parent.name == "strategy":
        assert all(word in head for word in ("When: ", "Needs: ", "bytes", "--trainer.devices")), head
    else:
        assert re.match(r"[A-Z].{40,}\.", head), head


def tiny(recipe: str, small_text: Path) -> list[str]:
    """The tiny layer, on a small corpus where text is read; `main` of a copied recipe has the same arguments."""
    return [*TINY, *text_args(recipe, small_text), "--trainer.accelerator", "cpu"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_fit_test_predict(recipe: str, work: Path, small_text: Path) -> None:
    main, args = main_of(recipe), tiny(recipe, small_text)
    main(["fit", *args])
    run = work / "runs" / recipe / "default"
    kept = {path.name for path in (run / "checkpoints").iterdir()}
    assert kept - {"previous.ckpt"} == {"best.ckpt", "last.ckpt"}
    assert {"config.yaml", "environment.json", "metrics.csv", "report.html", "checkpoints"} <= set(os.listdir(run))
    assert list((run / "figures").glob("*.png"))
    assert min(read_metrics(run / "metrics.csv", "perf/step_ms")) > 0, "also after the sanity check"
    main(["test", "--ckpt_path", "best"])
    assert (run / "test/metrics.csv").is_file()
    main(["predict", "--ckpt_path", "last"])
    assert len((run / "predict-last/predictions.csv").read_text().splitlines()) > 1


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("recipe", SOME)
def test_a_run_stays_what_it_is(recipe: str, work: Path, small_text: Path) -> None:
    main, args = main_of(recipe), tiny(recipe, small_text)
    main(["fit", *args])
    run = work / "runs" / recipe / "default"
    metrics = (run / "metrics.csv").read_bytes()
    main(["validate", "--ckpt_path", "best"])
    main(["validate"])
    assert (run / "metrics.csv").read_bytes() == metrics, "later commands leave the training's metrics alone"
    main(["fit", *args])
    assert (work / "runs" / recipe / "default.1/metrics.csv").read_bytes() == metrics, "it is moved aside"


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("recipe", SOME)
def test_flags_win_over_the_checkpoint(recipe: str, work: Path, small_text: Path) -> None:
    main, args = main_of(recipe), tiny(recipe, small_text)
    decay = "--model.optimizer.weight_decay"
    main(["fit", *args, "--model.l1", "0.001", "--seed_everything", "5", decay, "0.3"])
    cli = main(["fit", "--ckpt_path", "last", "--trainer.max_steps", "5"])
    assert (cli.model.hparams.l1, cli.trainer.max_steps, cli.trainer.global_step) == (0.001, 5, 5)
    assert cli.trainer.optimizers[0].param_groups[0]["weight_decay"] == 0.3
    cli = main(["fit", "--ckpt_path", "last", "--model.l1", "0.5", "--trainer.max_steps", "6", decay, "0.4"])
    assert cli.model.hparams.l1 == 0.5
    assert cli.trainer.optimizers[0].param_groups[0]["weight_decay"] == 0.4
    # A checkpoint away from its run brings its own hyper-parameters.
    moved = work / "elsewhere.ckpt"
    shutil.copy(work / "runs" / recipe / "default/checkpoints/last.ckpt", moved)
    cli = main(["validate", "--ckpt_path", str(moved), "--trainer.limit_val_batches", "1", "--name", "other"])
    assert cli.model.hparams.l1 == 0.5


@pytest.fixture
def clone(work: Path) -> Path:
    """A copy of the repository, beside the one that is installed."""
    ignored = shutil.ignore_patterns(".*", "runs", "__pycache__", "*.egg-info")
    return Path(shutil.copytree(ROOT, work / "clone", ignore=ignored))


def run_scripts(work: Path, commands: list[tuple[list[str], Path]]) -> None:
    """Run commands one after the other, each of which must take common from its clone; one is installed, too."""
    text = json.dumps([(command, str(home)) for command, home in commands])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*PYTHON, "-c", RUN, text], cwd=work, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""


@pytest.mark.matrix
def test_copied_recipes_run_unedited(work: Path, clone: Path, small_text: Path) -> None:
    """By path from another folder, and their checkpoints load in a process that knows only the classes."""
    commands = []
    for recipe in MEASURED:
        shutil.copytree(clone / "recipes" / recipe, clone / f"recipes/copy_of_{recipe}")
        script = str(clone / f"recipes/copy_of_{recipe}/train.py")
        commands.append(([script, "fit", *tiny(recipe, small_text), *PLAIN], clone))
    run_scripts(work, commands)
    loaded = subprocess.run(
        [*PYTHON, "-c", LOAD, *MEASURED],
        cwd=work,
        env={**os.environ, "PYTHONPATH": str(clone)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert loaded.returncode == 0, loaded.stderr
    sizes = [int(line) for line in loaded.stdout.splitlines() if line.isdigit()]
    assert len(sizes) == len(MEASURED)
    assert min(sizes) > 1000


def test_a_copy_uses_its_own_classes(work: Path, clone: Path) -> None:
    """Inside the clone and outside of it, beside a package of one's own named common; runs go on in either's place."""
    original, mine, outside = clone / "recipes/regression", clone / "recipes/mine", work / "lab/prices"
    for copy in (mine, outside):
        shutil.copytree(original, copy)
        heads = (copy / "heads.py").read_text()
        assert heads.count(".square().mean()") == 1
        (copy / "heads.py").write_text(heads.replace(".square().mean()", ".abs().mean()"))
    (work / "lab/common").mkdir()
    (work / "lab/common/__init__.py").write_text("raise ImportError('of the lab')\n")
    shutil.copytree(work / "lab/common", work / "common")

    def fit(recipe: Path, *args: str) -> list[str]:
        return [str(recipe / "train.py"), "fit", *TINY, *PLAIN, *args, "--trainer.accelerator", "cpu"]

    def go_on(recipe: Path, run: str) -> list[str]:
        last = f"runs/{run}/default/checkpoints/last.ckpt"
        return fit(recipe, "--ckpt_path", last, "--name", f"from_{run}", "--trainer.max_steps", "6")

    home = {original: clone, mine: clone, outside: ROOT}
    commands = [(fit(recipe), home[recipe]) for recipe in home]
    commands += [
        (go_on(mine, "regression"), clone),
        (go_on(original, "prices"), clone),
        (go_on(outside, "mine"), ROOT),
    ]
    run_scripts(work, commands)
    module = [*PYTHON, "-m", "prices.train", "preflight", "--trainer.accelerator", "cpu"]
    installed = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(module, cwd=work / "lab", env=installed, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), "as a module, beside that package"
    losses = [read_metrics(work / f"runs/{name}/default/metrics.csv", "train/loss") for name in HOMES]
    assert losses[0] != losses[1] == losses[2]
    for (name, package), earlier in zip(HOMES.items(), ("prices", "regression", "mine"), strict=True):
        for run in ("default", f"from_{earlier}"):
            text = (work / f"runs/{name}/{run}/config.yaml").read_text()
            assert set(re.findall(r"class_path: ([\w.]+)\.heads\.Mean", text)) == {package}


@pytest.mark.parametrize(
    "way", ["ddp", *(pytest.param(name, marks=pytest.mark.matrix) for name in ("module", "fsdp2"))]
)
def test_ways_to_start(way: str, work: Path, small_text: Path) -> None:
    """As a module, and by path with the ranks that a strategy launches itself; a command of the docs has torchrun."""
    recipe = "classification" if way == "ddp" else "lm"
    script = str(ROOT / f"recipes/{recipe}/train.py")
    args = ["fit", *tiny(recipe, small_text), "--trainer.devices", "1" if way == "module" else "2"]
    command = [*PYTHON, script, *args, "--config", str(ROOT / f"configs/strategy/{way}.yaml")]
    if way == "module":
        command = [*PYTHON, "-m", f"recipes.{recipe}.train", *args]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (work / "runs" / recipe / "default/checkpoints/last.ckpt").is_file()
    assert len(list((work / "runs" / recipe).iterdir())) == 1, "one run for all ranks"
    lines = re.findall(r"^step (\d) of (\d), .*val/loss \d", done.stdout, re.MULTILINE)
    assert lines == [("2", "4"), ("4", "4")], "a line per validation, of one rank"


@pytest.mark.usefixtures("no_report")
def test_a_log_says_how_far_training_is_between_validations(
    work: Path, small_text: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    args = ["fit", *tiny("lm", small_text), "--trainer.val_check_interval", "4"]
    for seconds, expected in ((60.0, ["4"]), (0.0, [*"12344"])):
        monkeypatch.setattr("common.run.callbacks.RunProgressBar.seconds", seconds)
        main_of("lm")([*args, "--name", f"every-{seconds:.0f}"])
        assert re.findall(r"^step (\d) of 4(?:, train/loss \d.*)?$", capfd.readouterr().out, re.MULTILINE) == expected


@pytest.mark.matrix
@pytest.mark.usefixtures("no_report")
def test_a_line_has_the_metrics_that_are_watched(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """That of the best checkpoint, and that of early stopping."""
    stop = {"class_path": "EarlyStopping", "init_args": {"monitor": "val/accuracy", "mode": "max"}}
    (work / "stop.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": [stop]}}))
    main_of("classification")(["fit", *TINY, "--monitor", "val/f1", "--config", "stop.yaml"])
    lines = re.findall(r"^step \d of 4, .*val/loss \S+, val/f1 (\S+), val/accuracy \S+$", capfd.readouterr().out, re.M)
    scores = read_metrics(work / "runs/classification/default/metrics.csv", "val/f1")
    assert lines == [f"{score:.4g}" for score in scores]
    assert len(lines) == 2


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("recipe", SOME)
def test_precision_layers_train(recipe: str, work: Path, small_text: Path) -> None:
    """The layers find about the same validation loss after two steps; those that need a GPU say so in a line."""
    losses = {}
    for layer in (ROOT / "configs/precision").glob("*.yaml"):
        args = [
            "fit",
            *tiny(recipe, small_text),
            "--config",
            str(layer),
            "--trainer.max_steps",
            "2",
            "--name",
            layer.stem,
        ]
        codes = run_ranks(main_of(recipe), args, world=1, folder=work)
        if layer.stem in ("fp16-mixed", "fp8"):
            assert codes == [2]
            assert "needs a GPU" in logs(work).splitlines()[-1]
            continue
        assert codes == [0], logs(work)
        losses[layer.stem] = read_metrics(work / "runs" / recipe / layer.stem / "metrics.csv", "val/loss")[-1]
    assert len(losses) == 5
    assert list(losses.values()) == pytest.approx([losses["fp32"]] * len(losses), rel=0.02)


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("recipe", SOME)
def test_a_checkpoint_goes_on_in_its_own_run(
    recipe: str, work: Path, small_text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever names it, and at another batch size; that of another run starts a run of its own."""
    main, args, runs = main_of(recipe), tiny(recipe, small_text), work / "runs" / recipe
    main(["fit", *args])
    main(["fit", *args, "--name", "other"])
    default = {path: path.read_bytes() for path in (runs / "default").rglob("*") if path.is_file()}
    checkpoint = str(runs / "other/checkpoints/last.ckpt")
    main(["fit", "--ckpt_path", checkpoint, "--trainer.max_steps", "6", "--data.batch_size", "8"])
    assert len(read_metrics(runs / "other/metrics.csv", "train/loss")) == 6
    main(["test", "--ckpt_path", checkpoint])
    assert json.loads((runs / "other/test-last/summary.json").read_text())["checkpoint"] == checkpoint
    assert default == {path: path.read_bytes() for path in default}
    shutil.copy(checkpoint, work / "away.ckpt")
    with pytest.raises(SystemExit):
        main(["test", "--ckpt_path", "away.ckpt"])
    assert "is not of the run" in capsys.readouterr().err
    main(["fit", *args, "--ckpt_path", "away.ckpt", "--trainer.max_steps", "8"])
    assert (runs / "default.1/checkpoints/last.ckpt").is_file(), "the run that had the name is moved aside"
    main(["test"])
    assert "test: best checkpoint of" in capsys.readouterr().out


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("recipe", SOME)
def test_a_moved_run_keeps_its_best(recipe: str, work: Path, small_text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main = main_of(recipe)
    main(["fit", *tiny(recipe, small_text)])
    (work / "runs").rename(work / "moved")
    (work / "elsewhere").mkdir()
    (work / "moved").rename(work / "elsewhere/runs")
    monkeypatch.chdir(work / "elsewhere")
    cli = main(["fit", "--ckpt_path", "last", "--trainer.max_steps", "5", "--model.optimizer.lr", "0.0"])
    best = next(callback for callback in cli.trainer.checkpoint_callbacks if callback.monitor)
    assert best.best_model_path == str(work / f"elsewhere/runs/{recipe}/default/checkpoints/best.ckpt")


@pytest.mark.matrix
@pytest.mark.usefixtures("no_report")
def test_a_layer_given_again_may_differ(work: Path, small_text: Path) -> None:
    def layer(patience: int, monitor: str = "val/loss") -> list[str]:
        stop = {"monitor": monitor, "patience": patience}
        callback = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": stop}
        (work / "stop.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": [callback]}}))
        return ["--config", str(work / "stop.yaml")]

    main_of("lm")(["fit", *tiny("lm", small_text), *layer(5)])
    cli = main_of("lm")(["fit", "--ckpt_path", "last", "--trainer.max_steps", "5", *layer(7)])
    assert [callback.patience for callback in cli.trainer.early_stopping_callbacks] == [7]
    rates = [
        {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor", "init_args": {"logging_interval": interval}}
        for interval in ("step", "epoch")
    ]
    (work / "rates.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": rates}}))
    for start in ([], ["--ckpt_path", "last", "--trainer.max_steps", "5"]):
        cli = main_of("lm")(
            ["fit", *tiny("lm", small_text), "--name", "both", "--config", str(work / "rates.yaml"), *start]
        )
        monitors = [each for each in cli.trainer.callbacks if isinstance(each, LearningRateMonitor)]
        assert [monitor.logging_interval for monitor in monitors] == ["step", "epoch"]
    with pytest.raises(SystemExit):  # found only when a validation has logged its metrics
        main_of("lm")(["fit", *tiny("lm", small_text), *layer(7, "val/lss")])
    assert sorted(os.listdir(work / "runs/lm")) == ["both", "default"], "the run that was moved aside is back"
    assert (work / "runs/lm/default/checkpoints/last.ckpt").is_file()
