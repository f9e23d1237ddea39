"""Pipeline parallelism: each rank of a group has some of the net's blocks, and passes on what they have computed."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from functools import wraps
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten
from torchmetrics import Metric
from transformers import PreTrainedModel
from typing_extensions import override

from common.data import rank_groups, seed_draws, step_seed
from common.errors import InputError
from common.optim import MuonAdamW
from common.parts import Answers, Memory, batch_norms, blocks
from common.strategies.sharding import is_separable, limit_waiting

KEY = "trainer.strategy.stages"
INSTEAD = "take configs/strategy/fsdp2.yaml"


class Plan(NamedTuple):
    """Which stage has what of a net."""

    layers: list[nn.Module]  # the blocks, one after the other
    own: list[range]  # by stage, the numbers of its blocks
    stage_of: dict[str, int]  # by name of a parameter or buffer, the stage that saves it
    stages_of: dict[nn.Parameter, set[int]]  # a weight that embedding and head share is in the first and in the last


def plan_of(net: nn.Module, stages: int) -> Plan:
    """Divide a net's blocks into stages of as many, or one more.

    What the net registers before its blocks belongs to the first stage, what comes after them to the last one.

    Args:
        net: the net, whose blocks are in one list.
        stages: how many ranks share it.

    Raises:
        InputError: it has no such list, or fewer blocks than stages, or they share weights.
    """
    kind = type(net).__name__
    kinds = {type(block) for block in blocks(net)}
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
    if batch_norms(net):
        raise InputError(f"{KEY}: batch norm of {kind} would take its statistics of micro-batches; {INSTEAD}")
    ((prefix, layers),) = lists
    if len(layers) < stages:
        raise InputError(f"{KEY}: {kind} has {len(layers)} blocks, fewer than {stages} stages; lower it")
    own = [range(int(part[0]), int(part[-1]) + 1) for part in torch.arange(len(layers)).tensor_split(stages)]
    stage, stage_of, stages_of = 0, {}, {}
    for path, module in net.named_modules(remove_duplicate=False):
        if path.startswith(f"{prefix}."):
            number = int(path.removeprefix(f"{prefix}.").split(".")[0])
            stage = next(k for k, numbers in enumerate(own) if number in numbers)
        for name, value in [*module._parameters.items(), *module._buffers.items()]:
            stage_of[f"{path}.{name}".removeprefix(".")] = stage
            if isinstance(value, nn.Parameter):
                stages_of.setdefault(value, set()).add(stage)
    for name, p in net.named_parameters(remove_duplicate=False):
        stage_of[name] = min(stages_of[p])
        if len(stages_of[p]) > 1 and stages_of[p] != {0, stages - 1}:
            raise InputError(f"{KEY}: {name} of {kind} is shared by blocks of several stages; {INSTEAD}")
    return Plan(layers, own, stage_of, stages_of)


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a block works on."""
    return [*args, *kwargs.values()][0]


class _Left(BaseException):  # which no "except Exception" of a net or a recipe holds up
    """A forward pass has come to the end of this rank's blocks, with what goes on from there."""

    def __init__(self, hidden: Tensor):
        self.hidden = hidden


class _Stage(nn.Module):
    """What a schedule calls for each micro-batch; the parameters stay with the module."""

    def __init__(self, run: Callable[[Tensor], Tensor]):
        super().__init__()
        self.run = run

    def forward(self, received: Tensor) -> Tensor:
        return self.run(received)


class _Computed(torch.autograd.Function):
    """A loss whose gradients are there already: backward adds them to the parameters, scaled as Lightning wants."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor | None], *params: Tensor) -> Tensor:  # type: ignore[override]
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, *(g if g is None else g.mul_(factor) for g in gradients)


class Pipeline(Answers, DDPStrategy):  # type: ignore[misc]
    """Pipeline parallelism by torch's schedules, over more ranks beside data parallelism.

    Neighbouring ranks form a pipeline. Each has some of the net's blocks, the first one the embeddings too, the last
    one the head. All of them read the same batch, in micro-batches, and run the recipe's own ``shared_step`` on each:
    the net's forward pass skips the blocks of others, takes what the rank before has sent in the place of their output,
    and ends after the rank's own blocks, but on the last rank, which computes the loss. Gradients are those of the mean
    over micro-batches. In evaluation a batch goes through as a whole, and all ranks get the net's output.

    Each rank makes the whole net, loads a checkpoint into it, and then keeps its stage. Checkpoints are those of a
    single process. Text is generated without a cache of keys and values.

    Args:
        stages: ranks that share a net; more ranks form replicas, which average gradients.
        micro_batches: parts of a batch that go through the stages one after the other; of the time, each rank idles
            (stages - 1) / (micro_batches + stages - 1), the bubble.
        schedule: ``1f1b`` goes backward as soon as it can, and keeps the activations of ``stages`` micro-batches at
            most (Narayanan et al. 2021, https://arxiv.org/abs/2104.04473, section 2.2); ``gpipe`` goes forward with all
            of them first (Huang et al. 2019, https://arxiv.org/abs/1811.06965).
        timeout: after which a rank that waits for another gives up.

    Raises:
        InputError: ranks, blocks or batches cannot be divided so, or the net does not say what its blocks are.
    """

    averages_by_itself = True
    ranks_per_batch_key = KEY
    syncs_batch_norm = False

    def __init__(
        self,
        stages: int = 2,
        micro_batches: int = 4,
        schedule: Literal["gpipe", "1f1b"] = "1f1b",
        timeout: timedelta = default_pg_timeout,
    ):
        super().__init__(timeout=timeout)
        self.ranks_per_batch = self.stages = stages
        self.micro_batches, self.schedule = micro_batches, schedule
        self._shapes: list[torch.Size] = []
        self._in_step = False
        self._checked: set[bool] = set()  # whether in evaluation, in training
        self._received: Tensor | None = None
        self._loss: Any = None
        self._tuple = -1  # not known yet

    def _check(self) -> None:
        if self.stages < 2:
            raise InputError(f"{KEY}: must be at least 2, got {self.stages}; or take configs/strategy/ddp.yaml")
        least = self.stages if self.schedule == "1f1b" else 1
        if self.micro_batches < least:
            problem = f"must be at least {least} with {self.schedule}, got {self.micro_batches}"
            raise InputError(f"trainer.strategy.micro_batches: {problem}")
        if self.precision_plugin.precision.startswith("16"):
            problem = f"{self.precision_plugin.precision} scales the loss, which the stages would not know"
            raise InputError(f"trainer.precision: {problem}; take bf16-mixed")

    def _check_rows(self, rows: int) -> None:
        if rows % self.micro_batches:
            problem = f"{self.micro_batches} is no divisor of the {rows} samples of a batch (data.batch_size)"
            raise InputError(f"trainer.strategy.micro_batches: {problem}; change one of them")

    @property
    def _module(self) -> Any:
        return self.lightning_module

    def _plan(self) -> Plan:
        """How the net is divided, and whether the data can be."""
        module = self._module
        if module.trainer.state.fn in ("fit", None):  # preflight has none
            self._check_rows(module.trainer.datamodule.batch_size)
        plan = plan_of(module.net, self.stages)
        for stage in range(self.stages):
            if not any(p.requires_grad for p, where in plan.stages_of.items() if stage in where):
                raise InputError(f"{KEY}: stage {stage} has nothing to train; {INSTEAD}")
        if others := set(module.param_names) - {f"net.{name}" for name, _ in module.net.named_parameters()}:
            raise InputError(f"{KEY}: {min(others)} is no part of the net, which is what is divided; {INSTEAD}")
        return plan

    @override
    def memory_per_rank(self, whole: Memory, trained: int, ranks: int) -> Memory:
        """What the largest stage holds."""
        self._check()
        stages_of = self._plan().stages_of

        def largest(params: Iterable[nn.Parameter]) -> float:
            sizes = [(p.numel(), stages_of[p]) for p in params]
            held = [sum(size for size, stages in sizes if k in stages) for k in range(self.stages)]
            return max(held) / sum(size for size, _ in sizes)

        share = largest(p for p in stages_of if p.requires_grad)
        weights = whole.weights * largest(stages_of)
        return Memory(int(weights), int(whole.gradients * share), int(whole.optimizer * share))

    @override
    def setup_environment(self) -> None:
        self._check()
        replicas = rank_groups(self.num_nodes * self.num_processes, self.stages, KEY)
        super().setup_environment()
        mesh = init_device_mesh(self.root_device.type, (replicas, self.stages), mesh_dim_names=("replica", "stage"))
        limit_waiting(mesh, self._timeout)
        self.stage: int = mesh.get_local_rank("stage")
        self._pipeline, self._replicas = mesh.get_group("stage"), mesh.get_group("replica")
        self._first = self.global_rank - self.stage
        self._last = self._first + self.stages - 1
        self._ends: Any = self._pipeline
        if self.stages > 2:
            pairs = [[first, first + self.stages - 1] for first in range(0, self.world_size, self.stages)]
            made = [dist.new_group(pair, timeout=self._timeout) for pair in pairs]
            self._ends = made[self.global_rank // self.stages]

    @override
    def setup(self, trainer: L.Trainer) -> None:
        Strategy.setup(self, trainer)  # DDP's own would give all ranks the weights of rank 0

    @override
    def _setup_model(self, model: nn.Module) -> Any:
        return model

    @override
    def setup_optimizers(self, trainer: L.Trainer) -> None:
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            # What MuonAdamW consists of goes by each matrix; it cannot be tried.
            if not isinstance(optimizer, MuonAdamW) and not is_separable(optimizer):
                problem = f"{type(optimizer).__name__} goes by all parameters at once, and a stage has only its own"
                raise InputError(f"model.optimizer: {problem}; take AdamW, or configs/strategy/fsdp2.yaml")

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        state = checkpoint["state_dict"]
        if hasattr(self, "_names"):  # of a trainer's second command
            state = {name: state[name] for name in self._module.state_dict()}
        self._module.load_state_dict(state, strict=strict)

    @override
    def model_to_device(self) -> None:
        if not hasattr(self, "_names"):  # nor does a trainer do so for a second command
            self._keep_stage()
        super().model_to_device()

    def _keep_stage(self) -> None:
        """Drop the parameters of other stages, and lead the net's forward pass through the stages."""
        module = self._module
        net, plan = module.net, self._plan()
        self._names: list[str] = module.param_names
        self._whole_groups = [group["params"] for group in module._groups]
        # What is no part of the net is the same on all ranks.
        self._stage_of = {name: plan.stage_of.get(name.removeprefix("net."), 0) for name in module.state_dict()}
        names = {p: name for name, p in module.named_parameters()}
        mine = {names[p] for p, stages in plan.stages_of.items() if self.stage in stages}
        module._groups = [{**g, "params": [name for name in g["params"] if name in mine]} for g in module._groups]
        self._tied = [
            p for p, stages in plan.stages_of.items() if p.requires_grad and len(stages) > 1 and self.stage in stages
        ]
        for part in net.modules():
            for name, p in list(part._parameters.items()):
                if p is not None and self.stage not in plan.stages_of[p]:
                    # A value of the same shape and no size lets the net find the shapes of what it passes on; nothing
                    # is computed with it that counts, or that would be no number.
                    del part._parameters[name]
                    value = torch.full((), torch.nan, dtype=p.dtype, device=self.root_device)
                    setattr(part, name, value.expand(p.shape))
        self._params = [p for p in net.parameters() if p.requires_grad]
        own = plan.own[self.stage]
        self._first_block = plan.layers[0]
        for number, block in enumerate(plan.layers):
            if number not in own:
                block._compiled_call_impl = None
                block.forward = self._leave if number > own[0] else self._skip
        if own[0]:
            plan.layers[own[0] - 1].forward = self._receive
        for part in net.modules():
            if isinstance(part, PreTrainedModel):
                for settings in filter(None, (part.config, getattr(part, "generation_config", None))):
                    settings.use_cache = False  # each stage would have that of its own blocks alone
        for part in module.modules():
            if isinstance(part, Metric):  # all ranks of a pipeline have seen the same samples, which count once
                part.process_group = self._replicas
        forward = net.forward

        @wraps(forward)
        def through_stages(*args: Any, **kwargs: Any) -> Any:
            if self._in_step:
                return forward(*args, **kwargs)
            if torch.is_grad_enabled():
                raise InputError(f"{KEY}: the recipe wants other gradients than those of its loss; {INSTEAD}")
            return self._evaluate(forward, *args, **kwargs)

        net.forward = through_stages
        self._shared_step = module.shared_step
        module.shared_step = self._step
        log = module.log

        @wraps(log)
        def log_outside_of_steps(name: str, *args: Any, **kwargs: Any) -> None:
            if self._in_step:  # on the last stage, and rank 0 writes the logs
                problem = f"the recipe's shared_step logs {name} in training, which the first stage does not compute"
                raise InputError(f"{KEY}: {problem}; log it in evaluation alone, or {INSTEAD}")
            log(name, *args, **kwargs)

        module.log = log_outside_of_steps

    # What the forward pass of the net calls in the place of blocks that this rank does not have.

    def _skip(self, *args: Any, **kwargs: Any) -> Any:
        hidden = _first(args, kwargs)
        return self._as_output(hidden.new_full((), torch.nan).expand(hidden.shape))  # nobody is to work with it

    def _receive(self, *args: Any, **kwargs: Any) -> Any:
        if not self._in_step:
            received = torch.empty_like(_first(args, kwargs))
            dist.recv(received, self.global_rank - 1, self._pipeline)
            return self._as_output(received)
        received, self._received = self._received, None
        if received is None:
            raise InputError(f"{KEY}: the recipe calls its net several times for a batch; {INSTEAD}")
        # What is drawn before is the same on all stages, such as an augmentation; each drops places of its own.
        seed_draws(step_seed(self._seed, self._number, self.stage), self.root_device)
        return self._as_output(received)

    def _leave(self, *args: Any, **kwargs: Any) -> Any:
        hidden = _first(args, kwargs)
        self._check_numbers(hidden)
        raise _Left(hidden.contiguous())

    def _as_output(self, hidden: Tensor) -> Any:
        return (hidden, *[None] * (self._tuple - 1)) if self._tuple else hidden

    def _check_numbers(self, value: Any) -> None:
        """See once each in training and evaluation whether a pass has used parameters of other stages."""
        if self._in_step in self._checked:
            return
        self._checked.add(self._in_step)
        if any(leaf.isnan().any() for leaf in tree_leaves(value) if isinstance(leaf, Tensor)):
            net = type(self._module.net).__name__
            problem = f"{net} uses in stage {self.stage} what it registers for another (or has no finite weights)"
            raise InputError(f"{KEY}: {problem}; {INSTEAD}")

    def _evaluate(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The net's forward pass as its callers know it, on all ranks of the pipeline at once."""
        if self._tuple < 0:
            self._probe(lambda: forward(*args, **kwargs))
        try:
            output = forward(*args, **kwargs)
            self._check_numbers(output)
        except _Left as left:
            dist.send(left.hidden, self.global_rank + 1, self._pipeline)
            output = None
        described = [tree_map_only(Tensor, lambda tensor: tensor.to("meta"), output)]
        dist.broadcast_object_list(described, self._last, self._pipeline, self.root_device)
        leaves, spec = tree_flatten(described[0] if output is None else output)
        for number, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                empty = torch.empty(leaf.shape, dtype=leaf.dtype, device=self.root_device)
                leaves[number] = empty if output is None else leaf.contiguous()
                dist.broadcast(leaves[number], self._last, self._pipeline)
        return tree_unflatten(leaves, spec)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = self._module.training_step(*args, **kwargs)  # casts for each micro-batch
        if loss is not self._loss:
            raise InputError(f"{KEY}: the recipe trains with another loss than that of its shared_step; {INSTEAD}")
        return loss

    def _step(self, batch: Any, stage: str) -> tuple[Tensor, Tensor]:
        """The module's ``shared_step``; in training all micro-batches, forward and backward."""
        if stage != "train" or not torch.is_grad_enabled():
            return self._shared_step(batch, stage)
        parts = self._split(batch)
        before = [p.grad for p in self._params]
        for p in self._params:
            p.grad = None
        self._seed, self._results, self._in_step = torch.initial_seed(), [], True
        numbers = torch.arange(self.micro_batches, device=self.root_device)
        # Ranks draw different numbers; they go on with the same ones, to generate the same text, for example.
        with torch.random.fork_rng([self.root_device] if self.root_device.type == "cuda" else []):
            try:
                schedule = self._schedule_for(parts[0])
                self._parts: Iterator[tuple[int, Any]] = iter(enumerate(parts))
                inputs = [numbers] if self.stage == 0 else []
                target = numbers if self.stage == self.stages - 1 else None
                schedule.step(*inputs, target=target, return_outputs=False)
            except RuntimeError as error:
                if isinstance(error.__cause__, InputError):
                    raise error.__cause__ from None
                raise
            finally:
                self._in_step = False
        gradients = [p.grad for p in self._params]
        for p, gradient in zip(self._params, before, strict=True):
            p.grad = gradient
        result = torch.zeros(2, dtype=torch.float64, device=self.root_device)
        if self.stage == self.stages - 1:
            losses, counts = torch.stack(self._results).T
            result = torch.stack([losses.mean(), counts.sum()])
        dist.broadcast(result, self._last, self._pipeline)
        self._loss = _Computed.apply(result[0], gradients, *self._params)
        return self._loss, result[1]

    def _split(self, batch: Any) -> list[Any]:
        rows = len(batch.mask)
        self._check_rows(rows)
        leaves, spec = tree_flatten(batch)
        if any(leaf.shape[:1] != (rows,) for leaf in leaves if isinstance(leaf, Tensor)):
            raise InputError(f"{KEY}: a batch of {rows} samples has tensors without an axis of them; {INSTEAD}")
        chunks = [
            leaf.chunk(self.micro_batches) if isinstance(leaf, Tensor) else [leaf] * self.micro_batches
            for leaf in leaves
        ]
        return [tree_unflatten(list(part), spec) for part in zip(*chunks, strict=True)]

    def _schedule_for(self, part: Any) -> ScheduleGPipe | Schedule1F1B:
        """The schedule for micro-batches of such a shape."""
        shapes = [leaf.shape for leaf in tree_leaves(part) if isinstance(leaf, Tensor)]
        if shapes != self._shapes:
            hidden = self._probe(lambda: self._shared_step(part, "train"))
            number = torch.zeros(1, dtype=torch.int64, device=self.root_device)
            first, last = self.stage == 0, self.stage == self.stages - 1
            stage = PipelineStage(
                _Stage(self._forward),
                self.stage,
                self.stages,
                self.root_device,
                input_args=number if first else hidden,
                output_args=hidden.new_empty(()) if last else hidden,
                group=self._pipeline,
            )
            kind = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}[self.schedule]
            self._schedule = kind(stage, self.micro_batches, loss_fn=lambda loss, _: loss, scale_grads=False)
            self._shapes = shapes
        return self._schedule

    @torch.no_grad()
    def _probe(self, call: Callable[[], Any]) -> Tensor:
        """Find what the first block gets, which goes from each stage to the next, and as what it returns the same.

        Args:
            call: calls the net.

        Returns:
            The first block's input, without memory.
        """
        found: list[Tensor] = []
        size = torch.zeros(1, dtype=torch.int64, device=self.root_device)  # of a tuple; 0 if there is none

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(_first(args, kwargs))
            if self.stage:
                raise _Left(found[0])

        def leave(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            same = isinstance(hidden, Tensor) and (hidden.shape, hidden.dtype) == (found[0].shape, found[0].dtype)
            alone = sum(isinstance(leaf, Tensor) for leaf in tree_leaves(output)) == 1
            size.fill_(-1 if not same or not alone else len(output) if isinstance(output, tuple) else 0)
            raise _Left(hidden)

        block = self._first_block
        hooks = [block.register_forward_pre_hook(enter, with_kwargs=True), block.register_forward_hook(leave)]
        try:
            with self.precision_plugin.train_step_context(), torch.compiler.set_stance("force_eager"):
                call()
        except _Left:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        dist.broadcast(size, self._first, self._pipeline)
        self._tuple = int(size)
        if not found:
            raise InputError(f"{KEY}: the recipe does not call its net in training; {INSTEAD}")
        if self._tuple < 0:
            problem = f"{type(block).__name__} does not return what it gets, in shape and type, and nothing else"
            raise InputError(f"{KEY}: {problem}; {INSTEAD}")
        return torch.empty_like(found[0], device="meta").requires_grad_()

    def _forward(self, received: Tensor) -> Tensor:
        """This stage's part of a micro-batch: what goes to the next one, or the last one's share of the loss."""
        self._received = received if self.stage else None
        self._number, part = next(self._parts)
        seed_draws(step_seed(self._seed, self._number), self.root_device)
        try:
            with self.precision_plugin.train_step_context():
                loss, count = self._shared_step(part, "train")
        except _Left as left:
            return left.hidden
        self._check_numbers(loss)
        self._results.append(torch.stack([loss.detach().double(), count.double()]))
        return loss / self.micro_batches

    @override
    def post_backward(self, closure_loss: Tensor) -> None:
        if not self._module.ends_step:
            return
        replicas = self.world_size // self.stages
        if replicas > 1:
            for gradient in self._reduced(self._params, self._replicas):
                gradient.div_(replicas)
        self._reduced(self._tied, self._ends)

    def _reduced(self, params: list[nn.Parameter], group: Any) -> list[Tensor]:
        """Gradients of parameters, added up over a group of ranks."""
        for p in params:
            if p.grad is None:  # which only some ranks may have used
                p.grad = torch.zeros_like(p)
        gradients = [p.grad for p in params if p.grad is not None]
        for work in [dist.all_reduce(gradient, group=group, async_op=True) for gradient in gradients]:
            work.wait()  # type: ignore[union-attr]
        return gradients

    @override
    def total_norm(self, gradients: Iterable[Tensor]) -> Tensor:
        """Norm of the gradients of all stages; those of a shared weight, which two of them have, count once."""
        twice = {id(p.grad) for p in self._tied} if self.stage else set()
        norm = nn.utils.get_total_norm([g for g in gradients if id(g) not in twice])
        square = norm.to(self.root_device).square()
        dist.all_reduce(square, group=self._pipeline)
        return square.sqrt()

    def _collect(self, mine: dict[str, Any]) -> dict[str, Any]:
        """Put together what the stages have, on rank 0; the others keep theirs."""
        if self._first:  # a replica
            return mine
        described = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), mine)
        parts: list[Any] = [None] * self.stages
        dist.gather_object(described, parts if self.is_global_zero else None, 0, self._pipeline)
        if not self.is_global_zero:
            for leaf in tree_leaves(mine):
                if isinstance(leaf, Tensor):
                    dist.send(leaf.to(self.root_device).contiguous(), 0, self._pipeline)
            return mine
        whole = dict(mine)
        for stage, part in enumerate(parts[1:], 1):

            def receive(tensor: Tensor, stage: int = stage) -> Tensor:
                value = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.root_device)
                dist.recv(value, stage, self._pipeline)
                return value.cpu()

            whole |= tree_map_only(Tensor, receive, part)
        return whole

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        state = self._module.state_dict()
        whole = self._collect({name: value for name, value in state.items() if self._stage_of[name] == self.stage})
        return {name: whole[name] for name in self._stage_of if name in whole}

    @override
    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        state = getattr(optimizer, "_optimizer", optimizer).state_dict()
        own = self._module.param_names
        mine = {own[number]: values for number, values in state["state"].items()}
        whole = self._collect({name: values for name, values in mine.items() if self._stage_of[name] == self.stage})
        number_of = {name: number for number, name in enumerate(self._names)}
        param_groups = [
            {**group, "params": [number_of[name] for name in names]}
            for group, names in zip(state["param_groups"], self._whole_groups, strict=True)
        ]
        numbered = {number: whole[name] for number, name in enumerate(self._names) if name in whole}
        return {"state": numbered, "param_groups": param_groups}

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        own = self._module.param_names
        number_of = {name: number for number, name in enumerate(self._names)}
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            saved = [(number, state["state"].get(number_of[name])) for number, name in enumerate(own)]
            mine = {number: values for number, values in saved if values is not None}
            numbers = [group["params"] for group in optimizer.state_dict()["param_groups"]]
            sizes = [len(group["params"]) for group in state["param_groups"]]
            if sizes != [len(names) for names in self._whole_groups]:  # what torch would say of the whole
                raise ValueError(
                    "loaded state dict contains a parameter group that doesn't match the size of optimizer's"
                )
            param_groups = [
                {**group, "params": own_numbers}
                for group, own_numbers in zip(state["param_groups"], numbers, strict=True)
            ]
            optimizer.load_state_dict({**state, "state": mine, "param_groups": param_groups})
