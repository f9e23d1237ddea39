"""Classes of tables beside scikit-learn's own methods: ``python benchmarks/tables.py``.

Trains the classification recipe's ``table.yaml`` on data sets of scikit-learn, three splits each, and fits
gradient-boosted trees and logistic regression, with scikit-learn's default settings, to the same training and
validation rows. All three predict the same test rows. Every finished run is kept in ``results/tables.json``, so that
the script goes on where it stopped; ``results/tables.md`` is the table. Nothing is tuned for one data set; epochs and
rate of the preset were chosen by validation losses of these.
"""

import contextlib
import io
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, log_loss, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from recipes.classification.train import main

RESULTS = Path(__file__).resolve().parent / "results"
PRESET = Path(__file__).resolve().parent.parent / "recipes/classification/table.yaml"
SEEDS = (0, 1, 2)  # of the split and of the net
# Columns that are left out: pixels that hold ink in fewer than ten digits.
DATA = {
    "breast_cancer": [],
    "wine": [],
    "digits": ["0_0", "1_0", "2_0", "3_0", "3_7", "4_0", "4_7", "5_0", "6_0", "7_0"],
}
METHODS = ("TabM", "boosted trees", "logistic regression")
SCORES = ("accuracy, %", "macro F1, %", "log loss", "AUROC")


def scores(target: np.ndarray, probabilities: np.ndarray) -> list[float]:
    """Accuracy and macro F1 in percent, log loss in nats, and macro AUROC of each class against the rest."""
    probabilities = probabilities / probabilities.sum(1, keepdims=True)
    best = probabilities.argmax(1)
    binary = probabilities.shape[1] == 2
    area = roc_auc_score(target, probabilities[:, 1] if binary else probabilities, multi_class="ovr")
    shares = accuracy_score(target, best), f1_score(target, best, average="macro")
    return [*(100 * float(share) for share in shares), float(log_loss(target, probabilities)), float(area)]


def run(name: str, seed: int) -> dict[str, list[float]]:
    """The scores of each method on the test rows of one split."""
    drop = json.dumps([f"pixel_{place}" for place in DATA[name]])
    args = [
        "fit", "--config", str(PRESET), "--data.source.path", f"sklearn.datasets.load_{name}",
        "--data.source.drop", drop, "--data.split_seed", str(seed), "--seed_everything", str(seed),
        "--trainer.logger", "false", "--trainer.enable_progress_bar", "false", "--media.every_n_validations", "0",
        "--trainer.enable_model_summary", "false",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        cli = main([*args, "--trainer.default_root_dir", folder])
        batches: Any = cli.trainer.predict(cli.model, datamodule=cli.datamodule, ckpt_path="best")
    samples = cli.datamodule.samples
    columns = [[*each.values()][-len(samples.labelled.class_names) :] for each in batches]
    own = np.concatenate([np.array(each).T for each in columns])
    frame = cli.datamodule.source.table.read().drop(columns="target").to_numpy()
    target, parts = samples.labelled.target.numpy(), samples.parts
    fit, test = torch.cat([parts.train, parts.val]).numpy(), parts.test.numpy()
    found = {"TabM": scores(target[test], own)}
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    trees = HistGradientBoostingClassifier(random_state=seed)
    for method, model in zip(METHODS[1:], (trees, linear), strict=True):
        model.fit(frame[fit], target[fit])
        found[method] = scores(target[test], model.predict_proba(frame[test]))
    return found


def table(results: dict[str, dict[str, list[float]]]) -> str:
    """Means and standard deviations over the splits, in Markdown."""
    lines = [f"| data | method | {' | '.join(SCORES)} |", "|---|---|---|---|---|---|"]
    for name in DATA:
        for method in METHODS:
            columns = zip(*(results[f"{name} {seed}"][method] for seed in SEEDS), strict=True)
            digits = (1, 1, 3, 4)
            cells = [
                f"{statistics.mean(each):.{places}f} ± {statistics.stdev(each):.{places}f}"
                for each, places in zip(columns, digits, strict=True)
            ]
            lines.append(f"| {name} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    path = RESULTS / "tables.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in DATA:
        for seed in SEEDS:
            if f"{name} {seed}" not in results:
                results[f"{name} {seed}"] = run(name, seed)
                path.write_text(json.dumps(results, indent=1) + "\n")
            print(f"{name}, split {seed}: {results[f'{name} {seed}']}", flush=True)
    (RESULTS / "tables.md").write_text(table(results))
    print(table(results))
