"""A small net of our own, and nets of transformers as classifiers; the first argument is the number of classes."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils.logging import disable_progress_bar

from common.errors import InputError


class ConvNet(nn.Sequential):
    """A plain convolutional net: per stage two 3x3 convolutions with batch norm, then max-pooling; a linear head.

    Args:
        num_classes: width of the output.
        in_channels: channels of the images.
        widths: channels of each stage; every stage halves height and width.
        dropout: probability before the head.
        grid: height and width of what the head sees, 1 for the mean over all places.

    Raises:
        InputError: there is no stage or no grid, or the images have other channels or are too small for so many stages.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 1,
        widths: Sequence[int] = (32, 64),
        dropout: float = 0.0,
        grid: int = 1,
    ):
        if not widths:
            raise InputError("model.net.widths is empty; give a width for each stage")
        if grid < 1:
            raise InputError(f"model.net.grid must be at least 1, got {grid}")
        self.in_channels, self.stages = in_channels, len(widths)
        layers: list[nn.Module] = []
        for before, width in zip([in_channels, *widths[:-1]], widths, strict=True):
            for inputs in (before, width):
                layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
        head = nn.Linear(widths[-1] * grid**2, num_classes)
        super().__init__(*layers, nn.AdaptiveAvgPool2d(grid), nn.Flatten(), nn.Dropout(dropout), head)

    def forward(self, pixel_values: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Logits of a batch of images."""
        channels, *size = pixel_values.shape[1:]
        if channels != self.in_channels:
            raise InputError(f"model.net.in_channels is {self.in_channels}, but the images have {channels}")
        if min(size) < 2**self.stages:
            shape = "x".join(map(str, size))
            raise InputError(f"model.net.widths has {self.stages} stages, too many for images of {shape} pixels")
        return super().forward(pixel_values)


class ImageClassifier(nn.Module):
    """Any image classifier of transformers with new weights.

    Args:
        num_classes: width of the output.
        config: its config by class path, such as ``transformers.ResNetConfig`` or ``transformers.ViTConfig``.
    """

    def __init__(self, num_classes: int, config: PretrainedConfig):
        super().__init__()
        config.num_labels = num_classes
        self.model = AutoModelForImageClassification.from_config(config)

    def forward(self, pixel_values: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Logits of a batch of images."""
        return self.model(pixel_values=pixel_values).logits


class PretrainedEncoder(nn.Module):
    """A pretrained text encoder, its token vectors averaged, and a new linear head.

    Args:
        num_classes: width of the output.
        name: folder or hub name of the encoder (safetensors weights).
        freeze: keep the encoder as it is and train the head alone.
        dropout: probability before the head.

    Raises:
        InputError: there is no such encoder.
    """

    def __init__(self, num_classes: int, name: str, freeze: bool = False, dropout: float = 0.1):
        super().__init__()
        disable_progress_bar()  # it stands on stderr
        try:
            self.body = AutoModel.from_pretrained(
                name, use_safetensors=True, trust_remote_code=False, dtype=torch.get_default_dtype()
            )
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0][:80]
            problem = f"neither a folder with an encoder in safetensors nor a hub name ({reason})"
            raise InputError(f"model.net name {name!r}: {problem}") from error
        if hasattr(self.body, "pooler"):
            self.body.pooler = None  # unused here, which distributed training refuses
        self.body.requires_grad_(not freeze)
        self.freeze = freeze
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(self.body.config.hidden_size, num_classes))

    def forward(
        self, input_ids: Int64[Tensor, "batch time"], attention_mask: Int64[Tensor, "batch time"]
    ) -> Float[Tensor, "batch classes"]:
        """Logits of a batch of texts."""
        check_context(self.body.config, input_ids.shape[1], "model.net", "data.source.max_length")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze):
            states = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask[:, :, None].to(states.dtype)  # padding does not count
        return self.head((states * weights).sum(1) / weights.sum(1))

    def train(self, mode: bool = True) -> "PretrainedEncoder":
        """A frozen body stays in evaluation mode: no dropout in what cannot adapt to it."""
        super().train(mode)
        self.body.train(mode and not self.freeze)
        return self


def causal_lm(
    config: PretrainedConfig, vocab_size: int, eos_id: int | None = None, key: str = "model.config"
) -> PreTrainedModel:
    """A causal language model of transformers with new weights, for the tokens of the data.

    Args:
        config: its config, which is changed to these tokens.
        vocab_size: number of tokens.
        eos_id: the token that ends a text; None where nothing is generated.
        key: where the config comes from.

    Raises:
        InputError: transformers has no language model of this config.
    """
    config.vocab_size, config.eos_token_id = vocab_size, eos_id
    config.bos_token_id = config.pad_token_id = None
    try:
        return AutoModelForCausalLM.from_config(config)  # SDPA attention wherever the net has it
    except (ValueError, KeyError) as error:
        raise InputError(f"{key}: {type(config).__name__} makes no language model: {error}") from error


def check_context(
    config: PretrainedConfig, context: int, whose: str = "model.config", key: str = "data.context"
) -> None:
    """See that a language model can take windows of so many tokens.

    Raises:
        InputError: they are longer than it has positions for.
    """
    positions = getattr(config, "max_position_embeddings", None) or context
    if context > positions:
        raise InputError(f"{key} {context} exceeds max_position_embeddings {positions} of {whose}; shorten it")


class CausalLM(nn.Module):
    """Any causal language model of transformers with new weights; its classes are the tokens.

    Args:
        num_classes: number of tokens.
        config: its config by class path, such as ``transformers.LlamaConfig``.

    Raises:
        InputError: transformers has no language model of this config.
    """

    def __init__(self, num_classes: int, config: PretrainedConfig):
        super().__init__()
        self.model = causal_lm(config, num_classes, key="model.net.config")

    def forward(self, input_ids: Int64[Tensor, "batch time"]) -> Float[Tensor, "batch time classes"]:
        """Logits of the next token at each position."""
        check_context(self.model.config, input_ids.shape[1], "model.net.config", "data.source.context")
        return self.model(input_ids=input_ids, use_cache=False).logits


class Pretrained(nn.Module):
    """A pretrained net of transformers with its head, such as a teacher.

    Args:
        num_classes: number of classes of the data, which the head must have too; a language model may know more tokens,
            which are left out.
        name: folder or hub name of the net (safetensors weights).
        task: what its head does.

    Raises:
        InputError: there is no such net, or its head has other classes.
    """

    def __init__(self, num_classes: int, name: str, task: Literal["image", "text", "next token"] = "image"):
        super().__init__()
        disable_progress_bar()  # it stands on stderr
        kinds = AutoModelForImageClassification, AutoModelForSequenceClassification, AutoModelForCausalLM
        kind = dict(zip(("image", "text", "next token"), kinds, strict=True))[task]
        try:
            self.model = kind.from_pretrained(name, use_safetensors=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0][:80]
            problem = f"neither a folder with such a net in safetensors nor a hub name ({reason})"
            raise InputError(f"{type(self).__name__} name {name!r}: {problem}") from error
        self.num_classes, language = num_classes, task == "next token"
        found: int = self.model.config.vocab_size if language else self.model.config.num_labels  # type: ignore
        if found < num_classes or (found > num_classes and not language):
            raise InputError(f"{type(self).__name__} name {name!r}: has {found} classes, the data {num_classes}")

    def forward(self, **inputs: Tensor) -> Float[Tensor, "*batch classes"]:
        """Logits of a batch."""
        return self.model(**inputs).logits[..., : self.num_classes]
