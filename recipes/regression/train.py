"""Command line: ``python recipes/regression/train.py {fit,validate,test,predict} [--key value]``."""

import sys
from pathlib import Path

# The clone that this file is in, or else the installed one, comes before any other package named common.
ROOTS = [*Path(__file__).resolve().parents, *map(Path, sys.path)]
sys.path[:0] = [str(root) for root in ROOTS if (root / "common/script.py").is_file()]
import common.script  # noqa: F401  # first: lets this file be run by its path
from common.run.cli import RecipeCLI

from .data import RegressionData
from .module import RegressionModule

LINKS = {"data.columns": "model.columns"}


def main(args: list[str] | None = None) -> RecipeCLI:
    """Run the recipe with ``args``, or with the process's own arguments."""
    return RecipeCLI(RegressionModule, RegressionData, LINKS, args)


if __name__ == "__main__":
    main()
