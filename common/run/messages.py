"""Mistakes in one line: place, key, problem and remedy.

jsonargparse explains a mistake in nested paragraphs. The frequent ones get few words; of others its own line is shown.
"""

import difflib
import inspect
import pkgutil
import re
import sys
from argparse import Action, ArgumentError
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import jsonargparse
from lightning.fabric.utilities.exceptions import MisconfigurationException

from common.errors import InputError, closest, nearest
from common.run.layers import GROUPS, Taken, flags, locate, written
from common.run.readers import reading

LIMIT = 240
SHORT = {  # what jsonargparse says, in few words
    r"expected one argument": "needs a value",
    r"unrecognized arguments: (?!--)(\S+)": r"command line: '\1' is no flag; arguments look like --data.batch_size 3, "
    "lists like --trainer.devices '[0, 1]'",
    r'(?:must be given via "|argument )([\w.]+)(?:"| --> )': r"is taken from \1 and cannot be set; remove it",
    r"Unable to load config '([^']+)'": r"no such file '\1', nor a mapping of keys; its keys are flags, see --help",
    r"Option 'class_path' is not accepted": "the arguments of a class belong in init_args, beside class_path",
    r"Importing '((\w+)\S*)' is not allowed": r"\1 may not be imported; allow your own package with RECIPES_ALLOW=\2",
    r"No module named '(\w+)'": r"\1 is not installed; run pip install \1",
    r"(?:Import path |Expected ')([\w.]+)'? .*a subclass of (?:<class ')?(\w+)": r"\1 is no \2",
    r"Option .* is not accepted before subcommand '(\w+)'": r"is a key of \1; give this --config after the command",
}


# A class path in a config runs that class: only these packages, the recipes, and those in RECIPES_ALLOW may be named.
LIBRARIES = (
    "torch", "lightning", "torchmetrics", "transformers", "kornia", "pytorch_optimizer", "torchjd", "common",
)  # fmt: skip
# What other programs call a key.
ELSEWHERE = {
    "learning_rate": "model.optimizer.lr",
    "epochs": "trainer.max_epochs", "num_epochs": "trainer.max_epochs", "steps": "trainer.max_steps",
    "gpus": "trainer.devices", "device": "trainer.accelerator", "grad_clip": "trainer.gradient_clip_val",
    "fp16": "trainer.precision", "bf16": "trainer.precision", "workers": "data.num_workers", "resume": "ckpt_path",
    "checkpoint": "ckpt_path", "output": "trainer.default_root_dir", "output_dir": "trainer.default_root_dir",
}  # fmt: skip


def explain(
    error: Exception,
    argv: list[str],
    defaults: Sequence[Path],
    known: Mapping[str, Action | None],
    taken: Taken | None = None,
) -> str:
    """Return ``where: key: problem; hint`` for an error.

    Args:
        error: the error.
        argv: the command line.
        defaults: the configs that every command loads.
        known: the command's actions by key.
        taken: the config of the run that the command is about.
    """
    known = {**dict.fromkeys(written(defaults)), **known}  # arguments of its classes too
    key, problem, values = _read_parser(str(error), known) if isinstance(error, ArgumentError) else _read_other(error)
    with suppress(Exception):  # looking into data explains more, and never less
        key, problem = _data(error, key, argv, defaults, known) or (key, problem)
    if not re.match(r"(\S+:\d+|--\S+)[: ]", problem):
        names = re.findall(r"\w+", problem)[: None if key else 1]
        where, key = locate(argv, defaults, key, names, values, taken)
        if where == "--best.monitor" and not any(arg.startswith(where) for arg in argv):
            where = key = "--monitor"  # as it was given
        problem = problem.removeprefix(f"{key}: ")
        problem = ": ".join(part for part in (where, key if where not in (key, f"--{key}") else "", problem) if part)
    text = " ".join(problem.split())
    remedy = re.search(r"; (?:(?!; ).)*$", text)
    kept = remedy[0] if remedy and len(remedy[0]) <= LIMIT * 3 // 4 else ""
    line, room = text.removesuffix(kept), LIMIT - len(kept)
    return (line if len(line) <= room else f"{line[: room - 1]}…") + kept


def _data(
    error: Exception, key: str, argv: list[str], defaults: Sequence[Path], known: Mapping[str, Action | None]
) -> tuple[str, str] | None:
    """The flag, and what to give instead, where data are given without their reader or by another recipe's key."""
    recipe = defaults[-1].parent
    alone = re.search(r"unrecognized arguments: (?!--)(\S+)", str(error))
    if alone and Path(alone[1]).exists() and (told := reading("", alone[1], known, recipe)):
        return "", f"command line: {told}"
    for flag, value in flags(argv):
        meant = f"data.{flag}" if flag == "path" else flag
        mistaken = flag in (key, f"{key}.path") if isinstance(error, ArgumentError) else "no text files" in str(error)
        if mistaken and value and re.fullmatch(r"data(\.(predict_)?source)?(\.path)?", meant):
            return (flag, told) if (told := reading(meant, value, known, recipe)) else None
    return None


def _read_other(error: Exception) -> tuple[str, str, list[str]]:
    """Return the key that an error names, the problem, and values that it speaks of."""
    message = str(error)
    keys = re.findall(rf"(?<![\w./])(?:{'|'.join(GROUPS)})\.[\w.]*\w|\bseed_everything\b", message)
    if not isinstance(error, InputError):
        keys = ["trainer" if isinstance(error, MisconfigurationException) else "model"]
        message = message.split("Error: ")[-1]
    key = keys[0] if keys else ""
    problem = message.removeprefix(key).lstrip(" :")
    return key, problem, [problem.split(": ")[0], *re.findall(r"'([^']+)'", problem)[:1]]


def _read_parser(text: str, known: Mapping[str, Action | None]) -> tuple[str, str, list[str]]:
    """Return the same for what jsonargparse says."""
    if m := re.match(r"the following arguments are required: \w+\.([\w.]+)", text):
        return m[1], "is null; it needs a value", []
    keys = re.findall(r"""(?:Parser key "|Linked "|--> |[Oo]ption '|arguments?:? (?:-c/)?--)(\w[\w.-]*)""", text)[:1]
    # A union reports on each of its alternatives. The first that went into a class says most.
    into = r"Problem with given class_path|Type [^\n]* expects a function or a callable class: (?:Parser key|Option)"
    if m := re.search(rf"\n( *)- (?:{into}).*?(?=\n\1- |\Z)", text, re.DOTALL):
        text = m[0]
    inner = dict.fromkeys(re.findall(r"""(?:Parser key "|Option '|arguments: --)(\w[\w-]*)""", text))
    keys += [name for name in inner if name not in keys[0].split(".")]
    given = re.findall(r"(?:Given value:|Got value:|but got) (.*?)\.?(?: Got value|$)", text, re.MULTILINE)[:1]
    text = text.partition("Given value type")[0]
    paths = re.findall(r"(?:class_path[ =]'|Import path |path string: )([\w.]+)", text)
    return ".".join(keys), _problem(text, keys, "".join(given), paths, known), given + paths


def _problem(text: str, keys: list[str], given: str, paths: list[str], known: Mapping[str, Action | None]) -> str:
    if len(keys) == 1 and re.search(r"arguments: --|does not accept option", text):
        return f"no such key{_nearest_key(keys[0], known)}"
    if (m := re.search(r"Importing '(\w+)[\w.]*' is not allowed", text)) and not find_spec(m[1]):
        return _not_there(m[1])
    if m := re.search(r"(?:class_path '(.*)':\s+)?the following arguments are required: ([\w, ]+)", text):
        needed = [f"--{keys[0]}.{name}" for name in m[2].split(", ")] if keys and keys[0] in known else []
        in_list = keys and keys[0] in ("trainer.callbacks", "trainer.logger")
        return f"{m[1]} needs {m[2]}" + (f"; give {' and '.join(needed)}" if needed and not in_list else "")
    for said, short in SHORT.items():
        if m := re.search(said, text):
            return m.expand(short)
    if m := re.search(r"(?:module '?([\w.]+)'? has no attribute '?|No module named '([\w.]+)\.)(\w+)", text):
        module = m[1] or m[2]
        return f"no {m[3]!r} in {module}{nearest(m[3], _names(module))}"
    if paths and (m := re.search(r"(?:Option '|arguments: --)(\w+)(?:.*?class_path='([\w.]+))?", text)):
        path = m[2] or paths[-1]
        names = _names(path)
        if m[1] in names:
            return "comes from the recipe itself and cannot be set; remove it"
        hint = nearest(m[1], [*names, "class_path", "init_args"]) or (f"; it has {', '.join(names)}" if names else "")
        others = re.findall(r"([\w.]+)(?:,|$)", getattr(known.get(keys[0]), "extra_help", str)())
        have = [other.rpartition(".")[2] for other in others if len(others) < 12 and m[1] in _names(other)]
        hint = f"; give --{keys[0]} too, as {' or '.join(have)}" if have and not hint.startswith("; did") else hint
        if re.match(r"transformers\.\w+Config$", path) and not hint.startswith("; did"):
            hint = f"; if its net reads it, give --{keys[0]}.dict_kwargs.{m[1]}"  # jsonargparse's place for such
        return f"no such argument of {path}{hint}"
    if len(keys) == 1 and (m := re.search(r"Expected a dot import path string: (\S+)", text)):
        classes = re.findall(r"\.(\w+)(?:,|$)", getattr(known.get(keys[0]), "extra_help", str)())
        places = ("transformers", "torch.nn", "torch.optim", "torch.optim.lr_scheduler", "kornia.augmentation")
        if found := [f"{place}.{m[1]}" for place in places if hasattr(sys.modules.get(place), m[1])]:
            return f"no class {m[1]!r}; did you mean {found[0]!r}?"
        if hint := nearest(m[1], classes):
            return f"no class {m[1]!r}{hint}"
        few = len(classes) < 12  # an argument that takes any net lists hundreds
        hint = (
            f"; it takes {', '.join(classes)}; import one of your own in module.py" if few else "; give its full path"
        )
        return f"no class {m[1]!r}{hint if classes else f'; see --{keys[0]}.help'}"
    if choices := re.findall(r"'([^']+)'", " ".join(re.findall(r"typing\.Literal\[([^\]]+)", text))):
        hint = nearest(given, choices) or f"; choose from {', '.join(dict.fromkeys(choices))}"
        return f"{given!r} is not accepted{hint}"
    types = re.findall(r"Expected an? (?!path but|dot)(?:<class '[\w.]*\b)?([\w ]+)", text)
    if re.search("Not a valid subclass|a subclass spec", text):
        types = ["a class path"]
    if set(types) - {"NoneType"}:
        kinds = " or ".join(dict.fromkeys(types)).replace("NoneType", "null").replace("Sequence", "list")
        several = "list" in kinds and re.fullmatch(r"[^\s,\[\]]+(,[^\s,\[\]]+)+", given)
        fix = f"; write [{given}]" if several else "; write a list such as [1, 2]" if "tuple" in kinds else ""
        if "list" in kinds and re.fullmatch(r"[-+.\w]+", given) and not fix:  # texts of a flag are taken as they are
            fix = "; if it is a text, put it in quotes"
        return f"expected {kinds}, got {given[:60]!r}{fix}"
    line = (text.partition("Errors:\n")[2] or text.strip().rpartition("\n")[2]).partition("\n")[0]
    return re.sub(r"^[ -]*(Parser key \S+:|argument -\S+:|Type .* callable class:)?|\. Got value: .*", "", line)


def _names(path: str) -> list[str]:
    """Return what a module holds, or the arguments of a class or function."""
    thing, parser = pkgutil.resolve_name(path), jsonargparse.ArgumentParser()
    if inspect.ismodule(thing):
        return [*dir(thing), *(info.name for info in pkgutil.iter_modules(getattr(thing, "__path__", [])))]
    add = parser.add_class_arguments if inspect.isclass(thing) else parser.add_function_arguments
    return add(thing, fail_untyped=False)


def _not_there(package: str) -> str:
    """Return what to do about a package that is not installed: a slip of the hand, the user's own, or another's."""
    slips = difflib.get_close_matches(package, [*LIBRARIES, "recipes"], 1, 0.8)
    if slips and not package.startswith(slips[0]):
        return f"no module named {package!r}; did you mean {slips[0]!r}?"
    if Path(f"{package}.py").exists() or Path(package).is_dir():
        return f"{package} is in this folder; set PYTHONPATH=. and RECIPES_ALLOW={package} to use it"
    fix = f"add its folder to PYTHONPATH, or, if you trust it, pip install {package}; then set RECIPES_ALLOW={package}"
    return f"{package} is not installed; {fix}"


def _nearest_key(key: str, known: Iterable[str]) -> str:
    """Return the nearest key as a hint; it may be one of another group."""
    key = key.replace("-", "_")
    group, *names = key.split(".")
    name, rest = (names[0], names[1:]) if names else (group, [])
    own = {each.split(".")[-1]: each for each in reversed([*known])}
    elsewhere = f"; did you mean {ELSEWHERE[name]!r}?" if name in ELSEWHERE else "; --help lists them"
    if name in own and not rest:
        return f"; did you mean {own[name]!r}?"
    if group not in GROUPS:
        near = "" if name in ELSEWHERE else nearest(key, known) or nearest(group, known)
        return near or elsewhere
    right = closest(name, own)
    return f"; did you mean {'.'.join([own[right], *rest])!r}?" if right else elsewhere
