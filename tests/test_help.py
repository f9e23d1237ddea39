"""What ``--help`` says, in how many lines; and the metric that chooses the best checkpoint."""

import csv
import json
from pathlib import Path

import pytest
import yaml

from common.run.callbacks import BestCheckpoint
from common.run.cli import RecipeCLI
from tests.support import MEASURED, TINY, main_of

pytestmark = pytest.mark.usefixtures("no_report")


def printed(recipe: str, args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command line prints before it ends with 0."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main_of(recipe)(args)
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("recipe", MEASURED)
def test_help_is_read_in_a_minute(
    recipe: str, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was 696 to 3,432 lines."""
    skip = RecipeCLI.subcommands()["fit"]
    monkeypatch.setattr(RecipeCLI, "subcommands", staticmethod(lambda: {"fit": skip}))
    text = printed(recipe, ["fit", "--help"], capsys)
    assert len(text.splitlines()) < 140
    assert max(map(len, text.splitlines())) <= 120
    places = [text.index(f"\n{title}") for title in ("data:", "model:", "run\n", "trainer:", "more\n")]
    assert places == sorted(places)
    own = ("--data.batch_size", "--model.optimizer", "--name", "--ckpt_path", "--monitor", "--trainer.help")
    assert all(f"\n  {flag} " in text for flag in own)
    assert "accumulate_grad_batches" in text
    assert "--trainer.accumulate_grad_batches" not in text
    assert "torch.nn.modules" not in text


def test_help_of_all_commands_a_class_and_the_trainer(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = printed("classification", ["--help"], capsys)
    assert all(f"\n  {name} " in commands for name in ("fit", "validate", "test", "predict", "preflight", "export"))
    images = printed("classification", ["fit", "--data.source.help", "ImageTable"], capsys)
    assert "--data.source.size " in images
    assert "(default label)" in images
    trainer = printed("classification", ["fit", "--trainer.help"], capsys)
    assert "--trainer.accumulate_grad_batches" in trainer
    assert "--model" not in trainer


def test_the_metric_says_which_value_is_best(work: Path) -> None:
    """As torchmetrics has it; the run keeps it, and another metric of the run that goes on brings its own."""
    main, run, fit = main_of("classification"), Path("runs/classification/default"), ["fit", *TINY]
    fit += ["--trainer.accelerator", "cpu"]
    main(
        [*fit, "--monitor", "val/f1", "--trainer.check_val_every_n_epoch", "null", "--trainer.val_check_interval", "1"]
    )
    assert yaml.safe_load((run / "config.yaml").read_text())["best"] == {"monitor": "val/f1", "mode": "max"}
    score = json.loads((run / "summary.json").read_text())["best"]["val/f1"]
    with (run / "metrics.csv").open() as file:
        values = [float(row["val/f1"]) for row in csv.DictReader(file) if row["val/f1"]]
    assert score == pytest.approx(max(values))
    goes_on = main([*fit, "--ckpt_path", "last", "--trainer.max_steps", "6"])
    best = goes_on.trainer.checkpoint_callbacks[0]
    assert (best.mode, best.monitor) == ("max", "val/f1")  # type: ignore[attr-defined]
    assert best.best_model_score >= score  # type: ignore[attr-defined]
    goes_on = main([*fit, "--ckpt_path", "last", "--trainer.max_steps", "8", "--monitor", "val/calibration_error"])
    assert goes_on.trainer.checkpoint_callbacks[0].mode == "min"  # type: ignore[attr-defined]
    kept = yaml.safe_load((run / "config.yaml").read_text())["best"]
    assert kept == {"monitor": "val/calibration_error", "mode": "min"}


def test_a_mode_that_is_given_holds(work: Path) -> None:
    """Whatever the name says; torchmetrics wins over a name, and over none."""
    cli = main_of("classification")(["fit", *TINY, "--best.mode", "max"])
    assert cli.trainer.checkpoint_callbacks[0].mode == "max"
    best = BestCheckpoint("val/accuracy")
    cli.model.higher_is_better["val/accuracy"] = False
    best.decide(cli.model)
    assert best.mode == "min"


def test_another_run_of_the_name_says_nothing_about_metrics(work: Path) -> None:
    main = main_of("classification")
    main(["fit", *TINY, "--name", "other"])
    main(["fit", *TINY])
    metrics = Path("runs/classification/default/metrics.csv")
    metrics.write_text(metrics.read_text().replace("val/loss", "val/of_another"))
    main(["test"])
    last = "runs/classification/other/checkpoints/last.ckpt"
    assert main(["fit", "--ckpt_path", last, "--name", "default", "--trainer.max_steps", "5"]).trainer.global_step == 5


def test_a_checkpoint_of_the_run_by_its_name(work: Path) -> None:
    main, run = main_of("classification"), Path("runs/classification/default")
    each = "trainer:\n  callbacks+:\n    - class_path: lightning.pytorch.callbacks.ModelCheckpoint\n      init_args: "
    Path("each.yaml").write_text(each + "{dirpath: checkpoints, filename: 'at-{step}', every_n_train_steps: 2}\n")
    main(["fit", *TINY, "--config", "each.yaml", "--trainer.accelerator", "cpu"])
    (found,) = (run / "checkpoints").glob("at-*.ckpt")
    for name in (found.stem, found.name):
        assert main(["validate", "--ckpt_path", name]).config.validate.ckpt_path == str(found.resolve())
