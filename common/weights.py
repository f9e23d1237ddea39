"""Weights that a net starts with: of a folder or the hub, of a checkpoint, of an export."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import transformers
from lightning.fabric.utilities.rank_zero import rank_zero_only
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.checkpoint import read_checkpoint, tokenizer_json
from common.checksums import check_files
from common.errors import InputError

PARTS = "parts.safetensors"  # of an export: which samples its net was trained on


class Building(NamedTuple):
    """How nets of a folder or hub name are made, see :func:`common.nets.pretrained.load`.

    Attributes:
        known: what a checkpoint says of them, by their names; that of others is added when they are made.
        loads: whether they get their weights; not if those of a checkpoint follow.
    """

    known: dict[str, dict[str, Any]]
    loads: bool


BUILDING: ContextVar[Building] = ContextVar("how nets of a folder or hub name are made")


@contextmanager
def building(known: dict[str, dict[str, Any]], loads: bool) -> Iterator[None]:
    """Make nets of a folder or hub name so; the arguments are those of :class:`Building`."""
    token = BUILDING.set(Building(known, loads))
    try:
        yield
    finally:
        BUILDING.reset(token)


@contextmanager
def quietly() -> Iterator[None]:
    """Without what transformers says on stderr: what matters of it is looked at here."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def inner_net(net: nn.Module) -> tuple[str, PreTrainedModel | None]:
    """The net of transformers in a net, and how the names of its parameters begin there; None if there is none."""
    for name, module in net.named_modules():
        if isinstance(module, PreTrainedModel):
            return name and f"{name}.", module
    return "", None


class Start(NamedTuple):
    """What a net starts with: weights by their names, and facts of the data that they were trained on."""

    state: dict[str, Tensor]
    facts: Mapping[str, Any]


def read_start(path: str, net: nn.Module, key: str = "--init_from") -> Start:
    """Weights of a checkpoint, or of the folder of an export.

    Args:
        path: the file or folder.
        net: the net that is to have them; it decides how an export is read.
        key: the setting that names it, for messages.

    Raises:
        InputError: it holds no weights, or is damaged.
    """
    folder = Path(path)
    if not folder.is_dir():
        checkpoint = read_checkpoint(path, hint=f"name another with {key}")
        state = {name.removeprefix("net."): w for name, w in checkpoint["state_dict"].items() if name[:4] == "net."}
        return Start(state, checkpoint.get("facts", {}))
    check_files(folder)
    place, inner = inner_net(net)
    try:
        if inner is not None:  # whose files may have older names
            with quietly():
                kind: Any = type(inner)
                settings = {"use_safetensors": True, "dtype": inner.dtype, "output_loading_info": True}
                made, found = kind.from_pretrained(path, **settings)
            state = {f"{place}{name}": w for name, w in made.state_dict().items() if name not in found["missing_keys"]}
            if (head := folder / "head.safetensors").is_file():
                state |= load_file(head)
        else:
            state = load_file(folder / "model.safetensors")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        problem = f"is no export of such a net ({str(error).splitlines()[0][:60]})"
        raise InputError(f"{key} {path}: {problem}; name another, or a checkpoint") from error
    beside = {name: folder / f"{name}.json" for name in ("facts", "tokenizer")}
    found = {name: file.read_text(encoding="utf-8") for name, file in beside.items() if file.is_file()}
    facts = json.loads(found.pop("facts", "{}"))
    facts.pop("parts", None)  # their sizes alone
    if (parts := folder / PARTS).is_file():
        facts["parts"] = load_file(parts)
    return Start(state, facts | found)


def meaning(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What facts of the data say of a net's inputs and outputs: its classes, columns and tokens.

    Of columns it is the order, names, kinds and categories; their means and quantiles may be others.
    """
    found = {"classes": facts.get("class_names"), "columns": []}
    if columns := facts.get("columns"):
        gaps = {name: " with gaps" * each["has_missing"] for name, each in columns["numeric"].items()}
        found["columns"] += [f"{name!r} (numbers{gap})" for name, gap in gaps.items()]
        for name, categories in columns["categorical"].items():
            found["columns"] += [f"{name!r} (categories)", *(f"{name!r} (category {each!r})" for each in categories)]
    if tokenizer := tokenizer_json(facts):
        found["tokens"] = json.loads(tokenizer)["model"]
    return {name: value for name, value in found.items() if value}


def read_nets(path: str | Path | None) -> dict[str, dict[str, Any]]:
    """What a checkpoint says of nets that came from a folder or hub name; nothing for an export and for None."""
    if path is None or Path(path).is_dir():
        return {}
    return read_checkpoint(path, mmap=True).get("nets", {})


def fill(
    net: nn.Module, weights: Mapping[str, Tensor], key: str, its: str = "the net", classes: Sequence[int] = ()
) -> None:
    """Load weights into a net; those of a net inside a wrapper of ours fit the wrapper too.

    Where the number of classes is another, weights of its width are those of the head, which stays new and is said.

    Args:
        net: the net.
        weights: by their names; of tied ones, one is enough.
        key: the setting that they come from, for messages.
        its: the setting of the net, for messages.
        classes: number of classes there and here, if these are others.

    Raises:
        InputError: a name or a shape does not fit.
    """
    own, state = net.state_dict(), dict(weights)
    if not state.keys() & own.keys():
        place, _ = inner_net(net)
        state = {f"{place}{name}": weight for name, weight in state.items()}
    if head := [name for name in state.keys() & own.keys() if _by_classes(state[name].shape, own[name].shape, classes)]:
        state |= {name: own[name] for name in head}
        if not rank_zero_only.rank:
            told = f"has {classes[0]} classes and the data {classes[1]}; the net gets a new head"
            print(f"{key} {told}, {shorten(', '.join(sorted(head)), 60)}", flush=True)
    places = {own[name].data_ptr(): weight for name, weight in state.items() if name in own and own[name].numel()}
    tied = {name: places[weight.data_ptr()] for name, weight in own.items() if weight.data_ptr() in places}
    try:
        net.load_state_dict({**tied, **state})
    except RuntimeError as error:
        reason = re.sub(
            r"copying a param with shape torch.Size(.*?) from checkpoint, the shape in current model is torch.Size"
            r"(.*?)\.$", r"\1 there and \2 here", str(error).splitlines()[1].strip(),
        )  # fmt: skip
        problem = f"does not fit {its} {type(net).__name__}: {shorten(reason, 120)}"
        problem += "; give data with the same classes" * bool(classes)
        raise InputError(f"{key} {problem}") from error


def _by_classes(there: Sequence[int], here: Sequence[int], classes: Sequence[int]) -> bool:
    """Whether two shapes differ in the number of classes alone."""
    pairs = {*zip(there, here, strict=False)} if len(there) == len(here) else set()
    return {pair for pair in pairs if pair[0] != pair[1]} == {tuple(classes)}
