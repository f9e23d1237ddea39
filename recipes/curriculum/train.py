"""Command line: ``python recipes/curriculum/train.py {fit,validate,test,predict} [--key value]``."""

import common.script  # noqa: F401  # isort: skip  # first: lets this file be run by its path

from common.cli import RecipeCLI

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
