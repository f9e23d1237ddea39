"""Parameter groups, learning-rate schedules over the whole run, and Muon with AdamW as one optimizer.

YAML names any optimizer or scheduler, of any library, by class path. The schedules here also know the length of the
run, so only ``trainer.max_steps`` or ``max_epochs`` states it.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR

from common.errors import InputError


def param_groups(net: nn.Module, lr_scales: Mapping[str, float] | None = None) -> list[dict[str, Any]]:
    """Group the trainable parameters by decay, learning rate and fitness for Muon.

    Norms and biases do not decay: a parameter that has fewer than two axes or is named bias (an ensemble's biases have
    two axes). Neither do the rates ``A_log`` of a state-space net (https://arxiv.org/abs/2312.00752), nor a parameter
    that the net marks by a true attribute ``_no_weight_decay``. ``use_muon`` marks hidden matrices, not embeddings,
    convolutions, factors of ensemble members or the output head (the last linear layer); only :class:`MuonAdamW` reads
    it.

    Args:
        net: the net to train.
        lr_scales: factor on the learning rate by the start of a parameter's name, such as ``{"body.": 0.1}``.

    Returns:
        Groups for an optimizer, with ``lr_scale`` for :func:`scale_lr`.

    Raises:
        InputError: a factor other than 1 fits no parameter.
    """
    for prefix, scale in (lr_scales or {}).items():
        if scale != 1 and not any(name.startswith(prefix) for name, _ in net.named_parameters()):
            raise InputError(
                f"model.body_lr_scale {scale}: the net has no part {prefix!r} to scale; give 1, or another net"
            )
    # Embeddings of numbers are no nn.Embedding; only their class name identifies them.
    tables = [m for m in net.modules() if isinstance(m, nn.Embedding) or "Embedding" in type(m).__name__]
    heads = [module for module in net.modules() if isinstance(module, nn.Linear)][-1:]
    not_hidden = {id(p) for module in [*tables, *heads] for p in module.parameters(recurse=False)}
    groups: dict[tuple[float, bool, bool], dict[str, Any]] = {}
    for name, p in net.named_parameters():
        if p.requires_grad:
            scale = next((s for prefix, s in (lr_scales or {}).items() if name.startswith(prefix)), 1.0)
            decays = p.ndim >= 2 and not name.endswith(("bias", "A_log")) and not getattr(p, "_no_weight_decay", False)
            use_muon = p.ndim == 2 and "weight" in name.rpartition(".")[2] and id(p) not in not_hidden
            group = groups.setdefault(
                (scale, decays, use_muon),
                {"params": [], "lr_scale": scale, "use_muon": use_muon} | ({} if decays else {"weight_decay": 0.0}),
            )
            group["params"].append(p)
    return list(groups.values())


def scale_lr(optimizer: Optimizer) -> None:
    """Multiply each group's learning rate by its ``lr_scale``, once, right after construction."""
    for group in optimizer.param_groups:
        group["lr"] *= group.get("lr_scale", 1.0)


class GivenSettings:
    """An optimizer's settings in the config; they win over the checkpoint's.

    Args:
        optimizer: the new optimizer; None before it is made.
        except_for: names of settings that a schedule changes; they continue from the checkpoint.
    """

    def __init__(self, optimizer: Optimizer | None = None, except_for: Sequence[str] = ()):
        groups = optimizer.param_groups if optimizer else []
        self.groups = [{k: v for k, v in group.items() if k not in ("params", *except_for)} for group in groups]
        self.rates: list[float] = []  # initial rates of a schedule of torch

    def leave_to(self, scheduler: LRScheduler) -> None:
        """Leave settings to a schedule of torch that changes them; it continues from the checkpoint."""
        if isinstance(scheduler, CyclicLR | OneCycleLR):
            for group in self.groups:
                group.pop("momentum", None)
                group.pop("betas", None)
        self.rates = [group.get("initial_lr", 0.0) for group in scheduler.optimizer.param_groups]

    def restore(self, groups: Sequence[dict[str, Any]]) -> None:
        """Put the settings back into an optimizer's groups after a checkpoint was loaded.

        Raises:
            InputError: a schedule of torch would continue from another rate than the config's.
        """
        for group, given in zip(groups, self.groups, strict=False):
            group.update(given)
        for group, rate in zip(groups, self.rates, strict=False):
            if group.get("initial_lr", rate) != rate:
                problem = f"{rate} is not the checkpoint's {group['initial_lr']}, which its lr_scheduler goes on from"
                raise InputError(f"model.optimizer.lr: {problem}; those of common.optim can change it")


class Schedule(LRScheduler):
    """A factor on each group's learning rate: linear warm-up, then :meth:`decay` over the rest of the run.

    Args:
        optimizer: the optimizer to drive.
        warmup: length of the warm-up: optimizer steps if an integer, a fraction of the run if below 1.
        end: factor at the end of the run, from 0 to 1.

    Raises:
        InputError: an argument is out of its range.
    """

    def __init__(self, optimizer: Optimizer, warmup: int | float = 0, end: float = 0.0):
        if warmup < 0 or (warmup > 1 and warmup % 1):
            raise InputError(f"model.lr_scheduler.warmup must be whole steps or a share below 1, got {warmup}")
        if not 0 <= end <= 1:
            raise InputError(f"model.lr_scheduler.end must be from 0 to 1, a share of the rate, got {end}")
        self.warmup, self.end = warmup, end
        self.total_steps = 1
        super().__init__(optimizer)

    def start(self, total_steps: int) -> None:
        """Set the length of the run in optimizer steps, before the first one.

        Raises:
            InputError: the run has no end or is shorter than the warm-up.
        """
        if total_steps <= 0:
            raise InputError("model.lr_scheduler needs a run with an end: set trainer.max_steps or trainer.max_epochs")
        self.total_steps = total_steps
        if self.warmup_steps > total_steps:
            problem = f"{self.warmup} does not fit into {total_steps} steps; shorten it"
            raise InputError(f"model.lr_scheduler.warmup {problem}")
        self._set_lr()

    def _set_lr(self) -> None:
        self._last_lr = self.get_lr()
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = lr

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps of the warm-up."""
        return round(self.warmup * self.total_steps) if 0 < self.warmup < 1 else int(self.warmup)

    def decay(self, progress: float) -> float:
        """Factor in [end, 1] at ``progress`` in [0, 1] of the time after the warm-up."""
        raise NotImplementedError

    def get_lr(self) -> list[float | Tensor]:
        """Learning rate of each parameter group at the present step."""
        step, warmup = max(self.last_epoch, 0), self.warmup_steps
        if step < warmup:
            factor = (step + 1) / (warmup + 1)
        else:
            factor = self.decay(min((step - warmup) / max(self.total_steps - warmup, 1), 1.0))
        return [lr * factor for lr in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """The schedule's position. All else comes from the config, which may change on resume."""
        return {key: getattr(self, key) for key in ("last_epoch", "_step_count")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the step of ``state_dict``, with this schedule's rate at that step."""
        super().load_state_dict(state_dict)
        self._set_lr()


class Constant(Schedule):
    """The full rate after the warm-up; ``end`` is not used."""

    def decay(self, progress: float) -> float:  # noqa: D102
        return 1.0


class Linear(Schedule):
    """A straight line down to ``end``."""

    def decay(self, progress: float) -> float:  # noqa: D102
        return 1.0 - (1.0 - self.end) * progress


class Cosine(Schedule):
    """Half a cosine down to ``end`` (SGDR without restarts, https://arxiv.org/abs/1608.03983)."""

    def decay(self, progress: float) -> float:  # noqa: D102
        return self.end + (1.0 - self.end) * 0.5 * (1.0 + math.cos(math.pi * progress))


class Exponential(Schedule):
    """A geometric decay that reaches ``end`` (which must be positive) at the end of the run."""

    def __init__(self, optimizer: Optimizer, warmup: int | float = 0, end: float = 0.01):
        if end <= 0:
            raise InputError(f"model.lr_scheduler.end of Exponential must be above 0, got {end}; try 0.01")
        super().__init__(optimizer, warmup, end)

    def decay(self, progress: float) -> float:  # noqa: D102
        return self.end**progress


class Step(Schedule):
    """The rate is multiplied by ``gamma`` at each milestone, a share of the time after the warm-up."""

    def __init__(
        self,
        optimizer: Optimizer,
        warmup: int | float = 0,
        milestones: tuple[float, ...] = (0.5, 0.75),
        gamma: float = 0.1,
    ):
        if not all(0 <= milestone <= 1 for milestone in milestones):
            raise InputError(f"model.lr_scheduler.milestones are shares of the run, from 0 to 1; got {milestones}")
        self.milestones, self.gamma = tuple(milestones), gamma
        super().__init__(optimizer, warmup)

    def decay(self, progress: float) -> float:  # noqa: D102
        return self.gamma ** sum(progress >= milestone for milestone in self.milestones)


class WSD(Schedule):
    """Warm-up, stable, decay: constant, then linear to ``end`` (MiniCPM, https://arxiv.org/abs/2404.06395).

    Args:
        optimizer: the optimizer to drive.
        warmup: as in :class:`Schedule`.
        end: factor at the end of the run.
        decay_fraction: share of the time after the warm-up that is spent decaying.
    """

    def __init__(self, optimizer: Optimizer, warmup: int | float = 0, end: float = 0.0, decay_fraction: float = 0.2):
        if not 0 <= decay_fraction <= 1:
            raise InputError(f"model.lr_scheduler.decay_fraction must be from 0 to 1, got {decay_fraction}")
        self.decay_fraction = decay_fraction
        super().__init__(optimizer, warmup, end)

    def decay(self, progress: float) -> float:  # noqa: D102
        left = min((1.0 - progress) / self.decay_fraction, 1.0) if self.decay_fraction else 1.0
        return self.end + (1.0 - self.end) * left


class MuonAdamW(Optimizer):
    """:class:`torch.optim.Muon` for hidden matrices and AdamW for everything else, as one optimizer.

    Muon orthogonalizes the momentum of matrices (https://kellerjordan.github.io/posts/muon). AdamW takes embeddings,
    heads, norms and biases: the groups that :func:`param_groups` marks ``use_muon: False`` or that hold other tensors
    than matrices, as those of experts, which it says.

    Args:
        params: parameter groups.
        lr: learning rate of both; Muon's is rescaled to match AdamW's update size (``match_rms_adamw``).
        weight_decay: decoupled weight decay of both.
        momentum: Muon's momentum.
        betas: AdamW's moment decay rates.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
    ):
        settings: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        scratch = torch.zeros(1, 1)
        # Before each step the parts get this optimizer's groups and state, so checkpoints, schedules and gradient
        # scaling see one ordinary optimizer.
        self._parts: list[Optimizer] = [
            torch.optim.Muon([scratch], momentum=momentum, adjust_lr_fn="match_rms_adamw", **settings),
            torch.optim.AdamW([scratch], betas=betas, **settings),
        ]
        super().__init__(params, settings)
        left = sum(p.ndim == 3 for group in self.param_groups for p in group["params"])
        if left and not rank_zero_only.rank:
            problem = f"AdamW takes {left} parameters of three axes, such as those of experts"
            print(f"model.optimizer MuonAdamW: {problem}; Muon takes matrices alone", flush=True)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and decide which part optimizes it."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["use_muon"] = group.get("use_muon", True) and all(p.ndim == 2 for p in group["params"])
        for key, value in self._parts[0 if group["use_muon"] else 1].defaults.items():
            group.setdefault(key, value)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of both parts."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part, is_muon in zip(self._parts, (True, False), strict=True):
            part.state = self.state
            part.param_groups = [group for group in self.param_groups if group["use_muon"] is is_muon]
            part.step()
        return loss
