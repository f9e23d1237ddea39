"""Files of a folder, such as an export or a prepared text: their checksums, and whether weights are among them."""

import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from common.errors import InputError

CHECKSUMS = "checksums.json"


def checksums(folder: Path, names: Iterable[str]) -> dict[str, int]:
    """The CRC-32 of each of these files of a folder."""
    sums = {}
    for name in names:
        value = 0
        with (folder / name).open("rb") as file:
            while block := file.read(1 << 24):
                value = zlib.crc32(block, value)
        sums[name] = value
    return sums


def check_files(folder: Path, sums: Mapping[str, int] | None = None, fix: str = "make it anew") -> None:
    """Compare files with what was written.

    Args:
        folder: where they are.
        sums: their :func:`checksums`; None for those in the folder's ``checksums.json``, if it has one.
        fix: advice at the end of a message.

    Raises:
        InputError: a file is missing or damaged.
    """
    kept = folder / CHECKSUMS
    try:
        wanted = json.loads(kept.read_text(encoding="utf-8")) if sums is None and kept.is_file() else sums or {}
        damaged = next((name for name, value in checksums(folder, wanted).items() if value != wanted[name]), None)
    except (OSError, ValueError, AttributeError):
        damaged = "a file"
    if damaged:
        raise InputError(f"{folder}: {damaged} is missing or damaged; {fix}")


def is_shape(name: str) -> bool:
    """Whether a name is that of a folder with the ``config.json`` of a net and no weights of any kind."""
    folder = Path(name).expanduser()
    kinds = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".index.json")
    return (folder / "config.json").is_file() and not any(path.name.endswith(kinds) for path in folder.iterdir())
