"""Pictures of samples, of the tasks' weights, and of the angles between their gradients."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from common.data import read_batch
from common.figures import (
    GREY,
    INK,
    PALETTE,
    Series,
    captioned_images,
    new_figure,
    plot_lines,
    read_metrics,
    style_axes,
)
from common.module import evaluating
from common.parts import has_whole_gradients

from .gradients import cosines, task_gradients
from .tasks import describe, task_losses

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def gradient_angles(cosine: Float[Tensor, "batches tasks tasks"], names: Sequence[str]) -> "Figure":
    """Conflicts between the tasks' gradients: the mean cosine of each two, and how often it is negative.

    Args:
        cosine: cosines of the angles between the tasks' gradients, for some batches.
        names: the tasks' names, in order.
    """
    values = cosine.float().cpu().numpy()
    mean, against = values.mean(axis=0), (values < 0).mean(axis=0)
    size = max(0.85 * len(names), 2.4)
    figure = new_figure(size + 2.1, size + 1)
    axes = figure.add_subplot()
    image = axes.imshow(mean, cmap="RdBu", vmin=-1, vmax=1)
    style_axes(axes, f"cosines between gradients, {len(values)} batches", "task", "task")
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
        The figure; None if the weights did not change.
    """
    lines = {name: series[f"optim/weight_{name}"] for name in names if f"optim/weight_{name}" in series}
    if not lines or all(len(set(values)) < 2 for _, values in lines.values()):
        return None
    figure = new_figure(4.4, 2.9)
    axes = figure.add_subplot()
    style_axes(axes, "weights of the tasks", "step", "weight (1: plain mean)")
    plot_lines(axes, lines, PALETTE * len(lines))
    axes.legend(fontsize=8, labelcolor=GREY, frameon=False)
    return figure


def task_media(module: Any, stage: str, conflict_batches: int) -> "dict[str, Figure]":
    """Pictures of a multi-task module: samples with predictions, weights, and angles between gradients.

    Args:
        module: the recipe's module.
        stage: the stage of the data.
        conflict_batches: number of batches for the angles, in evaluation mode; 0 for no picture of angles. A strategy
            that shards the parameters has none either.
    """
    trainer, tasks, net = module.trainer, module.tasks, module.net
    names = [task["name"] for task in tasks]
    media: dict[str, Any] = {}
    with evaluating(net):
        batch = read_batch(trainer, stage, 0, 12)
        with torch.no_grad():
            outputs, _ = net(**batch.inputs)
        if (images := batch.inputs.get("pixel_values")) is not None:
            read_off = [describe(task, outputs[task["name"]], batch.target[task["name"]]) for task in tasks]
            captions = ["\n".join(lines) for lines in zip(*(lines for lines, _ in read_off), strict=True)]
            right = [all(good) for good in zip(*(good for _, good in read_off), strict=True)]
            media["samples"] = captioned_images(images, captions, right, "target → prediction, orange: a wrong class")
        if conflict_batches and len(tasks) > 1 and has_whole_gradients(trainer.strategy):
            size, found = trainer.datamodule.batch_size, []
            end = min(conflict_batches * size, len(getattr(trainer.datamodule, f"{stage}_data")))
            params = [p for p in net.body.parameters() if p.requires_grad]
            # Evaluation has switched gradients off.
            with torch.inference_mode(False), torch.enable_grad():
                for first in range(0, end, size):
                    batch = read_batch(trainer, stage, first, size)
                    losses = task_losses(tasks, net(**batch.inputs)[0], batch.target)
                    found.append(cosines(task_gradients(losses, params, torch.ones_like(losses))))
            media["angles"] = gradient_angles(torch.stack(found), names)
    weights = task_weights(read_metrics(module.run_dir), names) if stage == "val" else None
    return media if weights is None else {**media, "weights": weights}
