"""What a student learns from: its teacher's logits and inner layers, of a net that is only asked."""

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from common.checkpoint import read_checkpoint
from common.data import read_batch
from common.errors import InputError, nearest, speaking_of
from common.labelled import LabelledBatch
from common.losses import precise
from common.module import evaluating

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HALF = {"bf16": torch.bfloat16, "16": torch.float16}


class LogitLoss:
    """How far a student's logits are from its teacher's: a mean over items, in at least fp32.

    Subclasses say what an item's loss is.
    """

    temperature = 1.0

    def __call__(
        self,
        logits: Float[Tensor, "items classes"],
        teacher: Float[Tensor, "*items teacher_classes"],
        counts: Bool[Tensor, " items"],
    ) -> Float[Tensor, ""]:
        """The mean over the items that count.

        Raises:
            InputError: the teacher has other classes.
        """
        if logits.shape[-1] != teacher.shape[-1]:
            problem = f"gives {teacher.shape[-1]} logits, but there are {logits.shape[-1]} classes"
            raise InputError(f"model.teacher {problem}; take a net whose first argument decides their number")
        losses = self.of_items(precise(logits), precise(teacher.flatten(0, -2)))
        return losses.where(counts, 0.0).sum() / counts.sum()

    def of_items(
        self, logits: Float[Tensor, "items classes"], teacher: Float[Tensor, "items classes"]
    ) -> Float[Tensor, " items"]:
        """The loss of each item."""
        raise NotImplementedError


class SoftTargets(LogitLoss):
    """Divergence of softened probabilities, T² KL(teacher ‖ student), in nats.

    Hinton et al. 2015 (https://arxiv.org/abs/1503.02531, section 2); the factor T² keeps the size of the gradient as
    the temperature changes. It differs from their cross-entropy by a constant, and a perfect student has 0.

    Args:
        temperature: T, by which both logits are divided; above 0.
    """

    def __init__(self, temperature: float = 4.0):
        if not 0 < temperature < float("inf"):
            raise InputError(f"model.loss.temperature must be above 0, got {temperature}; 2 to 8 are usual")
        self.temperature = temperature

    @override
    def of_items(
        self, logits: Float[Tensor, "items classes"], teacher: Float[Tensor, "items classes"]
    ) -> Float[Tensor, " items"]:
        ours, theirs = (F.log_softmax(values / self.temperature, -1) for values in (logits, teacher))
        return self.temperature**2 * F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)


class LogitError(LogitLoss):
    """Mean squared difference of the logits over classes (Ba & Caruana 2014, https://arxiv.org/abs/1312.6184)."""

    @override
    def of_items(
        self, logits: Float[Tensor, "items classes"], teacher: Float[Tensor, "items classes"]
    ) -> Float[Tensor, " items"]:
        return (logits - teacher).square().mean(-1)


class FeatureLoss:
    """How far a layer of a student is from one of its teacher; without parameters, so that widths may differ."""

    def __call__(
        self, student: Float[Tensor, "batch *student"], teacher: Float[Tensor, "batch *teacher"]
    ) -> Float[Tensor, ""]:
        """The mean over samples, or pairs of samples.

        Args:
            student: (batch, channels, height, width) of a convolution, or (batch, time, width) of hidden states.
            teacher: the same of the teacher.
        """
        raise NotImplementedError


class AttentionTransfer(FeatureLoss):
    """Squared distance of normalized attention maps.

    A map says how strong a layer's answer is at each place: the mean of squares over channels, as a vector of length 1
    (Zagoruyko & Komodakis 2017, https://arxiv.org/abs/1612.03928, equation 2 with p = 2, squared as in their code).
    Both layers need the same places. Padding of texts counts as places.
    """

    @override
    def __call__(
        self, student: Float[Tensor, "batch *student"], teacher: Float[Tensor, "batch *teacher"]
    ) -> Float[Tensor, ""]:
        """The mean over samples, in [0, 2].

        Raises:
            InputError: height and width, or time, differ, or a layer has none.
        """
        ours, theirs = _attention(student), _attention(teacher)
        if ours.shape != theirs.shape:
            shapes = f"{tuple(ours.shape[1:])} and {tuple(theirs.shape[1:])}"
            raise InputError(f"model.features: a pair has {shapes} places; pair layers with the same height and width")
        return (F.normalize(ours.flatten(1)) - F.normalize(theirs.flatten(1))).square().sum(1).mean()


def _attention(values: Tensor) -> Tensor:
    if values.ndim not in (3, 4):
        fix = "name one before pooling, or take SimilarityPreserving"
        raise InputError(f"model.features: a layer gives {tuple(values.shape[1:])}, which has no places; {fix}")
    return precise(values).square().mean(1 if values.ndim == 4 else 2)


class SimilarityPreserving(FeatureLoss):
    """Squared difference of the samples' similarities to one another.

    Similarities are the Gram matrix of the flattened layer, its rows of length 1 (Tung & Mori 2019,
    https://arxiv.org/abs/1907.09682, equation 4). They compare the samples of one micro-batch on one rank, so the
    number of ranks and of accumulated micro-batches changes this loss, unlike all others here.
    """

    @override
    def __call__(
        self, student: Float[Tensor, "batch *student"], teacher: Float[Tensor, "batch *teacher"]
    ) -> Float[Tensor, ""]:
        """The sum over pairs of samples, divided by the squared number of samples."""
        flat = [precise(values).flatten(1) for values in (student, teacher)]
        ours, theirs = (F.normalize(values @ values.T) for values in flat)
        return (ours - theirs).square().sum() / len(student) ** 2


class Features:
    """Keeps what named layers of a net put out in its last forward pass.

    Args:
        net: the net.
        names: names of its modules.

    Raises:
        InputError: there is no such module.
    """

    def __init__(self, net: nn.Module, names: Sequence[str]):
        modules = dict(net.named_modules())
        for name in names:
            if name not in modules:
                raise InputError(f"model.features: {type(net).__name__} has no layer {name!r}{nearest(name, modules)}")
        self.names, self._kept = names, {}
        for name in set(names):
            modules[name].register_forward_hook(lambda _, __, output, name=name: self._keep(name, output))

    def _keep(self, name: str, output: Any) -> None:
        self._kept[name] = output if isinstance(output, Tensor) else output[0]  # hidden states stand first

    def take(self) -> list[Tensor]:
        """The outputs in the order of the names; each can be taken once.

        Raises:
            InputError: the forward pass of this rank has not come by one of them.
        """
        kept, self._kept = self._kept, {}
        if missing := [name for name in self.names if name not in kept]:
            problem = f"this rank's part of the net has no output of {missing[0]!r}"
            raise InputError(f"model.features: {problem}; name another, or take configs/strategy/fsdp2.yaml")
        return [kept[name] for name in self.names]


def logits_of(output: Any) -> Tensor:
    """A net's logits; a net of transformers wraps them."""
    return output if isinstance(output, Tensor) else output.logits


class FrozenNet:
    """A net that is only asked: in evaluation mode, without gradients, whole on each rank.

    It is no ``nn.Module``, so that a module can hold it without its weights being trained, sharded or saved. They stay
    in fp32, or fp64 if the run computes in it; where it computes in 16 bits so does this net, under every strategy.

    Args:
        net: the net.
        checkpoint: of any recipe here, with its weights; None for those that it has.
        trainer: says where the net is moved to, and in what precision it computes.
        layers: names of the modules whose outputs :meth:`__call__` returns too.

    Raises:
        InputError: the checkpoint is missing, of another net or another split of the data, or there is no such layer.
    """

    key = checkpoint_key = hint = ""  # of messages: where net and checkpoint stand in a config, and what else to give

    def __init__(self, net: nn.Module, checkpoint: str | None, trainer: L.Trainer, layers: Sequence[str] = ()):
        if checkpoint is not None:
            self._load(net, checkpoint, trainer)
        precision, device = str(trainer.precision), trainer.strategy.root_device
        self.dtype = torch.float64 if precision.startswith("64") else torch.float32
        self.half = HALF.get(precision.split("-")[0])
        self.net = net.eval().requires_grad_(False).to(device, self.dtype)
        self.features, self.device = Features(self.net, layers), device
        self.num_params = sum(p.numel() for p in self.net.parameters())

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Logits, and the outputs of the layers."""
        inputs = {name: value.to(self.dtype) if value.is_floating_point() else value for name, value in inputs.items()}
        autocast = torch.autocast(self.device.type, self.half or torch.bfloat16, enabled=self.half is not None)
        with autocast, speaking_of(self.key, instead_of="model.net"):
            logits = logits_of(self.net(**inputs))
        return logits, self.features.take()

    def _load(self, net: nn.Module, path: str, trainer: L.Trainer) -> None:
        try:
            checkpoint = read_checkpoint(path, hint=self.hint)
        except InputError as error:
            raise InputError(f"{self.checkpoint_key} {error}") from error
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        there = checkpoint.get("datamodule_hyper_parameters", {})
        if (key := _other_split(there, data)) is not None:  # then it has learned what tests here
            value = _value(there, key)
            problem = f"was trained on another split of the same data, with {key.rpartition('.')[2]} {value}"
            raise InputError(f"{self.checkpoint_key} {path}: {problem}; give --{key} {value}")
        theirs = checkpoint.get("hyper_parameters", {}).get("class_names")
        if theirs and theirs != data.class_names:
            problem = f"was trained on other classes, {', '.join(theirs)}"
            raise InputError(f"{self.checkpoint_key} {path}: {problem}; name one of those of data.source")
        saved = checkpoint["state_dict"]
        state = {name.removeprefix("net."): value for name, value in saved.items() if name.startswith("net.")}
        if not state.keys() & net.state_dict().keys():
            state = {f"model.{name}": value for name, value in state.items()}  # a net of transformers that ours wraps
        try:
            net.load_state_dict(state)
        except RuntimeError as error:
            reason = re.sub(
                r"copying a param with shape torch.Size(.*?) from checkpoint, the shape in current model is torch.Size"
                r"(.*?)\.$", r"\1 there and \2 here", str(error).splitlines()[1].strip(),
            )  # fmt: skip
            problem = f"does not fit {self.key} {type(net).__name__}: {reason}"
            raise InputError(f"{self.checkpoint_key} {problem}") from error


def _value(data: Mapping[str, Any], key: str) -> Any:
    """The value of ``data.<name>`` or ``data.source.<name>``, None where there is none."""
    owner = data["source"].get("init_args", {}) if key.startswith("data.source.") else data
    return owner.get(key.rpartition(".")[2])


def _other_split(there: Mapping[str, Any], datamodule: Any) -> str | None:
    """The key by which a config splits the samples of a data module differently, however it names them; or None."""
    here = datamodule.hparams
    if not all(isinstance(data.get("source"), Mapping) for data in (there, here)):
        return None  # one has no source of labelled samples
    paths = [_value(data, "data.source.path") for data in (there, here)]
    files = [os.path.realpath(os.path.expanduser(path)) if isinstance(path, str) else path for path in paths]
    if there["source"]["class_path"] != here["source"]["class_path"] or files[0] != files[1]:
        return None
    labelled = datamodule.labelled  # its own sets for validation and testing come before those of a split
    ours = [] if labelled.num_val else ["split_seed", "val_fraction", *["test_fraction"] * (not labelled.num_test)]
    names = [*(f"data.{name}" for name in ours), "data.source.val_fraction"]
    return next((key for key in names if _value(there, key) not in (None, _value(here, key))), None)


class Teacher(FrozenNet):
    """Whose logits, and inner layers, the student learns from."""

    key, checkpoint_key, hint = "model.teacher", "model.teacher_checkpoint", "name another, or null to train one"


class StudentAlone(FrozenNet):
    """The student as it is without a teacher, to compare with."""

    key, checkpoint_key, hint = "model.net", "model.alone_checkpoint", "name another, or null for no comparison"


def flat_target(batch: LabelledBatch) -> Int64[Tensor, " items"]:
    """Targets of all samples, or of all their positions, with -100 for padding."""
    padding = ~batch.mask.view(-1, *[1] * (batch.target.ndim - 1))
    return batch.target.masked_fill(padding, -100).flatten()


class Scores(nn.ModuleDict):
    """Accuracy of a student and of what it is compared with, and how often its teacher says the same.

    Args:
        num_classes: number of classes.
        teacher: whether it has a teacher.
        alone: whether the same student without a teacher stands beside.
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
        """Count the items of a batch whose target is not -100: logits of the student, and of those beside it."""
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
    """What teacher and student take and give, as a picture and a table, and their softened probabilities.

    Where there is the student alone, it stands between them, and the table says how much of its gap to the teacher is
    closed.

    Args:
        module: the recipe's module, after an evaluation; its first batch measures the speed.
        stage: which evaluation it was.
        shown: how many samples, or positions of samples, are shown: those that the teacher is least sure of.
    """
    from common.report import model_comparison, soft_targets

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
    """What share of the gap in accuracy between teacher and student alone distillation has closed, in words."""
    if teacher <= alone:
        return "no gap to close: the student alone is as good as the teacher"
    return f"gap between teacher and student alone: {(distilled - alone) / (teacher - alone):.0%} closed"


def _speed(ask: Callable[[], Tensor], target: Tensor, passes: int = 15) -> float:
    """Samples per second of the fastest of some passes: whatever else the machine does makes them slower."""
    times = []
    for _ in range(passes):
        start = time.perf_counter()
        ask()
        if target.device.type == "cuda":
            torch.cuda.synchronize(target.device)
        times.append(time.perf_counter() - start)
    return len(target) / min(times)


def _title(batch: LabelledBatch, place: int, names: list[str]) -> str:
    """The class of a sample; for a position in a text, what stands before it too."""
    right = names[int(batch.target.flatten()[place])]
    if batch.target.ndim == 1:
        return f"true class: {right}"
    sample, position = divmod(place, batch.target.shape[1])
    before = batch.inputs["input_ids"][sample, : position + 1][-16:].tolist()
    return f"…{''.join(names[token] for token in before)!r} goes on with {right!r}"


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
    """Place, class, prediction and its probability of each sample; classes of a sample's positions are joined."""
    probability, preds = precise(logits[batch.mask]).softmax(-1).max(-1)

    def spell(numbers: Tensor) -> list[str]:
        return ["".join(names[n] for n in row if n >= 0) for row in numbers.reshape(len(numbers), -1).tolist()]

    return {
        "index": batch.index[batch.mask].tolist(),
        "target": spell(batch.target[batch.mask]),
        "prediction": spell(preds),
        "probability": probability.flatten(1).mean(1).tolist() if probability.ndim > 1 else probability.tolist(),
    }
