"""Pictures made of two images each, for several tasks on one input (MultiMNIST, https://arxiv.org/abs/1710.09829)."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """Canvases with two images each, which are made where a batch asks for them.

    Attributes:
        images: all single images, see :class:`common.sources.Labelled`.
        chosen: positions of the two images of each pair.
        corner: row and column of their upper left pixels.
        size: height and width of a canvas, in pixels.
    """

    images: Any
    chosen: Int64[Tensor, "2 pairs"]
    corner: Int64[Tensor, "2 pairs 2"]
    size: int

    def __len__(self) -> int:
        return self.chosen.shape[1]

    def __getitem__(self, index: Int64[Tensor, " batch"]) -> Float[Tensor, "batch channels size size"]:
        return overlay(self.images[self.chosen[:, index]], self.corner[:, index], self.size)


def draw_pairs(
    images: Any, positions: Int64[Tensor, " samples"], count: int, size: int, max_shift: int, seed: int
) -> Pairs:
    """Draw pairs of images with replacement; put one to the left and one to the right, at any height.

    Args:
        images: all single images, of shape (images, channels, height, width).
        positions: of those to draw from.
        count: number of pairs.
        size: height and width of the canvas, in pixels.
        max_shift: largest distance of an image from its side of the canvas, in pixels.
        seed: of the draw; the same seed gives the same pairs.
    """
    generator = torch.Generator().manual_seed(seed)
    free_rows, free_columns = (size - length for length in images.shape[-2:])
    chosen = torch.randint(len(positions), (2, count), generator=generator)
    row = torch.randint(free_rows + 1, (2, count), generator=generator)
    shift = torch.randint(max_shift + 1, (2, count), generator=generator)
    corner = torch.stack([row, torch.stack([shift[0], free_columns - shift[1]])], dim=-1)
    return Pairs(images, positions[chosen], corner, size)


def overlay(
    images: Float[Tensor, "2 pairs channels height width"], corner: Int64[Tensor, "2 pairs 2"], size: int
) -> Float[Tensor, "pairs channels size size"]:
    """Put two images on a square canvas; where they overlap, the brighter pixel wins.

    Args:
        images: the first and the second image of each pair.
        corner: row and column of their upper left pixels.
        size: height and width of the canvas, in pixels.
    """
    pairs, channels, height, width = images.shape[1:]
    canvas = images.new_zeros(pairs, channels, size, size)
    rows = corner[..., 0, None] + torch.arange(height)
    columns = corner[..., 1, None] + torch.arange(width)
    pair, channel = torch.arange(pairs)[:, None, None, None], torch.arange(channels)[:, None, None]
    for pixels, row, column in zip(images, rows, columns, strict=True):
        place = pair, channel, row[:, None, :, None], column[:, None, None, :]
        canvas[place] = canvas[place].maximum(pixels)
    return canvas
