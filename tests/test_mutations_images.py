"""Images as cameras, scanners and editors write them, mutated: the pixels of an independent reader, or one line."""

import io
import random
import struct
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from common.errors import InputError
from common.sources import ImageTable
from common.sources.pixels import decode, look

DRAW = np.random.default_rng(0)
HEIGHT, WIDTH = 5, 7
COLOURS = DRAW.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
GREYS = DRAW.integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
ALPHA = DRAW.integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
DEEP = DRAW.integers(900, 3000, (HEIGHT, WIDTH))
# What an EXIF orientation does to rows and columns.
TURNS: dict[int, Any] = {
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: image[::-1].swapaxes(0, 1),
    7: lambda image: image[::-1, ::-1].swapaxes(0, 1),
    8: lambda image: image[:, ::-1].swapaxes(0, 1),
}


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2).astype(np.float64)


def over_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return 255 + (colours.astype(np.float64) - 255) * alpha[..., None] / 255


def scaled(values: np.ndarray) -> np.ndarray:
    return np.rint(255 * (values - values.min()) / (values.max() - values.min()))


KEY = int(DEEP[2, 3])
SHOWN = DEEP[DEEP != KEY]
KEYED = np.where(DEEP == KEY, 255, np.rint(255 * (DEEP - SHOWN.min()) / (SHOWN.max() - SHOWN.min())).clip(0, 255))
PALETTE = Image.fromarray(COLOURS).quantize(16)
FEW = np.asarray(PALETTE.convert("RGB"))
HIDDEN = np.asarray(PALETTE) == 3

# The picture, how it is saved, and its pixels as RGB.
KINDS: dict[str, tuple[Image.Image, str, dict[str, Any], np.ndarray]] = {
    "1": (Image.fromarray(GREYS > 99), "PNG", {}, grey((GREYS > 99) * 255)),
    "grey": (Image.fromarray(GREYS), "PNG", {}, grey(GREYS)),
    "grey, white is zero": (Image.fromarray(GREYS), "TIFF", {"tiffinfo": {262: 0}}, grey(GREYS)),
    "grey with alpha": (
        Image.merge("LA", [Image.fromarray(GREYS), Image.fromarray(ALPHA)]), "PNG", {}, over_white(grey(GREYS), ALPHA),
    ),
    "grey with a key": (
        Image.fromarray(GREYS), "PNG", {"transparency": int(GREYS[1, 1])},
        grey(np.where(GREYS[1, 1] == GREYS, 255, GREYS)),
    ),
    "palette": (PALETTE, "PNG", {}, FEW),
    "palette of GIF": (PALETTE, "GIF", {}, FEW),
    "palette with a key": (PALETTE, "PNG", {"transparency": 3}, np.where(HIDDEN[..., None], 255, FEW)),
    "palette of GIF with a key": (PALETTE, "GIF", {"transparency": 3}, np.where(HIDDEN[..., None], 255, FEW)),
    "colour": (Image.fromarray(COLOURS), "PNG", {}, COLOURS),
    "colour of TIFF": (Image.fromarray(COLOURS), "TIFF", {"compression": "tiff_lzw"}, COLOURS),
    "colour of BMP": (Image.fromarray(COLOURS), "BMP", {}, COLOURS),
    "colour of WebP": (Image.fromarray(COLOURS), "WEBP", {"lossless": True}, COLOURS),
    "colour of PPM": (Image.fromarray(COLOURS), "PPM", {}, COLOURS),
    "colour with a key": (
        Image.fromarray(COLOURS), "PNG", {"transparency": tuple(map(int, COLOURS[1, 1]))},
        np.where((COLOURS[1, 1] == COLOURS).all(2)[..., None], 255, COLOURS),
    ),
    "colour with alpha": (
        Image.fromarray(np.dstack([COLOURS, ALPHA])), "PNG", {}, over_white(COLOURS, ALPHA),
    ),
    "colour with alpha of WebP": (
        Image.fromarray(np.dstack([COLOURS, ALPHA])), "WEBP", {"lossless": True, "exact": True},
        over_white(COLOURS, ALPHA),
    ),
    "inks": (
        Image.fromarray(np.dstack([COLOURS, GREYS]), "CMYK"), "TIFF", {},
        (255 - COLOURS.astype(np.float64)) * (255 - GREYS.astype(np.float64))[..., None] / 255,
    ),
    "profile of screens": (
        Image.fromarray(COLOURS), "PNG",
        {"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()}, COLOURS,
    ),
    "damaged profile": (Image.fromarray(COLOURS), "PNG", {"icc_profile": b"no profile"}, COLOURS),
    "16 bits": (Image.fromarray(DEEP.astype(np.uint16)), "PNG", {}, grey(scaled(DEEP))),
    "16 bits with a key": (Image.fromarray(DEEP.astype(np.uint16)), "PNG", {"transparency": KEY}, grey(KEYED)),
    "16 bits of TIFF": (Image.fromarray(DEEP.astype(np.uint16)), "TIFF", {}, grey(scaled(DEEP))),
    "16 bits, white is zero": (
        Image.fromarray(DEEP.astype(np.uint16)), "TIFF", {"tiffinfo": {262: 0}}, grey(255 - scaled(DEEP)),
    ),
    "16 bits of PGM": (Image.fromarray(DEEP.astype(np.int32)), "PPM", {}, grey(scaled(DEEP))),
    "32 bits": (Image.fromarray((DEEP - 2000).astype(np.int32)), "TIFF", {}, grey(scaled(DEEP))),
    "fractions": (Image.fromarray((DEEP / 9999).astype(np.float32)), "TIFF", {}, grey(scaled(DEEP))),
    "negative fractions": (Image.fromarray((DEEP / 99 - 17).astype(np.float32)), "TIFF", {}, grey(scaled(DEEP))),
}  # fmt: skip
ORIENTED = ("PNG", "TIFF", "WEBP")
CASES = [(kind, turn) for kind, turn in product(KINDS, TURNS) if turn == 1 or KINDS[kind][1] in ORIENTED]


def file_of(kind: str, turn: int = 1) -> bytes:
    picture, form, settings, _ = KINDS[kind]
    exif = Image.Exif()
    exif[Image.ExifTags.Base.Orientation] = turn
    turned: dict[str, Any] = {}
    if turn > 1 and form == "TIFF":
        turned = {"tiffinfo": settings.get("tiffinfo", {}) | {274: turn}}
    elif turn > 1:
        turned = {"exif": exif}
    stream = io.BytesIO()
    picture.save(stream, form, **(settings | turned))
    return stream.getvalue()


def pixels(content: bytes) -> np.ndarray:
    """What a net of colours would see, as the loader reads it."""
    found = look(content)
    levels = (found.low, found.high) if found.is_deep else None
    with Image.open(io.BytesIO(content)) as picture:
        return decode(picture, "RGB", (found.height, found.width), levels)


def test_each_kind_in_each_orientation() -> None:
    for kind, turn in CASES:
        wanted = TURNS[turn](KINDS[kind][3])
        found = pixels(file_of(kind, turn)).astype(np.float64)
        assert found.shape == wanted.shape, (kind, turn)
        assert np.abs(found - wanted).max() <= 1.01, (kind, turn)
    assert len(CASES) > 180


def test_damage_is_found_or_changes_nothing() -> None:
    """A PNG file has checksums; other formats show at least that they are cut."""
    draw, tried = random.Random(0), 0
    for kind in ("grey", "colour", "palette with a key", "16 bits"):
        whole, wanted = file_of(kind), pixels(file_of(kind))
        for _ in range(25):
            place = draw.randrange(len(whole))
            damaged = bytearray(whole)
            damaged[place] ^= 1 << draw.randrange(8)
            tried += 1
            with suppress(OSError, SyntaxError, ValueError, EOFError):  # the loader names the file
                assert np.array_equal(pixels(bytes(damaged)), wanted), (kind, place)
    for kind in ("grey", "colour of TIFF", "colour of BMP", "colour of WebP", "colour of PPM", "16 bits", "fractions"):
        whole, wanted = file_of(kind), pixels(file_of(kind))
        for share in (0.0, 0.2, 0.4, 0.6, 0.8, 0.95):
            tried += 1
            with suppress(OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, UserWarning):
                assert np.array_equal(pixels(whole[: int(len(whole) * share)]), wanted), (kind, share)
    assert tried > 140


NAMES = ["cat", "train_station", "Test drive", "$$", "é", "a.b", "-5", "1e3", "valley", "None"]


@pytest.mark.usefixtures("work")
@pytest.mark.parametrize("depth", range(4))
def test_the_top_folder_is_the_class(tmp_path: Path, depth: int, capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever it is called, at whatever depth a file lies, beside what systems leave behind."""
    wanted = {}
    for number, name in enumerate(NAMES):
        for deep in range(depth + 1):
            place = tmp_path / "own" / name / "/".join(f"day {each}" for each in range(deep))
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number}.PNG").write_bytes(file_of("colour"))
            wanted[str(place / f"{number}.PNG")] = name
        for other in (".DS_Store", "Thumbs.db", "desktop.ini", "._0.PNG", "notes.txt"):
            (tmp_path / "own" / name / other).write_text("no image")
    read = ImageTable(str(tmp_path / "own")).read()
    images = read.inputs["pixel_values"]
    found = {images.table[row]["image"]["path"]: read.class_names[int(read.target[row])] for row in range(len(images))}
    assert found == wanted
    said = f"{len(NAMES)} of {len(NAMES) + len(wanted)} files are no images and are left out, such as"
    assert f"data.source.path: {said}" in capfd.readouterr().out


@pytest.mark.usefixtures("work")
@pytest.mark.parametrize("parts", [("Train", "VAL", "test"), ("training", "Validation"), ("train", "valid", "testing")])
def test_parts_are_parts_only_where_all_top_folders_are(tmp_path: Path, parts: tuple[str, ...]) -> None:
    for part in parts:
        for name in ("a", "b"):
            (tmp_path / "own" / part / name / "deep").mkdir(parents=True)
            (tmp_path / "own" / part / name / "deep/0.png").write_bytes(file_of("colour"))
    read = ImageTable(str(tmp_path / "own")).read()
    assert (read.class_names, read.num_val, read.num_test) == (["a", "b"], 2, 2 * (len(parts) == 3))
    (tmp_path / "own/other").mkdir()
    (tmp_path / "own/other/0.png").write_bytes(file_of("colour"))
    read = ImageTable(str(tmp_path / "own")).read()
    assert (read.class_names, read.num_val, read.num_test) == (sorted([*parts, "other"]), 0, 0)


@pytest.mark.usefixtures("work")
def test_what_is_no_labelled_folder_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    (folder / "a").mkdir(parents=True)
    for place in ("0.png", "1.png"):
        (folder / place).write_bytes(file_of("colour"))
    lines = []

    def refuse(problem: str) -> None:
        with pytest.raises(InputError, match=problem) as caught:
            ImageTable(str(folder)).read()
        lines.append(str(caught.value))

    refuse("its images lie in no folders of classes; put those of each class into a folder")
    (folder / "a/0.png").write_bytes(file_of("colour"))
    refuse("2 images lie beside the folders of classes, such as .*0.png; move each")
    (folder / "0.png").rename(folder / "a/1.heic")
    (folder / "1.png").unlink()
    refuse("a/1.heic is HEIC, which Pillow cannot read; pip install pillow-heif")
    (folder / "a/1.heic").rename(folder / "a/1.png")
    (folder / "a/1.png").write_bytes(file_of("colour")[:40])
    refuse("a/1.png is no image that can be read")
    (folder / "a/1.png").write_bytes(b"\xff\xd8\xff and no more")
    refuse("a/1.png is no image that can be read")
    assert all("\n" not in line and len(line) <= 240 for line in lines)
