"""One gradient per task, and what aggregators of torchjd make of them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torchjd import Stateful
from torchjd.aggregation import Aggregator, ConFIG, FairGrad, GradDrop, PCGrad, Sum, WeightedAggregator
from torchjd.linalg import DualConeProjector

from common.data import global_seed, read_batch, step_seed
from common.errors import InputError
from common.losses import precise
from common.module import evaluating
from common.multitask import MultiTaskNet, Weighting
from common.strategies.sharding import has_whole_gradients, take_over_gradients
from common.tasks import describe, task_losses

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class NNLSProjector(DualConeProjector):
    """Solves torchjd's projection onto the dual cone exactly, with scipy: UPGrad without quadprog.

    The least v with v ≥ u of vᵀGv is u + x with x ≥ 0 of least |Aᵀx + Aᵀu| where AAᵀ = G: non-negative least squares.
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
    """The gradient of each loss with respect to all parameters in a row, times the loss's scale."""
    rows = []
    for factor in scale.diag():
        parts = torch.autograd.grad(
            losses, params, factor, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


# Of gradients that do not conflict these give the sum, and not their mean as the others do.
SUMMING = (ConFIG, FairGrad, GradDrop, PCGrad, Sum)


class TaskGradients:
    """Collects a gradient per task over the micro-batches of a step, and lets torchjd make one of them.

    The body's parameters get the aggregate of the tasks' gradients, all others the gradient of the loss. Gradients are
    averaged over micro-batches and ranks before they are aggregated, so that the result is that of one large batch; for
    that, ranks exchange as many gradients as there are tasks. What sums up gradients is divided by their number, as the
    loss, and with it the gradient of each head, is a mean over tasks: with ``torchjd.aggregation.Mean`` or ``Sum`` the
    result is the gradient of the loss.

    Args:
        aggregator: of torchjd.
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
            loss: what would be differentiated: scaled for AMP and by the number of micro-batches.
            losses: the tasks' losses that it was made of.
        """
        # What each loss counts in the loss: its weight / tasks / micro-batches, times AMP's factor.
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
            average: the mean of a tensor over ranks.
            seed: for aggregators that draw random numbers, the same on all ranks.
            scale: AMP's factor, which aggregators must not see.

        Returns:
            The weight of each task's gradient, with mean 1 for the plain mean, if the aggregator has weights.
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
        # Overflown gradients are for AMP or the check of the weights to find; solvers would fail.
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
    """Cosine of the angle between each two gradients; below 0 they are in conflict (https://arxiv.org/abs/2001.06782)."""
    rows = F.normalize(precise(gradients))
    return rows @ rows.T


def task_media(module: Any, stage: str, conflict_batches: int) -> "dict[str, Figure]":
    """Pictures of a multi-task module: samples with what it makes of them, weights, and angles between gradients.

    Args:
        module: with ``tasks`` and ``net``.
        stage: whose data is shown.
        conflict_batches: how many batches angles are computed on, in evaluation mode; 0 for no such picture. There is
            none either where a strategy shards the parameters.
    """
    from common import report

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
            media["samples"] = report.captioned_images(
                images, captions, right, "target → prediction, orange: a wrong class"
            )
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
            media["angles"] = report.gradient_angles(torch.stack(found), names)
    weights = (
        report.task_weights(report.read_metrics(Path(trainer.default_root_dir)), names) if stage == "val" else None
    )
    return media if weights is None else {**media, "weights": weights}


def make_aggregator(make: Callable[[], Aggregator], weighting: Weighting) -> Aggregator:
    """The aggregator that a config names.

    Raises:
        InputError: its arguments are wrong, its packages are missing, it does not go with the weighting, or it
            remembers earlier steps, of which no checkpoint would know.
    """
    try:
        aggregator = make()
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"model.aggregator: {error}") from error
    name = type(aggregator).__name__
    if not weighting.fixed:
        problem = f"{name} does not go with model.weighting {type(weighting).__name__}, which moves by itself"
        raise InputError(f"model.aggregator: {problem}; take common.multitask.Fixed")
    if 0 in weighting().tolist():  # a row of zeros is a task that conflicts with none and cannot be made better
        problem = f"{name} would take a task of weight 0 for one that is trained"
        raise InputError(f"model.weighting.weights: {problem}; leave it out of data.tasks")
    if any(isinstance(part, Stateful) for part in aggregator.modules()):
        problem = f"{name} remembers earlier steps, which no checkpoint would hold"
        raise InputError(f"model.aggregator: {problem}; take another, such as torchjd.aggregation.PCGrad")
    return aggregator


class Balance:
    """How the losses of the tasks become gradients in a run: weighted, or each by itself and then aggregated.

    Args:
        trainer: of the run, whose strategy has set up the net.
        net: the net, in whatever the strategy wraps it.
        aggregator: of torchjd; None for the gradient of the weighted loss.

    Raises:
        InputError: the strategy shards gradients, and an aggregator needs them whole.
    """

    def __init__(self, trainer: L.Trainer, net: Any, aggregator: Aggregator | None):
        self.trainer, self.net, self.weighting = trainer, net, net.weighting
        self.gradients = None
        if aggregator is not None:
            take_over_gradients(trainer.strategy, net, "model.aggregator")
            self.gradients = TaskGradients(aggregator, net)

    def _everywhere(self, values: Tensor) -> Tensor:
        """The mean over ranks."""
        return self.trainer.strategy.reduce(values.clone(), reduce_op="mean")  # type: ignore[return-value]

    @property
    def _steps(self) -> bool:
        """Whether this micro-batch is the last of an optimizer step."""
        return not self.trainer.fit_loop._should_accumulate()

    def loss(self, losses: Float[Tensor, " tasks"], state: Float[Tensor, " tasks"]) -> Float[Tensor, ""]:
        """The loss of a micro-batch to minimize.

        Args:
            losses: of the tasks.
            state: what the net has returned beside its outputs.
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
        """Differentiate the loss as Lightning scales it, or its tasks one by one."""
        if self.gradients is None:
            loss.backward(*args, **kwargs)
        else:
            self.gradients.add(loss, self.losses)
            if self._steps:
                scaler: Any = getattr(self.trainer.precision_plugin, "scaler", None)
                seed = step_seed(global_seed(), self.trainer.global_step)
                weights = self.gradients.finish(self._everywhere, seed, scaler.get_scale() if scaler else 1.0)
                self.used = self.used if weights is None else weights
        self.losses = self.seen  # frees the graph

    def look_back(self, losses: Callable[[], Float[Tensor, " tasks"]]) -> None:
        """After an optimizer step, tell the weighting the losses of the same batch if it wants to know them.

        Args:
            losses: computes them.
        """
        if self.weighting.looks_back and self._steps:
            before = [(buffer, buffer.clone()) for buffer in self.net.buffers()]  # batch norm has seen the batch
            with torch.no_grad(), self.trainer.precision_plugin.forward_context():
                after = losses()
                for buffer, value in before:
                    buffer.copy_(value)
                self.weighting.look_back(self.seen, self._everywhere(after))

    def logs(self) -> dict[str, Tensor]:
        """Losses and weights of the last micro-batch, averaged over ranks, by the names that they are logged under."""
        both = self._everywhere(torch.stack([self.seen, self.used.to(self.seen)]))
        keys = ("train/loss_", "optim/weight_")
        return {
            f"{key}{n}": v
            for key, row in zip(keys, both, strict=True)
            for n, v in zip(self.weighting.names, row, strict=True)
        }
