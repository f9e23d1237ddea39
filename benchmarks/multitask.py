"""Methods of multi-task learning on the recipe's data: ``python benchmarks/multitask.py``.

Trains the multitask recipe with each method and each seed, and a net for each task alone, in one process. A method's
score is Δm, the mean relative change of the tasks' test metrics against the single-task nets of the same seed; above 0
is better than those. Every finished run is kept in ``results/multitask.json``, so that the script goes on where it
stopped; ``results/multitask.md`` is the table. All methods have the recipe's settings: nothing is tuned.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from recipes.multitask.tasks import METRIC
from recipes.multitask.train import main

RESULTS = Path(__file__).resolve().parent / "results"
TASKS = {"left": "classification", "right": "classification", "offset": "regression"}
WEIGHTING, AGGREGATOR = "--model.weighting ", "--model.aggregator torchjd.aggregation."
METHODS = {
    "plain mean": "",
    "Uncertainty": f"{WEIGHTING}Uncertainty",
    "DynamicWeightAverage": f"{WEIGHTING}DynamicWeightAverage",
    "FAMO": f"{WEIGHTING}FAMO",
    "UPGrad": f"{AGGREGATOR}UPGrad --model.aggregator.projector NNLSProjector",
    "PCGrad": f"{AGGREGATOR}PCGrad",
    "MGDA": f"{AGGREGATOR}MGDA",
    "IMTLG": f"{AGGREGATOR}IMTLG",
    "AlignedMTL": f"{AGGREGATOR}AlignedMTL",
}


def delta_m(metrics: Mapping[str, float], single: Mapping[str, float], higher_is_better: Mapping[str, bool]) -> float:
    """Mean relative change of the tasks' metrics against single-task nets, in percent; above 0 is better than those.

    Args:
        metrics: of the net for all tasks, by task.
        single: of each task's own net.
        higher_is_better: which way a metric is good.

    Returns:
        Δm (Maninis et al. 2019, https://arxiv.org/abs/1904.08918).
    """
    changes = [(1 if higher_is_better[name] else -1) * (metrics[name] / single[name] - 1) for name in single]
    return 100 * sum(changes) / len(changes)


def train(flags: str, seed: int, epochs: int) -> dict[str, float]:
    """Test metrics of the checkpoint with the lowest validation loss, and the seconds that the run took."""
    args = [
        "fit", *flags.split(), "--seed_everything", str(seed), "--trainer.max_epochs", str(epochs),
        "--model.net.widths", "[8, 16, 32]", "--model.conflict_batches", "0", "--trainer.logger", "false",
        "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
    ]  # fmt: skip
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        cli = main([*args, "--trainer.default_root_dir", folder])
        cli.trainer.test(cli.model, datamodule=cli.datamodule, ckpt_path="best", verbose=False)
    found = {key: value.item() for key, value in cli.trainer.callback_metrics.items() if key.startswith("test/")}
    return {**found, "seconds": time.perf_counter() - start}


def table(results: dict[str, dict[str, float]], seeds: list[int]) -> str:
    """The methods' Δm and metrics as mean ± standard deviation over seeds, in Markdown."""
    keys = {task: f"test/{METRIC[kind]}_{task}" for task, kind in TASKS.items()}

    def values(method: str, task: str) -> list[float]:
        return [results[f"{method if method else task} {seed}"][keys[task]] for seed in seeds]

    def spread(numbers: list[float], digits: int = 1) -> str:
        deviation = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
        return f"{statistics.mean(numbers):.{digits}f} ± {deviation:.{digits}f}"

    def row(method: str) -> list[str]:
        columns = [values(method, task) for task in TASKS]
        return [
            spread([100 * value for value in column]) if kind == "classification" else spread(column, 3)
            for column, kind in zip(columns, TASKS.values(), strict=True)
        ]

    lines = [
        "| method | Δm in % | accuracy left, % | accuracy right, % | offset, rmse in pixels |",
        "|---|---|---|---|---|",
        f"| single-task nets | 0 | {' | '.join(row(''))} |",
    ]
    for method in METHODS:
        changes = [
            delta_m(
                {task: results[f"{method} {seed}"][key] for task, key in keys.items()},
                {task: results[f"{task} {seed}"][key] for task, key in keys.items()},
                {task: kind == "classification" for task, kind in TASKS.items()},
            )
            for seed in seeds
        ]
        lines.append(f"| {method} | {spread(changes)} | {' | '.join(row(method))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    given = parser.parse_args()
    path, seeds = RESULTS / "multitask.json", list(range(1, given.seeds + 1))
    kept = json.loads(path.read_text()) if path.exists() else {}
    results = kept["runs"] if kept.get("epochs") == given.epochs else {}
    RESULTS.mkdir(exist_ok=True)
    runs = {task: f"--data.tasks [{task}]" for task in TASKS} | METHODS
    wanted = [(name, seed) for seed in seeds for name in runs]
    for number, (name, seed) in enumerate(wanted, 1):
        if f"{name} {seed}" not in results:
            results[f"{name} {seed}"] = train(runs[name], seed, given.epochs)
            partial = path.with_suffix(".tmp")
            partial.write_text(json.dumps({"epochs": given.epochs, "runs": results}, indent=1) + "\n")
            os.replace(partial, path)
        took = results[f"{name} {seed}"]["seconds"]
        print(f"[{number}/{len(wanted)}] {name}, seed {seed}: {took:.0f} s", flush=True)
    (RESULTS / "multitask.md").write_text(table(results, seeds))
    print(table(results, seeds))
