"""Pretrained nets of transformers with their heads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from jaxtyping import Float
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils.logging import disable_progress_bar

from common.checksums import check_files
from common.errors import InputError


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
    """A pretrained net of transformers with its head, such as a teacher.

    Args:
        num_classes: number of classes of the data and the head. A language model may know more tokens; they are left
            out.
        name: folder or hub name of the net (safetensors weights).
        task: what its head does. Images, in [0, 1], get the mean and scale that its ``preprocessor_config.json`` names.

    Raises:
        InputError: there is no such net, or its head has other classes.
    """

    def __init__(self, num_classes: int, name: str, task: Literal["image", "text", "next token"] = "image"):
        super().__init__()
        disable_progress_bar()  # it would write to stderr
        kinds = AutoModelForImageClassification, AutoModelForSequenceClassification, AutoModelForCausalLM
        kind = dict(zip(("image", "text", "next token"), kinds, strict=True))[task]
        check_files(Path(name))
        try:
            self.model = kind.from_pretrained(name, use_safetensors=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0][:80]
            problem = f"neither a folder with such a net in safetensors nor a hub name ({reason})"
            raise InputError(f"{type(self).__name__} name {name!r}: {problem}") from error
        self.preprocessing = preprocessing(name) if task == "image" else {}
        self.num_classes, language = num_classes, task == "next token"
        found: int = self.model.config.vocab_size if language else self.model.config.num_labels  # type: ignore
        if found < num_classes or (found > num_classes and not language):
            raise InputError(f"{type(self).__name__} name {name!r}: has {found} classes, the data {num_classes}")

    def forward(self, **inputs: Tensor) -> Float[Tensor, "*batch classes"]:
        """Logits of a batch.

        Raises:
            InputError: images have other channels, or another size, than the net takes.
        """
        if self.preprocessing:
            images, each = inputs["pixel_values"], ("image_mean", "image_std")
            mean, std = (images.new_tensor(self.preprocessing[name])[:, None, None] for name in each)
            if images.shape[1] != len(mean):
                problem = f"takes images of {len(mean)} channels, and the data have {images.shape[1]}"
                raise InputError(f"model.net name {self.model.name_or_path!r}: {problem}; set data.source.mode")
            inputs["pixel_values"] = (images - mean) / std
        try:
            return self.model(**inputs).logits[..., : self.num_classes]
        except ValueError as error:
            if "pixel_values" not in inputs:
                raise
            reason = str(error).splitlines()[0][:90]
            raise InputError(f"model.net name {self.model.name_or_path!r}: {reason}; set data.source.size") from error
