"""Pipelines compute what one process does, under either schedule, and their checkpoints are those of one process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common.checkpoint import read_checkpoint
from tests.support import ROOT, difference, logs, main_of, read_metrics, run_ranks

pytestmark = pytest.mark.usefixtures("no_report")

NET = "--model.config.init_args"
LAYER = ["--config", str(ROOT / "configs/strategy/pipeline.yaml")]
COLUMNS = ("train/loss", "optim/grad_norm", "val/loss")

Fit = Callable[..., Path]


@pytest.fixture
def fit(work: Path, lm_args: list[str]) -> Fit:
    """Train twenty steps of 16 samples with clipping, and return the run's folder."""

    def run(name: str, world: int, *args: str, batch_size: int = 16, accumulate: int = 1) -> Path:
        command = [
            "fit", *(LAYER if world > 1 else []), *lm_args, "--name", name, "--data.batch_size", str(batch_size),
            "--trainer.accumulate_grad_batches", str(accumulate), "--trainer.accelerator", "cpu",
            "--trainer.devices", str(world), "--trainer.max_steps", "20", "--trainer.gradient_clip_val", "0.5",
            "--trainer.val_check_interval", str(10 * accumulate), "--trainer.check_val_every_n_epoch", "null",
            "--trainer.log_every_n_steps", "1", "--trainer.enable_progress_bar", "false",
            "--trainer.enable_model_summary", "false", *args,
        ]  # fmt: skip
        assert run_ranks(main_of("lm"), command, world=world, folder=work / name) == [0] * world, logs(work / name)
        return work / "runs/lm" / name

    return run


def worst(run: Path, expected: Path) -> float:
    """The largest relative difference of the losses, norms and validation losses of two runs."""
    tables = [path / "metrics.csv" for path in (run, expected)]
    assert len(read_metrics(tables[1], "train/loss")) == 20
    assert sum(norm > 0.5 for norm in read_metrics(tables[1], "optim/grad_norm")) > 5, "some are clipped"
    return max(difference(*(read_metrics(table, column) for table in tables)) for column in COLUMNS)


def check_state(run: Path, expected: Path) -> None:
    """Weights and optimizer state of two runs are those of one net, up to rounding."""
    last, wanted = (read_checkpoint(path / "checkpoints/last.ckpt") for path in (run, expected))
    assert list(last["state_dict"]) == list(wanted["state_dict"])
    for name, value in wanted["state_dict"].items():
        assert torch.allclose(last["state_dict"][name], value, atol=1e-4), name
    states, wanted_states = (checkpoint["optimizer_states"][0] for checkpoint in (last, wanted))
    assert states["param_groups"] == wanted_states["param_groups"]
    assert list(states["state"]) == list(wanted_states["state"])
    for number, state in wanted_states["state"].items():
        for key, value in state.items():
            assert torch.allclose(states["state"][number][key], value, atol=1e-4), (number, key)


SHAPES: dict[str, tuple[int, list[str], int, int]] = {  # ranks, settings, batch size, accumulation
    "1f1b": (2, [], 16, 1),
    "gpipe": (2, ["--trainer.strategy.schedule", "gpipe", "--trainer.strategy.micro_batches", "2"], 16, 1),
    "accumulation": (2, [], 8, 2),
    "replicas": (4, [], 8, 1),
    "three_stages": (3, ["--trainer.strategy.stages", "3", f"{NET}.num_hidden_layers", "3"], 16, 1),
    "untied": (2, [f"{NET}.tie_word_embeddings", "false"], 16, 1),
    "checkpointed": (2, ["--model.activation_checkpointing", "true"], 16, 1),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_pipelines_equal_one_process(shape: str, fit: Fit, record_property: Any) -> None:
    world, flags, batch_size, accumulate = SHAPES[shape]
    of_net = [flag for i in range(0, len(flags), 2) for flag in flags[i : i + 2] if "strategy" not in flags[i]]
    expected = fit("one", 1, *of_net)
    run = fit("run", world, *flags, batch_size=batch_size, accumulate=accumulate)
    record_property("summary", f"pipeline, {shape}: largest relative difference {worst(run, expected):.1e}")
    assert worst(run, expected) < 1e-5
    check_state(run, expected)
