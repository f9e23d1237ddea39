"""Matrix products in float8."""

import importlib.util

import torch
from torch import nn

from common.errors import InputError


def to_float8(net: nn.Module) -> None:
    """Run a net's linear layers in float8 with torchao, scaled per tensor (https://arxiv.org/abs/2209.05433).

    Weights stay what they are, and so do checkpoints. The last linear layer, the head, and layers whose width is no
    multiple of 16 keep their precision.

    Raises:
        InputError: the GPU has no float8, or torchao is not installed.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        problem = "needs a GPU with float8 (Ada, Hopper, Blackwell)"
        raise InputError(f"model.float8: {problem}; take configs/precision/bf16-mixed.yaml")
    if importlib.util.find_spec("torchao") is None:
        raise InputError("model.float8: torchao is not installed; run pip install -e '.[fp8]'")
    from torchao.float8 import convert_to_float8_training  # type: ignore[import-not-found]

    head = [module for module in net.modules() if isinstance(module, nn.Linear)][-1:]

    def fits(module: nn.Linear, name: str) -> bool:
        return module not in head and not (module.in_features % 16 or module.out_features % 16)

    convert_to_float8_training(net, module_filter_fn=fits)
