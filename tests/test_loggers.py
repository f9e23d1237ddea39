"""What a run leaves behind: loggers agree, no secret is in any file, predictions keep their order."""

import csv
import html
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import wandb.sdk.launch  # noqa: F401  # so that no forked run has to
import yaml
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support import RECIPES, ROOT, TINY, logs, main_of, read_metrics, run_ranks

WANDB = ["--config", str(ROOT / "configs/logger/wandb.yaml")]
DDP = ["--config", str(ROOT / "configs/strategy/ddp.yaml")]
SECRETS = {
    "WANDB_API_KEY": "canary0key00123456789abcdef0123456789abcdef",
    "HF_TOKEN": "hf_canary0token0123456789",
    "DB_PASSWORD": "canary0password",
    "GIT_CONFIG_VALUE_0": "https://canary0remote:x-oauth-basic@example.com/it.git",
}
REMOTE = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "remote.origin.url"}  # as a clone of CI has it
TRAIN = {"train/loss", "optim/lr", "optim/grad_norm", "perf/step_ms", "perf/peak_memory_gb"}
METRICS = {
    "lm": {*TRAIN, "perf/tokens_per_s", "val/loss", "val/perplexity", "val/bits_per_byte"},
    "classification": {*TRAIN, "perf/samples_per_s"}
    | {f"val/{name}" for name in ("loss", "accuracy", "precision", "recall", "f1", "auroc", "calibration_error")},
}
MEDIA = {"lm": "val/samples", "classification": "val/confusion_matrix"}
CELLS = [(recipe, world) for recipe in METRICS for world in (1, 2)]


class Run(NamedTuple):
    """A finished job."""

    cwd: Path
    folder: Path  # runs/<recipe>/default
    wandb: list[dict[str, Any]]  # the records of its W&B log


def start(main: Callable[[list[str]], Any], args: list[str], cwd: Path) -> None:
    """Run a recipe in a working directory, its stderr in a file there."""
    os.chdir(cwd)
    os.dup2(os.open(cwd / f"rank{os.environ.get('RANK', 0)}.err.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    main([*args, "--trainer.accelerator", "cpu"])


def launch(recipe: str, args: list[str], cwd: Path, world: int = 1, **env: str) -> list[int]:
    env = {"WANDB_MODE": "offline", "HOME": str(cwd / "home"), **REMOTE, **SECRETS, **env}
    return run_ranks(start, main_of(recipe), args, cwd, world=world, folder=cwd, timeout=120, **env)


def wandb_logs(cwd: Path) -> list[Path]:
    """The logs of all W&B runs below a folder, the oldest first; a run is a folder with one log."""
    found = sorted(path for path in cwd.rglob("*.wandb") if path.is_file() and not path.parent.is_symlink())
    assert len({path.parent for path in found}) == len(list(cwd.rglob("*run-*-*"))) == len(found)
    return found


def read_wandb(path: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [json.loads(line) for line in lines]


def history(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record["history"]["item"] for record in records if record["type"] == "history"]


def points(rows: list[dict[str, Any]], step: str) -> dict[str, list[tuple[int, float]]]:
    """The (step, value) pairs of each metric."""
    series: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for key, value in row.items():
            if "/" in key and "." not in key and key != step and value != "":
                series.setdefault(key, []).append((int(row[step]), float(value)))
    return series


def csv_points(path: Path) -> dict[str, list[tuple[int, float]]]:
    with path.open(newline="") as file:
        return points(list(csv.DictReader(file)), "step")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, lm_args: list[str]) -> dict[tuple[str, int], Run]:
    """Four optimizer steps of both recipes on 1 and 2 ranks with all loggers."""
    finished = {}
    for recipe, world in CELLS:
        cwd = tmp_path_factory.mktemp(f"{recipe}{world}")
        subprocess.run(["git", "init", "--quiet"], cwd=cwd, check=True)
        args = [
            "fit",
            *(lm_args if recipe == "lm" else []),
            *TINY,
            *WANDB,
            *DDP,
            "--trainer.devices",
            str(world),
        ]
        assert launch(recipe, args, cwd, world) == [0] * world, logs(cwd)
        (path,) = wandb_logs(cwd)
        finished[recipe, world] = Run(cwd, cwd / "runs" / recipe / "default", read_wandb(path))
    return finished


@pytest.fixture
def run(request: pytest.FixtureRequest, runs: dict[tuple[str, int], Run]) -> Run:
    return runs[request.param]


every_run = pytest.mark.parametrize(
    ("recipe", "run"), [(recipe, (recipe, world)) for recipe, world in CELLS], indirect=["run"]
)


@every_run
def test_wandb_knows_config_commit_and_versions(recipe: str, run: Run) -> None:
    kinds: dict[str, list[Any]] = {}
    for record in run.wandb:
        kinds.setdefault(record["type"], []).append(record[record["type"]])
    (config,), info = (record["update"] for record in kinds["config"]), kinds["run"][0]
    environment = config.pop("environment")
    resolved = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert resolved["best"].pop("mode") == "min"  # as the metric says, once the run has begun
    assert config["best"].pop("mode") is None
    assert config == resolved
    assert isinstance(config["model"]["optimizer"]["init_args"]["lr"], float)
    kept = json.loads((run.folder / "environment.json").read_text())
    assert environment == {name: value for name, value in kept.items() if name != "uncommitted"}
    assert environment["torch"] == torch.__version__
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert environment["commit"].removesuffix("-dirty") == commit.stdout.strip()
    # The remote's URL is left out: it can hold a token.
    assert info["git"] == {"commit": environment["commit"]}
    assert (info["project"], info["display_name"]) == (recipe, "default")
    assert [record.get("exit_code", 0) for record in kinds["exit"]] == [0]


@every_run
def test_loggers_agree_on_metrics_and_steps(recipe: str, run: Run) -> None:
    logged = csv_points(run.folder / "metrics.csv")
    assert logged.keys() == METRICS[recipe]
    for key, values in logged.items():
        # Validation comes after every second of the four steps.
        assert [step for step, _ in values] == ([1, 3] if key.startswith("val/") else [0, 1, 2, 3]), key
    with (run.folder / "metrics.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 4 + 2
    assert points(history(run.wandb), "trainer/global_step") == logged
    axes = [record["metric"] for record in run.wandb if record["type"] == "metric"]
    assert {"glob_name": "*", "step_metric": "trainer/global_step"}.items() <= axes[1].items()
    events = EventAccumulator(str(run.folder)).Reload()
    scalars = {key: [(event.step, event.value) for event in events.Scalars(key)] for key in events.Tags()["scalars"]}
    assert scalars.pop("epoch")
    assert events.PluginTagToContent("hparams")  # the table of runs
    assert scalars.pop("best/val/loss")
    assert scalars.keys() == logged.keys()
    for key, values in scalars.items():
        assert values == [(step, pytest.approx(value, rel=1e-6)) for step, value in logged[key]], key


@every_run
def test_loggers_show_pictures_and_texts(recipe: str, run: Run) -> None:
    key = MEDIA[recipe]
    items = [item for item in history(run.wandb) if f"{key}._type" in item]
    assert [item["trainer/global_step"] for item in items] == ([1, 3] if recipe == "lm" else [3])
    path = items[-1].get(f"{key}.path") or items[-1][f"{key}.filenames"][0]
    sent = wandb_logs(run.cwd)[0].parent / "files" / path
    events = EventAccumulator(str(run.folder)).Reload()
    if recipe == "lm":
        text = (run.folder / "texts/val-samples.txt").read_text()
        assert len(text) > 10
        assert sent.read_text() == f"<pre>{html.escape(text)}</pre>"
        shown = events.Tensors(f"{key}/text_summary")
        assert [event.step for event in shown] == [1, 3]
        assert text.encode() in shown[-1].tensor_proto.string_val[0]
    else:
        assert sent.read_bytes() == (run.folder / "figures/val-confusion_matrix.png").read_bytes()
        (picture,) = events.Images(key)
        assert picture.step == 3
        assert picture.encoded_image_string.startswith(b"\x89PNG")


@every_run
def test_samples_of_the_data_stay_in_the_folder(recipe: str, run: Run) -> None:
    kept = {path.stem for path in (*run.folder.glob("texts/*"), *run.folder.glob("figures/*"))}
    assert {"train-first_batch", "val-worst_samples"} <= kept
    told = json.dumps([*history(run.wandb), EventAccumulator(str(run.folder)).Reload().Tags()])
    assert "first_batch" not in told
    assert "worst_samples" not in told


@every_run
def test_no_file_holds_a_secret(recipe: str, run: Run) -> None:
    files = [path for path in run.cwd.rglob("*") if path.is_file()]
    assert {".wandb", ".ckpt", ".html", ".csv", ".yaml", ".json", ".log", ".png", ".txt"} <= {p.suffix for p in files}
    for path in files:
        assert b"canary0" not in path.read_bytes(), path
    assert "canary0" not in json.dumps(run.wandb)


@every_run
def test_stderr_is_silent_and_stdout_tells_where(recipe: str, run: Run) -> None:
    errors = sorted(run.cwd.glob("rank*.err.log"))
    assert errors
    assert [path.read_text() for path in errors] == [""] * len(errors)
    (line,) = [line for line in (run.cwd / "rank0.log").read_text().splitlines() if "wandb" in line]
    assert line == f"W&B: wandb sync {wandb_logs(run.cwd)[0].parent}"


def test_resumed_and_tested_run_goes_on_in_its_wandb_run(runs: dict[tuple[str, int], Run], tmp_path: Path) -> None:
    shutil.copytree(runs["classification", 1].cwd / "runs", tmp_path / "runs", symlinks=True)
    # The layer is given again, with another setting.
    args = [
        "fit",
        *TINY,
        *WANDB,
        "--trainer.logger.tags",
        "[again]",
        "--ckpt_path",
        "last",
        "--trainer.max_steps",
        "6",
    ]
    assert launch("classification", args, tmp_path) == [0], logs(tmp_path)
    folder = tmp_path / "runs/classification/default"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    environment = json.loads((folder / "environment.json").read_text())
    assert yaml.safe_load((folder / "hparams.yaml").read_text()) == {**config, "environment": environment}
    loggers = [item["class_path"].split(".")[-1] for item in config["trainer"]["logger"]]
    assert loggers == ["TensorBoardLogger", "Wandb"]
    assert launch("classification", ["test", "--ckpt_path", "best"], tmp_path) == [0], logs(tmp_path)
    files = wandb_logs(tmp_path)
    fit, resumed, tested = (read_wandb(path) for path in files)
    assert len({records[1]["run"]["run_id"] for records in (fit, resumed, tested)}) == 1
    assert resumed[1]["run"]["tags"] == ["again"]
    assert [step for step, _ in points(history(resumed), "trainer/global_step")["train/loss"]] == [4, 5]
    assert points(history(tested), "trainer/global_step") == csv_points(folder / "test/metrics.csv")


def test_wandb_without_a_key_is_one_line(tmp_path: Path) -> None:
    env = {"WANDB_MODE": "online", "WANDB_API_KEY": ""}
    assert launch("classification", ["fit", *TINY, *WANDB], tmp_path, 1, **env) == [2], logs(tmp_path)
    (line,) = (tmp_path / "rank0.err.log").read_text().splitlines()
    assert "W&B: No API key configured" in line
    assert line.endswith("set WANDB_API_KEY, or WANDB_MODE=offline")
    assert len(line) <= 200


@pytest.mark.parametrize(
    ("args", "where"),
    [
        (["--trainer.logger.settings.api_key=canary0"], "--trainer.logger.settings.api_key"),
        (
            [
                "--trainer.logger+",
                "{class_path: lightning.pytorch.loggers.CometLogger, init_args: {api_key: canary0}}",
            ],
            "--trainer.logger",
        ),
        (["--model.token", "canary0"], "--model.token"),
        (["--config", "secret.yaml"], "secret.yaml:5: trainer.logger[0].init_args.settings.api_key"),
    ],
)
def test_no_argument_takes_a_secret(
    args: list[str], where: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "secret.yaml").write_text(
        "trainer:\n  logger+:\n    - class_path: lightning.pytorch.loggers.WandbLogger\n"
        "      init_args:\n        settings: {api_key: canary0}\n"
    )
    with pytest.raises(SystemExit) as stop:
        main_of("classification")(["fit", *args])
    line = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert line.startswith(where)
    assert "is a secret, and runs keep their arguments; give it in the environment" in line
    assert "canary0" not in line


def resolved(recipe: str, args: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    with pytest.raises(SystemExit) as stop:
        main_of(recipe)(["fit", *args, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize(
    "recipe", [name if name == "regression" else pytest.param(name, marks=pytest.mark.matrix) for name in RECIPES]
)
def test_layers_change_only_what_is_theirs(recipe: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = resolved(recipe, [], capsys)
    for path in sorted(ROOT.glob("configs/*/*.yaml")):
        layered = resolved(recipe, ["--config", str(path)], capsys)
        own = path.parent.name
        assert layered["trainer"].pop(own) is not None, path
        expected = {key: value for key, value in plain["trainer"].items() if key != own}
        if own == "precision":  # two of them are arguments of the module
            for key in ("matmul_precision", "float8"):
                layered["model"][key] = plain["model"][key]
        assert layered == {**plain, "trainer": expected}, path
    tiny = resolved(recipe, TINY, capsys)
    for key in ("callbacks", "logger", "precision", "strategy"):
        assert tiny["trainer"][key] == plain["trainer"][key]


@pytest.mark.parametrize(
    ("args", "loggers"),
    [
        ([], ["TensorBoardLogger"]),
        (["--config", str(ROOT / "configs/logger/wandb.yaml")], ["TensorBoardLogger", "Wandb"]),
        (["--trainer.logger", "[]"], []),
    ],
)
def test_logger_layers(args: list[str], loggers: list[str], work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = resolved("lm", args, capsys)
    assert [item["class_path"].split(".")[-1] for item in config["trainer"]["logger"]] == loggers


@pytest.mark.usefixtures("no_report")
def test_no_list_in_a_layer_throws_away_what_every_run_keeps(work: Path, lm_args: list[str]) -> None:
    """Neither the checkpoints nor the CSV file; switches of the trainer do."""
    lists = {"callbacks": [{"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss"}}], "logger": []}
    (work / "lists.yaml").write_text(yaml.safe_dump({"trainer": lists}))
    args = ["fit", *TINY, *lm_args, "--config", "lists.yaml", "--trainer.accelerator", "cpu"]
    main_of("lm")(args)
    run = work / "runs/lm/default"
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert len(read_metrics(run / "metrics.csv", "train/loss")) == 4
    assert list((run / "texts").iterdir())
    off = ["--name", "off", "--trainer.logger", "false", "--trainer.enable_checkpointing", "false"]
    main_of("lm")([*args, *off, "--media.every_n_validations", "0"])
    assert not {"metrics.csv", "checkpoints", "texts"} & {path.name for path in (work / "runs/lm/off").iterdir()}


@pytest.mark.parametrize("recipe", METRICS)
def test_predictions_do_not_depend_on_ranks(recipe: str, runs: dict[tuple[str, int], Run], tmp_path: Path) -> None:
    shutil.copytree(runs[recipe, 1].cwd / "runs", tmp_path / "runs", symlinks=True)
    args = ["predict", "--trainer.logger", "[]", "--ckpt_path", "best"]
    args += ["--trainer.limit_predict_batches", "1.0", "--data.eval_batch_size", "7"]
    if recipe == "lm":
        args += ["--data.prompts", '["Help on", "The ", "a, b"]', "--model.temperature", "0"]
    tables = []
    for world in (1, 2):
        assert launch(recipe, [*args, "--trainer.devices", str(world)], tmp_path, world) == [0] * world, logs(tmp_path)
        with (tmp_path / "runs" / recipe / "default/predict/predictions.csv").open(newline="") as file:
            tables.append(list(csv.DictReader(file)))
    if recipe == "lm":
        assert tables[0] == tables[1]
        assert [row["prompt"] for row in tables[0]] == ["Help on", "The ", "a, b"]
        assert all(row["text"].startswith(row["prompt"]) and row["text"] != row["prompt"] for row in tables[0])
        return
    assert len(tables[0]) == len({row["index"] for row in tables[0]}) == 360
    labels: Any = load_digits().target  # type: ignore[union-attr]
    assert all(row["target"] == str(labels[int(row["index"])]) for row in tables[0])
    for one, two in zip(*tables, strict=True):
        assert [one.pop(key) for key in ("index", "target", "prediction")] == [
            two.pop(key) for key in ("index", "target", "prediction")
        ]
        values = [float(value) for value in one.values()]
        assert values == pytest.approx([float(value) for value in two.values()], abs=1e-6)
        assert sum(values) == pytest.approx(1, abs=1e-5)
