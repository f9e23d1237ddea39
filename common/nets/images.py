"""Nets for images; the first argument is the number of classes."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    PretrainedConfig,
)

from common.errors import InputError


class ConvNet(nn.Sequential):
    """A plain convolutional net: per stage two 3x3 convolutions with batch norm, then max-pooling; a linear head.

    Args:
        num_classes: width of the output.
        in_channels: channels of the images.
        widths: channels of each stage; every stage halves height and width.
        dropout: probability before the head.
        grid: height and width of the head's input; 1 is the mean over all places.

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
            found = f"is {self.in_channels}, but the images have {channels}"
            raise InputError(f"model.net.in_channels {found}; set it to {channels}")
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
