"""Work that is done counts: what prints, draws, logs or reports cannot end a run."""

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from io import TextIOWrapper
from typing import Any

from common.errors import InputError

_told: set[str] = set()  # what has failed in this process


def tell(what: str, error: Exception) -> None:
    """Print a failure that costs no work, once for each kind of work: its traceback if code is at fault."""
    if what not in _told:
        _told.add(what)
        known = isinstance(error, InputError | OSError)
        text = str(error) if known else "\n" + "".join(traceback.format_exception(error)).rstrip()
        print(f"{what} failed, which ends no run: {text}", file=sys.stderr, flush=True)


@contextmanager
def spared(what: str) -> Iterator[None]:
    """Let a failure of this work end nothing but itself."""
    ends_run = sys.exception()
    try:
        yield
    except Exception as error:
        if error.__context__ is ends_run:
            error.__context__ = None  # another matter
        tell(what, error)


def spare(item: Any, methods: tuple[str, ...], what: str) -> None:
    """Let a failure in an object's methods end nothing."""

    def wrapped(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            with spared(what):
                return method(*args, **kwargs)

        return call

    for name in methods:
        if hasattr(item, name):
            setattr(item, name, wrapped(getattr(item, name)))


class Output:
    """A stream that takes every text: what it cannot write, as when nobody reads any more, is dropped.

    Args:
        stream: the stream.
    """

    def __init__(self, stream: Any):
        self.stream = stream
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # characters that its encoding does not have

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write a text."""
        self._try(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        self._try(self.stream.flush)

    def _try(self, call: Callable[..., Any], *args: Any) -> None:
        try:
            call(*args)
        except BrokenPipeError:
            with suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self.stream.fileno())  # else Python would fail once more when it ends
                os.close(null)
        except (OSError, ValueError):  # a full disk, a busy terminal, a closed stream
            pass


@contextmanager
def lasting_output() -> Iterator[None]:
    """Let what is printed to stdout and stderr end nothing."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (Output(stream) if stream is not None else None for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
