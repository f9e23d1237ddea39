"""Pretrained nets of transformers with their heads."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from lightning.fabric.utilities.rank_zero import rank_zero_only
from safetensors import SafetensorError
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.image_processing_base import ImageProcessingMixin

from common.checksums import check_files, is_shape
from common.errors import InputError
from common.weights import BUILDING, Building, quietly

CHECKED = 8  # tokens, to see whether a net is causal


@quietly()
def load(
    kind: Any, name: str, key: str, what: str, num_labels: int | None = None, vocab_size: int | None = None
) -> tuple[Any, dict[str, Any]]:
    """A net of transformers by its folder or hub name, with its weights in the present default precision.

    The folder of a ``config.json`` alone gives a new net. Where a module builds its net, a checkpoint's description
    takes the place of the folder, and its weights follow.

    Args:
        kind: its class, such as ``transformers.AutoModelForCausalLM``.
        name: folder or hub name (safetensors weights).
        key: the setting that names it, for messages.
        what: what it should be, for messages.
        num_labels: classes of its head; where it has others, the head is made anew.
        vocab_size: tokens of a new net; None for those of its config.

    Returns:
        The net and its description: what its ``config``, its ``generation`` config and its ``preprocessing`` say, and
        the number of ``classes`` that it came with.

    Raises:
        InputError: there is no such net, or it lacks weights.
    """
    known, loads = BUILDING.get(None) or Building({}, True)
    place = str(path) if (path := Path(name).expanduser()).is_dir() else name
    dtype = torch.get_default_dtype()
    try:
        if its := known.get(name):
            config: Any = _config(its["config"])
        elif known and not loads:
            raise InputError(f"{key} {name!r}: the checkpoint is of {', '.join(map(repr, known))}; give that name")
        else:
            check_files(Path(place))
            config = AutoConfig.from_pretrained(place, trust_remote_code=False)
            if is_shape(place):
                loads = False
                if vocab_size is not None:
                    config.vocab_size = vocab_size
                if not rank_zero_only.rank:
                    print(f"{key} {name}: has a config.json and no weights; the net is a new one", flush=True)
        classes = config.num_labels
        if num_labels not in (None, classes):
            config.id2label = {number: f"LABEL_{number}" for number in range(num_labels)}
        if loads:
            net = _with_weights(kind, place, config, dtype, num_labels is not None)
        else:
            net = kind.from_config(config, dtype=dtype)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0][:80]
        problem = f"neither a folder with {what} in safetensors nor a hub name ({reason})"
        raise InputError(f"{key} {name!r}: {problem}") from error
    net.name_or_path = name
    if its is None:
        its = {"config": _plain(net.config), "classes": classes, "preprocessing": preprocessing(place)}
        known[name] = its | {"generation": _plain(net.generation_config) if net.can_generate() else {}}
    elif net.can_generate():
        net.generation_config = GenerationConfig.from_dict(its["generation"])
    return net, known[name]


def _config(settings: Mapping[str, Any]) -> PretrainedConfig:
    return type(AutoConfig.for_model(settings["model_type"])).from_dict(dict(settings))


def _plain(settings: PretrainedConfig | GenerationConfig) -> dict[str, Any]:
    """All settings as plain values, which a checkpoint can hold."""
    return json.loads(settings.to_json_string(use_diff=False))


def _with_weights(kind: Any, place: str, config: PretrainedConfig, dtype: torch.dtype, has_head: bool) -> Any:
    net, found = kind.from_pretrained(
        place, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False,
        ignore_mismatched_sizes=has_head, output_loading_info=True,
    )  # fmt: skip
    body = f"{net.base_model_prefix}."
    others = [name for name, *_ in found["mismatched_keys"] if name.startswith(body)]
    missing = [name for name in found["missing_keys"] if name.startswith(body) or not has_head]
    if lacks := [*sorted(missing), *others]:
        raise ValueError(f"its files lack {lacks[0]}")
    return net


def body_of(net: nn.Module) -> str:
    """Where in a net the body of its net of transformers is: the start of its parameters' names.

    Of any other net that is ``body.``.
    """
    found = next((module for module in net.modules() if isinstance(module, PreTrainedModel)), None)
    body = found.base_model if found is not None else None
    return next((f"{name}." for name, module in net.named_modules() if module is body and name), "body.")


@quietly()
def check_tokens(name: str, vocab: Mapping[str, int], key: str) -> None:
    """Refuse a net whose tokenizer gives a token of the data another number.

    Args:
        name: folder or hub name of the net.
        vocab: the number of each token of the data.
        key: the setting of the net, for messages.

    Raises:
        InputError: its tokenizer is another.
    """
    try:
        theirs = AutoTokenizer.from_pretrained(name, trust_remote_code=False).get_vocab()
    except (OSError, ValueError):
        if not rank_zero_only.rank:
            print(f"{key} {name}: has no tokenizer to compare; it must be that of the data", flush=True)
        return
    for token, number in vocab.items():
        if theirs.get(token) != number:
            found = f"token {token!r} is {theirs.get(token, 'not there')}, and in the data {number}"
            raise InputError(f"{key} {name!r}: has another tokenizer, {found}; take one of the same")


def check_context(
    config: PretrainedConfig, context: int, whose: str = "model.config", key: str = "data.context"
) -> None:
    """Check that a language model has positions for ``context`` tokens; ``whose`` and ``key`` are for messages.

    Raises:
        InputError: it has fewer.
    """
    positions = getattr(config, "max_position_embeddings", None) or 0  # XLNet says -1
    if 0 < positions < context and getattr(config, "position_biased_input", True):  # DeBERTa may have no such table
        raise InputError(f"{key} {context} exceeds max_position_embeddings {positions} of {whose}; shorten it")


def check_causal(net: PreTrainedModel, key: str, context: int = CHECKED) -> None:
    """Check that no logit of a language model depends on a later token, with a few tokens, on the host.

    A net without values, as ``preflight`` makes it, is left out.

    Args:
        net: as it is made; it keeps its mode.
        key: the setting that names it, for messages.
        context: tokens that it takes at a time.

    Raises:
        InputError: one does, or the net does not give logits of tokens alone.
    """
    if any(p.is_meta or isinstance(p, FakeTensor) for p in net.parameters()):
        return
    positions = getattr(net.config, "max_position_embeddings", None) or 0  # XLNet says -1
    name, length = type(net).__name__, min(context, CHECKED, positions if positions > 0 else CHECKED)
    if not _future(net, length, f"{key}: {name}"):
        return
    if net.dtype.itemsize < 4 and not _future(copy.deepcopy(net).float(), length, f"{key}: {name}"):
        return  # 16 bits had rounded
    has_switch = getattr(net.config, "is_decoder", None) is False
    fix = "set its is_decoder to true" if has_switch else "take a causal net, such as transformers.LlamaConfig"
    raise InputError(f"{key}: {name} sees the tokens that it should predict; {fix}")


def _future(net: PreTrainedModel, length: int, whose: str) -> bool:
    """Whether a changed token moves an earlier logit by more than the rounding of fp32."""
    rows = torch.arange(length)
    ids = rows.repeat(length + 1, 1)
    ids[rows, rows] = rows + 1
    ids %= net.get_input_embeddings().num_embeddings  # type: ignore[operator]
    training = net.training
    try:
        with quietly(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            logits = net.eval()(input_ids=ids, use_cache=False).logits
            moved = (logits[:-1] - logits[-1:]).abs().amax(-1).tril(-1)  # of a token, by each later one
    except Exception as error:  # of any class: the code is of transformers, or of the net's own author
        if torch.cuda.is_available():
            return False  # it may need one
        reason = (str(error).splitlines() or [type(error).__name__])[0][:80]
        raise InputError(f"{whose} gives no logits of tokens alone ({reason}); take another net") from error
    finally:
        net.train(training)
    return bool((moved > 1e-5 * logits.abs().max()).any())


def preprocessing(name: str) -> dict[str, Any]:
    """What a net's ``preprocessor_config.json`` says, if it scales images by a mean and a deviation; else nothing.

    Args:
        name: folder or hub name of the net.

    Raises:
        InputError: it does not say by what, or speaks of images that are not in [0, 1].
    """
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except (OSError, ValueError):
        return {}  # as of nets that were trained here
    mean, std = settings.get("image_mean"), settings.get("image_std")
    if not settings.get("do_normalize", mean is not None):
        return {}
    if not (isinstance(mean, list) and isinstance(std, list)) or not settings.get("do_rescale", True):
        problem = "preprocessor_config.json needs image_mean and image_std for each channel of values in [0, 1]"
        raise InputError(f"model.net name {name!r}: {problem}")
    return settings


class Pretrained(nn.Module):
    """A pretrained net of transformers with its head, to be trained further or as a teacher.

    Where its head has other classes than the data, in number, an image or text net gets a new one.

    Args:
        num_classes: number of classes of the data and the head. A language model may know more tokens; they are left
            out.
        name: folder or hub name of the net (safetensors weights).
        task: what its head does. Images, in [0, 1], get the mean and scale that its ``preprocessor_config.json`` names.
        freeze: keep the body as it is and train the head alone.

    Raises:
        InputError: there is no such net, or it knows fewer tokens.
    """

    def __init__(
        self, num_classes: int, name: str, task: Literal["image", "text", "next token"] = "image", freeze: bool = False
    ):
        super().__init__()
        kinds = AutoModelForImageClassification, AutoModelForSequenceClassification, AutoModelForCausalLM
        kind = dict(zip(("image", "text", "next token"), kinds, strict=True))[task]
        key, language = f"{type(self).__name__} name", task == "next token"
        labels, tokens = (None, num_classes) if language else (num_classes, None)
        self.model, its = load(kind, name, key, "such a net", labels, tokens)
        config: Any = self.model.config
        if task == "text" and config.pad_token_id is None and isinstance(config.eos_token_id, int):
            config.pad_token_id = config.eos_token_id  # as common.sources.files.load_tokenizer does
        self.num_classes, self.language, self.freeze = num_classes, language, freeze
        self.preprocessing: dict[str, Any] = its["preprocessing"] if task == "image" else {}
        self.new_head = "" if language or its["classes"] == num_classes else f"{its['classes']} classes"
        if language and (found := self.model.config.vocab_size) < num_classes:
            raise InputError(f"{key} {name!r}: knows {found} tokens, and the data have {num_classes}")
        if language:
            check_causal(self.model, f"{key} {name!r}")
        self.model.base_model.requires_grad_(not freeze)

    def train(self, mode: bool = True) -> "Pretrained":
        """A frozen body stays in evaluation mode: it cannot adapt to dropout."""
        super().train(mode)
        self.model.base_model.train(mode and not self.freeze)
        return self

    def forward(self, **inputs: Tensor) -> Float[Tensor, "*batch classes"]:
        """Logits of a batch.

        Raises:
            InputError: images have other channels, or another size, than the net takes; texts are too long for it, or
                there is no token to pad them with.
        """
        if "pixel_values" in inputs:
            inputs["pixel_values"] = self._scaled(inputs["pixel_values"])
        else:
            key = "data.source.context" if self.language else "data.source.max_length"
            check_context(self.model.config, inputs["input_ids"].shape[1], repr(self.model.name_or_path), key)
        no_cache = {"use_cache": False} if self.language else {}  # whole texts in one pass need none
        try:
            logits = self.model(**inputs, **no_cache).logits
        except ValueError as error:
            if "pixel_values" in inputs:
                fix = "set data.source.size"
            elif self.model.config.pad_token_id is None:
                fix = "set pad_token_id in its config.json"
            else:
                raise
            reason = str(error).splitlines()[0][:90]
            raise InputError(f"model.net name {self.model.name_or_path!r}: {reason}; {fix}") from error
        # Without the rows that round a vocabulary up; a copy, as FSDP2 gives no view on.
        return logits if logits.shape[-1] == self.num_classes else logits[..., : self.num_classes].contiguous()

    def _scaled(self, images: Float[Tensor, "batch channels height width"]) -> Tensor:
        mean, std = (images.new_tensor(self.preprocessing.get(name, [])) for name in ("image_mean", "image_std"))
        takes = len(mean) or getattr(self.model.config, "num_channels", images.shape[1])
        if images.shape[1] != takes:
            problem = f"takes images of {takes} channels, and the data have {images.shape[1]}"
            raise InputError(f"model.net name {self.model.name_or_path!r}: {problem}; set data.source.mode")
        return (images - mean[:, None, None]) / std[:, None, None] if len(mean) else images
