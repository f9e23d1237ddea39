"""A picture of a run's lessons and losses."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.figures import GREY, STAGES, new_figure, plot_lines, read_metrics, style_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def curriculum(run_dir: Path) -> "Figure | None":
    """The lessons of a run, `curriculum/<name>`, and below them the losses, over the tokens seen.

    Returns:
        The figure; None if no lessons were logged.
    """
    series = read_metrics(run_dir)
    if "curriculum/tokens" not in series:
        return None
    steps, tokens = series["curriculum/tokens"]
    stages = {key.partition("/")[2]: series[key] for key in series if key.startswith("curriculum/")}
    panels = {name.replace("_", " "): {name: line} for name, line in stages.items() if len(set(line[1])) > 1}
    panels.pop("tokens", None)
    panels["loss"] = {stage: series[f"{stage}/loss"] for stage in STAGES if f"{stage}/loss" in series}
    figure = new_figure(4.6, 1.6 * len(panels) + 0.5)
    for axes, (title, lines) in zip(figure.subplots(len(panels), squeeze=False).flat, panels.items(), strict=True):
        style_axes(axes, title, xlabel="tokens seen" if title == "loss" else "")
        over_tokens = {
            name: (np.interp(line[0], steps, tokens).astype(int).tolist(), line[1]) for name, line in lines.items()
        }
        plot_lines(axes, over_tokens, STAGES.values(), noisy=title == "loss")
        if len(lines) > 1:
            axes.legend(fontsize=8, labelcolor=GREY, frameon=False)
    return figure
