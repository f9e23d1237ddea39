"""Error messages: what is wrong, where it was written, and the nearest right thing, in one line.

jsonargparse says what it could not parse in nested paragraphs; here its words are boiled down, and matched with the
flags and the lines of the YAML files that they speak of.
"""

import importlib
import importlib.util
import pkgutil
import re
from argparse import Action, ArgumentError
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from jsonargparse._parameter_resolvers import get_signature_parameters
from jsonargparse._typehints import get_subclass_types
from lightning.fabric.utilities.exceptions import MisconfigurationException

from common.errors import InputError, closest, nearest
from common.run.layers import GROUPS, locate

LIMIT = 200


def explain(error: Exception, argv: list[str], defaults: Sequence[Path], known: Mapping[str, Action]) -> str:
    """The one line for an anticipated error.

    Args:
        error: what was raised.
        argv: the command line.
        defaults: the configs that are loaded without being named.
        known: what the commands accept, by full key.

    Returns:
        ``where: key: problem; hint``, at most 200 characters.
    """
    read = _read_parser if isinstance(error, ArgumentError) else _read_other
    key, names, values, problem = read(error, known)
    if not re.match(r"(\S+:\d+|--\S+)[: ]", problem):
        where, key = locate(argv, defaults, key, names, values)
        problem = ": ".join(part for part in (where, key if f"--{key}" != where else "", problem) if part)
    line, hint = re.fullmatch(r"(.*?)(; did you mean [^;]*)?", " ".join(problem.split())).groups("")  # type: ignore[union-attr]
    return line + hint if len(line + hint) <= LIMIT else f"{line[: LIMIT - 1 - len(hint)]}…{hint}"


def _read_other(error: Exception, known: Iterable[str]) -> tuple[str, set[str], set[str], str]:
    """The same as :func:`_read_parser` for errors of this repository, Lightning and transformers."""
    message = str(error)
    words = re.findall(r"[\w.]*\w", message)
    keys = [word for word in words if re.match(rf"({'|'.join(GROUPS)})\.|seed_everything$", word)]
    if isinstance(error, MisconfigurationException):
        keys = [*(f"trainer.{word}" for word in words if f"trainer.{word}" in known), "trainer"]
    elif not isinstance(error, InputError):
        keys, message = ["model"], message.split("Error: ")[-1]
    key = keys[0] if keys else ""
    problem = message.removeprefix(key).lstrip(" :")
    names = re.findall(r"\w+", problem)
    values = {problem.split(": ")[0], *re.findall(r"'([^']+)'", problem)[:1]}
    return key, set(names if key else names[:1]), values, problem


def _read_parser(error: Exception, known: Mapping[str, Action]) -> tuple[str, set[str], set[str], str]:
    """Take jsonargparse's message apart.

    Returns:
        The key it speaks of, names and values that may stand below it, and the problem with its hint.
    """
    message = str(error)
    if m := re.search(r"Option '([\w.]+)' is not accepted before subcommand", message):
        return m[1], set(), set(), "a config of one command's keys stands after the command: fit --config FILE"
    if m := re.search(r"unrecognized arguments: (-?\w\S*)", message):
        return "", set(), set(), f"{m[1]!r} is no flag; arguments look like --trainer.max_epochs 3"
    if m := re.search(r"(?:unrecognized arguments: --|does not accept option ')([\w.]+)", message):
        return m[1], set(), set(), f"no such key{_nearest_key(m[1], list(known))}"
    if m := re.search(r"argument (?P<source>[\w.]+) --> ([\w.]+): invalid", message):
        return m[2], set(), set(), f"is taken from {m['source']} and cannot be set; remove it"
    if m := re.search(r'Linked "([\w.]+)" must be given via "([\w.]+)"', message):
        return m[1], set(), set(), f"is taken from {m[2]} and cannot be set; remove it"
    if m := re.search(r"argument (?:-c/)?--([\w.]+): expected", message):
        return "", set(), set(), f"--{m[1]}: needs a value"
    key = m[1] if (m := re.search(r'Parser key "([^"]+)"', message)) else ""
    # Of the alternatives of a union, the one that went into a class says more than those that did not.
    if m := re.search(r"\n( *)- Problem with given class_path.*?(?=\n\1- |\Z)", message, re.DOTALL):
        message = m[0]
    below = [name for name in re.findall(r'Parser key "([^"]+)"', message) if name != key]
    leaf = below[-1].split(".")[-1] if below else ""
    m = re.search(r"(?:Given value:|Got value:|but got) (.*?)\.?(?: Got value|$|\n)", message)
    given = m[1] if m else ""
    m = re.search(
        r"(?:class_path[ =]|Importing |Import path |a path but |Expected )'?([A-Za-z_]\w*(?:\.\w+)+)", message
    )
    path = m[1] if m else ""
    name, value, problem = _problem(message, path, given, bool(leaf), known.get(key))
    return key, {leaf, name}, {value}, problem


def _problem(message: str, path: str, given: str, inside: bool, action: Action | None) -> tuple[str, str, str]:
    """What a message says of a class path or a value, inside a class or not: wrong name, wrong value, problem."""
    if m := re.search(r"Unable to load config '([^']+)'", message):
        return "", "", f"no such file {m[1]!r}, nor a mapping of keys"
    if m := re.search(r"Option '([\w-]+)[\w.-]*' is not accepted", message):
        if m[1] == "class_path":
            return m[1], "", "the arguments of a class belong in init_args, beside class_path"
        names = _parameters(path)
        if m[1] in names:
            return m[1], "", "comes from the recipe itself and cannot be set; remove it"
        hint = nearest(m[1], [*names, "class_path", "init_args"]) or (f"; it has {', '.join(names)}" if names else "")
        return m[1], "", f"no such argument of {path}{hint}"
    if m := re.search(r"module '?([\w.]+)'? has no attribute '?(\w+)", message):
        return "", path, f"no {m[2]!r} in {m[1]}{nearest(m[2], _contents(m[1]))}"
    if m := re.search(r"Importing '((\w+)[\w.]*)' is not allowed", message):
        if importlib.util.find_spec(m[2]) is None:
            return "", path, f"no module named {m[2]!r}{nearest(m[2], (info.name for info in pkgutil.iter_modules()))}"
        return "", path, f"{m[1]} may not be imported; allow your own package with RECIPES_ALLOW={m[2]}"
    if m := re.search(r"No module named '(\w+)'", message):  # of those that may be named
        extra = " -e '.[optim]'" if m[1] == "pytorch_optimizer" else f" {m[1]}"
        return "", path, f"{m[1]} is not installed; run pip install{extra}"
    if m := re.search(r"No module named '([\w.]+)\.(\w+)'", message):
        return "", path, f"no module named {m[2]!r}{nearest(m[2], _contents(m[1]))}"
    if m := re.search(r"not correspond to a subclass of (\w+)|to be a subclass of <class '(\w+)'>", message):
        return "", path, f"{path} is no {m[1] or m[2]}"
    if m := re.search(r"Multiple subclasses with name (\w+).*?: ([\w.]+)", message):
        return "", m[1], f"several classes are named {m[1]}; give the full path, such as {m[2]}"
    if m := None if inside else re.search(r"Expected a dot import path string: (\S+)", message):
        return "", m[1], f"no class {m[1]!r}{nearest(m[1], _classes(action))}"
    if m := re.search(r"arguments are required: ([\w, ]+)", message):
        return "", path, f"{path} needs {m[1]}".strip()
    if choices := re.findall(r"typing\.Literal\[([^\]]+)\]", message):
        names = list(dict.fromkeys(re.findall(r"'([^']+)'", ", ".join(choices))))
        return "", given, f"{given!r} is not accepted" + (nearest(given, names) or f"; choose from {', '.join(names)}")
    if re.search(r"Not a valid subclass|a subclass spec", message):
        return "", given, f"expected a class path, got {given[:60]!r}"
    if types := re.findall(r"Expected an? (?:<class ')?(?:\w+\.)*(\w+)\b'?>?(?! but| import)", message):
        names = " or ".join(dict.fromkeys(types)).replace("NoneType", "null").replace("Iterable", "list")
        return "", given, f"expected {names}, got {given[:60]!r}"
    return "", "", message.strip().split("\n")[-1 if action else 0].strip()


def _nearest_key(key: str, known: list[str]) -> str:
    """The right key in full: the same name in another group, else each wrong part mended, else the nearest of all."""
    right = ""
    for part in key.split("."):
        start = f"{right}." if right else ""
        siblings = {name.removeprefix(start).split(".")[0] for name in known if name.startswith(start)}
        if siblings and part not in siblings:
            elsewhere = [name for name in known if name.endswith(f".{part}")]
            sibling = closest(part, siblings)
            right = elsewhere[0] if elsewhere else start + sibling if sibling else closest(key, known) or ""
            if not sibling or elsewhere:
                break
        else:
            right = start + part
    return f"; did you mean {right!r}?" if right else ""


def _classes(action: Action | None) -> list[str]:
    """Names of the loaded classes that an argument accepts."""
    kinds = list(get_subclass_types(action, also_lists=True, also_containers=True, callable_return=True) or ())
    for kind in kinds:  # grows while it is read
        kinds += kind.__subclasses__()
    return [kind.__name__ for kind in kinds]


def _contents(name: str) -> list[str]:
    """What is in a module: its names and, if it is a package, its modules."""
    module = importlib.import_module(name)
    return [*dir(module), *(info.name for info in pkgutil.iter_modules(getattr(module, "__path__", [])))]


def _parameters(class_path: str) -> list[str]:
    """The arguments of a class, with those that it passes on."""
    module, _, name = class_path.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    return [parameter.name for parameter in get_signature_parameters(kind, logger=False)]
