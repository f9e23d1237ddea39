"""Samples in memory, as a net takes those of its source."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.errors import InputError, speaking_of
from common.sources.files import Labelled, made_again, tokenize
from common.sources.images import CHANNELS, to_tensor
from common.sources.labelled import LabelledDataset
from common.sources.pixels import Levels, decode

MODES = {channels: mode for mode, channels in CHANNELS.items()}
TEXTS = {"attention_mask", "input_ids"}


def unlabelled(samples: Any, facts: Mapping[str, Any]) -> LabelledDataset:
    """Images or texts in memory as batches without labels, as ``predict`` reads those of a source.

    Args:
        samples: of a net for texts: a list of texts. Of a net for images: pictures of Pillow, or arrays of bytes
            (height, width) or (height, width, 3), which get its mode and size, and become [0, 1]; or one array of
            numbers (samples, channels, height, width) in the size and the units of its training.
        facts: of the net's data, see :class:`common.sources.labelled.Samples`.

    Raises:
        InputError: there are none, or the net takes others.
    """
    if not hasattr(samples, "__len__") or not len(samples):
        raise InputError("samples: there are none to predict; give a list or an array")
    shapes = facts.get("shapes", {})
    if facts.get("labels") == "words":
        raise InputError("samples: the net was trained on tagged words; predict them by the command line")
    if shapes.keys() == TEXTS:
        inputs = _texts(samples, facts["tokenizer"])
    elif "pixel_values" in shapes:
        inputs = {
            "pixel_values": _images(
                samples, shapes["pixel_values"], facts["range"], facts.get("decoding", {}).get("levels")
            )
        }
    else:
        takes = f"the net takes {', '.join(shapes)}" if shapes else "the checkpoint does not say what its net takes"
        raise InputError(f"samples: {takes}, neither images nor whole texts; predict by the command line")
    data = Labelled(inputs, torch.full((len(samples),), -1), list(facts["class_names"]))
    return LabelledDataset(data, torch.arange(len(samples)))


def _texts(texts: Any, tokenizer: Mapping[str, Any]) -> dict[str, Tensor]:
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise InputError("samples: the net was trained on texts; give a list of them")
    with speaking_of("samples", instead_of="data.source.text"):
        return tokenize(made_again(tokenizer), texts, tokenizer["model_max_length"])


def _images(samples: Any, shape: Sequence[int], limits: Sequence[float], levels: Levels | None) -> Tensor:
    low, high = limits
    if isinstance(samples, Tensor | np.ndarray) and "uint8" not in str(samples.dtype):
        values = torch.as_tensor(samples).float().contiguous()
        if values.ndim == 3 and shape[0] == 1:
            values = values[:, None]
        if list(values.shape[1:]) != list(shape):
            given, wanted = ("x".join(map(str, each)) for each in (values.shape[1:], shape))
            raise InputError(f"samples: each is {given}, and in training {wanted} (channels x height x width)")
        least, most, room = values.min().item(), values.max().item(), (high - low) / 20  # new ones may go a bit further
        if not (low - room <= least <= most <= high + room):
            problem = f"values are {least:.4g} to {most:.4g}, and in training {low:.4g} to {high:.4g}"
            raise InputError(f"samples: {problem}; scale them alike")
        return values
    if low < 0 or high > 1 or shape[0] not in MODES:
        problem = f"{shape[0]} channels of {low:.4g} to {high:.4g} are no pictures"
        raise InputError(f"samples: {problem}; give an array of numbers in these units")
    if isinstance(samples, str) or not all(isinstance(each, Image.Image | Tensor | np.ndarray) for each in samples):
        raise InputError("samples: the net was trained on images; give pictures of Pillow, or an array")
    if isinstance(samples, Tensor | np.ndarray) and (samples.ndim < 3 or (samples.ndim == 3 and samples.shape[2] == 3)):
        raise InputError(f"samples: an array of the shape {tuple(samples.shape)} is one picture; give a list of them")
    pictures = [each if isinstance(each, Image.Image) else _picture(np.asarray(each)) for each in samples]
    return to_tensor([_decoded(each, number, shape, levels) for number, each in enumerate(pictures)])


def _decoded(picture: Image.Image, number: int, shape: Sequence[int], levels: Levels | None) -> np.ndarray:
    try:
        return decode(picture, MODES[shape[0]], shape[1:], levels)
    except (ValueError, OSError) as error:
        raise InputError(f"samples: picture {number} {error}; give 8 bits per channel, in whole files") from error


def _picture(pixels: np.ndarray) -> Image.Image:
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)):
        problem = f"an array of {pixels.dtype} of the shape {pixels.shape} is no picture"
        raise InputError(f"samples: {problem}; give bytes (height, width) or (height, width, 3)")
    return Image.fromarray(pixels)
