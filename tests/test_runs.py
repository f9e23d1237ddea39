"""Runs lose nothing: not an earlier one by a start that fails, not their work by what draws, prints or logs it."""

import csv
import faulthandler
import hashlib
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

from common.checkpoint import read_checkpoint
from common.figures import read_metrics as all_metrics
from common.module import BaseModule
from common.run.report import Best, write_report
from common.sources.tables import Diabetes
from tests.support import ROOT, TINY, halved, logs, main_of, read_metrics, run_ranks

QUICK = [
    *TINY, "--media.every_n_validations", "0", "--trainer.callbacks", "[]", "--trainer.logger", "[]",
    "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
]  # fmt: skip
RUN = Path("runs/classification/default")


@pytest.fixture(autouse=True)
def quick_reports(no_report: None) -> None:
    """No test here looks at a report unless it asks for one."""


def fit(*args: str) -> Any:
    return main_of("classification")(["fit", *QUICK, *args])


def bytes_of(folder: Path) -> dict[str, str]:
    """A hash of each file of a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def refused(capfd: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line of a refused fit."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        fit(*args)
    assert stop.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    return line


def before_first_step(end: Callable[[], None]) -> Callable[[list[str]], None]:
    """A fit that ends when its first step is about to be made."""

    def run(args: list[str]) -> None:
        from common.module import BaseModule

        BaseModule.on_train_batch_start = lambda *_: end()  # type: ignore[assignment]  # in a forked process
        fit(*args)

    return run


def _raise() -> None:
    raise ArithmeticError("a bug")


def _full() -> None:
    raise OSError(28, "No space left on device")


def _segfault() -> None:
    faulthandler.disable()  # pytest's would print into its own output
    os.kill(os.getpid(), signal.SIGSEGV)


ENDS: dict[str, tuple[Callable[[], None], int]] = {
    "error": (_raise, 1),
    "full_disk": (_full, 2),
    "sigkill": (lambda: os.kill(os.getpid(), signal.SIGKILL), -9),
    "segfault": (_segfault, -11),
    "exit": (lambda: os._exit(7), 7),
}


@pytest.mark.parametrize(
    ("end", "resumes"),
    [
        pytest.param(end, resumes, marks=[] if resumes == (number % 2 == 0) else pytest.mark.matrix)
        for number, end in enumerate(ENDS)
        for resumes in (False, True)
    ],
)
def test_an_earlier_run_stays_as_it_was_until_the_first_step(end: str, resumes: bool, work: Path) -> None:
    fit()
    before = bytes_of(work / RUN)
    call, code = ENDS[end]
    args = ["--trainer.max_steps", "8", "--model.optimizer.lr", "0.1", *(["--ckpt_path", "last"] if resumes else [])]
    assert run_ranks(before_first_step(call), args, world=1, folder=work / "log") == [code], logs(work / "log")
    assert bytes_of(work / RUN) == before
    fit(*args)
    assert read_checkpoint(work / RUN / "checkpoints/last.ckpt")["global_step"] == 8
    assert sorted(path.name for path in (work / "runs/classification").iterdir()) == (
        ["default"] if resumes else ["default", "default.1"]
    )


def waiting_fit(args: list[str]) -> None:
    """Make three steps, and wait to be killed."""
    from common.module import BaseModule

    start = BaseModule.on_train_batch_start

    def wait(self: BaseModule, batch: Any, batch_idx: int) -> None:
        start(self, batch, batch_idx)
        if batch_idx == 3:
            Path("waits").touch()
            time.sleep(60)

    BaseModule.on_train_batch_start = wait  # type: ignore[method-assign]  # in a forked process
    fit(*args)


def test_a_name_belongs_to_one_fit(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Another is refused and told by whom; other commands run beside; a killed holder blocks nobody."""
    fit()
    pid = os.fork()
    if not pid:
        try:
            waiting_fit(["--trainer.max_steps", "8"])
        finally:
            os._exit(1)
    until = time.monotonic() + 60
    while not Path("waits").exists() and time.monotonic() < until:
        time.sleep(0.05)
    before = bytes_of(work / RUN)
    for resumes in ([], ["--ckpt_path", "last"]):
        line = refused(capfd, *resumes)
        assert line == (
            f"--name default: process {pid} on {os.uname().nodename} is training it; wait for it, or give another name"
        )
    assert bytes_of(work / RUN) == before
    main_of("classification")(["test", "--name", "default.1", "--trainer.limit_test_batches", "1"])
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    fit("--trainer.max_steps", "8")
    assert json.loads((work / RUN / "summary.json").read_text())["state"] == "complete"


@pytest.mark.parametrize(
    "link",
    [
        pytest.param("runs", marks=pytest.mark.matrix),
        "runs/classification/default",
        pytest.param("runs/classification/default/checkpoints", marks=pytest.mark.matrix),
    ],
)
def test_links_change_nothing(link: str, work: Path) -> None:
    whole = work / "whole"
    whole.mkdir()
    os.chdir(whole)
    fit()
    fit("--ckpt_path", "last", "--trainer.max_steps", "8")
    os.chdir(work)
    (work / "elsewhere").mkdir()
    Path(link).parent.mkdir(parents=True, exist_ok=True)
    fit()
    Path(link).rename(work / "elsewhere/there")
    Path(link).symlink_to(work / "elsewhere/there", target_is_directory=True)
    fit("--ckpt_path", str((work / RUN / "checkpoints/last.ckpt").resolve()), "--trainer.max_steps", "8")
    last = read_checkpoint(work / RUN / "checkpoints/last.ckpt")
    expected = read_checkpoint(whole / RUN / "checkpoints/last.ckpt")
    assert all(torch.equal(value, last["state_dict"][name]) for name, value in expected["state_dict"].items())
    kept = bytes_of(work / "elsewhere/there")
    fit()  # a new run of the name
    moved = {hash_ for path, hash_ in bytes_of(work).items() if "default.1" in path or "elsewhere" in path}
    assert set(kept.values()) <= moved


@pytest.mark.parametrize(
    ("name", "line"),
    halved(
        [
            ("a/b", "must be a plain folder name"),
            (".hidden", "without a dot in front"),
            ("x" * 300, "has 300 bytes; take at most 200"),
            ("[b] ~ $HOME *", None),
            ("1e3", None),  # jsonargparse reads it as a number, YAML as a text
            ("運 ünï", None),
            ("\udcff", "is not UTF-8; set PYTHONUTF8=1, or take another name"),
        ]
    ),
)
def test_names_work_or_are_one_line(name: str, line: str | None, work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    if line:
        assert line in refused(capfd, "--name", name)
        return
    logger = ["--trainer.logger", "common.run.loggers.TensorBoardLogger", "--trainer.logger.save_dir", "."]
    logger += ["--trainer.logger.name", "", "--trainer.logger.version", ""]
    for _ in range(2):
        fit("--name", name, *logger)
    fit("--name", name, "--ckpt_path", "last", "--trainer.max_steps", "8")
    assert sorted(path.name for path in (work / "runs/classification").iterdir()) == [name, f"{name}.1"]
    assert len(list((work / "runs/classification" / name).glob("events.*"))) == 1
    assert len(read_metrics(work / "runs/classification" / name / "metrics.csv", "train/loss")) == 8


def preempted_fit(args: list[str]) -> None:
    """It gets SIGTERM in its seventh step."""
    from common.module import BaseModule

    start = BaseModule.on_train_batch_start

    def preempt(self: BaseModule, batch: Any, batch_idx: int) -> None:
        start(self, batch, batch_idx)
        if batch_idx == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    BaseModule.on_train_batch_start = preempt  # type: ignore[method-assign]  # in a forked process
    fit(*args)


def test_one_command_starts_and_resumes(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Also where the last checkpoint is damaged."""
    auto = ["--ckpt_path", "auto", "--last.every_n_train_steps", "2", "--trainer.max_steps", "12"]
    fit("--trainer.max_steps", "12", "--name", "whole")
    assert run_ranks(preempted_fit, auto, world=1, folder=work / "log") == [143], logs(work / "log")
    assert "is new" in (work / "log/rank0.log").read_text()
    assert json.loads((work / RUN / "summary.json").read_text())["state"] == "stopped"
    assert read_checkpoint(work / RUN / "checkpoints/last.ckpt")["global_step"] == 7
    checkpoints = work / RUN / "checkpoints"
    damaged = bytearray((checkpoints / "last.ckpt").read_bytes())
    damaged[len(damaged) // 2] ^= 16
    (checkpoints / "last.ckpt").write_bytes(damaged)
    line = refused(capfd, "--ckpt_path", "last", "--trainer.max_steps", "12")
    assert line.endswith("; --ckpt_path best is the newest whole one")
    capfd.readouterr()
    fit(*auto)
    assert f"goes on from {checkpoints}/best.ckpt" in capfd.readouterr().out
    last, whole = (
        read_checkpoint(work / f"runs/classification/{name}/checkpoints/last.ckpt")["state_dict"]
        for name in ("default", "whole")
    )
    assert all(torch.equal(value, whole[name]) for name, value in last.items())
    values = [
        read_metrics(work / f"runs/classification/{name}/metrics.csv", "train/loss") for name in ("default", "whole")
    ]
    assert values[0] == values[1]
    starts = [json.loads(text) for text in (work / RUN / "starts.jsonl").read_text().splitlines()]
    assert [start["step"] for start in starts] == [0, 6]
    summary = json.loads((work / RUN / "summary.json").read_text())
    assert (summary["state"], summary["step"]) == ("complete", 12)


def test_a_complete_run_that_is_resumed_stays_as_it_was(work: Path) -> None:
    fit()
    before = bytes_of(work / RUN)
    fit("--ckpt_path", "last")
    assert bytes_of(work / RUN) == before


@pytest.mark.parametrize(
    ("flags", "line"),
    halved(
        [
            (
                ["--ckpt_path", "last", "--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.1"],
                "--model.optimizer.lr: AdamW has a state in the checkpoint, which SGD cannot go on from; take AdamW, "
                "or fit without --ckpt_path",
            ),
            (
                ["--ckpt_path", "last", "--model.lr_scheduler", "null"],
                "model.lr_scheduler: Cosine has a state in the checkpoint, which none cannot go on from; take Cosine, "
                "or fit without --ckpt_path",
            ),
            (["--trainer.val_check_interval", "1000", "--trainer.check_val_every_n_epoch", "1"], "val_check_interval"),
            (
                ["--ckpt_path", "last", "--data.val_fraction", "0.3"],
                "--data.val_fraction: 0.3: the checkpoint's data were",
            ),
            (["--trainer.val_check_interval", "00:00:00:10"], "by time, a resumed run would validate at other steps"),
            *(
                (["--trainer.callbacks", f"lightning.pytorch.callbacks.{name}", *more], f"{name} ")
                for name, more in {
                    "StochasticWeightAveraging": ["--trainer.callbacks.swa_lrs", "0.01"],
                    "WeightAveraging": [],
                    "GradientAccumulationScheduler": ["--trainer.callbacks.scheduling", "{0: 2}"],
                    "LearningRateFinder": [],
                    "BatchSizeFinder": [],
                }.items()
            ),
        ]
    ),
)
def test_what_does_not_fit_is_one_line(
    flags: list[str], line: str, work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fit()
    before = bytes_of(work / RUN)
    assert line in refused(capfd, *flags)
    assert bytes_of(work / RUN) == before


def test_a_timer_among_the_callbacks_ends_the_run(work: Path) -> None:
    """Its default is an enumeration, for which YAML has no word."""
    timer = {"class_path": "lightning.pytorch.callbacks.Timer", "init_args": {"duration": "00:00:00:01"}}
    (work / "timer.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": [timer]}}))
    fit("--config", "timer.yaml", "--trainer.max_steps", "100000")
    assert json.loads((work / RUN / "summary.json").read_text())["state"] == "out of time"


def failing_picture(args: list[str]) -> None:
    from recipes.classification.module import ClassificationModule

    def media(self: Any, stage: str) -> dict[str, Any]:
        raise ArithmeticError("a bug in a picture")

    ClassificationModule.media = media  # type: ignore[method-assign]  # in a forked process
    main_of("classification")(args)


def test_an_error_in_a_picture_ends_nothing(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(work)
    assert run_ranks(failing_picture, ["fit", *TINY], world=1, folder=work / "log") == [0], logs(work / "log")
    text = (work / "log/rank0.log").read_text()
    assert text.count("ArithmeticError: a bug in a picture") == 1
    assert text.count("a picture of the recipe failed, which ends no run:") == 1
    assert (work / RUN / "report.html").exists()


def failing_logger(args: list[str]) -> None:
    from lightning.pytorch.loggers import TensorBoardLogger

    TensorBoardLogger.log_metrics = lambda *_, **__: 1 / 0  # type: ignore[assignment]  # in a forked process
    main_of("classification")(args)


def test_a_logger_that_breaks_ends_nothing(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(work)
    assert run_ranks(failing_logger, ["fit", *TINY], world=1, folder=work / "log") == [0], logs(work / "log")
    assert (work / "log/rank0.log").read_text().count("ZeroDivisionError") == 1
    assert len(read_metrics(work / RUN / "metrics.csv", "train/loss")) == 4


def write_images(folder: Path, names: list[str]) -> None:
    """A folder of small images for each class."""
    from PIL import Image

    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for index in range(12):
            Image.new("L", (8, 8), 20 * number + index).save(folder / name / f"{index}.png")


def test_names_of_classes_are_drawn_and_printed_as_they_are(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.run.record.write_report", write_report)
    write_images(work / "prices", ["$", "$$", "[red]x", "運_^{"])
    main_of("classification")(
        ["fit", *TINY, "--data.source", "ImageTable", "--data.source.path", "prices", "--data.source.size", "8"]
    )
    text = (work / RUN / "report.html").read_text()
    assert "confusion" in text


def test_output_that_nobody_reads_ends_nothing(work: Path) -> None:
    """A closed pipe, and an encoding without the characters of the bar."""
    command = [sys.executable, str(ROOT / "recipes/regression/train.py"), "fit", *TINY]
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr
        assert process.stderr.read() == ""
    assert process.returncode == 0
    assert (work / "runs/regression/default/checkpoints/last.ckpt").exists()


def limited(args: list[str]) -> None:
    """A fit that may write no file as large as its checkpoint."""
    fit("--trainer.max_steps", "2")
    size = (RUN / "checkpoints/last.ckpt").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
    fit(*args)


def test_a_checkpoint_that_cannot_be_written_is_one_line(work: Path) -> None:
    args = ["--trainer.max_steps", "8", "--ckpt_path", "last"]
    assert run_ranks(limited, args, world=1, folder=work / "log") == [2], logs(work / "log")
    line = (work / "log/rank0.log").read_text().splitlines()[-1]
    assert "cannot be written (File too large); make room, earlier ones are intact" in line
    assert "Traceback" not in (work / "log/rank0.log").read_text()
    last, previous = (work / RUN / f"checkpoints/{name}.ckpt" for name in ("last", "previous"))
    assert read_checkpoint(last)["global_step"] == 2
    assert not previous.samefile(last)
    assert json.loads((work / RUN / "summary.json").read_text())["state"] == "failed"


def different_main(args: list[str]) -> None:
    rank = os.environ["RANK"]
    fit(*args, "--model.optimizer.lr", f"0.0{rank}1")


def test_ranks_that_were_started_differently_are_refused(work: Path) -> None:
    args = [
        "--config",
        str(ROOT / "configs/strategy/ddp.yaml"),
        "--trainer.accelerator",
        "cpu",
        "--trainer.devices",
        "2",
    ]
    assert run_ranks(different_main, args, folder=work / "log") == [2, 2], logs(work / "log")
    line = (work / "log/rank1.log").read_text().splitlines()[-1]
    assert "model.optimizer.init_args.lr is 0.011 here and 0.001 on rank 0" in line
    assert not (work / RUN).exists()


def many_mains(folder: Path) -> None:
    """Ten commands in one process, three of them interrupted; then the same metrics, handlers and memory."""
    from common.module import BaseModule

    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run in the background may ignore it
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    start, losses, peaks = BaseModule.on_train_batch_start, [], []
    for turn in range(10):
        if turn % 3 == 1:
            BaseModule.on_train_batch_start = lambda *_: os.kill(os.getpid(), signal.SIGINT)  # type: ignore[assignment]
            with pytest.raises(SystemExit) as stop:
                fit("--name", f"cut{turn}")
            assert stop.value.code == 130
            BaseModule.on_train_batch_start = start  # type: ignore[method-assign]
        else:
            fit("--name", f"whole{turn}")
            losses.append(read_metrics(Path(f"runs/classification/whole{turn}/metrics.csv"), "train/loss"))
        assert {number: signal.getsignal(number) for number in handlers} == handlers
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert all(each == losses[0] for each in losses)
    (folder / "peaks.json").write_text(json.dumps(peaks))


@pytest.mark.matrix
def test_many_commands_in_one_process(work: Path, record_property: Any) -> None:
    assert run_ranks(many_mains, work, world=1, folder=work / "log") == [0], logs(work / "log")
    peaks = json.loads((work / "peaks.json").read_text())
    record_property("summary", f"ten commands in one process: {peaks[1] / 1024:.0f} to {peaks[-1] / 1024:.0f} MB")
    assert peaks[-1] < peaks[2] * 1.1


def test_starts_hold_no_secrets() -> None:
    from common.run.environment import without_secrets

    words = ["train.py", "fit", "--my.api_key=abc", "--hub_token", "abc", "--data.tokenizer=x"]
    assert without_secrets(words) == ["train.py", "fit", "--my.api_key=…", "--hub_token", "…", "--data.tokenizer=x"]


def test_the_time_given_is_that_of_this_start(work: Path) -> None:
    fit("--trainer.max_time", "00:00:00:20")
    state = torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)
    (timer,) = (name for name in state["callbacks"] if "Timer" in name)
    state["callbacks"][timer]["time_elapsed"]["train"] = 10_000.0  # as after hours
    torch.save(state, RUN / "checkpoints/last.ckpt")
    fit("--ckpt_path", "last", "--trainer.max_steps", "8")
    assert read_checkpoint(RUN / "checkpoints/last.ckpt")["global_step"] == 8


def test_a_run_in_pieces_of_time_equals_one_in_one(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step by step, with validations in between; it stops at the end of an optimizer step.

    The end of an epoch comes once, also where a piece ends inside of it.
    """
    monkeypatch.setenv("RECIPES_ALLOW", "tests")
    args = [
        "--trainer.accumulate_grad_batches", "4", "--trainer.max_epochs", "1000", "--trainer.max_steps", "-1",
        "--trainer.log_every_n_steps", "1", "--trainer.val_check_interval", "4", "--trainer.limit_train_batches", "8",
        "--trainer.limit_val_batches", "1", "--trainer.callbacks+", "tests.test_goes_on.Draws",
        "--model.lr_scheduler", "null",
    ]  # fmt: skip
    for checkpoint in ([], ["--ckpt_path", "last"]):
        fit(*args, "--trainer.max_time", "00:00:00:01", *checkpoint)
        last = read_checkpoint(RUN / "checkpoints/last.ckpt")
        steps = last["global_step"]
        assert last["callbacks"]["Draws"]["epochs"] == steps // 2
        rows = read_metrics(RUN / "metrics.csv", "train/loss")
        assert len(rows) == steps
    fit(*args, "--trainer.max_steps", str(steps), "--name", "whole")
    for name in ("train/loss", "val/loss"):
        pieces, whole = (read_metrics(run / "metrics.csv", name) for run in (RUN, RUN.with_name("whole")))
        assert len(pieces) > 2
        assert pieces == whole, name


STOPPING = "lightning.pytorch.callbacks.EarlyStopping"


@pytest.mark.parametrize(
    ("flags", "state"),
    halved([
        (["--trainer.callbacks", STOPPING, "--trainer.callbacks.monitor", "val/loss",
          "--trainer.callbacks.stopping_threshold", "100", "--trainer.min_steps", "20"], "complete"),
        (["--trainer.max_time", "00:00:00:01"], "out of time"),
        (["--trainer.max_time", "00:00:59:00", "--trainer.max_steps", "20"], "complete"),
    ]),
)  # fmt: skip
def test_a_run_that_is_to_stop_logs_as_any_other(
    flags: list[str], state: str, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every third step, also after a second start; its summary tells why it ended."""
    end = BaseModule.on_validation_epoch_end

    def slow_end(self: BaseModule) -> None:
        end(self)
        if self.trainer.max_steps == self.trainer.global_step:  # the last validation takes an hour
            monkeypatch.setattr(Timer, "time_elapsed", lambda *_: 3600.0)

    monkeypatch.setattr(BaseModule, "on_validation_epoch_end", slow_end)
    args = [
        "--trainer.max_epochs", "1000", "--trainer.max_steps", "-1", "--trainer.log_every_n_steps", "3",
        "--trainer.limit_val_batches", "1", "--trainer.val_check_interval", "5", *flags,
    ]  # fmt: skip
    for checkpoint in ([], ["--ckpt_path", "last"]):
        fit(*args, *checkpoint)
        with (RUN / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        steps = read_checkpoint(RUN / "checkpoints/last.ckpt")["global_step"]
        assert [int(row["step"]) for row in rows if row["train/loss"]] == list(range(2, steps, 3))
        assert len(rows) == len({(row["step"], bool(row["train/loss"])) for row in rows})
        assert json.loads((RUN / "summary.json").read_text())["state"] == state


@pytest.mark.parametrize(
    ("flags", "planned", "why"),
    [
        (["EarlyStopping", "monitor=val/f1", "patience=2", "min_delta=9", "mode=max"], "12",
         r"EarlyStopping: val/f1 has not improved by 9, patience 2; its best was (\S+) at step (\d+); "
         "--ckpt_path last goes on if the callback is given more patience"),
        pytest.param(["EarlyStopping", "monitor=val/loss", "stopping_threshold=100"], "12",
         r"EarlyStopping: val/loss has reached stopping_threshold 100.0; its best was (\S+) at step (\d+); "
         "--ckpt_path last goes on if the callback is given another stopping_threshold",
         marks=pytest.mark.matrix),
        pytest.param(["EarlyStopping", "monitor=val/loss", "patience=9"], "4", None, marks=pytest.mark.matrix),
        (["Timer", "duration=00:00:00:01"], "9000", r"max_time, 0:00:01, is over; --ckpt_path last goes on"),
    ],
    ids=["patience", "threshold", "no early end", "time"],
)  # fmt: skip
def test_an_early_end_says_why(
    flags: list[str], planned: str, why: str | None, work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In a line, in the summary, in the report, and once more where a start finds nothing left to do."""
    name, *settings = flags
    callback = [word for each in settings for word in f"--trainer.callbacks.{each}".split("=")]
    args = ["--trainer.callbacks", f"lightning.pytorch.callbacks.{name}", *callback, "--trainer.max_steps", planned]
    fit(*args)
    said = re.findall(r"^fit: ended (.*)$", capfd.readouterr().out, re.MULTILINE)
    assert json.loads((RUN / "summary.json").read_text())["ended_early"] == (said[0] if why else None)
    assert ("ended early" in (write_report(RUN, "a run").read_text())) == bool(why)
    if why is None:
        assert not said
        return
    found = re.fullmatch(rf"at step (\d+) of {int(planned):,}: {why}", said[0])
    assert found is not None, said
    assert read_checkpoint(RUN / "checkpoints/last.ckpt")["global_step"] == int(found[1])
    if name == "EarlyStopping":
        kept = Best(settings[0].partition("=")[2], "max" if "mode=max" in settings else "min")
        step, value = kept.find(all_metrics(RUN)) or (0, 0.0)
        assert found.groups()[1:] == (f"{value:.4g}", str(step + 1))
        fit(*args, "--ckpt_path", "last")
        assert f"\nfit: ended {said[0]}\n" in capfd.readouterr().out


def said(folder: Path) -> str:
    """The time and the command of what has written to a folder."""
    start = json.loads((folder / "starts.jsonl").read_text())
    return f"{start['time']}: {escape(shlex.join(start['command']))}"


def test_results_on_other_data_are_kept(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Those of one data set give way to its next alone; what a command measures is always in its own folder."""
    main, copy = main_of("regression"), "bundled.csv"
    Diabetes().read().to_csv(copy, index=False)
    main(["fit", *TINY, "--trainer.accelerator", "cpu"])
    run, other = Path("runs/regression/default"), [
        "--data.source", "common.sources.tables.Table", "--data.source.path", copy,
        "--data.source.target", "progression", "--data.source.categorical", "sex",
    ]  # fmt: skip
    main(["test"])
    assert "the earlier result" not in capfd.readouterr().out
    for args, now, then, moved in (
        (other, "Table bundled.csv", "Diabetes", "test.1"),
        (other, "Table bundled.csv", "", ""),
        ([], "Diabetes", "Table bundled.csv", "test.1"),
    ):
        main(["test", *args])
        out = capfd.readouterr().out
        assert json.loads((run / "test/summary.json").read_text())["source"] == now
        if then:
            assert f"\ntest: the earlier result, on {then}, is in {work / run / moved} now\n" in out
            assert json.loads((run / moved / "summary.json").read_text())["source"] == then
            assert (run / moved / "metrics.csv").exists()
        else:
            assert "the earlier result" not in out
    assert sorted(each.name for each in run.glob("test*")) == ["test", "test.1"]
    main(["test", *other, "--trainer.fast_dev_run", "true"])
    assert json.loads((run / "test/summary.json").read_text())["source"] == "Diabetes", "it writes nothing"
    names = ("test/metrics.csv", "test.1/metrics.csv", "test/summary.json", "test.1/summary.json")
    before = [(run / name).read_bytes() for name in names]
    for path in (copy, "another.csv"):  # on which there is a result, and on which there is none
        Diabetes().read().drop(columns="bmi").to_csv(path, index=False)
        with pytest.raises(SystemExit):
            main(["test", *(path if word == copy else word for word in other)])
        assert "lacks the column 'bmi'" in capfd.readouterr().err
        assert [(run / name).read_bytes() for name in names] == before
        assert sorted(each.name for each in run.glob("*test*")) == ["test", "test.1"]
    page = write_report(run, "a run").read_text()
    newest = f"test, best, step {json.loads((run / 'test/summary.json').read_text())['step']}"
    for name in (newest, f"{newest}, on Table bundled.csv (test.1)"):
        assert f"<td>{name}</td>" in page
        assert f"<tr><th>{name}</th>" in page


def test_results_change_places_with_those_of_their_checkpoint_alone(work: Path) -> None:
    """A name may end as a kept result does; a dying machine may have left half of a summary."""
    main, copy = main_of("regression"), "bundled.csv"
    Diabetes().read().to_csv(copy, index=False)
    other = [
        "--data.source", "common.sources.tables.Table", "--data.source.path", copy,
        "--data.source.target", "progression", "--data.source.categorical", "sex",
    ]  # fmt: skip
    main(["fit", *TINY, "--trainer.accelerator", "cpu"])
    run = Path("runs/regression/default")
    for name in ("a", "a.1"):
        shutil.copy(run / "checkpoints/best.ckpt", run / f"checkpoints/{name}.ckpt")
    main(["test", "--ckpt_path", "a"])
    main(["test", "--ckpt_path", "a.1", *other])
    main(["test", "--ckpt_path", "a", *other])
    main(["test", "--ckpt_path", "a"])
    found = {}
    for folder in run.glob("test*"):
        summary = json.loads((folder / "summary.json").read_text())
        found[folder.name] = Path(summary["checkpoint"]).stem, summary["source"]
    table, diabetes = "Table bundled.csv", "Diabetes"
    assert found == {"test-a": ("a", diabetes), "test-a.1": ("a.1", table), "test-a.2": ("a", table)}
    (run / "test-a/summary.json").write_text('{"state')
    main(["test", "--ckpt_path", "a"])
    assert (run / "test-a.3/metrics.csv").exists()
    assert write_report(run, "a run").exists()


def test_results_of_several_checkpoints_are_told_apart(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In the output, the summaries, the report and the folders; those of one are never replaced in silence."""
    main = main_of("classification")
    fit()
    fit("--ckpt_path", "last", "--trainer.max_steps", "6", "--trainer.limit_val_batches", "0")
    for command in ("test", "predict"):
        for name in ("best", "last", "null"):
            main([command, "--ckpt_path", name])
    out = capfd.readouterr().out
    some, whole = "16 of 360 samples of Digits", "360 samples of Digits"  # the run has limited them
    about = {"test": ("best", 4, some), "test-last": ("last", 6, some), "test-null": ("no checkpoint", 0, whole)}
    page = write_report(RUN, "a run").read_text()
    for folder, (name, step, data) in about.items():
        assert f"\ntest: {name}, step {step}, on {data}\n" in out
        summary = json.loads((RUN / folder / "summary.json").read_text())
        assert (summary["step"], summary["data"]) == (step, data)
        assert f"<tr><th>test, {name}, step {step}</th><td>on {data}; {said(RUN / folder)}</td></tr>" in page
        assert f"<td>test, {name}, step {step}</td>" in page
    tables = [work / RUN / folder / "predictions.csv" for folder in ("predict", "predict-last", "predict-null")]
    assert re.findall("^predictions: (.*)$", out, re.MULTILINE) == [str(path) for path in tables]
    assert len({path.read_text() for path in tables}) == 3
    main(["predict"])
    assert f"\npredictions: {tables[0]}, in place of the earlier ones\n" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("line", "kept"), [(0, [4, 5]), pytest.param(2, [0, 2, 3, 4, 5], marks=pytest.mark.matrix)], ids=["header", "row"]
)
def test_damaged_metrics_are_told_and_lose_no_more(
    line: int, kept: list[int], work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fit("--trainer.log_every_n_steps", "1", "--trainer.max_steps", "4", "--trainer.limit_val_batches", "0")
    table = RUN / "metrics.csv"
    lines = table.read_bytes().splitlines(keepends=True)
    lines[line] = b"\xff\x00\xfe".join([lines[line][:1], lines[line].replace(b"step", b"stgp")[1:]])
    table.write_bytes(damaged := b"".join(lines))
    said = "fit: no validation came before the end; test and predict take --ckpt_path last"
    assert said in capfd.readouterr().out.splitlines()
    fit("--ckpt_path", "last", "--trainer.max_steps", "6", "--trainer.log_every_n_steps", "1")
    assert f"metrics.csv is damaged; whole rows: {len(kept) - 2} of 4, and all are in" in capfd.readouterr().out
    assert (RUN / "metrics.damaged.csv").read_bytes() == damaged
    with table.open(newline="", encoding="utf-8") as file:
        assert [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]] == kept


@pytest.mark.parametrize(
    ("patience", "steps"), [pytest.param("2", 20, marks=pytest.mark.matrix), ("3", 24)], ids=["same", "more"]
)
def test_a_stop_that_waits_for_more_steps_is_remembered(patience: str, steps: int, work: Path) -> None:
    """Also where the metric has improved since; more patience that is given now wins."""
    args = [
        "--trainer.max_epochs", "1000", "--trainer.limit_val_batches", "1", "--trainer.val_check_interval", "2",
        "--trainer.limit_train_batches", "4", "--trainer.callbacks", STOPPING,
        "--trainer.callbacks.monitor", "val/loss", "--trainer.callbacks.min_delta", "9",
    ]  # fmt: skip
    fit(*args, "--trainer.callbacks.patience", "2", "--trainer.min_steps", "20", "--trainer.max_steps", "10")
    last = RUN / "checkpoints/last.ckpt"
    state = read_checkpoint(last)
    (stopping,) = (each for name, each in state["callbacks"].items() if "EarlyStopping" in name)
    assert stopping["stopping_reason"] == EarlyStoppingReason.PATIENCE_EXHAUSTED.value
    stopping["wait_count"] = -100
    torch.save(state, last)
    goes_on = ["--ckpt_path", "last", "--trainer.min_steps", "20", "--trainer.max_steps", "24"]
    fit(*args, "--trainer.callbacks.patience", patience, *goes_on)
    assert read_checkpoint(last)["global_step"] == steps


def test_a_checkpoint_from_the_middle_of_a_step_is_refused(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    args = ["--trainer.accumulate_grad_batches", "2", "--trainer.max_steps", "4"]
    fit(*args)
    last = RUN / "checkpoints/last.ckpt"
    state = read_checkpoint(last)
    state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"] += 1
    torch.save(state, last)
    assert refused(capfd, *args, "--ckpt_path", "last") == (
        "--ckpt_path: was made in the middle of an optimizer step; give last, best or auto"
    )


def test_a_best_checkpoint_that_is_gone_is_told(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fit()
    (RUN / "checkpoints/best.ckpt").unlink()
    main_of("classification")(["test", "--ckpt_path", "last", "--trainer.limit_test_batches", "1"])
    assert "is gone" not in capfd.readouterr().out
    fit("--ckpt_path", "auto", "--trainer.max_steps", "8")
    assert "checkpoints/best.ckpt is gone; the best of the validations from here on" in capfd.readouterr().out
    assert (RUN / "checkpoints/best.ckpt").is_file()


def test_the_config_of_each_start_is_kept(work: Path) -> None:
    fit("--trainer.max_steps", "2")
    fit("--ckpt_path", "last", "--trainer.max_steps", "4")
    assert yaml.safe_load((work / RUN / "config.yaml").read_text())["trainer"]["max_steps"] == 4


def test_a_fast_dev_run_touches_no_run(work: Path) -> None:
    fit("--trainer.max_steps", "1", "--model.optimizer.lr", "0.002")
    before = bytes_of(work / "runs")
    for name in ("default", "new"):
        fit("--name", name, "--trainer.fast_dev_run", "true", "--model.optimizer.lr", "0.5")
    assert bytes_of(work / "runs") == before


def test_a_stop_in_a_validation_leaves_no_reader(work: Path) -> None:
    """A process whose interpreter ends joins its reading processes, which ignore signals."""
    script = (
        "import os, signal\nfrom recipes.classification import module, train\n"
        "step = module.ClassificationModule.validation_step\n"
        "def stop(self, batch, index, *rest):\n"
        "    if index == 1 and not self.trainer.sanity_checking:\n        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return step(self, batch, index, *rest)\n"
        "module.ClassificationModule.validation_step = stop\ntrain.main()\n"
    )
    args = [*QUICK, "--data.num_workers", "2", "--data.eval_batch_size", "1", "--trainer.limit_val_batches", "20"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, "fit", *args]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 143, done.stderr
    assert len(done.stderr.splitlines()) == 1
