"""The stages of a pipeline: how a net is divided, and what one rank computes of its forward pass."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten
from transformers import PreTrainedModel

from common.data import seed_draws, step_seed
from common.errors import InputError
from common.parts import batch_norms, blocks

KEY = "trainer.strategy.stages"
INSTEAD = "take configs/strategy/fsdp2.yaml"
UNLIKE = -1  # a block's output differs from its input


class Plan(NamedTuple):
    """Which stage has what of a net."""

    layers: list[nn.Module]  # the blocks, one after the other
    own: list[range]  # by stage, the numbers of its blocks
    stage_of: dict[str, int]  # by name of a parameter or buffer, the stage that saves it
    stages_of: dict[nn.Parameter, set[int]]  # the first and the last one for a weight of both embedding and head


def plan_stages(net: nn.Module, stages: int) -> Plan:
    """Divide a net's blocks into stages of as many, or one more.

    Modules that the net registers before its blocks belong to the first stage, later ones to the last stage.

    Args:
        net: the net, whose blocks are in one list.
        stages: how many ranks share it.

    Raises:
        InputError: it has no such list, or fewer blocks than stages, or they share weights.
    """
    prefix, layers = _list_of_blocks(net)
    kind = type(net).__name__
    if batch_norms(net):
        raise InputError(f"{KEY}: batch norm of {kind} would take its statistics of micro-batches; {INSTEAD}")
    if len(layers) < stages:
        raise InputError(f"{KEY}: {kind} has {len(layers)} blocks, fewer than {stages} stages; lower it")
    own = [range(int(part[0]), int(part[-1]) + 1) for part in torch.arange(len(layers)).tensor_split(stages)]
    stage, stage_of, stages_of = 0, {}, {}
    for path, module in net.named_modules(remove_duplicate=False):
        if path.startswith(f"{prefix}."):
            number = int(path.removeprefix(f"{prefix}.").split(".")[0])
            stage = next(k for k, numbers in enumerate(own) if number in numbers)
        for p in module.parameters(recurse=False):
            stages_of.setdefault(p, set()).add(stage)
        for name, _ in module.named_buffers(path, recurse=False, remove_duplicate=False):
            stage_of[name] = stage
    for name, p in net.named_parameters(remove_duplicate=False):
        stage_of[name] = min(stages_of[p])
        if len(stages_of[p]) > 1 and stages_of[p] != {0, stages - 1}:
            raise InputError(f"{KEY}: {name} of {kind} is shared by blocks of several stages; {INSTEAD}")
    return Plan(layers, own, stage_of, stages_of)


def _list_of_blocks(net: nn.Module) -> tuple[str, list[nn.Module]]:
    """The name of the one list that has all blocks of a net, and these."""
    kind, kinds = type(net).__name__, {type(block) for block in blocks(net)}
    lists = [
        (name, list(module))
        for name, module in net.named_modules()
        if name and isinstance(module, nn.ModuleList | nn.Sequential) and {type(block) for block in module} <= kinds
    ]
    lists = [(name, layers) for name, layers in lists if layers]
    if not kinds or not lists:
        raise InputError(f"{KEY}: {kind} names no list of blocks (_no_split_modules) that could be divided; {INSTEAD}")
    if len(lists) > 1:
        found = " and ".join(name for name, _ in lists[:2])
        raise InputError(f"{KEY}: {kind} has blocks in several lists ({found}); {INSTEAD}")
    return lists[0]


class Left(BaseException):  # no "except Exception" of a net or a recipe holds it up
    """A forward pass has come to the end of this rank's blocks, with the hidden state for the next rank."""

    def __init__(self, hidden: Tensor):
        self.hidden = hidden


class Stage:
    """One rank's part of a net, whose forward pass goes through the blocks of this rank alone.

    The net forgets the parameters of other stages, and its ``forward`` skips their blocks. In a step the first own
    block works on ``received``, and the pass ends after the last own one with :class:`Left`; on the last stage it goes
    on to the net's output. Outside of steps the ranks pass the batch on by themselves, and all return the output.

    Args:
        net: the whole net; it is changed in place.
        plan: how it is divided.
        number: which stage this is, the rank within ``group``.
        group: the ranks of the pipeline.
        device: where the net computes.
        context: makes the context of the precision for the net.
    """

    def __init__(
        self,
        net: nn.Module,
        plan: Plan,
        number: int,
        group: Any,
        device: torch.device,
        context: Callable[[], AbstractContextManager[Any]],
    ):
        self.net, self.layers, self.number = net, plan.layers, number  # not the plan, which holds all parameters
        self.group, self.device, self.context = group, device, context
        self.last, self.own = len(plan.own) - 1, plan.own[number]
        self.in_step = False
        self.received: Tensor | None = None  # in a step, from the stage before, for one forward pass
        self.seeds = (0, 0)  # in a step, the seed of the batch and the number of the micro-batch
        self._width: int | None = None  # of the tuple that a block returns, 0 for a tensor; None before it is known
        self._checked: set[bool] = set()  # in evaluation, in training
        self._drop_others(plan)
        self._lead_through_blocks()
        self._stop_caching()
        self._lead_through_stages()

    def _drop_others(self, plan: Plan) -> None:
        """Take the parameters of other stages from the net.

        An expanded NaN takes the place of each. It needs no memory, tells the net its shapes, and shows in the output
        if the net computes with it.
        """
        for part in self.net.modules():
            for name, p in list(part.named_parameters(recurse=False, remove_duplicate=False)):
                if self.number not in plan.stages_of[p]:
                    delattr(part, name)
                    value = torch.full((), torch.nan, dtype=p.dtype, device=self.device)
                    setattr(part, name, value.expand(p.shape))

    def _lead_through_blocks(self) -> None:
        """Replace the forward pass of each block of another stage."""
        layers, own = self.layers, self.own
        for number, block in enumerate(layers):
            if number not in own:
                block._compiled_call_impl = None  # else it would run, and not this forward
                block.forward = self._leave if number > own[0] else self._skip
        if own[0]:
            layers[own[0] - 1].forward = self._receive

    def _stop_caching(self) -> None:
        """Turn off the cache of keys and values, as each stage would have one of its own blocks alone."""
        for part in self.net.modules():
            if isinstance(part, PreTrainedModel):
                for settings in filter(None, (part.config, getattr(part, "generation_config", None))):
                    settings.use_cache = False

    def _lead_through_stages(self) -> None:
        """Let the net's callers have its output on all ranks, outside of steps."""
        forward = self.net.forward

        @wraps(forward)
        def through_stages(*args: Any, **kwargs: Any) -> Any:
            if self.in_step:
                return forward(*args, **kwargs)
            if torch.is_grad_enabled():
                raise InputError(f"{KEY}: the recipe wants other gradients than those of its loss; {INSTEAD}")
            return self._evaluate(forward, *args, **kwargs)

        self.net.forward = through_stages

    # The forward passes of blocks that this rank does not have.

    def _skip(self, *args: Any, **kwargs: Any) -> Any:
        hidden = _first(args, kwargs)
        return self._as_output(hidden.new_full((), torch.nan).expand(hidden.shape))  # no block is to work with it

    def _receive(self, *args: Any, **kwargs: Any) -> Any:
        if not self.in_step:
            received = torch.empty_like(_first(args, kwargs))
            dist.recv(received, group=self.group, group_src=self.number - 1)
            return self._as_output(received)
        received, self.received = self.received, None
        if received is None:
            raise InputError(f"{KEY}: the recipe calls its net several times for a batch; {INSTEAD}")
        # All stages draw the same numbers up to here, for an augmentation, say; then each drops places of its own.
        seed_draws(step_seed(*self.seeds, self.number), self.device)
        return self._as_output(received)

    def _leave(self, *args: Any, **kwargs: Any) -> Any:
        hidden = _first(args, kwargs)
        self.check_numbers(hidden)
        raise Left(hidden.contiguous())

    def _as_output(self, hidden: Tensor) -> Any:
        return (hidden, *[None] * (self._width - 1)) if self._width else hidden

    def check_numbers(self, value: Any) -> None:
        """See once each in training and evaluation whether a pass has used parameters of other stages.

        Raises:
            InputError: the pass has computed NaN.
        """
        if self.in_step in self._checked:
            return
        self._checked.add(self.in_step)
        if any(leaf.isnan().any() for leaf in tree_leaves(value) if isinstance(leaf, Tensor)):
            net = type(self.net).__name__
            problem = f"{net} uses in stage {self.number} what it registers for another (or has no finite weights)"
            raise InputError(f"{KEY}: {problem}; {INSTEAD}")

    def _evaluate(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The net's forward pass as its callers know it, on all ranks of the pipeline at once."""
        if self._width is None:
            self.probe(lambda: forward(*args, **kwargs))
        try:
            output = forward(*args, **kwargs)
            self.check_numbers(output)
        except Left as left:
            dist.send(left.hidden, group=self.group, group_dst=self.number + 1)
            output = None
        described = [tree_map_only(Tensor, lambda tensor: tensor.to("meta"), output)]
        dist.broadcast_object_list(described, group=self.group, device=self.device, group_src=self.last)
        leaves, spec = tree_flatten(described[0] if output is None else output)
        for number, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                empty = torch.empty(leaf.shape, dtype=leaf.dtype, device=self.device)
                leaves[number] = empty if output is None else leaf.contiguous()
                dist.broadcast(leaves[number], group=self.group, group_src=self.last)
        return tree_unflatten(leaves, spec)

    @torch.no_grad()
    def probe(self, call: Callable[[], Any]) -> Tensor:
        """Find the shape and type of what each stage gives to the next, and how blocks return it.

        Args:
            call: calls the net.

        Returns:
            The first block's input, without memory.

        Raises:
            InputError: the net is not called, or its blocks return something else than they get.
        """
        found: list[Tensor] = []
        width = torch.zeros(1, dtype=torch.int64, device=self.device)

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(_first(args, kwargs))
            if self.number:
                raise Left(found[0])

        def leave(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            width.fill_(_width(output, found[0]))
            raise Left(found[0])

        block = self.layers[0]
        hooks = [block.register_forward_pre_hook(enter, with_kwargs=True), block.register_forward_hook(leave)]
        try:
            with self.context(), torch.compiler.set_stance("force_eager"):
                call()
        except Left:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        dist.broadcast(width, group=self.group, group_src=0)
        if not found:
            raise InputError(f"{KEY}: the recipe does not call its net in training; {INSTEAD}")
        if width == UNLIKE:
            problem = f"{type(block).__name__} does not return what it gets, in shape and type, and nothing else"
            raise InputError(f"{KEY}: {problem}; {INSTEAD}")
        self._width = int(width)
        return torch.empty_like(found[0], device="meta").requires_grad_()


def _width(output: Any, hidden: Tensor) -> int:
    """The length of the tuple in which a block returns one tensor as the one it got; 0 for the tensor itself."""
    returned = output[0] if isinstance(output, tuple) else output
    same = isinstance(returned, Tensor) and (returned.shape, returned.dtype) == (hidden.shape, hidden.dtype)
    if not same or sum(isinstance(leaf, Tensor) for leaf in tree_leaves(output)) != 1:
        return UNLIKE
    return len(output) if isinstance(output, tuple) else 0


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden state that a block gets."""
    return [*args, *kwargs.values()][0]
