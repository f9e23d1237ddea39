"""Command line: ``python recipes/curriculum/train.py {fit,validate,test,predict} [--key value]``."""

import sys
from pathlib import Path

sys.path[:0] = [str(path) for path in Path(__file__).resolve().parents if (path / "common/script.py").is_file()]
import common.script  # noqa: F401  # first: lets this file be run by its path
from common.run.cli import RecipeCLI

from .data import CurriculumData
from .module import CurriculumModule

LINKS = {
    "data.vocab_size": "model.vocab_size",
    "data.bytes_per_token": "model.bytes_per_token",
    "data.context": "model.context",
}


def main(args: list[str] | None = None) -> RecipeCLI:
    """Run the recipe with ``args``, or with the process's own arguments."""
    return RecipeCLI(CurriculumModule, CurriculumData, LINKS, args)


if __name__ == "__main__":
    main()
