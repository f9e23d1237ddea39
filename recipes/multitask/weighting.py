"""Weights of the tasks' losses: constant, or adapted in training.

YAML names a weighting (``model.weighting``). The loss is the weighted mean over tasks, so neither the learning rate nor
clipping depends on the number of tasks.
"""

import math
from collections.abc import Callable
from typing import ClassVar

import torch
import torch._functorch.config
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from common.errors import InputError, nearest

from .tasks import Task

EPS = 1e-8


class Weighting(nn.Module):
    """Weights of the tasks' losses. A subclass overrides :meth:`forward`, and other methods as it needs them.

    Learned values are parameters, remembered ones are buffers from :meth:`remember`; the checkpoint holds both. A
    weighting is a part of the net: :meth:`forward` runs inside the net's, where a sharding strategy has the parameters
    whole.

    Args:
        tasks: the tasks, in order; come from the data.
    """

    fixed: ClassVar[bool] = False  # the weights never change, so an aggregator may use the weighted losses
    needs_losses: ClassVar[bool] = False  # it needs the losses of all ranks before backward
    looks_back: ClassVar[bool] = False  # it needs the losses of the same batch after the optimizer's step

    def __init__(self, tasks: list[Task]):
        super().__init__()
        self.names = [task["name"] for task in tasks]

    def remember(self, name: str, value: Tensor) -> None:
        """Register a buffer in fp64 (fp32 on MPS) that 16-bit precisions do not cast."""
        self.register_buffer(name, value.float() if torch.backends.mps.is_available() else value.double())

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Weighting":
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, value in before.items():
            if value is not None and (after := self._buffers[name]) is not None:
                self._buffers[name] = value.to(after.device)
        return self

    def forward(self) -> Float[Tensor, " tasks"]:
        """The state that :meth:`weights` needs, as a new tensor."""
        raise NotImplementedError

    def weights(self, state: Float[Tensor, " tasks"], losses: Float[Tensor, " tasks"]) -> Float[Tensor, " tasks"]:
        """The weights; their mean over tasks is 1 unless a subclass says otherwise.

        Args:
            state: the result of :meth:`forward`.
            losses: of this micro-batch, over all ranks if ``needs_losses``; without gradient.
        """
        return state

    def combine(
        self, losses: Float[Tensor, " tasks"], weights: Float[Tensor, " tasks"], state: Float[Tensor, " tasks"]
    ) -> Float[Tensor, ""]:
        """The loss to minimize."""
        return (weights * losses).mean()

    def observe(self, losses: Float[Tensor, " tasks"], ends_epoch: bool) -> None:
        """Take note of a micro-batch's losses over all ranks, if ``needs_losses``.

        Args:
            losses: of the micro-batch, without gradient.
            ends_epoch: whether it is the last of an epoch.
        """

    def look_back(self, before: Float[Tensor, " tasks"], after: Float[Tensor, " tasks"]) -> None:
        """Take note of the losses of one batch before and after the optimizer's step, if ``looks_back``."""


class Fixed(Weighting):
    """Constant weights.

    Args:
        tasks: the tasks; come from the data.
        weights: a weight for each task; None for 1 each, the plain mean of the losses.

    Raises:
        InputError: a weight is missing or negative, a name is no task's, or all weights are 0.
    """

    fixed = True
    values: Tensor

    def __init__(self, tasks: list[Task], weights: dict[str, float] | None = None):
        super().__init__(tasks)
        given = dict.fromkeys(self.names, 1.0) if weights is None else weights
        for name in given:
            if name not in self.names:
                hint = nearest(name, self.names) or f"; there are {', '.join(self.names)}"
                raise InputError(f"model.weighting.weights: no task is named {name!r}{hint}")
        for name in self.names:
            if name not in given:
                raise InputError(f"model.weighting.weights: task {name!r} has none; give it one, 0 to leave it out")
            if not 0 <= given[name] < math.inf:
                raise InputError(f"model.weighting.weights: that of {name!r} must be at least 0, got {given[name]}")
        if not any(given.values()):
            raise InputError("model.weighting.weights: all are 0, there is nothing to train; raise one")
        self.given = [given[name] for name in self.names]
        self.remember("values", torch.tensor(self.given))

    def forward(self) -> Float[Tensor, " tasks"]:
        """The weights."""
        return self.values.clone()


class Uncertainty(Weighting):
    """Weights by the learned noise of each task (Kendall et al. 2018, https://arxiv.org/abs/1705.07115).

    With s the logarithm of a task's variance, its loss L becomes exp(-s) L / 2 + s / 2 for regression and
    exp(-s) L + s / 2 for classification (section 3.2). The s are parameters of the net, without weight decay.

    Args:
        tasks: the tasks; come from the data.
        initial: s of every task at the start.
    """

    factor: Tensor

    def __init__(self, tasks: list[Task], initial: float = 0.0):
        super().__init__(tasks)
        if not math.isfinite(initial):
            raise InputError(f"model.weighting.initial must be a finite log-variance, got {initial}; try 0.0")
        self.log_variance = nn.Parameter(torch.full((len(tasks),), float(initial)))
        self.remember("factor", torch.tensor([0.5 if task["kind"] == "regression" else 1.0 for task in tasks]))

    def forward(self) -> Float[Tensor, " tasks"]:
        """The logarithms of the variances."""
        return self.log_variance.clone()

    @override
    def weights(self, state: Float[Tensor, " tasks"], losses: Float[Tensor, " tasks"]) -> Float[Tensor, " tasks"]:
        return self.factor * (-state).exp()

    @override
    def combine(
        self, losses: Float[Tensor, " tasks"], weights: Float[Tensor, " tasks"], state: Float[Tensor, " tasks"]
    ) -> Float[Tensor, ""]:
        return (weights * losses + state / 2).mean()


class DynamicWeightAverage(Weighting):
    """Weights by how fast each loss falls from epoch to epoch (Liu et al. 2019, https://arxiv.org/abs/1803.10704).

    The weights of epoch t are the number of tasks times softmax(r / temperature); r is the mean loss of epoch t - 1
    divided by the mean loss of epoch t - 2. In the first two epochs the weights are 1.

    Args:
        tasks: the tasks; come from the data.
        temperature: above 0; the larger, the more equal the weights.
    """

    needs_losses = True
    total: Tensor
    count: Tensor
    means: Tensor
    epochs: Tensor

    def __init__(self, tasks: list[Task], temperature: float = 2.0):
        super().__init__(tasks)
        if not 0 < temperature < math.inf:
            raise InputError(f"model.weighting.temperature must be above 0, got {temperature}; the paper has 2.0")
        self.temperature = temperature
        self.remember("total", torch.zeros(len(tasks)))  # of this epoch's losses so far
        self.remember("count", torch.zeros(()))  # and their number
        self.remember("means", torch.ones(2, len(tasks)))  # of the last two epochs, the older first
        self.remember("epochs", torch.zeros(()))

    def forward(self) -> Float[Tensor, " tasks"]:
        """The weights."""
        older, newer = self.means
        weights = len(self.names) * (newer / older.clamp_min(EPS) / self.temperature).softmax(0)
        return torch.where(self.epochs >= 2, weights, torch.ones_like(weights))

    @override
    def observe(self, losses: Float[Tensor, " tasks"], ends_epoch: bool) -> None:
        self.total += losses
        self.count += 1
        if ends_epoch:
            self.means.copy_(torch.stack([self.means[1], self.total / self.count]))
            self.epochs += 1
            self.total.zero_()
            self.count.zero_()


class FAMO(Weighting):
    """Weights that let all losses fall at the same rate (Liu et al. 2023, https://arxiv.org/abs/2306.03792).

    The net descends along the gradient of c Σ z log L. z is the softmax of learned logits; c makes the weights c z / L
    add up to 1, here to the number of tasks. After each optimizer step, a forward pass over the last micro-batch
    measures how much each log L has fallen, and Adam updates the logits by it. With accumulation each micro-batch has
    weights from its own losses.

    Args:
        tasks: the tasks; come from the data. Their losses must be positive.
        lr: learning rate of the logits.
        weight_decay: of the logits (gamma in the paper).
    """

    needs_losses = looks_back = True
    logits: Tensor
    mean: Tensor
    square: Tensor
    steps: Tensor

    def __init__(self, tasks: list[Task], lr: float = 0.025, weight_decay: float = 1e-3):
        super().__init__(tasks)
        if not 0 < lr < math.inf:
            raise InputError(f"model.weighting.lr must be above 0, got {lr}; the paper has 0.025")
        if not 0 <= weight_decay < math.inf:
            raise InputError(
                f"model.weighting.weight_decay must be at least 0, got {weight_decay}; the paper has 0.001"
            )
        self.lr, self.weight_decay = lr, weight_decay
        for name in ("logits", "mean", "square"):
            self.remember(name, torch.zeros(len(tasks)))
        self.remember("steps", torch.zeros(()))

    def forward(self) -> Float[Tensor, " tasks"]:
        """The shares z of the tasks."""
        return self.logits.softmax(0)

    @override
    def weights(self, state: Float[Tensor, " tasks"], losses: Float[Tensor, " tasks"]) -> Float[Tensor, " tasks"]:
        share = state / (losses + EPS)
        return len(self.names) * share / share.sum()

    @override
    def look_back(self, before: Float[Tensor, " tasks"], after: Float[Tensor, " tasks"]) -> None:
        fall = (before.to(self.logits) + EPS).log() - (after.to(self.logits) + EPS).log()  # FSDP1 casts buffers to fp32
        z = self.logits.softmax(0)
        gradient = z * (fall - (z * fall).sum()) + self.weight_decay * self.logits
        # Adam with its usual settings, as in the authors' code.
        self.steps += 1
        self.mean.lerp_(gradient, 1 - 0.9)
        self.square.lerp_(gradient.square(), 1 - 0.999)
        mean, square = self.mean / (1 - 0.9**self.steps), self.square / (1 - 0.999**self.steps)
        self.logits -= self.lr * mean / (square.sqrt() + EPS)
