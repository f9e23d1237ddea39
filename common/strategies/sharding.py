"""What recipes and sharding strategies share: the blocks of a net, and what a rank holds of its parameters."""

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor


def blocks(net: nn.Module) -> list[nn.Module]:
    """The layers of a net that are gathered, compiled and checkpointed one at a time.

    Nets of transformers name the classes of their layers (``_no_split_modules``); any other net can do the same. A net
    without such names is treated as a whole.
    """
    names = {name for module in net.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    return [module for module in net.modules() if type(module).__name__ in names]


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
