"""Whatever happens to a rank, every rank ends, with a code and a line, and the run goes on later."""

import faulthandler
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from common.checkpoint import read_checkpoint
from common.data import BaseDataModule
from common.run.faults import Ranks, lost_rank
from tests.support import INEXACT, MEASURED, ROOT, STRATEGIES, TINY, logs, main_of, run_ranks, strategies_of, turn

pytestmark = pytest.mark.usefixtures("no_report")

# What happens to each rank before micro-batch 9, and how each of the two ends.
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
    "sighup_0": ({0: "sighup"}, [129, 129]),
}
SIGNALS = {"sigterm": signal.SIGTERM, "sigint": signal.SIGINT, "sighup": signal.SIGHUP}
CELLS = [(recipe, strategy, fault) for recipe in MEASURED for strategy in strategies_of(recipe) for fault in FAULTS]
# Every strategy with a fault; every fault is there.
FAST = {(turn(name, i), name, list(FAULTS)[i % len(FAULTS)]) for i, name in enumerate(STRATEGIES)}


def faulty_main(recipe: str, args: list[str], faults: dict[int, str]) -> None:
    """Train until a fault strikes this rank."""
    from common.module import BaseModule

    start = BaseModule.on_train_batch_start

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
    args = ["validate", *plain_args["lm"], "--trainer.enable_progress_bar", "false"]
    assert run_ranks(validate_until_sigterm, args, world=1, folder=work) == [143]


@pytest.mark.parametrize(
    ("recipe", "strategy", "fault"),
    [pytest.param(*cell, marks=[] if cell in FAST else pytest.mark.matrix) for cell in CELLS],
)
def test_every_rank_ends(
    recipe: str, strategy: str, fault: str, work: Path, plain_args: dict[str, list[str]], record_property: Any
) -> None:
    faults, expected = FAULTS[fault]
    args = [
        "fit", "--config", str(ROOT / f"configs/strategy/{strategy}.yaml"), *plain_args[recipe],
        "--data.batch_size", "4", "--data.num_workers", "1", "--trainer.accelerator", "cpu", "--trainer.devices", "2",
        "--trainer.max_steps", "200", "--trainer.limit_val_batches", "0", "--trainer.enable_progress_bar", "false",
        "--trainer.enable_model_summary", "false",
    ]  # fmt: skip
    saves = ["--last.every_n_train_steps", "5", "--trainer.logger", "false", "--media.every_n_validations", "0"]
    began = time.monotonic()
    args += [*saves, "--trainer.callbacks", "[]", *INEXACT.get(strategy, [])]
    codes = run_ranks(faulty_main, recipe, args, faults, folder=work / "faulty")
    seconds = time.monotonic() - began
    assert codes == expected, logs(work / "faulty")
    assert seconds < 60
    record_property("summary", f"{recipe}, {strategy}, {fault}: exit codes {codes} after {seconds:.0f} s")
    for rank, code in enumerate(codes):
        text = (work / f"faulty/rank{rank}.log").read_text()
        if code == 3:
            assert f"rank {rank}: another rank has ended (" in text.splitlines()[-1]
        elif code > 128:
            which = "this rank" if rank in faults else "another rank"
            name = {143: "SIGTERM", 130: "Ctrl-C", 129: "SIGHUP"}[code]
            assert f"rank {rank}: {name} to {which} after step" in text.splitlines()[-1]
        elif code == 1:
            assert "Error: a bug in one rank" in text.splitlines()[-1]
        elif code == 2:
            assert "last.ckpt: cannot be written (File too large); make room" in text.splitlines()[-1]
    last = read_checkpoint(work / "runs" / recipe / "default/checkpoints/last.ckpt")
    assert last["global_step"] > 8 if "sig" in fault[:3] else last["global_step"] == 5
    resumed = ["fit", "--ckpt_path", "last", "--trainer.max_steps", str(last["global_step"] + 2)]
    assert run_ranks(main_of(recipe), resumed, folder=work / "resumed") == [0, 0], logs(work / "resumed")
