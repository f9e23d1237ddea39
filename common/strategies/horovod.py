"""Data parallel whose gradients Horovod averages."""

import importlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from common.errors import InputError
from common.parts import StrategyFacts, share_buffers
from common.strategies.sharding import share_weights


class Horovod(StrategyFacts, DDPStrategy):
    """Horovod's ring all-reduce (Sergeev & Del Balso 2018, https://arxiv.org/abs/1802.05799) in the place of DDP's.

    Ranks are started as for every other strategy, and torch does all else. Horovod's coordinator on rank 0 hears which
    gradients are ready on all ranks, and lets them average these while backward goes on. A parameter that a rank has
    not used counts as a gradient of zeros.

    Its ``DistributedOptimizer`` would make the optimizer anew, after schedules were tied to it; this has the same hooks
    without it. Further settings of Horovod are its environment variables.

    Args:
        compression: fp16 sends gradients in half the bytes of fp32, rounded: below 6e-8 as zero, above 65,504 as
            infinite.
        fusion_threshold: bytes of a buffer for gradients that are ready at the same time and averaged together. Their
            choice depends on time, and on more than two ranks the order of sums with it. With 0 each is averaged by
            itself, and a run repeats to the bit.
        timeout: after which a rank that waits for another gives up.

    Raises:
        InputError: Horovod is not installed, or was built for another torch, or a number is out of its range.
    """

    averages_by_itself = True

    def __init__(
        self,
        compression: Literal["none", "fp16"] = "none",
        fusion_threshold: int = 0,
        timeout: timedelta = default_pg_timeout,
    ):
        try:
            self._hvd: Any = importlib.import_module("horovod.torch")
        except ImportError as error:
            problem = f"Horovod is not installed, or not for torch {torch.__version__}"
            raise InputError(f"trainer.strategy: {problem}; run configs/cluster/horovod.sh") from error
        super().__init__(timeout=timeout)
        self.compression, self.fusion_threshold = compression, fusion_threshold
        self._seconds = timeout.total_seconds()
        self._accumulates = False
        self._sent: dict[nn.Parameter, tuple[int, Tensor]] = {}  # handle, and what becomes the average
        self._hooks: list[RemovableHandle] = []

    @override
    def setup_environment(self) -> None:
        if self.fusion_threshold < 0:
            raise InputError(f"trainer.strategy.fusion_threshold: must be at least 0, got {self.fusion_threshold}")
        super().setup_environment()

    @override
    def configure_ddp(self) -> None:
        assert self.lightning_module is not None
        share_weights(self.lightning_module)  # hooks of the parameters take the place of DDP's wrapper
        share_buffers(self.lightning_module)
        self._start()
        self._names = {p: name for name, p in self.lightning_module.named_parameters() if p.requires_grad}
        self._hooks = [p.register_post_accumulate_grad_hook(self._send) for p in self._names]

    def _start(self) -> None:
        """Let the ranks find one another in Horovod as well."""
        from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer  # type: ignore

        assert self.cluster_environment is not None
        # It asks nobody who they are: other machines reach it where they have to.
        address = "127.0.0.1" if self.num_nodes == 1 else self.cluster_environment.main_address
        listens = address if self.num_nodes == 1 else ""
        server = RendezvousHTTPServer((listens, 0), RendezvousHandler, 0) if self.is_global_zero else None
        port = self.broadcast(server.server_port if server else 0)
        own = {
            "RANK": self.global_rank, "SIZE": self.world_size,
            "LOCAL_RANK": self.local_rank, "LOCAL_SIZE": self.num_processes,
            "CROSS_RANK": self.node_rank, "CROSS_SIZE": self.num_nodes,
            "HOSTNAME": f"node{self.node_rank}",  # by which ranks of a node find one another
            "CONTROLLER": "gloo", "CPU_OPERATIONS": "gloo",
            "GLOO_RENDEZVOUS_ADDR": address, "GLOO_RENDEZVOUS_PORT": port,
            "GLOO_TIMEOUT_SECONDS": max(int(self._seconds), 1), "FUSION_THRESHOLD": self.fusion_threshold,
        }  # fmt: skip
        os.environ.update({f"HOROVOD_{key}": str(value) for key, value in own.items()})
        os.environ.setdefault("HOROVOD_LOG_LEVEL", "fatal")  # it logs a lost rank, and raises it as well
        if server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
        self._hvd.init()
        self.barrier()  # all have found one another
        if server:
            server.shutdown()
            server.server_close()

    def _send(self, parameter: nn.Parameter) -> None:
        """Hand over a gradient that is complete, while backward goes on."""
        gradient = parameter.grad
        if self._accumulates or gradient is None:
            return
        if self.compression == "fp16":
            gradient = gradient.half()
        elif gradient.dtype == torch.bfloat16:  # Horovod does not know it
            gradient = gradient.float()
        handle = self._hvd.allreduce_async_(gradient, name=self._names[parameter], op=self._hvd.Average)
        self._sent[parameter] = handle, gradient

    @contextmanager
    @override
    def block_backward_sync(self) -> Iterator[None]:
        self._accumulates = True
        try:
            yield
        finally:
            self._accumulates = False

    @override
    def post_backward(self, closure_loss: Tensor) -> None:
        if self._accumulates:
            return
        for p in self._names:
            if p not in self._sent:  # other ranks may have used it, and wait
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                self._send(p)
        deadline = time.monotonic() + self._seconds
        for p, (handle, average) in self._sent.items():
            while not self._hvd.poll(handle):  # synchronize would keep a core busy, and wait without end
                if time.monotonic() > deadline:
                    problem = f"Horovod timed out: another rank has not sent the gradient of {self._names[p]}"
                    raise torch.distributed.DistError(problem)
                time.sleep(1e-4)
            self._hvd.synchronize(handle)
            if average is not p.grad:
                p.grad.copy_(average)  # type: ignore[union-attr]
        self._sent.clear()

    @override
    def teardown(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hvd.shutdown()
        super().teardown()
