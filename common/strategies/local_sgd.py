"""Data parallel that communicates once in many steps: local SGD and DiLoCo."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.constants import default_pg_timeout
from typing_extensions import override

from common.errors import InputError
from common.parts import Memory, StrategyFacts, broadcast_buffers, saved_buffers
from common.strategies.sharding import share_weights


class LocalSGD(StrategyFacts, DDPStrategy):
    """Each rank trains by itself, with its own optimizer, and the ranks average their weights from time to time.

    With ``outer_lr`` 1 and no momentum that is local SGD (Stich 2019, https://arxiv.org/abs/1805.09767). Otherwise the
    average move of the ranks is the gradient of an outer SGD (DiLoCo: Douillard et al. 2023, algorithm 1,
    https://arxiv.org/abs/2311.08105). Ranks also average for each validation and checkpoint, so that there is one net;
    the steps to the next averaging are counted from there.

    A checkpoint has the optimizer of rank 0, and all ranks go on from it: a resumed run repeats nearly, not to the bit.

    Args:
        sync_every: optimizer steps between two averagings.
        warmup_steps: steps at the start of the run with an averaging after each (post-local SGD: Lin et al. 2020,
            https://arxiv.org/abs/1808.07217).
        outer_lr: of the outer SGD.
        outer_momentum: of the outer SGD, in [0, 1).
        outer_nesterov: whether that is Nesterov's.
        timeout: after which a rank that waits for another gives up.

    Raises:
        InputError: a number is out of its range, or batch norm would synchronize in each step.
    """

    averages_by_itself = True
    syncs_batch_norm = False  # it would wait for all ranks in each step

    def __init__(
        self,
        sync_every: int = 8,
        warmup_steps: int = 0,
        outer_lr: float = 1.0,
        outer_momentum: float = 0.0,
        outer_nesterov: bool = False,
        timeout: timedelta = default_pg_timeout,
    ):
        super().__init__(timeout=timeout)
        self.sync_every, self.warmup_steps = sync_every, warmup_steps
        self.outer_lr, self.outer_momentum, self.outer_nesterov = outer_lr, outer_momentum, outer_nesterov
        self.syncs = 0  # averagings so far, in this process
        self._since = 0  # optimizer steps since the last one

    @override
    def setup_environment(self) -> None:
        for key, low in {"sync_every": 1, "warmup_steps": 0, "outer_momentum": 0}.items():
            if (value := getattr(self, key)) < low:
                raise InputError(f"trainer.strategy.{key}: must be at least {low}, got {value}")
        if self.outer_lr <= 0:
            raise InputError(f"trainer.strategy.outer_lr: must be above 0, got {self.outer_lr}")
        if self.outer_momentum >= 1:
            raise InputError(f"trainer.strategy.outer_momentum: must be below 1, got {self.outer_momentum}")
        if self.outer_nesterov and not self.outer_momentum:
            raise InputError("trainer.strategy.outer_nesterov: needs outer_momentum; set it, or take false")
        super().setup_environment()

    @override
    def memory_per_rank(self, whole: Memory, trained: int, ranks: int) -> Memory:
        """The whole, the weights of the last averaging, and the outer momentum.

        While ranks average there is another copy of the weights for a moment.
        """
        last = max(whole.gradients, 4 * trained)
        outer = last if self.outer_momentum else 0
        return Memory(whole.weights + last, whole.gradients, whole.optimizer + outer)

    @override
    def train_metrics(self) -> dict[str, float]:
        """How often the ranks have communicated."""
        return {"perf/syncs": float(self.syncs)}

    @override
    def configure_ddp(self) -> None:
        assert self.model is not None
        share_weights(self.model)  # without DDP's wrapper, as backward concerns this rank alone

    @override
    def setup(self, trainer: L.Trainer) -> None:
        super().setup(trainer)
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self.start([p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]])

    def start(self, params: Sequence[Tensor]) -> None:
        """Begin from the present weights, which are the same on all ranks."""
        self._params = params
        # In at least fp32: steps of the average are small.
        self._agreed = [p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for p in params]
        self._outer = torch.optim.SGD(self._agreed, self.outer_lr, self.outer_momentum, nesterov=self.outer_nesterov)

    @override
    def optimizer_step(self, optimizer: Any, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        self._since += 1
        step = self.lightning_module.trainer.global_step  # type: ignore[union-attr]  # the number of those before
        if step < self.warmup_steps or self._since >= self.sync_every:
            self._agree()
        return output

    @torch.no_grad()
    def _agree(self) -> None:
        """Let the outer optimizer step by the average move of all ranks, and go on from there."""
        if not self._since:
            return
        self._since, self.syncs = 0, self.syncs + 1
        for last, p in zip(self._agreed, self._params, strict=True):
            last.grad = last - p
        moved = [last.grad for last in self._agreed if last.grad is not None]
        for work in [dist.all_reduce(value, async_op=True) for value in moved]:
            work.wait()  # type: ignore[union-attr]
        for value in moved:
            value /= dist.get_world_size()
        self._outer.step()
        self._outer.zero_grad()
        for last, p in zip(self._agreed, self._params, strict=True):
            p.copy_(last)
        broadcast_buffers(saved_buffers(self.lightning_module))  # type: ignore[arg-type]

    @override
    def on_validation_start(self) -> None:
        self._agree()

    @override
    def on_train_end(self) -> None:
        self._agree()

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        self._agree()
        return super().lightning_module_state_dict()

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        if hasattr(self, "_outer"):  # not of a trainer that has only evaluated
            checkpoint["outer_optimizer"] = self._outer.state_dict()
        super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        super().load_optimizer_state_dict(checkpoint)
        if (before := checkpoint.get("outer_optimizer")) and self.outer_momentum:
            now = self._outer.state_dict()  # its rates win over the checkpoint's
            self._outer.load_state_dict({**now, "state": before["state"]})
