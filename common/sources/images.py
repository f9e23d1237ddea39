"""Images that stay in their files, or as the bytes of a table, until a batch asks for them."""

import hashlib
import io
import os
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from PIL import Image
from torch import Tensor

from common.cache import CACHE
from common.errors import InputError, short_path
from common.sources.pixels import Levels, decode, look

CHANNELS = {"L": 1, "RGB": 3}
COLOUR, DEEP, FRACTIONS, SPECIAL = 1, 2, 4, 8  # what an image is, added up
FORMAT = 2  # of what is kept of files; raise it when the same file would be seen otherwise
PHONE_ENDINGS = (".heic", ".heif")
SYSTEM_FILES = ("Thumbs.db", "desktop.ini")  # beside hidden ones
CHUNK = 256  # images that one thread looks at
SETTLED = 2_000_000_000  # nanoseconds after which a file that changes again has another time


class Seen(NamedTuple):
    """What is known of each image before it is asked for: a hash of its bytes, and what :class:`Look` says."""

    keys: Int64[Tensor, " images"]
    sizes: Int64[Tensor, "images 2"]
    kinds: Int64[Tensor, " images"]
    levels: Float64[Tensor, "images 2"]  # least and greatest value of deep ones


class Images:
    """Images of a table, decoded where a batch asks for them: in a loader's workers.

    Memory does not grow with the pixels. Of each image only a hash of its bytes is held, and the table has its bytes,
    mapped from disk, or its file name. Each is read once when this is made, and its header checked. Of files this is
    kept in the cache folder: a later start reads those alone whose size or time has changed.

    Args:
        table: a data set of ``datasets``.
        column: its column of images, file names or bytes.
        size: height and width that images are resized to, in pixels; None for their own.
        mode: Pillow mode, ``L`` or ``RGB``; None for ``RGB`` if an image has colour, else ``L``.
        levels: of images of more than 8 bits, the values that are black and white; None for the least and the greatest
            of all.

    Attributes:
        levels: those; None if no image has more than 8 bits.
        num_special: how many images earlier versions gave other pixels.
        keys: a hash of each image's bytes; equal files have equal ones.
        shape: of all decoded images: (images, channels, height, width).
        decodes: tells a loader that reading is work for its workers.

    Raises:
        InputError: an image is missing, or is none; they have several sizes, and none is given.
    """

    decodes = True
    range = 0.0, 1.0

    def __init__(
        self,
        table: Any,
        column: str,
        size: Sequence[int] | None = None,
        mode: str | None = None,
        levels: Levels | None = None,
    ):
        import datasets
        from lightning.fabric.utilities.rank_zero import rank_zero_only

        self.column = column
        self.table = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        self.keys, sizes, kinds, values = self._look()
        colour, is_deep = int((kinds & COLOUR).bool().sum()), (kinds & DEEP).bool()
        self.num_special = int((kinds & SPECIAL).bool().sum())
        own = sizes.unique(dim=0)
        if size is None and len(own) > 1:
            few, many = ("x".join(map(str, each)) for each in (own[0].tolist(), own[-1].tolist()))
            problem = f"images have {len(own)} sizes, from {few} to {many} (height x width)"
            raise InputError(f"data.source.size: {problem}; give one, as 64 or [48, 64]")
        self.mode = mode or ("RGB" if colour else "L")
        self.size: list[int] = list(size or own[0].tolist())
        if not (size and mode) and not rank_zero_only.rank:
            because = f"{colour:,} have colour" if colour else "none has colour"
            shape = "{}x{}".format(*self.size)
            said = f"{len(self):,} images, read as {self.mode} ({because}) at {shape} pixels (height x width)"
            print(f"data.source: {said}; data.source.mode and size change it", flush=True)
        self.levels: list[float] | None = None
        if deep := int(is_deep.sum()):
            fractions = int((kinds & FRACTIONS).bool().sum())
            if 0 < fractions < deep and not levels:
                problem = (
                    f"{fractions:,} images hold fractions, and {deep - fractions:,} whole numbers of more than 8 bits"
                )
                raise InputError(f"data.source: {problem}; save them alike, or give data.source.levels")
            self.levels = list(levels or (values[is_deep, 0].min().item(), values[is_deep, 1].max().item()))
            if not (levels or rank_zero_only.rank):
                black, white = self.levels
                told = (
                    f"have more than 8 bits; {black:g} is black and {white:g} is white; data.source.levels changes it"
                )
                print(f"data.source: {deep:,} of {len(self):,} images {told}", flush=True)

    @property
    def shape(self) -> torch.Size:  # noqa: D102
        return torch.Size([len(self), CHANNELS[self.mode], *self.size])

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, positions: Int64[Tensor, " *places"]) -> Float32[Tensor, "*places channels height width"]:
        rows, numbers = self.table[positions.flatten().tolist()][self.column], positions.flatten().tolist()
        images = to_tensor([self._decode(row, number) for row, number in zip(rows, numbers, strict=True)])
        return images.reshape(*positions.shape, *images.shape[1:])

    def _decode(self, row: Any, number: int) -> np.ndarray:
        try:
            with Image.open(io.BytesIO(_content(row))) as picture:
                return decode(picture, self.mode, self.size, self.levels)
        except Exception as error:  # damaged bytes make a reader raise nearly anything
            raise self._mistake(row, number, error) from error

    def _look(self) -> Seen:
        """Look at each image; those of 8 bits are not decoded."""
        starts, began = range(0, len(self), CHUNK), time.time_ns()
        # Lists of files in one folder share what is kept, so that one more image changes no name.
        ends = [os.path.abspath((self.table[place][self.column] or {}).get("path") or "") for place in (0, -1)]
        kept = Path(CACHE, f"images/{FORMAT}-{_hash(os.path.commonpath(ends).encode()).hex()}.npz")
        known = _known(kept)
        with ThreadPoolExecutor(16) as pool:  # a disk or network answers several at once
            seen = np.concatenate([*pool.map(partial(self._look_at, known=known), starts)])
        local = seen[(seen[:, 0] != 0) & (seen[:, 2:4].max(1) < began - SETTLED)]
        others = known[(known[:, 0] != 0) & ~np.isin(known[:, 0], seen[:, 0])]  # of another list of files in there
        now = np.concatenate([local, others])
        now = now[np.argsort(now[:, 0], kind="stable")]
        if len(local) and not np.array_equal(now, known):
            _keep(kept, now)
        keys, sizes, kinds, values = (
            torch.from_numpy(seen[:, part].copy()) for part in (4, slice(5, 7), 7, slice(8, 10))
        )
        return Seen(keys, sizes, kinds, values.view(torch.float64))

    def _look_at(self, start: int, known: np.ndarray) -> np.ndarray:
        """Stamp, hash, height, width, kind and values of each image of a chunk. Known files are not read."""
        rows = self.table[start : start + CHUNK][self.column]
        stamps = np.array([_stamp(row) for row in rows])
        places = np.searchsorted(known[:, 0], stamps[:, 0]).clip(max=len(known) - 1)
        are_known = (known[places, :4] == stamps).all(1) & (stamps[:, 0] != 0)
        seen = np.concatenate([stamps, known[places, 4:]], 1)
        for number in np.flatnonzero(~are_known).tolist():
            seen[number, 4:] = self._look_into(rows[number], start + number)
        return seen

    def _look_into(self, row: Any, number: int) -> tuple[int, ...]:
        """Hash, height, width, kind, and the bits of the least and the greatest value."""
        try:
            content = _content(row)
            found = look(content)
        except Exception as error:
            raise self._mistake(row, number, error) from error
        kinds = {COLOUR: found.has_colour, DEEP: found.is_deep, FRACTIONS: found.is_fractions}
        kind = sum(number * yes for number, yes in kinds.items()) + SPECIAL * found.is_special
        values = np.array([found.low, found.high]).view(np.int64).tolist()
        return int.from_bytes(_hash(content), sys.byteorder, signed=True), found.height, found.width, kind, *values

    def _mistake(self, row: Any, number: int, error: Exception) -> InputError:
        if row is None or (row["bytes"] is None and row["path"] is None):
            return InputError(f"data.source.image {self.column!r}: a row has no image; drop it")
        reason = f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}".partition(" <_io")[0]
        problem = f"{name_of(row, number)} is no image that can be read ({reason.splitlines()[0][:60]})"
        return InputError(f"data.source.image {self.column!r}: {problem}; mend or remove it")


def _hash(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=8).digest()


def _stamp(row: Any) -> tuple[int, int, int, int]:
    """A hash of a file's path, its size and the times of its last changes; zeros for what is no file here."""
    if row is not None and row["bytes"] is None and row["path"] is not None:
        with suppress(OSError, ValueError):  # reading it says what is wrong
            stat = os.stat(row["path"])
            path = int.from_bytes(_hash(os.path.abspath(row["path"]).encode()), sys.byteorder, signed=True)
            return path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
    return 0, 0, 0, 0


def _known(kept: Path) -> np.ndarray:
    """What an earlier start has kept, in the order of the first column; a row of zeros where there is nothing."""
    nothing = np.zeros((1, 10), np.int64)
    try:
        with kept.expanduser().open("rb") as content, np.load(content, allow_pickle=False) as file:
            known = file["seen"]
    except Exception:  # damaged bytes make a reader raise nearly anything
        return nothing
    return known if known.dtype == np.int64 and known.ndim == 2 and known.shape[1] == 10 and len(known) else nothing


def _keep(kept: Path, seen: np.ndarray) -> None:
    """Write what a later start need not read again, in the order of the first column.

    A folder that cannot be written costs nothing but that.
    """
    with suppress(OSError, RuntimeError):  # the latter where there is no home
        kept = kept.expanduser()
        part = kept.with_name(f"{kept.stem}.{uuid.uuid4().hex}.part")  # machines that share a folder may share a pid
        kept.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as file:
                np.savez(file, seen=seen)
            os.replace(part, kept)
        finally:
            part.unlink(missing_ok=True)


def to_tensor(pixels: Sequence[np.ndarray]) -> Float32[Tensor, "pictures channels height width"]:
    """The bytes of pictures of one size, scaled to [0, 1]."""
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous().float().div_(255)


def _content(row: Any) -> bytes:
    """The bytes of an image of a table."""
    if row["bytes"] is not None:
        return row["bytes"]
    if "://" not in row["path"]:
        return Path(row["path"]).read_bytes()
    with fsspec.open(row["path"]) as file:
        return file.read()  # type: ignore[union-attr]


def name_of(row: Any, number: int) -> str:
    """The file of an image of a table, or else its number."""
    return short_path(row["path"]) if row["path"] else f"sample {number}"


def list_images(folder: Path, parts: Mapping[str, Sequence[str]]) -> dict[str, Any] | None:
    """Data sets of the images in a folder. The folder at the top is the class, at whatever depth an image lies.

    Args:
        folder: the folder.
        parts: patterns of the files of each split: ``**``, or the name of a sub-folder and ``/**``.

    Returns:
        Data sets by split; None where the folder has columns of its own, or archives, which ``datasets`` reads.

    Raises:
        InputError: images lie beside folders of classes, or need a package.
        OSError: a folder cannot be read.
    """
    import datasets
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    found: dict[str, dict[str, str]] = {}  # by part and file, its class
    left_out = []
    for part, patterns in parts.items():
        for pattern in patterns:
            top = folder / pattern.removesuffix("**")
            for file in sorted(_files(top)):
                ending = os.path.splitext(file)[1].lower()
                if ending == ".zip" or os.path.basename(file) in ImageFolder.METADATA_FILENAMES:
                    return None
                if ending in ImageFolder.EXTENSIONS or (ending in PHONE_ENDINGS and _read_phone_photos(file)):
                    inside = os.path.relpath(file, top).split(os.sep)
                    found.setdefault(part, {})[file] = inside[0] if len(inside) > 1 else ""
                else:
                    left_out.append(file)
    images = {file: name for files in found.values() for file, name in files.items()}
    if not images:
        return None  # its message says so
    if left_out and not rank_zero_only.rank:
        some = f"{len(left_out):,} of {len(left_out) + len(images):,} files are no images and are left out"
        print(f"data.source.path: {some}, such as {short_path(left_out[0])}", flush=True)
    names = sorted({*images.values()})
    beside = [file for file, name in images.items() if not name]
    if beside and len(names) > 1:
        problem = f"{len(beside)} images lie beside the folders of classes, such as {short_path(beside[0])}"
        raise InputError(f"data.source.path {short_path(folder)}: {problem}; move each into the folder of its class")
    numbers = {name: number for number, name in enumerate(names)}
    label = {"label": datasets.ClassLabel(names=names)} if not beside else {}
    features = datasets.Features({"image": datasets.Image(), **label})
    splits = {}
    for part, files in found.items():
        target = {"label": [numbers[name] for name in files.values()]}
        splits[part] = datasets.Dataset.from_dict({"image": [*files], **(target if label else {})}, features=features)
    return splits


def _read_phone_photos(file: str) -> bool:
    """Make Pillow read HEIC.

    Raises:
        InputError: the package for it is missing.
    """
    try:
        import pillow_heif  # type: ignore[import-not-found]
    except ImportError as error:
        fix = "pip install pillow-heif, or save it as JPEG"
        raise InputError(f"data.source.path: {short_path(file)} is HEIC, which Pillow cannot read; {fix}") from error
    pillow_heif.register_heif_opener()
    return True


def _files(folder: Path) -> Iterator[str]:
    """All files in a folder and below, without hidden ones."""

    def refuse(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        yield from (os.path.join(place, name) for name in files if name[0] != "." and name not in SYSTEM_FILES)
