"""Small nets that several recipes share; larger ones come from transformers."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn


class ConvNet(nn.Sequential):
    """A plain convolutional net: per stage two 3x3 convolutions with batch norm, then max-pooling; a linear head.

    Args:
        num_classes: width of the output.
        in_channels: channels of the images.
        widths: channels of each stage; every stage halves height and width.
        dropout: probability before the head.
    """

    def __init__(
        self, num_classes: int, in_channels: int = 1, widths: Sequence[int] = (32, 64), dropout: float = 0.0
    ):
        layers: list[nn.Module] = []
        for before, width in zip([in_channels, *widths[:-1]], widths, strict=True):
            for inputs in (before, width):
                layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
        super().__init__(
            *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(widths[-1], num_classes)
        )

    def forward(
        self, pixel_values: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch classes"]:
        """Logits of a batch of images."""
        return super().forward(pixel_values)
