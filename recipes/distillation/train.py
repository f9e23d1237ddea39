"""Command line: ``python recipes/distillation/train.py {fit,validate,test,predict} [--key value]``."""

import common.script  # noqa: F401  # isort: skip  # first: lets this file be run by its path

from common.cli import RecipeCLI
from common.teacher import TeacherCLI

from .data import DistillationData
from .module import DistillationModule

LINKS = {"data.num_classes": "model.num_classes"}


def main(args: list[str] | None = None) -> RecipeCLI:
    """Run the recipe with ``args``, or with the process's own arguments; the teacher is trained first if need be."""
    return TeacherCLI(DistillationModule, DistillationData, LINKS, args)


if __name__ == "__main__":
    main()
