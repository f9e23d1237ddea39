"""Nets for texts, made from transformers."""

from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from common.errors import InputError
from common.nets.pretrained import check_causal, check_context, load
from common.parts import blocks

NO_TOKEN = -1  # for a net that wants the number of a padding token


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
        self.body, _ = load(AutoModel, name, "model.net name", "an encoder")
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


def _word_logits(model: Any, input_ids: Tensor, attention_mask: Tensor, key: str) -> Tensor:
    check_context(model.config, input_ids.shape[1], key, "data.source.max_length")
    # A copy: the last layer gives a view, and FSDP2 warns of that.
    return model(input_ids=input_ids, attention_mask=attention_mask).logits.clone()


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
        return _word_logits(self.model, input_ids, attention_mask, "model.net.config")


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
        self.model, _ = load(AutoModelForTokenClassification, name, "model.net name", "an encoder", num_classes)
        self.model.base_model.requires_grad_(not freeze)
        self.freeze = freeze

    def forward(
        self, input_ids: Int64[Tensor, "batch time"], attention_mask: Int64[Tensor, "batch time"]
    ) -> Float[Tensor, "batch time classes"]:
        """Logits of each token."""
        return _word_logits(self.model, input_ids, attention_mask, "model.net")

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
        InputError: transformers has no language model of this config, it sees later tokens, or the config names other
            tokens than those of the data.
    """
    try:
        _give_tokens(config, vocab_size, eos_id, key)
        net = AutoModelForCausalLM.from_config(config)  # SDPA attention wherever the net has it
        others = [part for part in net.modules() if not isinstance(part, nn.Embedding | PreTrainedModel)]
        if any(getattr(part, "padding_idx", 0) is None for part in others):  # RoBERTa counts positions from it
            config.pad_token_id = NO_TOKEN
            net = AutoModelForCausalLM.from_config(config)
    except InputError:
        raise
    except Exception as error:  # of any class: a config's settings meet the code of its net
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise InputError(f"{key}: {type(config).__name__} makes no language model: {reason}") from error
    for part in net.modules():
        if isinstance(part, nn.Embedding):
            part.padding_idx = None  # no token of a packed text is padding
    check_causal(net, key)
    return net


def _give_tokens(config: PretrainedConfig, vocab_size: int, eos_id: int | None, key: str) -> None:
    """Set a config's tokens to those of the data, and refuse others that are given."""
    tokens = {"vocab_size": vocab_size, "eos_token_id": eos_id, "bos_token_id": None, "pad_token_id": None}
    # The text's own part, in a net of images and texts.
    text, default = (each.get_text_config(decoder=True) for each in (config, type(config)()))
    for name, value in tokens.items():
        given = getattr(text, name, None)
        if given not in (value, getattr(default, name, None), eos_id or 0, NO_TOKEN):  # or from here, an earlier time
            raise InputError(f"{key}.{name} {given}: the data's tokenizer says {value}; leave {name} out")
        for each in (config, text):
            try:
                setattr(each, name, value)
            except StrictDataclassError:  # which wants a number
                setattr(each, name, eos_id or 0)


def check_net(config: PretrainedConfig | None, weights: str | None, context: int) -> None:
    """Check that there is either a config or a net to train further, and that the config has positions enough.

    Raises:
        InputError: there are both or neither, or ``context`` tokens are too many.
    """
    if config is not None and weights is not None:
        problem = "model.weights have a configuration of their own"
        raise InputError(f"model.config: {problem}; add the recipe's pretrained.yaml by --config, or give null")
    if config is not None:
        check_context(config, context)
    elif weights is None:
        raise InputError("model.config is null, and there are no model.weights; give one of them")


def language_model(
    config: PretrainedConfig | None,
    weights: str | None,
    vocab_size: int,
    context: int,
    eos_id: int | None = None,
) -> PreTrainedModel:
    """A causal language model of transformers for the tokens of the data: a new one, or one to train further.

    Args:
        config: of a new one.
        weights: folder or hub name of the other; it may know more tokens than the data have. The folder of a
            ``config.json`` alone gives a new one of that shape.
        vocab_size: number of tokens of the data.
        context: tokens that it has to take at a time.
        eos_id: the token that ends a text; None if nothing is generated.

    Raises:
        InputError: transformers has no such net, or it knows fewer tokens or takes fewer at a time.
    """
    if weights is None:
        assert config is not None, "check_net has seen to it"
        return causal_lm(config, vocab_size, eos_id)
    net, _ = load(AutoModelForCausalLM, weights, "model.weights", "a language model", vocab_size=vocab_size)
    if (known := net.get_input_embeddings().num_embeddings) < vocab_size:
        problem = f"knows {known} tokens, and the data have {vocab_size}"
        raise InputError(f"model.weights {weights!r}: {problem}; give its own tokenizer, or data.tokenizer null")
    check_context(net.config, context, f"model.weights {weights!r}")
    check_causal(net, f"model.weights {weights!r}", context)
    for each in (net.config, net.generation_config) if eos_id is not None else ():
        ends = each.eos_token_id
        if eos_id not in (ends if isinstance(ends, list) else [ends]):
            each.eos_token_id = eos_id
    return net


def router_factor(net: nn.Module, key: str = "model.config") -> float:
    """The factor of a mixture of experts' router loss, which keeps its experts in use; 0 for other nets.

    Raises:
        InputError: the net has a further loss of its own, which only its forward pass with labels would add.
    """
    if factor := getattr(net, "z_loss_coefficient", 0.0):
        raise InputError(f"{key}.z_loss_coefficient {factor}: this loss is not added here; give 0")
    return next((getattr(net, name) for name in ("router_aux_loss_coef", "aux_loss_coef") if hasattr(net, name)), 0.0)


def train_logits(
    net: nn.Module, input_ids: Int64[Tensor, "batch time"], router: float
) -> tuple[Float[Tensor, "batch time vocab"], Tensor | float]:
    """Logits of the next token, and what training adds to their loss: the router loss of a mixture of experts.

    It is transformers' own, of the micro-batch of each rank (Switch, https://arxiv.org/abs/2101.03961, eq. 4).

    Args:
        net: a causal language model of transformers.
        input_ids: the tokens.
        router: its :func:`router_factor`.

    Raises:
        InputError: the net gives no router loss.
    """
    if not router:
        return net(input_ids=input_ids, use_cache=False).logits, 0.0
    found = net(input_ids=input_ids, use_cache=False, output_router_logits=True)
    if not isinstance(loss := getattr(found, "aux_loss", None), Tensor):
        problem = f"the router loss, with factor {router}, cannot be had of this net, or under this strategy"
        raise InputError(f"model.config: {problem}; set its coefficient to 0")
    return found.logits, router * loss


def freeze_blocks(net: PreTrainedModel, count: int) -> list[nn.Module]:
    """Freeze the first blocks of a language model and its embeddings; nothing for 0.

    Returns:
        The frozen parts; they are to stay in evaluation mode.

    Raises:
        InputError: it has fewer blocks.
    """
    layers = blocks(net)
    if not 0 <= count <= len(layers):
        raise InputError(f"model.frozen_blocks {count}: must be 0 to {len(layers)}, the blocks of this net")
    if not count:
        return []
    tables = [module for module in net.base_model.modules() if isinstance(module, nn.Embedding)]
    for part in (frozen := [*tables, *layers[:count]]):
        part.requires_grad_(False)
    return frozen


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
        factor, name = router_factor(self.model, "model.net.config"), "router_aux_loss_coef"
        if factor and factor != getattr(type(config)(), name, factor):
            raise InputError(
                f"model.net.config.{name} {factor}: this recipe adds no router loss; leave it out, or take lm"
            )

    def forward(self, input_ids: Int64[Tensor, "batch time"]) -> Float[Tensor, "batch time classes"]:
        """Logits of the next token at each position."""
        check_context(self.model.config, input_ids.shape[1], "model.net.config", "data.source.context")
        return self.model(input_ids=input_ids, use_cache=False).logits
