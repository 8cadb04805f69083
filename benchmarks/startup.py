"""Time until the command line answers: `--help`, and `run --dry-run` on a data set that is already checked.

    python benchmarks/startup.py

Prints the best of five, and the ratio to an empty Python on the same machine.
"""

import subprocess
import sys
import time
from pathlib import Path

EXPERIMENT = Path(__file__).parents[1] / "experiments" / "quickstart.yaml"


def best(*arguments: str) -> float:
    """Seconds of the fastest of five runs."""
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


if __name__ == "__main__":
    subprocess.run(
        [sys.executable, "-m", "harness", "run", EXPERIMENT, "--dry-run"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    empty = best("-c", "pass")
    for name, arguments in {
        "--help": ("--help",),
        "run --dry-run": ("run", str(EXPERIMENT), "--dry-run"),
    }.items():
        seconds = best("-m", "harness", *arguments)
        print(f"{name:16} {seconds:.2f} s   {seconds / empty:.0f} x an empty Python")
