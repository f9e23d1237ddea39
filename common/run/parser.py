"""The parser of every recipe: help that is read in a minute, and a bare value as a list of one."""

import argparse
import pkgutil
import re
import shutil
import textwrap
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, Union, get_args, get_origin

import jsonargparse
import jsonargparse._typehints as _typehints
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from common.run.layers import COMMANDS, GROUPS

TRAINER_HELP = "--trainer.help"
# What the help shows, in this order: the recipe's own arguments, and those of the run, with a text where their own is
# long or missing.
TITLES = {"data": "data: where samples come from", "model": "model: the net and how it is trained", "": "run"}
RUN = {
    "name": "the run's name, its folder in runs/<recipe>/",
    "ckpt_path": "a checkpoint of the run (last, best, auto for last or a first start, any other), or a file's path",
    "best.monitor": "the metric that chooses best.ckpt",
    "best.mode": "whether its smallest or its largest value is the best; null where the metric says so itself",
    "last.every_n_train_steps": "",
    "media.every_n_validations": "",
    "seed_everything": "seed of weights, order, dropout and augmentation",
    "config": "a layer in YAML; several are laid over each other in order",
    "print_config": "print the whole config and end",
}
MORE = {
    TRAINER_HELP: "the trainer's arguments in full",
    "--KEY.help CLASS": "the arguments of a class, such as --model.optimizer.help torch.optim.SGD",
}

_UNIONS = (Union, type(int | str))
_PARSES = ContextVar("whether a parser of a recipe reads arguments", default=False)  # others stay as they are
_adapt = _typehints.adapt_typehints


def _adapt_bare(val: Any, typehint: Any, **settings: Any) -> Any:
    """Take a bare value as a list of one, where the type has lists and nothing that the value is by itself.

    Text that begins as a list or mapping does, and null, stay what they are: no list. Any other text is taken as it is
    written, whatever else it may be in YAML.
    """
    if not _PARSES.get():
        return _adapt(val, typehint, **settings)
    union = get_origin(typehint) in _UNIONS
    kinds = get_args(typehint) if union else (typehint,)
    lists = [kind for kind in kinds if get_origin(kind) in _typehints.sequence_origin_types]
    given = settings.get("orig_val", val)
    is_bare = isinstance(given, str) or (isinstance(given, int | float) and val is given)
    is_bare = is_bare and not (settings.get("append") or settings.get("serialize"))
    if lists and is_bare and not re.match(r"\s*([\[{]|(null|~)?\s*$)", str(given)):
        with suppress(ValueError):
            if others := tuple(kind for kind in kinds if kind not in lists):
                return _adapt(given if val is None else val, Union[others], **settings)  # noqa: UP007
        with suppress(ValueError):
            return _adapt([given], lists[0], **settings)
    return _adapt(val, typehint, **settings)


_typehints.adapt_typehints = _adapt_bare


class RecipeParser(LightningArgumentParser):
    """A parser that raises instead of printing its usage, and whose help is short."""

    @override
    def parse_args(self, *args: Any, **settings: Any) -> Any:
        before = _PARSES.set(True)
        try:
            return super().parse_args(*args, **settings)
        finally:
            _PARSES.reset(before)

    @override
    def error(self, message: str, ex: Exception | None = None) -> Any:
        raise jsonargparse.ArgumentError(None, message) from ex

    @override
    def format_help(self, *args: Any) -> str:
        """Text of ``--help``: of a command first what is about its recipe, and of the trainer only the names."""
        dests, defaults = {action.dest for action in self._actions}, self.get_defaults()
        if "subcommand" in dests:
            lines = [f"usage: {self.prog} COMMAND [--config FILE] [--KEY VALUE] ...", "", "commands"]
            lines += [line for name, text in COMMANDS.items() for line in _row(name, text)]
            return "\n".join([*lines, "", f"{self.prog} fit --help tells the recipe's arguments.", ""])
        if "trainer" not in dests:  # one class
            titles = [str(group.title) for group in (self.groups or {}).values()]
            return "\n".join([*titles, *self._rows(None, defaults), ""])
        if TRAINER_HELP in (self.args or ()):
            return "\n".join(["the arguments of Lightning's trainer", *self._rows("trainer", defaults), ""])
        prog = self.prog.replace(" [options]", "")
        lines = [f"usage: {prog} [--config FILE] [--KEY VALUE] ...", "", COMMANDS.get(prog.split()[-1], ""), ""]
        for group, title in TITLES.items():
            lines += [title, *self._rows(group, defaults), ""]
        names = [action.dest.removeprefix("trainer.") for action in self._of("trainer")]
        lines += ["trainer: Lightning's, such as --trainer.max_epochs 3"]
        lines += textwrap.wrap(", ".join(names), _width(), initial_indent="  ", subsequent_indent="  ")
        lines += ["", "more", *(line for flag, text in MORE.items() for line in _row(flag, text)), ""]
        return "\n".join(lines)

    def _of(self, group: str | None) -> list[argparse.Action]:
        """The arguments of a group; those of the run and of its callbacks if it is empty, all for None."""
        found = []
        for action in self._actions:
            top = action.dest.partition(".")[0]
            shown = action.option_strings and action.option_strings[0][0] == "-" and action.help != argparse.SUPPRESS
            if shown and not action.dest.endswith("help") and action.dest not in GROUPS:
                of_run = top not in TITLES and top != "trainer"
                found += [action] if top == group or group is None or (not group and of_run) else []
        first = [*RUN, *(action.dest for action in found)]
        return sorted(found, key=lambda action: first.index(action.dest))

    def _rows(self, group: str | None, defaults: Any) -> list[str]:
        lines = []
        for action in self._of(group):
            text = " ".join((RUN.get(action.dest) or action.help or "").split())
            text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"\1", text).replace("``", "`")
            text = re.sub(r" (Default: [^.]*?(\.\d+)?`?\.(?= |$)|\(default: [^)]*\))", "", text).rstrip(".")
            value = defaults.get(action.dest)
            said = {"one of": "" if isinstance(value, float | int) else _choice(action), "default": _shown(value)}
            notes = "; ".join(f"{what} {words}" for what, words in said.items() if words)
            flag = "--monitor" if action.dest == "best.monitor" else f"--{action.dest}"
            lines += _row(flag, f"{text} ({notes})" if notes else f"{text} (required)" if action.required else text)
        return lines


def _width() -> int:
    return min(max(shutil.get_terminal_size().columns, 80), 120)


def _row(flag: str, text: str) -> list[str]:
    """A flag and its text beside it."""
    lines = textwrap.wrap(text, _width() - 30) or [""]
    head = [f"  {flag}"] if len(flag) > 27 else []
    first = " " * 30 if head else f"  {flag:<28}"
    return [*head, *((first if number == 0 else " " * 30) + line for number, line in enumerate(lines))]


def _choice(action: argparse.Action) -> str:
    """The words or classes to choose from, where they are few."""
    if isinstance(action.metavar, str) and action.metavar[0] == "{" and "true" not in action.metavar:
        return action.metavar[1:-1].replace(",", ", ")
    paths = re.findall(r"([\w.]+)(?:,|$)", getattr(action, "extra_help", str)())
    if not 1 < len(paths) < 12:
        return ""
    kinds = [pkgutil.resolve_name(path) for path in paths]
    # The base of all the others is abstract, though Python does not know it.
    return ", ".join(kind.__name__ for kind in kinds if not all(issubclass(other, kind) for other in kinds))


def _shown(value: Any) -> str:
    """A default in a few words: a class with its first arguments."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown, value))}]"
    spec = value.as_dict() if isinstance(value, jsonargparse.Namespace) else value
    if isinstance(spec, dict) and "class_path" in spec:
        given = [f"{name} {_shown(each)}" for name, each in (spec.get("init_args") or {}).items() if _shown(each)]
        return f"{spec['class_path']}{': ' if given else ''}{', '.join(given[:4])}{', …' if given[4:] else ''}"
    if value is None or isinstance(spec, dict):
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value) or "''"
