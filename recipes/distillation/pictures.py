"""Teacher and student side by side: their sizes, speeds and accuracies, and their softened probabilities."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from torch import Tensor

from common.figures import GREY, INK, PALETTE, new_figure, short_number, style_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def model_comparison(models: Mapping[str, Mapping[str, float]]) -> "Figure":
    """A panel of bars for each property of some models, with the values.

    Args:
        models: name of a model to its properties; all models have the same.
    """
    properties = list(next(iter(models.values())))
    figure = new_figure(2.3 * len(properties) + 0.6, 0.34 * len(models) + 0.75)
    panels = figure.subplots(1, len(properties), sharey=True, squeeze=False).flat
    for axes, name in zip(panels, properties, strict=True):
        values = [properties_of[name] for properties_of in models.values()]
        bars = axes.barh(list(models), values, 0.7, color=PALETTE[: len(models)])
        axes.bar_label(bars, [short_number(value) for value in values], padding=3, fontsize=8, color=INK)
        style_axes(axes, name)
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
    """Probabilities of several models for the same samples, as groups of bars; at most the ten likeliest classes.

    Args:
        probabilities: name of a model to its probabilities; the first decides which classes are shown.
        names: the classes' names, in order.
        titles: a title for each sample.
        ylabel: meaning of the bars.
        images: pictures of the samples, shown next to their bars.
    """
    first, *_ = probabilities.values()
    figure, columns = new_figure(7.4, 1.75 * len(titles) + 0.5), 1 + (images is not None)
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
        style_axes(axes, title)
        labels = [repr(names[number])[1:-1] for number in classes]
        labels = [label if len(label) <= 10 else f"{label[:9]}…" for label in labels]
        axes.set_xticks(range(len(classes)), labels)
    figure.supxlabel("class", fontsize=9, color=GREY)
    figure.supylabel(ylabel, fontsize=9, color=GREY)
    handles, labels = figure.axes[-1].get_legend_handles_labels()
    place = {"loc": "outside upper right", "ncols": len(handles)}
    figure.legend(handles, labels, fontsize=9, labelcolor=GREY, frameon=False, **place)
    return figure
