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
import tempfile
from pathlib import Path
from typing import Any

from recipes.distillation.train import main

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/distillation.json"
PRESETS = {"digits": [], "fashion_mnist": ["--config", str(ROOT / "recipes/distillation/fashion_mnist.yaml")]}
RATES, SEEDS = ("3e-3", "1e-2", "3e-2"), ("1", "2", "3")
ALONE = ["--model.teacher", "null"]


def run(results: dict[str, Any], name: str, args: list[str]) -> dict[str, float]:
    """Metrics of the best checkpoint on the parts that validate and test, from an earlier call if there was one."""
    if name not in results:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            quiet = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
            where = ["--trainer.default_root_dir", folder]
            main(["fit", *args, *quiet, *where])
            found: dict[str, float] = {}
            for command in ("validate", "test"):
                cli = main([command, "--ckpt_path", "best", *where])
                found |= {key: round(value.item(), 5) for key, value in cli.trainer.callback_metrics.items()}
        teacher: Any = cli.model.teacher
        sizes = {"parameters": cli.model.num_params, "teacher_parameters": teacher.num_params if teacher else 0}
        results[name] = {**found, **sizes}
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        print(name, results[name], flush=True)
    return results[name]


def column(runs: list[dict[str, float]]) -> tuple[float, str]:
    """Mean test accuracy in percent, and the same with its range as text."""
    values = [100 * metrics["test/accuracy"] for metrics in runs]
    mean = statistics.mean(values)
    return mean, f"{mean:.1f} ({min(values):.1f} to {max(values):.1f})"


def table(preset: str, results: dict[str, Any]) -> str:
    """One line for a preset, after all its runs."""
    args = PRESETS[preset]

    def alone(rate: str, seed: str) -> dict[str, float]:
        flags = ["--model.optimizer.lr", rate, "--seed_everything", seed]
        return run(results, f"{preset}, alone, lr {rate}, seed {seed}", [*args, *ALONE, *flags])

    singles = [[alone(rate, seed) for seed in SEEDS] for rate in RATES]
    single = max(singles, key=lambda runs: column(runs)[0])
    taught = [run(results, f"{preset}, distilled, seed {seed}", [*args, "--seed_everything", seed]) for seed in SEEDS]

    teacher = 100 * taught[0]["test/teacher_accuracy"]
    (before, text_before), (after, text_after) = column(single), column(taught)
    closed = (after - before) / (teacher - before)
    sizes = f"{taught[0]['teacher_parameters']:,.0f} → {taught[0]['parameters']:,.0f}"
    return f"| {preset} | {sizes} | {teacher:.1f} | {text_before} | {text_after} | {closed:.0%} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("presets", nargs="*", default=list(PRESETS), help=f"some of {', '.join(PRESETS)}")
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    lines = [table(preset, known) for preset in parser.parse_args().presets]
    print("| data | parameters | teacher, % | student alone, % | distilled, % | gap closed |")
    print("|---|---|---|---|---|---|")
    print("\n".join(lines))
