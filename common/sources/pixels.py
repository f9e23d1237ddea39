"""The pixels of an image, as a viewer shows them."""

import io
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageOps

GREY = ("1", "L", "LA", "La")  # Pillow's modes of images without colour
DEEP = "IF"  # how the names of modes of more than 8 bits begin; they have no colour
TURNED = (5, 6, 7, 8)  # orientations of EXIF that swap height and width
DECODING = 2  # raise it when the same file would get other pixels
RANGES = {"F": 1.0, "I;16": 65535.0, "I;16B": 65535.0, "I;16L": 65535.0, "I;16N": 65535.0}  # without levels
PHOTOMETRIC, SAMPLE_FORMAT = 262, 339  # tags of TIFF: 0 for white is zero; 1 for numbers without a sign

Levels = Sequence[float]  # of images of more than 8 bits, the values that are black and white


class Look(NamedTuple):
    """What is known of an image before a batch asks for it.

    Attributes:
        height: in pixels, turned as its camera says.
        width: the same.
        has_colour: whether it is more than grey.
        is_deep: whether it has more than 8 bits.
        is_fractions: whether its values are fractions.
        is_special: whether a version without ``DECODING`` gave it other pixels.
        low: the least value of a deep one; else 0.
        high: the greatest.
    """

    height: int
    width: int
    has_colour: bool
    is_deep: bool
    is_fractions: bool
    is_special: bool
    low: float
    high: float


def look(content: bytes) -> Look:
    """Look at an image; only a deep one is decoded. The checksums of a PNG file are compared.

    Raises:
        Exception: it is damaged or of no kind that is known; Pillow's readers raise nearly anything.
    """
    with Image.open(io.BytesIO(content)) as image:
        turned = "exif" in image.info and image.getexif().get(Image.ExifTags.Base.Orientation) in TURNED
        height, width = image.size if turned else image.size[::-1]
        is_deep, has_colour = image.mode[0] in DEEP, image.mode[0] not in DEEP and image.mode not in GREY
        is_special = is_deep or image.has_transparency_data or "icc_profile" in image.info or image.mode == "LAB"
        is_fractions = image.mode == "F"
        if image.format == "PNG":
            image.verify()
    low = high = 0.0
    if is_deep:
        with Image.open(io.BytesIO(content)) as image:
            values, hidden = _values(image)
        shown = values[~hidden] if not hidden.all() else values
        low, high = float(shown.min()), float(shown.max())
        if not np.isfinite([low, high]).all():
            raise ValueError("a value is not finite")
    return Look(height, width, has_colour, is_deep, is_fractions, is_special, low, high)


def decode(picture: Image.Image, mode: str, size: Sequence[int], levels: Levels | None = None) -> np.ndarray:
    """Bytes (height, width, channels) of a picture, turned as its camera says, in a mode and resized to a size.

    What is transparent lies over white, and colours are those of sRGB.

    Args:
        picture: the picture.
        mode: of Pillow.
        size: height and width, in pixels.
        levels: see :data:`Levels`; None for the range of the format.

    Raises:
        ValueError: its values have no known range.
        OSError: it is damaged.
    """
    height, width = size
    if picture.mode[0] in DEEP:
        shown: Image.Image = _to_8_bits(picture, levels)
        shown.info["exif"] = picture.getexif().tobytes()
    else:
        shown = _to_srgb(picture)
    if picture.getexif().get(Image.ExifTags.Base.Orientation) is not None:
        shown = ImageOps.exif_transpose(shown)
    if shown.has_transparency_data:  # which a viewer shows over white; below it are colours that nobody sees
        shown = shown.convert("RGBA")
        shown = Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown)
    return np.asarray(shown.convert(mode).resize((width, height))).reshape(height, width, -1)


def _values(picture: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """The values of a deep picture, and which are transparent."""
    values = np.asarray(picture)
    tags: Mapping[int, Any] = getattr(picture, "tag_v2", {})
    if tags and values.dtype == np.int32 and tags.get(SAMPLE_FORMAT, (1,)) == (1,):
        values = values.view(np.uint32)  # Pillow gives numbers without a sign one
    key = picture.info.get("transparency")
    return values, values == key if isinstance(key, int) else np.zeros_like(values, bool)


def _to_8_bits(picture: Image.Image, levels: Levels | None) -> Image.Image:
    """A deep picture as a grey one of 8 bits: Pillow would cut values off.

    Raises:
        ValueError: its values have no known range.
    """
    values, hidden = _values(picture)
    if levels is None:
        if picture.mode not in RANGES:
            raise ValueError("its range of 32 bits is not known; save 16 bits")
        levels = 0.0, RANGES[picture.mode]
        if not (values.min() >= 0 and values.max() <= levels[1]):
            raise ValueError(f"its values leave 0 to {levels[1]:g}; save 16 bits")
    low, high = levels
    shares = (values.astype(np.float64).clip(low, high) - low) / ((high - low) or 1.0)
    if getattr(picture, "tag_v2", {}).get(PHOTOMETRIC) == 0:
        shares = 1 - shares
    grey = np.rint(shares * 255).astype(np.uint8)
    grey[hidden] = 255
    return Image.fromarray(grey)


def _to_srgb(picture: Image.Image) -> Image.Image:
    """A picture whose profile, or whose mode, is another than that of screens."""
    profile = picture.info.get("icc_profile")
    if not profile and picture.mode != "LAB":
        return picture
    if picture.mode in ("P", "PA"):
        picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    if picture.mode not in ("RGB", "RGBA", "CMYK", "LAB"):
        return picture
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile)) if profile else ImageCms.createProfile("LAB")
        if profile and "sRGB" in ImageCms.getProfileDescription(own):  # type: ignore[arg-type]
            return picture
        mode = "RGBA" if picture.mode == "RGBA" else "RGB"
        found: Any = ImageCms.profileToProfile(picture, own, _screen(), outputMode=mode)
    except (ImageCms.PyCMSError, OSError):  # viewers leave out a profile that is damaged or of another kind
        return picture
    return found


@cache
def _screen() -> Any:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
