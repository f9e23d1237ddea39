"""Data parallel with other ways to average gradients: hooks of DDP, also on CPUs, where Lightning registers none."""

from datetime import timedelta

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.constants import default_pg_timeout
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from common.errors import InputError
from common.parts import Memory, StrategyFacts


def ring_all_reduce(values: Tensor) -> Tensor:
    """Add up a flat tensor over all ranks, in place. Each rank talks to its two neighbours alone.

    N ranks cut it into N chunks. In N - 1 rounds each rank adds a chunk that it has received to its own; then it has
    the sum of one chunk. In N - 1 more rounds the sums go round (Patarasuk & Yuan 2009,
    https://doi.org/10.1016/j.jpdc.2008.09.002, figure 2). A rank sends 2 (N - 1) / N times the size of the tensor.

    Args:
        values: one-dimensional and contiguous, of the same size on each rank.
    """
    size, rank = dist.get_world_size(), dist.get_rank()
    chunks = list(values.tensor_split(size))
    to, source = (rank + 1) % size, (rank - 1) % size
    # After the first phase rank r has the sum of chunk r + 1, with which the second one begins.
    for gathering in (0, 1):
        for step in range(size - 1):
            mine = chunks[(rank - step + gathering) % size]
            theirs = chunks[(rank - step - 1 + gathering) % size]
            received = torch.empty_like(theirs)
            pair = [dist.P2POp(dist.isend, mine, to), dist.P2POp(dist.irecv, received, source)]
            for work in dist.batch_isend_irecv(pair):
                work.wait()
            if gathering:
                theirs.copy_(received)
            else:
                theirs.add_(received)
    return values


def _completed(values: Tensor) -> Future[Tensor]:
    done = Future(devices=[values.device] if values.is_cuda else None)  # streams wait for it by the device
    done.set_result(values)
    return done


def _ring_hook(_: None, bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[attr-defined]
    return _completed(ring_all_reduce(bucket.buffer()).div_(dist.get_world_size()))


class _Hooked(StrategyFacts, DDPStrategy):
    """DDP whose gradients a hook averages, on every device."""

    averages_by_itself = True

    @override
    def configure_ddp(self) -> None:
        super().configure_ddp()
        assert isinstance(self.model, DistributedDataParallel)
        self.register_hook(self.model)

    def register_hook(self, model: DistributedDataParallel) -> None:
        """Give the wrapped module its hook."""
        raise NotImplementedError


class RingAllReduce(_Hooked):
    """DDP whose ring is written out, see :func:`ring_all_reduce`.

    Take it to read it, to change it, or to count bytes. NCCL and gloo use rings too where these are the fastest, and
    average while backward goes on; backward waits for this one.

    Args:
        timeout: after which a rank that waits for another gives up.
    """

    def __init__(self, timeout: timedelta = default_pg_timeout):
        super().__init__(gradient_as_bucket_view=True, timeout=timeout)

    @override
    def register_hook(self, model: DistributedDataParallel) -> None:
        model.register_comm_hook(None, _ring_hook)


def _power_sgd_hook(state: PowerSGDState, bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[attr-defined]
    # It exchanges three times, one after the other. Gloo answers on threads, and ranks would mix up several buckets;
    # so each waits. On a GPU only the stream does.
    return _completed(powerSGD_hook(state, bucket).wait())


class PowerSGD(_Hooked):
    """DDP that sends low-rank approximations of gradients (Vogels et al. 2019, https://arxiv.org/abs/1905.13727).

    A matrix of n x m becomes two of n x r and r x m, by one power iteration that starts from the last step's; vectors
    are sent whole. The error of the approximation is added to the next gradient of the same rank (error feedback). It
    takes as much memory as the gradients, and checkpoints do not have it: a resumed run begins with ``start_step``
    steps of plain DDP and no error, so it repeats nearly, not to the bit.

    Args:
        rank: r; more is closer to the gradient and more to send.
        start_step: steps of plain DDP before, as gradients change fast at first; at least 2.
        min_compression: matrices that would shrink by less than this factor are sent whole.
        timeout: after which a rank that waits for another gives up.

    Raises:
        InputError: a number is out of its range, or gradients are scaled; an overflow would stay in the error.
    """

    def __init__(
        self,
        rank: int = 4,
        start_step: int = 100,
        min_compression: int = 2,
        timeout: timedelta = default_pg_timeout,
    ):
        super().__init__(gradient_as_bucket_view=True, timeout=timeout)
        self.rank, self.start_step, self.min_compression = rank, start_step, min_compression

    @override
    def setup_environment(self) -> None:
        if self.rank < 1:
            raise InputError(f"trainer.strategy.rank: must be at least 1, got {self.rank}")
        if self.start_step < 2:
            raise InputError(f"trainer.strategy.start_step: must be at least 2, got {self.start_step}")
        if self.min_compression < 1:
            raise InputError(f"trainer.strategy.min_compression: must be at least 1, got {self.min_compression}")
        if self.precision_plugin.precision.startswith("16"):
            problem = f"{self.precision_plugin.precision} overflows now and then, which PowerSGD would never forget"
            raise InputError(f"trainer.precision: {problem}; take bf16-mixed, or configs/strategy/ddp.yaml")
        super().setup_environment()

    @override
    def memory_per_rank(self, whole: Memory, trained: int, ranks: int) -> Memory:
        """The whole, and the error of the approximation."""
        return whole._replace(gradients=2 * whole.gradients)

    @override
    def register_hook(self, model: DistributedDataParallel) -> None:
        self.state = PowerSGDState(
            None,
            self.rank,
            self.start_step,
            self.min_compression,
            # A gradient of zero, or of a lower rank, would be divided by zero.
            orthogonalization_epsilon=1e-8,  # type: ignore[arg-type]
            compression_stats_logging_frequency=2**62,  # never, as it goes to the console
        )
        model.register_comm_hook(self.state, _power_sgd_hook)
