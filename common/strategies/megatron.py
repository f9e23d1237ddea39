"""Megatron-LM's tensor parallelism: each rank of a group has a slice of every large layer, and computes with it."""

import os
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from common.data import rank_groups
from common.errors import InputError
from common.losses import precise
from common.module import BaseModule
from common.nets.megatron import MegatronLM, is_sliced, slice_of, whole_of
from common.parts import Memory
from common.strategies.sharding import WholeCheckpoints, limit_waiting, refuse_matrix_optimizer


class Megatron(WholeCheckpoints, DDPStrategy):
    """Tensor parallelism by the layers of megatron-core (Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053).

    Each rank makes the whole net, loads a checkpoint into it, and then keeps its slice. Neighbouring ranks form groups,
    which compute the same samples; over the groups gradients are averaged, as in DDP.

    Args:
        tensor_parallel: ranks of a group, Megatron's ``tensor_model_parallel_size``.
        timeout: after which a rank that waits for another gives up.

    Raises:
        InputError: ranks or heads cannot be divided so, the net is not of Megatron's layers, the optimizer needs whole
            matrices, or gradients are scaled, where an overflow in one slice would go unseen in the others.
    """

    def __init__(self, tensor_parallel: int = 2, timeout: timedelta = default_pg_timeout):
        super().__init__(timeout=timeout)
        self.ranks_per_batch, self.timeout = tensor_parallel, timeout

    @override
    def setup_environment(self) -> None:
        copies = rank_groups(self.num_nodes * self.num_processes, self.ranks_per_batch)
        if self.ranks_per_batch > 1 and self.precision_plugin.precision.startswith("16"):
            problem = f"{self.precision_plugin.precision} overflows in one slice and not in the others"
            raise InputError(f"trainer.precision: {problem}; take bf16-true")
        # Megatron needs it: a sum over ranks has to start before the product that hides it.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        super().setup_environment()
        names = "data_parallel", "tensor_parallel"
        mesh = init_device_mesh(self.root_device.type, (copies, self.ranks_per_batch), mesh_dim_names=names)
        limit_waiting(mesh, self.timeout)
        self._copies, self._mesh = mesh["data_parallel"], mesh["tensor_parallel"]

    @property
    def _module(self) -> BaseModule:
        assert isinstance(self.lightning_module, BaseModule)
        return self.lightning_module

    @override
    def setup(self, trainer: L.Trainer) -> None:
        net = _checked(self._module, self.ranks_per_batch)
        if self.ranks_per_batch > 1 and net.mesh is None:  # it is not for a second command of a trainer
            self._module.net = net.sliced(self._mesh)
            self._module._prepare_blocks()
        # In evaluation Lightning would give every rank the slices of the first one.
        evaluates = trainer.state.fn != TrainerFn.FITTING
        names = [name for name, _ in self._module.named_parameters()] if evaluates else []
        self._module._ddp_params_and_buffers_to_ignore = names  # type: ignore[assignment]
        super().setup(trainer)

    @override
    def configure_ddp(self) -> None:
        # As Lightning does, except for the group of ranks, which is not known when it takes DDP's arguments.
        on_gpu = self.root_device.type == "cuda"
        with torch.cuda.stream(torch.cuda.Stream()) if on_gpu else nullcontext():
            self.model = DistributedDataParallel(
                self._module,
                device_ids=self.determine_ddp_device_ids(),
                process_group=self._copies.get_group(),
                gradient_as_bucket_view=True,
            )

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        state, net = dict(checkpoint["state_dict"]), self._module.net
        for name, p in net.named_parameters() if getattr(net, "mesh", None) is not None else ():
            state[f"net.{name}"] = slice_of(state[f"net.{name}"], p, self._mesh)
        self._module.load_state_dict(state, strict=strict)

    @override
    def setup_optimizers(self, trainer: L.Trainer) -> None:
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers if self.ranks_per_batch > 1 else ():
            refuse_matrix_optimizer(optimizer)

    @override
    def total_norm(self, gradients: Iterable[Tensor]) -> Tensor:
        """Norm of all gradients: the slices of all ranks of a group, and the gradients that every rank has, once."""
        parts: dict[bool, list[Tensor]] = {True: [], False: []}
        for p in self._module.parameters():
            if p.grad is not None:
                parts[self.ranks_per_batch > 1 and is_sliced(p)].append(p.grad)
        sliced, whole = (
            precise(nn.utils.get_total_norm(parts[kind])).to(self.root_device) ** 2 for kind in (True, False)
        )
        if self.ranks_per_batch > 1:
            dist.all_reduce(sliced, group=self._mesh.get_group())
        return (sliced + whole).sqrt()

    @override
    def memory_per_rank(self, whole: Memory, trained: int, ranks: int) -> Memory:
        """The slices of a rank, and all that is not sliced."""
        params = list(_checked(self._module, self.ranks_per_batch).parameters())
        sliced = sum(p.numel() for p in params if is_sliced(p)) / sum(p.numel() for p in params)
        left = 1 - sliced + sliced / self.ranks_per_batch
        return Memory(*(int(size * left) for size in whole))

    def _whole(self, value: Any, parameter: Tensor) -> Any:
        """A parameter, or a value of its shape in an optimizer's state; the first rank writes it."""
        if self.ranks_per_batch == 1 or not isinstance(value, Tensor) or value.shape != parameter.shape:
            return value
        whole = whole_of(value.detach(), parameter, self._mesh)
        return whole.cpu() if self.is_global_zero else whole.new_empty(0)

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        params = dict(self._module.named_parameters())
        state = self._module.state_dict()
        return {name: self._whole(value, params[name]) if name in params else value for name, value in state.items()}

    @override
    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        state, params = optimizer.state_dict(), _params(optimizer)
        whole = {
            number: {name: self._whole(value, params[number]) for name, value in values.items()}
            for number, values in state["state"].items()
        }
        return {**state, "state": whole}

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            params = _params(optimizer)
            mine = {
                number: {name: self._mine(value, params[number]) for name, value in values.items()}
                for number, values in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": mine})

    def _mine(self, value: Any, parameter: Any) -> Any:
        """This rank's part of a value in the optimizer's state of a single process."""
        if self.ranks_per_batch == 1 or not isinstance(value, Tensor) or value.shape != parameter.whole_shape:
            return value
        return slice_of(value, parameter, self._mesh)


def _params(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _checked(module: BaseModule, ranks: int) -> MegatronLM:
    """See that the net is of Megatron's layers, and that so many ranks can have equal slices of it."""
    key, net = "trainer.strategy.tensor_parallel", module.net
    if not isinstance(net, MegatronLM):
        problem = f"{type(net).__name__} is no net of Megatron's layers"
        raise InputError(f"{key}: {problem}; take common.nets.megatron.MegatronConfig, or configs/strategy/fsdp2.yaml")
    for name, wanted in (("compile", module.compile_blocks), ("float8", module.float8)):
        if wanted:
            raise InputError(f"model.{name}: is nothing for Megatron's layers; take false")
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        size = getattr(net.config, name)
        if size % ranks:
            raise InputError(f"{key}: model.config.{name} is {size}, no multiple of {ranks}; change one of them")
    return net
