"""Palette, axes and curves of all pictures, and the metrics that they draw."""

import csv
import math
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Series = dict[str, tuple[list[int], list[float]]]  # metric name -> (optimizer steps, values)
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")  # Okabe-Ito: colour-blind safe
STAGES = {"train": PALETTE[0], "val": PALETTE[1]}
INK, GREY = "#222222", "#666666"
DPI = 160


def read_metrics(run_dir: Path) -> Series:
    """Read a folder's `metrics.csv`.

    Returns:
        Each metric's optimizer steps, ascending, and finite values; empty if nothing was logged.
    """
    path = run_dir / "metrics.csv"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    # A killed run can leave half a line, with a wrong last number.
    history = list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))
    series: Series = {}
    for row in history:
        for name, value in row.items():
            if name not in ("epoch", "step") and value and math.isfinite(float(value)):
                steps, values = series.setdefault(name, ([], []))
                steps.append(int(row["step"]))
                values.append(float(value))
    return series


def short_number(value: float) -> str:
    """A number for a picture or a table: four digits, or a whole number from 1,000 on."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure; width and height are in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")


def save_figure(figure: "Figure", path: Path) -> UInt8[np.ndarray, "height width 3"]:
    """Write a figure as a PNG; `savefig` would lay it out and draw it twice.

    Returns:
        The picture's RGB pixels.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text
    from matplotlib.ticker import LogFormatter, LogFormatterMathtext
    from PIL import Image

    # Names may hold dollars, so no text is a formula. A logarithmic axis writes its numbers as formulas.
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # type: ignore[attr-defined]
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        if isinstance(axis.get_major_formatter(), LogFormatterMathtext):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
    canvas = FigureCanvasAgg(figure)
    with matplotlib.rc_context({"text.parse_math": False}):  # for the numbers of axes, which are made now
        canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    Image.fromarray(pixels).save(path)
    return pixels


def style_axes(axes: "Axes", title: str, xlabel: str = "", ylabel: str = "") -> None:
    """Give axes their title and the common look."""
    axes.set_title(title, fontsize=10, loc="left", fontweight="bold", color=INK)
    axes.set_xlabel(xlabel, fontsize=9, color=GREY)
    axes.set_ylabel(ylabel, fontsize=9, color=GREY)
    axes.tick_params(labelsize=8, labelcolor=GREY, color="#bbbbbb", length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#bbbbbb")


def plot_lines(axes: "Axes", lines: Series, colors: Iterable[str], noisy: bool = True) -> None:
    """Plot values over steps; long noisy lines are faint, under their moving average."""
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


LETTERS = 27  # of a caption, as wide as its image


def captioned_images(
    images: Float[Tensor, "samples channels height width"], captions: Sequence[str], right: Sequence[bool], title: str
) -> "Figure":
    """Images in rows of six with a caption each, in orange if a prediction is wrong.

    Args:
        images: grey or RGB, in [0, 1].
        captions: one or more lines for each image.
        right: whether all predictions for an image are right.
        title: title of the figure.
    """
    wrapped = [[textwrap.wrap(line, LETTERS) for line in caption.splitlines()] for caption in captions]
    captions = ["\n".join(line for lines in each for line in lines) for each in wrapped]
    columns = min(6, len(images))
    rows, lines = math.ceil(len(images) / columns), max(caption.count("\n") + 1 for caption in captions)
    shape = images.shape[2] / images.shape[3]
    height = 1.45 * shape + 0.17 * lines + 0.1  # of a row, in inches
    figure = new_figure(1.6 * columns, rows * height + 0.35)
    figure.set_layout_engine("none")  # it would take longer than all the rest
    figure.text(
        0.08, rows * height + 0.12, title, fontsize=10, fontweight="bold", color=INK, transform=figure.dpi_scale_trans
    )
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(0, 1.6 * columns), ylim=(0, rows * height + 0.35))
    for number, (image, caption, good) in enumerate(zip(images.float().cpu(), captions, right, strict=False)):
        left, top = 1.6 * (number % columns) + 0.075, (rows - number // columns) * height
        pixels, place = image.movedim(0, -1).clamp(0, 1).numpy(), (left, left + 1.45, top - 1.45 * shape, top)
        axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, extent=place, aspect="auto", interpolation="nearest")
        color = INK if good else PALETTE[1]
        axes.text(left + 0.725, place[2] - 0.05, caption, fontsize=7.5, color=color, ha="center", va="top")
    axes.set(xlim=(0, 1.6 * columns), ylim=(0, rows * height + 0.35))
    return figure
