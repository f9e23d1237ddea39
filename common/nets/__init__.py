"""Nets that several recipes use."""

from common.nets.images import ConvNet, ImageClassifier
from common.nets.pretrained import Pretrained, body_of
from common.nets.text import (
    CausalLM,
    PretrainedEncoder,
    PretrainedWordClassifier,
    WordClassifier,
    causal_lm,
    check_net,
    freeze_blocks,
    language_model,
    router_factor,
    train_logits,
)

__all__ = [
    "CausalLM", "ConvNet", "ImageClassifier", "Pretrained", "PretrainedEncoder", "PretrainedWordClassifier",
    "WordClassifier", "body_of", "causal_lm", "check_net", "freeze_blocks", "language_model", "router_factor",
    "train_logits",
]  # fmt: skip
