"""Two ranks count every sample once in evaluation, however many there are."""

from pathlib import Path

import pytest
import torch

from tests.support import KIND, PLAIN, RECIPES, ROOT, logs, main_of, read_metrics, run_ranks


def keep_counts(recipe: str, args: list[str], path: Path) -> None:
    """Run ``test`` and keep the confusion matrix as well."""
    cli = main_of(recipe)(args)
    if recipe == "classification" and cli.trainer.is_global_zero:
        torch.save(cli.model._outcome["confusion"].cpu(), path)


@pytest.mark.parametrize(
    "recipe",
    [
        # Each reads its data in a way of its own.
        name if KIND[name] in ("Classification", "LM", "Regression") else pytest.param(name, marks=pytest.mark.matrix)
        for name in RECIPES
    ],
)
def test_evaluation_counts_every_sample_once(recipe: str, work: Path, plain_args: dict[str, list[str]]) -> None:
    """361 digits in batches of 7, an odd number of windows, the last one partial: no even shares for two ranks."""
    metrics, counts = {}, {}
    for world in (1, 2):
        args = [
            "test", "--ckpt_path", "null", *PLAIN, "--config", str(ROOT / "configs/strategy/ddp.yaml"),
            *plain_args[recipe], "--name", f"ranks{world}",
            "--data.eval_batch_size", "7", "--trainer.accelerator", "cpu", "--trainer.devices", str(world),
            "--trainer.enable_progress_bar", "false",
        ]  # fmt: skip
        if recipe == "classification":
            args += ["--data.test_fraction", "0.2004"]
        path = work / f"counts{world}.pt"
        codes = run_ranks(keep_counts, recipe, args, path, world=world, folder=work)
        assert codes == [0] * world, logs(work)
        table = work / "runs" / recipe / f"ranks{world}" / "test-null/metrics.csv"
        names = [name for name in table.read_text().splitlines()[0].split(",") if name.startswith("test/")]
        metrics[world] = {name: read_metrics(table, name)[-1] for name in names}
        counts[world] = torch.load(path) if recipe == "classification" else None
    assert "test/loss" in metrics[1]
    assert metrics[2] == pytest.approx(metrics[1], rel=1e-6)
    if recipe == "classification":
        assert counts[1].sum() == 361
        assert torch.equal(counts[1], counts[2])
