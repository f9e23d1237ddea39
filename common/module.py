"""The shared LightningModule: a net built late, one ``shared_step`` for every stage, an optimizer from YAML."""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import zip_longest
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
import torch
from jaxtyping import Float
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau
from torch.utils.checkpoint import checkpoint
from torchmetrics import CatMetric, MeanMetric
from typing_extensions import override

from common.checkpoint import trained_on
from common.data import (
    BatchDataset,
    EvalSampler,
    data_ranks,
    geometry,
    global_seed,
    move_position,
    seed_draws,
    step_seed,
    total_steps,
)
from common.errors import InputError, nearest
from common.losses import HighestLosses, StepLosses, precise
from common.optim import GivenSettings, Schedule, param_groups, scale_lr
from common.parts import blocks, facts_of, plain_name, share, to_float8
from common.weights import BUILDING, building, fill, meaning, read_nets, read_start

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Stage = Literal["train", "val", "test"]
Init = Literal["xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal", "orthogonal", "trunc_normal"]
OptimizerCallable = Callable[[Iterable], torch.optim.Optimizer]
LRSchedulerCallable = Callable[[torch.optim.Optimizer], LRScheduler]


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Put a net into evaluation mode, and afterwards each of its modules back into its own mode."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _short(value: Any) -> str:
    if isinstance(value, list):
        return shorten(", ".join(map(str, value)), 48) or "none"
    return f"{value:.4g}" if isinstance(value, float) else shorten(str(value), 24)


class _StepOnPlateau(Callback):
    """Steps a ``ReduceLROnPlateau`` right after each validation, before that validation's checkpoint is written.

    Lightning would step it by batches of the epoch, not by validations.
    """

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        for config in trainer.lr_scheduler_configs:
            if isinstance(scheduler := config.scheduler, ReduceLROnPlateau):
                if (value := trainer.callback_metrics.get(config.monitor or "")) is None:
                    hint = nearest(config.monitor or "", trainer.callback_metrics)
                    raise InputError(f"model.lr_scheduler.monitor {config.monitor!r} is not logged{hint}")
                if not trainer.sanity_checking:
                    scheduler.step(value)


class WeightedMean(MeanMetric):
    """A mean that propagates NaN; torchmetrics' skips NaN, or ignores the weights with ``nan_strategy='disable'``.

    It sums in fp64 (fp32 on MPS): ``bf16-true`` casts metric states to 16 bits, where sums stop growing after some
    hundred batches.
    """

    @override
    def update(self, value: Tensor, weight: Tensor) -> None:
        dtype = torch.float32 if value.device.type == "mps" else torch.float64
        self.mean_value = self.mean_value.to(dtype) + value.to(dtype) * weight
        self.weight = self.weight.to(dtype) + weight


class EvaluatedRows(CatMetric):
    """What an evaluation keeps of each sample, in at least fp32: ``bf16-true`` would round it."""

    def __init__(self) -> None:
        super().__init__(nan_strategy="disable")

    @override
    def update(self, value: Tensor) -> None:
        self.value.append(precise(value))  # type: ignore[union-attr]


class BaseModule(L.LightningModule):
    """Base of the recipes' modules; they add ``build_net``, ``shared_step`` and, for ``predict``, ``predict_step``.

    Args:
        optimizer: any optimizer by class path; norms and biases do not decay.
        lr_scheduler: any scheduler by class path, stepped once per optimizer step; schedules of ``common.optim`` know
            the length of the run. ``ReduceLROnPlateau`` steps after each validation: torch's by ``val/loss``,
            Lightning's by its ``monitor``.
        weight_init: name of the ``torch.nn.init`` function for matrices and convolutions; None keeps the net's own.
        l1: factor on the sum of absolute values of all decaying parameters; gradients include it, losses do not.
        compile: compile the net's blocks with ``torch.compile``, one graph for all of them.
        activation_checkpointing: keep only the inputs of the net's blocks for backward and recompute the rest: about a
            third more time for a fraction of the memory (https://arxiv.org/abs/1604.06174).
        matmul_precision: precision of fp32 matrix products, see ``torch.set_float32_matmul_precision``; high is TF32.
            Convolutions run in fp32 with highest, else in TF32.
        float8: run linear layers in float8, see :func:`common.parts.to_float8`.

    Raises:
        InputError: ``l1`` is negative.

    Attributes:
        of_checkpoint: a checkpoint whose weights follow; the net is made as it says, without those of a folder or hub.
        init_from: a checkpoint or an export whose weights the net starts with.
        loads_weights: whether the net gets the weights of a folder or hub name at all.
    """

    net: nn.Module
    unit: Literal["samples", "tokens"] = "samples"
    lr_scales: Mapping[str, float] | None = None
    of_checkpoint: str | None = None
    init_from: str | None = None
    loads_weights: bool = True

    def __init__(
        self,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        weight_init: Init | None = None,
        l1: float = 0.0,
        compile: bool = False,
        activation_checkpointing: bool = False,
        matmul_precision: Literal["highest", "high", "medium"] = "highest",
        float8: bool = False,
    ):
        super().__init__()
        self.save_hyperparameters(logger=False)
        if l1 < 0:
            raise InputError(f"model.l1 must not be negative, got {l1}")
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.weight_init, self.l1 = weight_init, l1
        self.compile_blocks, self.activation_checkpointing = compile, activation_checkpointing
        self.matmul_precision, self.float8 = matmul_precision, float8
        self.mean_loss: Any = nn.ModuleDict({stage: WeightedMean() for stage in ("val", "test")})
        self.higher_is_better: dict[str, bool] = {}  # of the metrics of torchmetrics that were logged, by name
        self._facts: Mapping[str, Any] = {}
        self.highest_losses, self._noted = HighestLosses(), torch.empty(0)
        self._losses = StepLosses()  # of the micro-batches since the last logged step
        self._given = GivenSettings()
        self.writes_row = False
        self._lr = 0.0
        self.frozen: list[nn.Module] = []  # parts of the net that stay in evaluation mode
        self._nets: dict[str, dict[str, Any]] = {}  # of a folder or hub name: what a checkpoint says of them
        self.grad_norm = torch.tensor(0.0)

    @override
    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        higher = getattr(value, "higher_is_better", None)
        if higher is not None:
            self.higher_is_better[name] = higher
        super().log(name, value, *args, **kwargs)

    def build_net(self) -> nn.Module:
        """Make the net; called once, in the strategy's context."""
        raise NotImplementedError

    def shared_step(self, batch: Any, stage: Stage) -> tuple[Tensor, Tensor]:
        """Compute the loss of a batch and update the stage's metrics.

        Returns:
            Mean loss of the batch, and its number of items, both scalars.
        """
        raise NotImplementedError

    def media(self, stage: str) -> "dict[str, Figure | str]":
        """Pictures and texts of the net's progress, by name; called after evaluation, on every rank."""
        return {}

    def encode(self, samples: Any) -> BatchDataset:
        """Samples in memory as batches for :meth:`predict`, by the :attr:`facts` of the data.

        Raises:
            InputError: the net takes others, or the recipe has no such form.
        """
        raise InputError(f"{type(self).__name__} predicts by the command line alone; define its encode")

    def predict(self, samples: Any, batch_size: int = 64) -> dict[str, list[Any]]:
        """Predict samples in memory, in evaluation mode and without a run: the columns of ``predictions.csv``.

        Args:
            samples: see :meth:`encode` of the recipe's module.
            batch_size: samples at a time.

        Raises:
            InputError: those of :meth:`encode`.
        """
        data, columns = self.encode(samples), {}
        with evaluating(self), torch.inference_mode():
            for first in range(0, len(data), batch_size):
                batch = data[list(range(first, min(first + batch_size, len(data))))]
                found: Any = self.predict_step(self.transfer_batch_to_device(batch, self.device, 0))
                for name, values in found.items():
                    columns.setdefault(name, []).extend(values)
        return columns

    def train_metrics(self) -> "Mapping[str, float | Tensor]":
        """Further values to log with the training loss, by name; called on steps that write a row."""
        return {}

    def num_items(self, batch: Any) -> int:
        """Samples in a batch of this rank, or tokens if ``unit`` says so; throughput counts them."""
        return len(batch.mask)

    def flops_per_item(self) -> float | None:
        """Floating-point operations of a training step per item, for MFU; None if unknown."""
        return None

    @property
    def data(self) -> Any:
        """The recipe's data module."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    @property
    def facts(self) -> Mapping[str, Any]:
        """The facts of the data, see :class:`common.data.BaseDataModule`; without a run those of the checkpoint."""
        return self._facts if self._trainer is None else self.data.facts

    @property
    def run_dir(self) -> Path:
        """The run's folder, ``runs/<recipe>/<name>``."""
        return Path(self.trainer.default_root_dir)

    @property
    def ends_step(self) -> bool:
        """Whether this micro-batch is the last of its optimizer step; samplers hold whole steps only."""
        done = self.trainer.fit_loop.batch_idx + 1
        return done % self.trainer.accumulate_grad_batches == 0 or done == self.trainer.num_training_batches

    @override
    def configure_model(self) -> None:
        if hasattr(self, "net"):
            return
        torch.set_float32_matmul_precision(self.matmul_precision)
        torch.backends.cudnn.allow_tf32 = self.matmul_precision != "highest"
        # Their own seed keeps initial weights independent of earlier draws. The host draws them: a device would draw
        # other numbers, and only under some strategies.
        on_host = nullcontext() if torch.get_default_device().type == "meta" else torch.device("cpu")
        with torch.random.fork_rng(devices=[]), on_host:
            torch.manual_seed(step_seed(global_seed()))
            start = self.init_from or self.of_checkpoint
            outer = BUILDING.get(None)  # of load_from_checkpoint
            self._nets, loads = outer or (read_nets(start), self.loads_weights and start is None)
            with building(self._nets, loads):
                self.net = self.build_net().train()  # from_pretrained leaves dropout off
            if self.init_from is not None and self.loads_weights:
                self._start_from(self.init_from)
            if self.weight_init is not None:
                if self._nets or self.init_from:
                    raise InputError("model.weight_init: would replace the weights of the net; set it to null")
                initialize: Callable[[Tensor], Tensor] = getattr(nn.init, f"{self.weight_init}_")
                for name, p in self.net.named_parameters():
                    if p.ndim >= 2 and "weight" in name.rpartition(".")[2] and p.requires_grad:
                        initialize(p)
        if self.float8:
            to_float8(self.net)
        # By name: a strategy may replace these parameters by flat or sharded ones.
        names = {p: name for name, p in self.named_parameters()}
        own = set(self.net.parameters())
        if others := [name for p, name in names.items() if p.requires_grad and p not in own]:
            problem = f"{others[0]} is no part of the net, which alone is trained"
            raise InputError(f"model: {problem}; make it in build_net, or freeze it with requires_grad_(False)")
        groups = param_groups(self.net, self.lr_scales)
        self._groups = [{**group, "params": [names[p] for p in group["params"]]} for group in groups]
        self.num_params = sum(p.numel() for p in self.net.parameters())
        self._prepare_blocks()

    def _start_from(self, path: str) -> None:
        start = read_start(path, self.net)
        then, now = (meaning(facts) for facts in (start.facts, self.data.facts))
        classes = tuple(len(each.get("classes", ())) for each in (then, now))
        grow = 0 < classes[0] < classes[1] and {*then["classes"]} < {*now["classes"]}
        for name in then.keys() & now.keys():
            if then[name] == now[name] or (name == "classes" and grow):
                continue
            problem = f"its {name} are others than those of the data"
            if name != "tokens":
                both = zip_longest(then[name], now[name], fillvalue="no more")
                there, here = (shorten(str(each), 60) for each in next(pair for pair in both if len({*pair}) > 1))
                problem = f"its {name} have {there} where those of the data have {here}"
            raise InputError(f"--init_from {path}: {problem}; give data with the same")
        if seen := trained_on(start.facts, self.data.facts):
            problem = f"was trained on {seen} samples of this run's validation and test parts"
            if Path(path).is_dir():
                raise InputError(f"--init_from {path}: {problem}; give the run's checkpoint, whose parts hold")
            if not rank_zero_only.rank:  # whose parts would have held
                print(f"--init_from {path}: {problem}, as data.facts_of is not that checkpoint", flush=True)
        fill(self.net, start.state, f"--init_from {path}:", classes=classes if grow else ())

    @override
    def train(self, mode: bool = True) -> "BaseModule":
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    @property
    def param_names(self) -> list[str]:
        """Names of the trained parameters, in the optimizer's order."""
        return [name for group in self._groups for name in group["params"]]

    def _prepare_blocks(self) -> None:
        if not (self.compile_blocks or self.activation_checkpointing):
            return
        if not (layers := blocks(self.net)):
            key = "compile" if self.compile_blocks else "activation_checkpointing"
            raise InputError(f"model.{key}: {type(self.net).__name__} names no blocks; set its _no_split_modules")
        for layer in layers:  # in place: a wrapper would change parameter names
            if self.activation_checkpointing:
                layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
            if self.compile_blocks:
                layer.compile()

    @override
    def configure_callbacks(self) -> list[Callback]:
        return [_StepOnPlateau()]

    @override
    def on_train_start(self) -> None:
        interval, accumulate = self.trainer.val_check_batch or 1, self.trainer.accumulate_grad_batches
        if interval != float("inf") and interval % accumulate:
            problem = f"{interval} micro-batches are no multiple of accumulate_grad_batches {accumulate}"
            raise InputError(f"trainer.val_check_interval: {problem}; a checkpoint there would lose half a step")
        if self.data.other_steps:  # the checkpoint has told after the schedule was made
            for config in self.trainer.lr_scheduler_configs:
                if isinstance(config.scheduler, Schedule):
                    config.scheduler.start(total_steps(self.trainer))
        # The checkpoint holds the optimizer's arguments of its own run; this run's win.
        self._given.restore([group for optimizer in self.trainer.optimizers for group in optimizer.param_groups])

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.seed_micro_batch()

    def seed_micro_batch(self) -> None:
        """Make dropout and augmentation a function of (seed, rank, micro-step), the same in a resumed run."""
        step = self.trainer.fit_loop.epoch_loop.total_batch_idx
        _, rank = data_ranks(self.trainer)
        seed_draws(step_seed(global_seed(), rank, step), self.device)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, _ = self.shared_step(batch, "train")
        self.count_loss(loss)
        return loss

    def count_loss(self, loss: Float[Tensor, ""]) -> None:
        """Take a micro-batch's loss into ``train/loss``."""
        # The mean over micro-batches and ranks needs more digits than 16 bits have.
        self._losses.add(self.trainer.global_step, precise(loss.detach()))

    @override
    def on_before_optimizer_step(self, optimizer: Any) -> None:  # DeepSpeed's is no torch.optim.Optimizer
        # Each rank adds the gradient of the sum of absolute values to its own share.
        if self.l1:
            for group, given in zip(optimizer.param_groups, self._groups, strict=True):
                for p in group["params"]:
                    if "weight_decay" not in given and p.grad is not None:
                        p.grad.add_(p.detach().sign(), alpha=self.l1)

    @override
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        # Logging costs more than a small net's step, so only steps that write a row log. The loss is the mean over all
        # micro-batches since the last row, on all ranks.
        if self.writes_row:
            self.writes_row = False
            self.log("train/loss", self._losses.take(self.trainer.strategy), prog_bar=True)
            self.log_dict({"optim/lr": self._lr, "optim/grad_norm": self.grad_norm, **self.train_metrics()})

    @override
    def on_train_epoch_end(self) -> None:
        self._losses.check(self.trainer.strategy)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Raising here leaves the last good checkpoint in its place.
        losses = self._losses.state(self.trainer.strategy)
        self._check_weights()
        checkpoint["losses"] = {} if self.writes_row else losses  # a row that is about to be written takes them
        checkpoint["geometry"], checkpoint["facts"] = geometry(self.trainer), dict(self.data.facts)
        checkpoint["other_steps"] = self.data.other_steps
        checkpoint["nets"] = self._nets

    @classmethod
    @override
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """The module of a checkpoint, in evaluation mode; a pretrained net's folder or hub is not asked for.

        Raises:
            InputError: the file is no checkpoint of a run.
        """
        with building(read_nets(checkpoint_path), loads=False):
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._trainer is None:  # load_from_checkpoint
            self._facts = checkpoint.get("facts", {})
            self.eval()
            return
        if self.trainer.state.fn != "fit":
            return
        self._losses.restore(checkpoint["losses"], self.device)
        before, now = checkpoint["geometry"], geometry(self.trainer)
        if checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"] % before["per_step"]:
            raise InputError("--ckpt_path: was made in the middle of an optimizer step; give last, best or auto")
        self.data.other_steps = checkpoint.get("other_steps", 0)
        if before != now:
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
            move_position(progress, before, now)
            epochs, inside = divmod(progress["total"]["processed"], now["per_epoch"])
            counted = epochs * (now["per_epoch"] // now["per_step"]) + inside // now["per_step"]
            self.data.other_steps = checkpoint["global_step"] - counted

    @override
    def on_validation_start(self) -> None:
        self._check_weights()

    def _check_weights(self) -> None:
        # A strategy may offload some shares to the host.
        finite = bool(torch.stack([share(p).isfinite().all().to(self.device) for p in self.parameters()]).all())
        if not self.trainer.strategy.reduce_boolean_decision(finite):  # each rank may hold a part
            raise InputError(
                f"weights are not finite after step {self.trainer.global_step - 1}: lower model.optimizer.lr or set "
                "trainer.gradient_clip_val; earlier checkpoints are intact"
            )

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "val", batch_idx)

    @override
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "test", batch_idx)

    @override
    def on_validation_epoch_end(self) -> None:
        self.on_evaluation_end("val")

    @override
    def on_test_epoch_end(self) -> None:
        self.on_evaluation_end("test")

    def on_evaluation_end(self, stage: Stage) -> None:
        """Log values that need the metrics of all batches; called on every rank."""

    def note_losses(self, losses: Float[Tensor, " samples"]) -> None:
        """Note the loss of each real sample of a batch in evaluation: the report shows those with the highest."""
        self._noted = losses.detach()

    def captions(self, batch: Any) -> list[str]:
        """What the report says of each sample of a batch; by default what ``predict_step`` says of its class."""
        columns: Any = self.predict_step(batch)
        if not {"target", "prediction"} <= columns.keys():
            return []
        pairs = zip(columns["target"], columns["prediction"], strict=True)
        return [f"{_short(target)} → {_short(prediction)}" for target, prediction in pairs]

    def _evaluate(self, batch: Any, stage: Literal["val", "test"], batch_idx: int) -> None:
        self._noted = torch.empty(0)
        loss, count = self.shared_step(batch, stage)
        loader = getattr(self.trainer, f"{stage}_dataloaders")
        if not batch_idx:
            self.highest_losses.clear()
        if isinstance(sampler := getattr(loader, "sampler", None), EvalSampler):
            positions = sampler.positions(batch_idx, len(self._noted))
            self.highest_losses.add(self._noted, torch.tensor(positions, dtype=torch.int64))
        # A rank whose whole batch is padding has a mean over nothing.
        self.mean_loss[stage].update(torch.where(count > 0, loss, 0.0), count)
        self.log(f"{stage}/loss", self.mean_loss[stage], prog_bar=True)

    @override
    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if not self.ends_step:
            return  # DeepSpeed accumulates by itself and calls this for every micro-batch
        self.writes_row = (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if not (self.writes_row or gradient_clip_val):
            return
        self._lr = max(group["lr"] for group in optimizer.param_groups)
        params = list(self.net.parameters())
        # A strategy with its own kind of shards computes their norm itself.
        norm = facts_of(self.trainer.strategy).total_norm([p.grad for p in params if p.grad is not None])
        self.grad_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if gradient_clip_val and gradient_clip_algorithm == "value":
            nn.utils.clip_grad_value_(params, gradient_clip_val)
        elif gradient_clip_val:
            nn.utils.clip_grads_with_norm_(params, gradient_clip_val, self.grad_norm)

    @override
    def configure_optimizers(self) -> Any:
        params = {plain_name(name): p for name, p in self.named_parameters()}
        groups = [{**group, "params": [params[name] for name in group["params"]]} for group in self._groups]
        if not groups:
            raise InputError("model: every parameter is frozen, there is nothing to train")
        try:
            optimizer = self.optimizer(groups)
        except (ValueError, TypeError, ArithmeticError) as error:
            hint = "; common.optim.MuonAdamW takes all of them" if "Muon only" in str(error) else ""
            raise InputError(f"model.optimizer: {error}{hint}") from error
        if getattr(optimizer, "_step_supports_amp_scaling", False) and self.trainer.precision == "16-mixed":
            problem = "clips and logs gradients before it undoes their loss scaling; drop it, or take bf16-mixed"
            raise InputError(f"model.optimizer.fused: with trainer.precision 16-mixed it {problem}")
        scale_lr(optimizer)
        if self.lr_scheduler is None:
            self._given = GivenSettings(optimizer)
            return optimizer
        self._given = GivenSettings(optimizer, except_for=["lr"])
        try:
            scheduler = self.lr_scheduler(optimizer)
        except (ValueError, TypeError, ArithmeticError) as error:
            raise InputError(f"model.lr_scheduler: {error}") from error
        if isinstance(scheduler, Schedule):
            scheduler.start(total_steps(self.trainer))
        else:
            self._given.leave_to(scheduler)
        if isinstance(scheduler, OneCycleLR) and scheduler.total_steps < total_steps(self.trainer):
            problem = f"{scheduler.total_steps} is less than the run's {total_steps(self.trainer)}"
            raise InputError(f"model.lr_scheduler.total_steps {problem}")
        settings: dict[str, Any] = {"scheduler": scheduler, "interval": "step"}
        if isinstance(scheduler, ReduceLROnPlateau):
            monitor = getattr(scheduler, "monitor", "val/loss")
            settings |= {"monitor": monitor, "frequency": sys.maxsize}  # _StepOnPlateau does it
        return {"optimizer": optimizer, "lr_scheduler": settings}
