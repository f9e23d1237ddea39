"""Frozen nets: the teacher, and the student trained without one, for comparison."""

import json
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from textwrap import shorten
from typing import Any

import lightning as L
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.checkpoint import read_checkpoint, tokenizer_json, trained_on
from common.errors import InputError, nearest, speaking_of
from common.nets.pretrained import Pretrained, check_tokens
from common.weights import fill

HALF = {"bf16": torch.bfloat16, "16": torch.float16}


class Features:
    """Keeps the outputs of named layers in a net's last forward pass.

    Args:
        net: the net.
        names: names of its modules.

    Raises:
        InputError: there is no such module.
    """

    def __init__(self, net: nn.Module, names: Sequence[str]):
        modules = dict(net.named_modules())
        for name in names:
            if name not in modules:
                raise InputError(f"model.features: {type(net).__name__} has no layer {name!r}{nearest(name, modules)}")
        self.names, self._kept = names, {}
        for name in set(names):
            modules[name].register_forward_hook(lambda _, __, output, name=name: self._keep(name, output))

    def _keep(self, name: str, output: Any) -> None:
        self._kept[name] = output if isinstance(output, Tensor) else output[0]  # hidden states come first

    def take(self) -> list[Tensor]:
        """The outputs in the order of the names; each can be taken once.

        Raises:
            InputError: the forward pass on this rank skipped one of them.
        """
        kept, self._kept = self._kept, {}
        if missing := [name for name in self.names if name not in kept]:
            problem = f"this rank's part of the net has no output of {missing[0]!r}"
            raise InputError(f"model.features: {problem}; name another, or take configs/strategy/fsdp2.yaml")
        return [kept[name] for name in self.names]


def logits_of(output: Any) -> Tensor:
    """A net's logits; a net of transformers wraps them."""
    return output if isinstance(output, Tensor) else output.logits


class FrozenNet:
    """A frozen net: in evaluation mode, without gradients, whole on each rank.

    It is no ``nn.Module``, so the module that holds it does not train, shard or save its weights. They stay in fp32, or
    in fp64 if the run does. In a 16-bit run the net computes in 16 bits, under every strategy.

    Args:
        net: the net.
        checkpoint: a checkpoint of any recipe here with the net's weights; None keeps the weights.
        trainer: gives the net's device and the precision to compute in.
        layers: names of modules; :meth:`__call__` also returns their outputs.

    Raises:
        InputError: the checkpoint is missing, of another net or another split of the data, or there is no such layer; a
            pretrained net has other classes or another tokenizer.
    """

    key = checkpoint_key = hint = ""  # for messages: the settings of net and checkpoint, and the fix

    def __init__(self, net: nn.Module, checkpoint: str | None, trainer: L.Trainer, layers: Sequence[str] = ()):
        if checkpoint is not None:
            self._load(net, checkpoint, trainer)
        precision, device = str(trainer.precision), trainer.strategy.root_device
        self.dtype = torch.float64 if precision.startswith("64") else torch.float32
        self.half = HALF.get(precision.split("-")[0])
        self.net = net.eval().requires_grad_(False).to(device, self.dtype)
        self.features, self.device = Features(self.net, layers), device
        self.num_params = sum(p.numel() for p in self.net.parameters())
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.order = None if checkpoint else self._order(data)

    def _order(self, data: Any) -> Tensor | None:
        """Where the net has the classes of the data, by name; None for a net that does not say, and for the same order.

        Raises:
            InputError: it has other classes, or another tokenizer.
        """
        if isinstance(self.net, Pretrained) and self.net.new_head:
            problem = f"has {self.net.new_head}, the data {self.net.num_classes}; it would have to be trained first"
            raise InputError(f"{self.key} {self.net.model.name_or_path!r}: {problem}")
        found = next((each for each in self.net.modules() if isinstance(each, PreTrainedModel)), None)
        if found is None:
            return None
        if found.name_or_path and (made_from := tokenizer_json(data.facts)):
            check_tokens(found.name_or_path, Tokenizer.from_str(made_from).get_vocab(), self.key)
        labels: Any = found.config.id2label or {}
        names = {str(name): int(number) for number, name in labels.items()}
        if data.samples.labelled.target.ndim > 1 or all(re.fullmatch(r"LABEL_\d+", name) for name in names):
            return None
        if other := next((name for name in data.class_names if name not in names), None):
            problem = f"{found.name_or_path!r} has no class {other!r}{nearest(other, names)}"
            raise InputError(f"{self.key}: {problem}; it has {shorten(', '.join(names), 80)}")
        return torch.tensor([names[name] for name in data.class_names], device=self.device)

    @cached_property
    def checksum(self) -> int:
        """The CRC-32 of the net's weights in fp32, of how it scales images, and of the order of its classes."""
        order = None if self.order is None else self.order.tolist()
        value = zlib.crc32(json.dumps([getattr(self.net, "preprocessing", {}), order], sort_keys=True).encode())
        for weight in self.net.state_dict().values():
            plain = weight.float() if weight.is_floating_point() else weight
            value = zlib.crc32(plain.reshape(-1).cpu().numpy().data, value)
        return value

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Logits, and the outputs of the layers."""
        inputs = {name: value.to(self.dtype) if value.is_floating_point() else value for name, value in inputs.items()}
        autocast = torch.autocast(self.device.type, self.half or torch.bfloat16, enabled=self.half is not None)
        with autocast, speaking_of(self.key, instead_of="model.net"):
            logits = logits_of(self.net(**inputs))
        return logits if self.order is None else logits[..., self.order], self.features.take()

    def _load(self, net: nn.Module, path: str, trainer: L.Trainer) -> None:
        try:
            checkpoint = read_checkpoint(path, hint=self.hint)
        except InputError as error:
            raise InputError(f"{self.checkpoint_key} {error}") from error
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        there = checkpoint.get("datamodule_hyper_parameters", {})
        if (key := _other_split(there, data)) is not None:  # then it has trained on test samples
            value = _value(there, key)
            problem = f"was trained on another split of the same data, with {key.rpartition('.')[2]} {value}"
            raise InputError(f"{self.checkpoint_key} {path}: {problem}; give --{key} {value}")
        theirs = (checkpoint.get("facts") or checkpoint.get("hyper_parameters", {})).get("class_names")
        if theirs and theirs != data.class_names:
            problem = f"was trained on other classes, {shorten(', '.join(theirs), 80)}"
            raise InputError(f"{self.checkpoint_key} {path}: {problem}; name one of those of data.source")
        facts = checkpoint.get("facts", {})
        if seen := trained_on(facts, data.facts):
            problem = f"was trained on {seen} samples of this run's validation and test parts"
            raise InputError(f"{self.checkpoint_key} {path}: {problem}; train one with this run's data.facts_of")
        then, now = tokenizer_json(facts), tokenizer_json(data.facts)
        if then and now and json.loads(then) != json.loads(now):
            raise InputError(f"{self.checkpoint_key} {path}: has another tokenizer than data.source; name another")
        saved = checkpoint["state_dict"]
        state = {name.removeprefix("net."): value for name, value in saved.items() if name.startswith("net.")}
        fill(net, state, self.checkpoint_key, self.key)


def _value(data: Mapping[str, Any], key: str) -> Any:
    """The value of ``data.<name>`` or ``data.source.<name>``; None if there is none."""
    owner = data["source"].get("init_args", {}) if key.startswith("data.source.") else data
    return owner.get(key.rpartition(".")[2])


def _other_split(there: Mapping[str, Any], datamodule: Any) -> str | None:
    """The setting by which a config splits a data module's samples differently; None if it does not."""
    here = datamodule.hparams
    if not all(isinstance(data.get("source"), Mapping) for data in (there, here)):
        return None  # one has no source of labelled samples
    paths = [_value(data, "data.source.path") for data in (there, here)]
    files = [os.path.realpath(os.path.expanduser(path)) if isinstance(path, str) else path for path in paths]
    kinds = [data["source"]["class_path"].rpartition(".")[2] for data in (there, here)]  # a copy has classes of its own
    if kinds[0] != kinds[1] or files[0] != files[1]:
        return None
    labelled = datamodule.samples.labelled  # a source's own splits replace a random one
    ours = [] if labelled.num_val else ["split_seed", "val_fraction", *["test_fraction"] * (not labelled.num_test)]
    names = [*(f"data.{name}" for name in ours), "data.source.val_fraction"]
    return next((key for key in names if _value(there, key) not in (None, _value(here, key))), None)


class Teacher(FrozenNet):
    """The teacher: the student learns from its logits and inner layers."""

    key, checkpoint_key, hint = "model.teacher", "model.teacher_checkpoint", "name another, or null to train one"


class StudentAlone(FrozenNet):
    """The same student trained without a teacher, for comparison."""

    key, checkpoint_key, hint = "model.net", "model.alone_checkpoint", "name another, or null for no comparison"
