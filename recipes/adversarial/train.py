"""Command line: ``python recipes/adversarial/train.py {fit,validate,test,predict,preflight,export} [--key value]``."""

import sys
from pathlib import Path

# The clone that this file is in, or else the installed one, comes before any other package named common.
FOLDERS = [*Path(__file__).resolve().parents, *map(Path, sys.path)]
CLONE = next((str(folder) for folder in FOLDERS if (folder / "common/script.py").is_file()), sys.path[0])
sys.path[:0] = [CLONE] if sys.path[0] != CLONE else []
import common.script  # noqa: F401  # first: lets this file be run by its path
from common.run.cli import RecipeCLI

from .data import AdversarialData
from .module import AdversarialModule

LINKS = {
    "init_from": "data.init_from",
    "data.class_names": "model.class_names",
    "data.input_range": "model.input_range",
}


def main(args: list[str] | None = None) -> RecipeCLI:
    """Run the recipe with ``args``, or with the process's own arguments."""
    return RecipeCLI(AdversarialModule, AdversarialData, LINKS, args)


if __name__ == "__main__":
    main()
