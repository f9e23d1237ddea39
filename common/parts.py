"""Parts of a net (blocks, buffers, a rank's share of a parameter), and what a strategy says of itself."""

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
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


STEPS = ("training_step", "validation_step", "test_step", "predict_step")


class Memory(NamedTuple):
    """Bytes that one rank holds during a step, on its device and on the host."""

    weights: int
    gradients: int
    optimizer: int


class StrategyFacts:
    """What a strategy says of itself, as it holds for Lightning's own; our strategies inherit it and say otherwise.

    Attributes:
        ranks_per_batch: how many ranks compute the same samples together.
        ranks_per_batch_key: the setting of that number, for messages.
        averages_by_itself: whether it averages gradients in its own way, which a module cannot replace.
        syncs_batch_norm: whether it supports ``trainer.sync_batchnorm``.
    """

    ranks_per_batch: int = 1
    ranks_per_batch_key: str = "trainer.strategy.tensor_parallel"
    averages_by_itself: bool = False
    syncs_batch_norm: bool = True

    def total_norm(self, gradients: Iterable[Tensor]) -> Tensor:
        """Norm of all gradients over all ranks, from this rank's share of them."""
        return nn.utils.get_total_norm(gradients)

    def memory_per_rank(self, whole: Memory, trained: int, ranks: int) -> Memory:
        """Bytes that one rank holds.

        Args:
            whole: bytes that a single process holds.
            trained: number of trained parameters.
            ranks: number of all ranks.
        """
        return whole

    def train_metrics(self) -> dict[str, float]:
        """The strategy's own metrics, by their logged names."""
        return {}

    def media(self) -> "dict[str, Figure]":
        """Pictures of the strategy's own metrics, by name."""
        return {}


def facts_of(strategy: Any) -> StrategyFacts:
    """What a strategy says of itself; for one of Lightning's own, the defaults."""
    return strategy if isinstance(strategy, StrategyFacts) else StrategyFacts()


def blocks(net: nn.Module) -> list[nn.Module]:
    """The layers of a net that are gathered, compiled and checkpointed one at a time; empty if it names none.

    Nets of transformers name the classes of these layers in ``_no_split_modules``; any other net can do the same. Of
    layers within each other, as Mamba names them, only the outer ones count.
    """
    names = {name for module in net.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    found: dict[str, nn.Module] = {}
    for path, module in net.named_modules():  # the outer ones come first
        if type(module).__name__ in names and not any(path.startswith(f"{outer}.") for outer in found):
            found[path] = module
    return list(found.values())


def batch_norms(net: nn.Module) -> list[nn.Module]:
    """The modules of a net that normalize by statistics of the batch."""
    return [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def plain_name(name: str) -> str:
    """A parameter's name without the prefixes of FSDP's wrappers."""
    return name.replace("_fsdp_wrapped_module.", "")


def share(parameter: Tensor) -> Tensor:
    """This rank's share of a parameter: all of it, unless FSDP2 or ZeRO-3 has sharded it."""
    return parameter.to_local() if isinstance(parameter, DTensor) else getattr(parameter, "ds_tensor", parameter)


def gathered(net: nn.Module) -> AbstractContextManager[None]:
    """A context in which a net's methods besides ``forward`` work under every strategy; all ranks must enter it."""
    if isinstance(net, FullyShardedDataParallel):
        return FullyShardedDataParallel.summon_full_params(net, recurse=False, writeback=False)
    return nullcontext()


def refuse_input_gradients(net: nn.Module) -> None:
    """Refuse FSDP1 to code that differentiates by a net's inputs alone.

    A backward pass that reaches no parameter leaves FSDP1 in a wrong state, and its next gradients are wrong.

    Raises:
        InputError: FSDP1 shards the net.
    """
    if isinstance(net, FullyShardedDataParallel):
        problem = "FSDP1 cannot differentiate by inputs, as attacks do"
        raise InputError(f"trainer.strategy: {problem}; take configs/strategy/fsdp2.yaml")


def saved_buffers(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Parts and names of a module's persistent buffers, such as running statistics; empty buffers are left out."""
    return [
        (part, name)
        for part in module.modules()
        for name, buffer in part.named_buffers(recurse=False)
        if name not in part._non_persistent_buffers_set and buffer.numel()
    ]


def broadcast_buffers(places: Sequence[tuple[nn.Module, str]]) -> None:
    """Copy these buffers from rank 0 to all ranks."""
    if places and dist.get_world_size() > 1:
        group: dist.ProcessGroup = dist.group.WORLD  # type: ignore[assignment]
        dist._broadcast_coalesced(group, [getattr(*place) for place in places], 2**28, 0)  # type: ignore


def share_buffers(module: nn.Module) -> None:
    """Copy a recipe's saved buffers from rank 0 to all ranks before each of its steps, as DDP does.

    Otherwise each rank would keep its own running statistics, and a checkpoint holds only one set.
    """
    if places := saved_buffers(module):
        for name in STEPS:
            setattr(module, name, _after_sharing(getattr(module, name), places))


def _after_sharing(step: Callable[..., Any], places: Sequence[tuple[nn.Module, str]]) -> Callable[..., Any]:
    @wraps(step)
    def shared(*args: Any, **kwargs: Any) -> Any:
        broadcast_buffers(places)
        return step(*args, **kwargs)

    return shared


def has_whole_gradients(strategy: Strategy) -> bool:
    """Whether each rank holds every parameter and its gradient whole; valid after the strategy's set-up."""
    whole = strategy.model is strategy.lightning_module or isinstance(strategy.model, DistributedDataParallel)
    if facts_of(strategy).ranks_per_batch > 1:  # each rank has a stage or a slice
        return False
    return whole and not any(isinstance(p, DTensor) for p in strategy.model.parameters())  # type: ignore[union-attr]


def take_over_gradients(strategy: Strategy, key: str) -> None:
    """Make the strategy leave gradients to the module, which averages them over ranks in ``backward``.

    Args:
        strategy: the strategy, after its set-up.
        key: the setting that needs it, for messages.

    Raises:
        InputError: ranks hold shares of the parameters, or the strategy averages in its own way.
    """
    if not has_whole_gradients(strategy):
        problem = f"needs the whole gradient of each task, and {type(strategy).__name__} shards them"
        raise InputError(f"{key}: {problem}; take configs/strategy/ddp.yaml, or null and a model.weighting")
    if facts_of(strategy).averages_by_itself:
        problem = f"averages gradients by itself, not as {type(strategy).__name__} would"
        raise InputError(f"{key}: {problem}; take configs/strategy/ddp.yaml, or null and a model.weighting")
    if isinstance(strategy.model, DistributedDataParallel):
        strategy.model.require_backward_grad_sync = False
        share_buffers(strategy.model.module)  # without gradient sync DDP skips buffers too


def to_float8(net: nn.Module) -> None:
    """Run a net's linear layers in float8 with torchao, scaled per tensor (https://arxiv.org/abs/2209.05433).

    Weights and checkpoints do not change. The head (the last linear layer) keeps its precision, and so do layers with a
    width that is no multiple of 16.

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
