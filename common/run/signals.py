"""Signals that end a process: heard from its start to its end, and answered between two steps."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from common.errors import ENDING, Stopped

NUMBERS = [getattr(signal, name) for name in ENDING if hasattr(signal, name)]


class Signals:
    """The signals that this process has received.

    Outside of training a signal ends the command at once. In training it is noted; the loop saves the step and ends.
    A second Ctrl-C always ends at once.
    """

    received: int | None = None  # the first one
    waits = False  # whether the loop answers
    tell: Callable[[int], None] = staticmethod(lambda number: None)  # is called with a signal that the loop answers

    def listen(self) -> None:
        """Register the handler, in the main thread; a signal that is ignored, as by nohup, stays ignored."""
        if threading.current_thread() is threading.main_thread():
            for number in NUMBERS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    signal.signal(number, self._handle)

    def _handle(self, number: int, _: FrameType | None) -> None:
        again, self.received = self.received is not None, self.received or number
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.waits:
            self.tell(number)
        elif not again:
            raise Stopped(f"stopped by {name_of(number)}", 128 + number)


def name_of(number: int) -> str:
    """A signal's name, and Ctrl-C for that of the keyboard."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


@contextmanager
def listening() -> Iterator[Signals]:
    """Hear signals; afterwards the earlier handlers are back."""
    signals = Signals()
    before: dict[int, Any] = {number: signal.getsignal(number) for number in NUMBERS}
    signals.listen()
    try:
        yield signals
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                if handler is not None:  # one that was not set from Python
                    signal.signal(number, handler)
