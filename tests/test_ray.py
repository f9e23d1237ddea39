"""Ray starts the ranks of a command: they train as under DDP, are lost, told to stop and started again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from common.checkpoint import read_checkpoint
from common.errors import InputError
from common.strategies import ray as ray_strategy
from common.strategies.ray import RayDDP
from tests.support import ROOT, TINY, logs, main_of, read_metrics, run_ranks
from tests.test_resume import digest

LAYER = ["--config", str(ROOT / "configs/strategy/ray.yaml"), "--trainer.accelerator", "cpu"]
TWENTY = [
    "--trainer.max_steps", "20", "--trainer.log_every_n_steps", "1", "--trainer.enable_progress_bar", "false",
    "--trainer.val_check_interval", "10", "--trainer.check_val_every_n_epoch", "null",
    "--model.lr_scheduler", "common.optim.Constant", "--data.batch_size", "8",
]  # fmt: skip


class Faults(Callback):
    """Kills rank 1 once at each of some steps, and makes others long, so that a signal meets them.

    Args:
        folder: in which it notes what has happened.
        kill: steps before which rank 1 is killed, once each.
        wait: the first of the long steps, which last until the folder has a file named ``told``.
    """

    def __init__(self, folder: str, kill: list[int], wait: int):
        self.folder, self.kill, self.wait = Path(folder), kill, wait

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        mark = self.folder / f"step-{trainer.global_step}"
        if trainer.global_rank == 1 and trainer.global_step in self.kill and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if trainer.global_step >= self.wait and not (self.folder / "told").exists():
            (self.folder / "waits").touch()
            time.sleep(0.5)


def start(*args: str) -> subprocess.Popen[str]:
    """Start the lm recipe's command, which may name the callback above."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "RECIPES_ALLOW": "tests"}
    command = [sys.executable, str(ROOT / "recipes/lm/train.py"), *args]
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def end(process: subprocess.Popen[str]) -> tuple[int, str, list[str]]:
    """Exit code, stdout, and lines of stderr."""
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err.splitlines()


@pytest.mark.matrix
def test_ranks_on_a_local_cluster(work: Path, lm_args: list[str]) -> None:
    """One story, as each command takes some seconds to start a cluster and ranks."""
    pytest.importorskip("ray")
    two = [*LAYER, *TINY, *lm_args, *TWENTY, "--trainer.devices", "2"]
    runs = work / "runs/lm"

    # A whole run computes what DDP does, in one folder, and leaves stderr empty.
    code, out, err = end(start("fit", *two, "--name", "whole"))
    assert (code, err) == (0, []), out
    plain = ["fit", "--config", str(ROOT / "configs/strategy/ddp.yaml"), *two[2:], "--name", "ddp"]
    assert run_ranks(main_of("lm"), plain, folder=work / "ddp") == [0, 0], logs(work / "ddp")
    for name in ("train/loss", "val/loss"):
        values = read_metrics(runs / "whole/metrics.csv", name)
        assert values == read_metrics(runs / "ddp/metrics.csv", name)
    assert digest(runs / "whole/checkpoints/last.ckpt") == digest(runs / "ddp/checkpoints/last.ckpt")
    assert sorted(path.name for path in runs.iterdir()) == ["ddp", "whole"]

    # A lost rank: started again from the last checkpoint, until that has been done as often as is allowed.
    faults = work / "faults.yaml"
    settings = f"{{folder: {work}, kill: [7, 12], wait: 10}}"
    faults.write_text(
        "last: {every_n_train_steps: 5}\n"
        f"trainer:\n  callbacks:\n  - {{class_path: tests.test_ray.Faults, init_args: {settings}}}\n"
    )
    cut = ["fit", *two, "--name", "cut", "--config", str(faults)]
    code, out, err = end(start(*cut, "--trainer.strategy.max_restarts", "1"))
    assert code == 3, "\n".join([out, *err])
    assert "ray: lost rank 1; starting again, 0 more times at most" in out
    assert err[-1] == "ray: lost rank 1; --ckpt_path last goes on from the last checkpoint"
    assert [line for line in err if not line.startswith(("rank 0: another rank has ended", "ray: "))] == []
    assert read_checkpoint(runs / "cut/checkpoints/last.ckpt")["global_step"] == 10
    assert (work / "step-12").exists(), "it had gone on"

    # SIGTERM to the driver reaches the ranks.
    (work / "waits").unlink()
    process = start(*cut, "--ckpt_path", "last")
    while not (work / "waits").exists() and process.poll() is None:
        time.sleep(0.1)
    process.terminate()
    code, out, err = end(process)
    assert code == 143, "\n".join([out, *err])
    assert sum(": SIGTERM to this rank after step " in line for line in err) == len(err) == 2
    assert 10 < read_checkpoint(runs / "cut/checkpoints/last.ckpt")["global_step"] < 20

    # Under torchrun's variables the same command is DDP, and ends as if nothing had happened.
    (work / "told").touch()
    os.environ["RECIPES_ALLOW"] = "tests"
    assert run_ranks(main_of("lm"), [*cut, "--ckpt_path", "last"], folder=work / "cut") == [0, 0], logs(work / "cut")
    assert digest(runs / "cut/checkpoints/last.ckpt") == digest(runs / "whole/checkpoints/last.ckpt")

    # One rank evaluates what two have trained.
    one = [*LAYER, "--trainer.devices", "1", "--name", "whole"]
    code, out, err = end(start("validate", *one, "--ckpt_path", "last"))
    assert (code, err) == (0, []), out
    assert "val/loss" in out
    assert sorted(path.name for path in runs.iterdir()) == ["cut", "ddp", "whole"]


def cluster_of_half_a_core() -> None:
    """Ranks that end in other ways than by themselves."""
    import torch
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment

    strategy = RayDDP(cpus_per_worker=0.5)
    strategy.parallel_devices, strategy.cluster_environment = [torch.device("cpu")], LightningEnvironment()
    launcher = ray_strategy._RayLauncher(strategy)
    launcher._connect()
    # Its child holds what the rank has written to.
    child = "import os, subprocess; subprocess.Popen(['sleep', '60']); os.write(1, b'here\\n'); os.kill(os.getpid(), 9)"
    began = time.monotonic()
    codes = launcher._run([sys.executable, "-c", child], dict(os.environ))
    print(codes, time.monotonic() - began < 30)
    try:
        launcher._run(["/nonexistent/python"], dict(os.environ))
    except InputError as error:
        print(error)


@pytest.mark.matrix
def test_ranks_that_are_lost_or_never_start(work: Path) -> None:
    pytest.importorskip("ray")
    command = [sys.executable, "-c", "from tests.test_ray import cluster_of_half_a_core as main; main()"]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert done.stdout.splitlines() == [
        "here",
        "[-9] True",
        "trainer.strategy: a node has no /nonexistent/python; all need the same files at the same paths",
    ]


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--trainer.strategy.cpus_per_worker", "0"], "trainer.strategy.cpus_per_worker: must be above 0, got 0"),
        (["--trainer.strategy.max_restarts", "-1"], "trainer.strategy.max_restarts: must be at least 0, got -1"),
        (["--trainer.num_nodes", "2"], "address: this machine is one node, not 2; give the address of a Ray cluster"),
        (["--trainer.strategy.address", "127.0.0.1:1"], "address: there is no Ray cluster at 127.0.0.1:1; give host:p"),
        (["--trainer.strategy.workers", "2"], "workers"),
    ],
)
def test_mistakes_are_found_before_ray_starts(flags: list[str], line: str, work: Path, lm_args: list[str]) -> None:
    (work / "runs/lm/default").mkdir(parents=True)
    args = ["fit", *LAYER, *lm_args, "--trainer.devices", "2", *flags]
    assert run_ranks(main_of("lm"), args, world=1, folder=work) == [2], logs(work)
    assert line in (work / "rank0.log").read_text().splitlines()[-1]
    assert os.listdir(work / "runs/lm") == ["default"], "the earlier run is where it was"


def test_without_ray(work: Path, lm_args: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it could not be found
    args = ["fit", *LAYER, *lm_args, "--trainer.devices", "2"]
    assert run_ranks(main_of("lm"), args, world=1, folder=work) == [2], logs(work)
    last = (work / "rank0.log").read_text().splitlines()[-1]
    assert last.endswith("Ray is not installed; run pip install -e '.[ray]'")
