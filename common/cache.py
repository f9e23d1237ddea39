"""The folder of what is kept for later runs: prepared texts, teachers, scores, and what is known of images."""

import os
from pathlib import Path

from common.errors import InputError

CACHE = os.path.join(os.environ.get("XDG_CACHE_HOME", os.path.join("~", ".cache")), "lightning-recipes")


def make_cache(folder: Path) -> None:
    """Make a folder in it.

    Raises:
        InputError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"cannot make {folder} ({error.strerror}), which keeps what later runs need"
        raise InputError(f"XDG_CACHE_HOME: {problem}; set it to another folder") from error
