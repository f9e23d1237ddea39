"""What robustness costs: ``python benchmarks/adversarial.py digits``, ``fashion_mnist`` or ``fashion_mnist_longer``.

Trains the adversarial recipe naturally, with FGSM-RS, PGD-7, Free (4 replays) and TRADES, tests them, and prints a
table. As many runs as there are cores go on at a time; one that stands in ``benchmarks/results/adversarial.json`` is
not run again. Times are of the processor, on one thread, so that other work on the machine does not count.
"""

import argparse
import contextlib
import io
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.pool import ROOT, run_each
from common.module import BaseModule
from recipes.adversarial.attacks import PGD, under_attack
from recipes.adversarial.train import main

RESULTS = ROOT / "benchmarks/results/adversarial.json"

# The net is attacked with one step in training mode (Wong et al. 2020), with several in evaluation mode.
METHODS = {
    "natural": ["--model.objective", "Natural", "--model.attack", "null"],
    "FGSM-RS": ["--model.attack.steps", "1", "--model.objective.attack_mode", "train"],
    "PGD-7": ["--model.attack.steps", "7", "--model.objective.attack_mode", "eval"],
    "Free": ["--model.objective", "Free", "--model.objective.replays", "4", "--model.attack.steps", "1"],
    "TRADES": ["--model.objective", "TRADES", "--model.attack.steps", "7"],
}
# A smaller net, so that all are done in some minutes on a CPU. The preset's own radius is for its one step.
SMALL = ["--model.net.widths", "[8, 16]", "--model.attack.eps", "0.1"]
FASHION = ["--config", str(ROOT / "recipes/adversarial/fashion_mnist.yaml"), *SMALL]
LARGER = {("fashion_mnist", "FGSM-RS"): ["--model.attack.eps", "0.12"]}
DATA = {"digits": [], "fashion_mnist": FASHION, "fashion_mnist_longer": [*FASHION, "--trainer.max_epochs", "4"]}


def measure(data: str, method: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train and test one run in this process; the time of a step is that of its batch, without validation."""
    times: list[float] = []
    start, end = BaseModule.on_train_batch_start, BaseModule.on_train_batch_end

    def timed_start(self: BaseModule, batch: Any, batch_idx: int) -> None:
        start(self, batch, batch_idx)
        times.append(-time.process_time())

    def timed_end(self: BaseModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        times[-1] += time.process_time()
        end(self, outputs, batch, batch_idx)

    BaseModule.on_train_batch_start, BaseModule.on_train_batch_end = timed_start, timed_end  # type: ignore[method-assign]
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
    name = ["--name", f"{data}-{method}-{seed}", "--trainer.default_root_dir", str(folder)]
    given = [*DATA[data], *METHODS[method], *LARGER.get((data, method), []), *name, *quiet]
    with contextlib.redirect_stdout(io.StringIO()):
        main(["fit", *given, "--seed_everything", str(seed)])
        # The most robust checkpoint, but of natural training, which makes nets less robust as it goes on, the last.
        which = "last" if method == "natural" else "best"
        cli = main(["test", *name, "--ckpt_path", which])
    found = cli.trainer.callback_metrics
    accuracies = {key: found[f"test/{key}"].item() for key in ("accuracy", "robust_accuracy")}
    return {
        "data": data,
        "method": method,
        "seed": seed,
        "step_ms": statistics.median(times) * 1e3,
        **accuracies,
        **twice(cli),
    }


def twice(cli: Any) -> dict[str, float]:
    """Accuracy on up to 1,000 test images under 20 steps from the input: our PGD, and that of ART."""
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    net, data, eps = cli.model.net.eval(), cli.datamodule.test_data, cli.model.attacks["test"].eps
    batch = data[list(range(min(len(data), 1000)))]
    pixels, target = batch.inputs["pixel_values"], batch.target
    classes = len(cli.datamodule.class_names)
    theirs = PyTorchClassifier(
        net, nn.CrossEntropyLoss(), tuple(pixels.shape[1:]), classes, clip_values=(0.0, 1.0), device_type="cpu"
    )
    options = {"norm": np.inf, "eps": eps, "eps_step": eps / 4, "max_iter": 20, "num_random_init": 0}
    attack = ProjectedGradientDescentPyTorch(theirs, batch_size=500, verbose=False, **options)
    attacked = torch.from_numpy(attack.generate(pixels.numpy(), target.numpy()))
    with torch.no_grad():
        art = (net(attacked).argmax(-1) == target).double().mean().item()
    logits = under_attack(net, PGD(eps, 20, eps / 4, random_start=False), batch.inputs, target, batch.index, 1).logits
    return {"pgd20_accuracy": (logits.argmax(-1) == target).double().mean().item(), "art_accuracy": art}


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds, with the smallest and largest value where there are several."""
    lines = [
        "| training | accuracy | under attack | time of a step | 20 steps: our PGD, that of ART |",
        "|---|---|---|---|---|",
    ]
    for method in METHODS:
        mine = [row for row in rows if row["method"] == method]

        def cell(key: str, unit: str, scale: float, mine: list[dict[str, Any]] = mine) -> str:
            values = [row[key] * scale for row in mine]
            spread = f" ({min(values):.1f}–{max(values):.1f})" if len(values) > 1 else ""
            return f"{statistics.mean(values):.1f} {unit}{spread}"

        if mine:
            cells = cell("accuracy", "%", 100), cell("robust_accuracy", "%", 100), cell("step_ms", "ms", 1)
            both = f"{cell('pgd20_accuracy', '%', 100)}, {cell('art_accuracy', '%', 100)}"
            lines.append(f"| {method} | {' | '.join(cells)} | {both} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", choices=DATA)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS))
    parser.add_argument("--folder", type=Path, default=Path(), help="where runs/ is")
    parser.add_argument("--one", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.data, options.one, options.seeds[0], options.folder.resolve())))
        sys.exit()
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    known = {(row["data"], row["method"], row["seed"]) for row in rows}
    todo = [(method, seed) for seed in options.seeds for method in options.methods]
    todo = [(method, seed) for method, seed in todo if (options.data, method, seed) not in known]

    def keep(number: int, row: dict[str, Any]) -> None:
        """Add a row to those of earlier calls."""
        rows.append(row)
        RESULTS.write_text(
            json.dumps(sorted(rows, key=lambda row: [row["data"], row["method"], row["seed"]]), indent=2) + "\n"
        )

    where = ["--folder", str(options.folder)]
    run_each(__file__, [[options.data, "--one", method, "--seeds", str(seed), *where] for method, seed in todo], keep)
    print(table([row for row in rows if row["data"] == options.data]))
