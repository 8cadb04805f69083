"""What the fuzzers share: how many cases they try."""

import os


def cases(default: int) -> int:
    """How many cases a fuzzer tries: HARNESS_FUZZ_CASES, or few enough for every day."""
    return int(os.environ.get("HARNESS_FUZZ_CASES", default))
