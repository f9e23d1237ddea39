"""DeepSpeed's ZeRO, on GPUs and on CPUs, with checkpoints of a single process (see :mod:`common.strategies.fsdp`)."""

import copy
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor
from torch.distributed.constants import default_pg_timeout
from typing_extensions import override

from common.errors import InputError
from common.module import BaseModule
from common.parts import Memory, batch_norms, share_buffers
from common.strategies.sharding import WholeCheckpoints, refuse_matrix_optimizer

BUCKET = 50_000_000  # gradients that ZeRO-3 reduces at a time


class _Piece(NamedTuple):
    """Which elements of a parameter are where in the flat fp32 tensor that this rank optimizes."""

    param: Tensor
    flat: Tensor
    of_param: slice
    of_flat: slice


class DeepSpeed(WholeCheckpoints, DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy (ZeRO, https://arxiv.org/abs/1910.02054), on CPUs too.

    Each rank makes the whole net, loads a checkpoint into it, and then keeps its share. Gradients are clipped by
    DeepSpeed, by their norm.

    Args:
        stage: 1 shards the optimizer's state, 2 gradients as well, 3 weights as well.
        offload_optimizer: keep the optimizer's state in the memory of the host and step there.
        offload_parameters: keep weights in the memory of the host, with stage 3.
        zero_optimization: further settings of this section of DeepSpeed's config.
        timeout: after which a rank that waits for another gives up.

    Raises:
        InputError: DeepSpeed is not installed, runs on another device, or would leave out a setting of the trainer.
    """

    syncs_batch_norm = False

    def __init__(
        self,
        stage: Literal[1, 2, 3] = 2,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
        zero_optimization: dict[str, Any] | None = None,
        timeout: timedelta = default_pg_timeout,
    ):
        if importlib.util.find_spec("deepspeed") is None:
            raise InputError("trainer.strategy: DeepSpeed is not installed; run pip install -e '.[deepspeed]'")
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        zero: dict[str, Any] = {"stage": stage}
        if offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu"}
        if offload_parameters:
            zero["offload_param"] = {"device": "cpu"}
        super().__init__(
            config={
                "train_micro_batch_size_per_gpu": 1,  # for DeepSpeed's own log, which is off
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,  # the optimizer of the config, wherever its state is
                "zero_optimization": zero | (zero_optimization or {}),
            },
            logging_level=logging.WARNING,
            timeout=timeout,
        )

    @property
    def _on_cpu(self) -> bool:
        return super().root_device.type == "cpu"

    @property
    @override
    def root_device(self) -> torch.device:
        # DeepSpeed asks for the number of the device, which torch ignores for CPUs.
        return torch.device("cpu", self.local_rank) if self._on_cpu else super().root_device

    @override
    def setup_environment(self) -> None:
        from deepspeed.accelerator import get_accelerator

        if self._on_cpu and get_accelerator().device_name() != "cpu":  # type: ignore[union-attr]
            raise InputError("trainer.accelerator: DeepSpeed has taken this machine's GPU; set DS_ACCELERATOR=cpu")
        (DDPStrategy if self._on_cpu else DeepSpeedStrategy).setup_environment(self)

    @override
    def setup_distributed(self) -> None:
        if not self._on_cpu:
            super().setup_distributed()
            return
        # It would compile for a minute, for something that gloo does as well. The package's attribute is torch itself.
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @override
    def model_sharded_context(self) -> AbstractContextManager[None]:
        return nullcontext()  # the net is made whole, with the same weights under every strategy

    @override
    def _setup_model(self, model: BaseModule) -> BaseModule:
        if "mixed" in self.precision_plugin.precision and batch_norms(model.net):
            problem = "DeepSpeed would run batch norm in 16 bits beside statistics in 32"
            raise InputError(f"trainer.precision: {problem}; take fp32, bf16-true or configs/strategy/fsdp2.yaml")
        share_buffers(model)
        if "mixed" in self.precision_plugin.precision:
            # Lightning would round a whole batch to 16 bits, targets too. Autocast lets buffers in fp32 meet weights in
            # 16 bits. It is around the net, as DeepSpeed turns off any from outside.
            self.precision_plugin.convert_input = lambda data: data
            dtype = torch.float16 if self.precision_plugin.precision == "16-mixed" else torch.bfloat16
            model.net.forward = torch.autocast(self.root_device.type, dtype)(model.net.forward)
        # DeepSpeed allocates a bucket of half a billion gradients, whatever the net.
        self.config["zero_optimization"].setdefault("reduce_bucket_size", min(BUCKET, model.num_params))  # type: ignore
        return model

    @override
    def memory_per_rank(self, whole: Memory, trained: int, ranks: int) -> Memory:
        """The shares of a rank, and all that is not sharded; the optimizer has fp32 weights of its own."""
        zero: dict[str, Any] = self.config["zero_optimization"]  # type: ignore[index]
        weights, gradients, optimizer = whole
        precision = self.precision_plugin.precision
        if "mixed" in precision:  # DeepSpeed holds weights and gradients in 16 bits
            weights, gradients = weights // 2, gradients // 2
        elif "16" in precision:  # and the optimizer's state in 32
            optimizer *= 2
        size = gradients // max(trained, 1)
        gradients //= ranks
        if "offload_optimizer" in zero:
            gradients += 4 * trained // ranks  # a copy on the host
        if self.zero_stage_3:
            weights //= ranks
            gradients += zero.get("reduce_bucket_size", min(BUCKET, trained)) * size
        return Memory(weights, gradients, (optimizer + 4 * trained) // ranks)

    @override
    def _init_optimizers(self) -> Any:
        optimizer, scheduler = super()._init_optimizers()
        refuse_matrix_optimizer(optimizer)
        if self._module.l1:
            raise InputError("model.l1: DeepSpeed keeps gradients to itself; take weight_decay, or another strategy")
        return optimizer, scheduler

    @override
    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Lightning has divided the loss by the number of accumulated micro-batches; DeepSpeed would do so again.
        return super().backward(closure_loss, *args, scale_wrt_gas=False, **kwargs)

    @override
    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], **kwargs: Any) -> Any:
        result = super().optimizer_step(optimizer, closure, **kwargs)
        if (norm := self.deepspeed_engine.get_global_grad_norm()) is not None:
            self._module.grad_norm = torch.as_tensor(norm)
        return result

    @property
    def _module(self) -> BaseModule:
        assert isinstance(self.lightning_module, BaseModule)
        return self.lightning_module

    @property
    def _zero(self) -> Any:
        return self.deepspeed_engine.optimizer

    def _pieces(self) -> Iterator[_Piece]:
        """All trained parameters, in the same order on every rank; a rank has no element of some."""
        zero, rank = self._zero, self.global_rank
        if self.zero_stage_3:  # each parameter is cut into as many parts as there are ranks, the last ones padded
            for params, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
                offset = 0
                for param in params:
                    size = param.ds_tensor.ds_numel
                    start, stop = (min(size * part, param.ds_numel) for part in (rank, rank + 1))
                    yield _Piece(param, flat, slice(start, stop), slice(offset, offset + stop - start))
                    offset += size
            return
        groups = zip(
            zero.round_robin_bit16_groups,
            zero.round_robin_bit16_offsets,
            zero.single_partition_of_fp32_groups,
            strict=True,
        )
        for params, offsets, flat in groups:  # a group's parameters in a row are cut into that many parts
            first, last = flat.numel() * rank, flat.numel() * (rank + 1)
            for param, offset in zip(params, offsets, strict=True):
                start, stop = (min(max(edge - offset, 0), param.numel()) for edge in (first, last))
                at = max(offset + start - first, 0)
                yield _Piece(param, flat, slice(start, stop), slice(at, at + stop - start))

    def _whole(self, piece: _Piece, flat: Tensor) -> Tensor:
        """A parameter, or its optimizer state, put together from every rank's flat tensor."""
        shape = _shape(piece.param)
        whole = torch.zeros(shape.numel(), dtype=flat.dtype, device=self.root_device)
        whole[piece.of_param] = flat.detach()[piece.of_flat].to(whole.device)
        dist.all_reduce(whole)
        # On all ranks; the first one writes it.
        return whole.view(shape).cpu() if self.is_global_zero else whole.new_empty(0)

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        import deepspeed

        module = self._module
        frozen = [p for p in module.parameters() if not p.requires_grad and self.zero_stage_3]
        with deepspeed.zero.GatheredParameters(frozen):
            state = {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}
        names: dict[int, list[str]] = {}
        for name, p in module.named_parameters(remove_duplicate=False):
            names.setdefault(id(p), []).append(name)
        for piece in self._pieces():
            state |= dict.fromkeys(names[id(piece.param)], self._whole(piece, piece.flat))
        return state

    @override
    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        own = self._zero.optimizer
        numbers = self._numbers()
        state = {}
        # The rest, such as the number of steps, becomes each parameter's own.
        for piece in self._pieces():
            state[numbers[id(piece.param)]] = {
                name: self._whole(piece, value) if _is_flat(value, piece.flat) else copy.deepcopy(value)
                for name, value in own.state[piece.flat].items()
            }
        start, groups = 0, []
        for group, given in zip(own.param_groups, self._module._groups, strict=True):
            stop = start + len(given["params"])
            groups.append({**group, "params": list(range(start, stop))})
            start = stop
        return {"state": dict(sorted(state.items())), "param_groups": groups}

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        (state,) = checkpoint["optimizer_states"]
        own = self._zero.optimizer
        for group, saved in zip(own.param_groups, state["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
        numbers, names = self._numbers(), self._module.param_names
        on_device = any(group.get("fused") or group.get("capturable") for group in own.param_groups)
        with torch.no_grad():
            for piece in self._pieces():
                number = numbers[id(piece.param)]
                # In 16 bits the net has rounded weights; the optimizer goes on from its own.
                self._take(piece, piece.flat, checkpoint["state_dict"][names[number]])
                for name, value in state["state"].get(number, {}).items():
                    if isinstance(value, Tensor) and value.shape == _shape(piece.param):
                        flat = own.state[piece.flat].setdefault(name, torch.zeros_like(piece.flat, requires_grad=False))
                        self._take(piece, flat, value)
                    else:
                        # As torch's load_state_dict does: kernels read the number of steps on their own device.
                        moves = on_device and isinstance(value, Tensor)
                        own.state[piece.flat][name] = value.to(piece.flat.device) if moves else value

    @staticmethod
    def _take(piece: _Piece, flat: Tensor, whole: Tensor) -> None:
        flat[piece.of_flat] = whole.flatten()[piece.of_param].to(flat)

    def _numbers(self) -> dict[int, int]:
        """The number of each trained parameter, by its identity, as an optimizer of whole parameters counts them."""
        params = dict(self._module.named_parameters())
        return {id(params[name]): number for number, name in enumerate(self._module.param_names)}


def _shape(param: Any) -> torch.Size:
    return getattr(param, "ds_shape", param.shape)


def _is_flat(value: Any, flat: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == flat.shape
