"""Operations of a training step, for the share of the device's peak (MFU)."""

import re
from typing import Any

from transformers import PreTrainedModel

EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_top_k")


def training_flops(net: PreTrainedModel, context: int) -> float:
    """Forward and backward operations per token (PaLM, appendix B, https://arxiv.org/abs/2204.02311).

    Weights count six each: those of the head also where it shares the embeddings', which are only looked up; of experts
    as many as a token meets. Attention is counted over the whole context, as torch's FLOP counter does.

    Args:
        net: a causal language model of transformers, whole.
        context: tokens of a window.
    """
    config: Any = net.config.get_text_config(decoder=True)
    active = next((value for name in EXPERTS_PER_TOKEN if (value := getattr(config, name, None))), 1)
    weights, experts = 0.0, re.compile(r"\bexperts\b")
    for name, module in net.named_modules():
        if "Embedding" in type(module).__name__:
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.ndim == 3 and experts.search(name):
                weights += parameter.numel() * active / parameter.shape[0]
            elif parameter.ndim >= 2:
                weights += parameter.numel()
    if net.get_output_embeddings() is None and config.tie_word_embeddings:
        weights += sum(p.numel() for p in net.get_input_embeddings().parameters())
    heads = getattr(config, "num_attention_heads", 0) or 0
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads) if heads else 0
    kinds = getattr(config, "layer_types", None) or ["attention"] * config.num_hidden_layers
    layers = sum("attention" in kind and "linear" not in kind for kind in kinds)
    return 6 * weights + 12 * layers * width * context
