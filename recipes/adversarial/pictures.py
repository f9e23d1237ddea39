"""Pictures of attacked images, and of accuracy against the radius of the attack."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxtyping import Float, Int
from torch import Tensor

from common.figures import GREY, INK, PALETTE, new_figure, style_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .attacks import UnderAttack


def adversarial_examples(
    clean: Float[Tensor, "samples channels height width"],
    target: Int[Tensor, "samples"],
    found: "UnderAttack",
    names: Sequence[str],
    columns: int = 8,
) -> "Figure":
    """Rows of clean images, the attack's changes, and attacked images, with the class and both predictions.

    Images that the attack turned from right to wrong come first. In the middle row grey is no change, and the largest
    change is black or white; the row's label gives the scale.

    Args:
        clean: images.
        target: class of each image.
        found: the result of the attack on them.
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
    figure = new_figure(1.05 * len(chosen) + 0.8, 4.1)
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
    """Accuracy under attack over the radius of the attack; it must fall to about 0 for large radii.

    A curve that stays up shows that gradients mislead the attack; it is no proof of robustness (Athalye et al. 2018,
    https://arxiv.org/abs/1802.00420).

    Args:
        eps: radii, ascending, in units of the inputs.
        accuracy: share of samples that stay right, in [0, 1].
        marked: the radius that the run reports.
    """
    figure = new_figure(4.4, 3.0)
    axes = figure.add_subplot()
    style_axes(axes, "accuracy under attack", "radius of the attack, eps", "share of right predictions")
    axes.grid(color="#e8e8e8", lw=0.7)
    axes.plot(eps, accuracy, color=PALETTE[0], lw=1.6, marker="o", ms=4)
    axes.axvline(marked, color="#888888", lw=1, ls=":", label=f"eps {marked:g}")
    axes.set_ylim(0, 1.02)
    axes.set_xlim(left=0)
    axes.legend(fontsize=8, labelcolor=GREY, frameon=False)
    return figure
