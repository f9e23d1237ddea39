"""Predictions against true values, and residuals."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from common.figures import GREY, PALETTE, new_figure, short_number, style_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def predicted_against_true(targets: Mapping[str, Float[Tensor, "values samples"]], shown: int = 2000) -> "Figure":
    """Predictions against true values with the line where they agree, and prediction intervals as thin bars.

    Args:
        targets: by name, with a unit if it has one: true values, predictions and, if there are intervals, their lower
            and upper ends.
        shown: points drawn at most, evenly spread over the samples.
    """
    figure = new_figure(4.3 * len(targets), 4.3)
    for axes, (name, rows) in zip(figure.subplots(1, len(targets), squeeze=False)[0], targets.items(), strict=True):
        step = max(math.ceil(rows.shape[1] / shown), 1)
        true, pred, *ends = rows[:, ::step].double().cpu().numpy()
        error = (rows[1] - rows[0]).double().square().mean().sqrt().item()
        name = name.replace("_", " ")
        style_axes(axes, f"RMSE {short_number(error)}", f"true {name}", f"predicted {name}")
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
            handle.set_alpha(1)
    return figure


def residuals(targets: Mapping[str, Float[Tensor, "values samples"]], shown: int = 2000) -> "Figure":
    """Residuals over predictions, and next to them the residuals' distribution.

    Args:
        targets: see :func:`predicted_against_true`.
        shown: points drawn at most, evenly spread over the samples.
    """
    figure = new_figure(5.6, 3.3 * len(targets))
    places = figure.subplots(len(targets), 2, sharey="row", width_ratios=(3, 1), squeeze=False)
    for (axes, side), (name, rows) in zip(places, targets.items(), strict=True):
        step = max(math.ceil(rows.shape[1] / shown), 1)
        pred, residual = rows[1].double().cpu().numpy(), (rows[0] - rows[1]).double().cpu().numpy()
        title = f"mean {short_number(residual.mean())}, mean absolute {short_number(abs(residual).mean())}"
        style_axes(axes, title, f"predicted {name.replace('_', ' ')}", "residual: true – predicted")
        alpha = min(max(150 / len(pred[::step]), 0.15), 0.8)
        axes.scatter(pred[::step], residual[::step], s=9, color=PALETTE[0], alpha=alpha, lw=0, rasterized=True)
        axes.axhline(0, color=PALETTE[1], lw=1.2, ls="--")
        style_axes(side, "", "samples")
        side.hist(residual, min(max(len(residual) // 10, 10), 60), orientation="horizontal", color=PALETTE[0])
        side.axhline(0, color=PALETTE[1], lw=1.2, ls="--")
    return figure
