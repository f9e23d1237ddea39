"""Whatever happens to a rank, every rank ends, with a code and a line, and the run goes on later."""

import faulthandler
import os
import re
import resource
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from common.checkpoint import read_checkpoint
from common.data import BaseDataModule
from common.run.faults import Ranks, lost_rank
from tests.support import EXACT, INEXACT, ROOT, STRATEGIES, TINY, VARIANTS, logs, main_of, read_metrics, run_ranks, turn
from tests.test_resume import digest, whole_run

pytestmark = pytest.mark.usefixtures("no_report")

# What happens to each rank before micro-batch 9, or while it prepares data, and how each of the two ends.
FAULTS: dict[str, tuple[dict[int, str], list[int]]] = {
    "kill_0": ({0: "kill"}, [-9, 3]),
    "kill_1": ({1: "kill"}, [3, -9]),
    "raise_0": ({0: "raise"}, [1, 3]),
    "raise_1": ({1: "raise"}, [3, 1]),
    "memory_1": ({1: "memory"}, [3, 1]),
    "full_disk_0": ({0: "full_disk"}, [2, 3]),
    "segfault_1": ({1: "segfault"}, [3, -11]),
    "stop_0": ({0: "stop"}, [-9, 3]),
    "stop_1": ({1: "stop"}, [3, -9]),
    "sigterm_1": ({1: "sigterm"}, [143, 143]),
    "sigterm_both": ({0: "sigterm", 1: "sigterm"}, [143, 143]),
    "sigint_both": ({0: "sigint", 1: "sigint"}, [130, 130]),
    "sigint_twice": ({0: "twice", 1: "twice"}, [130, 130]),
    "sighup_0": ({0: "sighup"}, [129, 129]),
    "prepare_1": ({1: "prepare"}, [3, -9]),
}
SIGNALS = {"sigterm": signal.SIGTERM, "sigint": signal.SIGINT, "sighup": signal.SIGHUP}
CARRIED = [name for name in STRATEGIES if name not in VARIANTS]
CELLS = [(turn(name, i + j), name, fault) for i, name in enumerate(CARRIED) for j, fault in enumerate(FAULTS)]
# The suite has each fault once, in a quick recipe, except twins: what strikes the other rank, or looks the same to it.
TWINS = ("kill_1", "raise_0", "memory_1", "segfault_1", "stop_0", "sigterm_1", "sigint_both", "sighup_0")
QUICK = ("classification", "multitask", "regression")
FAST = [
    next(cell for cell in CELLS if cell[0] in QUICK and cell[2] == fault and "deepspeed" not in cell[1])
    for fault in FAULTS
    if fault not in TWINS
]
STEPS = 30


def faulty_main(recipe: str, args: list[str], faults: dict[int, str]) -> None:
    """Train until a fault strikes this rank."""
    from common.module import BaseModule

    start = BaseModule.on_train_batch_start

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if faults.get(int(os.environ["RANK"])) == "prepare":
        BaseDataModule.loader = die  # type: ignore[method-assign]

    def start_or_fail(self: BaseModule, batch: Any, batch_idx: int) -> None:
        if self.trainer.fit_loop.epoch_loop.total_batch_idx == 8:
            fault = faults.get(self.global_rank)
            if fault in ("kill", "segfault", "stop"):
                faulthandler.disable()  # pytest's would print into its own output
                number = {"kill": signal.SIGKILL, "segfault": signal.SIGSEGV, "stop": signal.SIGSTOP}[fault]
                os.kill(os.getpid(), number)
            elif fault in ("raise", "memory"):
                raise (ArithmeticError if fault == "raise" else MemoryError)("a bug in one rank")
            elif fault == "full_disk":  # of more than this test's log, and less than any checkpoint
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
            elif fault == "twice":
                for _ in range(2):
                    os.killpg(os.getpgrp(), signal.SIGINT)
            elif fault:
                os.killpg(os.getpgrp(), SIGNALS[fault])  # as launchers do: the workers that read data get it too
        if self.trainer.fit_loop.epoch_loop.total_batch_idx > 8:
            time.sleep(0.1)  # so that the run does not end before the ranks ask one another
        start(self, batch, batch_idx)

    os.setpgrp()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run in the background may ignore it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    Ranks.limit = 5.0  # no test has to wait 45
    BaseModule.on_train_batch_start = start_or_fail  # type: ignore[method-assign]  # in this forked process only
    main_of(recipe)(args)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("NCCL error: remote process exited or there was a network error", "remote process exited"),
        ("[rank0]: Connection closed by peer [127.0.0.1]:4242", "Connection closed by peer"),
        ("NCCL error: invalid usage, Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 5e000", None),
    ],
)
def test_what_tells_of_a_lost_rank(text: str, found: str | None) -> None:
    assert lost_rank(torch.distributed.DistBackendError(text)) == found


def test_a_signal_while_training_starts(
    work: Path, lm_args: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes while data are set up for the sanity check, after Lightning has registered its handlers."""
    read = BaseDataModule.val_dataloader

    def signalled(self: BaseDataModule) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return read(self)

    monkeypatch.setattr(BaseDataModule, "val_dataloader", signalled)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        main_of("lm")(["fit", *lm_args, *TINY, "--trainer.max_steps", "3"])
    assert stop.value.code == 143
    assert capfd.readouterr().err == "stopped by SIGTERM\n"
    assert not (work / "runs/lm/default").exists()
    assert signal.getsignal(signal.SIGTERM) == before


def validate_until_sigterm(args: list[str]) -> None:
    """The signal comes in the middle of validation."""
    from common.module import BaseModule

    BaseModule.validation_step = lambda *_: os.kill(os.getpid(), signal.SIGTERM)  # type: ignore[assignment]
    main_of("lm")(args)


def test_sigterm_ends_a_validation_at_once(work: Path, plain_args: dict[str, list[str]]) -> None:
    args = ["validate", "--ckpt_path", "null", *plain_args["lm"], "--trainer.enable_progress_bar", "false"]
    assert run_ranks(validate_until_sigterm, args, world=1, folder=work) == [143]


@pytest.mark.parametrize(
    ("recipe", "strategy", "fault"),
    [pytest.param(*cell, marks=[] if cell in FAST else pytest.mark.matrix) for cell in CELLS],
)
def test_every_rank_ends(
    recipe: str,
    strategy: str,
    fault: str,
    work: Path,
    small_text: Path,
    plain_args: dict[str, list[str]],
    record_property: Any,
) -> None:
    """And what they leave goes on to the end of the run that nothing struck."""
    faults, expected = FAULTS[fault]
    args = [
        "fit", "--config", str(ROOT / f"configs/strategy/{strategy}.yaml"), *plain_args[recipe],
        "--data.batch_size", "4", "--data.num_workers", "1", "--trainer.accelerator", "cpu", "--trainer.devices", "2",
        "--trainer.max_steps", str(STEPS), "--trainer.limit_val_batches", "0", "--trainer.enable_progress_bar", "false",
        "--trainer.enable_model_summary", "false", "--trainer.logger", "false", "--trainer.callbacks", "[]",
        "--last.every_n_train_steps", "5", "--media.every_n_validations", "0", *INEXACT.get(strategy, []),
    ]  # fmt: skip
    began = time.monotonic()
    codes = run_ranks(faulty_main, recipe, args, faults, folder=work / "faulty")
    seconds = time.monotonic() - began
    assert codes == expected, logs(work / "faulty")
    assert seconds < 60
    record_property("summary", f"{recipe}, {strategy}, {fault}: exit codes {codes} after {seconds:.0f} s")
    for rank, code in enumerate(codes):
        text = (work / f"faulty/rank{rank}.log").read_text()
        if code == 3:
            assert f"rank {rank}: another rank has ended (" in text.splitlines()[-1]
        elif fault == "sigint_twice":
            assert text.splitlines()[-1] == "stopped by Ctrl-C"
        elif code > 128:
            which = "this rank" if rank in faults else "another rank"
            name = {143: "SIGTERM", 130: "Ctrl-C", 129: "SIGHUP"}[code]
            assert f"rank {rank}: {name} to {which} after step" in text.splitlines()[-1]
        elif code == 1:
            assert "Error: a bug in one rank" in text.splitlines()[-1]
        elif code == 2:
            assert "last.ckpt: cannot be written (File too large); make room" in text.splitlines()[-1]
    last = work / "runs" / recipe / "default/checkpoints/last.ckpt"
    if fault == "prepare_1":
        assert not last.parent.parent.exists()
    elif "sig" in fault[:3] and "twice" not in fault:
        assert 8 < read_checkpoint(last)["global_step"] < STEPS
    else:
        assert read_checkpoint(last)["global_step"] == 5
    resumed = run_ranks(main_of(recipe), [*args, "--ckpt_path", "auto"], folder=work / "resumed")
    assert resumed == [0, 0], logs(work / "resumed")
    assert read_checkpoint(last)["global_step"] == STEPS
    if strategy in EXACT:
        whole = whole_run(recipe, args, 2, work, left_out=(str(small_text),))
        assert digest(last) == whole


def first_rank_main(args: list[str]) -> None:
    """Only rank 0, as where a launcher starts the others later."""
    if os.environ["RANK"] == "0":
        main_of("regression")(args)


def test_a_port_that_is_in_use(work: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
        args = ["fit", "--config", str(ROOT / "configs/strategy/ddp.yaml"), *TINY, "--trainer.accelerator", "cpu"]
        args += ["--trainer.devices", "2"]
        assert run_ranks(first_rank_main, args, folder=work, MASTER_PORT=port) == [2, 0], logs(work)
    line = (work / "rank0.log").read_text().splitlines()[-1]
    assert re.search(f"{port}.* in use", line), line
    assert not (work / "runs/regression/default").exists()


def patient_main(args: list[str], why: str) -> None:
    """Train with a step that takes longer than a sign of life may be missing."""
    from common.checkpoint import AtomicCheckpointIO
    from common.module import BaseModule

    Ranks.limit = 4.0
    start, save = BaseModule.on_train_batch_start, AtomicCheckpointIO.save_checkpoint

    def sleep(self: BaseModule, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == 3:
            if not os.fork():
                time.sleep(6)
                os.kill(os.getppid(), signal.SIGCONT)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGSTOP)
        start(self, batch, batch_idx)

    def slowly(*args: Any, **kwargs: Any) -> None:
        AtomicCheckpointIO.save_checkpoint = save  # type: ignore[method-assign]
        time.sleep(6)
        save(*args, **kwargs)

    if why == "all suspended":
        BaseModule.on_train_batch_start = sleep  # type: ignore[method-assign]
    else:
        AtomicCheckpointIO.save_checkpoint = slowly  # type: ignore[method-assign]
    main_of("regression")(args)


@pytest.mark.matrix
@pytest.mark.parametrize("why", ["a slow disk", "all suspended"])
def test_a_long_wait_ends_nothing(why: str, work: Path) -> None:
    args = ["fit", "--config", str(ROOT / "configs/strategy/ddp.yaml"), *TINY, "--trainer.accelerator", "cpu"]
    args += ["--trainer.devices", "2", "--trainer.max_steps", "6", "--trainer.max_epochs", "-1"]
    assert run_ranks(patient_main, args, why, folder=work) == [0, 0], logs(work)


def signalled_main(args: list[str], rank: int) -> None:
    """A rank gets SIGTERM in the second batch of the validation after step 10, and hears of it in that batch."""
    from common.module import BaseModule
    from common.run.faults import Endings

    def signalled(self: BaseModule, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if (self.trainer.global_step, batch_idx) != (10, 1):
            return
        if self.global_rank == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        (endings,) = (each for each in self.trainer.callbacks if isinstance(each, Endings))  # type: ignore[attr-defined]
        until = time.monotonic() + 30
        while endings.ranks is not None and not endings.ranks.asked and time.monotonic() < until:
            time.sleep(0.01)

    BaseModule.on_validation_batch_start = signalled  # type: ignore[method-assign]
    main_of("regression")(args)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.matrix), 1])
def test_a_validation_that_was_interrupted_is_made_again(
    rank: int, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A callback that counts its batches has counted each once."""
    monkeypatch.setenv("RECIPES_ALLOW", "tests")
    args = [
        "fit", "--config", str(ROOT / "configs/strategy/ddp.yaml"), *TINY, "--trainer.accelerator", "cpu",
        "--trainer.devices", "2", "--trainer.max_steps", "20", "--trainer.max_epochs", "-1",
        "--trainer.val_check_interval", "5", "--trainer.check_val_every_n_epoch", "null",
        "--trainer.limit_val_batches", "4", "--data.batch_size", "4",
        "--trainer.callbacks+", "tests.test_goes_on.Draws",
    ]  # fmt: skip
    assert run_ranks(signalled_main, args, rank, folder=work / "cut") == [143, 143], logs(work / "cut")
    assert run_ranks(main_of("regression"), [*args, "--ckpt_path", "auto"], folder=work / "resumed") == [0, 0]
    assert run_ranks(main_of("regression"), [*args, "--name", "whole"], folder=work / "whole") == [0, 0]
    cut, whole = (work / "runs/regression" / name for name in ("default", "whole"))
    assert digest(cut / "checkpoints/last.ckpt") == digest(whole / "checkpoints/last.ckpt")
    draws = [read_checkpoint(run / "checkpoints/last.ckpt")["callbacks"]["Draws"] for run in (cut, whole)]
    assert draws[0] == draws[1]
    for name in ("train/loss", "val/loss"):
        assert read_metrics(cut / "metrics.csv", name) == read_metrics(whole / "metrics.csv", name)
