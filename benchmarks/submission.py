"""Time of `submission check` for the whole test set of 2023: 10,473 rows, as pipe file and as zip.

    python benchmarks/submission.py

Prints the best of five for the check alone and for the command, with its ratio to an empty Python.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from harness.submission import check, make

ROWS = 10_473
CAPTION = "axial ct of the chest, number {}, showing a mass in the right upper lobe with a spiculated margin"


def best(action: Callable[[], object]) -> float:
    """Seconds of the fastest of five calls."""
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def process(*arguments: str) -> Callable[[], object]:
    """A call that runs Python with these arguments."""
    return lambda: subprocess.run(
        [sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


if __name__ == "__main__":
    folder = Path(tempfile.mkdtemp())
    ids = [f"ImageCLEFmedical_Caption_2023_test_{n:06d}" for n in range(ROWS)]
    (folder / "ids").write_text("\n".join(ids))
    wrong = folder / "wrong"
    wrong.write_text("nothing\n" * ROWS)
    empty = best(process("-c", "pass"))
    for task, values in {
        "caption": {key: CAPTION.format(key) for key in ids},
        "concept": {key: ["C0040405", "C0817096", f"C{n}"] for n, key in enumerate(ids)},
    }.items():
        for edition in (2023, 2026):
            upload = make(values, ids, edition, folder, {}, task=task)
            for name, file in {"right": upload, "all wrong": wrong}.items():
                alone = best(lambda file=file, e=edition, t=task: check(file, ids, e, t))
                options = ("--edition", str(edition), "--ids", str(folder / "ids"), "--task", task)
                whole = best(process("-m", "harness", "submission", "check", str(file), *options))
                print(
                    f"{task} {edition} {name:9} {alone:.2f} s   command {whole:.2f} s, "
                    f"{whole / empty:.0f} x an empty Python"
                )
