"""What stages save: ``python benchmarks/curriculum.py``.

Trains the curriculum recipe without stages and with each kind of them, three seeds each, as many runs at a time as
there are cores, and finds where a run first has the validation loss that the run without stages of the same seed ends
with. Time is that of the processor in training, on one thread; validation does not count. Every finished run is kept in
``results/curriculum.json``, so that the script goes on where it stopped.
"""

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
import time

from benchmarks.pool import ROOT, run_each
from recipes.curriculum.module import CurriculumModule
from recipes.curriculum.train import main

RESULTS = ROOT / "benchmarks/results/curriculum.json"
NONE = {"length": "null", "batch": "null", "competence": "null"}
Curve = list[tuple[int, float, float]]  # tokens, seconds and validation loss at each validation

# What differs from the recipe's config; further steps make up for smaller ones, so that all see about as many tokens.
METHODS: dict[str, dict[str, str]] = {
    "no stages": {**NONE, "max_steps": "800"},
    "no stages, fewer steps": {**NONE, "max_steps": "640"},
    "length": {**NONE, "length": "{start: 0.25, tokens: 150000}", "max_steps": "936"},
    "batch": {**NONE, "batch": "{start: 0.25, tokens: 150000}", "max_steps": "1045"},
    "competence": {**NONE, "competence": "{start: 0.3, tokens: 300000, power: 2.0}", "max_steps": "800"},
}


def train(method: str, seed: int) -> Curve:
    """One run in this process."""
    curve, clock = [], {"spent": 0.0, "since": 0.0}

    def pause(self: CurriculumModule) -> None:
        clock["spent"] += time.process_time() - clock["since"]

    def go_on(self: CurriculumModule) -> None:
        clock["since"] = time.process_time()
        if self.trainer.sanity_checking:
            clock["spent"] = 0.0
        else:
            curve.append((self.data.tokens_seen, clock["spent"], self.trainer.callback_metrics["val/loss"].item()))

    CurriculumModule.on_validation_start, CurriculumModule.on_validation_end = pause, go_on
    flags = [f"--{'trainer' if key == 'max_steps' else 'data'}.{key}={value}" for key, value in METHODS[method].items()]
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    often = ["--trainer.val_check_interval", "40", "--trainer.limit_val_batches", "8", "--trainer.logger", "false"]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        where = ["--trainer.default_root_dir", folder, "--trainer.callbacks", "[]", "--trainer.accelerator", "cpu"]
        where += ["--trainer.enable_checkpointing", "false", "--media.every_n_validations", "0"]
        main(["fit", *flags, *quiet, *often, *where, "--seed_everything", str(seed)])
    return curve


def table(results: dict[str, Curve], seeds: list[int]) -> str:
    """Shares of the tokens and the time of the run without stages, mean and range over seeds."""

    def spread(values: list[float], digits: int) -> str:
        return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"

    lines = [
        "| stages | final validation loss | tokens to the loss without | time to it |",
        "|---|---|---|---|",
    ]
    for method in METHODS:
        if any(f"{method} {seed}" not in results for seed in seeds):
            continue
        ends, tokens, times = [], [], []
        for seed in seeds:
            curve, without = results[f"{method} {seed}"], results[f"no stages {seed}"][-1]
            ends.append(curve[-1][2])
            if reached := next((point for point in curve if point[2] <= without[2]), None):
                tokens.append(reached[0] / without[0])
                times.append(reached[1] / without[1])
        missed = f", missed by {len(seeds) - len(times)}" if len(times) < len(seeds) else ""
        shares = [spread(values, 2) + missed if values else "not reached" for values in (tokens, times)]
        lines.append(f"| {method} | {spread(ends, 3)} | {' | '.join(shares)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS))
    parser.add_argument("--one", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(train(options.one, options.seeds[0])))
        sys.exit()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    runs = [(method, seed) for seed in options.seeds for method in options.methods]
    runs = [run for run in runs if f"{run[0]} {run[1]}" not in results]

    def keep(number: int, curve: Curve) -> None:
        """Add a curve to those of earlier calls."""
        results["{} {}".format(*runs[number])] = curve
        RESULTS.write_text(json.dumps(dict(sorted(results.items()))) + "\n")

    run_each(__file__, [["--one", method, "--seeds", str(seed)] for method, seed in runs], keep)
    print(table(results, options.seeds))
