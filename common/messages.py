"""Error messages: what is wrong, where it was written, and the nearest right thing, in one line.

jsonargparse says what it could not parse in nested paragraphs; here its words are matched with the flags and the lines
of the YAML files that they speak of.
"""

import importlib
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from common.errors import InputError, nearest

LIMIT = 200


def config_files(argv: list[str]) -> list[Path]:
    """The files given with ``--config``, in order; YAML text given in place of a file is left out."""
    values = [after for flag, after in zip(argv, argv[1:], strict=False) if flag in ("--config", "-c")]
    values += [arg.removeprefix("--config=") for arg in argv if arg.startswith("--config=")]
    return [Path(value) for value in values if "\n" not in value and not value.lstrip().startswith("{")]


def check_sources(argv: list[str], links: Mapping[str, str]) -> None:
    """Find what YAML and jsonargparse let pass.

    Args:
        argv: the command line.
        links: facts of the data that become arguments of the module; nothing else may set those.

    Raises:
        InputError: a file is missing or no YAML mapping, repeats a key, or sets a linked key.
    """
    for path in config_files(argv):
        if not path.is_file():
            folder = path.parent if path.parent.is_dir() else Path()
            raise InputError(f"--config {path}: no such file{nearest(path.name, (p.name for p in folder.iterdir()))}")
        root = _compose(path)
        if root is None:
            continue
        if not isinstance(root, yaml.MappingNode):
            raise InputError(f"{path}:1: a config is a mapping such as 'trainer: {{max_epochs: 3}}', not a list or text")
        seen: dict[str, int] = {}
        for key, node in _walk(root):
            line = node.start_mark.line + 1
            if key in seen and not key.endswith("]"):
                raise InputError(f"{path}:{line}: {key}: repeats the key of line {seen[key]}; keep one of them")
            seen[key] = line
            _check_link(f"{path}:{line}", key, links)
    for arg in argv:
        if arg.startswith("--"):
            key = arg[2:].split("=")[0]
            _check_link(f"--{key}", key, links)


def _check_link(where: str, key: str, links: Mapping[str, str]) -> None:
    for source, target in links.items():
        if key == target:
            raise InputError(f"{where}: {key}: is taken from {source} of the data and cannot be set; remove it")


def _compose(path: Path) -> yaml.Node | None:
    try:
        return yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InputError(f"{path}:{line}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}:1: not a text file in YAML") from error


def _walk(node: yaml.Node, prefix: str = "") -> Iterator[tuple[str, yaml.Node]]:
    """Every key and list item below a node, as (full key, node of the key or item), in the order of the file."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}.{key.value}".lstrip(".").removesuffix("+")
            yield name, key
            yield from _walk(value, name)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield f"{prefix}[{number}]", value
            yield from _walk(value, f"{prefix}[{number}]")


def explain(error: Exception, argv: list[str], default: Path, known: Iterable[str]) -> str:
    """The one line for an anticipated error.

    Args:
        error: what was raised.
        argv: the command line.
        default: the recipe's own config.
        known: the full keys that the command accepts.

    Returns:
        ``where: key: problem; hint``, at most 200 characters.
    """
    message = str(error)
    if isinstance(error, InputError):
        key = next(iter(re.findall(r"\b(?:trainer|model|data)\.\w[\w.]*\w", message)), "")
        where = "" if re.match(r"(\S+:\d+|--\S+)[: ]", message) else _locate(argv, default, key, "")[0]
        line = message.replace(key, where, 1) if where == f"--{key}" else f"{where}: {message}" if where else message
    else:
        key, token, problem = _read(message, list(known))
        where, key = _locate(argv, default, key, token)
        if not where and f"--{key}" in argv:
            where = f"--{key}"
        shown = key if not where.startswith("--") else "" if where == f"--{key}" else key
        line = ": ".join(part for part in (where, shown, problem) if part)
    line = " ".join(line.split())
    return line if len(line) <= LIMIT else line[: LIMIT - 1] + "…"


def _read(message: str, known: list[str]) -> tuple[str, str, str]:
    """Take jsonargparse's message apart: the key it speaks of, the word that is wrong, and the problem with its hint."""
    key = m[1] if (m := re.search(r'Parser key "([^"]+)"', message)) else ""
    inner = re.findall(r'Parser key "([^"]+)"', message)[1:]
    given = m[1] if (m := re.search(r"(?:Given value|Got value): (.*?)\.?(?: Got value|$|\n)", message)) else ""
    classes = re.findall(r"Problem with given class_path '([^']+)'", message) or re.findall(r"class_path='([^']+)'", message)
    if m := re.search(r"unrecognized arguments: ([^-]\S*)", message):
        return "", m[1], f"{m[1]!r} is no flag; arguments look like --trainer.max_epochs 3"
    if m := re.search(r"(?:unrecognized arguments: --|does not accept option ')([\w.]+)", message):
        key = m[1]
        return key, key.rsplit(".", 1)[-1], f"no such key{_nearest_key(key, known)}"
    if m := re.search(r"Option '([^']+)' is not accepted", message):
        names = _parameters(classes[-1]) if classes else []
        return key, m[1], f"no such argument{f' of {classes[-1]}' if classes else ''}{nearest(m[1], names)}"
    if m := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message):
        return key, f"{m[1]}.{m[2]}", f"no {m[2]!r} in {m[1]}{nearest(m[2], dir(importlib.import_module(m[1])))}"
    if m := re.search(r"Importing '([\w.]+)' is not allowed", message):
        return key, m[1], f"{m[1]} may not be imported; allow your own package with RECIPES_ALLOW={m[1].split('.')[0]}"
    if m := re.search(r"No module named '([\w.]+)'", message):
        return key, m[1], f"no module named {m[1]!r}{nearest(m[1], known)}"
    if m := re.search(r"arguments are required: (.+)", message):
        return key, classes[-1] if classes else "", f"{classes[-1] if classes else ''} needs {m[1]}"
    if choices := re.findall(r"typing\.Literal\[([^\]]+)\]", message):
        words = list(dict.fromkeys(re.findall(r"'([^']+)'", ", ".join(choices))))
        return key, given, f"{given!r} is none of {', '.join(words)}"[:110] + nearest(given, words)
    if types := re.findall(r"Expected (?:a|an) (?:<class ')?([\w.]+)'?>?", message):
        names = list(dict.fromkeys("null" if t == "NoneType" else t for t in types if t not in ("path", "dot")))
        problem = f"expected {' or '.join(names)}, got {given[:60]!r}"
        return ".".join([key, *inner]), given, problem
    if m := re.search(r"invalid choice: '([^']*)' \(choose from (.+)\)", message):
        return "", m[1], f"no command {m[1]!r}; give one of {m[2]}{nearest(m[1], re.findall(r'[a-z]+', m[2]))}"
    if 'expected "subcommand"' in message:
        return "", "", "say what to do: fit, validate, test or predict"
    if m := re.search(r"argument (--[\w.]+): expected", message):
        return m[1][2:], "", "needs a value"
    return key, given, message.split("\n")[-1].strip() if key else message.split("\n")[0]


def _nearest_key(key: str, known: list[str]) -> str:
    """The nearest full key: the first wrong part is compared with its siblings, then the whole key with all."""
    parts = key.split(".")
    for depth, part in enumerate(parts):
        prefix = ".".join(parts[:depth])
        siblings = {k.removeprefix(f"{prefix}.").split(".")[0] for k in known if not prefix or k.startswith(f"{prefix}.")}
        if part not in siblings:
            return nearest(part, siblings) or nearest(key, known)
    return ""


def _parameters(class_path: str) -> list[str]:
    module, name = class_path.rsplit(".", 1)
    kind: Any = getattr(importlib.import_module(module), name)
    owners = kind.__mro__ if inspect.isclass(kind) else [kind]
    return [name for owner in owners for name in _signature(owner)]


def _signature(owner: Any) -> list[str]:
    try:
        return list(inspect.signature(owner).parameters)
    except (TypeError, ValueError):
        return []


def _locate(argv: list[str], default: Path, key: str, token: str) -> tuple[str, str]:
    """Where a key was written: the flag, or the file and line; and the key in full.

    The last place wins, as it does in parsing.
    """
    for arg in reversed(argv):
        flag = arg[2:].split("=")[0]
        if key and arg.startswith("--") and (flag == key or flag.startswith(f"{key}.") or key.startswith(f"{flag}.")):
            return f"--{flag}", max(flag, key, key=len)
    for path in [*reversed(config_files(argv)), default]:
        root = _compose(path) if path.is_file() else None
        entries = list(_walk(root)) if root is not None else []
        plain = [(re.sub(r"\.init_args\b", "", full), full, node) for full, node in entries]
        wanted = re.sub(r"\.init_args\b", "", key)
        below = [(full, node) for short, full, node in plain if short == wanted or short.startswith((f"{wanted}.", f"{wanted}["))]
        if not below:
            continue
        for full, node in below:
            if token and (full.rsplit(".", 1)[-1] == token or _value(root, full) == token):
                return f"{path}:{node.start_mark.line + 1}", full
        if not token or path != default:
            return f"{path}:{below[0][1].start_mark.line + 1}", key
    return "", key


def _value(root: yaml.Node | None, full: str) -> str | None:
    """The scalar that stands at a full key."""
    node = root
    for part in re.findall(r"[^.\[\]]+", full):
        if isinstance(node, yaml.SequenceNode):
            node = node.value[int(part)]
        elif isinstance(node, yaml.MappingNode):
            node = next((value for name, value in node.value if name.value.removesuffix("+") == part), None)
    return node.value if isinstance(node, yaml.ScalarNode) else None
