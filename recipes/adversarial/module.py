"""The module: a classifier, trained and evaluated under attack."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from common.data import global_seed, read_batch, step_seed
from common.errors import InputError
from common.losses import cross_entropy, item_cross_entropy
from common.module import BaseModule, Stage
from common.sources.labelled import LabelledDataset
from common.sources.memory import unlabelled

from .attacks import Attack, UnderAttack, input_embeddings, under_attack
from .data import Batch
from .objectives import Objective
from .pictures import adversarial_examples, robustness_curve

RADII = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5)  # of the picture's curve, in units of the attack's eps
SHOWN = 128  # samples behind the curve


class AdversarialModule(BaseModule):
    """A classifier, trained and evaluated under attacks on pixels or, for texts, on token embeddings.

    Args:
        net: the net by class path; its first argument, the number of classes, comes from the data.
        class_names: a name for each class; comes from the data.
        input_range: smallest and largest pixel, empty for texts; comes from the data.
        objective: the training loss, by name: ``Adversarial``, ``TRADES``, ``Free`` or ``Natural``.
        eval_attack: the attack in validation, ``predict`` and pictures, by name: ``PGD``.
        test_attack: the attack in ``test``; None for ``eval_attack``.
        attack: the attack in training; None for ``Natural``.
        augmentation: kornia augmentations of the images in training, before the attack; pixels stay in their range.
        kwargs: of :class:`common.module.BaseModule`.
    """

    def __init__(
        self,
        net: Callable[[int], nn.Module],
        class_names: list[str],
        input_range: list[float],
        objective: Objective,
        eval_attack: Attack,
        test_attack: Attack | None = None,
        attack: Attack | None = None,
        augmentation: list[nn.Module] | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.make_net, self.class_names, self.input_range = net, class_names, input_range
        self.objective, self.attack = objective, attack
        self.attacks = {"val": eval_attack, "test": test_attack or eval_attack}
        for name, given in (("attack", attack), ("eval_attack", eval_attack), ("test_attack", test_attack)):
            if given is not None:
                given.check_range(f"model.{name}.clamp", input_range)
        objective.check(attack)
        if augmentation and not input_range:
            raise InputError("model.augmentation is for images, and data.source has texts; set it to null")
        self.augmentation = nn.Sequential(*augmentation or [])
        names = [f"{stage}/{name}" for stage in self.attacks for name in ("accuracy", "robust_accuracy")]
        self.metrics: Any = nn.ModuleDict({n: MulticlassAccuracy(len(class_names), average="micro") for n in names})

    @override
    def build_net(self) -> nn.Module:
        net = self.make_net(len(self.class_names))
        if not self.input_range:
            input_embeddings(net)  # refuses nets without embeddings
        return net

    def under(self, attack: Attack, batch: Batch, target: Tensor | None) -> UnderAttack:
        """Attack a batch. Random starts depend on the run's seed and the sample, so ranks change nothing."""
        return under_attack(self.net, attack, batch.inputs, target, batch.index, step_seed(global_seed()))

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.objective.begin(self.trainer.accumulate_grad_batches)
        for _ in range(self.objective.replays):  # each calls training_step with the batch again
            super().optimizer_step(*args, **kwargs)

    @override
    def shared_step(self, batch: Batch, stage: Stage) -> tuple[Tensor, Tensor]:
        if stage == "train":
            inputs, seed = dict(batch.inputs), step_seed(global_seed(), self.trainer.global_step)
            if len(self.augmentation):
                inputs["pixel_values"] = self.augmentation(inputs["pixel_values"]).clamp(*self.input_range)
            return self.objective(self.net, self.attack, inputs, batch.target, batch.index, seed), batch.mask.sum()
        found, target = self.under(self.attacks[stage], batch, batch.target), batch.target[batch.mask]
        for name, logits in (("accuracy", found.clean), ("robust_accuracy", found.logits)):
            if len(target):
                self.metrics[f"{stage}/{name}"].update(logits[batch.mask], target)
            self.log(f"{stage}/{name}", self.metrics[f"{stage}/{name}"], prog_bar=True)
        self.note_losses(item_cross_entropy(found.logits[batch.mask], target))
        return cross_entropy(found.logits[batch.mask], target), batch.mask.sum()

    @override
    def media(self, stage: str) -> dict[str, Any]:
        batch, attack = read_batch(self.trainer, stage, 0, SHOWN), self.attacks["val"]
        radii = [part * attack.eps for part in RADII]
        found = [self.under(attack.at(eps), batch, batch.target) for eps in radii]
        right = [(each.logits.argmax(-1) == batch.target).float().mean().item() for each in found]
        figures = {"robustness": robustness_curve(radii, right, attack.eps)}
        if self.input_range:
            shown = batch.inputs["pixel_values"], batch.target, found[RADII.index(1.0)]
            figures["adversarial_examples"] = adversarial_examples(*shown, self.class_names)
        return figures

    @override
    def encode(self, samples: Any) -> LabelledDataset:
        """Images or texts, see :func:`common.sources.memory.unlabelled`."""
        return unlabelled(samples, self.facts)

    @override
    def predict_step(self, batch: Batch) -> dict[str, list[Any]]:
        known = -1 not in batch.target
        found = self.under(self.attacks["val"], batch, batch.target if known else None)
        columns = {"target": batch.target} if known else {}
        columns |= {"prediction": found.clean.argmax(-1), "attacked": found.logits.argmax(-1)}
        names = {k: [self.class_names[n] for n in v[batch.mask].tolist()] for k, v in columns.items()}
        return {"index": batch.index[batch.mask].tolist(), **names}
