"""What has a class decides the loss, the scores, the pictures and the predictions; ``model.objective`` names one.

A sample has one class (:class:`OneLabel`), or any number of labels (:class:`SeveralLabels`), or each of its words has a
tag (:class:`WordTags`).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torchmetrics.functional.classification as scores
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics import classification as metrics
from typing_extensions import override

from common.errors import InputError
from common.losses import cross_entropy, item_cross_entropy, precise
from common.module import EvaluatedRows
from common.sources.files import Labels

from .entities import EntityCounts, precision_recall_f1, types_of
from .pictures import confusion_matrix, label_bars


class Objective:
    """The loss of a net's outputs, and what they mean.

    Attributes:
        labels: what has a class.
    """

    labels: Labels

    def check(self, labels: Labels, names: Sequence[str]) -> None:
        """Check that the data have such labels.

        Raises:
            InputError: they have others.
        """
        if labels != self.labels:
            fit = {each.labels: each.__name__ for each in (OneLabel, SeveralLabels, WordTags)}
            there = {"one": "one class per sample", "several": "several labels per sample", "words": "a tag per word"}
            problem = f"the data have {there[labels]}, and {type(self).__name__} is for {there[self.labels]}"
            raise InputError(f"model.objective: {problem}; take {fit[labels]}")

    def balance(self, counts: Int64[Tensor, " classes"], samples: int) -> Float[Tensor, " classes"]:
        """A weight for each class that makes up for its share.

        Args:
            counts: how often training samples have each class.
            samples: training samples.
        """
        return counts.sum() / (len(counts) * counts)

    def loss(
        self,
        logits: Float[Tensor, "batch *classes"],
        target: Int64[Tensor, "batch *positions"],
        weight: Float[Tensor, " classes"] | None = None,
        label_smoothing: float = 0.0,
    ) -> Float[Tensor, ""]:
        """Mean loss over samples, in at least fp32: batches of equal size weigh alike."""
        raise NotImplementedError

    def item_losses(
        self, logits: Float[Tensor, "batch *classes"], target: Int64[Tensor, "batch *positions"]
    ) -> Float[Tensor, " batch"]:
        """The loss of each sample, without weights."""
        raise NotImplementedError

    def probabilities(self, logits: Float[Tensor, "batch *classes"]) -> Float[Tensor, "batch *classes"]:
        """Of each class, in at least fp32."""
        return precise(logits).softmax(-1)

    def mean_of_members(self, logits: Float[Tensor, "batch members classes"]) -> Float[Tensor, "batch classes"]:
        """Logits of the mean of an ensemble's probabilities (https://arxiv.org/abs/2410.24210)."""
        return precise(logits).log_softmax(-1).logsumexp(1) - math.log(logits.shape[1])

    def outcomes(self, names: Sequence[str]) -> Any:
        """A metric that keeps what :meth:`scores` and :meth:`pictures` need of all samples."""
        raise NotImplementedError

    def update(
        self,
        outcomes: Any,
        probabilities: Float[Tensor, "batch *classes"],
        target: Int64[Tensor, "batch *positions"],
        mask: Bool[Tensor, " batch"],
    ) -> None:
        """Count the samples of a batch that ``mask`` names."""
        if mask.any():
            outcomes.update(probabilities[mask], target[mask])

    def scores(self, outcome: Any, names: Sequence[str], each: bool) -> dict[str, Tensor]:
        """Scores by name, of what :meth:`outcomes` has computed; with ``each`` also one for each label, if of use."""
        raise NotImplementedError

    def pictures(self, outcome: Any, names: Sequence[str]) -> dict[str, Any]:
        """Figures by name."""
        raise NotImplementedError

    def predictions(
        self,
        probabilities: Float[Tensor, "batch *classes"],
        target: Int64[Tensor, "batch *positions"],
        names: list[str],
    ) -> dict[str, list[Any]]:
        """Columns of the table that ``predict`` writes; those of the true labels only if they are known."""
        raise NotImplementedError


class OneLabel(Objective):
    """One class per sample, with cross-entropy."""

    labels = "one"

    @override
    def loss(
        self, logits: Tensor, target: Tensor, weight: Tensor | None = None, label_smoothing: float = 0.0
    ) -> Tensor:
        return cross_entropy(logits, target, weight, label_smoothing)

    @override
    def item_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        return item_cross_entropy(logits, target)

    @override
    def outcomes(self, names: Sequence[str]) -> MetricCollection:
        classes = len(names)
        return MetricCollection({
            "accuracy": metrics.MulticlassAccuracy(classes, average="micro"),
            "precision": metrics.MulticlassPrecision(classes),
            "recall": metrics.MulticlassRecall(classes),
            "f1": metrics.MulticlassF1Score(classes),
            "auroc": metrics.MulticlassAUROC(classes, thresholds=200),
            "calibration_error": metrics.MulticlassCalibrationError(classes),
            "confusion": metrics.MulticlassConfusionMatrix(classes),
        })  # fmt: skip

    @override
    def scores(self, outcome: dict[str, Tensor], names: Sequence[str], each: bool) -> dict[str, Tensor]:
        return {name: value for name, value in outcome.items() if name != "confusion"}

    @override
    def pictures(self, outcome: dict[str, Tensor], names: Sequence[str]) -> dict[str, Any]:
        return {"confusion_matrix": confusion_matrix(outcome["confusion"], names)}

    @override
    def predictions(self, probabilities: Tensor, target: Tensor, names: list[str]) -> dict[str, list[Any]]:
        known = {"target": [names[number] for number in target.tolist()]} if -1 not in target else {}
        best = [names[number] for number in probabilities.argmax(-1).tolist()]
        return {**known, "prediction": best, **_columns(probabilities, names)}


class SeveralLabels(Objective):
    """Any number of labels per sample, each with a binary cross-entropy of its own.

    Scores are means over labels, but for ``f1_micro`` and ``subset_accuracy``. Labels that no sample of a part has, or
    all have, do not count in ``average_precision`` and ``auroc``.

    Args:
        threshold: probability above which a sample gets a label.
    """

    labels = "several"

    def __init__(self, threshold: float = 0.5):
        if not 0 < threshold < 1:
            raise InputError(f"model.objective.threshold must be between 0 and 1, got {threshold}")
        self.threshold = threshold

    @override
    def balance(self, counts: Tensor, samples: int) -> Tensor:
        return (samples - counts) / counts  # of samples that have the label

    @override
    def loss(
        self, logits: Tensor, target: Tensor, weight: Tensor | None = None, label_smoothing: float = 0.0
    ) -> Tensor:
        logits = precise(logits)
        wanted = target.to(logits.dtype) * (1 - label_smoothing) + label_smoothing / 2
        weight = None if weight is None else weight.to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, wanted, pos_weight=weight)

    @override
    def item_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        logits = precise(logits)
        return F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="none").mean(1)

    @override
    def probabilities(self, logits: Tensor) -> Tensor:
        return precise(logits).sigmoid()

    @override
    def mean_of_members(self, logits: Tensor) -> Tensor:
        yes, no = (F.logsigmoid(sign * precise(logits)).logsumexp(1) for sign in (1, -1))
        return yes - no

    @override
    def outcomes(self, names: Sequence[str]) -> EvaluatedRows:
        return EvaluatedRows()

    @override
    def update(self, outcomes: Any, probabilities: Tensor, target: Tensor, mask: Tensor) -> None:
        outcomes.update(torch.cat([probabilities, target, mask[:, None]], 1))  # a rank without samples would hang

    def _split(self, outcome: Tensor) -> tuple[Tensor, Tensor]:
        return (rows := outcome[outcome[:, -1] == 1, :-1]).chunk(2, 1)[0], rows.chunk(2, 1)[1].long()

    @override
    def scores(self, outcome: Tensor, names: Sequence[str], each: bool) -> dict[str, Tensor]:
        probabilities, target = self._split(outcome)
        given = probabilities, target, len(names)
        f1 = scores.multilabel_f1_score(*given, threshold=self.threshold, average=None)
        values = {
            "subset_accuracy": scores.multilabel_exact_match(*given, threshold=self.threshold),
            "f1": f1.mean(),
            "f1_micro": scores.multilabel_f1_score(*given, threshold=self.threshold, average="micro"),
        }
        differ = [number for number in range(len(names)) if len(target[:, number].unique()) > 1]
        for name, score in (("average_precision", scores.binary_average_precision), ("auroc", scores.binary_auroc)):
            if differ:
                values[name] = torch.stack([score(probabilities[:, n], target[:, n]) for n in differ]).mean()
        return values | {f"f1({name})": value for name, value in zip(names, f1, strict=True) if each}

    @override
    def pictures(self, outcome: Tensor, names: Sequence[str]) -> dict[str, Any]:
        probabilities, target = self._split(outcome)
        given = probabilities > self.threshold
        return {"labels": label_bars(torch.stack([given & (target > 0), given, target > 0], -1).sum(0), names)}

    @override
    def predictions(self, probabilities: Tensor, target: Tensor, names: list[str]) -> dict[str, list[Any]]:
        def chosen(rows: Tensor) -> list[list[str]]:
            return [[name for name, has in zip(names, row, strict=True) if has] for row in rows.tolist()]

        known = {"target": chosen(target > 0)} if -1 not in target else {}
        return {**known, "prediction": chosen(probabilities > self.threshold), **_columns(probabilities, names)}


class WordTags(Objective):
    """A tag per word in the BIO scheme, with cross-entropy: the mean over a text's words, and then over texts.

    Precision, recall and F1 are those of entities, see :mod:`entities`; accuracy is that of words.
    """

    labels = "words"

    @override
    def check(self, labels: Labels, names: Sequence[str]) -> None:
        super().check(labels, names)
        if wrong := next((name for name in names if name != "O" and name[:2] not in ("B-", "I-")), None):
            raise InputError(f"data.source: has the tag {wrong!r}; write O, B-type or I-type (the BIO scheme)")

    @override
    def loss(
        self, logits: Tensor, target: Tensor, weight: Tensor | None = None, label_smoothing: float = 0.0
    ) -> Tensor:
        logits, counts = precise(logits), target != -100
        weight = None if weight is None else weight.to(logits.dtype)
        losses = F.cross_entropy(logits.mT, target, weight, reduction="none", label_smoothing=label_smoothing)
        return (losses.sum(1) / counts.sum(1)).mean()

    @override
    def item_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        return item_cross_entropy(logits, target).sum(1) / (target != -100).sum(1)

    @override
    def outcomes(self, names: Sequence[str]) -> EntityCounts:
        return EntityCounts(names)

    @override
    def scores(self, outcome: dict[str, Tensor], names: Sequence[str], each: bool) -> dict[str, Tensor]:
        right, words = outcome["words"]
        precision, recall, f1 = precision_recall_f1(outcome["entities"].sum(0))
        values = {"accuracy": right / words, "precision": precision, "recall": recall, "f1": f1}
        of_each = zip(types_of(names), precision_recall_f1(outcome["entities"])[2], strict=True)
        return values | {f"f1({name})": value for name, value in of_each if each}

    @override
    def pictures(self, outcome: dict[str, Tensor], names: Sequence[str]) -> dict[str, Any]:
        return {"entities": label_bars(outcome["entities"], types_of(names))}

    @override
    def predictions(self, probabilities: Tensor, target: Tensor, names: list[str]) -> dict[str, list[Any]]:
        def tags(rows: Tensor) -> list[list[str]]:
            pairs = zip(rows.tolist(), target.tolist(), strict=True)
            return [[names[n] for n, there in zip(*pair, strict=True) if there != -100] for pair in pairs]

        known = {"target": tags(target)} if -1 not in target else {}
        return {**known, "prediction": tags(probabilities.argmax(-1))}


def _columns(probabilities: Float[Tensor, "batch classes"], names: Sequence[str]) -> dict[str, list[float]]:
    return {f"p({name})": column for name, column in zip(names, probabilities.T.tolist(), strict=True)}
