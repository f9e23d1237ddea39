"""The one exception for mistakes in what the user typed, pointed to or fed in."""

import difflib
from collections.abc import Iterable


class InputError(Exception):
    """A mistake in a flag, a config, a file or the data; the command line prints it as one line and exits with 2.

    The message is a single line that names the file or key and how to mend it.
    """


def nearest(wrong: str, known: Iterable[str]) -> str:
    """``"; did you mean 'right'?"`` for the known name closest to a mistyped one, or nothing."""
    matches = difflib.get_close_matches(wrong, list(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""
