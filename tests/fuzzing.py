"""How long the fuzzers fuzz: a few cases by default, as many as HARNESS_FUZZ_CASES says on request."""

import os


def cases(default: int) -> int:
    """The number of cases that a fuzzer tries."""
    return int(os.environ.get("HARNESS_FUZZ_CASES", default))
