"""The module: a classifier, trained by its objective."""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from common.errors import InputError, speaking_of
from common.module import BaseModule, Stage
from common.nets import body_of
from common.sources.files import Labels
from common.sources.labelled import LabelledDataset, augmented
from common.sources.memory import unlabelled
from common.sources.tables import Columns, cardinalities, frame_of, scaled_quantiles

from .data import Batch
from .objectives import Objective, OneLabel
from .tables import rows_to_predict


class ClassificationModule(BaseModule):
    """A net that maps inputs to class logits, trained with cross-entropy.

    Args:
        net: the net by class path; its first argument, the number of classes, comes from the data. Of a table so do the
            next two, as of the nets of ``common.nets.tables``.
        class_names: a name for each class; comes from the data.
        labels: what has a class; comes from the data.
        columns: facts of a table's columns in the training rows; comes from the data, None for images and texts.
        objective: what the classes are of, by name: ``OneLabel``, ``SeveralLabels`` or ``WordTags``; None for one label
            per sample.
        augmentation: kornia augmentations of the images, applied on the device in training.
        label_smoothing: share of the target spread over all classes (https://arxiv.org/abs/1512.00567); of several
            labels over yes and no.
        balance_classes: weigh each class by the inverse of its share of the training samples; of several labels, yes
            against no.
        body_lr_scale: factor on the learning rate of the net's ``body``, for fine-tuning.
        kwargs: of :class:`common.module.BaseModule`.
    """

    def __init__(
        self,
        net: Callable[[int], nn.Module] | Callable[[int, list[int], Tensor], nn.Module],
        class_names: list[str],
        labels: Labels = "one",
        columns: Columns | None = None,
        objective: Objective | None = None,
        augmentation: list[nn.Module] | None = None,
        label_smoothing: float = 0.0,
        balance_classes: bool = False,
        body_lr_scale: float = 1.0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if not 0 <= label_smoothing < 1:
            raise InputError(f"model.label_smoothing must be in [0, 1), got {label_smoothing}")
        self.class_names, self.columns, self.label_smoothing = class_names, columns, label_smoothing
        self.make_net: Callable[..., nn.Module] = net
        self.of_table = () if columns is None else (cardinalities(columns), scaled_quantiles(columns))
        self.augmentation = nn.Sequential(*augmentation or [])
        self.body_lr_scale = body_lr_scale
        self.class_weight: Tensor | None
        self.register_buffer("class_weight", torch.ones(len(class_names)) if balance_classes else None)
        self.objective = objective or OneLabel()
        self.objective.check(labels, class_names)
        self.outcomes: Any = nn.ModuleDict({stage: self.objective.outcomes(class_names) for stage in ("val", "test")})

    @override
    def setup(self, stage: str) -> None:
        if stage == "fit" and self.class_weight is not None:
            counts = self.data.class_counts()
            if not counts.all():
                name = self.class_names[int(counts.argmin())]
                raise InputError(f"model.balance_classes: class {name!r} has no training sample; set it to false")
            self.class_weight.copy_(self.objective.balance(counts, len(self.data.samples.parts.train)))

    @override
    def build_net(self) -> nn.Module:
        try:
            net = self.make_net(len(self.class_names), *self.of_table)
        except TypeError as error:
            files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
            callers = {"jsonargparse", "jaxtyping"}  # which ask inspect whether the arguments fit
            if any(f != Path(__file__) and f.parent.name not in callers and f.name != "inspect.py" for f in files):
                raise  # a bug in the net's own code
            kind = "tables alone" if self.columns is None else "images or texts"
            raise InputError(f"model.net: may be for {kind}, and data.source is of another kind ({error})") from error
        except (ValueError, ArithmeticError) as error:
            if self.columns is None:
                raise
            raise InputError(f"model.net: {str(error).splitlines()[0]}") from error
        self.lr_scales = {body_of(net): self.body_lr_scale}
        return net

    def forward(self, batch: Batch) -> Float[Tensor, "batch *members_classes"]:
        """Logits of each class, of a table's net for each member; a net of transformers wraps them."""
        output = self.net(**batch.inputs)
        return output if isinstance(output, Tensor) else output.logits

    def logits(self, batch: Batch) -> Float[Tensor, "batch *classes"]:
        """Logits of each class; those of an ensemble give the mean of its members' probabilities."""
        return self(batch) if self.columns is None else self.objective.mean_of_members(self(batch))

    @override
    def shared_step(self, batch: Batch, stage: Stage) -> tuple[Tensor, Tensor]:
        if stage == "train":
            batch = augmented(batch, self.augmentation)
            logits, target = self(batch), batch.target
            if self.columns is not None:  # each member learns by itself
                logits, target = logits.flatten(0, 1), target.repeat_interleave(logits.shape[1], 0)
            loss = self.objective.loss(logits, target, self.class_weight, self.label_smoothing)
            return loss, batch.mask.sum()
        logits = self.logits(batch)
        self.objective.update(self.outcomes[stage], self.objective.probabilities(logits), batch.target, batch.mask)
        self.note_losses(self.objective.item_losses(logits[batch.mask], batch.target[batch.mask]))
        return self.objective.loss(logits[batch.mask], batch.target[batch.mask]), batch.mask.sum()

    @override
    def on_evaluation_end(self, stage: Stage) -> None:
        self._outcome = self.outcomes[stage].compute()
        self.outcomes[stage].reset()
        scores = self.objective.scores(self._outcome, self.class_names, each=stage == "test")
        self.log_dict({f"{stage}/{name}": value for name, value in scores.items()}, sync_dist=True)

    @override
    def media(self, stage: str) -> dict[str, Any]:
        return self.objective.pictures(self._outcome, self.class_names)

    @override
    def encode(self, samples: Any) -> LabelledDataset:
        """Images or texts, see :func:`common.sources.memory.unlabelled`; or rows, see ``frame_of``."""
        if self.columns is None:
            return unlabelled(samples, self.facts)
        with speaking_of("samples", instead_of="data.source.path"):
            return rows_to_predict(frame_of(samples), self.facts)

    @override
    def predict_step(self, batch: Batch) -> dict[str, list[Any]]:
        probabilities, target = self.objective.probabilities(self.logits(batch))[batch.mask], batch.target[batch.mask]
        columns = self.objective.predictions(probabilities, target, self.class_names)
        return {"index": batch.index[batch.mask].tolist(), **columns}
