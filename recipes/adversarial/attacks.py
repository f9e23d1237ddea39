"""Attacks on a net's inputs, or on its embeddings.

An attack searches near an input for the point of the highest loss. It differentiates by that point alone. Parameters
get no gradients, so nothing accumulates and no strategy reduces anything.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from common.data import step_seed
from common.errors import InputError
from common.losses import precise
from common.module import evaluating
from common.parts import refuse_input_gradients

Logits = Callable[[Tensor], Tensor]  # inputs of one or several batches, concatenated, to the logits of each sample
Norm = Literal["linf", "l2"]
Loss = Callable[[Tensor], Tensor]  # inputs of a batch to one loss per sample


class Attack:
    """A search for perturbed inputs with a high loss, in a ball around each input.

    Attributes:
        eps: radius of the ball.
        clamp: smallest and largest value of inputs; None for no bounds.
        random_start: whether the search begins at a random point of the ball, not at the input.
        restarts: number of searches.
    """

    eps: float
    clamp: tuple[float, float] | None
    random_start: bool
    restarts: int

    def search(
        self,
        loss: Loss,
        inputs: Float[Tensor, "batch *shape"],
        index: Int64[Tensor, " batch"],
        seed: int,
        mask: Bool[Tensor, "batch *_"] | None = None,
    ) -> Iterator[Float[Tensor, "batch *shape"]]:
        """Yield the perturbed inputs at the end of each restart.

        Args:
            loss: loss of each sample alone, to raise.
            inputs: centres of the balls.
            index: a number for each sample. Random starts depend on it and on ``seed`` alone, not on the rest of the
                batch or the number of ranks.
            seed: seed of the random starts.
            mask: true where inputs may change; None for everywhere.
        """
        raise NotImplementedError

    def __call__(
        self,
        loss: Loss,
        inputs: Float[Tensor, "batch *shape"],
        index: Int64[Tensor, " batch"],
        seed: int,
        mask: Bool[Tensor, "batch *_"] | None = None,
    ) -> Float[Tensor, "batch *shape"]:
        """For each sample the restart with the highest loss; arguments as in :meth:`search`."""
        worst, *others = self.search(loss, inputs, index, seed, mask)
        if others:
            with torch.no_grad():
                highest = loss(worst)
                for found in others:
                    value = loss(found)
                    worst = torch.where(_per_sample(value > highest, worst), found, worst)
                    highest = torch.maximum(highest, value)
        return worst

    def at(self, eps: float) -> "Attack":
        """The same attack with another radius."""
        raise NotImplementedError

    def check_range(self, key: str, found: Sequence[float]) -> None:
        """Check the bounds against the data.

        Args:
            key: the setting of the bounds, for messages.
            found: smallest and largest value of the inputs; empty for embeddings.

        Raises:
            InputError: inputs are outside the bounds (an attack would move them inside), or embeddings have bounds.
        """
        if self.clamp is not None and not found:
            raise InputError(f"{key} must be null: embeddings of texts have no bounds")
        if self.clamp is not None and not self.clamp[0] <= found[0] <= found[1] <= self.clamp[1]:
            problem = f"{list(self.clamp)} does not hold the images, which go from {found[0]:g} to {found[1]:g}"
            raise InputError(f"{key} {problem}; widen it")


class PGD(Attack):
    """Projected gradient ascent on the loss (Madry et al. 2018, https://arxiv.org/abs/1706.06083).

    One step from the input is the fast gradient sign method (Goodfellow et al. 2015, https://arxiv.org/abs/1412.6572).
    One step from a random start is its variant for training, FGSM-RS (Wong et al. 2020,
    https://arxiv.org/abs/2001.03994). One step from the input with ``norm`` l2 is the fast gradient method on
    embeddings (Miyato et al. 2017, https://arxiv.org/abs/1605.07725).

    Args:
        eps: radius of the ball, in units of the inputs.
        steps: number of steps of gradient ascent.
        step_size: length of a step in the ball's norm, in units of the inputs. None takes the usual: ``eps`` for one
            step from the input, 1.25 ``eps`` for one from a random start, 2.5 ``eps`` / ``steps`` for several.
        restarts: number of searches; more than one needs a random start.
        norm: norm of the ball: linf bounds every element, l2 the Euclidean length over all elements of a sample.
        random_start: begin at a point drawn uniformly from the ball.
        clamp: smallest and largest value of inputs; None for no bounds, as for embeddings.

    Raises:
        InputError: a number is out of its range, or all restarts would be the same.
    """

    def __init__(
        self,
        eps: float,
        steps: int = 10,
        step_size: float | None = None,
        restarts: int = 1,
        norm: Norm = "linf",
        random_start: bool = True,
        clamp: tuple[float, float] | None = (0.0, 1.0),
    ):
        # Each message starts with the argument and quotes its value: the command line finds the attack in the config.
        if not 0 <= eps < math.inf:
            raise InputError(f"eps must be a number of at least 0, got '{eps:g}'")
        if steps < 1:
            raise InputError(f"steps must be at least 1, got '{steps}'")
        if step_size is not None and not 0 < step_size < math.inf:
            raise InputError(f"step_size must be above 0, got '{step_size:g}'; null takes the usual one")
        if restarts < 1:
            raise InputError(f"restarts must be at least 1, got '{restarts}'")
        if restarts > 1 and not random_start:
            raise InputError(f"restarts '{restarts}' without random_start are all the same; give 1")
        if clamp is not None and not -math.inf < clamp[0] < clamp[1] < math.inf:
            raise InputError(f"clamp must be [smallest, largest], got {list(clamp)}; null for no bound")
        self.eps, self.steps, self.restarts = eps, steps, restarts
        usual = 2.5 / steps if steps > 1 else 1.25 if random_start else 1.0
        self.step_size = usual * eps if step_size is None else step_size
        self.norm: Norm = norm
        self.random_start, self.clamp = random_start, clamp

    @override
    def at(self, eps: float) -> "PGD":
        other = copy.copy(self)
        other.eps = eps
        other.step_size = self.step_size * eps / self.eps if self.eps else 2.5 * eps / self.steps
        return other

    @override
    def check_range(self, key: str, found: Sequence[float]) -> None:
        super().check_range(key, found)
        if self.norm == "linf" and self.clamp is not None and self.eps > self.clamp[1] - self.clamp[0]:
            problem = f"{self.eps:g} reaches from any image to any other, as clamp is {list(self.clamp)}"
            raise InputError(f"{key.removesuffix('clamp')}eps {problem}; lower it")

    @override
    def search(
        self,
        loss: Loss,
        inputs: Float[Tensor, "batch *shape"],
        index: Int64[Tensor, " batch"],
        seed: int,
        mask: Bool[Tensor, "batch *_"] | None = None,
    ) -> Iterator[Float[Tensor, "batch *shape"]]:
        for restart in range(self.restarts):
            yield self._ascend(loss, inputs, index, step_seed(seed, restart), mask)

    def _ascend(self, loss: Loss, inputs: Tensor, index: Tensor, seed: int, mask: Tensor | None) -> Tensor:
        # Evaluation runs in inference mode, whose tensors have no gradients; hence a copy made outside it.
        with torch.inference_mode(False), torch.enable_grad(), _without_fp16(inputs.device.type):
            clean = precise_copy(inputs)
            point = self.start(clean, index, seed, mask)
            for _ in range(self.steps):
                point = point.detach().requires_grad_()
                # With a sum, a sample's gradient does not depend on the size of the batch.
                total = loss(point.to(inputs.dtype)).sum()
                found = torch.autograd.grad(total, point, allow_unused=True) if total.requires_grad else (None,)
                point = self.step(point.detach(), found[0], clean, mask)
            return point.detach().to(inputs.dtype)

    def start(
        self,
        clean: Float[Tensor, "batch *shape"],
        index: Int64[Tensor, " batch"],
        seed: int,
        mask: Bool[Tensor, "batch *_"] | None = None,
    ) -> Float[Tensor, "batch *shape"]:
        """The point before the first step; arguments as in :meth:`search`."""
        if not self.random_start:
            return clean
        start = random_in_ball(self.norm, seed, index, clean.shape[1:], mask).to(clean.dtype)
        return self._project(clean + self.eps * start, clean)

    def step(
        self,
        point: Float[Tensor, "batch *shape"],
        gradient: Float[Tensor, "batch *shape"] | None,
        clean: Float[Tensor, "batch *shape"],
        mask: Bool[Tensor, "batch *_"] | None = None,
    ) -> Float[Tensor, "batch *shape"]:
        """One step of ascent, and back into the ball.

        Args:
            point: the present point.
            gradient: gradient of the loss there, of any scale well above 1e-12; None if the net passes none.
            clean: centre of the ball.
            mask: as in :meth:`search`.

        Raises:
            InputError: there is no gradient.
        """
        if gradient is None:
            problem = "attacks follow gradients, and this net passes none to its inputs"
            raise InputError(f"model.net.freeze must be false: {problem}")
        gradient = gradient if mask is None else gradient * mask
        direction = gradient.sign() if self.norm == "linf" else gradient / _length(gradient).clamp_min(1e-12)
        return self._project(point + self.step_size * direction, clean)

    def _project(self, point: Tensor, clean: Tensor) -> Tensor:
        if self.norm == "linf":
            point = point.clamp(clean - self.eps, clean + self.eps)
        else:
            delta = point - clean
            point = clean + delta * (self.eps / _length(delta).clamp_min(1e-12)).clamp_max(1.0)
        # Clean inputs are within the bounds, so this moves every element towards them and stays in the ball.
        return point if self.clamp is None else point.clamp(*self.clamp)


def _without_fp16(device_type: str) -> AbstractContextManager:
    """Turn fp16 autocast off: gradients of confident samples would vanish in it and mislead the attack."""
    fp16 = torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) == torch.float16
    return torch.autocast(device_type, enabled=False) if fp16 else nullcontext()


def precise_copy(inputs: Tensor) -> Tensor:
    """A copy in at least fp32; 16 bits would round small steps away."""
    return inputs.detach().to(torch.promote_types(inputs.dtype, torch.float32), copy=True)


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    """One value per sample, in a shape that broadcasts over its elements."""
    return values.view(-1, *[1] * (like.ndim - 1))


def _length(values: Tensor) -> Tensor:
    return _per_sample(values.flatten(1).norm(dim=1), values)


def _mixed(bits: Tensor) -> Tensor:
    """Whole numbers below 2**32, mixed so that each bit depends on all (https://nullprogram.com/blog/2018/07/31)."""
    bits = (bits ^ (bits >> 16)) * 0x21F0AAAD & 0xFFFFFFFF
    bits = (bits ^ (bits >> 15)) * 0x735A2D97 & 0xFFFFFFFF
    return bits ^ (bits >> 15)


def uniform_noise(seed: int, index: Int64[Tensor, " batch"], size: int) -> Float32[Tensor, "batch size"]:
    """Uniform numbers in (0, 1), each a function of seed, sample index and place; the same on every device."""
    column = torch.arange(size, device=index.device)
    bits = _mixed(_mixed(index ^ (seed & 0xFFFFFFFF))[:, None] ^ _mixed(column ^ (seed >> 32 & 0x7FFFFFFF)))
    return ((bits >> 9).float() + 0.5) / 2**23  # 23 bits: with one more, rounding would reach 1


def random_in_ball(
    norm: Norm,
    seed: int,
    index: Int64[Tensor, " batch"],
    shape: torch.Size,
    mask: Bool[Tensor, "batch *_"] | None = None,
) -> Float32[Tensor, "batch *shape"]:
    """A point for each sample, uniform in the ball of radius 1; a function of the seed and the sample's index.

    The ball has only the dimensions that the mask admits, so padding changes nothing.
    """
    size = shape.numel()
    noise = uniform_noise(seed, index, size).view(-1, *shape)
    free = torch.ones_like(noise) if mask is None else torch.ones_like(noise) * mask
    cube = 2 * noise - 1
    if norm == "linf":
        return cube * free
    normal = torch.erfinv(cube) * free
    # One of two columns: on contiguous numbers torch's power may round differently with the size of the batch.
    radius = uniform_noise(step_seed(seed, 1), index, 2)[:, 0] ** (1 / free.flatten(1).sum(1))
    return normal / _length(normal).clamp_min(1e-12) * _per_sample(radius, normal)


def cross_entropy_to(target: Int64[Tensor, " batch"], logits: Logits) -> Loss:
    """The cross-entropy of each sample as a function of the inputs, for an attack to raise."""
    return lambda point: F.cross_entropy(precise(logits(point)), target, reduction="none")


def input_embeddings(net: nn.Module) -> nn.Embedding:
    """The token embedding of the transformers net inside ``net``.

    Raises:
        InputError: there is no such layer.
    """
    bodies = [module for module in net.modules() if isinstance(module, PreTrainedModel)]
    layer: Any = bodies[0].get_input_embeddings() if bodies else None
    if not isinstance(layer, nn.Embedding):
        problem = f"{type(net).__name__} has no token embeddings to attack; take common.nets.PretrainedEncoder"
        raise InputError(f"model.net: {problem}")
    return layer


@contextmanager
def perturbed_embeddings(net: nn.Module, delta: Float[Tensor, "batch time dim"]) -> Iterator[None]:
    """Add ``delta`` to the token vectors of all forward passes inside the context."""

    def add(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + delta.to(output.dtype)

    handle = input_embeddings(net).register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def attackable(net: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Float[Tensor, "batch *shape"], Tensor | None]:
    """The clean inputs of an attack on a batch, and the mask of elements that may change.

    Args:
        net: the net; for texts it needs token embeddings.
        inputs: keyword arguments of the net.

    Returns:
        Pixels, and None. For texts a zero perturbation of the token vectors (batch, time, dim), and a mask
        (batch, time, 1) that excludes padding.

    Raises:
        InputError: FSDP1 shards the net, or the batch has neither images nor texts with a mask.
    """
    refuse_input_gradients(net)
    if "pixel_values" in inputs:
        return inputs["pixel_values"], None
    if "attention_mask" not in inputs:
        raise InputError("data.source: has neither images nor labelled texts; take common.sources.TextTable")
    ids, mask = inputs["input_ids"], inputs["attention_mask"][..., None].bool()
    return torch.zeros(*ids.shape, input_embeddings(net).embedding_dim, device=ids.device), mask


def logits_at(
    net: nn.Module, inputs: Mapping[str, Tensor], points: Float[Tensor, "points *shape"]
) -> Float[Tensor, "points classes"]:
    """Logits of a batch with other pixels or perturbations than :func:`attackable` returns.

    Args:
        net: the net.
        inputs: keyword arguments of the net.
        points: pixels, or perturbations of embeddings, for one or several copies of the batch, concatenated.

    Raises:
        InputError: the net's weights are in fp16.
    """
    copies = len(points) // len(next(iter(inputs.values())))
    others = {name: torch.cat([values] * copies) for name, values in inputs.items() if name != "pixel_values"}
    if "pixel_values" in inputs:
        output = net(pixel_values=points, **others)
    else:
        with perturbed_embeddings(net, points):
            output = net(**others)
    logits = output if isinstance(output, Tensor) else output.logits
    if logits.dtype == torch.float16 and not torch.is_autocast_enabled(logits.device.type):
        problem = "the gradients that attacks follow vanish in a net of fp16 weights"
        raise InputError(f"trainer.precision: {problem}; take bf16-mixed, or 16-mixed under DDP")
    return logits


class UnderAttack(NamedTuple):
    """The result of an attack on a batch."""

    clean: Float[Tensor, "batch classes"]  # logits before the attack
    points: Float[Tensor, "batch *shape"]  # attacked pixels, or perturbations of embeddings
    logits: Float[Tensor, "batch classes"]  # logits at these points


def under_attack(
    net: nn.Module,
    attack: Attack,
    inputs: Mapping[str, Tensor],
    target: Int64[Tensor, " batch"] | None,
    index: Int64[Tensor, " batch"],
    seed: int,
) -> UnderAttack:
    """For each sample the first restart that makes its prediction wrong, or the last one.

    A sample that is wrong without attack does not change. This also works in inference mode, in which trainers
    evaluate. Every call makes the same number of forward passes, so ranks that share weights stay in step.

    Args:
        net: the net; it is in evaluation mode during the attack.
        attack: the attack.
        inputs: keyword arguments of the net.
        target: the true classes; None for the net's own predictions.
        index: a number for each sample; random starts depend on it.
        seed: seed of the random starts.
    """
    with torch.inference_mode(False), torch.no_grad(), evaluating(net):
        # Tensors of inference mode have no gradients; hence copies.
        inputs, index = {name: values.clone() for name, values in inputs.items()}, index.clone()
        (start, mask), logits = attackable(net, inputs), partial(logits_at, net, inputs)
        clean = logits(start)
        target = clean.argmax(-1) if target is None else target.clone()
        points, output, right = start, clean, clean.argmax(-1) == target
        for found in attack.search(cross_entropy_to(target, logits), start, index, seed, mask):
            points = torch.where(_per_sample(right, found), found, points)
            output = torch.where(right[:, None], logits(found), output)
            right = output.argmax(-1) == target
        return UnderAttack(clean, points, output)
