"""Checkpoint files that survive a kill, and that are read without running code from them."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from typing_extensions import override

from common.errors import InputError


def read_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read tensors and plain values from a checkpoint file, never objects.

    Raises:
        InputError: the file is missing, cut short, no checkpoint, or holds more than weights and plain values.
    """
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such checkpoint") from error
    except (pickle.UnpicklingError, EOFError, RuntimeError, IsADirectoryError) as error:
        reason = "holds objects, not only weights" if "WeightsUnpickler" in str(error) else "cut short or no checkpoint"
        raise InputError(f"{path}: cannot be loaded ({reason}); name another file with --ckpt_path") from error


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, replaced in one step.

    Lightning stages a checkpoint in ``$TMPDIR`` and copies it, without flushing: a kill or a full disk in that moment
    leaves a cut file under the name that a resume would read.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with staged.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(staged, path)
        finally:
            staged.unlink(missing_ok=True)

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(path, map_location)
