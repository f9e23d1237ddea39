"""The confusion matrix."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int
from torch import Tensor

from common.figures import GREY, INK, new_figure, style_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def confusion_matrix(counts: Int[Tensor, "classes classes"], names: Sequence[str]) -> "Figure":
    """A confusion matrix, coloured by each row's shares, with recalls and, up to 20 classes, counts.

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
    figure = new_figure(size + 2, size + 1)
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    style_axes(axes, f"accuracy {cells.trace() / max(totals.sum(), 1):.2%}", "predicted class", "true class")
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
