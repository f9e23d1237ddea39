"""A run's pictures and its report.html: one self-contained page made from the files in the run's folder."""

import base64
import csv
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import median
from string import Template
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from common.attacks import UnderAttack

Series = dict[str, tuple[list[int], list[float]]]  # metric name -> (optimizer steps, values)

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")  # Okabe-Ito: colour-blind safe
STAGES = {"train": PALETTE[0], "val": PALETTE[1]}
INK, GREY = "#222222", "#666666"
DPI = 160
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
tbody tr { border-top: 1px solid var(--line) }
pre { width: 100%; max-height: 32rem; padding: .8rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font: .8125rem/1.5 ui-monospace, monospace }
summary { cursor: pointer; margin: 1rem 0 .5rem }
</style>
<h1>$title</h1>
$body</html>
""")


def read_metrics(run_dir: Path) -> Series:
    """Reads a folder's `metrics.csv` and its earlier segments `metrics.until-step-<N>.csv` as one history.

    Returns:
        For each metric its optimizer steps, ascending, and finite values. Empty where nothing was logged.
    """
    earlier = run_dir.glob("metrics.until-step-*.csv")
    numbers = {path: [int(part) for part in path.stem.rpartition("-")[2].split(".")] for path in earlier}
    segments = sorted(((number[0], number, path) for path, number in numbers.items()), reverse=True)
    history: list[dict[str, str]] = []
    end = math.inf
    # Newest first: a file supersedes what older ones hold from its first step on.
    for limit, _, path in [(math.inf, [], run_dir / "metrics.csv"), *segments]:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        # A killed run can leave half a last line, whose last number would be wrong.
        rows = list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))
        history = [row for row in rows if int(row["step"]) < min(limit, end)] + history
        end = min([end, *(int(row["step"]) for row in rows)])
    series: Series = {}
    for row in history:
        for name, value in row.items():
            if name not in ("epoch", "step") and value and math.isfinite(float(value)):
                steps, values = series.setdefault(name, ([], []))
                steps.append(int(row["step"]))
                values.append(float(value))
    return series


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


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")


def save_figure(figure: "Figure", path: Path) -> UInt8[np.ndarray, "height width 3"]:
    """Write a figure as a PNG; `savefig` would lay it out and draw it twice.

    Returns:
        The picture's pixels, red, green and blue.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    Image.fromarray(pixels).save(path)
    return pixels


def _style(axes: "Axes", title: str, xlabel: str = "", ylabel: str = "") -> None:
    axes.set_title(title, fontsize=10, loc="left", fontweight="bold", color=INK)
    axes.set_xlabel(xlabel, fontsize=9, color=GREY)
    axes.set_ylabel(ylabel, fontsize=9, color=GREY)
    axes.tick_params(labelsize=8, labelcolor=GREY, color="#bbbbbb", length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#bbbbbb")


def _plot(axes: "Axes", lines: Series, colors: Iterable[str], noisy: bool = True) -> None:
    """Values over steps; noisy lines of many points stand faint under their moving average."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    for (label, (steps, values)), color in zip(lines.items(), colors, strict=False):
        window = max(len(values) // 50, 1) if noisy else 1
        kernel = np.full(window, 1 / window)
        if window > 1:
            axes.plot(steps, values, color=color, lw=0.7, alpha=0.3)
        smooth_steps, smooth = np.convolve(steps, kernel, "valid"), np.convolve(values, kernel, "valid")
        marker = "o" if len(values) <= 30 else ""
        axes.plot(smooth_steps, smooth, color=color, lw=1.6, label=label, marker=marker, ms=3)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(color="#e8e8e8", lw=0.7)
    values = [value for _, values in lines.values() for value in values]
    if noisy and 0 < 100 * min(values) < max(values):
        axes.set_yscale("log")


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
    figure = _figure(3.7 * columns if columns > 1 else 5.0, 2.2 * rows + 0.8)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True).flat
    handles = {}
    for axes, name in zip(panels, names, strict=False):
        _style(axes, name.replace("_", " "))
        axes.tick_params(labelbottom=True)
        lines = {stage: series[f"{stage}/{name}"] for stage in STAGES if f"{stage}/{name}" in series}
        _plot(axes, lines, [STAGES[stage] for stage in lines])
        if found is not None:
            axes.axvline(found[0], color="#888888", lw=1, ls=":", label=f"{best.words} (step {found[0]:,})")
        if found is not None and name == name_of_best and stage_of_best in lines:
            axes.plot(*found, marker="*", ms=12, color=STAGES[stage_of_best], mec="white", mew=0.8, zorder=5)
            axes.set_title(f"best {stage_of_best} {_number(found[1])}", loc="right", fontsize=9, color=GREY)
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
    figure = _figure(3.9, 2.2 * len(panels) + 0.5)
    for axes, (title, lines) in zip(figure.subplots(len(panels), squeeze=False).flat, panels.items(), strict=True):
        _style(axes, title, xlabel="step")
        _plot(axes, lines, PALETTE * len(lines), noisy=lines is norms)
        if len(lines) > 1:
            axes.legend(fontsize=8, labelcolor=GREY, frameon=False)
    return figure


def confusion_matrix(counts: Int[Tensor, "classes classes"], names: Sequence[str]) -> "Figure":
    """A confusion matrix coloured by each row's shares, with recalls, and up to 20 classes its counts.

    Args:
        counts: samples by true class (rows) and predicted class (columns).
        names: the classes' names, in order.
    """
    cells = counts.cpu().numpy()
    classes, totals = len(cells), cells.sum(axis=1)
    shares = cells / np.maximum(totals, 1)[:, None]
    written, size = classes <= 20, min(max(0.38 * classes, 2.2), 7.6)
    # More than about 50 names would overlap: every n-th is enough to find one's way.
    ticks = range(0, classes, math.ceil(classes / 50))
    labels = [names[tick] if len(names[tick]) <= 18 else f"{names[tick][:17]}…" for tick in ticks]
    recalls = [f"{shares[tick, tick]:.3f}" if totals[tick] else "–" for tick in ticks]
    crowded = 0.08 * max(map(len, labels)) * len(labels) > size
    figure = _figure(size + 2, size + 1)
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    _style(axes, f"accuracy {cells.trace() / max(totals.sum(), 1):.2%}", "predicted class", "true class")
    right = axes.secondary_yaxis("right")
    right.set_ylabel("recall", fontsize=9, color=GREY)
    axes.set_xticks(ticks, labels, rotation=90 if crowded else 0)
    axes.set_yticks(ticks, labels)
    right.set_yticks(ticks, recalls)
    for each in (axes, right):
        each.tick_params(labelsize=8 if written else 6, labelcolor=GREY, length=0)
        each.spines[:].set_visible(False)
    for (row, column), count in np.ndenumerate(cells) if written else ():
        ink = "white" if shares[row, column] > 0.55 else INK if count else "#c8c8c8"
        axes.text(column, row, f"{count}", ha="center", va="center", fontsize=7.5, color=ink)
    return figure


def reliability_diagram(
    confidence: Float[Tensor, "samples"], correct: Bool[Tensor, "samples"], bins: int = 15
) -> "Figure":
    """Accuracy against confidence in equally wide bins, below it each bin's share of the samples.

    Args:
        confidence: probability of the predicted class, in [0, 1].
        correct: whether the predicted class is the true one.
        bins: number of bins over [0, 1].
    """
    sure, hit = confidence.double().cpu().numpy(), correct.cpu().numpy()
    index = np.minimum((sure * bins).astype(int), bins - 1)
    counts = np.bincount(index, minlength=bins)
    sums = np.bincount(index, hit, bins), np.bincount(index, sure, bins)
    error = abs(sums[0] - sums[1]).sum() / max(len(sure), 1)
    figure = _figure(3.9, 3.9)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    centers, width = (np.arange(bins) + 0.5) / bins, 0.92 / bins
    _style(top, f"calibration error {error:.3f}", ylabel="accuracy")
    top.bar(centers, sums[0] / np.maximum(counts, 1), width, color=PALETTE[0])
    top.plot((0, 1), (0, 1), color=PALETTE[1], lw=1.4, ls="--", label="perfect calibration")
    top.set(xlim=(0, 1), ylim=(0, 1))
    top.legend(loc="upper left", fontsize=8, labelcolor=GREY, frameon=False)
    _style(bottom, "", "confidence", "share")
    bottom.bar(centers, counts / max(len(sure), 1), width, color="#999999")
    return figure


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    def cells(row: Iterable[str]) -> str:
        return "".join(f"<td>{escape(cell)}</td>" for cell in row)

    body = "".join(f"<tr><th>{escape(name)}</th>{cells(rest)}</tr>" for name, *rest in rows)
    table = f"<table><thead><tr>{cells(head)}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="table">{table}</div>' if body else ""


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
        "validate": values(read_metrics(run_dir / "validate"), "val/"),
        "test": values(read_metrics(run_dir / "test"), "test/"),
    }
    columns = {head: column for head, column in columns.items() if column}
    rows = [
        [name, *(_number(column[name]) if name in column else "–" for column in columns.values())]
        for name in sorted({name for column in columns.values() for name in column}, key=_loss_first)
    ]
    perf = {name: median(line[1]) for name, line in series.items() if name.startswith("perf/")}
    speed = [(name, _number(value)) for name, value in perf.items()]
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
    parts = {"Metrics": _metrics(run_dir, series, best), "Pictures": "".join(map(_picture, pictures))}
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


def curriculum(run_dir: Path) -> "Figure | None":
    """The stages of a run, `curriculum/<name>`, and below them the losses, over the tokens seen.

    Returns:
        The figure, None where they were not logged.
    """
    series = read_metrics(run_dir)
    if "curriculum/tokens" not in series:
        return None
    steps, tokens = series["curriculum/tokens"]
    stages = {key.partition("/")[2]: series[key] for key in series if key.startswith("curriculum/")}
    panels = {name.replace("_", " "): {name: line} for name, line in stages.items() if len(set(line[1])) > 1}
    panels.pop("tokens", None)
    panels["loss"] = {stage: series[f"{stage}/loss"] for stage in STAGES if f"{stage}/loss" in series}
    figure = _figure(4.6, 1.6 * len(panels) + 0.5)
    for axes, (title, lines) in zip(figure.subplots(len(panels), squeeze=False).flat, panels.items(), strict=True):
        _style(axes, title, xlabel="tokens seen" if title == "loss" else "")
        over_tokens = {
            name: (np.interp(line[0], steps, tokens).astype(int).tolist(), line[1]) for name, line in lines.items()
        }
        _plot(axes, over_tokens, STAGES.values(), noisy=title == "loss")
        if len(lines) > 1:
            axes.legend(fontsize=8, labelcolor=GREY, frameon=False)
    return figure


def predicted_against_true(
    target: Float[Tensor, "samples"],
    preds: Float[Tensor, "samples"],
    interval: Sequence[Float[Tensor, "samples"]] = (),
    name: str = "target",
    shown: int = 2000,
) -> "Figure":
    """Predictions against true values with the line where they agree, and prediction intervals as thin bars.

    Args:
        target: true values.
        preds: predicted values.
        interval: lower and upper ends of the prediction intervals, or nothing.
        name: what is predicted, with its unit if it has one.
        shown: points drawn at most, evenly spread over the samples.
    """
    step = max(math.ceil(len(target) / shown), 1)
    true, pred, *ends = (values[::step].double().cpu().numpy() for values in (target, preds, *interval))
    figure = _figure(4.3, 4.3)
    axes = figure.add_subplot()
    error = (preds - target).double().square().mean().sqrt().item()
    _style(axes, f"RMSE {_number(error)}", f"true {name.replace('_', ' ')}", f"predicted {name.replace('_', ' ')}")
    alpha = min(max(150 / len(true), 0.15), 0.8)
    if ends:
        axes.vlines(true, ends[0], ends[1], color=PALETTE[4], lw=0.6, alpha=alpha, label="prediction interval")
    axes.scatter(true, pred, s=9, color=PALETTE[0], alpha=alpha, lw=0, rasterized=True, zorder=3)
    low, high = min(true.min(), pred.min()), max(true.max(), pred.max())
    margin = 0.04 * (high - low) or 1.0
    limits = (low - margin, high + margin)
    axes.plot(limits, limits, color=PALETTE[1], lw=1.2, ls="--", zorder=4, label="prediction = true value")
    axes.set(xlim=limits, ylim=limits, aspect="equal")
    legend = axes.legend(loc="upper left", fontsize=8, labelcolor=GREY, frameon=False)
    for handle in legend.legend_handles:
        handle.set_alpha(1)  # type: ignore[union-attr]
    return figure


def residuals(
    target: Float[Tensor, "samples"], preds: Float[Tensor, "samples"], name: str = "target", shown: int = 2000
) -> "Figure":
    """Residuals over predictions, which show where the net errs, and beside them how they are distributed.

    Args:
        target: true values.
        preds: predicted values.
        name: what is predicted, with its unit if it has one.
        shown: points drawn at most, evenly spread over the samples.
    """
    step = max(math.ceil(len(target) / shown), 1)
    pred, residual = preds.double().cpu().numpy(), (target - preds).double().cpu().numpy()
    figure = _figure(5.6, 3.3)
    axes, side = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    title = f"mean {_number(residual.mean())}, mean absolute {_number(abs(residual).mean())}"
    _style(axes, title, f"predicted {name.replace('_', ' ')}", "residual: true – predicted")
    alpha = min(max(150 / len(pred[::step]), 0.15), 0.8)
    axes.scatter(pred[::step], residual[::step], s=9, color=PALETTE[0], alpha=alpha, lw=0, rasterized=True)
    axes.axhline(0, color=PALETTE[1], lw=1.2, ls="--")
    _style(side, "", "samples")
    side.hist(residual, min(max(len(residual) // 10, 10), 60), orientation="horizontal", color=PALETTE[0])
    side.axhline(0, color=PALETTE[1], lw=1.2, ls="--")
    return figure


def gradient_angles(cosine: Float[Tensor, "batches tasks tasks"], names: Sequence[str]) -> "Figure":
    """How the gradients of several tasks stand to one another: the mean cosine, and how often it is negative.

    Args:
        cosine: of the angles between the tasks' gradients, for some batches.
        names: the tasks' names, in order.
    """
    values = cosine.float().cpu().numpy()
    mean, against = values.mean(axis=0), (values < 0).mean(axis=0)
    size = max(0.85 * len(names), 2.4)
    figure = _figure(size + 2.1, size + 1)
    axes = figure.add_subplot()
    image = axes.imshow(mean, cmap="RdBu", vmin=-1, vmax=1)
    _style(axes, f"cosines between gradients, {len(values)} batches", "task", "task")
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(labelsize=9, labelcolor=GREY, length=0)
    axes.spines[:].set_visible(False)
    for (row, column), cos in np.ndenumerate(mean):
        note = "" if row == column else f"\n{against[row, column]:.0%} below 0"
        ink = "white" if abs(cos) > 0.6 else INK
        axes.text(column, row, f"{cos:.2f}{note}", ha="center", va="center", fontsize=7.5, color=ink)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, ticks=(-1, -0.5, 0, 0.5, 1))
    bar.set_label("mean cosine", fontsize=9, color=GREY)
    bar.ax.tick_params(labelsize=8, labelcolor=GREY, length=0)
    bar.outline.set_visible(False)  # type: ignore[operator]
    return figure


def task_weights(series: Series, names: Sequence[str]) -> "Figure | None":
    """The weights ``optim/weight_<task>`` of the tasks' losses or gradients over optimizer steps.

    Returns:
        The figure, None where they did not change.
    """
    lines = {name: series[f"optim/weight_{name}"] for name in names if f"optim/weight_{name}" in series}
    if not lines or all(len(set(values)) < 2 for _, values in lines.values()):
        return None
    figure = _figure(4.4, 2.9)
    axes = figure.add_subplot()
    _style(axes, "weights of the tasks", "step", "weight (1: plain mean)")
    _plot(axes, lines, PALETTE * len(lines))
    axes.legend(fontsize=8, labelcolor=GREY, frameon=False)
    return figure


def captioned_images(
    images: Float[Tensor, "samples channels height width"], captions: Sequence[str], right: Sequence[bool], title: str
) -> "Figure":
    """Images in rows of six with a caption each, in orange where something is wrong.

    Args:
        images: grey or RGB, in [0, 1].
        captions: a line or more for each image.
        right: whether the caption is good news.
        title: of the whole figure.
    """
    columns = min(6, len(images))
    rows, lines = math.ceil(len(images) / columns), max(caption.count("\n") + 1 for caption in captions)
    figure = _figure(1.6 * columns, rows * (1.3 + 0.19 * lines) + 0.4)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold", color=INK)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, image, caption, good in zip(panels, images.float().cpu(), captions, right, strict=False):
        axes.imshow(image.movedim(0, -1).clamp(0, 1).numpy(), cmap="gray_r", vmin=0, vmax=1)
        axes.set_xlabel(caption, fontsize=7.5, color=INK if good else PALETTE[1])
    for number, axes in enumerate(figure.axes):
        axes.set(xticks=[], yticks=[])
        axes.set_visible(number < len(images))
        axes.spines[:].set_color("#cccccc")
    return figure


def adversarial_examples(
    clean: Float[Tensor, "samples channels height width"],
    target: Int[Tensor, "samples"],
    found: "UnderAttack",
    names: Sequence[str],
    columns: int = 8,
) -> "Figure":
    """Rows of clean images, what an attack adds, and attacked images, with the class and both predictions.

    Images that the attack turned from right to wrong come first. Grey in the middle row is no change; it is scaled so
    that the largest change of all is black or white, and its title says by how much.

    Args:
        clean: images.
        target: class of each image.
        found: what an attack has found for them.
        names: the classes' names, in order.
        columns: images shown at most.
    """
    before, after = found.clean.argmax(-1), found.logits.argmax(-1)
    turned = (before == target) & (after != target)
    chosen = turned.int().argsort(descending=True, stable=True)[:columns].tolist()
    images, attacked = (x[chosen].float().cpu().permute(0, 2, 3, 1).numpy() for x in (clean, found.points))
    change = attacked - images
    largest = float(abs(change).max())
    low, high = float(images.min()), float(images.max())
    rows = [(images - low) / max(high - low, 1e-12), change / max(2 * largest, 1e-12) + 0.5]
    rows.append(((attacked - low) / max(high - low, 1e-12)).clip(0, 1))
    scale = f"change\n× {0.5 * (high - low) / largest:.2g}" if largest else "no change"
    labels = ["clean", scale, "attacked"]
    figure = _figure(1.05 * len(chosen) + 0.8, 4.1)
    panels = figure.subplots(3, len(chosen), squeeze=False)
    for number, (row, label) in enumerate(zip(rows, labels, strict=True)):
        panels[number, 0].set_ylabel(label, fontsize=9, color=GREY)
        for axes, image in zip(panels[number], row, strict=True):
            axes.imshow(image if image.shape[-1] == 3 else image[..., 0], cmap="gray", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
    for number, guesses in ((0, before), (2, after)):
        for axes, which in zip(panels[number], chosen, strict=True):
            color = PALETTE[2] if guesses[which] == target[which] else PALETTE[1]
            axes.set_xlabel(_short(names[int(guesses[which])]), fontsize=8.5, color=color)
    for axes, which in zip(panels[0], chosen, strict=True):
        axes.set_title(_short(names[int(target[which])]), fontsize=8.5, color=INK)
    note = "above: true class; below: prediction, green where right, orange where wrong; those that were fooled first"
    figure.supxlabel(note, fontsize=8, color=GREY)
    return figure


def _short(name: str) -> str:
    return name if len(name) <= 12 else f"{name[:11]}…"


def robustness_curve(eps: Sequence[float], accuracy: Sequence[float], marked: float) -> "Figure":
    """Accuracy under attack against the radius of the attack; it has to fall to about nothing for large ones.

    A curve that stays up is a sign that gradients mislead the attack, not that the net is robust (Athalye et al. 2018,
    https://arxiv.org/abs/1802.00420).

    Args:
        eps: radii, ascending, in units of the inputs.
        accuracy: share of samples that stay right, in [0, 1].
        marked: the radius that the run reports.
    """
    figure = _figure(4.4, 3.0)
    axes = figure.add_subplot()
    _style(axes, "accuracy under attack", "radius of the attack, eps", "share of right predictions")
    axes.grid(color="#e8e8e8", lw=0.7)
    axes.plot(eps, accuracy, color=PALETTE[0], lw=1.6, marker="o", ms=4)
    axes.axvline(marked, color="#888888", lw=1, ls=":", label=f"eps {marked:g}")
    axes.set_ylim(0, 1.02)
    axes.set_xlim(left=0)
    axes.legend(fontsize=8, labelcolor=GREY, frameon=False)
    return figure


def staleness(counts: Mapping[int, int]) -> "Figure":
    """How many gradients came so many updates after the weights that they were computed with.

    Args:
        counts: number of updates between to number of gradients.
    """
    figure = _figure(4.4, 2.6)
    axes = figure.add_subplot()
    last = max(counts)
    total = sum(counts.values())
    title = f"staleness of {total:,} gradients, {sum(k * n for k, n in counts.items()) / total:.2f} on average"
    _style(axes, title, "updates between weights and gradient", "share of gradients")
    axes.bar(range(last + 1), [counts.get(k, 0) / total for k in range(last + 1)], 0.8, color=PALETTE[0])
    axes.set_ylim(0, 1.02)
    axes.locator_params("x", integer=True)
    return figure


def model_comparison(models: Mapping[str, Mapping[str, float]]) -> "Figure":
    """A panel of bars for each property of some models, the values written beside.

    Args:
        models: name of a model to its properties, the same for all.
    """
    properties = list(next(iter(models.values())))
    figure = _figure(2.3 * len(properties) + 0.6, 0.34 * len(models) + 0.75)
    panels = figure.subplots(1, len(properties), sharey=True, squeeze=False).flat
    for axes, name in zip(panels, properties, strict=True):
        values = [properties_of[name] for properties_of in models.values()]
        bars = axes.barh(list(models), values, 0.7, color=PALETTE[: len(models)])
        axes.bar_label(bars, [_number(value) for value in values], padding=3, fontsize=8, color=INK)
        _style(axes, name)
        axes.set_xlim(0, 1.45 * max(*values, 1e-9))
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
    figure.axes[0].invert_yaxis()
    return figure


def soft_targets(
    probabilities: Mapping[str, Float[Tensor, "samples classes"]],
    names: Sequence[str],
    titles: Sequence[str],
    ylabel: str = "probability",
    images: Float[Tensor, "samples channels height width"] | None = None,
) -> "Figure":
    """Probabilities of several models for the same samples, as groups of bars; of many classes the ten likeliest.

    Args:
        probabilities: name of a model to its probabilities; the first decides which classes are shown.
        names: the classes' names, in order.
        titles: what stands above each sample.
        ylabel: what the bars are.
        images: the samples, shown beside their bars.
    """
    first, *_ = probabilities.values()
    figure, columns = _figure(7.4, 1.75 * len(titles) + 0.5), 1 + (images is not None)
    ratios = (1, 5) if images is not None else (1,)
    rows = figure.subplots(len(titles), columns, squeeze=False, width_ratios=ratios)
    for sample, (title, row) in enumerate(zip(titles, rows, strict=True)):
        if images is not None:
            picture = images[sample].float().cpu()
            row[0].imshow(picture[0] if len(picture) == 1 else picture.permute(1, 2, 0).clamp(0, 1), cmap="gray_r")
            row[0].set_axis_off()
        axes, classes = row[-1], range(len(names))
        if len(names) > 10:
            classes = first[sample].topk(10).indices.tolist()
        width = 0.8 / len(probabilities)
        for place, ((name, values), color) in enumerate(zip(probabilities.items(), PALETTE, strict=False)):
            middle = np.arange(len(classes)) + (place - (len(probabilities) - 1) / 2) * width
            axes.bar(middle, values[sample][list(classes)].float().cpu().numpy(), width, color=color, label=name)
        _style(axes, title)
        labels = [repr(names[number])[1:-1] for number in classes]
        labels = [label if len(label) <= 10 else f"{label[:9]}…" for label in labels]
        axes.set_xticks(range(len(classes)), labels)
    figure.supxlabel("class", fontsize=9, color=GREY)
    figure.supylabel(ylabel, fontsize=9, color=GREY)
    handles, labels = figure.axes[-1].get_legend_handles_labels()
    place = {"loc": "outside upper right", "ncols": len(handles)}
    figure.legend(handles, labels, fontsize=9, labelcolor=GREY, frameon=False, **place)
    return figure
