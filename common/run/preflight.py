"""What a run takes, before it: parameters, memory, items per step, steps."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.initialization import TORCH_INIT_FUNCTIONS, no_init_weights

from common.data import BaseDataModule, data_ranks, geometry, total_steps
from common.module import BaseModule
from common.parts import Memory, facts_of


class Preflight(NamedTuple):
    """What a run takes, on each rank."""

    params: int
    trained: int
    ranks: int
    memory: Memory
    activations: int | None  # bytes that backward needs of one micro-batch; None if the net cannot tell
    items: int  # samples or tokens of an optimizer step, over all ranks
    steps: int  # of the run; -1 if it has no end


def preflight(trainer: L.Trainer, model: BaseModule, datamodule: BaseDataModule) -> Preflight:
    """Find and print what a run takes; the net is not allocated. Float8 counts as what it is converted from.

    Args:
        trainer: of the run, with the module and the data module attached.
        model: the module.
        datamodule: its data.
    """
    datamodule.prepare_data()
    datamodule.setup("fit")
    model.float8, model.weight_init, model.loads_weights = False, None, False
    geometry(trainer)  # the loader's own checks
    # Of whole size, which the loader's first need not be.
    batch = datamodule.train_data[list(range(datamodule.batch_size))]
    # Tensors with shapes and without memory. Initialization looks at values, which they do not have.
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, trainer.precision_plugin.tensor_init_context(), _no_init():
        model.configure_model()
        activations = _activations(trainer, model, apply_to_collection(batch, Tensor, fake.from_tensor))
    # Without initialization, transformers does not tie weights either, which would then count twice; on this
    # device it does.
    del model.net
    with fake, torch.device("meta"), trainer.precision_plugin.tensor_init_context():
        model.configure_model()
    params = list(model.net.parameters())
    trained = [p for p in params if p.requires_grad]
    with fake:
        configured: Any = model.configure_optimizers()
        optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
        for p in trained:
            p.grad = torch.empty_like(p)
        optimizer.step()
    memory = Memory(_bytes(params), _bytes(trained), _bytes(v for s in optimizer.state.values() for v in s.values()))
    memory = facts_of(trainer.strategy).memory_per_rank(memory, sum(p.numel() for p in trained), trainer.world_size)
    found = Preflight(
        params=sum(p.numel() for p in params),
        trained=sum(p.numel() for p in trained),
        ranks=trainer.world_size,
        memory=memory,
        activations=activations,
        items=model.num_items(batch) * data_ranks(trainer)[0] * trainer.accumulate_grad_batches,
        steps=total_steps(trainer),
    )
    _print(found, model.unit)
    return found


def _activations(trainer: L.Trainer, model: BaseModule, batch: Any) -> int | None:
    known = {p.untyped_storage()._cdata for p in model.parameters()}
    saved: list[weakref.ref[Tensor]] = []

    def keep(tensor: Tensor) -> Tensor:
        kept = tensor.detach()
        saved.append(weakref.ref(kept))
        return kept

    try:
        with (
            trainer.precision_plugin.forward_context(),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            loss, _ = model.shared_step(batch, "train")
    except (RuntimeError, NotImplementedError):  # an operation that has no shapes without data
        return None
    # While there is a loss, what its backward needs is alive; what a search for inputs has saved is not.
    alive = [tensor.untyped_storage() for each in saved if (tensor := each()) is not None]
    del loss
    return sum({storage._cdata: storage.nbytes() for storage in alive if storage._cdata not in known}.values())


@contextmanager
def _no_init() -> Iterator[None]:
    """Leave weights as they are allocated; initializers return their tensor, as torch's do and nets rely on."""
    with no_init_weights():  # which puts torch's own back in the end
        for name in TORCH_INIT_FUNCTIONS:
            setattr(nn.init, name, lambda tensor, *_args, **_kwargs: tensor)
        yield


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor))


def _print(found: Preflight, unit: str) -> None:
    def size(value: int | None) -> str:
        if value is None:
            return "not known"
        return f"{value / 1e6:,.1f} MB" if value < 1e9 else f"{value / 1e9:,.2f} GB"

    table = Table(show_header=False, box=None)
    table.add_row("parameters", f"{found.params:,} ({found.trained:,} trained)")
    for name, value in found.memory._asdict().items():
        table.add_row(f"{name} per rank", size(value))
    table.add_row("activations per rank, about", size(found.activations))
    table.add_row(f"{unit} per step", f"{found.items:,} ({found.ranks} ranks)")
    table.add_row("optimizer steps", f"{found.steps:,}" if found.steps >= 0 else "no end")
    Console().print(table)
