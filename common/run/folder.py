"""A run's folder: where it is, which of its checkpoints is meant, and what a new fit does to an earlier run."""

import csv
import errno
import glob
import os
import shutil
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from common.checkpoint import is_whole, newest_whole
from common.errors import InputError, closest, nearest

LONGEST_NAME = 200  # bytes; file systems take 255, and a run's name gets prefixes and numbers


class RunFolder:
    """``runs/<recipe>/<name>/`` under the current directory or ``trainer.default_root_dir``.

    Args:
        recipe: name of the recipe's folder.
        name: name of the run.
        root: what holds ``runs``; None for the current directory.

    Raises:
        InputError: the name is no plain folder name.
    """

    def __init__(self, recipe: str, name: str, root: str | None):
        if Path(name).name != name or name in ("", ".", "..") or name.startswith(".") or not name.isprintable():
            raise InputError(f"--name {name!r} must be a plain folder name, without a dot in front")
        if len(name.encode()) > LONGEST_NAME:
            raise InputError(f"--name {name[:20]!r}… has {len(name.encode())} bytes; take at most {LONGEST_NAME}")
        self.path = Path(root or ".").resolve() / "runs" / recipe / name
        self.starting = self.path
        self.goes_on = False  # whether fit goes on from a checkpoint of this run
        self.first_step = 0  # that of the checkpoint to go on from
        self._lock: IO[str] | None = None
        self._settled = False

    def holds(self, checkpoint: str | Path | None) -> bool:
        """Whether a checkpoint is of this run, whatever links lead there."""
        parents = Path(checkpoint).absolute().parents if checkpoint is not None and self.path.exists() else []
        return any(parent.exists() and parent.samefile(self.path) for parent in parents)

    def _named_like(self, pattern: str) -> list[str]:
        """Names of the recipe's runs that have such a checkpoint."""
        found = {path.parent.parent.name for path in self.path.parent.glob(f"*/checkpoints/{pattern}")}
        return sorted(name for name in found if name[0] != ".")

    def check_trained(self) -> None:
        """Refuse a run without a checkpoint.

        Raises:
            InputError: it has none.
        """
        if any(self.path.glob("checkpoints/*.ckpt")):
            return
        trained = self._named_like("*.ckpt")
        there = f"; there are {', '.join(trained)}" if trained else "; run fit first"
        problem = "no run of this name has a checkpoint (--ckpt_path null takes the net as it is made)"
        raise InputError(f"--name {self.path.name}: {problem}{nearest(self.path.name, trained) or there}")

    def newest(self) -> Path | None:
        """The checkpoint to go on from: ``last``, or if that is damaged the newest whole one; None for a first start.

        Raises:
            InputError: all checkpoints are damaged.
        """
        folder = self.path / "checkpoints"
        last = folder / "last.ckpt"
        if last.exists() and is_whole(last):
            return last
        found = newest_whole(folder)
        if found is None and any(folder.glob("*.ckpt")):
            raise InputError(f"--ckpt_path auto: every checkpoint in {folder} is damaged; give --name another name")
        return found

    def find(self, name: str) -> Path:
        """The checkpoint of the run that a name means, with or without its ending, or that at a path.

        Raises:
            InputError: there is no such file.
        """
        folder = self.path / "checkpoints"
        if "/" not in name and os.path.exists(kept := folder / f"{name}.ckpt"):
            return kept
        if name not in ("last", "best"):
            if os.path.exists(name):
                return Path(name).absolute()
            if "/" not in name and os.path.exists(kept := folder / name):
                return kept
            names = sorted(each.stem for each in folder.glob("*.ckpt"))
            found = f" nor checkpoint of the run (found: {', '.join(names)})" if names and "/" not in name else ""
            hint = nearest(name, names) if found else ""
            fix = hint or "; give last, best, auto or the path of one"
            raise InputError(f"--ckpt_path {name}: no such file{found}{fix}")
        path = self.path / "checkpoints" / f"{name}.ckpt"
        if not path.exists():
            found = ", ".join(sorted(each.stem for each in path.parent.glob("*.ckpt"))) or "none"
            runs = self._named_like(f"{name}.ckpt")
            near = runs and (closest(self.path.name, runs) or runs[-1])
            hint = f"give --name {near}" if near else "run fit first or give --name"
            if newest := newest_whole(path.parent):
                hint = f"--ckpt_path {newest.stem} is the newest"
            raise InputError(f"--ckpt_path {name}: {path} does not exist (found: {found}); {hint}")
        return path

    def weights(self, name: str) -> Path:
        """The checkpoint or the folder of an export that ``--init_from`` names; of a run its best, or else its last.

        Raises:
            InputError: there is none.
        """
        if found := next(filter(os.path.exists, self.starts(name)), None):
            if self.holds(found):
                problem = "is of the run whose name this fit takes"
                raise InputError(f"--init_from {name}: {problem}; give another --name, or go on with --ckpt_path last")
            return found
        hint = nearest(name, self._named_like("*.ckpt"))
        problem = "no run of this recipe with a checkpoint, no checkpoint and no folder of an export"
        raise InputError(f"--init_from {name}: {problem}{hint or '; name one'}")

    def starts(self, name: str) -> list[Path]:
        """The places where weights that ``--init_from`` names are looked for, in this order."""
        path = Path(os.path.expanduser(name)).absolute()
        runs = [self.path.parent / name, path] if "/" not in name else [path]
        return [*(run / f"checkpoints/{kind}.ckpt" for run in runs for kind in ("best", "last")), path]

    def start_from(self, checkpoint: str | None) -> None:
        """Choose the folder :attr:`starting`, where a fit writes until its first step is made.

        It is on the disk of the run's folder, as it or its files are renamed.

        Args:
            checkpoint: the checkpoint to resume from; None for a new run.
        """
        self.goes_on = self.holds(checkpoint)
        beside = self.path.resolve() if self.goes_on else self.path
        inside = self.goes_on and os.path.ismount(self.path)
        self.starting = self.path / ".starting" if inside else beside.with_name(f".{beside.name}.starting")

    def begin(self) -> None:
        """Take the name, and make the folder :attr:`starting`; :meth:`settle` alone touches the run's.

        Raises:
            InputError: another fit holds the name, or the folder cannot be made or moved.
        """
        make(self.path.parent)
        self._lock = _lock(self.path.with_name(f".{self.path.name}.lock"), self.path.name)
        if self.path.exists() and not self.goes_on and os.path.ismount(self.path):
            raise InputError(f"--name {self.path.name}: {self.path} is a mount and cannot be moved; give another name")
        self._leave()  # what a killed process has left
        make(self.starting)
        self._settled = False

    def settle(self) -> None:
        """Make the folder that :meth:`begin` has made the run's: there is a first step to keep.

        An earlier run of the name is moved aside, or goes on: then rows of metrics from the first step on give way.
        What still writes to the starting folder finds the run's through a link.
        """
        starting = self.starting
        if self._lock is None or self._settled:
            return
        self._settled = True
        if self.goes_on:
            merge_metrics(self.path / "metrics.csv", starting / "metrics.csv", self.first_step)
            for source in sorted(path for path in starting.rglob("*") if not path.is_dir()):
                target = self.path / source.relative_to(starting)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(source, target)
            shutil.rmtree(starting)
        else:
            if self.path.exists() or self.path.is_symlink():
                print(f"fit: the earlier run of this name is {move_aside(self.path)} now", flush=True)
            starting.rename(self.path)
        with suppress(OSError):  # a disk without links: loggers that open files anew write there
            starting.symlink_to(self.path, target_is_directory=True)

    def end(self) -> None:
        """Let go of the name; what a fit has written without a first step goes."""
        if self._lock is not None:
            self._leave()
            Path(self._lock.name).unlink(missing_ok=True)
            self._lock.close()
            self._lock = None

    def _leave(self) -> None:
        if self.starting.is_symlink():
            self.starting.unlink()
        elif self.starting.exists():
            shutil.rmtree(self.starting, ignore_errors=True)


def numbered(path: Path) -> list[Path]:
    """The folders of a folder's name and a number, in order."""
    found = path.parent.glob(f"{glob.escape(path.name)}.*")
    moved = [each for each in found if each.name[len(path.name) + 1 :].isdigit()]
    return sorted(moved, key=lambda each: int(each.suffix[1:]))


def move_aside(path: Path) -> Path:
    """Rename a folder to its name and the next free number; returns where it is now."""
    earlier = numbered(path)
    number = int(earlier[-1].suffix[1:]) if earlier else 0
    return path.rename(path.with_name(f"{path.name}.{number + 1}"))


def _lock(path: Path, name: str, tries: int = 24) -> IO[str]:
    """Hold a file's lock, which ends with this process, on network file systems (NFS 4) too, and say in it who does.

    Raises:
        InputError: another process holds it.
    """
    try:
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"--name {name}: cannot write {path} ({error.strerror}); give another --trainer.default_root_dir"
        ) from error
    try:
        import fcntl  # not on Windows

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, no forked process inherits it
    except ImportError:
        return file
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            print(f"fit: {path.parent} knows no locks ({error.strerror}); start no second fit of one name", flush=True)
            return file
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        # A file server learns of a dead node late, and a job that starts again may meet its own end.
        if tries and not holder.split(",")[0].endswith(f" on {socket.gethostname()}"):
            print(f"fit: waiting for {holder}", flush=True)
            time.sleep(5.0)
            return _lock(path, name, tries - 1)
        raise InputError(f"--name {name}: {holder} is training it; wait for it, or give another name") from error
    if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
        file.close()  # its holder has just ended and removed it
        return _lock(path, name)
    file.truncate(0)
    job = os.environ.get("SLURM_JOB_ID")
    file.write(f"process {os.getpid()} on {socket.gethostname()}" + (f", job {job}," if job else ""))
    file.flush()
    return file


def merge_metrics(earlier: Path, new: Path, first_step: int) -> None:
    """Put the rows of an earlier ``metrics.csv`` before those of a new one.

    Rows of steps that are trained again give way, as do damaged ones, and half a line that a killed process has left.

    Args:
        earlier: the file of the run so far.
        new: that of the run that goes on; it becomes both.
        first_step: the optimizer step that it goes on from; rows count steps from 0.
    """
    before, now = (_rows(path) for path in (earlier, new))
    again = {(row["step"], *sorted(key for key, value in row.items() if value)) for row in now}
    kept = [
        row for row in before
        if int(row["step"]) < first_step and (row["step"], *sorted(k for k, v in row.items() if v)) not in again
    ]  # fmt: skip
    if (rows := [*kept, *now]) or earlier.exists():
        with new.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, sorted({key for row in rows for key in row}), restval="")
            table.writeheader()
            table.writerows(rows)


def _rows(path: Path) -> list[dict[str, str]]:
    """The whole rows of a ``metrics.csv``; a damaged file is kept aside, and that is told."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    rows: list[Any] = list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))
    whole = [row for row in rows if _is_whole(row)]
    if len(whole) < len(rows):
        aside = shutil.copy(path, path.with_name("metrics.damaged.csv"))
        print(f"fit: {path} is damaged; whole rows: {len(whole)} of {len(rows)}, and all are in {aside}", flush=True)
    return whole


def _is_whole(row: dict[str | None, Any]) -> bool:
    if None in (*row, *row.values()) or not row.get("step", "").isdecimal():
        return False
    try:
        for value in filter(None, row.values()):
            float(value)
    except ValueError:
        return False
    return True


def make(folder: Path) -> None:
    """Make a folder of a run.

    Raises:
        InputError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"cannot make the run's folder ({error.strerror}: {folder})"
        raise InputError(f"trainer.default_root_dir: {problem}") from error
