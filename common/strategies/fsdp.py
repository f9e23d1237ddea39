"""Fully sharded data parallel, both of torch's: every rank keeps a share of weights, gradients and optimizer state.

A checkpoint is that of a single process: one file, whole tensors, the optimizer's state numbered in the order of its
groups. So it goes on under any other strategy and on any number of ranks.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    OffloadPolicy,
    StateDictType,
    fully_shard,
)
from torch.distributed.fsdp.wrap import CustomPolicy
from torch.distributed.tensor import DTensor
from torchmetrics import Metric
from typing_extensions import override

from common.data import rank_groups
from common.errors import InputError
from common.parts import Memory, batch_norms, blocks, share_buffers
from common.strategies.sharding import WholeCheckpoints, limit_waiting, refuse_matrix_optimizer
from common.strategies.tensor_parallel import plan_slices, share_like, slice_layers


class FSDP(WholeCheckpoints, FSDPStrategy):
    """Lightning's FSDP1 (https://arxiv.org/abs/2304.11277), on CPUs too.

    Each rank makes the whole net, loads a checkpoint into it, and then keeps its share. Ranks gather one block of the
    net at a time.

    Args:
        sharding_strategy: FULL_SHARD over all ranks; SHARD_GRAD_OP keeps gathered weights until backward; HYBRID_SHARD
            shards within a node and averages gradients between nodes.
        cpu_offload: keep weights, gradients and optimizer state in the memory of the host.
        device_mesh: for HYBRID_SHARD, the number of replicas and of the ranks of each; None for a replica per node.
        timeout: after which a rank that waits for another gives up.

    Raises:
        InputError: mixed precision on CPUs, where Lightning's autocast does nothing, an optimizer of whole matrices, or
            a mesh that does not fit.
    """

    def __init__(
        self,
        sharding_strategy: Literal["FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD"] = "FULL_SHARD",
        cpu_offload: bool = False,
        device_mesh: tuple[int, int] | None = None,
        timeout: timedelta = default_pg_timeout,
    ):
        self._units: set[int] = set()  # known once the net is made
        policy: Any = CustomPolicy(lambda module: id(module) in self._units)
        super().__init__(
            sharding_strategy=sharding_strategy, cpu_offload=cpu_offload, auto_wrap_policy=policy, timeout=timeout
        )
        self._mesh, self.timeout = device_mesh, timeout

    @override
    def setup_environment(self) -> None:
        if self.root_device.type == "cpu" and "mixed" in self.precision_plugin.precision:
            problem = "under FSDP1 needs a GPU: Lightning would leave it out on a CPU"
            raise InputError(f"trainer.precision: {self.precision_plugin.precision} {problem}; take fsdp2 or bf16-true")
        if self.cpu_offload.offload_params:
            _refuse_offload(self.root_device)
        key, hybrid = "trainer.strategy.device_mesh", self.sharding_strategy.name == "HYBRID_SHARD"
        if self._mesh and not hybrid:
            raise InputError(f"{key}: is for sharding_strategy HYBRID_SHARD; take that, or null")
        if hybrid and (self._mesh[1] if self._mesh else self.num_processes) < 2:
            problem = "FSDP1 would not average gradients over replicas of one rank"
            raise InputError(f"{key}: {problem}; take configs/strategy/ddp.yaml, or larger replicas")
        super().setup_environment()
        if self._mesh:
            if self._mesh[0] * self._mesh[1] != self.world_size:
                problem = f"{list(self._mesh)} is no mesh of {self.world_size} ranks"
                raise InputError(f"{key}: {problem}; their product must be equal")
            self.kwargs["device_mesh"] = mesh = init_device_mesh(self.root_device.type, self._mesh)
            limit_waiting(mesh, self.timeout)

    @override
    def setup_optimizers(self, trainer: L.Trainer) -> None:
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            refuse_matrix_optimizer(optimizer)

    @property
    @override
    def mixed_precision_config(self) -> MixedPrecision | None:
        config = super().mixed_precision_config
        if config is None or "mixed" not in self.precision_plugin.precision:
            return config
        # Lightning would also keep buffers and add up gradients in 16 bits, and round the targets in a batch. No other
        # strategy does: the net's units cast their inputs.
        fp32 = {"reduce_dtype": torch.float32, "buffer_dtype": torch.float32}
        return dataclasses.replace(config, **fp32, cast_root_forward_inputs=False, cast_forward_inputs=True)

    @override
    def _setup_model(self, model: nn.Module) -> nn.Module:
        assert self.lightning_module is not None
        net: Any = self.lightning_module.net
        share_buffers(self.lightning_module)
        self._units |= {id(module) for module in [*blocks(net), net]}
        wrapped = FullyShardedDataParallel(
            model,
            cpu_offload=self.cpu_offload,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=self.root_device,
            **self.kwargs,
        )
        for module in wrapped.modules():  # FSDP moves parameters and buffers, not the state of metrics
            if isinstance(module, Metric):
                module.to(self.root_device)
        return wrapped

    @override
    def total_norm(self, gradients: Iterable[Tensor]) -> Tensor:
        """Norm of all gradients; each rank holds a share of them."""
        assert isinstance(self.model, FullyShardedDataParallel)
        return self.model.clip_grad_norm_(float("inf"))

    @override
    def memory_per_rank(self, whole: Memory, trained: int, ranks: int) -> Memory:
        """What is left on a rank of memory that is not sharded."""
        name = self.sharding_strategy.name
        parts = ranks
        if name == "HYBRID_SHARD":
            parts = self._mesh[1] if self._mesh else self.num_processes
        weights = whole.weights if name == "SHARD_GRAD_OP" else whole.weights // parts
        return Memory(weights, whole.gradients // parts, whole.optimizer // parts)

    def _whole(self) -> AbstractContextManager[Any]:
        assert self.model is not None
        # On CPUs, "offloaded" tensors would share memory that FSDP frees.
        on_gpu = self.root_device.type == "cuda"
        settings = {"offload_to_cpu": on_gpu, "rank0_only": on_gpu}
        configs = FullStateDictConfig(**settings), FullOptimStateDictConfig(**settings)
        return FullyShardedDataParallel.state_dict_type(self.model, StateDictType.FULL_STATE_DICT, *configs)

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.model is not None
        with self._whole():
            return self.model.state_dict()

    @override
    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        assert self.model is not None
        own = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        with self._whole():
            state = FullyShardedDataParallel.optim_state_dict(self.model, own)
        return _by_number(state, self.lightning_module.param_names) if state else state  # type: ignore[union-attr]

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        assert self.model is not None
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            named = _by_name(state, self.lightning_module.param_names)  # type: ignore[union-attr]
            with self._whole():
                mine = FullyShardedDataParallel.optim_state_dict_to_load(self.model, optimizer, named)
            optimizer.load_state_dict(mine)


class FSDP2(WholeCheckpoints, ModelParallelStrategy):
    """Torch's ``fully_shard`` (FSDP2): each parameter is sharded for itself, along its first axis.

    Each rank makes the whole net, loads a checkpoint into it, and then keeps its share. With ``tensor_parallel`` ranks
    form groups that share the computation of each sample (:mod:`common.strategies.tensor_parallel`), and FSDP2 shards
    each rank's slices over the groups: two dimensions of parallelism.

    Args:
        reshard_after_forward: free a block's gathered weights between forward and backward: less memory for gathering
            them again, as ZeRO-3; otherwise they stay until backward has used them, as ZeRO-2.
        cpu_offload: keep weights, gradients and optimizer state in the memory of the host.
        tensor_parallel: ranks that compute the same samples, each a slice of the layers; neighbours, so that they are
            on one node if they fit.
        timeout: after which a rank that waits for another gives up.

    Raises:
        InputError: ranks or layers cannot be divided so, or the net does not say which layers can be.
    """

    syncs_batch_norm = False

    def __init__(
        self,
        reshard_after_forward: bool = True,
        cpu_offload: bool = False,
        tensor_parallel: int = 1,
        timeout: timedelta = default_pg_timeout,
    ):
        # Norms and checkpoints gather offloaded shares on the host.
        backend = "cpu:gloo,cuda:nccl" if cpu_offload and torch.cuda.is_available() else None
        super().__init__(
            tensor_parallel_size=tensor_parallel,
            save_distributed_checkpoint=False,
            process_group_backend=backend,
            timeout=timeout,
        )
        self.reshard_after_forward, self.cpu_offload = reshard_after_forward, cpu_offload
        self.ranks_per_batch, self.timeout = tensor_parallel, timeout

    @override
    def memory_per_rank(self, whole: Memory, trained: int, ranks: int) -> Memory:
        """What is left on a rank of memory that is not sharded."""
        left = 1.0
        if self.ranks_per_batch > 1:
            net: Any = self.lightning_module.net  # type: ignore[union-attr]
            plan = plan_slices(net, self.ranks_per_batch)
            sliced = sum(net.get_submodule(name).weight.numel() for name in plan)
            left -= sliced / sum(p.numel() for p in net.parameters()) * (1 - 1 / self.ranks_per_batch)
        share = left * self.ranks_per_batch / ranks
        weights = whole.weights * (share if self.reshard_after_forward else left)
        return Memory(int(weights), int(whole.gradients * share), int(whole.optimizer * share))

    @override
    def setup_environment(self) -> None:
        if self.cpu_offload:
            _refuse_offload(self.root_device)
        self._data_parallel_size = rank_groups(self.num_nodes * self.num_processes, self.ranks_per_batch)
        super().setup_environment()
        limit_waiting(self.device_mesh, self.timeout)

    @override
    def setup(self, trainer: L.Trainer) -> None:
        assert self.lightning_module is not None
        bf16 = trainer.precision == "bf16-mixed"
        settings: dict[str, Any] = {
            "mesh": self.device_mesh["data_parallel"],
            "reshard_after_forward": self.reshard_after_forward,
            "mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy(),
            "offload_policy": CPUOffloadPolicy() if self.cpu_offload else OffloadPolicy(),
        }
        net: Any = self.lightning_module.net
        share_buffers(self.lightning_module)
        if self.ranks_per_batch > 1:
            slice_layers(net, plan_slices(net, self.ranks_per_batch), self.device_mesh["tensor_parallel"])
        for module in batch_norms(net) if bf16 else ():  # their statistics and weights stay in fp32
            fully_shard(module, **{**settings, "mp_policy": MixedPrecisionPolicy(cast_forward_inputs=False)})
        for module in [*blocks(net), net]:
            fully_shard(module, **settings)
        super().setup(trainer)

    @override
    def model_to_device(self) -> None:
        if not self.cpu_offload:
            super().model_to_device()
            return
        assert self.model is not None
        # Parameters stay on the host; the rest goes to where the net computes.
        for buffer in self.model.buffers():
            buffer.data = buffer.to(self.root_device)
        for module in self.model.modules():
            if isinstance(module, Metric):
                module.to(self.root_device)

    def _whole(self, value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        whole = value.full_tensor()  # on all ranks; the first one writes it
        return whole.cpu() if self.is_global_zero else whole.new_empty(0)

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return {name: self._whole(value) for name, value in self.lightning_module.state_dict().items()}

    @override
    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        state = optimizer.state_dict()
        whole = {
            number: {name: self._whole(value) for name, value in values.items()}
            for number, values in state["state"].items()
        }
        return {**state, "state": whole}

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            mine = {
                number: {name: _share_like(params[number], value) for name, value in values.items()}
                for number, values in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": mine})


def _refuse_offload(device: torch.device) -> None:
    if device.type == "cpu":
        raise InputError("trainer.strategy.cpu_offload: takes parameters out of a GPU's memory; take false on a CPU")


def _share_like(parameter: Tensor, value: Any) -> Any:
    """A whole tensor of an optimizer's state, sharded as its parameter if it has the same shape."""
    if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape:
        return share_like(parameter, value)
    return value


def _by_name(state: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """An optimizer's ``state_dict`` with names of parameters for their numbers, which count in the groups' order."""
    groups = [{**group, "params": [names[number] for number in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[number]: value for number, value in state["state"].items()}, "param_groups": groups}


def _by_number(state: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The inverse of :func:`_by_name`."""
    number_of = {name: number for number, name in enumerate(names)}
    groups = [{**group, "params": [number_of[name] for name in group["params"]]} for group in state["param_groups"]]
    return {"state": {number_of[name]: value for name, value in state["state"].items()}, "param_groups": groups}
