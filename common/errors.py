"""Exceptions that the command line prints as one line, and helpers for their messages."""

import difflib
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

ENDING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")  # signals that end a process, where they are known
LOST_RANK_EXIT = 3


class InputError(Exception):
    """A mistake in a flag, a config, a file or the data; the command line prints it as one line and exits with 2.

    The message is a single line that names the file or key, and the fix.
    """


class Stopped(BaseException):
    """The run was ended from outside; the command line prints it as one line and exits with ``code``.

    Like KeyboardInterrupt it is no ``Exception``: a signal may find code that takes any of those for damage.
    """

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def signal_name(number: int) -> str:
    """A signal's name, and Ctrl-C for that of the keyboard."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def closest(wrong: str, known: Iterable[str]) -> str | None:
    """The known name closest to a mistyped or shortened one, whatever its case; None if none is near."""
    names = {name.casefold(): name for name in sorted(known, reverse=True)}  # AdamW rather than its module adamw
    wrong = wrong.casefold()
    matches = difflib.get_close_matches(wrong, names, n=1)
    matches += [name for name in names if wrong and name.startswith(wrong)]
    return names[matches[0]] if matches else None


def nearest(wrong: str, known: Iterable[str]) -> str:
    """``"; did you mean 'right'?"`` for the known name closest to a mistyped one, or nothing."""
    match = closest(wrong, known)
    return f"; did you mean {match!r}?" if match else ""


@contextmanager
def speaking_of(key: str, instead_of: str) -> Iterator[None]:
    """Name ``key`` in messages where shared code names ``instead_of``."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace(instead_of, key)) from error


def short_path(path: object) -> str:
    """The end of a long path, for a message of one line."""
    text = str(path)
    return text if len(text) <= 60 else f"…{text[-59:]}"
