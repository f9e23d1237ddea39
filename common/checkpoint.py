"""Checkpoint files: atomic writes, and reads that run no code."""

import os
import pickle
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.plugins.io import TorchCheckpointIO
from typing_extensions import override

from common.errors import InputError


def read_checkpoint(
    path: str | Path, map_location: Any = "cpu", mmap: bool = False, hint: str = "name another file with --ckpt_path"
) -> dict[str, Any]:
    """Read tensors and plain values from a checkpoint file, never objects.

    Args:
        path: the file.
        map_location: the device of its tensors.
        mmap: read each tensor when it is used, and skip the checksums.
        hint: advice at the end of a message.

    Raises:
        InputError: the file is missing, damaged or no checkpoint, or holds other objects.
    """
    if not Path(path).exists():
        raise InputError(f"{path}: no such checkpoint; {hint}")
    try:
        if not mmap and not is_whole(path):
            raise EOFError("not what was written")
        checkpoint = torch.load(path, map_location=map_location, mmap=mmap, weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(f"{path}: holds objects, not only weights; {hint}") from error
    except Exception as error:  # damaged bytes make the reader raise nearly anything
        if "--ckpt_path" in hint and (other := newest_whole(Path(path).parent)):
            hint = f"--ckpt_path {other.stem} is the newest whole one"
        raise InputError(f"{path}: cut short, damaged or no checkpoint; {hint}") from error
    for key in ("state_dict", "global_step"):
        if not isinstance(checkpoint, dict) or key not in checkpoint:
            raise InputError(f"{path}: no checkpoint of a run, it lacks {key!r}; {hint}")
    return checkpoint


def read_facts(path: str | None) -> dict[str, Any]:
    """The facts of the data that a checkpoint was trained on, see :class:`common.data.BaseDataModule`; none for None.

    Raises:
        InputError: the file is no checkpoint of a run.
    """
    if path is None:
        return {}
    if not Path(path).exists():
        raise InputError(f"data.facts_of: no such checkpoint {path}; name one, or null")
    facts = read_checkpoint(path, mmap=True, hint="name another").get("facts", {})
    if "made_by" not in facts and not rank_zero_only.rank:
        print(f"{path} is of an earlier version: it does not say what it was trained on", flush=True)
    return facts if "made_by" in facts else {}


def tokenizer_json(facts: Mapping[str, Any]) -> str:
    """The ``tokenizer.json`` in facts of the data; empty if there is none.

    A corpus keeps it alone. Labelled texts keep it with how it is used.
    """
    tokenizer = facts.get("tokenizer") or ""
    return tokenizer if isinstance(tokenizer, str) else tokenizer["json"]


def readable_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of the data for a JSON file: of the parts their sizes, of a tokenizer how it is used, not its own file."""
    readable = {name: value for name, value in facts.items() if name not in ("parts", "tokenizer")}
    if "parts" in facts:
        readable["parts"] = dict(zip(("train", "val", "test"), facts["parts"]["sizes"].tolist(), strict=True))
    if isinstance(tokenizer := facts.get("tokenizer"), Mapping) and tokenizer:
        readable["tokenizer"] = {name: value for name, value in tokenizer.items() if name != "json"}
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in readable.items()}


def trained_on(then: Mapping[str, Any], now: Mapping[str, Any]) -> int:
    """How many validation and test samples of this run another run has trained on.

    Args:
        then: facts of the other run's data; there is nothing to compare without its ``parts``.
        now: facts of this run's data.
    """
    if "parts" not in then or "parts" not in now:
        return 0
    trained = then["parts"]["keys"][: then["parts"]["sizes"][0]]
    keys = keys_as_known(relabelled(now["parts"], then["parts"]), now["parts"], then["parts"])
    ours, others = keys.tensor_split([int(now["parts"]["sizes"][0])])
    others = others[~torch.isin(others, ours)]  # some samples of a source's own parts are equal
    return int(torch.isin(others, trained).sum())


def surplus(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Which of our numbers are more than theirs has equals of: with 7, 7, 8 and 7 the second 7 and the 8."""
    values, number = torch.cat([ours, theirs]).unique(return_inverse=True)
    mine, others = number.tensor_split([len(ours)])
    of_each, order = torch.bincount(others, minlength=len(values)), mine.argsort(stable=True)
    nth = torch.empty_like(order)  # of our equal numbers, in their order
    nth[order] = torch.arange(len(order)) - torch.searchsorted(mine[order], mine[order])
    return nth >= of_each[mine]


def relabelled(now: Mapping[str, torch.Tensor], then: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Which samples are known with another label; none where nothing is known of labels.

    Args:
        now: numbers of samples, see :func:`common.sources.labelled.sample_numbers`.
        then: the same of known samples.
    """
    if "labelled" not in now or "labelled" not in then:
        return torch.zeros(len(now["keys"]), dtype=torch.bool)
    gone = then["inputs"][surplus(then["labelled"], now["labelled"])]  # an equal sample may be new, with its own label
    return surplus(now["labelled"], then["labelled"]) & torch.isin(now["inputs"], gone)


def keys_as_known(
    changed: torch.Tensor, now: Mapping[str, torch.Tensor], then: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """The keys of samples; those with another label than before keep the key that is known, where keys have labels.

    Args:
        changed: which samples these are, the result of :func:`relabelled`.
        now: the same as there.
        then: the same.
    """
    if not (changed.any() and now["keys"].equal(now["labelled"]) and then["keys"].equal(then["labelled"])):
        return now["keys"]
    gone = surplus(then["keys"], now["keys"])
    free: dict[int, list[int]] = {}
    for inputs, key in zip(then["inputs"][gone].tolist(), then["keys"][gone].tolist(), strict=True):
        free.setdefault(inputs, []).append(key)
    keys = now["keys"].clone()
    for place in changed.nonzero()[:, 0].tolist():
        if left := free[int(now["inputs"][place])]:
            keys[place] = left.pop(0)
    return keys


def check_made_by(facts: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse settings of the data that do not hold, as their result comes from a checkpoint.

    Args:
        facts: of the checkpoint; ``made_by`` holds its settings. Empty if there is none.
        settings: the present ones.

    Raises:
        InputError: a setting is another.
    """
    for name, before in facts.get("made_by", {}).items():
        if settings[name] != before:
            problem = f"the checkpoint's data were made with {before}, and their parts and encoding hold"
            raise InputError(f"data.{name} {settings[name]}: {problem}; give {before}, or begin a new run")


def is_whole(path: str | Path) -> bool:
    """Whether every byte of a checkpoint is what was written, by the checksums in it, at which torch does not look."""
    try:
        return zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip() is None
    except Exception:  # damaged bytes make the reader raise nearly anything
        return False


def newest_whole(folder: Path) -> Path | None:
    """The undamaged checkpoint of the most steps in a folder that a run can go on from."""
    steps = {}
    for path in folder.glob("*.ckpt"):
        with suppress(Exception):  # damaged, or another kind of file
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            if "optimizer_states" in state:
                steps[path] = state["global_step"], path.stat().st_mtime_ns
    return next(filter(is_whole, sorted(steps, key=lambda path: steps[path], reverse=True)), None)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, replaced in one step.

    Lightning stages a checkpoint in ``$TMPDIR`` and copies it without flushing. A kill or a full disk during the copy
    leaves a truncated file where a resume looks for the checkpoint.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(f".{path.name}.tmp")  # the next save overwrites it after a kill
        try:
            with staged.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(staged, path)
        except (OSError, RuntimeError) as error:  # torch raises its own for a full disk
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            before = ", earlier ones are intact" if any(path.parent.glob("*.ckpt")) else ""
            raise InputError(f"{path}: cannot be written ({cause.strerror}); make room{before}") from error
        finally:
            staged.unlink(missing_ok=True)

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(path, map_location)
