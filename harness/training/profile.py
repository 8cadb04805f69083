"""A profile of some steps of training: a trace for Chrome or Perfetto, and a table of the top operators."""

import contextlib
import gzip
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import store
from harness.machine import device

TRACE, TABLE = "profile.json.gz", "profile.txt"
WARM_UP = 3
"""Steps before the profile; the first one compiles and allocates."""
_ROWS = 30


class Profiler:
    """Profiles `count` steps after the first `WARM_UP` of a training, at most to the end of their epoch."""

    def __init__(self, count: int, kind: device.Kind, directory: Path) -> None:
        self._wanted, self._kind, self._directory = range(WARM_UP, WARM_UP + count), kind, directory
        self._running: Any = None

    @contextlib.contextmanager
    def step(self, number: int, last: bool) -> Iterator[None]:
        """Do step `number` (from 0, of all stages) in this block; after the `last` one nothing is profiled.

        A training that resumes within these steps or after them writes no profile.
        """
        if self._wanted and number == self._wanted[0]:
            self._running = device.profiler(self._kind)
            self._running.start()
        try:
            yield
        except BaseException:
            self._stop()
            raise
        if self._running and (last or number == self._wanted[-1]):
            self._write(self._stop())

    def _stop(self) -> Any:
        """The profiler, stopped; None if it was not running."""
        running, self._running = self._running, None
        if running:
            running.stop()
        return running

    def _write(self, profile: Any) -> None:
        plain = self._directory / TRACE.removesuffix(".gz")
        profile.export_chrome_trace(str(plain))
        if not plain.exists():  # torch-npu only prints its errors
            return
        try:
            with plain.open("rb") as trace, gzip.open(self._directory / TRACE, "wb") as packed:
                shutil.copyfileobj(trace, packed)
        finally:
            plain.unlink(missing_ok=True)
        if hasattr(profile, "key_averages"):  # torch-npu documents none
            order = f"self_{'cpu' if self._kind == 'cpu' else 'device'}_time_total"
            table = profile.key_averages().table(sort_by=order, row_limit=_ROWS)
            store.write(self._directory / TABLE, table + "\n")
