"""Limits of what another process computes."""

import contextlib
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

_WAIT = 10
"""How many times its seconds of computing a process may take, since others may use the cores."""


@contextlib.contextmanager
def limited(process: subprocess.Popen[Any], seconds: float) -> Iterator[Callable[[], bool]]:
    """Kill the process if it computes for `seconds` in this block, or takes `_WAIT` times as long.

    The function says whether it was killed.
    """
    begun, started, ended, late = _computed(process), time.monotonic(), threading.Event(), threading.Event()

    def watch() -> None:
        while not ended.wait(min(1, seconds / 10)):
            waited = time.monotonic() - started >= _WAIT * seconds
            if waited or _computed(process) - begun >= seconds:
                late.set()
                process.kill()  # ends the reads of its output
                return

    watchdog = threading.Thread(target=watch, daemon=True)
    watchdog.start()
    try:
        yield late.is_set
    finally:
        ended.set()
        watchdog.join()


def _computed(process: subprocess.Popen[Any]) -> float:
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        return sum(psutil.Process(process.pid).cpu_times()[:2])
    return 0.0
