"""The parts of a net, what a rank holds of them, and what a strategy is asked."""

import importlib.util
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from common.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Memory(NamedTuple):
    """Bytes that one rank holds through a step; what the host holds instead of the device is counted too."""

    weights: int
    gradients: int
    optimizer: int


class Answers:
    """What a strategy is asked here, with the answers of Lightning's own; ours inherit it and answer otherwise.

    Attributes:
        ranks_per_batch: how many ranks compute the same samples together.
        ranks_per_batch_key: the setting that says so.
        averages_by_itself: whether it averages gradients in a way that nothing else can take the place of.
        syncs_batch_norm: whether it works with ``trainer.sync_batchnorm``.
    """

    ranks_per_batch: int = 1
    ranks_per_batch_key: str = "trainer.strategy.tensor_parallel"
    averages_by_itself: bool = False
    syncs_batch_norm: bool = True

    def total_norm(self, gradients: Iterable[Tensor]) -> Tensor:
        """Norm of all gradients, whatever share of them this rank holds."""
        return nn.utils.get_total_norm(gradients)

    def memory_per_rank(self, whole: Memory, trained: int, ranks: int) -> Memory:
        """What one rank holds.

        Args:
            whole: what a single process holds.
            trained: number of trained parameters.
            ranks: number of all ranks.
        """
        return whole

    def train_metrics(self) -> dict[str, float]:
        """What it counts by itself, by the names that are logged."""
        return {}

    def media(self) -> "dict[str, Figure]":
        """Pictures of what it has counted, by name."""
        return {}


def answers(strategy: Any) -> Answers:
    """A strategy's own answers, or those that hold for all of Lightning's."""
    return strategy if isinstance(strategy, Answers) else Answers()


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


def refuse_input_gradients(net: nn.Module) -> None:
    """Keep what differentiates by a net's inputs alone from FSDP1.

    After a backward pass that reaches no parameter it neither comes to rest nor gets the next gradients right.

    Raises:
        InputError: FSDP1 shards the net.
    """
    if isinstance(net, FullyShardedDataParallel):
        problem = "FSDP1 cannot differentiate by inputs, as attacks do"
        raise InputError(f"trainer.strategy: {problem}; take configs/strategy/fsdp2.yaml")


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


def has_whole_gradients(strategy: Strategy) -> bool:
    """Whether each rank holds every parameter whole, so that its gradient can be asked for; after the set-up."""
    whole = strategy.model is strategy.lightning_module or isinstance(strategy.model, DistributedDataParallel)
    if answers(strategy).ranks_per_batch > 1:  # a stage each, or a slice
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
    if answers(strategy).averages_by_itself:
        problem = f"averages gradients by itself, not as {type(strategy).__name__} would"
        raise InputError(f"{key}: {problem}; take configs/strategy/ddp.yaml, or null and a model.weighting")
    if isinstance(strategy.model, DistributedDataParallel):
        strategy.model.require_backward_grad_sync = False
        share_buffers(net)  # which it then leaves out as well


def to_float8(net: nn.Module) -> None:
    """Run a net's linear layers in float8 with torchao, scaled per tensor (https://arxiv.org/abs/2209.05433).

    Weights stay what they are, and so do checkpoints. The last linear layer, the head, and layers whose width is no
    multiple of 16 keep their precision.

    Raises:
        InputError: the GPU has no float8, or torchao is not installed.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        problem = "needs a GPU with float8 (Ada, Hopper, Blackwell)"
        raise InputError(f"model.float8: {problem}; take configs/precision/bf16-mixed.yaml")
    if importlib.util.find_spec("torchao") is None:
        raise InputError("model.float8: torchao is not installed; run pip install -e '.[fp8]'")
    from torchao.float8 import convert_to_float8_training  # type: ignore[import-not-found]

    head = [module for module in net.modules() if isinstance(module, nn.Linear)][-1:]

    def fits(module: nn.Linear, name: str) -> bool:
        return module not in head and not (module.in_features % 16 or module.out_features % 16)

    convert_to_float8_training(net, module_filter_fn=fits)
