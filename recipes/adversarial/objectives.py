"""Training losses for a net under attack: natural, adversarial, TRADES and free adversarial training."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from typing_extensions import override

from common.errors import InputError
from common.losses import cross_entropy, precise
from common.module import evaluating
from common.parts import batch_norms

from .attacks import PGD, Attack, Logits, Loss, attackable, cross_entropy_to, logits_at, precise_copy

Mode = Literal["eval", "train"]


@contextmanager
def keeping_no_statistics(net: nn.Module) -> Iterator[None]:
    """Let batch norm in training use its batch's statistics without an update of the running ones."""
    layers: list[Any] = batch_norms(net)
    kept = [layer.track_running_stats for layer in layers]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer, value in zip(layers, kept, strict=True):
            layer.track_running_stats = value


class Objective:
    """A training loss for a net under attack.

    Attributes:
        needs_attack: whether it needs an attack.
        attack_mode: the net's mode during the attack.
        replays: optimizer steps with each batch.
    """

    needs_attack = True
    attack_mode: Mode = "eval"
    replays = 1

    def check(self, attack: Attack | None) -> None:
        """Check that it can train with this attack.

        Raises:
            InputError: the attack is missing or does not suit it.
        """
        if self.needs_attack and attack is None:
            raise InputError(f"model.attack: {type(self).__name__} needs one; give PGD")

    def begin(self, accumulated: int) -> None:
        """Prepare for a batch, before its optimizer steps.

        Args:
            accumulated: batches per optimizer step.

        Raises:
            InputError: a step accumulates several batches, and each batch is replayed.
        """
        if self.replays > 1 and accumulated > 1:
            problem = "replays each batch, an optimizer step each time"
            raise InputError(f"trainer.accumulate_grad_batches must be 1: {type(self).__name__} {problem}")

    def __call__(
        self,
        net: nn.Module,
        attack: Attack | None,
        inputs: Mapping[str, Tensor],
        target: Int64[Tensor, " batch"],
        index: Int64[Tensor, " batch"],
        seed: int,
    ) -> Float[Tensor, ""]:
        """Mean loss of a batch; arguments as in :func:`under_attack`.

        The net is in evaluation mode during the attack, as in TRADES and as Pang et al. 2021 advise
        (https://arxiv.org/abs/2010.00467): batch norm neither uses nor keeps statistics of unfinished attacks, and
        dropout is off. :class:`Free` and ``attack_mode`` of :class:`Adversarial` are the exceptions.
        """
        start, mask = attackable(net, inputs)

        def perturb(loss: Loss) -> Tensor:
            assert attack is not None, "see check"
            with evaluating(net) if self.attack_mode == "eval" else keeping_no_statistics(net):
                return attack(loss, start, index, seed, mask)

        return self.loss(partial(logits_at, net, inputs), start, target, perturb)

    def loss(
        self,
        logits: Logits,
        inputs: Float[Tensor, "batch *shape"],
        target: Int64[Tensor, " batch"],
        perturb: Callable[[Loss], Tensor],
    ) -> Float[Tensor, ""]:
        """Mean loss of a batch.

        A loss on clean and attacked samples takes one forward pass over both: batch norm sees one batch, and a strategy
        that copies buffers before each pass changes none that backward needs.

        Args:
            logits: the net, as a function of the samples.
            inputs: the clean samples.
            target: their classes.
            perturb: runs the attack: raises a loss of each sample and returns the attacked samples.
        """
        raise NotImplementedError


class Natural(Objective):
    """Cross-entropy on clean inputs, without any attack: the baseline."""

    needs_attack = False

    @override
    def loss(self, logits: Logits, inputs: Tensor, target: Tensor, perturb: Callable[[Loss], Tensor]) -> Tensor:
        return cross_entropy(logits(inputs), target)


class Adversarial(Objective):
    """Cross-entropy on attacked inputs (Madry et al. 2018, eq. 2.1, https://arxiv.org/abs/1706.06083).

    Args:
        clean_weight: share of clean inputs in the loss; 0.5 weighs both equally, as is usual for texts (Goodfellow et
            al. 2015, section 6, https://arxiv.org/abs/1412.6572).
        attack_mode: the net's mode during the attack. With ``train``, as in Wong et al. 2020, dropout is on, and batch
            norm uses the attacked batch's statistics without keeping them, so a sample's attack depends on its batch.
    """

    def __init__(self, clean_weight: float = 0.0, attack_mode: Mode = "eval"):
        if not 0 <= clean_weight < 1:
            raise InputError(f"model.objective.clean_weight must be in [0, 1), got {clean_weight}")
        self.clean_weight, self.attack_mode = clean_weight, attack_mode

    @override
    def loss(self, logits: Logits, inputs: Tensor, target: Tensor, perturb: Callable[[Loss], Tensor]) -> Tensor:
        attacked = perturb(cross_entropy_to(target, logits))
        if not self.clean_weight:
            return cross_entropy(logits(attacked), target)
        clean, robust = logits(torch.cat([inputs, attacked])).chunk(2)
        return self.clean_weight * cross_entropy(clean, target) + (1 - self.clean_weight) * cross_entropy(
            robust, target
        )


class TRADES(Objective):
    """Cross-entropy on clean inputs, plus ``beta`` times the divergence KL(clean || attacked) of the predictions.

    Zhang et al. 2019, eq. 5, https://arxiv.org/abs/1901.08573. The attack raises the same divergence; the clean
    prediction is constant in it.

    Args:
        beta: weight of robustness against accuracy; the paper's 1/lambda, 6 in most later work.
    """

    def __init__(self, beta: float = 6.0):
        if not 0 <= beta < math.inf:
            raise InputError(f"model.objective.beta must not be negative, got {beta}")
        self.beta = beta

    @override
    def check(self, attack: Attack | None) -> None:
        super().check(attack)
        if attack is not None and not attack.random_start:
            raise InputError("model.attack.random_start must be true for TRADES: at the input its gradient is zero")

    @override
    def loss(self, logits: Logits, inputs: Tensor, target: Tensor, perturb: Callable[[Loss], Tensor]) -> Tensor:
        reference: list[Tensor] = []

        def divergence(point: Tensor) -> Tensor:
            if not reference:  # here, where the net is in evaluation mode
                with torch.no_grad():
                    reference.append(precise(logits(inputs)).log_softmax(-1))
            return _divergence(reference[0], precise(logits(point)).log_softmax(-1))

        clean, attacked = logits(torch.cat([inputs, perturb(divergence)])).chunk(2)
        robust = _divergence(precise(clean).log_softmax(-1), precise(attacked).log_softmax(-1)).mean()
        return cross_entropy(clean, target) + self.beta * robust


class Free(Objective):
    """Free adversarial training: each batch is replayed, and one backward pass moves both the weights and the inputs.

    Shafahi et al. 2019, algorithm 1, https://arxiv.org/abs/1904.12843. Each replay is an optimizer step and costs as
    much as a step without attack; divide ``trainer.max_epochs`` by ``replays`` for the same cost. Each replay after the
    first takes one step of ``model.attack`` along the gradient of the replay before, with the net in training mode. The
    step is 1.25 eps by default, eps in the paper. In the paper a batch starts from the perturbation of the one before.
    Here it starts at random, so checkpoints need not keep a perturbation; for FGSM this start is no worse (Wong et al.
    2020, table 1). Schedules and ``trainer.max_steps`` count batches.

    Args:
        replays: optimizer steps with each batch; 8 in the paper for CIFAR-10.
    """

    attack_mode = "train"

    def __init__(self, replays: int = 8):
        if replays < 2:
            raise InputError(f"model.objective.replays must be at least 2, got {replays}")
        self.replays = replays
        self._clean: Tensor | None = None  # the replayed batch, None before its first step
        self._delta = torch.empty(0)  # its perturbation, with the gradient of the replay before

    @override
    def check(self, attack: Attack | None) -> None:
        super().check(attack)
        if not isinstance(attack, PGD):
            raise InputError("model.attack must be PGD for Free, which takes its steps one by one")
        for name in ("steps", "restarts"):
            if getattr(attack, name) != 1:
                raise InputError(f"model.attack.{name} must be 1 for Free: each replay takes a step of one search")

    @override
    def begin(self, accumulated: int) -> None:
        super().begin(accumulated)
        self._clean = None

    @override
    def __call__(
        self,
        net: nn.Module,
        attack: Attack | None,
        inputs: Mapping[str, Tensor],
        target: Int64[Tensor, " batch"],
        index: Int64[Tensor, " batch"],
        seed: int,
    ) -> Float[Tensor, ""]:
        """Mean loss of a batch, as in :class:`Objective`; further calls are its replays, until :meth:`begin`."""
        assert isinstance(attack, PGD), "see check"
        start, mask = attackable(net, inputs)
        if self._clean is None:
            self._clean = precise_copy(start)
            point = attack.start(self._clean, index, seed, mask)
        else:  # the gradient is of the kept batch: this call's inputs may be augmented differently
            gradient = self._delta.grad
            if gradient is not None:  # after an fp16 overflow: NaN has no direction, and infinity no finite square
                gradient = gradient.nan_to_num(0.0, 1e15, -1e15)
            point = attack.step(self._clean + self._delta.detach(), gradient, self._clean, mask)
        self._delta = (point - self._clean).requires_grad_()
        return cross_entropy(logits_at(net, inputs, (self._clean + self._delta).to(start.dtype)), target)


def _divergence(
    log_p: Float[Tensor, "batch classes"], log_q: Float[Tensor, "batch classes"]
) -> Float[Tensor, " batch"]:
    """KL(p || q) of each sample in nats."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)
