"""The module: a student learns from labels, from its teacher's logits and, if wanted, from its inner layers."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from common.errors import InputError, speaking_of
from common.losses import cross_entropy, item_cross_entropy
from common.module import BaseModule, Stage
from common.nets import Pretrained, body_of, freeze_blocks
from common.sources.labelled import LabelledDataset, augmented
from common.sources.memory import unlabelled
from common.weights import building, read_nets

from .compare import Scores, compare_models, flat_target, predictions
from .data import Batch
from .losses import AttentionTransfer, FeatureLoss, LogitLoss, SoftTargets
from .teacher import Features, StudentAlone, Teacher, logits_of


class DistillationModule(BaseModule):
    """A student with the loss (1 - alpha) cross-entropy + alpha loss + feature_weight feature_loss.

    Args:
        net: the student by class path, which gets the number of classes; None for that of the weights.
        num_classes: number of classes; comes from the data.
        weights: folder or hub name of a causal net of transformers, the student for ``TextWindows``.
        frozen_blocks: how many of its first blocks stay as they are, and with them the embeddings.
        body_lr_scale: factor on the learning rate of the student's ``body``, for fine-tuning.
        teacher: the teacher, given like ``net``; None trains the student alone.
        teacher_checkpoint: a checkpoint of any recipe with the teacher's weights.
        teacher_training: a config in the recipe's folder that trains the teacher first if there is no checkpoint; None
            for a pretrained teacher.
        alone_checkpoint: a checkpoint of the same student trained without a teacher, for comparison.
        loss: distance between the logits, a class of ``losses.py``.
        alpha: weight of ``loss``; the cross-entropy with the labels has the rest.
        features: pairs of layers, the student's and the teacher's, by their modules' names.
        feature_loss: distance between the layers of a pair, a class of ``losses.py``.
        feature_weight: weight of the sum over pairs.
        augmentation: kornia augmentations of the images; student and teacher see the same.
        kwargs: of :class:`common.module.BaseModule`.
    """

    def __init__(
        self,
        net: Callable[[int], nn.Module] | None,
        num_classes: int,
        weights: str | None = None,
        frozen_blocks: int = 0,
        body_lr_scale: float = 1.0,
        teacher: Callable[[int], nn.Module] | None = None,
        teacher_checkpoint: str | None = None,
        teacher_training: str | None = None,
        alone_checkpoint: str | None = None,
        loss: LogitLoss | None = None,
        alpha: float = 0.9,
        features: list[tuple[str | int, str | int]] | None = None,
        feature_loss: FeatureLoss | None = None,
        feature_weight: float = 1.0,
        augmentation: list[nn.Module] | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if not 0 <= alpha <= 1:
            raise InputError(f"model.alpha must be in [0, 1], got {alpha}")
        if not 0 <= feature_weight < float("inf"):
            raise InputError(f"model.feature_weight must be a number from 0 on, got {feature_weight}")
        for key, path in (("teacher", teacher_checkpoint), ("alone", alone_checkpoint)):
            if path and teacher is None:
                raise InputError(f"model.{key}_checkpoint is given, but model.teacher is null; name the teacher's net")
        if net is not None and weights is not None:
            problem = "model.weights are a net of their own"
            raise InputError(f"model.net: {problem}; add the recipe's pretrained.yaml by --config, or give null")
        if frozen_blocks and weights is None:
            raise InputError("model.frozen_blocks: is for model.weights; give those, or --model.net.freeze true")
        self.make_net, self.make_teacher, self.num_classes = net, teacher, num_classes
        self.weights, self.frozen_blocks, self.body_lr_scale = weights, frozen_blocks, body_lr_scale
        self.teacher_checkpoint, self.alone_checkpoint = teacher_checkpoint, alone_checkpoint
        self.teacher_training = teacher_training
        self.loss, self.alpha = loss or SoftTargets(), alpha
        self.pairs = [(str(ours), str(theirs)) for ours, theirs in features or [] if teacher]
        self.feature_loss, self.feature_weight = feature_loss or AttentionTransfer(), feature_weight
        self.augmentation = nn.Sequential(*augmentation or [])
        self.teacher: Teacher | None = None  # no submodules: not trained, sharded or saved
        self.alone: StudentAlone | None = None
        self.scores: Any = nn.ModuleDict({
            stage: Scores(num_classes, teacher=teacher is not None, alone=alone_checkpoint is not None)
            for stage in ("val", "test")
        })  # fmt: skip

    @override
    def setup(self, stage: str) -> None:
        if self.make_teacher is not None and stage != "predict":
            net, layers = self.make_teacher(self.num_classes), [theirs for _, theirs in self.pairs]
            self.teacher = Teacher(net, self.teacher_checkpoint, self.trainer, layers)
            if self.alone_checkpoint:
                # Its weights follow; the run's own checkpoint describes the net when its folder is gone.
                with building(read_nets(self.init_from or self.of_checkpoint), loads=False):
                    student = self.make_student()
                self.alone = StudentAlone(student, self.alone_checkpoint, self.trainer)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.teacher and self.teacher_checkpoint is None:  # its folder may change
            checkpoint["teacher"] = self.teacher.checksum

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        before = checkpoint.get("teacher")
        if before is None or self._trainer is None or self.trainer.state.fn != "fit" or self.teacher is None:
            return
        if self.teacher_checkpoint is None and self.teacher.checksum != before:
            problem = "its weights are not those that the run has learnt from"
            raise InputError(f"model.teacher: {problem}; put them back, or begin a new run")

    def make_student(self) -> nn.Module:
        """The student's net."""
        if self.make_net is not None:
            return self.make_net(self.num_classes)
        if self.weights is None:
            raise InputError("model.net is null, and there are no model.weights; give one of them")
        with speaking_of("model.weights", instead_of="Pretrained name"):
            return Pretrained(self.num_classes, self.weights, "next token")

    @override
    def build_net(self) -> nn.Module:
        net = self.make_student()
        self.lr_scales = {body_of(net): self.body_lr_scale}
        self.frozen = freeze_blocks(net.model, self.frozen_blocks) if isinstance(net, Pretrained) else []
        self.features = Features(net, [ours for ours, _ in self.pairs])
        return net

    def forward(self, batch: Batch) -> Float[Tensor, "*batch classes"]:
        """Class logits of each sample, or of each of its positions."""
        return logits_of(self.net(**batch.inputs))

    @override
    def shared_step(self, batch: Batch, stage: Stage) -> tuple[Tensor, Tensor]:
        batch = augmented(batch, self.augmentation) if stage == "train" else batch
        logits, target = self(batch).flatten(0, -2), flat_target(batch)
        theirs, layers = self.teacher(batch.inputs) if self.teacher else (None, [])
        loss = cross_entropy(logits, target)
        if stage != "train":
            self.scores[stage].record(logits, theirs, self.alone and self.alone(batch.inputs)[0], target)
            each, known = (
                values.view(len(batch.mask), -1)[batch.mask]
                for values in (item_cross_entropy(logits, target), target != -100)
            )
            self.note_losses(each.sum(1) / known.sum(1))
            self.log_dict({f"{stage}/{name}": metric for name, metric in self.scores[stage].items()})
        elif theirs is not None:
            loss = (1 - self.alpha) * loss + self.alpha * self.loss(logits, theirs, target != -100)
            for pair in zip(self.features.take(), layers, strict=True):
                loss = loss + self.feature_weight * self.feature_loss(*pair)
        return loss, (target != -100).sum()

    @override
    def media(self, stage: str) -> dict[str, Any]:
        return compare_models(self, stage) if self.teacher else {}

    @override
    def encode(self, samples: Any) -> LabelledDataset:
        """Images or texts, see :func:`common.sources.memory.unlabelled`."""
        return unlabelled(samples, self.facts)

    @override
    def predict_step(self, batch: Batch) -> dict[str, list[Any]]:
        return predictions(self(batch), batch, self.facts["class_names"])
