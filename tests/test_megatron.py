"""Megatron's tensor parallelism: what it computes, its checkpoints, and what it refuses."""

import importlib.util
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.checkpoint import read_checkpoint
from common.errors import InputError
from common.megatron import MegatronConfig, MegatronLM, is_sliced, slice_of, whole_of
from common.nets import causal_lm
from common.strategies.megatron import Megatron
from tests.support import ROOT, TINY, difference, logs, main_of, read_metrics, run_ranks
from tests.test_resume import digest, killed_main, write_config

pytestmark = pytest.mark.usefixtures("no_report")

PRESET = ["--config", str(ROOT / "recipes/lm/megatron.yaml")]
NET = "--model.config.init_args"
installed = importlib.util.find_spec("megatron") is not None
needs_megatron = pytest.mark.skipif(not installed, reason="megatron-core is not installed")
if installed:  # once, for all ranks that are forked
    pytest.importorskip("megatron.core.models.gpt.gpt_model")

# A vocabulary that is no multiple of two, all that can be sliced in a way of its own, and GPT-2's layers.
KINDS = {
    "gpt2": ["--trainer.gradient_clip_val", "0.5"],
    "swiglu": [
        f"{NET}.activation", "swiglu", f"{NET}.normalization", "RMSNorm", f"{NET}.bias", "false",
        f"{NET}.num_attention_heads", "4", f"{NET}.num_key_value_heads", "2", f"{NET}.tie_word_embeddings", "false",
        "--trainer.gradient_clip_val", "0.5", "--trainer.accumulate_grad_batches", "2",
    ],
}  # fmt: skip


@pytest.fixture
def fit(work: Path, lm_args: list[str]) -> Any:
    """Train on so many ranks, in groups of so many, eight samples per micro-batch, and return the run's folder."""

    def run(name: str, world: int, together: int, *args: str) -> Path:
        command = [
            "fit", *PRESET, *lm_args, "--name", name, "--data.batch_size", str(8 * together // world),
            "--trainer.accelerator", "cpu", "--trainer.devices", str(world),
            "--trainer.strategy.tensor_parallel", str(together), "--trainer.log_every_n_steps", "1",
            "--trainer.check_val_every_n_epoch", "null", "--trainer.enable_progress_bar", "false", *args,
        ]  # fmt: skip
        codes = run_ranks(main_of("lm"), command, world=world, folder=work / name)
        assert codes == [0] * world, logs(work / name)
        return work / "runs/lm" / name

    return run


def same_checkpoints(path: Path, expected: Path, tolerance: float) -> None:
    """All weights, and the optimizer's state by its numbers."""
    found, wanted = read_checkpoint(path), read_checkpoint(expected)
    assert list(found["state_dict"]) == list(wanted["state_dict"])
    for name, value in wanted["state_dict"].items():
        assert found["state_dict"][name].shape == value.shape, name
        assert torch.allclose(found["state_dict"][name], value, atol=tolerance), name
    states, others = (checkpoint["optimizer_states"][0] for checkpoint in (wanted, found))
    assert states["param_groups"] == others["param_groups"]
    assert states["state"].keys() == others["state"].keys()
    for number, state in states["state"].items():
        for key, value in state.items():
            assert others["state"][number][key].shape == value.shape, (number, key)
            assert torch.allclose(others["state"][number][key], value, atol=tolerance), (number, key)


@needs_megatron
@pytest.mark.parametrize(("kind", "world"), [("gpt2", 2), ("swiglu", 2), ("swiglu", 4)])
def test_slices_compute_what_one_process_does(kind: str, world: int, fit: Any, record_property: Any) -> None:
    """Losses, clipped gradients' norms, validation; four ranks are two groups, which are data parallel."""
    args = ["--trainer.max_steps", "20", *KINDS[kind]]
    args += ["--trainer.val_check_interval", "20" if kind == "swiglu" else "10"]
    one, many = fit("one", 1, 1, "--trainer.strategy", "auto", *args), fit("many", world, 2, *args)
    worst = 0.0
    for name in ("train/loss", "optim/grad_norm", "val/loss", "val/bits_per_byte"):
        values, expected = (read_metrics(run / "metrics.csv", name) for run in (many, one))
        assert len(expected) == (2 if name.startswith("val/") else 20)
        worst = max(worst, difference(values, expected))
    assert sum(norm > 0.5 for norm in read_metrics(one / "metrics.csv", "optim/grad_norm")) > 5
    record_property("summary", f"largest relative difference: {worst:.1e} ({kind}, {world} ranks)")
    assert worst < 1e-5
    same_checkpoints(many / "checkpoints/last.ckpt", one / "checkpoints/last.ckpt", 1e-4)
