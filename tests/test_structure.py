"""Who may import whom, who uses what, and whose private names are in use."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.support import MEASURED, ROOT

# From the ground up: a module imports only what stands on lower floors, or in its own package.
FLOORS = (
    ("common.errors",),
    ("common.losses", "common.figures"),
    ("common.parts",),
    ("common.data", "common.optim", "common.checkpoint", "common.checksums", "common.cache"),
    ("common.weights",),
    ("common.module",),
    ("common.sources", "common.nets"),
    ("common.strategies",),
    ("common.run",),
    ("common.script",),  # it imports the command line by name
)
# The files of a recipe that may import the run.
STARTS = ("train.py", "training.py")
# Modules of common with one user: why they are there.
ONE_USER = {
    "common.sources.documents": "the documents of a corpus, which lm, curriculum and distillation take",
    "common.sources.images": "the images of a source, which any recipe of images takes by class path",
    "common.sources.pixels": "an image as a viewer shows it, which images of files and of memory take",
    "common.sources.numerals": "the numbers in a table's text, which regression and classification take",
}
HEAVY = {"wandb", "datasets", "matplotlib", "kornia", "deepspeed", "ray", "megatron", "horovod"}


def modules(root: Path) -> dict[str, Path]:
    """All modules of common and of the recipes, by their full name."""
    files = [path for folder in ("common", "recipes") for path in sorted((root / folder).rglob("*.py"))]
    return {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def imports(name: str, path: Path, at_once: bool = False) -> Iterator[tuple[str, str, int]]:
    """Full name of each imported module, the name that is taken from it, and the line; relative ones are resolved."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "", node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((target, alias.name, node.lineno) for alias in node.names)


def floor(module: str) -> int | None:
    """The floor that a module of common stands on."""
    return next(
        (n for n, names in enumerate(FLOORS) if any(f"{module}.".startswith(f"{name}.") for name in names)), None
    )


def wrong_imports(root: Path) -> list[str]:
    """A line for each import that runs up, or across."""
    known, wrong = modules(root), []
    for name, path in known.items():
        for target, taken, line in imports(name, path):
            target = f"{target}.{taken}" if f"{target}.{taken}" in known else target
            where, top, package = f"{path.relative_to(root)}:{line}", target.split(".")[0], name.split(".")[:2]
            if top == "recipes" and name.startswith("common"):
                wrong.append(f"{where}: common imports no recipe, and this imports {target}")
            elif top == "recipes" and target != "recipes" and target.split(".")[:2] != package:
                wrong.append(f"{where}: a recipe imports no other recipe, and this imports {target}")
            elif name.startswith("recipes") and target.startswith("common.run") and path.name not in STARTS:
                wrong.append(f"{where}: {target} is for {' and '.join(STARTS)} alone")
            elif top == "common" and name.startswith("common.") and target.split(".")[:2] != package:
                mine, theirs = floor(name), floor(target)
                if mine is None or (theirs is None and target != "common"):
                    wrong.append(f"{where}: {name if mine is None else target} stands on no floor of FLOORS")
                elif theirs is not None and theirs >= mine:
                    wrong.append(f"{where}: {target} does not stand below {name}")
    return wrong


def lonely_modules(root: Path) -> list[str]:
    """A line for each module of common, outside of run and strategies, that one recipe or none uses."""
    known = modules(root)
    shared = {name: path for name, path in known.items() if name.count(".") and name.startswith("common.")}
    shared = {n: p for n, p in shared.items() if p.name != "__init__.py" and n != "common.script"}
    homes: dict[str, str] = {}  # of a name that a package hands on, the module that it comes from
    for name, path in known.items():
        if path.name == "__init__.py" and name.startswith("common."):
            homes |= {f"{name}.{taken}": target for target, taken, _ in imports(name, path)}
    users: dict[str, set[str]] = defaultdict(set)
    for name, path in known.items():
        user = ".".join(name.split(".")[:2])
        if user.startswith("recipes.") and user.split(".")[1] not in MEASURED:
            continue  # a copy uses what the original does
        for target, taken, _ in imports(name, path):
            users[homes.get(f"{target}.{taken}", target)].add(user)
    for path in (root / "recipes").glob("*/*.yaml"):
        text = str(yaml.safe_load(path.read_text())) if path.parent.name in MEASURED else ""
        for found in re.findall(r"\bcommon(?:\.\w+)+", text):
            users[homes.get(str(found), str(found).rpartition(".")[0])].add(f"recipes.{path.parent.name}")
    lines = []
    for name in shared:
        if name.startswith(("common.run.", "common.strategies.")):
            continue
        recipes = sorted(user for user in users[name] if user.startswith("recipes."))
        enough = len(recipes) > 1 or users[name] & {"common.run", "common.strategies", "common.module"}
        if enough and name in ONE_USER:
            lines.append(f"{name}: has enough users now; take it out of ONE_USER")
        elif not enough and name not in ONE_USER:
            lines.append(f"{name}: is used by {', '.join(recipes) or 'nobody'}; it belongs to that recipe")
    return lines


def test_imports_run_down() -> None:
    assert len(modules(ROOT)) > 60
    assert wrong_imports(ROOT) == []


def test_common_has_what_several_recipes_use() -> None:
    assert lonely_modules(ROOT) == []


@pytest.mark.parametrize(
    ("file", "text", "line"),
    [
        ("recipes/classification/module.py", "from ..lm import data", "a recipe imports no other recipe"),
        ("recipes/classification/data.py", "from recipes.lm.data import LMData", "a recipe imports no other recipe"),
        ("recipes/classification/data.py", "from common.run import cli", "is for train.py and training.py alone"),
        ("common/data.py", "def later():\n    from .module import BaseModule", "common.module does not stand below"),
        ("common/sources/files.py", "from common.run import cli", "common.run.cli does not stand below"),
        ("common/strategies/ddp.py", "from ..run.cli import RecipeCLI", "common.run.cli does not stand below"),
        ("common/module.py", "import recipes.lm", "common imports no recipe"),
        ("common/new.py", "from common.errors import InputError", "common.new stands on no floor"),
    ],
)
def test_a_wrong_import_is_found(file: str, text: str, line: str, tmp_path: Path) -> None:
    for folder in ("common", "recipes"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "runs"))
    with (tmp_path / file).open("a") as stream:
        stream.write(f"\n{text}\n")
    (found,) = wrong_imports(tmp_path)
    assert found.startswith(f"{file}:")
    assert line in found


def test_a_module_of_one_recipe_is_found(tmp_path: Path) -> None:
    for folder in ("common", "recipes"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "runs"))
    (tmp_path / "common/nets/graphs.py").write_text("class GraphNet: ...\n")
    with (tmp_path / "recipes/lm/module.py").open("a") as stream:
        stream.write("\nfrom common.nets.graphs import GraphNet\n")
    assert lonely_modules(tmp_path) == ["common.nets.graphs: is used by recipes.lm; it belongs to that recipe"]


def test_heavy_libraries_are_imported_where_they_are_used() -> None:
    for name, path in modules(ROOT).items():
        assert HEAVY.isdisjoint(target.split(".")[0] for target, _, _ in imports(name, path, at_once=True)), path


# Names with a leading underscore that are other libraries' own, in use here. It only gets shorter: where one is gone,
# take it out; look for a public way before a new one is added.
PRIVATE = """
  _BatchNorm _FitLoop _Launcher _NormBase _TrainingEpochLoop _actions _apply _batches_that_stepped
  _broadcast_coalesced _broadcast_sigterm_tensor _buffers _cdata _compiled_call_impl _configure_launcher
  _data_parallel_size _ddp_params_and_buffers_to_ignore _experiment _functional_collectives _functorch
  _get_train_description _init_deepspeed_distributed _init_optimizers _init_weights _is_training_done _last_lr
  _launcher _no_weight_decay _non_persistent_buffers_set _opt_called _optimizer _parse_ckpt_path
  _prepare_subcommand_parser _pytree _restarting _run_subcommand _set_pg_timeout _setup_model _should_check_val_fx
  _signal_connector _step_supports_amp_scaling _stop_progress _subclasses _timeout _trainer _typehints _utils
  _wandb_init _wrap_closure
"""


def private_names(root: Path) -> set[str]:
    """Names with a leading underscore that are not our own.

    They are imported, used as an attribute, asked for by a string, or overridden in a subclass. Our own are those that
    the same file defines, and for other objects than ``self`` those that any of our files does.
    """
    trees = {path: ast.parse(path.read_text()) for path in modules(root).values()}
    known = set(PRIVATE.split())  # also those that a subclass of ours sets on itself
    own = {path: set(_defined(tree)) - known for path, tree in trees.items()}
    anywhere = set.union(*own.values()) | {"_asdict", "_replace", "_fields", "_exit"}  # of named tuples and os, public
    found: set[str] = set()
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not node.level:
                found |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
            elif isinstance(node, ast.Import):
                found |= {part for alias in node.names for part in alias.name.split(".")}
            elif isinstance(node, ast.Attribute):
                found |= {node.attr} - (own[path] if _is_self(node.value) else anywhere)
            elif isinstance(node, ast.FunctionDef) and _overrides(node):
                found.add(node.name)
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
                found |= {str(arg.value) for arg in node.args[1:2] if isinstance(arg, ast.Constant)} - anywhere
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


def _defined(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not _overrides(node):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            yield node.attr


def _overrides(node: ast.AST) -> bool:
    decorators = node.decorator_list if isinstance(node, ast.FunctionDef) else []
    return any(isinstance(each, ast.Name) and each.id == "override" for each in decorators)


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def test_private_names_of_other_libraries_only_get_fewer() -> None:
    found, known = private_names(ROOT), set(PRIVATE.split())
    assert sorted(found - known) == [], "private names of other libraries; take a public way"
    assert sorted(known - found) == [], "gone: take them out of PRIVATE"


def test_the_wheel_brings_dependencies_alone(tmp_path: Path) -> None:
    """Packages named common and recipes must not land beside those of others."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert all(".dist-info/" in name for name in archive.namelist())
        metadata = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        assert b"Requires-Dist: lightning" in archive.read(metadata)
