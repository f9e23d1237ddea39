"""Losses that stay exact at low precision and under accumulation, and their records."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from common.errors import InputError


def precise(values: Tensor) -> Tensor:
    """The values in at least fp32."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def cross_entropy(
    logits: Float[Tensor, "items classes"],
    target: Int64[Tensor, " items"],
    weight: Float[Tensor, " classes"] | None = None,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Mean cross-entropy in nats over the items whose target is not -100, computed in at least fp32.

    With class weights torch divides by the batch's sum of weights, so micro-batches and ranks would have different
    denominators. Here the denominator is the number of items.

    Args:
        logits: unnormalized log-probabilities.
        target: class numbers; -100 for items that do not count.
        weight: factor on the loss of each class.
        label_smoothing: share of the target spread over all classes (https://arxiv.org/abs/1512.00567).

    Returns:
        The mean; NaN if no item counts.
    """
    logits = precise(logits)
    if weight is None:
        return F.cross_entropy(logits, target, label_smoothing=label_smoothing)
    total = F.cross_entropy(logits, target, weight.to(logits.dtype), reduction="sum", label_smoothing=label_smoothing)
    return total / (target != -100).sum()


def item_cross_entropy(
    logits: Float[Tensor, "*items classes"], target: Int64[Tensor, "*items"]
) -> Float[Tensor, "*items"]:
    """Cross-entropy of each item in nats, 0 where its target is -100, computed in at least fp32."""
    return F.cross_entropy(precise(logits).flatten(0, -2), target.flatten(), reduction="none").view(target.shape)


def window_losses(
    logits: Float[Tensor, "batch time vocab"], target: Int64[Tensor, "batch time"]
) -> tuple[Float[Tensor, " batch"], Int64[Tensor, " batch"]]:
    """The sum of each window's losses in nats, and its number of targets other than -100."""
    return item_cross_entropy(logits, target).sum(1), (target != -100).sum(1)


class HighestLosses:
    """Positions of the samples of an evaluation whose losses are the highest, and these.

    Args:
        count: how many are kept at most.
    """

    def __init__(self, count: int = 12):
        self.count = count
        self.clear()

    def clear(self) -> None:
        """Forget all."""
        self.losses, self.positions = torch.empty(0), torch.empty(0, dtype=torch.int64)

    def add(self, losses: Float[Tensor, " samples"], positions: Int64[Tensor, " samples"]) -> None:
        """Take samples into account; losses that are no number come last."""
        losses = torch.cat([self.losses.to(losses.device), precise(losses.detach()).nan_to_num(-math.inf)])
        positions = torch.cat([self.positions.to(losses.device), positions.to(losses.device)])
        self.losses, chosen = losses.topk(min(self.count, len(losses)))
        self.positions = positions[chosen]


class StepLosses:
    """Losses of micro-batches, kept on the device until a row is logged: to read each one would stall the device."""

    def __init__(self) -> None:
        self._kept: list[tuple[int, Tensor]] = []
        self._restored = 0  # how many of the first ones are means over ranks

    def add(self, step: int, loss: Float[Tensor, ""]) -> None:
        """Keep the loss of a micro-batch of an optimizer step."""
        self._kept.append((step, loss))

    def state(self, strategy: Strategy) -> dict[int, Tensor]:
        """What a checkpoint keeps of them: the means over ranks of each step. Raises as :meth:`check` does."""
        losses: dict[int, list[Tensor]] = {}
        for (step, _), loss in zip(self._kept, self.check(strategy).cpu(), strict=True):
            losses.setdefault(step, []).append(loss)
        return {step: torch.stack(values) for step, values in losses.items()}

    def restore(self, state: dict[int, Tensor], device: torch.device) -> None:
        """Go on from a checkpoint's :meth:`state`."""
        self._kept = [(step, loss) for step, losses in state.items() for loss in losses.to(device)]
        self._restored = len(self._kept)

    def take(self, strategy: Strategy) -> Float[Tensor, ""]:
        """The mean over micro-batches and ranks; clears the losses. Raises as :meth:`check` does."""
        if not self._kept:
            raise RuntimeError("no loss was counted since the last row; a training_step of your own calls count_loss")
        losses = self.check(strategy)
        self._kept.clear()
        self._restored = 0
        return losses.mean()

    def check(self, strategy: Strategy) -> Float[Tensor, " losses"]:
        """The losses, averaged over ranks; every rank must call it.

        Raises:
            InputError: a loss is not finite.
        """
        if not self._kept:
            return torch.empty(0)
        losses = torch.stack([loss for _, loss in self._kept])
        means, own = losses[: self._restored], losses[self._restored :]  # the mean of means may differ by a bit
        losses = torch.cat([means, torch.as_tensor(strategy.reduce(own, reduce_op="mean"))]) if len(own) else means
        bad = (~losses.isfinite()).nonzero().flatten().tolist()
        if bad:
            raise InputError(
                f"train/loss is {losses[bad[0]].item()} at step {self._kept[bad[0]][0]}: lower model.optimizer.lr, "
                "warm up longer or set trainer.gradient_clip_val; earlier checkpoints are intact"
            )
        return losses


def text_scores(stage: str, loss: Float[Tensor, ""], bytes_per_token: float) -> dict[str, Tensor]:
    """Perplexity and bits per byte of a mean loss in nats per token, by their logged names."""
    return {f"{stage}/perplexity": loss.exp(), f"{stage}/bits_per_byte": loss / math.log(2) / bytes_per_token}
