"""Distances between a student and its teacher: losses of logits and of inner layers."""

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import override

from common.errors import InputError
from common.losses import precise


class LogitLoss:
    """Distance between a student's logits and its teacher's: a mean over items, in at least fp32."""

    temperature = 1.0

    def __call__(
        self,
        logits: Float[Tensor, "items classes"],
        teacher: Float[Tensor, "*items teacher_classes"],
        counts: Bool[Tensor, " items"],
    ) -> Float[Tensor, ""]:
        """The mean over the items that count.

        Raises:
            InputError: the teacher has another number of classes.
        """
        if logits.shape[-1] != teacher.shape[-1]:
            problem = f"gives {teacher.shape[-1]} logits, but there are {logits.shape[-1]} classes"
            raise InputError(f"model.teacher {problem}; take a net whose first argument decides their number")
        losses = self.of_items(precise(logits), precise(teacher.flatten(0, -2)))
        return losses.where(counts, 0.0).sum() / counts.sum()

    def of_items(
        self, logits: Float[Tensor, "items classes"], teacher: Float[Tensor, "items classes"]
    ) -> Float[Tensor, " items"]:
        """The loss of each item."""
        raise NotImplementedError


class SoftTargets(LogitLoss):
    """Divergence of softened probabilities, T² KL(teacher ‖ student), in nats.

    Hinton et al. 2015 (https://arxiv.org/abs/1503.02531, section 2). The factor T² keeps the size of the gradient when
    the temperature changes. The loss is their cross-entropy less a constant: a perfect student has 0.

    Args:
        temperature: T, the divisor of both logits; above 0.
    """

    def __init__(self, temperature: float = 4.0):
        if not 0 < temperature < float("inf"):
            raise InputError(f"model.loss.temperature must be above 0, got {temperature}; 2 to 8 are usual")
        self.temperature = temperature

    @override
    def of_items(
        self, logits: Float[Tensor, "items classes"], teacher: Float[Tensor, "items classes"]
    ) -> Float[Tensor, " items"]:
        ours, theirs = (F.log_softmax(values / self.temperature, -1) for values in (logits, teacher))
        return self.temperature**2 * F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)


class LogitError(LogitLoss):
    """Mean squared difference of the logits over classes (Ba & Caruana 2014, https://arxiv.org/abs/1312.6184)."""

    @override
    def of_items(
        self, logits: Float[Tensor, "items classes"], teacher: Float[Tensor, "items classes"]
    ) -> Float[Tensor, " items"]:
        return (logits - teacher).square().mean(-1)


class FeatureLoss:
    """Distance between a layer of a student and one of its teacher, without parameters; widths may differ."""

    def __call__(
        self, student: Float[Tensor, "batch *student"], teacher: Float[Tensor, "batch *teacher"]
    ) -> Float[Tensor, ""]:
        """The mean over samples, or pairs of samples.

        Args:
            student: (batch, channels, height, width) of a convolution, or (batch, time, width) of hidden states.
            teacher: the same for the teacher's layer.
        """
        raise NotImplementedError


class AttentionTransfer(FeatureLoss):
    """Squared distance of normalized attention maps.

    A map is the mean of squares over channels at each place, normalized to length 1 (Zagoruyko & Komodakis 2017,
    https://arxiv.org/abs/1612.03928, equation 2 with p = 2, squared as in their code). Both layers need the same
    places. Padding of texts counts as places.
    """

    @override
    def __call__(
        self, student: Float[Tensor, "batch *student"], teacher: Float[Tensor, "batch *teacher"]
    ) -> Float[Tensor, ""]:
        """The mean over samples, in [0, 2].

        Raises:
            InputError: height and width, or time, differ, or a layer has none.
        """
        ours, theirs = _attention(student), _attention(teacher)
        if ours.shape != theirs.shape:
            shapes = f"{tuple(ours.shape[1:])} and {tuple(theirs.shape[1:])}"
            raise InputError(f"model.features: a pair has {shapes} places; pair layers with the same height and width")
        return (F.normalize(ours.flatten(1)) - F.normalize(theirs.flatten(1))).square().sum(1).mean()


def _attention(values: Tensor) -> Tensor:
    if values.ndim not in (3, 4):
        fix = "name one before pooling, or take SimilarityPreserving"
        raise InputError(f"model.features: a layer gives {tuple(values.shape[1:])}, which has no places; {fix}")
    return precise(values).square().mean(1 if values.ndim == 4 else 2)


class SimilarityPreserving(FeatureLoss):
    """Squared difference of the similarities between samples.

    Similarities are the Gram matrix of the flattened layer with rows of length 1 (Tung & Mori 2019,
    https://arxiv.org/abs/1907.09682, equation 4). They compare the samples of one micro-batch on one rank. So, unlike
    the other losses here, this one changes with the number of ranks and of accumulated micro-batches.
    """

    @override
    def __call__(
        self, student: Float[Tensor, "batch *student"], teacher: Float[Tensor, "batch *teacher"]
    ) -> Float[Tensor, ""]:
        """The sum over pairs of samples, divided by the squared number of samples."""
        flat = [precise(values).flatten(1) for values in (student, teacher)]
        ours, theirs = (F.normalize(values @ values.T) for values in flat)
        return (ours - theirs).square().sum() / len(student) ** 2
