"""One gradient per task, and their aggregation by torchjd."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torchjd import Stateful
from torchjd.aggregation import Aggregator, ConFIG, FairGrad, GradDrop, PCGrad, Sum, WeightedAggregator
from torchjd.linalg import DualConeProjector

from common.data import global_seed, step_seed
from common.errors import InputError
from common.losses import precise
from common.module import BaseModule
from common.parts import take_over_gradients

from .net import MultiTaskNet
from .weighting import Weighting


class NNLSProjector(DualConeProjector):
    """Solves torchjd's projection onto the dual cone exactly, with scipy: UPGrad without quadprog.

    It minimizes vᵀGv over v ≥ u. With G = AAᵀ and v = u + x this is non-negative least squares: the least |Aᵀx + Aᵀu|
    over x ≥ 0.
    """

    def __call__(
        self, U: Float[Tensor, "*rows tasks"], G: Float[Tensor, "tasks tasks"]
    ) -> Float[Tensor, "*rows tasks"]:
        """The weights of the projected rows, see ``torchjd.linalg.DualConeProjector``."""
        from scipy.optimize import nnls

        values, vectors = torch.linalg.eigh((G.double() / G.diagonal().mean().clamp_min(1e-30)).cpu())
        root = (values.clamp_min(0).sqrt()[:, None] * vectors.T).numpy()
        rows = U.double().cpu().reshape(-1, U.shape[-1]).numpy()
        solved = np.stack([row + nnls(root, -root @ row)[0] for row in rows])
        return torch.from_numpy(solved).reshape(U.shape).to(G)


def task_gradients(
    losses: Float[Tensor, " tasks"], params: Sequence[nn.Parameter], scale: Float[Tensor, " tasks"]
) -> Float[Tensor, "tasks elements"]:
    """A row per loss: its gradient with respect to all parameters, times the loss's scale."""
    rows = []
    for factor in scale.diag():
        parts = torch.autograd.grad(
            losses, params, factor, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


# Without conflicts these aggregators give the sum of the gradients; the others give the mean.
SUMMING = (ConFIG, FairGrad, GradDrop, PCGrad, Sum)


class TaskGradients:
    """Collects a gradient per task over the micro-batches of a step; torchjd aggregates them.

    The body's parameters get the aggregate of the tasks' gradients, all others the gradient of the loss. Gradients are
    averaged over micro-batches and ranks before they are aggregated, so one large batch gives the same result; ranks
    exchange one gradient per task. The loss is a mean over tasks, so the result of a summing aggregator is divided by
    their number: ``torchjd.aggregation.Mean`` and ``Sum`` both give the gradient of the loss.

    Args:
        aggregator: an aggregator of torchjd.
        net: the net whose gradients are aggregated.
    """

    def __init__(self, aggregator: Aggregator, net: MultiTaskNet):
        self.aggregator = aggregator
        self.shared = [p for p in net.body.parameters() if p.requires_grad]
        self.own = [p for p in net.heads.parameters() if p.requires_grad]
        self._sum: Tensor | None = None

    def add(self, loss: Float[Tensor, ""], losses: Float[Tensor, " tasks"]) -> None:
        """Take the gradients of a micro-batch.

        Args:
            loss: the combined loss, scaled for AMP and by the number of micro-batches.
            losses: the tasks' losses in it.
        """
        # The factor on each task's loss in the loss: its weight / tasks / micro-batches, times AMP's factor.
        scale = torch.autograd.grad(loss, losses, retain_graph=True)[0]
        rows = task_gradients(losses, self.shared, len(losses) * scale)
        own = torch.autograd.grad(loss, self.own)
        flat = torch.cat([rows.flatten(), *(part.flatten().to(rows.dtype) for part in own)])
        self._sum = flat if self._sum is None else self._sum + flat
        self._tasks = len(losses)

    def finish(
        self, average: Callable[[Tensor], Tensor], seed: int, scale: float = 1.0
    ) -> Float[Tensor, " tasks"] | None:
        """Set the gradients of all parameters for the optimizer's step.

        Args:
            average: gives the mean of a tensor over ranks.
            seed: seed for aggregators that draw random numbers, the same on all ranks.
            scale: AMP's factor; aggregators must not see it.

        Returns:
            The weight of each task's gradient, 1 for the plain mean; None if the aggregator has no weights.
        """
        assert self._sum is not None
        flat, self._sum = average(self._sum), None
        rows = flat[: self._tasks * sum(p.numel() for p in self.shared)].view(self._tasks, -1)
        rows = precise(rows) / scale
        weights: list[Tensor] = []
        hook = None
        if isinstance(self.aggregator, WeightedAggregator):
            hook = self.aggregator.weighting.register_forward_hook(lambda *call: weights.append(call[-1]))
        torch.manual_seed(seed)
        # Leave overflowed gradients to AMP or the finite-weights check; a solver would fail on them.
        parts = self._tasks if isinstance(self.aggregator, SUMMING) else 1
        shared = self.aggregator(rows) / parts if rows.isfinite().all() else rows.mean(0)
        if hook is not None:
            hook.remove()
        gradient = torch.cat([shared.to(flat.dtype) * scale, flat[rows.numel() :]])
        params = [*self.shared, *self.own]
        for p, part in zip(params, gradient.split([p.numel() for p in params]), strict=True):
            p.grad = part.view_as(p).to(p.dtype)
        return self._tasks / parts * weights[0].detach() if weights else None


def cosines(gradients: Float[Tensor, "tasks elements"]) -> Float[Tensor, "tasks tasks"]:
    """Cosine of the angle between any two gradients; below 0 they conflict (https://arxiv.org/abs/2001.06782)."""
    rows = F.normalize(precise(gradients))
    return rows @ rows.T


def make_aggregator(make: Callable[[], Aggregator], weighting: Weighting) -> Aggregator:
    """The aggregator that a config names.

    Raises:
        InputError: its arguments are wrong, its packages are missing, it does not suit the weighting, or it remembers
            earlier steps, which no checkpoint would hold.
    """
    try:
        aggregator = make()
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"model.aggregator: {error}") from error
    name = type(aggregator).__name__
    if not weighting.fixed:
        problem = f"{name} does not go with model.weighting {type(weighting).__name__}, which moves by itself"
        raise InputError(f"model.aggregator: {problem}; take Fixed")
    if 0 in weighting().tolist():  # a row of zeros conflicts with no task and cannot be improved
        problem = f"{name} would take a task of weight 0 for one that is trained"
        raise InputError(f"model.weighting.weights: {problem}; leave it out of data.tasks")
    if any(isinstance(part, Stateful) for part in aggregator.modules()):
        problem = f"{name} remembers earlier steps, which no checkpoint would hold"
        raise InputError(f"model.aggregator: {problem}; take another, such as torchjd.aggregation.PCGrad")
    return aggregator


class Balance:
    """Turns the tasks' losses into gradients: of the weighted loss, or one per task, which are then aggregated.

    Args:
        module: the recipe's module, after the strategy's set-up.
        aggregator: an aggregator of torchjd; None for the gradient of the weighted loss.

    Raises:
        InputError: the strategy shards gradients, and an aggregator needs them whole.
    """

    def __init__(self, module: BaseModule, aggregator: Aggregator | None):
        self.module, self.trainer = module, module.trainer
        self.net: Any = module.net  # in the strategy's wrapper, if any
        self.weighting: Weighting = self.net.weighting
        self.gradients = None
        if aggregator is not None:
            take_over_gradients(self.trainer.strategy, "model.aggregator")
            self.gradients = TaskGradients(aggregator, self.net)

    def _everywhere(self, values: Tensor) -> Tensor:
        """The mean over ranks."""
        return self.trainer.strategy.reduce(values.clone(), reduce_op="mean")  # type: ignore[return-value]

    def loss(self, losses: Float[Tensor, " tasks"], state: Float[Tensor, " tasks"]) -> Float[Tensor, ""]:
        """The loss of a micro-batch to minimize.

        Args:
            losses: the tasks' losses.
            state: the state of the weighting, from the net.
        """
        self.losses, self.seen = losses, losses.detach()
        if self.weighting.needs_losses:
            self.seen = self._everywhere(self.seen)
            progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress
            self.weighting.observe(self.seen, not progress.total.ready % int(self.trainer.num_training_batches))
        weights = self.weighting.weights(state, self.seen).to(losses.dtype)
        self.used = weights.detach()
        return self.weighting.combine(losses, weights, state)

    def backward(self, loss: Float[Tensor, ""], *args: Any, **kwargs: Any) -> None:
        """Differentiate the loss, scaled by Lightning, or its tasks one by one."""
        if self.gradients is None:
            loss.backward(*args, **kwargs)
        else:
            self.gradients.add(loss, self.losses)
            if self.module.ends_step:
                scaler: Any = getattr(self.trainer.precision_plugin, "scaler", None)
                seed = step_seed(global_seed(), self.trainer.global_step)
                weights = self.gradients.finish(self._everywhere, seed, scaler.get_scale() if scaler else 1.0)
                self.used = self.used if weights is None else weights
        self.losses = self.seen  # frees the graph

    def look_back(self, losses: Callable[[], Float[Tensor, " tasks"]]) -> None:
        """After an optimizer step, give the weighting the losses of the same batch if it looks back.

        Args:
            losses: computes these losses.
        """
        if self.weighting.looks_back and self.module.ends_step:
            before = [(buffer, buffer.clone()) for buffer in self.net.buffers()]  # batch norm has counted it
            with torch.no_grad(), self.trainer.precision_plugin.forward_context():
                after = losses()
                for buffer, value in before:
                    buffer.copy_(value)
                self.weighting.look_back(self.seen, self._everywhere(after))

    def logs(self) -> dict[str, Tensor]:
        """Losses and weights of the last micro-batch, averaged over ranks, by their logged names."""
        both = self._everywhere(torch.stack([self.seen, self.used.to(self.seen)]))
        keys = ("train/loss_", "optim/weight_")
        return {
            f"{key}{n}": v
            for key, row in zip(keys, both, strict=True)
            for n, v in zip(self.weighting.names, row, strict=True)
        }
