"""Nets that several recipes use."""

from common.nets.images import ConvNet, ImageClassifier
from common.nets.pretrained import Pretrained
from common.nets.text import (
    CausalLM,
    PretrainedEncoder,
    PretrainedWordClassifier,
    WordClassifier,
    causal_lm,
    check_context,
)

__all__ = [
    "CausalLM", "ConvNet", "ImageClassifier", "Pretrained", "PretrainedEncoder", "PretrainedWordClassifier",
    "WordClassifier", "causal_lm", "check_context",
]  # fmt: skip
