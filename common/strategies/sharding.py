"""What recipes and sharding strategies share: the blocks of a net, and what a rank holds of its parameters."""

from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from common.errors import InputError
from common.optim import MuonAdamW


class WholeCheckpoints:
    """Lets a sharding strategy of Lightning read and write the checkpoints of a single process.

    Weights are loaded into the whole net, which is sharded then. What is left to a strategy is to put together and take
    apart: ``lightning_module_state_dict``, ``optimizer_state``, ``load_optimizer_state_dict``.
    """

    restore_checkpoint_after_setup = False
    lightning_restore_optimizer = True
    save_checkpoint = Strategy.save_checkpoint
    load_checkpoint = Strategy.load_checkpoint
    load_model_state_dict = Strategy.load_model_state_dict


def limit_waiting(mesh: DeviceMesh, timeout: timedelta | None) -> None:
    """Let ranks of a mesh wait for one another as long as all ranks do; torch would give its groups another limit."""
    if timeout is not None:
        for group in mesh.get_all_groups():
            dist.distributed_c10d._set_pg_timeout(timeout, group)


class Memory(NamedTuple):
    """Bytes that one rank holds through a step; what the host holds instead of the device is counted too."""

    weights: int
    gradients: int
    optimizer: int


def blocks(net: nn.Module) -> list[nn.Module]:
    """The layers of a net that are gathered, compiled and checkpointed one at a time.

    Nets of transformers name the classes of their layers (``_no_split_modules``); any other net can do the same. A net
    without such names is treated as a whole.
    """
    names = {name for module in net.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    return [module for module in net.modules() if type(module).__name__ in names]


def batch_norms(net: nn.Module) -> list[nn.Module]:
    """The modules of a net that normalize by statistics of the batch."""
    return [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def plain_name(name: str) -> str:
    """A parameter's name without what FSDP's wrappers add to it."""
    return name.replace("_fsdp_wrapped_module.", "")


def share(parameter: Tensor) -> Tensor:
    """What this rank holds of a parameter: all of it, unless FSDP2 or ZeRO-3 has sharded it."""
    return parameter.to_local() if isinstance(parameter, DTensor) else getattr(parameter, "ds_tensor", parameter)


def gathered(net: nn.Module) -> AbstractContextManager[None]:
    """A context in which other methods than ``forward`` of a net can be called, on all ranks, whatever shards it."""
    if isinstance(net, FullyShardedDataParallel):
        return FullyShardedDataParallel.summon_full_params(net, recurse=False, writeback=False)
    return nullcontext()


def saved_buffers(net: nn.Module) -> list[tuple[nn.Module, str]]:
    """The modules and names of what a net keeps beside its parameters, such as running statistics."""
    return [
        (module, name)
        for module in net.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set and buffer.numel()
    ]


def broadcast_buffers(places: Sequence[tuple[nn.Module, str]]) -> None:
    """Give all ranks these buffers of rank 0."""
    if places and dist.get_world_size() > 1:
        group: dist.ProcessGroup = dist.group.WORLD  # type: ignore[assignment]
        dist._broadcast_coalesced(group, [getattr(*place) for place in places], 2**28, 0)  # type: ignore


def share_buffers(net: nn.Module) -> None:
    """Give all ranks the saved buffers of rank 0 before each forward, as DDP does.

    Otherwise each rank would keep running statistics of its own, of which a checkpoint could hold only one.
    """
    if places := saved_buffers(net):
        net.register_forward_pre_hook(lambda *_: broadcast_buffers(places))


def is_elementwise(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer does to a matrix what it does to each flat piece of it alone, as ranks hold them.

    Found by trying, for each group, on a distance to be made smaller: an optimizer that estimates its own rate, or
    norms, from all it has finds other ones for a piece. No proof: what begins after 30 steps goes unseen.
    """
    pieces = [(slice(10), (10,)), (slice(10, 24), (14,))]
    return _moves_alike(optimizer, [(slice(24), (4, 6))], pieces)


def is_separable(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer does to each parameter what it does to it without the others; found in the same way."""
    pieces = [(slice(12), (3, 4)), (slice(12, 24), (3, 4))]
    return _moves_alike(optimizer, pieces, pieces)


Piece = tuple[slice, tuple[int, ...]]  # of 24 numbers, and its shape


def _moves_alike(optimizer: torch.optim.Optimizer, together: list[Piece], alone: list[Piece]) -> bool:
    """Whether an optimizer of some pieces as its parameters moves them as one optimizer for each of others does."""
    generator = torch.Generator().manual_seed(0)
    start, goal = torch.randn(2, 24, generator=generator, dtype=torch.float64)

    def moved(group: dict[str, Any], pieces: list[Piece]) -> Tensor:
        device = group["params"][0].device
        params = [nn.Parameter(start[part].view(shape).to(device, torch.float32)) for part, shape in pieces]
        probe = object.__new__(type(optimizer))
        probe.__dict__.update(optimizer.__dict__)
        # A schedule may begin with a rate of 0, which moves nothing; capturable is for devices alone.
        settings = {"params": params, "lr": 1.0} | ({"capturable": False} if "capturable" in group else {})
        probe.state, probe.param_groups = defaultdict(dict), [{**group, **settings}]
        for _ in range(30):
            for p, (part, shape) in zip(params, pieces, strict=True):
                p.grad = p.detach() - goal[part].view(shape).to(p)
            type(probe).step(probe)  # a schedule has bound the instance's own to the true optimizer
        return torch.cat(
            [p.detach().cpu().flatten() - start[part] for p, (part, _) in zip(params, pieces, strict=True)]
        )

    for group in optimizer.param_groups:
        if not group["params"]:
            continue
        try:
            whole = moved(group, together)
            parts = torch.cat([moved(group, [piece]) for piece in alone])
        except Exception:  # it cannot even step on pieces
            return False
        if not (parts - whole).abs().max() < 1e-4 * whole.abs().max():
            return False
    return True


def refuse_matrix_optimizer(optimizer: Any) -> None:
    """Keep optimizers of whole matrices or norms from strategies that flatten parameters.

    Raises:
        InputError: the optimizer is one of them; it would train with something else, or fail.
    """
    # MuonAdamW has taken flat pieces for what AdamW is for.
    if isinstance(optimizer, MuonAdamW) or not is_elementwise(optimizer):
        problem = f"{type(optimizer).__name__} needs whole tensors, and this strategy has flat pieces"
        raise InputError(f"model.optimizer: {problem}; take AdamW, or configs/strategy/fsdp2.yaml")


def has_whole_gradients(strategy: Strategy) -> bool:
    """Whether each rank holds every parameter whole, so that its gradient can be asked for; after the set-up."""
    whole = strategy.model is strategy.lightning_module or isinstance(strategy.model, DistributedDataParallel)
    if getattr(strategy, "ranks_per_batch", 1) > 1:  # a stage each, or a slice
        return False
    return whole and not any(isinstance(p, DTensor) for p in strategy.model.parameters())  # type: ignore[union-attr]


def take_over_gradients(strategy: Strategy, net: nn.Module, key: str) -> None:
    """Leave the averaging of gradients over ranks to the module, which sets all of them by itself in ``backward``.

    Args:
        strategy: after its set-up.
        net: the net that is trained.
        key: the setting that wants it, for the message.

    Raises:
        InputError: ranks hold shares of the parameters.
    """
    if not has_whole_gradients(strategy):
        problem = f"needs the whole gradient of each task, and {type(strategy).__name__} shards them"
        raise InputError(f"{key}: {problem}; take configs/strategy/ddp.yaml, or null and a model.weighting")
    if getattr(strategy, "averages_by_itself", False):
        problem = f"averages gradients by itself, not as {type(strategy).__name__} would"
        raise InputError(f"{key}: {problem}; take configs/strategy/ddp.yaml, or null and a model.weighting")
    if isinstance(strategy.model, DistributedDataParallel):
        strategy.model.require_backward_grad_sync = False
        share_buffers(net)  # which it then leaves out as well
