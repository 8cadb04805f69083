"""Files on disk: fingerprints, atomic writes, steps that run once, and free space."""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

GONE = "it is gone"
"""What is wrong with a file of a step that someone deleted."""
DONE, INPUTS, READ, MADE = "DONE", "inputs.json", "read.json", "made.json"
RUNS = Path("runs")
"""The folder of records, steps and caches, in the current folder."""
LARGE = 64_000_000
"""Bytes. Every run checks the SHA-256 of a step's files up to this size, but of larger ones only if read."""


def run_name(variant: str, seed: int) -> str:
    """The name of a run within its experiment, and of its folder."""
    return f"{variant}-s{seed}"


def fingerprint(value: Any) -> str:
    """12 hex digits that identify a JSON-like value, the same in every process."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def gb(size: float) -> str:
    """A number of bytes as text in GB or MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"


def free(path: Path) -> int:
    """Free bytes on the disk of a path, which may not exist yet."""
    there = next(place for place in (path.resolve(), *path.resolve().parents) if place.exists())
    return shutil.disk_usage(there).free


def write(path: Path, content: str | bytes) -> Path:
    """Write the whole file or nothing: first a temporary file in the same folder, then a rename.

    Raises `OSError` for a device or a pipe, which the rename would replace.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise FileExistsError(errno.EEXIST, "it is a device or a pipe, not a file", str(path))
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
    """Write a value as indented JSON, whole or nothing; raises `ValueError` for NaN and infinity."""
    return write(path, json.dumps(value, indent=1, ensure_ascii=False, default=str, allow_nan=False) + "\n")


def parsed(text: str | bytes) -> Any:
    """A value from JSON; NaN and infinity, which older versions wrote, become None. Raises `ValueError`."""
    return finite(json.loads(text))


def finite(value: Any) -> Any:
    """The JSON-like value with None for each number that is NaN or infinite."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def bytes_of(path: Path) -> bytes:
    """The bytes of a regular file; raises `OSError` for others, since reading a pipe may never end."""
    if not path.is_file():
        raise FileNotFoundError(path)
    return path.read_bytes()


def write_checked(path: Path, value: Any) -> Path:
    """Write a JSON-like value with its checksum, for `read_checked`."""
    return write_json(path, {"checksum": fingerprint(value), "value": value})


def read_checked(path: Path) -> Any:
    """The value that `write_checked` wrote; None if the file is missing or changed."""
    try:
        content = json.loads(path.read_bytes()) if path.is_file() else None
        whole = isinstance(content, dict) and content.get("checksum") == fingerprint(content.get("value"))
    except (OSError, ValueError, RecursionError):
        return None
    return content["value"] if whole else None


def step_directory(root: Path, kind: str, inputs: Mapping[str, Any]) -> Path:
    """The directory of the step with these inputs: `root/steps/<kind>-<fingerprint>`."""
    return root / "steps" / f"{kind}-{fingerprint(inputs)}"


def is_done(directory: Path, made_from: Mapping[str, str] | None = None) -> bool:
    """Whether the step in `directory` is finished, and its files still have their sizes.

    `made_from` are the files that the step would read now, from `products`. A step that has read other files
    is not done. This is cheap: it opens only the seal.
    """
    seal = _seal(directory)
    if seal is None or any(_misfit(directory / name, size) for name, (size, _) in seal["files"].items()):
        return False
    return not _differs(seal["from"], made_from or {})


def damage(directory: Path, thorough: bool = True) -> dict[str, str]:
    """What is wrong with each changed file of a done step; files that the step did not write don't matter.

    All files are compared by size. Files of at most `LARGE` bytes, or all if `thorough`, are also compared by
    SHA-256.
    """
    if not (directory / DONE).exists():
        return {}
    seal = _seal(directory)
    if seal is None:
        return {DONE: "its checksum differs"}
    found = {}
    for name, (size, digest) in seal["files"].items():
        wrong = _misfit(directory / name, size)
        if not wrong and (thorough or size <= LARGE):
            wrong = _altered(directory / name, digest)
        if wrong:
            found[name] = wrong
    return found


def damage_of(file: Path) -> str | None:
    """What is wrong with one file of a step, whatever its size; None if nothing, or if no step wrote it."""
    seal = _seal(file.parent)
    if seal is None and (file.parent / DONE).exists():
        return f"the {DONE} beside it, which has its checksum, is damaged"
    if seal is None or file.name not in seal["files"]:
        return None
    size, digest = seal["files"][file.name]
    return _misfit(file, size) or _altered(file, digest)


def products(directory: Path, names: Sequence[str] | None = None) -> dict[str, str]:
    """SHA-256 by `<step>/<file>` of the files that a sealed step made for others: `names`, or all."""
    seal = _seal(directory) or {"files": {}}
    wanted = [name for name in seal["files"] if name not in (INPUTS, READ, MADE)] if names is None else names
    return {f"{directory.name}/{n}": seal["files"][n][1] for n in wanted if n in seal["files"]}


def _seal(directory: Path) -> dict[str, Any] | None:
    seal = read_checked(directory / DONE)
    return seal if isinstance(seal, dict) and seal.keys() >= {"files", "from"} else None


def _misfit(file: Path, size: int) -> str | None:
    if not file.is_file():
        return GONE
    found = file.stat().st_size
    return None if found == size else f"it has {found:,} bytes, and had {size:,}"


def _altered(file: Path, digest: str) -> str | None:
    try:
        return None if _sha256(file) == digest else "its SHA-256 differs"
    except OSError as error:  # a bad disk
        return f"it can't be read: {error.strerror}"


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def seal(directory: Path, made_from: Mapping[str, str]) -> None:
    """Mark a step as done: `DONE` gets the sizes and SHA-256 of its files, and what it read."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != DONE)
    known = {str(path.relative_to(directory)): [path.stat().st_size, _sha256(path)] for path in files}
    write_checked(directory / DONE, {"files": known, "from": dict(made_from)})


def once(
    directory: Path,
    inputs: Mapping[str, Any],
    build: Callable[[Path], bool],
    made_from: Mapping[str, str] | None = None,
) -> None:
    """Call `build(directory)` for a step, unless it is done and unchanged.

    `build` returns whether its output is complete; if not, the step is built again the next time. An
    interrupted step finds its directory unchanged. A damaged step finds its undamaged files. A step that read
    other files than `made_from` finds an empty directory. A second process that needs the same step waits.
    """
    from filelock import FileLock

    made_from = made_from or {}

    def whole() -> bool:
        return is_done(directory, made_from) and not damage(directory)

    if whole():
        return
    directory.mkdir(parents=True, exist_ok=True)
    with FileLock(directory.with_suffix(".lock")):
        if not whole():
            _clear(directory, made_from)
            write_json(directory / INPUTS, inputs)
            write_checked(directory / READ, dict(made_from))
            if build(directory):
                _sync(directory)
                seal(directory, made_from)


def _clear(directory: Path, made_from: Mapping[str, str]) -> None:
    """Delete what can't be built upon. The seal goes first, so that the step does not count as done."""
    damaged, sealed = damage(directory), (directory / DONE).exists()
    other = not sealed and _differs(read_checked(directory / READ), made_from)
    # A damaged seal can vouch for nothing. A whole one is of a step that read other files.
    every = DONE in damaged or other or (sealed and not damaged)
    _delete(directory / DONE)
    for path in directory.iterdir() if every else [directory / name for name in damaged]:
        _delete(path)


def _delete(path: Path) -> None:
    """Delete a file, or a folder that stands in its place, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _differs(read: Any, made_from: Mapping[str, str]) -> bool:
    """Whether a step read other files; those of an unknown one are taken for the same."""
    known = read if isinstance(read, dict) else {}
    return any(known.get(name, digest) != digest for name, digest in made_from.items())


def _sync(directory: Path) -> None:
    """Sync every file to disk before the seal is written: after a power cut it must not be alone."""
    for path in [*directory.rglob("*"), directory]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
