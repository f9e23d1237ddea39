"""Checkpoints: a write that is killed leaves the last one readable, and reading one runs no code from it."""

import io
import multiprocessing
import os
import random
import resource
import signal
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from common.checkpoint import AtomicCheckpointIO, read_checkpoint
from common.errors import InputError
from recipes.classification.module import ClassificationModule
from tests.support import main_of

STEP = "global_step"


def checkpoint(step: int, size: int = 10) -> dict[str, Any]:
    """A checkpoint whose one weight has ``size`` numbers."""
    return {
        "state_dict": {"weight": torch.full((size,), float(step))},
        STEP: step,
        "loops": {"fit": [1, None]},
    }


def save(path: Path, content: dict[str, Any]) -> None:
    AtomicCheckpointIO().save_checkpoint(content, path)


def save_without_room(path: Path, content: dict[str, Any]) -> None:
    """Save where no file may grow beyond 100 kB, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the traceback that multiprocessing prints
    save(path, content)


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def test_checkpoint_is_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "new/folder/last.ckpt"
    save(path, checkpoint(3))
    save(path, checkpoint(4))
    read = AtomicCheckpointIO().load_checkpoint(path)
    assert torch.equal(read.pop("state_dict")["weight"], torch.full((10,), 4.0))
    assert read == {STEP: 4, "loops": {"fit": [1, None]}}
    assert os.listdir(path.parent) == ["last.ckpt"]


def test_a_kill_while_writing_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    path, numbers = tmp_path / "last.ckpt", 20_000_000
    save(path, checkpoint(1))
    writer = multiprocessing.get_context("fork").Process(target=save, args=(path, checkpoint(2, numbers)))
    writer.start()
    while not (begun := [p for p in tmp_path.iterdir() if p != path and p.stat().st_size > 1_000_000]):
        assert writer.is_alive()
        time.sleep(0.001)
    os.kill(writer.pid or 0, signal.SIGKILL)
    writer.join()
    assert writer.exitcode == -signal.SIGKILL
    assert begun[0].stat().st_size < 4 * numbers  # it died in the middle
    assert read_checkpoint(path)[STEP] == 1
    save(path, checkpoint(3))
    assert read_checkpoint(path)[STEP] == 3
    assert os.listdir(tmp_path) == ["last.ckpt"]  # what the kill left is gone


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    save(path, checkpoint(1))
    context = multiprocessing.get_context("fork")
    writer = context.Process(target=save_without_room, args=(path, checkpoint(2, 1_000_000)))
    writer.start()
    writer.join()
    assert writer.exitcode == 1
    assert read_checkpoint(path)[STEP] == 1
    assert os.listdir(tmp_path) == ["last.ckpt"]


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("archive", [True, False])
def test_code_in_a_checkpoint_is_refused_and_not_run(archive: bool, tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "evil.ckpt"
    content = checkpoint(1) | {"callbacks": Payload(mark)}
    torch.save(content, path, _use_new_zipfile_serialization=archive)
    torch.load(path, weights_only=False)
    assert mark.exists()  # the payload works where objects are allowed
    mark.unlink()
    problem = "holds objects, not only weights" if archive else "cut short, damaged or no checkpoint"
    assert refusal(path) == f"{problem}; name another file with --ckpt_path"
    with pytest.raises(InputError, match=problem):
        ClassificationModule.load_from_checkpoint(path)
    assert not mark.exists()


@pytest.mark.parametrize("command", ["fit", "test"])
def test_the_command_line_runs_no_code_from_a_checkpoint(
    command: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(checkpoint(1) | {"hyper_parameters": Payload(work / "mark")}, "evil.ckpt")
    with pytest.raises(SystemExit) as stop:
        main_of("classification")([command, "--ckpt_path", "evil.ckpt"])
    assert stop.value.code == 2
    line = f"--ckpt_path: {work}/evil.ckpt: holds objects, not only weights; name another file with --ckpt_path"
    assert capsys.readouterr().err.splitlines() == [line]
    assert not (work / "mark").exists()


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path, chance = tmp_path / "last.ckpt", random.Random(1)
    buffer = io.BytesIO()
    torch.save(checkpoint(1, 1000), buffer)
    whole = buffer.getvalue()
    damaged = [b"", b"To be, or not to be", b"PK\x03\x04", whole[: len(whole) // 2], whole[:-1], bytes(4000)]
    damaged += [chance.randbytes(chance.randrange(1, 500)) for _ in range(50)]
    for content in damaged:
        path.write_bytes(content)
        assert refusal(path).startswith("cut short, damaged or no checkpoint")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.txt", "an archive of something else")
    assert refusal(path).startswith("cut short, damaged or no checkpoint")
    refused, places = 0, chance.sample(range(len(whole)), 300)
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        try:
            torch.testing.assert_close(read_checkpoint(path), checkpoint(1, 1000), rtol=0, atol=0)  # it was padding
        except InputError:
            refused += 1
    assert refused > 0.8 * len(places)


def test_other_files_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nothing.ckpt").startswith("no such checkpoint")
    assert refusal(tmp_path).startswith("cut short, damaged or no checkpoint")
    for number, content in enumerate([{"weight": torch.zeros(2)}, [1, 2], torch.zeros(2)]):
        torch.save(content, tmp_path / f"{number}.pt")
        assert refusal(tmp_path / f"{number}.pt").startswith("no checkpoint of a run, it lacks 'state_dict'")
