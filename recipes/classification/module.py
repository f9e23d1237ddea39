"""The module: a classifier trained with cross-entropy, and its metrics."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics import classification as metrics
from typing_extensions import override

from common.errors import InputError
from common.losses import cross_entropy
from common.module import BaseModule, Stage
from common.nets import body_of
from common.sources.labelled import augmented

from .data import Batch
from .pictures import confusion_matrix


class ClassificationModule(BaseModule):
    """A net that maps inputs to class logits, trained with cross-entropy.

    Args:
        net: the net by class path; its first argument, the number of classes, comes from the data.
        class_names: a name for each class; comes from the data.
        augmentation: kornia augmentations of the images, applied on the device in training.
        label_smoothing: share of the target spread over all classes (https://arxiv.org/abs/1512.00567).
        balance_classes: weigh each class by the inverse of its share of the training samples.
        body_lr_scale: factor on the learning rate of the net's ``body``, for fine-tuning.
        kwargs: of :class:`common.module.BaseModule`.
    """

    def __init__(
        self,
        net: Callable[[int], nn.Module],
        class_names: list[str],
        augmentation: list[nn.Module] | None = None,
        label_smoothing: float = 0.0,
        balance_classes: bool = False,
        body_lr_scale: float = 1.0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if not 0 <= label_smoothing < 1:
            raise InputError(f"model.label_smoothing must be in [0, 1), got {label_smoothing}")
        self.make_net, self.class_names, self.label_smoothing = net, class_names, label_smoothing
        self.augmentation = nn.Sequential(*augmentation or [])
        self.body_lr_scale = body_lr_scale
        classes = len(class_names)
        self.class_weight: Tensor | None
        self.register_buffer("class_weight", torch.ones(classes) if balance_classes else None)
        collection = MetricCollection({
            "accuracy": metrics.MulticlassAccuracy(classes, average="micro"),
            "precision": metrics.MulticlassPrecision(classes),
            "recall": metrics.MulticlassRecall(classes),
            "f1": metrics.MulticlassF1Score(classes),
            "auroc": metrics.MulticlassAUROC(classes, thresholds=200),
            "calibration_error": metrics.MulticlassCalibrationError(classes),
        })  # fmt: skip
        self.metrics: Any = nn.ModuleDict({stage: collection.clone(prefix=f"{stage}/") for stage in ("val", "test")})
        self.confusion: Any = metrics.MulticlassConfusionMatrix(classes)

    @override
    def setup(self, stage: str) -> None:
        if stage == "fit" and self.class_weight is not None:
            counts = self.data.class_counts()
            if not counts.all():
                name = self.class_names[int(counts.argmin())]
                raise InputError(f"model.balance_classes: class {name!r} has no training sample; set it to false")
            self.class_weight.copy_(counts.sum() / (len(counts) * counts))

    @override
    def build_net(self) -> nn.Module:
        net = self.make_net(len(self.class_names))
        self.lr_scales = {body_of(net): self.body_lr_scale}
        return net

    def forward(self, batch: Batch) -> Float[Tensor, "batch classes"]:
        """Logits of each class; a net of transformers wraps them."""
        output = self.net(**batch.inputs)
        return output if isinstance(output, Tensor) else output.logits

    @override
    def shared_step(self, batch: Batch, stage: Stage) -> tuple[Tensor, Tensor]:
        if stage == "train":
            batch = augmented(batch, self.augmentation)
            loss = cross_entropy(self(batch), batch.target, self.class_weight, self.label_smoothing)
            return loss, batch.mask.sum()
        logits, target = self(batch)[batch.mask], batch.target[batch.mask]
        if len(target):
            probabilities = logits.float().softmax(-1)
            self.metrics[stage].update(probabilities, target)
            self.confusion.update(probabilities, target)
        self.log_dict(self.metrics[stage], prog_bar=False)
        return cross_entropy(logits, target), batch.mask.sum()

    @override
    def on_evaluation_end(self, stage: Stage) -> None:
        self._counts = self.confusion.compute().cpu()
        self.confusion.reset()

    @override
    def media(self, stage: str) -> dict[str, Any]:
        return {"confusion_matrix": confusion_matrix(self._counts, self.class_names)}

    @override
    def predict_step(self, batch: Batch) -> dict[str, list[Any]]:
        probabilities, target = self(batch)[batch.mask].float().softmax(-1), batch.target[batch.mask].tolist()
        known = {"target": [self.class_names[number] for number in target]} if -1 not in target else {}
        best = [self.class_names[number] for number in probabilities.argmax(-1).tolist()]
        columns = {
            f"p({name})": column for name, column in zip(self.class_names, probabilities.T.tolist(), strict=True)
        }
        return {"index": batch.index[batch.mask].tolist(), **known, "prediction": best, **columns}
