"""What strategies share: checkpoints of a single process, equal weights, and the optimizers that they can take."""

import inspect
from collections.abc import Collection, Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import Strategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from common.errors import InputError
from common.parts import StrategyFacts


class WholeCheckpoints(StrategyFacts):
    """Lets a sharding strategy of Lightning read and write the checkpoints of a single process.

    Weights are loaded into the whole net, which is sharded afterwards. A strategy puts together and takes apart:
    ``lightning_module_state_dict``, ``optimizer_state``, ``load_optimizer_state_dict``.
    """

    restore_checkpoint_after_setup = False
    lightning_restore_optimizer = True
    save_checkpoint = Strategy.save_checkpoint
    load_checkpoint = Strategy.load_checkpoint
    load_model_state_dict = Strategy.load_model_state_dict


def limit_waiting(mesh: DeviceMesh, timeout: timedelta) -> None:
    """Let ranks of a mesh wait for one another as long as all ranks do; torch would give its groups another limit."""
    for group in mesh.get_all_groups():
        dist.distributed_c10d._set_pg_timeout(timeout, group)


@torch.no_grad()
def share_weights(module: nn.Module) -> None:
    """Give all ranks the parameters and buffers of rank 0."""
    tensors = [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.numel()]
    sent = [tensor.detach().contiguous() for tensor in tensors]
    for work in [dist.broadcast(values, 0, async_op=True) for values in sent]:
        work.wait()  # type: ignore[union-attr]
    for tensor, values in zip(tensors, sent, strict=True):
        tensor.copy_(values)


# Optimizers whose step treats each element by itself, by their library. One's own says: `elementwise = True`.
ELEMENTWISE = {
    "torch": {
        "ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD",
    },
    "pytorch_optimizer": {
        "ADOPT", "AdEMAMix", "AdaBelief", "Lion", "RAdam", "SGDW", "ScheduleFreeAdamW", "ScheduleFreeRAdam",
        "ScheduleFreeSGD", "SignSGD", "Tiger", "Yogi",
    },
}  # fmt: skip
# Their settings that bring in a norm or a mean of a whole parameter.
JOINING = ("adanorm", "cautious", "stable_adamw", "use_gc")
# Optimizers whose step treats each parameter by itself, its elements together. One's own says: `separable = True`.
SEPARABLE = {
    "common": {"MuonAdamW"},
    "torch": {"Adafactor", "Muon"},
    "transformers": {"Adafactor"},
    "pytorch_optimizer": {"AdaFactor", "LARS", "SOAP", "Shampoo"},
}


def is_elementwise(optimizer: Optimizer) -> bool:
    """Whether an optimizer is known to treat a matrix as it treats flat pieces of it, each alone."""
    joins = any(group.get(name) for group in optimizer.param_groups for name in JOINING)
    return getattr(optimizer, "elementwise", False) or (_steps_as(optimizer, ELEMENTWISE) and not joins)


def is_separable(optimizer: Optimizer) -> bool:
    """Whether an optimizer is known to treat each parameter as it would without the others."""
    says = getattr(optimizer, "separable", False) or getattr(optimizer, "elementwise", False)
    return says or _steps_as(optimizer, ELEMENTWISE) or _steps_as(optimizer, SEPARABLE)


def _steps_as(optimizer: Optimizer, known: Mapping[str, Collection[str]]) -> bool:
    """Whether an optimizer's step is that of a known class; a subclass may have a step of its own."""
    step = inspect.unwrap(type(optimizer).step)
    return any(
        base.__name__ in known.get(base.__module__.partition(".")[0], ()) and inspect.unwrap(base.step) is step
        for base in type(optimizer).__mro__
    )


def refuse_matrix_optimizer(optimizer: Optimizer) -> None:
    """Keep optimizers of whole matrices or norms from strategies that flatten parameters.

    Raises:
        InputError: the optimizer is not known to be elementwise; it might train with something else, or fail.
    """
    if not is_elementwise(optimizer):
        problem = "needs whole tensors (its class does not say elementwise = True), and this strategy has flat pieces"
        fix = "take AdamW, or configs/strategy/fsdp2.yaml"
        raise InputError(f"model.optimizer: {type(optimizer).__name__} {problem}; {fix}")


def refuse_joint_optimizer(optimizer: Optimizer) -> None:
    """Keep optimizers that estimate something from all parameters from strategies whose ranks have some of them.

    Raises:
        InputError: the optimizer is not known to be separable; it would find something else from some of them.
    """
    if not is_separable(optimizer):
        problem = "goes by all parameters at once (its class does not say separable = True), and a stage has its own"
        fix = "take AdamW, or configs/strategy/fsdp2.yaml"
        raise InputError(f"model.optimizer: {type(optimizer).__name__} {problem}; {fix}")
