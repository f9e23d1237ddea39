"""Tasks of different kinds on the same inputs: their batches, losses, metrics and predictions."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from common.errors import InputError, nearest
from common.losses import cross_entropy, item_cross_entropy, precise
from common.module import WeightedMean

METRIC = {"classification": "accuracy", "regression": "rmse"}


class Task(TypedDict):
    """A task: predict one of ``width`` classes, or ``width`` real numbers."""

    name: str
    kind: Literal["classification", "regression"]
    width: int


def choose(known: Sequence[Task], names: Sequence[str]) -> list[Task]:
    """The tasks of these names, in the order of the names.

    Raises:
        InputError: there is no name, a name occurs twice, or no task has it.
    """
    tasks = {task["name"]: task for task in known}
    if not names:
        raise InputError(f"data.tasks is empty; choose from {', '.join(tasks)}")
    for name in names:
        if name not in tasks:
            hint = nearest(name, tasks) or f"; choose from {', '.join(tasks)}"
            raise InputError(f"data.tasks: no task is named {name!r}{hint}")
        if names.count(name) > 1:
            raise InputError(f"data.tasks names {name!r} twice; remove one")
    return [tasks[name] for name in names]


def check_tasks(tasks: Sequence[Task]) -> None:
    """Check that a net can be made for these tasks.

    Raises:
        InputError: there is no task, a name occurs twice or cannot name a head, or a kind or width is wrong.
    """
    names = [task["name"] for task in tasks]
    if not tasks:
        raise InputError("data.tasks is empty; there must be at least one task")
    for task in tasks:
        name, kind, width = task["name"], task["kind"], task["width"]
        if not name.isidentifier() or hasattr(nn.ModuleDict, name) or names.count(name) > 1:
            raise InputError(f"data.tasks: {name!r} stands twice or cannot name a head; rename it in data.py")
        if kind not in METRIC or width < (2 if kind == "classification" else 1):
            raise InputError(f"data.tasks: {name!r} is {kind} of width {width}; see Task in tasks.py")


def task_loss(task: Task, output: Tensor, target: Tensor) -> Float[Tensor, ""]:
    """Mean cross-entropy in nats, or mean squared error, over samples; computed in at least fp32."""
    if task["kind"] == "classification":
        return cross_entropy(output, target)
    output = precise(output)
    return F.mse_loss(output, target.to(output.dtype))


def task_losses(
    tasks: Sequence[Task], outputs: Mapping[str, Tensor], target: Mapping[str, Tensor]
) -> Float[Tensor, " tasks"]:
    """Mean loss of each task."""
    return torch.stack([task_loss(task, outputs[task["name"]], target[task["name"]]) for task in tasks])


def sample_losses(
    tasks: Sequence[Task], outputs: Mapping[str, Tensor], target: Mapping[str, Tensor]
) -> Float[Tensor, " batch"]:
    """Mean over tasks of each sample's loss."""

    def of(task: Task, output: Tensor, wanted: Tensor) -> Float[Tensor, " batch"]:
        if task["kind"] == "classification":
            return item_cross_entropy(output, wanted)
        return (precise(output) - wanted).square().mean(1)

    return torch.stack([of(task, outputs[task["name"]], target[task["name"]]) for task in tasks]).mean(0)


class TaskBatch(NamedTuple):
    """Keyword arguments of the net, each task's target, positions of the samples, and a mask of real ones.

    A target holds class numbers (batch,) or real numbers (batch, width).
    """

    inputs: Mapping[str, Tensor]
    target: Mapping[str, Tensor]
    index: Int64[Tensor, " batch"]
    mask: Bool[Tensor, " batch"]


class TaskDataset(Dataset[TaskBatch]):
    """Reads batches of samples.

    Args:
        inputs: keyword arguments of the net: tensors of shape (samples, …), or what gives them for positions.
        target: target of each task, see :class:`TaskBatch`.
        tasks: the tasks.
        decodes: whether reading is work for a loader's workers.

    Raises:
        InputError: a task has no target, or its target has another shape or unknown classes.
    """

    def __init__(
        self,
        inputs: Mapping[str, Any],
        target: Mapping[str, Tensor],
        tasks: Sequence[Task],
        decodes: bool = False,
    ):
        self.inputs, self.target, self.decodes = inputs, target, decodes
        for task in tasks:
            name, width = task["name"], task["width"]
            if name not in target:
                raise InputError(f"data: task {name!r} has no target{nearest(name, target)}; mend data.py")
            values = target[name]
            # With another shape torch would broadcast and compare each output with each target.
            wanted = (len(self),) if task["kind"] == "classification" else (len(self), width)
            if tuple(values.shape) != wanted:
                problem = f"target of task {name!r} has the shape {tuple(values.shape)}, not {wanted}"
                raise InputError(f"data: {problem}; mend data.py")
            if task["kind"] == "classification" and not 0 <= values.min() <= values.max() < width:
                problem = f"task {name!r} has classes from {values.min()} to {values.max()} and width {width}"
                raise InputError(f"data: {problem}; mend data.py")

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def __getitem__(self, indices: Sequence[int]) -> TaskBatch:
        index = torch.tensor(indices)
        inputs, target = ({name: v[index] for name, v in values.items()} for values in (self.inputs, self.target))
        return TaskBatch(inputs, target, index, torch.ones(len(indices), dtype=torch.bool))


class RootMean(WeightedMean):
    """The square root of a mean."""

    @override
    def compute(self) -> Tensor:
        return super().compute().sqrt()


class TaskMetrics(nn.Module):
    """Loss of each task, and its accuracy or root mean squared error.

    Args:
        tasks: the tasks.
    """

    def __init__(self, tasks: Sequence[Task]):
        super().__init__()
        self.tasks = tasks
        self.losses: Any = nn.ModuleDict({task["name"]: WeightedMean() for task in tasks})
        self.scores: Any = nn.ModuleDict({
            task["name"]: MulticlassAccuracy(task["width"], average="micro")
            if task["kind"] == "classification"
            else RootMean()
            for task in tasks
        })  # fmt: skip

    def update(
        self,
        losses: Float[Tensor, " tasks"],
        outputs: Mapping[str, Tensor],
        target: Mapping[str, Tensor],
    ) -> None:
        """Count the real samples of a batch; there may be none."""
        for task, loss in zip(self.tasks, losses, strict=True):
            name = task["name"]
            if count := len(target[name]):
                self.losses[name].update(loss, torch.tensor(count, device=loss.device))
                output, wanted = precise(outputs[name]), target[name]
                if task["kind"] == "classification":
                    self.scores[name].update(output, wanted)
                else:
                    squares = (output - wanted.to(output.dtype)).square()
                    self.scores[name].update(squares.mean(), torch.tensor(count, device=loss.device))

    def named(self, stage: str) -> dict[str, Any]:
        """The metrics by their logged names, such as ``val/accuracy_left``."""
        scores = {f"{stage}/{METRIC[task['kind']]}_{task['name']}": self.scores[task["name"]] for task in self.tasks}
        return scores | {f"{stage}/loss_{name}": loss for name, loss in self.losses.items()}


def task_columns(task: Task, output: Tensor, target: Tensor, names: Sequence[str] = ()) -> dict[str, list[Any]]:
    """Columns of a table: target and prediction of a task for each sample.

    Args:
        task: the task.
        output: output of its head, (batch, width).
        target: class numbers (batch,) or real numbers (batch, width).
        names: of the classes; numbers are written where there are none.
    """
    name = task["name"]
    if task["kind"] == "classification":
        sure, best = output.float().softmax(-1).max(-1)
        both = ([names[n] for n in numbers] if names else numbers for numbers in (target.tolist(), best.tolist()))
        return dict(zip((name, f"{name}_prediction"), both, strict=True)) | {f"{name}_probability": sure.tolist()}
    parts = [name] if task["width"] == 1 else [f"{name}{number}" for number in range(task["width"])]
    both = zip(parts, target.T.tolist(), output.float().T.tolist(), strict=True)
    return {
        key: values for part, wanted, given in both for key, values in ((part, wanted), (f"{part}_prediction", given))
    }


def describe(task: Task, output: Tensor, target: Tensor) -> tuple[list[str], list[bool]]:
    """A line per sample with target and prediction, and whether it is right; real numbers always count as right."""
    name = task["name"]
    if task["kind"] == "classification":
        pairs = list(zip(target.tolist(), output.argmax(-1).tolist(), strict=True))
        return [f"{name} {wanted} → {given}" for wanted, given in pairs], [wanted == given for wanted, given in pairs]

    def text(numbers: list[float]) -> str:
        return ", ".join(f"{number:.3g}" for number in numbers[:3]) + (" …" if len(numbers) > 3 else "")

    pairs = zip(target.tolist(), output.float().tolist(), strict=True)
    return [f"{name} {text(wanted)} → {text(given)}" for wanted, given in pairs], [True] * len(target)
