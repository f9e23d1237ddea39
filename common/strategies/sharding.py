"""What sharding strategies share: checkpoints of a single process, and which optimizers they can take."""

from collections import defaultdict
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from common.errors import InputError
from common.optim import MuonAdamW
from common.parts import Answers


class WholeCheckpoints(Answers):
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
