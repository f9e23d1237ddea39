"""Error messages: what is wrong, where it was written, and the nearest right thing, in one line.

jsonargparse says what it could not parse in nested paragraphs; here its words are matched with the flags and the lines
of the YAML files that they speak of.
"""

import importlib
import importlib.util
import pkgutil
import re
from argparse import Action, ArgumentError
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse._parameter_resolvers import get_signature_parameters
from jsonargparse._typehints import get_subclass_types
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from common.errors import InputError, closest, nearest

LIMIT = 200
COMMANDS = ("fit", "validate", "test", "predict")
GROUPS = ("trainer", "model", "data")

# Names of arguments whose value must not be seen; that of `eos_token` may.
SECRET = re.compile(
    r"((api|access|private|secret)_?key|passw(or)?d|secret|authorization|(^|\.)((auth|access|hf)_)?token)$", re.I
)


class Entry(NamedTuple):
    """A key or list item as it was written."""

    where: str  # file and line, or the flag
    key: str  # in full
    node: yaml.Node | str  # what was given for it


def check_sources(argv: list[str]) -> None:
    """Find what YAML and jsonargparse let pass or report badly.

    Raises:
        InputError: no command is given, a secret is, or a config is missing, holds no keys or repeats one.
    """
    if not {"-h", "--help", *COMMANDS} & set(argv):
        wrong = argv[0] if argv and not argv[0].startswith("-") else ""
        problem = f"{wrong!r} is no command" if wrong else "the command is missing"
        raise InputError(problem + (nearest(wrong, COMMANDS) or f"; give one of {', '.join(COMMANDS)}"))
    for flag, value in _flags(argv):
        seen: dict[str, str] = {}
        entries = _yaml(flag, value)
        for where, key, node in [Entry(f"--{flag}", flag, value), *entries]:
            if SECRET.search(key) and getattr(node, "value", node) not in ("", "null", "~"):
                problem = "is a secret, and runs keep their arguments; give it in the environment"
                raise InputError(f"{where}: {key}: {problem}")
        for where, key, node in entries:
            if key in GROUPS and not isinstance(node, yaml.MappingNode):
                raise InputError(f"{where}: {key}: holds no keys; write them below it, as in config.yaml")
            if key in seen:
                raise InputError(f"{where}: {key}: repeats the key of {seen[key]}; keep one of them")
            seen[key] = where
        if flag == "config" and value and not seen:
            raise InputError(
                f"{value}:1: holds no keys; a config is a mapping such as 'trainer: {{max_epochs: 3}}'"
            )


def _flags(argv: list[str]) -> Iterator[tuple[str, str]]:
    """Flags without their dashes, and what follows them."""
    for arg, after in zip(argv, [*argv[1:], ""], strict=True):
        if arg.startswith("-"):
            flag, equals, value = arg.lstrip("-").partition("=")
            yield "config" if flag == "c" else flag.removesuffix("+"), value if equals else after


def _yaml(flag: str, value: str) -> list[Entry]:
    """The entries of the YAML that a flag names or holds; none if its value is no YAML."""
    config, path, prefix = flag in ("config", *GROUPS), Path(value), "" if flag == "config" else flag
    if "\n" in value or value.startswith(("{", "[")):
        try:
            return list(_walk(_compose(value, f"--{flag}"), prefix, f"--{flag}"))
        except InputError:
            if config:
                raise
            return []
    if config and path.is_file():
        return _read_file(path, prefix)
    if flag == "config" and value:
        names = [p.name for p in (path.parent if path.parent.is_dir() else Path()).iterdir()]
        raise InputError(
            f"--config {value}: "
            + ("is a folder" if path.is_dir() else f"no such file{nearest(path.name, names)}")
        )
    return []


def _read_file(path: Path, prefix: str = "") -> list[Entry]:
    try:
        return list(_walk(_compose(path.read_text(encoding="utf-8"), str(path)), prefix, str(path)))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}:1: not a text file in YAML") from error


def _compose(text: str, place: str) -> yaml.Node | None:
    try:
        yaml.safe_load(text)  # finds tags and keys that composing lets pass
        return yaml.compose(text, yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InputError(f"{place}:{line}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{place}:1: not a text file in YAML") from error


def _walk(node: yaml.Node | None, prefix: str, place: str) -> Iterator[Entry]:
    """Every key and list item below a node, in the order of the file."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            # A config that stands before the command has the command as its first level.
            name = (
                ""
                if not prefix and key.value in COMMANDS
                else f"{prefix}.{key.value}".lstrip(".").removesuffix("+")
            )
            if name:
                yield Entry(_where(place, key), name, value)
            yield from _walk(value, name, place)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield Entry(_where(place, value), f"{prefix}[{number}]", value)
            yield from _walk(value, f"{prefix}[{number}]", place)


def _where(place: str, node: yaml.Node) -> str:
    return place if place.startswith("--") else f"{place}:{node.start_mark.line + 1}"


def explain(error: Exception, argv: list[str], default: Path, known: Mapping[str, Action]) -> str:
    """The one line for an anticipated error.

    Args:
        error: what was raised.
        argv: the command line.
        default: the recipe's own config.
        known: what the commands accept, by full key.

    Returns:
        ``where: key: problem; hint``, at most 200 characters.
    """
    message = str(error)
    key, words, problem = (
        _read(message, known) if isinstance(error, ArgumentError) else _subject(error, message, known)
    )
    if not re.match(r"(\S+:\d+|--\S+)[: ]", problem):
        where, key = _locate(argv, default, key, words)
        problem = ": ".join(part for part in (where, key if f"--{key}" != where else "", problem) if part)
    line, hint = re.fullmatch(r"(.*?)(; did you mean [^;]*)?", " ".join(problem.split())).groups("")
    return line + hint if len(line + hint) <= LIMIT else f"{line[: LIMIT - 1 - len(hint)]}…{hint}"


def _subject(error: Exception, message: str, known: Iterable[str]) -> tuple[str, list[str], str]:
    """The same as :func:`_read` for errors of this repository, Lightning and transformers."""
    words = re.findall(r"[\w.]*\w", message)
    keys = [word for word in words if re.match(rf"({'|'.join(GROUPS)})\.|seed_everything$", word)]
    if isinstance(error, MisconfigurationException):
        keys = [*(f"trainer.{word}" for word in words if f"trainer.{word}" in known), "trainer"]
    elif not isinstance(error, InputError):
        keys, message = ["model"], message.split("Error: ")[-1]
    key = keys[0] if keys else ""
    problem = message.removeprefix(key).lstrip(" :")
    return key, [*words[:1], problem.split(": ")[0], *re.findall(r"'([^']+)'", problem)], problem


def _read(message: str, known: Mapping[str, Action]) -> tuple[str, list[str], str]:
    """Take jsonargparse's message apart.

    Returns:
        The key it speaks of, the name and the value below it that are wrong, and the problem with its hint.
    """
    outer = m[1] if (m := re.search(r'Parser key "([^"]+)"', message)) else ""
    # Of the alternatives of a union, the one that went into a class says more than those that did not.
    if block := re.search(r"\n( *)- Problem with given class_path.*?(?=\n\1- |\Z)", message, re.DOTALL):
        message = block[0]
    inner = [name for name in re.findall(r'Parser key "([^"]+)"', message) if name != outer]
    leaf = inner[-1].split(".")[-1] if inner else ""
    given = (
        m[1]
        if (m := re.search(r"(?:Given value:|Got value:|but got) (.*?)\.?(?: Got value|$|\n)", message))
        else ""
    )
    named = re.search(
        r"(?:class_path[ =]|Importing |Import path |a path but |Expected )'?([A-Za-z_]\w*(?:\.\w+)+)", message
    )
    path = named[1] if named else ""
    if m := re.search(r"Option '([\w.]+)' is not accepted before subcommand", message):
        return m[1], [], "a config of one command's keys stands after the command: fit --config FILE"
    if m := re.search(r"unrecognized arguments: (-?\w\S*)", message):
        return "", [], f"{m[1]!r} is no flag; arguments look like --trainer.max_epochs 3"
    if m := re.search(r"(?:unrecognized arguments: --|does not accept option ')([\w.]+)", message):
        return m[1], [], f"no such key{_nearest_key(m[1], known)}"
    if m := re.search(r'Linked "([\w.]+)" must be given via "([\w.]+)"', message):
        return m[1], [], f"is taken from {m[2]} and cannot be set; remove it"
    if m := re.search(r"Unable to load config '([^']+)'", message):
        return outer, [], f"no such file {m[1]!r}; give its keys one by one, such as --{outer}.KEY VALUE"
    if m := re.search(r"Option '([\w-]+)[\w.-]*' is not accepted", message):
        if m[1] == "class_path":
            return outer, [m[1]], "the arguments of a class belong in init_args, beside class_path"
        names = _parameters(path)
        if m[1] in names:
            return outer, [m[1]], "comes from the recipe itself and cannot be set; remove it"
        return (
            outer,
            [m[1]],
            f"no such argument of {path}{nearest(m[1], [*names, 'class_path', 'init_args'])}",
        )
    if m := re.search(r"module '?([\w.]+)'? has no attribute '?(\w+)", message):
        return outer, [path], f"no {m[2]!r} in {m[1]}{nearest(m[2], _contents(m[1]))}"
    if m := re.search(r"Importing '((\w+)[\w.]*)' is not allowed", message):
        if importlib.util.find_spec(m[2]) is None:
            return (
                outer,
                [m[1]],
                f"no module named {m[2]!r}{nearest(m[2], (p.name for p in pkgutil.iter_modules()))}",
            )
        return outer, [m[1]], f"{m[1]} may not be imported; allow your own package with RECIPES_ALLOW={m[2]}"
    if m := re.search(r"No module named '(?:([\w.]+)\.)?(\w+)'", message):
        return (
            outer,
            [path],
            f"no module named {m[2]!r}{nearest(m[2], _contents(m[1] or path.split('.')[0]))}",
        )
    if m := re.search(r"not correspond to a subclass of (\w+)|to be a subclass of <class '(\w+)'>", message):
        return outer, [path], f"{path} is no {m[1] or m[2]}"
    if m := None if leaf else re.search(r"Expected a dot import path string: (\S+)", message):
        return outer, [m[1]], f"no class {m[1]!r}{nearest(m[1], _classes(known.get(outer)))}"
    if m := re.search(r"arguments are required: (.+)", message):
        return outer, [path], f"{path} needs {m[1]}".strip()
    if choices := re.findall(r"typing\.Literal\[([^\]]+)\]", message):
        words = list(dict.fromkeys(re.findall(r"'([^']+)'", ", ".join(choices))))
        hint = nearest(given, words) or f"; choose from {', '.join(words)}"
        return outer, [leaf, given], f"{given!r} is not accepted{hint}"
    if re.search(r"Not a valid subclass|a subclass spec", message):
        return outer, [leaf, given], f"expected a class path, got {given[:60]!r}"
    if types := re.findall(r"Expected (?:a|an) (?:<class ')?([\w.]+)'?>?", message):
        names = [
            {"NoneType": "null", "Iterable": "list"}.get(n := t.split(".")[-1], n)
            for t in types
            if t not in ("path", "dot")
        ]
        return outer, [leaf, given], f"expected {' or '.join(dict.fromkeys(names))}, got {given[:60]!r}"
    if m := re.search(r"argument (?:-c/)?--([\w.]+): expected", message):
        return "", [], f"--{m[1]}: needs a value"
    return outer, [leaf, given], message.split("\n")[-1].strip() if outer else message.split("\n")[0]


def _nearest_key(key: str, known: Iterable[str]) -> str:
    """The right key in full: the same name in another group, else each wrong part mended, else the nearest of all."""
    known, right = list(known), ""
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
    kinds = list(
        get_subclass_types(action, also_lists=True, also_containers=True, callable_return=True) or ()
    )
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


def _locate(argv: list[str], default: Path, key: str, words: list[str]) -> tuple[str, str]:
    """Where a key was written, as file and line or as a flag, and the key in full.

    Of the entries at or below the key, the one whose name and value are among the words; of equals, the one that won in
    parsing. Without a key, an entry must have one of the words.
    """
    layers = [_read_file(default)]
    for flag, given in _flags(argv):
        layers.append([*([] if flag == "config" else [Entry(f"--{flag}", flag, given)]), *_yaml(flag, given)])
    wanted, best, found = _plain(key), 2 * (not key), Entry("", key, "")
    for entry in (entry for layer in reversed(layers) for entry in layer):
        name, text = _plain(entry.key), getattr(entry.node, "value", entry.node)
        if not wanted or f"{name}.".startswith(f"{wanted}."):
            points = 2 + 2 * (name.split(".")[-1] in words) + 2 * _fits(text, words)
        else:
            points = int(isinstance(text, str) and wanted.startswith(f"{name}."))
        if points > best:
            best, found = points, entry
    return found.where, found.key if best > 1 else key


def _fits(value: Any, words: Iterable[str]) -> bool:
    """Whether a value is one of the words, whose beginning may be cut off."""
    return isinstance(value, str) and any(
        value.endswith(w[1:]) if w[:1] == "…" else value == w for w in words if w
    )


def _plain(key: str) -> str:
    """A key without what classes and lists add to it."""
    return re.sub(r"\.init_args\b|\[\d+\]", "", key)
