"""Shared by the fuzzers: how many cases they try, and the time limit of one case."""

import contextlib
import os
import signal
from collections.abc import Iterator


def cases(default: int) -> int:
    """How many cases a fuzzer tries: `HARNESS_FUZZ_CASES`, or its own small number."""
    return int(os.environ.get("HARNESS_FUZZ_CASES", default))


@contextlib.contextmanager
def within(seconds: int, case: object) -> Iterator[None]:
    """Fail, with the case, where its work takes longer: a hang."""

    def stop(*_: object) -> None:
        raise AssertionError(f"hangs for {seconds} s: {case!r}"[:2000])

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
