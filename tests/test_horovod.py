"""Horovod where it is installed, and the line that names its build where it is not.

What it shares with the other strategies is tested with them: equality, resume, faults, preflight.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from common.run.faults import lost_rank
from common.strategies.horovod import Horovod
from tests.support import MISSING, ROOT, TINY, difference, logs, main_of, read_metrics, run_ranks
from tests.test_parallel import fit
from tests.test_resume import digest

LAYER = ["--config", str(ROOT / "configs/strategy/horovod.yaml")]
SCRIPT = ROOT / "configs/cluster/horovod.sh"

pytestmark = pytest.mark.usefixtures("no_report")
installed = pytest.mark.skipif("horovod" in MISSING, reason="Horovod is not installed: configs/cluster/horovod.sh")


@pytest.mark.skipif("horovod" not in MISSING, reason="Horovod is installed")
def test_the_missing_engine_is_named_with_its_script(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """By the first process, before it starts another."""
    with pytest.raises(SystemExit) as stop:
        main_of("lm")(["fit", *TINY, *LAYER, "--trainer.accelerator", "cpu", "--trainer.devices", "2"])
    assert stop.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "trainer.strategy: Horovod is not installed" in line
    assert line.endswith("run configs/cluster/horovod.sh")
    assert SCRIPT.exists()


def outdated_main(folder: Path, args: list[str]) -> None:
    """Find a Horovod that does not go with the torch that is here."""
    for name in [name for name in sys.modules if name.split(".")[0] == "horovod"]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    main_of("lm")(args)


@installed
def test_a_build_for_another_torch_is_named_with_its_script(work: Path) -> None:
    spec = importlib.util.find_spec("horovod")
    assert spec is not None
    assert spec.origin is not None
    shutil.copytree(Path(spec.origin).parent, work / "horovod", ignore=shutil.ignore_patterns("*.so"))
    library = next(Path(spec.origin).parent.glob("torch/*.so"))
    (work / "horovod/torch" / library.name).touch()  # torch's symbols cannot be found in it
    metadata = work / "horovod/metadata.json"
    metadata.write_text(json.dumps({**json.loads(metadata.read_text()), "pytorch": "1.0"}))
    assert run_ranks(outdated_main, work, ["fit", *TINY, *LAYER], world=1, folder=work) == [2], logs(work)
    line = (work / "rank0.log").read_text().splitlines()[-1]
    assert f"trainer.strategy: Horovod is not installed, or not for torch {torch.__version__}; run" in line


@pytest.mark.parametrize(
    ("tools", "line"),
    [((), "g++ is missing"), (("g++", "make", "tar"), "cannot import torch")],
    ids=["no compiler", "no torch"],
)
def test_the_script_says_what_it_lacks(tools: tuple[str, ...], line: str, tmp_path: Path) -> None:
    for name in (*tools, "python"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(["/bin/bash", SCRIPT], env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 2
    (said,) = done.stderr.splitlines()
    assert said.startswith("horovod.sh: ")
    assert line in said


def test_its_words_tell_of_a_lost_rank() -> None:
    """Those of 0.28.1, for each gradient that still waits and for each that comes later."""
    words = "Horovod has been shut down. This was caused by an exception on one of the ranks or an attempt to allreduce"
    assert lost_rank(RuntimeError(words)) == "Horovod has been shut down"


@installed
def test_half_the_bytes_train_nearly_the_same(work: Path, lm_args: list[str]) -> None:
    args = ["--trainer.max_steps", "20"]
    whole = fit(work, lm_args, "whole", "horovod", *args)
    half = fit(work, lm_args, "half", "horovod", *args, "--trainer.strategy.compression", "fp16")
    for key in ("train/loss", "val/loss"):
        losses, expected = (read_metrics(path / "metrics.csv", key) for path in (half, whole))
        assert len(losses) == (20 if key == "train/loss" else 1)
        assert 0 < difference(losses, expected) < 1e-3


@installed
def test_runs_on_four_ranks_repeat_to_the_bit(work: Path, lm_args: list[str]) -> None:
    """On two, sums have but one order."""
    args = ["fit", *LAYER, *lm_args, "--trainer.accelerator", "cpu", "--trainer.devices", "4", "--data.batch_size", "4"]
    args += ["--trainer.max_steps", "10", "--trainer.limit_val_batches", "0", "--trainer.enable_progress_bar", "false"]
    for name in ("first", "second"):
        assert run_ranks(main_of("lm"), [*args, "--name", name], world=4, folder=work) == [0] * 4, logs(work)
    first, second = (digest(work / f"runs/lm/{name}/checkpoints/last.ckpt") for name in ("first", "second"))
    assert first == second


@installed
def test_a_number_out_of_its_range_is_refused(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main_of("lm")(["fit", *TINY, *LAYER, "--trainer.strategy.fusion_threshold", "-1"])
    assert stop.value.code == 2
    assert "trainer.strategy.fusion_threshold: must be at least 0, got -1" in capfd.readouterr().err.splitlines()[-1]


class Branches(nn.Module):
    """Normalizes, and then each rank goes a way of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.ways = nn.BatchNorm1d(3), nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)])

    def forward(self, x: Tensor, rank: int) -> Tensor:
        return self.ways[rank](self.norm(x ** (1 + rank))).square().mean()


class BranchesModule(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Branches()

    def training_step(self, batch: Tensor) -> Tensor:
        return self.net(batch, self.global_rank)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.5)


def samples() -> Tensor:
    return torch.arange(12.0).view(4, 3).sin()


def branches_main(path: Path) -> None:
    """Make two runs of one step, each in two micro-batches, and look at the net in evaluation."""
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)  # so that weights differ if rank 0 does not share them
    module = BranchesModule()
    for _ in range(2):
        trainer = L.Trainer(
            strategy=Horovod(), accelerator="cpu", devices=2, max_steps=1, accumulate_grad_batches=2, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            use_distributed_sampler=False,
        )  # fmt: skip
        trainer.fit(module, DataLoader(samples(), batch_size=2))  # type: ignore[arg-type]
    module.net.eval()(samples(), rank)
    torch.save(module.net.state_dict(), path.with_suffix(f".{rank}"))


@installed
def test_ranks_may_use_different_parameters(work: Path) -> None:
    """Gradients are averaged over the ranks, also those that one rank has not; running statistics are rank 0's."""
    assert run_ranks(branches_main, work / "net", folder=work) == [0, 0], logs(work)
    found = [torch.load(work / f"net.{rank}") for rank in range(2)]
    torch.manual_seed(0)
    net = Branches()
    optimizer = torch.optim.SGD(net.parameters(), 0.5)
    for _ in range(2):
        optimizer.zero_grad()
        for rank in range(2):
            for batch in samples().split(2):
                statistics = {name: buffer.clone() for name, buffer in net.named_buffers()}
                (net(batch, rank) / 4).backward()
                if rank:  # whose statistics are not kept
                    net.load_state_dict(statistics, strict=False)
        optimizer.step()
    for name, value in net.state_dict().items():
        assert torch.equal(found[0][name], found[1][name]), name
        assert torch.allclose(found[0][name], value, atol=1e-6), name


@installed
def test_ranks_that_lightning_starts_say_nothing_of_horovod(work: Path, lm_args: list[str]) -> None:
    args = ["fit", *TINY, *LAYER, *lm_args, "--trainer.accelerator", "cpu", "--trainer.devices", "2"]
    command = [sys.executable, str(ROOT / "recipes/lm/train.py"), *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "orovod" not in done.stderr.replace(LAYER[1], "")
    assert (work / "runs/lm/default/checkpoints/last.ckpt").exists()
