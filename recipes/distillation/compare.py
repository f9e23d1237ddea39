"""Comparison of teacher and student: accuracies, sizes, speeds and predictions."""

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from common.data import read_batch
from common.losses import precise
from common.module import evaluating
from common.sources.labelled import LabelledBatch

from .pictures import model_comparison, soft_targets

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LETTERS = 36  # of the text before a position: with what it goes on with, as wide as the figure


def flat_target(batch: LabelledBatch) -> Int64[Tensor, " items"]:
    """Targets of all samples, or of all their positions, with -100 for padding."""
    padding = ~batch.mask.view(-1, *[1] * (batch.target.ndim - 1))
    return batch.target.masked_fill(padding, -100).flatten()


class Scores(nn.ModuleDict):
    """Accuracies of the student, its teacher and the student alone, and the agreement of student and teacher.

    Args:
        num_classes: number of classes.
        teacher: whether there is a teacher.
        alone: whether there is the same student trained without a teacher.
    """

    def __init__(self, num_classes: int, teacher: bool, alone: bool = False):
        names = ["accuracy", *["teacher_accuracy", "agreement"] * teacher, *["alone_accuracy"] * alone]
        settings: dict[str, Any] = {"average": "micro", "ignore_index": -100, "validate_args": False}
        super().__init__({name: MulticlassAccuracy(num_classes, **settings) for name in names})

    def record(
        self,
        logits: Float[Tensor, "items classes"],
        teacher: Float[Tensor, "*items classes"] | None,
        alone: Float[Tensor, "*items classes"] | None,
        target: Int64[Tensor, " items"],
    ) -> None:
        """Count the items of a batch whose target is not -100, by logits of student, teacher and student alone."""
        preds, metrics = logits.argmax(-1), dict[str, Any](self)
        metrics["accuracy"].update(preds, target)
        if teacher is not None:
            theirs = teacher.argmax(-1).flatten()
            metrics["teacher_accuracy"].update(theirs, target)
            metrics["agreement"].update(preds, theirs.masked_fill(target == -100, -100))
        if alone is not None:
            metrics["alone_accuracy"].update(alone.argmax(-1).flatten(), target)


@torch.no_grad()
def compare_models(module: Any, stage: str, shown: int = 4) -> "dict[str, Figure | str]":
    """Size, speed and accuracy of teacher and student, as a picture and a table, and their softened probabilities.

    With a student alone, the table also says how much of its gap to the teacher is closed.

    Args:
        module: the recipe's module, after an evaluation; the first batch measures the speed.
        stage: the stage of that evaluation.
        shown: number of samples, or positions of samples, to show; the teacher is least sure of these.
    """
    trainer, teacher, alone = module.trainer, module.teacher, module.alone
    names = trainer.datamodule.class_names
    batch = read_batch(trainer, stage, 0, trainer.datamodule.eval_batch_size)
    with evaluating(module.net):
        asks = {"teacher": lambda: teacher(batch.inputs)[0], "student": lambda: module(batch)}
        rows = [("teacher", teacher.num_params, asks["teacher"], "teacher_accuracy")]
        if alone:
            rows.append(("student alone", alone.num_params, lambda: alone(batch.inputs)[0], "alone_accuracy"))
        rows.append(("student", module.num_params, asks["student"], "accuracy"))
        facts = {
            name: {
                "parameters": float(size),
                "size in fp32 (MB)": size * 4e-6,
                "samples / s": _speed(ask, batch.target),
                "accuracy": trainer.callback_metrics[f"{stage}/{metric}"].item(),
            }
            for name, size, ask, metric in rows
        }
        temperature, target = module.loss.temperature, flat_target(batch)
        soft = {name: (precise(ask().flatten(0, -2)) / temperature).softmax(-1) for name, ask in asks.items()}
    entropy = torch.special.entr(soft["teacher"]).sum(-1).masked_fill(target < 0, -1.0)
    places = entropy.topk(min(shown, len(target))).indices
    figure = soft_targets(
        {name: values[places] for name, values in soft.items()},
        names,
        [_title(batch, place, names) for place in places.tolist()],
        f"probability at temperature {temperature:g}",
        batch.inputs["pixel_values"][places] if "pixel_values" in batch.inputs else None,
    )
    table = _table(facts)
    if alone:
        table += f"\n\n{gap_closed(*(each['accuracy'] for each in facts.values()))}"
    return {"models": model_comparison(facts), "models_table": table, "soft_targets": figure}


def gap_closed(teacher: float, alone: float, distilled: float) -> str:
    """How much of the gap between teacher and student alone is closed, in words; the arguments are accuracies."""
    if teacher <= alone:
        return "no gap to close: the student alone is as good as the teacher"
    return f"gap between teacher and student alone: {(distilled - alone) / (teacher - alone):.0%} closed"


def _speed(ask: Callable[[], Tensor], target: Tensor, passes: int = 15) -> float:
    """Samples per second of the fastest pass; other work of the machine slows the others down."""
    times = []
    for _ in range(passes):
        start = time.perf_counter()
        ask()
        if target.device.type == "cuda":
            torch.cuda.synchronize(target.device)
        times.append(time.perf_counter() - start)
    return len(target) / min(times)


def _title(batch: LabelledBatch, place: int, names: list[str]) -> str:
    """The class of a sample; for a position in a text, also the text before it."""
    right = names[int(batch.target.flatten()[place])]
    if batch.target.ndim == 1:
        return f"true class: {right}"
    sample, position = divmod(place, batch.target.shape[1])
    before = batch.inputs["input_ids"][sample, : position + 1][-LETTERS:].tolist()
    return f"…{''.join(names[token] for token in before)[-LETTERS:]!r} goes on with {right!r}"


def _table(facts: Mapping[str, Mapping[str, float]]) -> str:
    head = ["", *next(iter(facts.values()))]
    body = [[name, *(f"{v:,.0f}" if v >= 1000 else f"{v:.4g}" for v in row.values())] for name, row in facts.items()]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *body]
    )


def predictions(
    logits: Float[Tensor, "batch *positions classes"], batch: LabelledBatch, names: list[str]
) -> dict[str, list[Any]]:
    """Index, class, prediction and its probability of each sample; classes of a sample's positions are joined."""
    probability, preds = precise(logits[batch.mask]).softmax(-1).max(-1)

    def spell(numbers: Tensor) -> list[str]:
        return ["".join(names[n] for n in row if n >= 0) for row in numbers.reshape(len(numbers), -1).tolist()]

    known = {"target": spell(batch.target[batch.mask])} if (batch.target >= 0).any() else {}
    return {
        "index": batch.index[batch.mask].tolist(),
        **known,
        "prediction": spell(preds),
        "probability": probability.flatten(1).mean(1).tolist() if probability.ndim > 1 else probability.tolist(),
    }
