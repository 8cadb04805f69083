"""How many cases the fuzzers try: few in every run of the tests, HARNESS_FUZZ_CASES on request."""

import os


def cases(default: int) -> int:
    """The number of cases, by default `default`."""
    return int(os.environ.get("HARNESS_FUZZ_CASES", default))
