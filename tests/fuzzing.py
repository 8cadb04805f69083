"""How long the fuzzers run."""

import os


def cases(default: int) -> int:
    """How many cases to try: few by default, as many as `HARNESS_FUZZ_CASES` says on request."""
    return int(os.environ.get("HARNESS_FUZZ_CASES", default))
