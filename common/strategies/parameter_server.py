"""Data parallel around a server that has the weights and the optimizer: synchronous, bounded or asynchronous SGD."""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from functools import reduce
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
import torch.distributed as dist
from jaxtyping import Float
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer
from typing_extensions import override

from common.errors import InputError
from common.figures import PALETTE, new_figure, style_axes
from common.parts import Memory, StrategyFacts, share_buffers
from common.strategies.sharding import share_weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def flat(tensors: Iterable[Tensor]) -> Float[Tensor, " elements"]:
    """All elements in one row."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


@torch.no_grad()
def scatter(values: Float[Tensor, " elements"], tensors: list[Tensor]) -> None:
    """The inverse of :func:`flat`, into tensors that are there."""
    for tensor, part in zip(tensors, values.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


class Server:
    """Weights and optimizer of all ranks, on the host of rank 0.

    Rank 0 calls :meth:`exchange`; each other rank talks to a thread that does so for it (:meth:`serve`).

    Args:
        optimizer: over the server's own weights.
        ranks: how many send gradients.
        max_staleness: see :class:`ParameterServer`.
        timeout: after which a rank that waits for the others gives up.
    """

    def __init__(self, optimizer: Optimizer, ranks: int, max_staleness: int | None, timeout: timedelta):
        self.optimizer, self.ranks, self.max_staleness = optimizer, ranks, max_staleness
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        self.updates = 0
        self.clock = [0] * ranks  # gradients that each rank has sent
        self.staleness: Counter[int] = Counter()  # of updates between a rank's weights and its gradient
        self.error: Exception | None = None  # of a thread, for rank 0 to raise
        self.seen = [0] * ranks  # updates in the weights that each rank has
        self._timeout = timeout.total_seconds()
        self._given: dict[int, Tensor] = {}  # gradients that wait for those of the other ranks
        self._changed = threading.Condition()

    @torch.no_grad()
    def exchange(
        self, rank: int, gradient: Float[Tensor, " elements"], settings: Callable[[], None] = lambda: None
    ) -> Float[Tensor, " elements"]:
        """Take a rank's gradient and return the weights that it goes on from, once it may.

        Args:
            rank: the one that has computed it.
            gradient: of all weights.
            settings: called when no update is going on.

        Raises:
            Exception: a thread has ended with it.
        """
        with self._changed:
            settings()
            self.clock[rank] += 1
            self._given[rank] = gradient
            in_step = self.max_staleness == 0
            if not in_step or len(self._given) == self.ranks:
                self._update()
                self._changed.notify_all()
            ready = self._changed.wait_for(lambda: self.error or self._may_go_on(rank), self._timeout)
            if self.error:
                raise self.error
            if not ready:
                raise dist.DistError("Timed out: another rank has sent no gradient")
            self.seen[rank] = self.updates
            return flat(self.params)

    def _update(self) -> None:
        """One step of the optimizer by the mean of the gradients that are there, summed in the order of ranks."""
        self.staleness.update(self.updates - self.seen[rank] for rank in self._given)
        gradients = [self._given[rank] for rank in sorted(self._given)]
        self._given.clear()
        mean = reduce(torch.add, gradients).div_(len(gradients))
        parts = mean.split([p.numel() for p in self.params])
        for p, part in zip(self.params, parts, strict=True):
            p.grad = part.view_as(p)
        with torch.enable_grad():  # as an optimizer expects it
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1

    def _may_go_on(self, rank: int) -> bool:
        if self.max_staleness is None:
            return True
        return rank not in self._given and self.clock[rank] - min(self.clock) <= self.max_staleness

    def serve(self, rank: int, group: dist.ProcessGroup) -> None:
        """Exchange for another rank until its message ends with a 0."""
        try:
            message = flat([*self.params, self.params[0].new_zeros(1)])
            while True:
                dist.recv(message, rank, group)
                if not message[-1]:
                    return
                dist.send(self.exchange(rank, message[:-1]), rank, group)
        except Exception as error:
            with self._changed:
                self.error = self.error or error
                self._changed.notify_all()


class ParameterServer(StrategyFacts, DDPStrategy):
    """Ranks send gradients to a server, which steps and sends weights back (Li et al. 2014, OSDI).

    The server is a part of rank 0: threads over gloo, with weights and optimizer in the memory of its host.
    ``max_staleness`` is how many steps a rank may be ahead of the slowest one:

    - 0: synchronous SGD. The server waits for the gradients of all ranks and steps by their mean, as DDP does.
    - n: stale synchronous parallel (Ho et al. 2013). The server steps by each gradient, and holds ranks that are ahead.
    - None: asynchronous SGD (Dean et al. 2012, section 4.1). The server steps by each gradient, and nobody waits.

    With other values than 0 the server steps once for each rank in each step of the run, by gradients of weights that
    others have changed meanwhile: take a smaller learning rate. Ranks still meet for logged rows, validation and
    checkpoints, and the run does not repeat to the bit.

    A parameter that a rank has not used counts as a gradient of zeros.

    Args:
        max_staleness: as above.
        timeout: after which a rank that waits for another gives up.

    Raises:
        InputError: a number is out of its range, gradients are scaled, or batch norm would synchronize in each step.
    """

    averages_by_itself = True
    syncs_batch_norm = False  # it would wait for all ranks in each step

    def __init__(self, max_staleness: int | None = 0, timeout: timedelta = default_pg_timeout):
        super().__init__(timeout=timeout)
        self.max_staleness, self.timeout = max_staleness, timeout
        self.server: Server | None = None

    @override
    def setup_environment(self) -> None:
        if self.max_staleness is not None and self.max_staleness < 0:
            problem = f"must be at least 0, or null, got {self.max_staleness}"
            raise InputError(f"trainer.strategy.max_staleness: {problem}")
        if self.precision_plugin.precision.startswith("16"):
            problem = f"{self.precision_plugin.precision} scales gradients, which the server would not know"
            raise InputError(f"trainer.precision: {problem}; take bf16-mixed, or configs/strategy/ddp.yaml")
        super().setup_environment()

    @override
    def memory_per_rank(self, whole: Memory, trained: int, ranks: int) -> Memory:
        """The memory of rank 0: weights twice, and a gradient of each rank."""
        return Memory(whole.weights + whole.gradients, ranks * whole.gradients, whole.optimizer)

    @override
    def train_metrics(self) -> dict[str, float]:
        """Mean number of updates that come between the computation of a gradient and its use."""
        if self.server is None or not self.server.updates:
            return {}
        return {"perf/staleness": sum(n * k for n, k in self.server.staleness.items()) / self.server.staleness.total()}

    @override
    def media(self) -> "dict[str, Figure]":
        """How stale gradients were."""
        return {"staleness": staleness(self.server.staleness)} if self.server and self.server.updates else {}

    @override
    def configure_ddp(self) -> None:
        assert self.model is not None
        share_weights(self.model)  # without DDP's wrapper, as backward concerns this rank alone
        if self.max_staleness == 0:  # else saving, which shares them, would change what attacks find in a step
            share_buffers(self.model)

    @override
    def setup(self, trainer: L.Trainer) -> None:
        super().setup(trainer)
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._module: Any = self.lightning_module
        (self._optimizer,) = self.optimizers
        self._told = [dict(group) for group in self._optimizer.param_groups]
        self._params = [p for group in self._optimizer.param_groups for p in group["params"]]
        # The server's threads outlast a validation; a rank that waits for an answer has the strategy's timeout.
        self._group: Any = dist.new_group(backend="gloo", timeout=timedelta(days=365))
        self._threads: list[threading.Thread] = []
        if not self.is_global_zero:
            return
        groups = [
            {**group, "params": [nn.Parameter(p.detach().to("cpu", copy=True)) for p in group["params"]]}
            for group in self._optimizer.param_groups
        ]
        make: Callable[[Any], Optimizer] = self._module.optimizer
        self.server = Server(make(groups), self.world_size, self.max_staleness, self.timeout)
        for rank in range(1, self.world_size):
            self._threads.append(threading.Thread(target=self.server.serve, args=(rank, self._group), daemon=True))
            self._threads[-1].start()

    @override
    def optimizer_step(self, optimizer: Any, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        # All that comes before a step, clipping too. The server makes the step.
        output = self.precision_plugin._wrap_closure(self._module, optimizer, closure)
        optimizer._opt_called = True  # else torch's schedules would warn
        gradient = flat(p.new_zeros(p.shape) if p.grad is None else p.grad for p in self._params).cpu()
        if self.server is not None:
            weights = self.server.exchange(0, gradient, self._tell)
        else:
            self._send(gradient, 1.0)
            weights = torch.empty_like(gradient)
            answer: Any = dist.irecv(weights, 0, self._group)
            answer.wait(self.timeout)
        scatter(weights, self._params)
        return output

    def _send(self, gradient: Tensor, goes_on: float) -> None:
        dist.send(torch.cat([gradient, gradient.new_tensor([goes_on])]), 0, self._group)

    def _tell(self) -> None:
        """Give the server the settings that a schedule has changed in rank 0's optimizer."""
        assert self.server is not None
        for told, now, group in zip(
            self._told, self._optimizer.param_groups, self.server.optimizer.param_groups, strict=True
        ):
            changed = {key: value for key, value in now.items() if key != "params" and value != told.get(key)}
            group.update(changed)
            told.update(changed)

    @override
    def total_norm(self, gradients: Iterable[Tensor]) -> Tensor:
        """Norm of the gradient that the server will step by; in step, every rank then has the mean."""
        if self.max_staleness != 0:
            return nn.utils.get_total_norm(gradients)
        for p in self._params:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # which others may have used
        gradients = [p.grad for p in self._params]
        mean = flat(gradients)
        dist.all_reduce(mean)
        scatter(mean / self.world_size, gradients)
        return nn.utils.get_total_norm(gradients)

    def _refresh(self) -> None:
        """Give all ranks the weights of the server, and the buffers of rank 0."""
        if not hasattr(self, "_params"):
            return
        self.barrier()  # no rank is in the middle of an exchange any more
        if self.server is not None:
            scatter(flat(self.server.params), self._params)
            self.server.seen = [self.server.updates] * self.world_size
        assert self.model is not None
        share_weights(self.model)

    @override
    def on_validation_start(self) -> None:
        self._refresh()

    @override
    def on_train_end(self) -> None:
        self._refresh()
        if self.server is None:
            self._send(flat(self._params).cpu(), 0.0)
        for thread in self._threads:
            thread.join()
        del self._params  # a later command has weights of its own

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        self._refresh()
        return super().lightning_module_state_dict()

    @override
    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        if self.server is None:
            return super().optimizer_state(optimizer)
        self._tell()  # a schedule has stepped since the last exchange
        return super().optimizer_state(self.server.optimizer)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        (state,) = checkpoint["optimizer_states"]
        self._optimizer.load_state_dict({**state, "state": {}})  # the ranks themselves do not step
        self._told = [dict(group) for group in self._optimizer.param_groups]
        if self.server is not None:
            self.server.optimizer.load_state_dict(state)


def staleness(counts: Mapping[int, int]) -> "Figure":
    """Draw how stale gradients were.

    Args:
        counts: number of gradients, by the number of updates since their weights.
    """
    figure = new_figure(4.4, 2.6)
    axes = figure.add_subplot()
    last = max(counts)
    total = sum(counts.values())
    title = f"staleness of {total:,} gradients, {sum(k * n for k, n in counts.items()) / total:.2f} on average"
    style_axes(axes, title, "updates between weights and gradient", "share of gradients")
    axes.bar(range(last + 1), [counts.get(k, 0) / total for k in range(last + 1)], 0.8, color=PALETTE[0])
    axes.set_ylim(0, 1.02)
    axes.locator_params("x", integer=True)
    return figure
