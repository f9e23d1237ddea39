"""Samples in a run's report: the first batch as the net sees it, and those with the highest losses."""

import inspect
from collections.abc import Mapping, Sequence
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from common.checkpoint import tokenizer_json
from common.data import read_samples
from common.figures import captioned_images, short_number
from common.module import BaseModule, evaluating
from common.run.output import spared

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 12  # samples at most
COLUMNS = 12  # of a table, at most
LETTERS = 400  # of a text, at most
NO_INPUTS = ("target", "index", "mask")  # fields of a batch


class FirstBatch:
    """What a net is given the first time.

    Args:
        net: the net; the hook goes away by itself.

    """

    def __init__(self, net: nn.Module):
        self._inputs: dict[str, Tensor] = {}
        self._hook = net.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._hook.remove()
        with spared("the first batch"):  # a scripted net has no signature
            given = dict(zip(inspect.signature(net.forward).parameters, args, strict=False)) | kwargs
            tensors = {name: value for name, value in given.items() if isinstance(value, Tensor) and value.ndim > 1}
            self._inputs = {name: value[:SHOWN].detach().cpu().clone() for name, value in tensors.items()}

    def take(self) -> dict[str, Tensor]:
        """The first samples by the names of the net's arguments; nothing if it was not called, as in a pipeline."""
        self._hook.remove()
        return self._inputs


def labels(batch: Any, facts: Mapping[str, Any]) -> list[str]:
    """The target of each sample of a batch in words, as far as it has one of its own."""
    targets = batch.target if isinstance(batch.target, Mapping) else {"": batch.target}
    words = []
    for name, target in targets.items():
        names = facts.get("task_classes", {}).get(name) if name else facts.get("class_names")
        if target.ndim == 1 and target.is_floating_point():
            words.append([f"{name or 'target'} {value:.3g}" for value in target.tolist()])
        elif target.ndim == 1:
            called = [names[number] if names and number >= 0 else str(number) for number in target.tolist()]
            told = [f"{name} {shorten(each, 22)}".strip() for each in called]
            words.append([each if number >= 0 else "" for each, number in zip(told, target.tolist(), strict=True)])
    return ["\n".join(filter(None, each)) for each in zip(*words, strict=True)]


def worst_samples(module: BaseModule, stage: str) -> tuple[dict[str, Tensor], list[str]] | None:
    """The samples of the last evaluation with the highest losses, and captions; every rank must ask.

    Returns:
        The net's inputs, the highest loss first, and a caption for each; None if the recipe notes no losses.
    """
    trainer, found = module.trainer, module.highest_losses
    pairs = list(zip(found.losses.tolist(), found.positions.tolist(), strict=True))
    if trainer.world_size > 1:
        everyone: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(everyone, pairs)
        pairs = sorted({pair for each in everyone for pair in each}, reverse=True)[:SHOWN]
    if not pairs:
        return None
    batch = read_samples(trainer, stage, [position for _, position in pairs])
    with evaluating(module), torch.no_grad():
        captions = module.captions(batch) or [""] * len(pairs)
    captions = [f"loss {short_number(loss)}\n{each}".strip() for (loss, _), each in zip(pairs, captions, strict=True)]
    fields = batch._asdict()
    if "index" in fields:
        captions = [f"#{index} {each}" for index, each in zip(fields["index"].tolist(), captions, strict=True)]
    inputs = fields["inputs"] if "inputs" in fields else {k: v for k, v in fields.items() if k not in NO_INPUTS}
    return {name: value.cpu() for name, value in inputs.items()}, captions


def draw_samples(
    inputs: Mapping[str, Tensor], captions: Sequence[str], facts: Mapping[str, Any], title: str
) -> "Figure | str | None":
    """Images as a picture, texts and rows of a table as text; nothing for other inputs.

    Args:
        inputs: the net's arguments.
        captions: for each sample; empty if there is nothing to say.
        facts: of the data, see :class:`common.data.BaseDataModule`.
        title: of all.
    """
    if not inputs:
        return None
    captions = captions or [""] * len(next(iter(inputs.values())))
    if (images := inputs.get("pixel_values")) is not None and images.shape[1] in (1, 3):
        low, high = facts.get("range") or (images.min().item(), images.max().item())
        scaled = (images[:SHOWN].float() - low) / max(high - low, 1e-12)
        return captioned_images(scaled, captions[:SHOWN], [True] * len(captions), title)
    if "input_ids" in inputs and inputs["input_ids"].ndim == 2 and facts.get("tokenizer"):
        return f"{title}\n\n{_texts(inputs, captions, Tokenizer.from_str(tokenizer_json(facts)))}"
    if {"numeric", "categorical"} <= inputs.keys() and "columns" in facts:
        return f"{title}\n\n{_rows(inputs['numeric'], inputs['categorical'], captions, facts['columns'])}"
    return None


def _texts(inputs: Mapping[str, Tensor], captions: Sequence[str], tokenizer: Tokenizer) -> str:
    mask, parts = inputs.get("attention_mask"), []
    for number, (ids, caption) in enumerate(zip(inputs["input_ids"][:SHOWN], captions, strict=False)):
        real = ids if mask is None else ids[mask[number] > 0]
        text = tokenizer.decode(real.tolist(), skip_special_tokens=False)
        text = text if len(text) <= LETTERS else f"{text[:LETTERS]}…"
        parts.append(f"[{caption.replace(chr(10), ', ')}]\n{text}".removeprefix("[]\n"))
    return "\n\n".join(parts)


def _rows(numeric: Tensor, categorical: Tensor, captions: Sequence[str], columns: Mapping[str, Any]) -> str:
    head, cells = ["", *columns["numeric"]], []
    gaps = [f"{name} missing" for name, each in columns["numeric"].items() if each["has_missing"]]
    words = [["other", "missing", *names] for names in columns["categorical"].values()] + [["no", "yes"]] * len(gaps)
    head += [*columns["categorical"], *gaps]
    for caption, numbers, classes in zip(captions, numeric.tolist(), categorical.tolist(), strict=False):
        named = [names[number] for names, number in zip(words, classes, strict=True)]
        cells.append([caption.replace("\n", ", "), *(f"{number:.2f}" for number in numbers), *named])
    table = [[*row[: COLUMNS + 1], *["…"] * (len(row) > COLUMNS + 1)] for row in (head, *cells[:SHOWN])]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table)
