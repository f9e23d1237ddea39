"""How much of the gap between teacher and student distillation closes: ``python benchmarks/distillation.py``.

A teacher is trained once; then the student is distilled with the recipe's own settings, and trained alone, three seeds
of each. Alone it gets the learning rate whose mean test accuracy is the best of three, which favours it. A setting that
has been run is not run again: stop it anywhere and go on later. It writes ``benchmarks/results/distillation.json`` and
prints the README's table.
"""

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
from typing import Any

from benchmarks.pool import ROOT, run_each
from recipes.distillation.train import main

RESULTS = ROOT / "benchmarks/results/distillation.json"
FASHION = ["--config", str(ROOT / "recipes/distillation/fashion_mnist.yaml")]
AFFINE = [
    {
        "class_path": "kornia.augmentation.RandomAffine",
        "init_args": {"degrees": 10.0, "translate": [0.1, 0.1], "scale": [0.9, 1.1], "p": 0.8},
    },
    {"class_path": "kornia.augmentation.RandomHorizontalFlip"},
]
PRESETS = {
    "digits": [],
    "fashion_mnist": FASHION,
    "fashion_mnist_affine": [*FASHION, "--model.augmentation", json.dumps(AFFINE)],
}
RATES, SEEDS = ("3e-3", "1e-2", "3e-2"), ("1", "2", "3")
ALONE = ["--model.teacher", "null"]


def runs_of(preset: str) -> dict[str, list[str]]:
    """Arguments of all runs, by name."""
    args = PRESETS[preset]
    seeds = {seed: ["--seed_everything", seed] for seed in SEEDS}
    distilled = {f"{preset}, distilled, seed {seed}": [*args, *flags] for seed, flags in seeds.items()}
    alone = {
        f"{preset}, alone, lr {rate}, seed {seed}": [*args, *ALONE, "--model.optimizer.lr", rate, *flags]
        for rate in RATES
        for seed, flags in seeds.items()
    }
    return distilled | alone


def measure(args: list[str]) -> dict[str, float]:
    """Metrics of the best checkpoint on the parts that validate and test."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        quiet = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
        where = ["--trainer.default_root_dir", folder]
        main(["fit", *args, *quiet, *where])
        found: dict[str, float] = {}
        for command in ("validate", "test"):
            cli = main([command, "--ckpt_path", "best", *where])
            found |= {key: round(value.item(), 5) for key, value in cli.trainer.callback_metrics.items()}
    teacher: Any = cli.model.teacher
    return {**found, "parameters": cli.model.num_params, "teacher_parameters": teacher.num_params if teacher else 0}


def column(runs: list[dict[str, float]]) -> tuple[float, str]:
    """Mean test accuracy in percent, and the same with its range as text."""
    values = [100 * metrics["test/accuracy"] for metrics in runs]
    mean = statistics.mean(values)
    return mean, f"{mean:.1f} ({min(values):.1f} to {max(values):.1f})"


def table(preset: str, results: dict[str, Any]) -> str:
    """One line for a preset, after all its runs."""
    singles = [[results[f"{preset}, alone, lr {rate}, seed {seed}"] for seed in SEEDS] for rate in RATES]
    single = max(singles, key=lambda runs: column(runs)[0])
    taught = [results[f"{preset}, distilled, seed {seed}"] for seed in SEEDS]

    teacher = 100 * taught[0]["test/teacher_accuracy"]
    (before, text_before), (after, text_after) = column(single), column(taught)
    closed = (after - before) / (teacher - before)
    sizes = f"{taught[0]['teacher_parameters']:,.0f} → {taught[0]['parameters']:,.0f}"
    return f"| {preset} | {sizes} | {teacher:.1f} | {text_before} | {text_after} | {closed:.0%} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("presets", nargs="*", default=list(PRESETS), help=f"some of {', '.join(PRESETS)}")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    runs = {name: args for preset in options.presets for name, args in runs_of(preset).items()}
    if options.one:
        print(json.dumps(measure(runs[options.one])))
        sys.exit()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    todo = [name for name in runs if name not in results]

    def keep(number: int, metrics: dict[str, float]) -> None:
        """Add a run's metrics to those of earlier calls."""
        results[todo[number]] = metrics
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")

    run_each(__file__, [[*options.presets, "--one", name] for name in todo], keep)
    print("| data | parameters | teacher, % | student alone, % | distilled, % | gap closed |")
    print("|---|---|---|---|---|---|")
    print("\n".join(table(preset, results) for preset in options.presets))
