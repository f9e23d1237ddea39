"""Results of earlier commands: kept where other data are measured, and left where nothing is."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.run.folder import move_aside, numbered
from common.run.report import read_summary


@contextmanager
def keeping_results(command: str, folder: Path, source: str, checkpoint: str | None) -> Iterator[None]:
    """Keep the result in a command's folder if it is on other data than now; bring it back if the command fails.

    A result on the present data of the same checkpoint, which was kept before, is in the folder again, to be replaced.

    Args:
        command: ``validate`` or ``test``.
        folder: that of the command.
        source: what the present data are called, see :func:`common.run.record.source_of`.
        checkpoint: that of the command.
    """
    metrics = folder / "metrics.csv"
    if not metrics.exists():
        yield
        return
    earlier, moved = read_summary(folder).get("source", "data that it does not name"), None
    if earlier != source:
        kept = {path: read_summary(path) for path in numbered(folder)}
        about = {(each.get("source"), each.get("checkpoint")): path for path, each in kept.items()}
        same = about.get((source, checkpoint))
        moved = move_aside(folder) if same is None else _exchange(folder, same)
        print(f"{command}: the earlier result, on {earlier}, is in {moved} now", flush=True)
    content = metrics.read_bytes() if metrics.exists() else b""  # which loggers remove when they begin
    try:
        yield
    except BaseException:
        if content and not metrics.exists():
            metrics.write_bytes(content)
        if moved is not None:
            if (folder / "summary.json").exists():
                _exchange(folder, moved)
            else:
                shutil.rmtree(folder, ignore_errors=True)
                moved.rename(folder)
            print(f"{command}: the earlier result is in {folder} again", flush=True)
        raise


def _exchange(folder: Path, other: Path) -> Path:
    """Let two folders change their names; returns where the first is now."""
    between = folder.with_name(f".{folder.name}.moving")
    shutil.rmtree(between, ignore_errors=True)  # of a killed process; it was to be written anew
    other.rename(between)
    folder.rename(other)
    between.rename(folder)
    return other
