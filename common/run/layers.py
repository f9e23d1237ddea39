"""What the command line and the YAML files on it say, key by key, and where: the ground for error messages."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from common.errors import InputError, nearest

COMMANDS = {
    "fit": "train; with --ckpt_path last go on",
    "validate": "measure a checkpoint, by default the best, on the validation part",
    "test": "measure it on the test part",
    "predict": "write a table of predictions",
    "preflight": "print parameters, memory per rank and steps, before anything is allocated",
    "export": "write a checkpoint's net as safetensors, which transformers loads",
}
ROOT = Path(__file__).resolve().parents[2]
LAYERS = ("configs/**/*.yaml", "recipes/*/*.yaml")
GROUPS = ("best", "last", "media", "trainer", "model", "data")
SHORT = {"c": "config", "monitor": "best.monitor"}  # flags with a short name

# Names of arguments whose value must not be seen; that of `eos_token` may.
SECRET = re.compile(
    r"((api|access|private|secret)_?key|passw(or)?d|secret|authorization|(^|\.)((auth|access|hf)_)?token)$", re.I
)


MOST_ENTRIES = 100_000  # keys and items of a config: few anchors can stand for billions


class _Dumper(yaml.SafeDumper):
    """Quotes a text that jsonargparse takes for a number and YAML 1.1 does not, such as 1e3."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9._]+([eE][-+]?[0-9]+)?$"), list("-+.0123456789")
)


def to_yaml(config: Mapping[str, Any]) -> str:
    """A config as the text of a YAML file, which reads back as it was."""
    return yaml.dump(dict(config), Dumper=_Dumper, sort_keys=False)


class Entry(NamedTuple):
    """A key or list item as it was written."""

    where: str  # file and line, or the flag
    key: str  # in full
    node: yaml.Node | str  # what was given for it


def check(argv: list[str]) -> None:
    """Find what YAML and jsonargparse let pass or report badly.

    Raises:
        InputError: no command is given, a secret is, or a config is missing, holds no keys or repeats one.
    """
    if not {"-h", "--help", *COMMANDS} & set(argv):
        wrong = argv[0] if argv and not argv[0].startswith("-") else ""
        problem = f"{wrong!r} is no command" if wrong else "the command is missing"
        raise InputError(problem + (nearest(wrong, COMMANDS) or f"; give one of {', '.join(COMMANDS)}"))
    for flag, value in flags(argv):
        seen: dict[str, str] = {}
        entries = _read(flag, value)
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
        if flag == "config" and value and (not seen or "[0]" in seen):
            raise InputError(f"{value}:1: holds no keys; a config is a mapping such as 'trainer: {{max_epochs: 3}}'")


def written(defaults: Sequence[Path]) -> list[str]:
    """All keys of the configs that every command loads, as flags have them: those of a class without its init_args."""
    return [_plain(entry.key) for path in defaults for entry in _entries(path, str(path))]


def keys(argv: list[str]) -> set[str]:
    """All keys that flags and their files give."""
    return {key for flag, value in flags(argv) for key in (flag, *(entry.key for entry in _read(flag, value)))}


def classes(argv: list[str]) -> dict[str, set[str]]:
    """Names, without their packages, of the loggers and callbacks that flags and their files list, by their key."""
    named: dict[str, set[str]] = {"logger": set(), "callbacks": set()}
    for flag, value in flags(argv):
        for _, key, node in [Entry(f"--{flag}", flag, value), *_read(flag, value)]:
            text = getattr(node, "value", node)
            m = re.fullmatch(r"trainer\.(logger|callbacks)(?:\[\d+\])?(?:\.class_path)?", key)
            if m and isinstance(text, str):
                named[m[1]].add(text.rpartition(".")[2])
    return named


class Taken(NamedTuple):
    """The config that a command takes over from the run of its checkpoint."""

    source: str | Path  # its YAML, or the file
    place: str  # what a message calls it


def locate(
    argv: list[str],
    defaults: Sequence[Path],
    key: str,
    names: Sequence[str],
    values: Sequence[str],
    taken: Taken | None = None,
) -> tuple[str, str]:
    """Return where a key was written, as file and line or as a flag, and the key in full; "" and the key if nowhere.

    Of the entries at or below the key, the one that fits names and values best; of equals, the one that won in parsing.
    Without a key, one must fit.

    Args:
        argv: the command line.
        defaults: the configs that every command loads.
        key: a full key; parts that YAML adds for classes and lists may be left out.
        names: last parts of the keys that a message may speak of.
        values: values that it may speak of, a path also by its end.
        taken: what wins over the defaults; it has all keys, so it says nothing where none is known.
    """
    layers = [_entries(path, str(path)) for path in defaults]
    layers += [_entries(*taken)] if taken and key else []
    layers += [[Entry(f"--{flag}", flag, value), *_read(flag, value)] for flag, value in flags(argv)]
    wanted, best, found = _plain(key), 2 * (not key), Entry("", key, "")
    # Many keys may have the same number: without a key it says nothing.
    values = [value for value in values if key or re.search("[A-Za-z]", value)]
    for entry in (entry for layer in reversed(layers) for entry in layer):
        name, text = _plain(entry.key), getattr(entry.node, "value", entry.node)
        if not wanted or f"{name}.".startswith(f"{wanted}."):
            points = 2 + 2 * (name.split(".")[-1] in names) + 3 * any(_is(text, value) for value in values)
        else:
            points = int(isinstance(text, str) and wanted.startswith(f"{name}."))
        if points > best:
            best, found = points, entry
    return found.where, found.key if best > 1 else key


def _plain(key: str) -> str:
    """Return a key without what classes and lists add to it."""
    return re.sub(r"\.init_args\b|\[\d+\]", "", key)


def _is(text: Any, value: str) -> bool:
    """Return whether text is a value, its end, or what became a path or class path."""
    if not isinstance(text, str) or not text or not value:
        return False
    return text.endswith(value[1:]) if value[0] == "…" else text == value or value.endswith((f"/{text}", f".{text}"))


def flags(argv: list[str]) -> Iterator[tuple[str, str]]:
    """Flags without their dashes, and what follows them."""
    for arg, after in zip(argv, [*argv[1:], ""], strict=False):
        if arg.startswith("-"):
            flag, equals, value = arg.lstrip("-").partition("=")
            yield SHORT.get(flag, flag.removesuffix("+")), value if equals else after


def _read(flag: str, value: str) -> list[Entry]:
    """Return the entries of the YAML that a flag names or holds; none if its value is no YAML."""
    config, path, prefix = flag in ("config", *GROUPS), Path(value), "" if flag == "config" else flag
    if "\n" in value or value.startswith(("{", "[")):
        try:
            return _entries(value, f"--{flag}", prefix)
        except InputError:
            if config:
                raise
            return []
    if config and os.path.isfile(path):  # which takes any text
        return _entries(path, str(path), prefix)
    if flag == "config" and value:
        names = [p.name for p in (path.parent if os.path.isdir(path.parent) else Path()).iterdir()]
        there = sorted(each for kind in LAYERS for each in ROOT.glob(kind) if each.stem == path.stem)
        hint = f"; there is {', '.join(map(from_here, there))}" if there else nearest(path.name, names)
        raise InputError(f"--config {value}: {'is a folder' if os.path.isdir(path) else f'no such file{hint}'}")
    return []


def _entries(source: str | Path, place: str, prefix: str = "") -> list[Entry]:
    try:
        loader = yaml.SafeLoader(source if isinstance(source, str) else source.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        entries = list(islice(_walk(node, prefix, place), MOST_ENTRIES + 1))
        if len(entries) > MOST_ENTRIES:
            raise InputError(f"{_where(place, 0)}: more than {MOST_ENTRIES:,} keys with its anchors; write fewer")
        if node:
            loader.construct_document(node)  # finds tags and keys that composing lets pass, and changes the node
        return entries
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line if error.problem_mark else 0
        raise InputError(f"{_where(place, line)}: not valid YAML: {error.problem}") from error
    except RecursionError as error:
        raise InputError(f"{_where(place, 0)}: nested too deep, or in itself; write it flatter") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{_where(place, 0)}: not a text file in YAML") from error


def _walk(node: yaml.Node | None, prefix: str, place: str) -> Iterator[Entry]:
    """Every key and list item below a node, in the order of the file."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            # A config that stands before the command has the command as its first level.
            top = not prefix and key.value in COMMANDS
            name = "" if top else f"{prefix}.{key.value}".lstrip(".").removesuffix("+")
            if name:
                yield Entry(_where(place, key.start_mark.line), name, value)
            yield from _walk(value, name, place)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield Entry(_where(place, value.start_mark.line), f"{prefix}[{number}]", value)
            yield from _walk(value, f"{prefix}[{number}]", place)


def from_here(path: Path) -> str:
    """A path from the current directory, if it is below."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _where(place: str, line: int) -> str:
    return place if place.startswith("--") else f"{place}:{line + 1}"
