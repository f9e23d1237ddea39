"""``make results``: train each recipe's measured runs with three seeds and write the table of ``recipes/README.md``.

``recipes/<task>/results.yaml`` says what is measured. Each number is kept with a hash of the settings that decide it.
Only stale numbers are measured again; ``--check`` lists them and measures nothing. The page shows measured recipes: a
copy joins them with ``--only <its name>``. As many runs go on at a time as there are cores, each on one. Their output
is in ``.results``.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib
import io
import json
import os
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.progress import Progress

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.cache import CACHE  # noqa: E402
from common.figures import read_metrics  # noqa: E402
from common.run.cli import DEFAULTS  # noqa: E402
from common.run.environment import describe_environment  # noqa: E402

STORE = ROOT / "benchmarks/results/recipes.json"
PAGE = ROOT / "recipes/README.md"
PLACE = ROOT / ".results"  # the runs
SEEDS = (1, 2, 3)
OURS = re.compile(r"^(common|recipes)\.[\w.]*\.")  # of a class path, all but the name


class Row(NamedTuple):
    """One measured run of a recipe."""

    recipe: str
    name: str
    fit: tuple[str, ...]  # arguments
    metric: str  # of test
    percent: bool
    beside: str  # a published number
    needs: str | None  # a file in the current folder

    @property
    def command(self) -> str:
        """What a user types."""
        return " ".join(["python", f"recipes/{self.recipe}/train.py", "fit", *self.fit])

    @property
    def key(self) -> str:
        """The name that numbers are kept under."""
        return f"{self.recipe}/{self.name}"


def rows() -> list[Row]:
    """All rows of all recipes."""
    found = []
    for path in sorted((ROOT / "recipes").glob("*/results.yaml")):
        for name, settings in yaml.safe_load(path.read_text()).items():
            needs = settings.get("needs")
            fit, percent = tuple(settings["fit"].split()), settings.get("percent", False)
            found.append(
                Row(path.parent.name, name, fit, settings["metric"], percent, settings.get("beside", ""), needs)
            )
    return found


def decisive(config: dict[str, Any]) -> Any:
    """The settings that decide a number.

    Loggers and the callbacks of every run decide nothing. Neither do the file of a class of this repository, and
    settings that are null, as new ones are.
    """
    kept = {key: config[key] for key in ("seed_everything", "best", "data", "model")}
    left_out = ("logger", "callbacks", "default_root_dir")
    trainer = {key: value for key, value in config["trainer"].items() if key not in left_out}
    everywhere = {item["class_path"] for item in yaml.safe_load(DEFAULTS.read_text())["trainer"]["callbacks"]}
    own = [item for item in config["trainer"]["callbacks"] or [] if item["class_path"] not in everywhere]
    return _named({**kept, "trainer": trainer, **({"callbacks": own} if own else {})})


def _named(value: Any) -> Any:
    if isinstance(value, dict):
        given = {key: item for key, item in value.items() if item is not None}
        return {key: OURS.sub("", item) if key == "class_path" else _named(item) for key, item in given.items()}
    return [_named(item) for item in value] if isinstance(value, list) else value


@functools.cache
def config_hash(row: Row) -> str:
    """Eight digits that change when a decisive setting does."""
    main = importlib.import_module(f"recipes.{row.recipe}.train").main
    text = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(text):
        main(["fit", *row.fit, "--print_config"])
    config = yaml.safe_load(text.getvalue())
    settings = [decisive(config)]
    if training := config["model"].get("teacher_training"):
        settings.append(_named(yaml.safe_load((ROOT / "recipes" / row.recipe / training).read_text())))
    facts = json.dumps(settings, sort_keys=True).replace(CACHE, "")  # which is each machine's own
    return hashlib.sha256(facts.encode()).hexdigest()[:8]


def measured(store: dict[str, Any]) -> list[Row]:
    """The rows of the recipes that the store knows."""
    known = {key.split("/")[0] for key in store}
    return [row for row in rows() if row.recipe in known]


def measure(row: Row, seed: int) -> tuple[dict[str, float], float]:
    """Train and test once on one core; returns the metrics of test and the seconds that training took."""
    script = [sys.executable, str(ROOT / "recipes" / row.recipe / "train.py")]
    name = ["--name", f"{row.name}-seed{seed}", "--trainer.default_root_dir", str(PLACE)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    PLACE.mkdir(exist_ok=True)
    with (PLACE / f"{row.recipe}-{name[1]}.log").open("w") as log:
        run = functools.partial(subprocess.run, check=True, env=environment, stdout=log, stderr=log)
        began = time.perf_counter()
        run([*script, "fit", *row.fit, *name, "--seed_everything", str(seed)])
        seconds = time.perf_counter() - began
        run([*script, "test", *name])
    metrics = read_metrics(PLACE / "runs" / row.recipe / name[1] / "test")
    return {name: values[-1] for name, (_, values) in metrics.items()}, seconds


def _number(row: Row, value: float) -> str:
    return f"{100 * value:.2f}" if row.percent else f"{value:.4g}"


def render(store: dict[str, Any], hashes: dict[str, str]) -> str:
    """The page."""
    lines = [
        "# Results",
        "",
        "Made by `make results`: each row is trained with the seeds 1, 2 and 3 and the best checkpoint is tested. The",
        "time is the median of training, from start to report, on one CPU core. Beside each number is the hash of",
        "the settings that decide it; it is marked stale when these have changed since.",
        "",
        "| recipe | command | metric | mean ± std | beside | time | config |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in measured(store):
        kept = store.get(row.key)
        result, took, mark = "not measured", "", ""
        if kept:
            values, unit = kept["values"], " %" if row.percent else ""
            spread = f"{_number(row, statistics.mean(values))} ± {_number(row, statistics.stdev(values))}"
            result, took = spread + unit, f"{statistics.median(kept['seconds']):.0f} s"
            mark = f"`{kept['hash']}`" + ("" if kept["hash"] == hashes[row.key] else " stale")
        link = f"[{row.recipe}]({row.recipe}/README.md)"
        lines.append(f"| {link} | `{row.command}` | {row.metric} | {result} | {row.beside} | {took} | {mark} |")
    machines = sorted({f"Python {kept['python']}, torch {kept['torch']}" for kept in store.values()})
    return "\n".join([*lines, "", *(f"Measured with {machine}." for machine in machines)]) + "\n"


def main() -> None:
    """Measure what is stale, or only tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only tell which numbers are stale")
    parser.add_argument("--only", nargs="+", help="recipes, or recipe/row")
    options = parser.parse_args()
    store = json.loads(STORE.read_text()) if STORE.exists() else {}
    asked = [row for row in rows() if row.key.startswith(tuple(options.only))] if options.only else measured(store)
    hashes = {row.key: config_hash(row) for row in {*measured(store), *asked}}
    todo = []
    for row in asked:
        fresh = store.get(row.key, {}).get("hash") == hashes[row.key]
        missing = row.needs and not Path(row.needs).exists()
        print(f"{row.key}: {'fresh' if fresh else 'stale'}" + (f", needs {row.needs} here" if missing else ""))
        if not (fresh or missing or options.check):
            todo.append(row)
    environment = describe_environment()
    facts = {key: environment[key] for key in ("python", "torch", "commit")}
    with ThreadPoolExecutor(os.cpu_count()) as pool, Progress(disable=not todo) as progress:
        one_each = {row.command: row for row in todo}  # rows of one command differ in their metric only
        bar = progress.add_task("runs", total=len(one_each) * len(SEEDS))
        futures = {command: [pool.submit(measure, row, seed) for seed in SEEDS] for command, row in one_each.items()}
        for future in (future for mine in futures.values() for future in mine):
            future.add_done_callback(lambda _: progress.advance(bar))
        try:
            for row in todo:
                metrics, seconds = zip(*(future.result() for future in futures[row.command]), strict=True)
                values = [found[row.metric] for found in metrics]
                store[row.key] = {"hash": hashes[row.key], "values": values, "seconds": seconds, **facts}
                STORE.write_text(json.dumps(dict(sorted(store.items())), indent=1) + "\n")
                PAGE.write_text(render(store, hashes))
        finally:  # after a failure no further run starts
            pool.shutdown(cancel_futures=True)
    PAGE.write_text(render(store, hashes))
    print(f"{os.path.relpath(PAGE)} written", flush=True)


if __name__ == "__main__":
    main()
