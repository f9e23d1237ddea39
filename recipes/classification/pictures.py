"""The confusion matrix; how well each of several labels, or of the kinds of entities, is found."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int
from torch import Tensor

from common.figures import GREY, INK, PALETTE, new_figure, style_axes

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


def label_bars(counts: Int[Tensor, "labels 3"], names: Sequence[str]) -> "Figure":
    """Precision and recall of each label as bars, those of the most frequent first, with F1 and how many there are.

    Args:
        counts: of each label, how often it is given and right, given, and there.
        names: the labels, in order.
    """
    right, given, there = counts.cpu().double().numpy().T
    order = np.argsort(-there, kind="stable")[:50]  # more would overlap
    values = {"precision": right / np.maximum(given, 1), "recall": right / np.maximum(there, 1)}
    f1 = 2 * right / np.maximum(given + there, 1)
    figure = new_figure(6.0, 1.2 + 0.36 * len(order))
    axes = figure.add_subplot()
    places = np.arange(len(order))
    for number, (label, each) in enumerate(values.items()):
        axes.barh(places + 0.36 * number - 0.18, each[order], 0.34, color=PALETTE[number], label=label)
    left_out = f", {len(order)} of {len(names)} labels" if len(order) < len(names) else ""
    style_axes(axes, f"mean F1 {f1.mean():.3f}{left_out}", "share")
    shown = [str(names[n]) if len(names[n]) <= 18 else f"{names[n][:17]}…" for n in order]
    axes.set_yticks(places, shown)
    axes.set_ylim(len(order) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    right_axis = axes.secondary_yaxis("right")
    right_axis.set_yticks(places, [f"{f1[n]:.3f} ({there[n]:.0f})" for n in order])
    right_axis.set_ylabel("F1 (number there)", fontsize=9, color=GREY)
    right_axis.tick_params(labelsize=8, labelcolor=GREY, length=0)
    right_axis.spines[:].set_visible(False)
    axes.legend(fontsize=8, frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure
