"""The module: one net for several tasks, with weighted losses or aggregated gradients, and metrics of each task."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torchjd.aggregation import Aggregator
from typing_extensions import override

from common.errors import InputError
from common.module import BaseModule, Stage

from .data import Batch
from .gradients import Balance, make_aggregator
from .net import MultiTaskNet
from .pictures import task_media
from .tasks import Task, TaskMetrics, check_tasks, describe, sample_losses, task_columns, task_losses
from .weighting import Weighting


class MultiTaskModule(BaseModule):
    """A shared body with a head per task. ``train/loss`` and ``val/loss`` are the plain mean over tasks.

    Args:
        net: the body by class path: any net whose first argument is the width of its output.
        tasks: name, kind and width of each task; comes from the data.
        weighting: weights of the tasks' losses, by name: ``Fixed``, ``Uncertainty``, ``DynamicWeightAverage`` or
            ``FAMO``.
        aggregator: aggregates the tasks' gradients for the body, by class path: one of ``torchjd.aggregation``; None
            for the gradient of the weighted loss. It costs a backward pass per task, and ranks exchange every task's
            gradient; strategies that shard gradients are refused.
        features: width of the body's output, the input of each head.
        conflict_batches: validation batches for the picture of the angles between the tasks' gradients; 0 for none.
        kwargs: of :class:`common.module.BaseModule`.
    """

    def __init__(
        self,
        net: Callable[[int], nn.Module],
        tasks: list[Task],
        weighting: Callable[[list[Task]], Weighting],
        aggregator: Callable[[], Aggregator] | None = None,
        features: int = 128,
        conflict_batches: int = 8,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        for key, value, least in (("features", features, 1), ("conflict_batches", conflict_batches, 0)):
            if value < least:
                raise InputError(f"model.{key} must be at least {least}, got {value}")
        check_tasks(tasks)
        self.tasks, self.features, self.conflict_batches = tasks, features, conflict_batches
        self.make_net, self.make_weighting = net, weighting
        self.aggregator = None if aggregator is None else make_aggregator(aggregator, weighting(tasks))
        self.metrics: Any = nn.ModuleDict({stage: TaskMetrics(tasks) for stage in ("val", "test")})

    @override
    def build_net(self) -> nn.Module:
        return MultiTaskNet(self.make_net(self.features), self.features, self.tasks, self.make_weighting(self.tasks))

    @override
    def on_fit_start(self) -> None:
        self.balance = Balance(self, self.aggregator)

    def forward(self, batch: Batch) -> dict[str, Float[Tensor, "batch _"]]:
        """Output of each task's head: logits, or real numbers."""
        return self.net(**batch.inputs)[0]

    @override
    def shared_step(self, batch: Batch, stage: Stage) -> tuple[Tensor, Tensor]:
        losses, _ = self.task_step(batch, stage)
        return losses.mean(), batch.mask.sum()

    def task_step(self, batch: Batch, stage: Stage) -> tuple[Float[Tensor, " tasks"], Float[Tensor, " tasks"]]:
        """The mean loss of each task, and what the weighting makes its weights of; updates the stage's metrics."""
        outputs, state = self.net(**batch.inputs)
        target = batch.target
        if stage != "train":
            outputs, target = ({name: v[batch.mask] for name, v in values.items()} for values in (outputs, target))
        losses = task_losses(self.tasks, outputs, target)
        if stage != "train":
            self.metrics[stage].update(losses, outputs, target)
            self.note_losses(sample_losses(self.tasks, outputs, target))
            self.log_dict(self.metrics[stage].named(stage), prog_bar=False)
        return losses, state

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        losses, state = self.task_step(batch, "train")
        self.count_loss(losses.mean())
        self._batch = batch  # for weightings that look back
        return self.balance.loss(losses, state)

    @override
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self.balance.backward(loss, *args, **kwargs)

    @override
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.balance.look_back(self._losses_again)

    def _losses_again(self) -> Tensor:
        self.seed_micro_batch()  # repeats the random numbers of the first pass
        return task_losses(self.tasks, self(self._batch), self._batch.target)

    @override
    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if self.writes_row:
            self.log_dict(self.balance.logs())
        super().on_train_batch_end(outputs, batch, batch_idx)

    @override
    def captions(self, batch: Batch) -> list[str]:
        outputs = self(batch)
        lines = [describe(task, outputs[task["name"]], batch.target[task["name"]])[0] for task in self.tasks]
        return ["\n".join(each) for each in zip(*lines, strict=True)]

    @override
    def media(self, stage: str) -> dict[str, Any]:
        return task_media(self, stage, self.conflict_batches)

    @override
    def predict_step(self, batch: Batch) -> dict[str, list[Any]]:
        outputs, columns = self(batch), {"index": batch.index[batch.mask].tolist()}
        for task in self.tasks:
            given, wanted = (values[task["name"]][batch.mask] for values in (outputs, batch.target))
            names = self.facts.get("task_classes", {}).get(task["name"], ())  # of others numbers are written
            columns |= task_columns(task, given, wanted, names)
        return columns
