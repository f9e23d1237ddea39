"""Two ranks compute what one does: the same losses in training, every sample once in evaluation."""

from pathlib import Path

import pytest
import torch

from tests.support import ROOT, logs, main_of, read_metrics, run_ranks


@pytest.fixture
def plain_args(lm_args: list[str], tmp_path: Path) -> dict[str, list[str]]:
    """Small nets without dropout or batch norm for each recipe."""
    net = tmp_path / "net.yaml"
    net.write_text(
        "model:\n  augmentation: null\n  net:\n    class_path: common.nets.ImageClassifier\n    init_args:\n"
        "      config:\n        class_path: transformers.ViTConfig\n        init_args: {image_size: 8, patch_size: 4, "
        "num_channels: 1, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64, "
        "hidden_dropout_prob: 0.0}\n"
    )
    return {"lm": lm_args, "classification": ["--config", str(net)]}


@pytest.mark.parametrize("recipe", ["lm", "classification"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_losses_equal_one_process(recipe: str, accumulate: int, work: Path, plain_args: dict[str, list[str]]) -> None:
    runs = {}
    for world in (1, 2):
        args = [
            "fit", "--config", str(ROOT / "configs/strategy/ddp.yaml"), *plain_args[recipe], "--name", f"ranks{world}",
            "--data.batch_size", str(16 // world // accumulate), "--trainer.accumulate_grad_batches", str(accumulate),
            "--trainer.accelerator", "cpu", "--trainer.devices", str(world), "--trainer.max_steps", "20",
            "--trainer.log_every_n_steps", "1", "--trainer.limit_val_batches", "2",
            "--trainer.enable_progress_bar", "false",
        ]  # fmt: skip
        assert run_ranks(main_of(recipe), args, world=world, folder=work) == [0] * world, logs(work)
        runs[world] = read_metrics(work / "runs" / recipe / f"ranks{world}" / "metrics.csv", "train/loss")
    assert len(runs[1]) == 20
    assert runs[2] == pytest.approx(runs[1], rel=1e-5)


def keep_counts(recipe: str, args: list[str], path: Path) -> None:
    """Run ``test`` and keep the confusion matrix as well."""
    cli = main_of(recipe)(args)
    if recipe == "classification" and cli.trainer.is_global_zero:
        torch.save(cli.model._counts, path)


@pytest.mark.parametrize("recipe", ["lm", "classification"])
def test_evaluation_counts_every_sample_once(recipe: str, work: Path, plain_args: dict[str, list[str]]) -> None:
    """361 digits in batches of 7, an odd number of windows, the last one partial: no even shares for two ranks."""
    metrics, counts = {}, {}
    for world in (1, 2):
        args = [
            "test", "--config", str(ROOT / "configs/strategy/ddp.yaml"), *plain_args[recipe], "--name", f"ranks{world}",
            "--data.eval_batch_size", "7", "--trainer.accelerator", "cpu", "--trainer.devices", str(world),
            "--trainer.enable_progress_bar", "false",
        ]  # fmt: skip
        if recipe == "classification":
            args += ["--data.test_fraction", "0.2004"]
        path = work / f"counts{world}.pt"
        codes = run_ranks(keep_counts, recipe, args, path, world=world, folder=work)
        assert codes == [0] * world, logs(work)
        names = ("loss", "perplexity") if recipe == "lm" else ("loss", "accuracy", "recall", "f1", "auroc")
        folder = work / "runs" / recipe / f"ranks{world}" / "test"
        metrics[world] = {name: read_metrics(folder / "metrics.csv", f"test/{name}")[-1] for name in names}
        counts[world] = torch.load(path) if recipe == "classification" else torch.tensor(361)
    assert counts[1].sum() == 361
    assert torch.equal(counts[1], counts[2])
    assert metrics[2] == pytest.approx(metrics[1], rel=1e-6)
