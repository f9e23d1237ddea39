"""Tensor parallelism: each rank of a group computes a slice of the large layers, of the same samples as the others."""

import logging
import re
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from common.errors import InputError


class Style(NamedTuple):
    """How a layer is sliced."""

    weight: Placement  # (out, in) of a linear layer
    bias: Placement
    input: Placement
    joined: bool  # whether the ranks put their outputs together; else each goes on with its own features


# By the names that transformers gives them (Shoeybi et al. 2019, section 3, https://arxiv.org/abs/1909.08053).
STYLES = {
    "colwise": Style(Shard(0), Shard(0), Replicate(), joined=False),
    "rowwise": Style(Shard(1), Replicate(), Shard(-1), joined=True),
    "colwise_gather_output": Style(Shard(0), Shard(0), Replicate(), joined=True),
}
WHOLE = Style(Replicate(), Replicate(), Replicate(), joined=True)


def plan_of(net: nn.Module) -> dict[str, str]:
    """Name of each layer that is sliced to how it is, in the order of the net.

    The plan is the net's own: ``_tp_plan`` maps names, with ``*`` for numbers, to ``colwise`` or ``rowwise``. Nets of
    transformers have one, any other net can set it. A layer that shares its weight with another stays whole.

    Raises:
        InputError: the net has none, or one that names other ways.
    """
    wanted = {
        re.escape(f"{prefix}.{pattern}".removeprefix(".")).replace(r"\*", r"\d+"): style
        for prefix, module in net.named_modules()
        for pattern, style in (getattr(module, "_tp_plan", None) or {}).items()
    }
    owners: dict[int, int] = {}
    for module in net.modules():
        for p in module.parameters(recurse=False):
            owners[id(p)] = owners.get(id(p), 0) + 1
    found = {}
    for name, module in net.named_modules():
        style = next((style for pattern, style in wanted.items() if re.fullmatch(pattern, name)), None)
        if style is None or any(owners[id(p)] > 1 for p in module.parameters(recurse=False)):
            continue
        if style not in STYLES or not isinstance(module, nn.Linear):
            problem = f"{type(net).__name__} wants {name} ({type(module).__name__}) {style}, which is not supported"
            raise InputError(f"trainer.strategy.tensor_parallel: {problem}; take configs/strategy/fsdp2.yaml")
        found[name] = style
    if not found:
        problem = f"{type(net).__name__} has no plan (_tp_plan) of which layers to slice"
        raise InputError(f"trainer.strategy.tensor_parallel: {problem}; take configs/strategy/fsdp2.yaml")
    return found


def check_sizes(net: nn.Module, plan: Mapping[str, str], ranks: int) -> None:
    """See whether every rank gets an equal slice, of whole heads.

    Raises:
        InputError: it does not.
    """
    config = getattr(net, "config", None)
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        size = getattr(config, name, None) or ranks
        if size % ranks:
            problem = f"{size} is no multiple of tensor_parallel {ranks}"
            raise InputError(f"model.config.init_args.{name}: {problem}; change one of them")
    for name, style in plan.items():
        axis = 1 if style == "rowwise" else 0
        weight: Any = net.get_submodule(name).weight
        if weight.shape[axis] % ranks:
            problem = f"{name} has a weight of {list(weight.shape)}, whose axis {axis} is no multiple of {ranks}"
            raise InputError(f"trainer.strategy.tensor_parallel: {problem}; change one of them")


def slice_layers(net: nn.Module, plan: Mapping[str, str], mesh: DeviceMesh) -> None:
    """Keep this rank's slice of the planned layers; every other parameter is whole on each rank of the mesh.

    Between modules all tensors stay plain ones: of whole activations, or of a slice of the features between a colwise
    and a rowwise layer. So a net needs no change, as long as it finds out the number of its heads by itself.
    """
    # They tell that tensors of two dimensions are gathered in two steps, and that the plain tensors here are views.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    made: dict[int, nn.Parameter] = {}  # so that shared weights stay shared
    for name, module in list(net.named_modules()):
        style = STYLES[plan[name]] if name in plan else WHOLE
        if not (own := dict(module.named_parameters(recurse=False))):
            continue
        if any(module.children()):
            problem = f"{type(module).__name__} has parameters beside its layers, which cannot be told from them"
            raise InputError(f"trainer.strategy.tensor_parallel: {problem}; take configs/strategy/fsdp2.yaml")
        for key, p in own.items():
            placement = style.bias if key == "bias" else style.weight
            if id(p) not in made:  # every rank has the whole
                value = distribute_tensor(p.detach(), mesh, [placement], src_data_rank=None)
                made[id(p)] = nn.Parameter(value, requires_grad=p.requires_grad)
            module.register_parameter(key, made[id(p)])
        module.register_forward_pre_hook(partial(_enter, mesh, style))
        module.register_forward_hook(partial(_leave, style))


def _enter(mesh: DeviceMesh, style: Style, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        DTensor.from_local(arg, mesh, [style.input], run_check=False) if isinstance(arg, Tensor) else arg
        for arg in args
    )


def _leave(style: Style, _: nn.Module, __: Any, output: DTensor) -> Tensor:
    return (output.redistribute(placements=[Replicate()]) if style.joined else output).to_local()


def share_like(parameter: DTensor, value: Tensor) -> DTensor:
    """A whole tensor of a parameter's shape, of which this rank keeps what it keeps of the parameter."""
    mesh, placements = parameter.device_mesh, parameter.placements
    shape, offset = compute_local_shape_and_global_offset(value.shape, mesh, placements)
    mine = value[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]
    local = mine.to(parameter.device, copy=True).contiguous()
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=value.shape, stride=torch.empty(value.shape).stride()
    )
