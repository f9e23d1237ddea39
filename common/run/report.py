"""A run's learning curves and its report.html: one self-contained page made from the files in the run's folder."""

import base64
import json
import math
import os
import re
import shlex
from collections.abc import Iterable
from datetime import timedelta
from html import escape
from pathlib import Path
from statistics import median
from string import Template
from typing import TYPE_CHECKING, Any, NamedTuple

from common.figures import (
    DPI,
    GREY,
    PALETTE,
    STAGES,
    Series,
    new_figure,
    plot_lines,
    read_metrics,
    save_figure,
    short_number,
    style_axes,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark;
  --ink: #1c2024; --soft: #656d76; --line: #dfe3e8; --page: #f6f7f9; --box: #fff }
@media (prefers-color-scheme: dark) { :root {
  --ink: #e3e6ea; --soft: #98a1ab; --line: #333a42; --page: #15181c; --box: #1e2228 } }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; font: 16px/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--page) }
h1 { font-size: 1.6rem; margin: .5rem 0 }
h2 { font-size: 1.1rem; margin: 2rem 0 .6rem }
.row { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start }
figure, .table, pre { max-width: 100%; margin: 0; background: var(--box); box-sizing: border-box;
  border: 1px solid var(--line); border-radius: .5rem; overflow: auto }
figcaption, th, thead td { color: var(--soft); font-size: .875rem; font-weight: normal }
figcaption { padding: .4rem .8rem }
img { display: block; max-width: 100%; height: auto }
table { border-collapse: collapse }
td, th { padding: .3rem .8rem; text-align: right; font-variant-numeric: tabular-nums }
th { text-align: left }
.run td { text-align: left; overflow-wrap: anywhere }
tbody tr { border-top: 1px solid var(--line) }
pre { width: 100%; max-height: 32rem; padding: .8rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font: .8125rem/1.5 ui-monospace, monospace }
summary { cursor: pointer; margin: 1rem 0 .5rem }
</style>
<h1>$title</h1>
$body</html>
""")


class Best(NamedTuple):
    """What makes a checkpoint the best of a run."""

    metric: str
    mode: str  # min or max

    @property
    def words(self) -> str:
        """As in a legend."""
        return f"{'lowest' if self.mode == 'min' else 'highest'} {self.metric}"

    def find(self, series: Series) -> tuple[int, float] | None:
        """The optimizer step where the metric was best first, and its value; None where it was never logged."""
        steps, values = series.get(self.metric, ([], []))
        sign = 1 if self.mode == "min" else -1
        return min(zip(steps, values, strict=True), key=lambda point: sign * point[1], default=None)


LOWEST_LOSS = Best("val/loss", "min")


def _loss_first(name: str) -> tuple[bool, str]:
    return name != "loss", name


def learning_curves(series: Series, best: Best = LOWEST_LOSS) -> "Figure | None":
    """One panel per metric with its train and val values over optimizer steps, the best step marked.

    Returns:
        The figure, None where neither train nor val metrics were logged.
    """
    split = (key.partition("/") for key in series)
    names = sorted({name for stage, _, name in split if stage in STAGES}, key=_loss_first)
    if not names:
        return None
    stage_of_best, _, name_of_best = best.metric.partition("/")
    columns, found = min(2, len(names)), best.find(series)
    rows = math.ceil(len(names) / columns)
    figure = new_figure(3.7 * columns if columns > 1 else 5.0, 2.2 * rows + 0.8)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True).flat
    handles = {}
    for axes, name in zip(panels, names, strict=False):
        style_axes(axes, name.replace("_", " "))
        axes.tick_params(labelbottom=True)
        lines = {stage: series[f"{stage}/{name}"] for stage in STAGES if f"{stage}/{name}" in series}
        plot_lines(axes, lines, [STAGES[stage] for stage in lines])
        if found is not None:
            steps = found[0] + 1  # as its checkpoint counts them; rows count from 0
            axes.axvline(found[0], color="#888888", lw=1, ls=":", label=f"{best.words} (step {steps:,})")
        if found is not None and name == name_of_best and stage_of_best in lines:
            axes.plot(*found, marker="*", ms=12, color=STAGES[stage_of_best], mec="white", mew=0.8, zorder=5)
            axes.set_title(f"best {stage_of_best} {short_number(found[1])}", loc="right", fontsize=9, color=GREY)
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    for axes in figure.axes[len(names) :]:
        axes.remove()
    figure.supxlabel("step", fontsize=9, color=GREY)
    place = {"loc": "outside upper left", "ncols": len(handles)}
    figure.legend(handles.values(), handles, fontsize=9, labelcolor=GREY, frameon=False, **place)
    return figure


def learning_rate(series: Series) -> "Figure | None":
    """The learning rates `optim/lr` or `optim/lr-<group>` and, below, `optim/grad_norm` over optimizer steps.

    Returns:
        The figure, None where neither was logged.
    """
    rates = {name.removeprefix("optim/"): series[name] for name in series if name.startswith("optim/lr")}
    norms = {name: series[name] for name in series if name == "optim/grad_norm"}
    panels = {title: lines for title, lines in {"learning rate": rates, "gradient norm": norms}.items() if lines}
    if not panels:
        return None
    figure = new_figure(3.9, 2.2 * len(panels) + 0.5)
    for axes, (title, lines) in zip(figure.subplots(len(panels), squeeze=False).flat, panels.items(), strict=True):
        style_axes(axes, title, xlabel="step")
        plot_lines(axes, lines, PALETTE * len(lines), noisy=lines is norms)
        if len(lines) > 1:
            axes.legend(fontsize=8, labelcolor=GREY, frameon=False)
    return figure


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    def cells(row: Iterable[str]) -> str:
        return "".join(f"<td>{escape(cell)}</td>" for cell in row)

    body = "".join(f"<tr><th>{escape(name)}</th>{cells(rest)}</tr>" for name, *rest in rows)
    table = f"<table><thead><tr>{cells(head)}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="table">{table}</div>' if body else ""


def checkpoint_name(checkpoint: str | None, run_dir: Path) -> str:
    """What a command line calls a checkpoint: by its name in the run, as ``best``, or by its path."""
    if checkpoint is None:
        return "no checkpoint"
    path = Path(checkpoint)
    return path.stem if path.parent == run_dir.resolve() / "checkpoints" else checkpoint


def read_summary(folder: Path) -> dict[str, Any]:
    """What a command has left in its ``summary.json``; nothing if it has left none."""
    try:
        return json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # there is none, or a dying machine has left half of it
        return {}


def _evaluations(run_dir: Path) -> list[tuple[Path, str]]:
    """Folders of what has been measured, and what they are called: the command, the checkpoint and its step.

    One on other data than the last of its name says on which.
    """
    found = []
    for folder in (each for command in ("validate", "test") for each in sorted(run_dir.glob(f"{command}*"))):
        name, summary = folder.name.replace("-", ", "), read_summary(folder)
        if "data" in summary:  # runs of before do not say it
            checkpoint = checkpoint_name(summary["checkpoint"], run_dir)
            name = f"{re.split('[-.]', folder.name)[0]}, {checkpoint}, step {summary['step']:,}"
            if name in (known for _, known in found):
                name += f", on {summary.get('source', 'other data')} ({folder.name})"
        found.append((folder, name))
    return found


def _starts(folder: Path) -> list[dict[str, Any]]:
    """What a command has said at each start of it."""
    path = folder / "starts.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _run(run_dir: Path) -> str:
    """What was run, when, for how long and on how many samples, as a table."""
    if not (starts := _starts(run_dir)):
        return ""
    start, summary = starts[-1], read_summary(run_dir)
    rows = [("command", shlex.join(start["command"])), ("start", start["time"])]
    if len(starts) > 1:
        rows[1] = ("start", f"{start['time']}, number {len(starts)} of the run, from step {start.get('step', 0):,}")
        rows.insert(0, ("first start", f"{starts[0]['time']}: {shlex.join(starts[0]['command'])}"))
    if summary:
        duration = timedelta(seconds=round(summary["seconds"]))
        rows.append(("duration of this start", f"{duration}, {summary['state']} at step {summary['step']:,}"))
        if early := summary.get("ended_early"):
            rows.append(("ended early", early))
    if parts := start.get("parts"):
        rows.append(("samples", ", ".join(f"{name} {size:,}" for name, size in parts.items())))
    for folder, name in _evaluations(run_dir):
        if data := read_summary(folder).get("data"):
            made = [f"; {each['time']}: {shlex.join(each['command'])}" for each in _starts(folder)]
            rows.append((name, f"on {data}{''.join(made)}"))
    rows.append(("commit", start.get("commit") or "none"))
    if changed := start.get("uncommitted"):
        rows.append(("uncommitted changes", changed))
    return _table(["", ""], rows).replace('class="table"', 'class="table run"')


def _metrics(run_dir: Path, series: Series, best: Best) -> str:
    """Last, best, validated and tested values as a table, and the speed as another."""

    def values(source: Series, stage: str, step: int | None = None) -> dict[str, float]:
        lines = {name.removeprefix(stage): line for name, line in source.items() if name.startswith(stage)}
        if step is None:
            return {name: values[-1] for name, (_, values) in lines.items()}
        return {name: values[steps.index(step)] for name, (steps, values) in lines.items() if step in steps}

    found = best.find(series)
    columns = {
        "train, last": values(series, "train/"),
        "val, last": values(series, "val/"),
        f"val, {best.words.replace('val/', '')}": values(series, "val/", found[0]) if found is not None else {},
    }
    for folder, name in _evaluations(run_dir):
        columns[name] = values(read_metrics(folder), "test/" if folder.name.startswith("test") else "val/")
    columns = {head: column for head, column in columns.items() if column}
    rows = [
        [name, *(short_number(column[name]) if name in column else "–" for column in columns.values())]
        for name in sorted({name for column in columns.values() for name in column}, key=_loss_first)
    ]
    perf = {name: median(line[1]) for name, line in series.items() if name.startswith("perf/")}
    speed = [(name, short_number(value)) for name, value in perf.items()]
    return _table(["", *columns], rows) + _table(["", "median"], speed)


def _label(path: Path) -> str:
    return escape(path.stem.replace("-", ": ").replace("_", " "))


def _picture(path: Path) -> str:
    png, label = path.read_bytes(), _label(path)
    width = max(int.from_bytes(png[16:20]) * 96 // DPI, 240)
    image = f'<img alt="{label}" width="{width}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
    return f"<figure><figcaption>{label}</figcaption>{image}</figure>"


def write_report(run_dir: Path, title: str, best: Best = LOWEST_LOSS) -> Path:
    """Draws the run's curves into `figures/` and writes `report.html` from what the run's folder holds.

    Args:
        run_dir: the run's folder.
        title: of the page.
        best: what makes a checkpoint the best; that step is marked in the curves.

    Returns:
        The page: one file that needs no other file and no network.
    """
    series, figures = read_metrics(run_dir), run_dir / "figures"
    curves = {"learning_curves": learning_curves(series, best), "learning_rate": learning_rate(series)}
    for name, figure in curves.items():
        if figure is not None:
            figures.mkdir(exist_ok=True)
            save_figure(figure, figures / f"{name}.png")
    # The curves stand first; the recipe's own pictures follow by name.
    pictures = sorted(figures.glob("*.png"), key=lambda path: ("learning_" not in path.stem, path.stem))
    parts = {"Run": _run(run_dir)}
    parts |= {"Metrics": _metrics(run_dir, series, best), "Pictures": "".join(map(_picture, pictures))}
    for path in sorted(run_dir.glob("texts/*.txt")):
        parts[_label(path)] = f"<pre>{escape(path.read_text(encoding='utf-8'))}</pre>"
    folded = {}
    if (config := run_dir / "config.yaml").exists():
        folded["Configuration"] = config.read_text(encoding="utf-8")
    if (environment := run_dir / "environment.json").exists():
        facts = json.loads(environment.read_text(encoding="utf-8"))
        folded["Environment"] = "\n".join(f"{key}: {value}" for key, value in facts.items())
    body = [f'<h2>{name}</h2><div class="row">{part}</div>' for name, part in parts.items() if part]
    for name, text in folded.items():
        body.append(f"<details><summary>{name}</summary><pre>{escape(text)}</pre></details>")
    report = run_dir / "report.html"
    partial = report.with_suffix(".html.tmp")
    partial.write_text(PAGE.substitute(title=escape(title), body="\n".join(body)), encoding="utf-8")
    os.replace(partial, report)
    return report
