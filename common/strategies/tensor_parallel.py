"""Tensor parallelism: each rank of a group computes a slice of the large layers, of the same samples as the others."""

import logging
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel

from common.errors import InputError, nearest


class Style(NamedTuple):
    """How a layer is sliced."""

    weight: Placement  # (out, in) of a linear layer
    bias: Placement
    input: Placement
    joined: bool  # whether the ranks join their outputs; else each goes on with its own features


# By the names that transformers gives them (Shoeybi et al. 2019, section 3, https://arxiv.org/abs/1909.08053).
STYLES = {
    "colwise": Style(Shard(0), Shard(0), Replicate(), joined=False),
    "rowwise": Style(Shard(1), Replicate(), Shard(-1), joined=True),
    "colwise_gather_output": Style(Shard(0), Shard(0), Replicate(), joined=True),
}
WHOLE = Style(Replicate(), Replicate(), Replicate(), joined=True)


def plan_slices(net: nn.Module, ranks: int) -> dict[str, str]:
    """Name of each layer that is sliced to how it is.

    The plan is the net's own: ``tp_plan`` maps names, with ``*`` for numbers, to ``colwise`` or ``rowwise``. Nets of
    transformers have one, any other net can set it. Embeddings and layers that share their weight stay whole.

    Args:
        net: the net.
        ranks: how many slices there are.

    Raises:
        InputError: the net has no plan, or one that names other ways or no layer, or slices would not be equal.
    """
    wanted = {
        f"{prefix}.{pattern}".removeprefix("."): style
        for prefix, module in net.named_modules()
        for pattern, style in (getattr(module, "tp_plan", None) or {}).items()
    }
    if not wanted:
        problem = f"{type(net).__name__} has no plan (tp_plan) of which layers to slice"
        raise InputError(f"trainer.strategy.tensor_parallel: {problem}; take configs/strategy/fsdp2.yaml")
    _check_heads(net, ranks)
    owners = Counter(p for module in net.modules() for p in module.parameters(recurse=False))
    modules, plan = dict(net.named_modules()), {}
    for pattern, style in wanted.items():
        names = [name for name in modules if re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), name)]
        if not names:
            hint = nearest(pattern, {re.sub(r"\d+", "*", name) for name in modules})
            raise InputError(f"trainer.strategy.tensor_parallel: the plan's {pattern} names no layer{hint}")
        for name in names:
            module = modules[name]
            shared = any(owners[p] > 1 for p in module.parameters(recurse=False))
            if not shared and not isinstance(module, nn.Embedding):
                _check_layer(name, module, style, ranks)
                plan[name] = style
    return plan


def _check_layer(name: str, module: nn.Module, style: str, ranks: int) -> None:
    if style not in STYLES or not isinstance(module, nn.Linear):
        problem = f"the plan wants {name} ({type(module).__name__}) {style}, which is not supported"
        raise InputError(f"trainer.strategy.tensor_parallel: {problem}; take configs/strategy/fsdp2.yaml")
    size = module.in_features if style == "rowwise" else module.out_features
    if size % ranks:
        problem = f"{name} has {size} features, no multiple of {ranks}"
        raise InputError(f"trainer.strategy.tensor_parallel: {problem}; change one of them")


def _check_heads(net: nn.Module, ranks: int) -> None:
    """A slice has whole heads."""
    for config in {id(m.config): m.config for m in net.modules() if isinstance(m, PreTrainedModel)}.values():
        for name in ("num_attention_heads", "num_key_value_heads"):
            if (size := getattr(config, name, None) or ranks) % ranks:
                problem = f"{name} of {type(config).__name__} is {size}, no multiple of {ranks}"
                raise InputError(f"trainer.strategy.tensor_parallel: {problem}; change one of them")


def slice_layers(net: nn.Module, plan: Mapping[str, str], mesh: DeviceMesh) -> None:
    """Keep this rank's slice of the planned layers; every other parameter is whole on each rank of the mesh.

    Between modules all tensors stay plain: whole activations, or a slice of the features between a colwise and a
    rowwise layer. So a net needs no change if it finds out the number of its heads by itself, and has no parameters
    between the two. Such parameters would get gradients of a slice alone; the first forward pass refuses them.

    Raises:
        InputError: the net has parameters that cannot be treated so.
    """
    # Torch would log that it gathers over two dimensions in two steps, and warn that the plain tensors are views.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    made: dict[int, nn.Parameter] = {}  # so that shared weights stay shared
    for name, module in list(net.named_modules()):
        style = STYLES[plan[name]] if name in plan else WHOLE
        if not (own := dict(module.named_parameters(recurse=False))):
            continue
        if any(module.children()) or isinstance(module, nn.RNNBase | nn.modules.batchnorm._NormBase):
            problem = f"{name} ({type(module).__name__}) has parameters that cannot be kept whole beside slices"
            raise InputError(f"trainer.strategy.tensor_parallel: {problem}; take configs/strategy/fsdp2.yaml")
        for key, p in own.items():
            placement = style.bias if key == "bias" else style.weight
            if id(p) not in made:  # every rank has the whole
                value = distribute_tensor(p.detach(), mesh, [placement], src_data_rank=None)
                made[id(p)] = nn.Parameter(value, requires_grad=p.requires_grad)
            module.register_parameter(key, made[id(p)])
        if style is WHOLE:
            _check_once(name, module, mesh)
        module.register_forward_pre_hook(partial(_enter, mesh, style), with_kwargs=True)
        module.register_forward_hook(partial(_leave, style), prepend=True)  # others see what the net sees


def _check_once(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
    """See in the first forward pass whether a module that is whole gets the same inputs on all ranks."""

    def check(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        handle.remove()
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        sums = torch.stack([value.detach().float().abs().sum() for value in tensors])
        least, most = (funcol.all_reduce(sums, kind, mesh.get_group()) for kind in ("min", "max"))
        if not torch.allclose(least, most, rtol=1e-3, equal_nan=True):
            problem = f"{name} ({type(module).__name__}) has parameters, is not in the plan, and gets a slice"
            raise InputError(f"trainer.strategy.tensor_parallel: {problem}; take configs/strategy/fsdp2.yaml")

    handle = module.register_forward_pre_hook(check, with_kwargs=True)


def _enter(
    mesh: DeviceMesh, style: Style, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def distributed(value: Any) -> Any:
        return DTensor.from_local(value, mesh, [style.input], run_check=False) if isinstance(value, Tensor) else value

    return tuple(map(distributed, args)), {key: distributed(value) for key, value in kwargs.items()}


def _leave(style: Style, _: nn.Module, __: Any, output: DTensor) -> Tensor:
    return (output.redistribute(placements=[Replicate()]) if style.joined else output).to_local()


def share_like(parameter: DTensor, value: Tensor) -> DTensor:
    """This rank's share of a whole tensor, cut as a parameter of the same shape is."""
    mesh, placements = parameter.device_mesh, parameter.placements
    shape, offset = compute_local_shape_and_global_offset(value.shape, mesh, placements)
    mine = value[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]
    local = mine.to(parameter.device, copy=True).contiguous()
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=value.shape, stride=value.contiguous().stride()
    )
