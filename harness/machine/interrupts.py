"""Delays Ctrl-C and SIGTERM until the work so far is saved."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

PATIENCE = 5.0


class Interrupts:
    """Whether Ctrl-C or SIGTERM `came` while they had to `wait`.

    A second one is not delayed if it comes more than `PATIENCE` seconds after the first. Before that it may
    be the same one, sent by both the terminal and a launcher.
    """

    def __init__(self) -> None:
        self.came: float | None = None

    @contextlib.contextmanager
    def wait(self) -> Iterator[None]:
        """Delay the signals in this block; not in a thread, which can't set handlers."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        heard = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._note) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, *_: Any) -> None:
        if self.came is not None and time.monotonic() - self.came > PATIENCE:
            raise KeyboardInterrupt
        self.came = self.came or time.monotonic()
