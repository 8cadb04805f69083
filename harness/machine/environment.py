"""What a run's numbers depend on besides its config: versions, the device, the harness's own commit."""

import contextlib
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from harness.machine import device

PACKAGES = (
    "imageclef-harness",
    "torch",
    "torch-npu",
    "transformers",
    "deepspeed",
    "mlflow",
    "bert-score",
    "rouge-score",
    "pycocoevalcap",
    "bleurt-pytorch",
    "numpy",
)


def git_state() -> dict[str, Any]:
    """Commit of the harness's own checkout, and whether it has changes; both None outside a checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        with contextlib.suppress(OSError):
            done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, encoding="utf-8")
            return done.stdout.strip() if done.returncode == 0 else None
        return None

    status = git("status", "--porcelain")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def environment(wanted: str) -> dict[str, str]:
    """Versions of the packages that the numbers depend on, and the device that `wanted` selects."""
    versions = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    found = device.probe(wanted)
    threads = os.environ.get("OMP_NUM_THREADS", str(device.cores()))
    waiting = f"{os.environ.get('OMP_WAIT_POLICY', 'ACTIVE').lower()} waiting"
    if "OMP_WAIT_POLICY" not in os.environ and (spins := os.environ.get("GOMP_SPINCOUNT")):
        waiting = f"{spins} spins before waiting"
    return versions | {"device": str(found), "threads": f"{threads}, {waiting}"}
