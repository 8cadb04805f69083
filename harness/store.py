"""What lies on disk: fingerprints, whole-or-nothing writes, steps that are done once, and the room left."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

DONE = "DONE"


def fingerprint(value: Any) -> str:
    """12 hex digits that name a JSON-like value, the same in every process."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def gb(size: float) -> str:
    """Bytes in words."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"


def free(path: Path) -> int:
    """Bytes that are free where a path lies, or will lie."""
    there = next(place for place in (path.resolve(), *path.resolve().parents) if place.exists())
    return shutil.disk_usage(there).free


def write(path: Path, content: str | bytes) -> Path:
    """Write the whole file or nothing: to a temporary name beside it, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:  # a full disk, a folder of that name, an interruption
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)
        raise
    return path


def write_json(path: Path, value: Any) -> Path:
    """Write a value as indented JSON, whole or nothing; NaN and infinity are refused."""
    return write(path, json.dumps(value, indent=1, ensure_ascii=False, default=str, allow_nan=False) + "\n")


def step_directory(root: Path, kind: str, inputs: Mapping[str, Any]) -> Path:
    """The directory of the step whose output `inputs` determine: `root/steps/<kind>-<fingerprint>`."""
    return root / "steps" / f"{kind}-{fingerprint(inputs)}"


def is_done(directory: Path) -> bool:
    """Whether the step in `directory` ran to its end."""
    return (directory / DONE).exists()


def step(root: Path, kind: str, inputs: Mapping[str, Any], build: Callable[[Path], bool]) -> Path:
    """Return the directory of a step, calling `build(directory)` unless it was already done.

    `build` tells whether all came out; a step that lacks something is built again the next time. An
    interrupted step finds its directory as it left it. A second process that wants the same step waits.
    """
    from filelock import FileLock

    directory = step_directory(root, kind, inputs)
    if is_done(directory):
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    with FileLock(directory.with_suffix(".lock")):
        if not is_done(directory):
            write_json(directory / "inputs.json", inputs)
            if build(directory):
                _sync(directory)
                write(directory / DONE, "")
    return directory


def _sync(directory: Path) -> None:
    """Have the disk hold every file before the marker says so: a power cut must not leave it alone."""
    for path in [*directory.rglob("*"), directory]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
