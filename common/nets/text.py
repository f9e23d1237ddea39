"""Nets for texts, made from transformers."""

from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils.logging import disable_progress_bar, get_verbosity, set_verbosity, set_verbosity_error

from common.checksums import check_files
from common.errors import InputError


class PretrainedEncoder(nn.Module):
    """A pretrained text encoder, the mean of its token vectors, and a new linear head.

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
        disable_progress_bar()  # it would write to stderr
        check_files(Path(name))
        try:
            self.body = AutoModel.from_pretrained(
                name, use_safetensors=True, trust_remote_code=False, dtype=torch.get_default_dtype()
            )
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0][:80]
            problem = f"neither a folder with an encoder in safetensors nor a hub name ({reason})"
            raise InputError(f"model.net name {name!r}: {problem}") from error
        if hasattr(self.body, "pooler"):
            self.body.pooler = None  # distributed training refuses unused parameters
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
        """A frozen body stays in evaluation mode: it cannot adapt to dropout."""
        super().train(mode)
        self.body.train(mode and not self.freeze)
        return self


class WordClassifier(nn.Module):
    """Any token classifier of transformers with new weights.

    Args:
        num_classes: width of the output.
        config: its config by class path, such as ``transformers.BertConfig``; ``vocab_size`` is that of the tokenizer.

    Raises:
        InputError: transformers has no token classifier of this config.
    """

    def __init__(self, num_classes: int, config: PretrainedConfig):
        super().__init__()
        config.num_labels = num_classes
        try:
            self.model = AutoModelForTokenClassification.from_config(config)
        except ValueError as error:
            problem = f"{type(config).__name__} makes no token classifier"
            raise InputError(f"model.net.config: {problem}; take another, such as transformers.BertConfig") from error

    def forward(
        self, input_ids: Int64[Tensor, "batch time"], attention_mask: Int64[Tensor, "batch time"]
    ) -> Float[Tensor, "batch time classes"]:
        """Logits of each token."""
        check_context(self.model.config, input_ids.shape[1], "model.net.config", "data.source.max_length")
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits.clone()  # a linear layer gives a view, of which FSDP2 warns


class PretrainedWordClassifier(nn.Module):
    """A pretrained text encoder of transformers with a linear head on each token.

    Args:
        num_classes: width of the output.
        name: folder or hub name of the encoder (safetensors weights). A head for as many classes is kept.
        freeze: keep the encoder as it is and train the head alone.

    Raises:
        InputError: there is no such encoder.
    """

    def __init__(self, num_classes: int, name: str, freeze: bool = False):
        super().__init__()
        disable_progress_bar()  # it would write to stderr
        check_files(Path(name))
        before = get_verbosity()
        set_verbosity_error()  # it would warn that the head is new
        try:
            self.model = AutoModelForTokenClassification.from_pretrained(
                name, num_labels=num_classes, ignore_mismatched_sizes=True, use_safetensors=True,
                trust_remote_code=False, dtype=torch.get_default_dtype(),
            )  # fmt: skip
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0][:80]
            problem = f"neither a folder with an encoder in safetensors nor a hub name ({reason})"
            raise InputError(f"model.net name {name!r}: {problem}") from error
        finally:
            set_verbosity(before)
        self.model.base_model.requires_grad_(not freeze)
        self.freeze, self.body_name = freeze, f"model.{self.model.base_model_prefix}."

    def forward(
        self, input_ids: Int64[Tensor, "batch time"], attention_mask: Int64[Tensor, "batch time"]
    ) -> Float[Tensor, "batch time classes"]:
        """Logits of each token."""
        check_context(self.model.config, input_ids.shape[1], "model.net", "data.source.max_length")
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits.clone()  # a linear layer gives a view, of which FSDP2 warns

    def train(self, mode: bool = True) -> "PretrainedWordClassifier":
        """A frozen body stays in evaluation mode: it cannot adapt to dropout."""
        super().train(mode)
        self.model.base_model.train(mode and not self.freeze)
        return self


def causal_lm(
    config: PretrainedConfig, vocab_size: int, eos_id: int | None = None, key: str = "model.config"
) -> PreTrainedModel:
    """A causal language model of transformers with new weights, for the tokens of the data.

    Args:
        config: its config, changed in place to these tokens.
        vocab_size: number of tokens.
        eos_id: the token that ends a text; None if nothing is generated.
        key: the config's setting, for messages.

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
    """Check that a language model has positions for ``context`` tokens; ``whose`` and ``key`` are for messages.

    Raises:
        InputError: it has fewer.
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
