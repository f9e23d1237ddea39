"""Heads give a regression net's outputs their meaning: a mean, a normal distribution, or quantiles.

YAML names a head (``model.head``). Outputs have an ensemble axis, of size 1 for a single net. The loss is the mean over
the members; each head says how it combines the members into one prediction. Targets and outputs are standardized. Of
several targets each is a sample to the head.
"""

from collections.abc import Sequence
from statistics import NormalDist

import torch
import torch.nn.functional as F
import torchmetrics.functional as metrics
from jaxtyping import Float
from torch import Tensor

from common.errors import InputError
from common.losses import precise


class Head:
    """The loss of a net's outputs, and the prediction that they make.

    Attributes:
        num_outputs: number of outputs per sample, member and target.
    """

    num_outputs: int

    def loss(
        self, outputs: Float[Tensor, "batch members outputs"], target: Float[Tensor, " batch"]
    ) -> Float[Tensor, ""]:
        """Mean loss over samples and members, in at least fp32."""
        raise NotImplementedError

    def predict(self, outputs: Float[Tensor, "batch members outputs"]) -> Float[Tensor, "batch values"]:
        """The prediction of each sample and, if the head gives intervals, the lower and upper end."""
        raise NotImplementedError


def scores(
    target: Float[Tensor, "samples"], preds: Float[Tensor, "samples"], *interval: Float[Tensor, "samples"]
) -> dict[str, Float[Tensor, ""]]:
    """Errors in the target's units, the share of variance explained, and how well intervals contain the targets.

    Args:
        target: true values.
        preds: predictions.
        interval: lower and upper ends of the prediction intervals, or nothing.

    Returns:
        ``mse``, ``rmse``, ``mae``; ``r2`` for two samples or more; with intervals ``coverage``, the share of targets
        inside, and the mean ``interval_width``.
    """
    mse = metrics.mean_squared_error(preds, target)
    values = {"mse": mse, "rmse": mse.sqrt(), "mae": metrics.mean_absolute_error(preds, target)}
    if len(target) > 1:
        values["r2"] = metrics.r2_score(preds, target)
    if interval:
        lower, upper = interval
        values["coverage"] = ((lower <= target) & (target <= upper)).to(target.dtype).mean()
        values["interval_width"] = (upper - lower).mean()
    return values


class Mean(Head):
    """The conditional mean, trained with the squared error; of an ensemble, the mean of the members' means."""

    num_outputs = 1

    def loss(  # noqa: D102
        self, outputs: Float[Tensor, "batch members outputs"], target: Float[Tensor, " batch"]
    ) -> Float[Tensor, ""]:
        return (precise(outputs)[..., 0] - target[:, None]).square().mean()

    def predict(self, outputs: Float[Tensor, "batch members outputs"]) -> Float[Tensor, "batch values"]:  # noqa: D102
        return precise(outputs).mean(1)


class Gaussian(Head):
    """Mean and logarithm of the variance of a normal distribution, trained with its negative log-likelihood in nats.

    The mixture of the members has the mean of their means. Its variance is the mean of their variances plus the
    variance of their means (Lakshminarayanan et al., https://arxiv.org/abs/1612.01474, section 2.4).

    Args:
        level: share of targets that the prediction interval should contain, in (0, 1).
    """

    num_outputs = 2

    def __init__(self, level: float = 0.9):
        if not 0 < level < 1:
            raise InputError(f"model.head.level must be between 0 and 1, got {level}")
        self.level = level

    def loss(  # noqa: D102
        self, outputs: Float[Tensor, "batch members outputs"], target: Float[Tensor, " batch"]
    ) -> Float[Tensor, ""]:
        mean, log_variance = precise(outputs).unbind(-1)
        return F.gaussian_nll_loss(mean, target[:, None].expand_as(mean), log_variance.exp(), full=True)

    def predict(self, outputs: Float[Tensor, "batch members outputs"]) -> Float[Tensor, "batch values"]:  # noqa: D102
        means, log_variances = precise(outputs).unbind(-1)
        mean = means.mean(1)
        variance = log_variances.exp().mean(1) + means.var(1, correction=0)
        half = variance.sqrt() * NormalDist().inv_cdf((1 + self.level) / 2)
        return torch.stack([mean, mean - half, mean + half], -1)


class Quantiles(Head):
    """Quantiles, trained with the pinball loss (Koenker and Bassett, https://doi.org/10.2307/1913643).

    The prediction is the median. The interval goes from the first to the last quantile; their difference is the share
    of targets that it should contain. An ensemble's quantile is the mean of the members' quantiles, not a quantile of
    their mixture. Crossing quantiles are sorted.

    Args:
        quantiles: ascending, between 0 and 1, with 0.5 among them.
    """

    def __init__(self, quantiles: Sequence[float] = (0.05, 0.5, 0.95)):
        if not all(0 < q < 1 for q in quantiles) or sorted(set(quantiles)) != list(quantiles):
            raise InputError(f"model.head.quantiles must ascend between 0 and 1, got {list(quantiles)}")
        if 0.5 not in quantiles[1:-1]:
            problem = "must have 0.5, the prediction, between others, the interval's ends"
            raise InputError(f"model.head.quantiles {problem}, got {list(quantiles)}")
        self.quantiles, self.num_outputs = quantiles, len(quantiles)

    def loss(  # noqa: D102
        self, outputs: Float[Tensor, "batch members outputs"], target: Float[Tensor, " batch"]
    ) -> Float[Tensor, ""]:
        error = target[:, None, None] - precise(outputs)
        quantiles = torch.tensor(self.quantiles, dtype=error.dtype).to(error.device, non_blocking=True)
        return torch.maximum(quantiles * error, (quantiles - 1) * error).mean()

    def predict(self, outputs: Float[Tensor, "batch members outputs"]) -> Float[Tensor, "batch values"]:  # noqa: D102
        ordered = precise(outputs).mean(1).sort(-1).values
        return ordered[:, [list(self.quantiles).index(0.5), 0, -1]]
