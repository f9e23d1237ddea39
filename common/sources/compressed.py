"""Files of text that may be compressed, by their endings."""

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def _open_zstd(file: Path, mode: str) -> Any:
    import pyarrow

    return pyarrow.input_stream(str(file), compression="zstd")


COMPRESSED: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}
DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError)  # what they raise for a file that is cut short or another


def is_compressed(file: Path) -> bool:
    """Whether a file is compressed by its name."""
    return file.suffix.lower() in COMPRESSED


def ending(file: Path) -> str:
    """What a file holds by its name, in small letters: ``.csv`` of ``ROWS.CSV`` and of ``rows.csv.gz``."""
    return Path(file.stem).suffix.lower() if is_compressed(file) else file.suffix.lower()


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """The bytes of a file, without their compression."""
    with COMPRESSED.get(file.suffix.lower(), open)(file, "rb") as stream:
        yield stream
