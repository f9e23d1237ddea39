"""Recipe x strategy x precision: every cell on two ranks equals one process in that precision, or says why it cannot.

``make matrix`` runs all cells; those that have been run with the same code and configs are not run again. Then it
renders ``docs/compatibility.md``. The suite runs a part of them.
"""

import contextlib
import functools
import json
import tempfile
from pathlib import Path

import pytest

from tests.support import (
    INEXACT,
    LAUNCHERS,
    MEASURED,
    MISSING,
    PLAIN,
    ROOT,
    STRATEGIES,
    code_hash,
    difference,
    logs,
    main_of,
    per_rank,
    read_metrics,
    run_ranks,
)

pytestmark = pytest.mark.usefixtures("no_report")

PRECISIONS = sorted(path.stem for path in (ROOT / "configs/precision").glob("*.yaml"))
LAYERS = sorted([*STRATEGIES, *LAUNCHERS, *MISSING])
CELLS = [(recipe, strategy, precision) for recipe in MEASURED for strategy in LAYERS for precision in PRECISIONS]
# Every strategy with a precision; every precision is there, each with one recipe, so that its run on one process is
# made once. fp32, which tf32 is on a CPU, is in test_strategies.py.
OTHERS = [precision for precision in PRECISIONS if precision not in ("fp32", "tf32")]
FAST = {
    (MEASURED[j - 2], strategy, precision)
    for i, strategy in enumerate(STRATEGIES)
    for j, precision in enumerate(OTHERS)
    if j == i % len(OTHERS) and i % 3 == 0
}
PAGE = ROOT / "docs/compatibility.md"
CACHE = ROOT / ".matrix"

# The largest relative difference of a loss in ten steps that is rounding: bf16 has 8 bits.
TOLERANCE = {"fp32": 1e-5, "tf32": 1e-5, "fp64": 1e-12, "bf16-mixed": 2e-2, "bf16-true": 2e-2}
NEAR = 0.2  # the same where a strategy changes what is learned from


def key_of(cell: tuple[str, str, str]) -> str:
    """A hash of the code and the configs that decide what a cell does."""
    recipe, strategy, precision = cell
    layers = [ROOT / f"configs/{layer}.yaml" for layer in (f"strategy/{strategy}", f"precision/{precision}")]
    tests = [Path(__file__), *(ROOT / "tests" / name for name in ("support.py", "conftest.py", "plain.yaml"))]
    tests.append(ROOT / "configs/defaults.yaml")
    folders = [ROOT / "common", ROOT / "recipes" / recipe]
    files = [path for folder in folders for path in folder.rglob("*.*")]
    return code_hash(*layers, *tests, *(path for path in files if path.suffix in (".py", ".yaml")))


def cached(cell: tuple[str, str, str]) -> dict[str, str]:
    """What the cell gave with the present code; empty if it has not been run."""
    path = CACHE / f"{'-'.join(cell)}.json"
    outcome = json.loads(path.read_text()) if path.exists() else {}
    return outcome if outcome.get("key") == key_of(cell) else {}


@functools.cache
def single(recipe: str, strategy: str | None, precision: str, args: tuple[str, ...]) -> list[float]:
    """Losses of the run on one process that cells are compared with, made once."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        return run(recipe, strategy, precision, 1, list(args), Path(folder))[0]


def run(
    recipe: str, strategy: str | None, precision: str, world: int, args: list[str], work: Path
) -> tuple[list[float], str]:
    """Losses of ten steps at 16 samples, or the line that refuses the run."""
    name = f"ranks{world}"
    layer = ["--config", str(ROOT / f"configs/strategy/{strategy}.yaml")] if strategy else []
    command = [
        "fit", *layer, *PLAIN, "--config", str(ROOT / f"configs/precision/{precision}.yaml"), *args, "--name", name,
        "--data.batch_size", str(per_rank(16, world, strategy)), "--trainer.accelerator", "cpu",
        "--trainer.devices", str(world),
        "--trainer.max_steps", "10", "--trainer.log_every_n_steps", "1", "--trainer.limit_val_batches", "2",
        "--trainer.check_val_every_n_epoch", "null", "--trainer.val_check_interval", "5",
        "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
        *INEXACT.get(strategy or "", []),
    ]  # fmt: skip
    codes = run_ranks(main_of(recipe), command, world=world, folder=work / name)
    if codes == [2] * world:
        return [], (work / name / "rank0.log").read_text().strip().splitlines()[-1]
    assert codes == [0] * world, logs(work / name)
    return read_metrics(work / "runs" / recipe / name / "metrics.csv", "train/loss"), ""


@pytest.mark.parametrize(
    ("recipe", "strategy", "precision"),
    [pytest.param(*cell, marks=[] if cell in FAST else pytest.mark.matrix) for cell in CELLS],
)
def test_cell(
    recipe: str,
    strategy: str,
    precision: str,
    work: Path,
    plain_args: dict[str, list[str]],
    pytestconfig: pytest.Config,
) -> None:
    cell = (recipe, strategy, precision)
    if cached(cell) and not pytestconfig.getoption("markexpr"):  # `make matrix` goes on where it was stopped
        pytest.skip("has passed with this code")
    if strategy in MISSING:
        pytest.skip(f"{strategy} is not installed")
    losses, refusal = run(recipe, strategy, precision, 2, plain_args[recipe], work)
    if refusal:
        assert ": trainer." in refusal or ": model." in refusal
        assert "; take " in refusal
        # Where this is meant: `python -m tests.test_matrix` forgets what the page says of other code.
        assert not on_page(cell).startswith(("✓", "≈")), f"was {on_page(cell)} in {PAGE}"
        detail = refusal.partition(": ")[2]
        outcome = {"result": "GPU" if "needs a GPU" in refusal else "refused", "detail": detail}
    else:
        # DeepSpeed updates fp32 weights where all else updates those of bf16-true, and so trains otherwise.
        engine = strategy if precision == "bf16-true" and strategy.startswith("deepspeed") else None
        expected = single(recipe, engine, precision, tuple(plain_args[recipe]))
        assert len(expected) == 10
        worst = difference(losses, expected)
        assert worst < (NEAR if strategy in INEXACT else TOLERANCE[precision])
        if engine:  # what both might get wrong shows beside the plain process
            assert difference(losses, single(recipe, None, precision, tuple(plain_args[recipe]))) < 0.1
        outcome = {"result": "near" if strategy in INEXACT else "equal", "detail": f"{worst:.0e}"}
    CACHE.mkdir(exist_ok=True)
    (CACHE / f"{'-'.join(cell)}.json").write_text(json.dumps({"key": key_of(cell), **outcome}))


def written(outcome: dict[str, str], refusals: list[str]) -> str:
    """An outcome as it stands in the table."""
    if not outcome:
        return "not run"
    if outcome["result"] == "refused":
        return f"[{refusals.index(outcome['detail']) + 1}]"
    if outcome["result"] == "GPU":
        return "needs GPU: not run"
    return f"{'≈' if outcome['result'] == 'near' else '✓'} {outcome['detail']}"


def render() -> str:
    """The page, from the cells that were run."""
    outcomes = {cell: cached(cell) for cell in CELLS}
    refusals = sorted({outcome["detail"] for outcome in outcomes.values() if outcome.get("result") == "refused"})
    lines = [
        "# What works with what",
        "",
        "Made by `make matrix`, which trains every cell on two gloo ranks on CPU and compares ten losses with those of",
        "a single process at the same global batch and in the same precision. ✓ stands beside the largest relative",
        "difference; fp64 may differ by 1e-12, fp32 by 1e-5, bf16 by 2e-2. DeepSpeed in bf16-true keeps fp32 weights,",
        "which a single process does not: there the single process is one of DeepSpeed, and a plain one may differ by",
        "a tenth. ≈ is the same of a strategy that trains near a single process, not as it does, and may differ by a",
        "fifth. Ranks of ray are started here as those of all others. [n] is the line with which the cell is refused",
        "before training starts or at its first step; `not run` alone is a cell that is still to be run.",
    ]
    for recipe in MEASURED:
        lines += [
            "",
            f"## {recipe}",
            "",
            f"| strategy | {' | '.join(PRECISIONS)} |",
            "|---" * (len(PRECISIONS) + 1) + "|",
        ]
        for strategy in LAYERS:
            row = [outcomes[recipe, strategy, precision] for precision in PRECISIONS]
            texts = [written(outcome, refusals) for outcome in row]
            lines.append(f"| {strategy} | {' | '.join(texts)} |")
    lines += ["", "## Refusals", "", *(f"{number}. `{text}`" for number, text in enumerate(refusals, 1))]
    return "\n".join(lines) + "\n"


def on_page(cell: tuple[str, str, str]) -> str:
    """What the page says about a cell; nothing if it has not got it yet."""
    recipe, strategy, precision = cell
    section = PAGE.read_text().partition(f"## {recipe}\n")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return next((dict(zip(rows[0], row, strict=True)).get(precision, "") for row in rows if row[0] == strategy), "")


def test_page_names_every_cell() -> None:
    page = PAGE.read_text()
    for recipe in MEASURED:
        section = page.split(f"## {recipe}\n")[1].split("\n## ")[0]
        assert [line.split(" | ")[0].strip("| ") for line in section.splitlines() if line.startswith("| ")] == [
            "strategy", *LAYERS,
        ]  # fmt: skip
        assert all(f" {precision} " in section for precision in PRECISIONS)


if __name__ == "__main__":
    PAGE.write_text(render())
    print(f"{PAGE}: {dict(sorted({r: PAGE.read_text().count(r) for r in ('✓ ', '≈ ', 'not run', '| [')}.items()))}")
