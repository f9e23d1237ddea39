"""Signals that end a process: heard from its start to its end, and answered between two steps."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from common.errors import ENDING, Stopped, signal_name

NUMBERS = [getattr(signal, name) for name in ENDING if hasattr(signal, name)]


class Signals:
    """The signals that this process has received.

    Outside of training a signal ends the command at once. In training it is noted; the loop saves the step and ends.
    A second Ctrl-C always ends at once.
    """

    received: int | None = None  # the first one
    _raised = 0.0  # when the command was ended last
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
        elif not again or time.monotonic() - self._raised > 5.0:  # Python drops what is raised in a __del__
            self._raised = time.monotonic()
            raise Stopped(f"stopped by {signal_name(number)}", 128 + number)


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
