"""A run's folder: where it is, which of its checkpoints is meant, and what a new fit does to an earlier run."""

import shutil
from pathlib import Path

from common.errors import InputError, closest, nearest

RECORD = ("config.yaml", "hparams.yaml", "environment.json")


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
        if Path(name).name != name or name in ("", ".", ".."):
            raise InputError(f"--name {name!r} must be a plain folder name")
        self.path = Path(root or ".").resolve() / "runs" / recipe / name
        # What fit has done to an earlier run of this name: where it, or its metrics, lay and lies, and its record.
        self._aside: tuple[Path, Path] | None = None
        self._record: dict[Path, bytes] = {}

    def holds(self, checkpoint: str | Path | None) -> bool:
        """Whether a checkpoint is of this run."""
        return checkpoint is not None and self.path in Path(checkpoint).parents

    def _named_like(self, pattern: str) -> list[str]:
        """Names of the recipe's runs that have such a checkpoint."""
        return sorted({path.parent.parent.name for path in self.path.parent.glob(f"*/checkpoints/{pattern}")})

    def best(self) -> str | None:
        """``best`` if the run has a checkpoint, None if the recipe has no run that has one.

        Raises:
            InputError: only other runs have one.
        """
        if any(self.path.glob("checkpoints/*.ckpt")):
            return "best"
        if trained := self._named_like("*.ckpt"):
            hint = nearest(self.path.name, trained) or f"; there are {', '.join(trained)}"
            problem = "no run of this name has a checkpoint (--ckpt_path null takes the net as it is made)"
            raise InputError(f"--name {self.path.name}: {problem}{hint}")
        return None

    def find(self, name: str) -> Path:
        """The checkpoint that ``last``, ``best`` or a path names.

        Raises:
            InputError: there is no such file.
        """
        if name not in ("last", "best"):
            if not Path(name).exists():
                raise InputError(f"--ckpt_path {name}: no such file; give last, best or the path of a checkpoint")
            return Path(name).resolve()
        path = self.path / "checkpoints" / f"{name}.ckpt"
        if not path.exists():
            others = sorted(path.parent.glob("*.ckpt"), key=lambda p: p.stem not in ("last", "best"))
            found = ", ".join(p.stem for p in others) or "none"
            runs = self._named_like(f"{name}.ckpt")
            near = runs and (closest(self.path.name, runs) or runs[-1])
            hint = f"give --name {near}" if near else "run fit first or give --name"
            if others:
                hint = f"give --ckpt_path {others[0].stem if others[0].stem in ('last', 'best') else others[0]}"
            raise InputError(f"--ckpt_path {name}: {path} does not exist (found: {found}); {hint}")
        return path

    def begin(self, checkpoint: str | None, first_step: int) -> None:
        """Move an earlier run of this name aside, or keep its metrics when it goes on, as the logger starts anew.

        Args:
            checkpoint: the checkpoint to resume from; None for a new run.
            first_step: its optimizer step.
        """
        if self.holds(checkpoint):
            kept = (self.path / name for name in RECORD)
            self._record = {path: path.read_bytes() for path in kept if path.exists()}
            metrics = self.path / "metrics.csv"
            segment, number = metrics.with_name(f"metrics.until-step-{first_step}.csv"), 1
            while segment.exists():
                segment, number = metrics.with_name(f"metrics.until-step-{first_step}.{number}.csv"), number + 1
            if metrics.exists():
                self._aside = metrics, metrics.rename(segment)
        elif self.path.exists():
            earlier = self.path.parent.glob(f"{self.path.name}.*")
            numbers = [int(p.suffix[1:]) for p in earlier if p.suffix[1:].isdigit()]
            moved = self.path.with_name(f"{self.path.name}.{max(numbers, default=0) + 1}")
            self._aside = self.path, self.path.rename(moved)
        make(self.path)

    def put_back(self) -> None:
        """Undo :meth:`begin`."""
        for path, content in self._record.items():
            path.write_bytes(content)
        if self._aside is not None:
            before, now = self._aside
            shutil.rmtree(before, ignore_errors=True)  # it may not even have been made
            now.replace(before)
        self._aside, self._record = None, {}


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
