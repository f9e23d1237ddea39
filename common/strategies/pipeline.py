"""Pipeline parallelism: each rank of a group has some of the net's blocks, and passes on their output."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from functools import wraps
from typing import Any, Literal

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
from typing_extensions import override

from common.data import rank_groups, seed_draws, step_seed
from common.errors import InputError
from common.parts import Memory, StrategyFacts, saved_buffers
from common.strategies.sharding import limit_waiting, refuse_joint_optimizer
from common.strategies.stages import INSTEAD, KEY, Left, Plan, Stage, plan_stages


class _AsModule(nn.Module):
    """A function in the shape that a schedule calls; parameters stay with the recipe's module."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, received: Tensor) -> Tensor:
        return self.function(received)


class _Computed(torch.autograd.Function):
    """A loss whose gradients are there already: backward adds them to the parameters, scaled as Lightning wants."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor | None], *params: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, *(g if g is None else g.mul_(factor) for g in gradients)


class Pipeline(StrategyFacts, DDPStrategy):
    """Pipeline parallelism by torch's schedules, over more ranks beside data parallelism.

    Neighbouring ranks form a pipeline. Each has some of the net's blocks (:class:`common.strategies.stages.Stage`), the
    first one the embeddings too, the last one the head. All of them read the same batch, in micro-batches, and run the
    recipe's own ``shared_step`` on each: the net's forward pass skips the blocks of others, takes for their output what
    the rank before has sent, and ends after the rank's own blocks. The last rank computes the loss. Gradients are
    those of the mean over micro-batches. In evaluation a batch goes through as a whole, and all ranks get the net's
    output.

    Each rank makes the whole net, loads a checkpoint into it, and then keeps its stage. Checkpoints are those of a
    single process. Text is generated without a cache of keys and values.

    Args:
        stages: ranks that share a net; more ranks form replicas, which average gradients.
        micro_batches: parts of a batch that go through the stages one after the other; each rank idles for
            (stages - 1) / (micro_batches + stages - 1) of the time, the bubble.
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
        self.micro_batches, self.schedule, self.timeout = micro_batches, schedule, timeout
        self._part: Any = None  # the Stage of this rank, once the net is divided
        self._shapes: list[torch.Size] = []  # of the micro-batches that the schedule is made for
        self._loss: Any = None  # of the last step

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
            self._check_rows(module.data.batch_size)
        plan = plan_stages(module.net, self.stages)
        for stage in range(self.stages):
            if not any(p.requires_grad for p, where in plan.stages_of.items() if stage in where):
                raise InputError(f"{KEY}: stage {stage} has nothing to train; {INSTEAD}")
        if others := set(module.param_names) - {f"net.{name}" for name, _ in module.net.named_parameters()}:
            raise InputError(f"{KEY}: {min(others)} is no part of the net, which is what is divided; {INSTEAD}")
        return plan

    @override
    def memory_per_rank(self, whole: Memory, trained: int, ranks: int) -> Memory:
        """The memory of the largest stage."""
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
        limit_waiting(mesh, self.timeout)
        self.stage: int = mesh.get_local_rank("stage")
        self._pipeline, self._replicas = mesh.get_group("stage"), mesh.get_group("replica")
        self._ends: Any = self._pipeline
        if self.stages > 2:
            pairs = [[first, first + self.stages - 1] for first in range(0, self.world_size, self.stages)]
            made = [dist.new_group(pair, timeout=self.timeout) for pair in pairs]
            self._ends = made[self.global_rank // self.stages]

    @override
    def setup(self, trainer: L.Trainer) -> None:
        Strategy.setup(self, trainer)  # DDP's would give all ranks the weights of rank 0

    @override
    def _setup_model(self, model: nn.Module) -> Any:
        return model

    @override
    def setup_optimizers(self, trainer: L.Trainer) -> None:
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            refuse_joint_optimizer(optimizer)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        state = checkpoint["state_dict"]
        if self._part is not None:  # a command before has divided the net
            state = {name: state[name] for name in self._module.state_dict()}
        self._module.load_state_dict(state, strict=strict)

    @override
    def model_to_device(self) -> None:
        if self._part is None:  # else a command before has done it
            self._keep_stage()
        super().model_to_device()

    def _keep_stage(self) -> None:
        """Drop the parameters of other stages, and lead the recipe's steps through the stages."""
        module, plan = self._module, self._plan()
        self._remember_whole(plan)
        context = self.precision_plugin.train_step_context
        self._part = Stage(module.net, plan, self.stage, self._pipeline, self.root_device, context)
        self._params = [p for p in module.net.parameters() if p.requires_grad]
        self._buffers = saved_buffers(module)
        for part in module.modules():
            if isinstance(part, Metric):  # all ranks of a pipeline have seen the same samples; they count once
                part.process_group = self._replicas
        self._shared_step = module.shared_step
        module.shared_step = self._step
        self._refuse_logs_of_steps()

    def _remember_whole(self, plan: Plan) -> None:
        """Note what checkpoints need of the whole net, and leave the optimizer the parameters of this stage."""
        module = self._module
        self._names: list[str] = module.param_names
        self._whole_groups = [group["params"] for group in module._groups]
        # All ranks have the same beside the net.
        self._stage_of = {name: plan.stage_of.get(name.removeprefix("net."), 0) for name in module.state_dict()}
        names = {p: name for name, p in module.named_parameters()}
        mine = {names[p] for p, stages in plan.stages_of.items() if self.stage in stages}
        module._groups = [{**g, "params": [name for name in g["params"] if name in mine]} for g in module._groups]
        self._tied = [
            p for p, stages in plan.stages_of.items() if p.requires_grad and len(stages) > 1 and self.stage in stages
        ]

    def _refuse_logs_of_steps(self) -> None:
        """Keep ``shared_step`` from logging in training: only the last stage would, and the first one writes logs."""
        log = self._module.log

        @wraps(log)
        def log_outside_of_steps(name: str, *args: Any, **kwargs: Any) -> None:
            if self._part.in_step:
                problem = f"shared_step logs {name} in training, on the last stage alone"
                raise InputError(f"{KEY}: {problem}; log it in evaluation, or {INSTEAD}")
            log(name, *args, **kwargs)

        self._module.log = log_outside_of_steps

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
        buffers = [getattr(*place).clone() for place in self._buffers]
        before = [p.grad for p in self._params]
        for p in self._params:
            p.grad = None
        results = self._run_schedule(parts)
        self._refuse_changes(buffers)
        gradients = [p.grad for p in self._params]
        for p, gradient in zip(self._params, before, strict=True):
            p.grad = gradient
        result = torch.zeros(2, dtype=torch.float64, device=self.root_device)
        if self.stage == self.stages - 1:
            losses, counts = torch.stack(results).T
            result = torch.stack([losses.mean(), counts.sum()])
        dist.broadcast(result, group=self._pipeline, group_src=self.stages - 1)
        self._loss = _Computed.apply(result[0], gradients, *self._params)
        return self._loss, result[1]

    def _refuse_changes(self, before: list[Tensor]) -> None:
        """See that a step has left the saved buffers, of which the checkpoint holds those of one stage."""
        for (part, name), value in zip(self._buffers, before, strict=True):
            if not getattr(part, name).allclose(value, rtol=0, atol=0, equal_nan=True):
                problem = f"a step changes the buffer {name} of {type(part).__name__}, each stage in its own way"
                raise InputError(f"{KEY}: {problem}; {INSTEAD}")

    def _run_schedule(self, parts: list[Any]) -> list[Tensor]:
        """Compute the gradients of micro-batches; on the last stage, return the loss and the count of each."""
        self._seed, self._results, self._part.in_step = torch.initial_seed(), [], True
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
                self._part.in_step = False
        return self._results

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
            hidden = self._part.probe(lambda: self._shared_step(part, "train"))
            number = torch.zeros(1, dtype=torch.int64, device=self.root_device)
            first, last = self.stage == 0, self.stage == self.stages - 1
            stage = PipelineStage(
                _AsModule(self._forward),
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

    def _forward(self, received: Tensor) -> Tensor:
        """This stage's part of a micro-batch: what goes to the next one, or the last one's share of the loss."""
        self._part.received = received if self.stage else None
        number, batch = next(self._parts)
        self._part.seeds = self._seed, number
        seed_draws(step_seed(self._seed, number), self.root_device)
        try:
            with self.precision_plugin.train_step_context():
                loss, count = self._shared_step(batch, "train")
        except Left as left:
            return left.hidden
        self._part.check_numbers(loss)
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
        """Norm of the gradients of all stages; a weight of two stages counts once."""
        twice = {id(p.grad) for p in self._tied} if self.stage else set()
        norm = nn.utils.get_total_norm([g for g in gradients if id(g) not in twice])
        square = norm.to(self.root_device).square()
        dist.all_reduce(square, group=self._pipeline)
        return square.sqrt()

    def _collect(self, mine: dict[str, Any]) -> dict[str, Any]:
        """Put together the parts of all stages on rank 0; other ranks get their own part back."""
        if self.global_rank >= self.stages:  # of another replica
            return mine
        described = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), mine)
        parts: list[Any] = [None] * self.stages
        dist.gather_object(described, parts if self.is_global_zero else None, group=self._pipeline, group_dst=0)
        if not self.is_global_zero:
            for leaf in tree_leaves(mine):
                if isinstance(leaf, Tensor):
                    dist.send(leaf.to(self.root_device).contiguous(), group=self._pipeline, group_dst=0)
            return mine
        whole = dict(mine)
        for stage, part in enumerate(parts[1:], 1):

            def receive(tensor: Tensor, stage: int = stage) -> Tensor:
                value = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.root_device)
                dist.recv(value, group=self._pipeline, group_src=stage)
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
        state: dict[str, Any] = super().optimizer_state(optimizer)
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
