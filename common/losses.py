"""Losses that stay exact at low precision and under accumulation, and what is told of them."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor


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

    With class weights torch divides by the sum of weights in the batch, so that micro-batches and ranks would average
    different denominators; here each item counts its weight over the number of items.

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


def text_scores(stage: str, loss: Float[Tensor, ""], bytes_per_token: float) -> dict[str, Tensor]:
    """Perplexity and bits per byte of a mean loss in nats per token, by the names that they are logged under."""
    return {f"{stage}/perplexity": loss.exp(), f"{stage}/bits_per_byte": loss / math.log(2) / bytes_per_token}
