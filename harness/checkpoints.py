"""Where weights lie: a local folder or the Hugging Face cache; no silent download, no unmarked stand-in."""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.errors import Problem
from harness.store import bytes_of, fingerprint, read_checked, write_checked

STANDIN_FILE = "standin.json"


@dataclass(frozen=True)
class Checkpoint:
    """Weights at hand; `local` where a folder was named and not a hub name, so that anything may be in it."""

    name: str
    folder: Path
    standin: bool
    local: bool = False


def find(name: str | Path) -> Checkpoint | None:
    """The checkpoint of a hub name or a local folder, or None where its weights are not on this machine.

    A folder that holds `standin.json` (see `mark_standin`) is a stand-in wherever it is moved to.
    """
    folder = Path(name)
    local = folder.is_dir()
    if not local:
        folder = _cached(str(name))
    if folder is None or not _is_whole(folder):
        return None
    mark = folder / STANDIN_FILE
    if mark.exists():
        return Checkpoint(json.loads(mark.read_text())["name"], folder, True, local)
    return Checkpoint(str(name), folder, False, local)


def _weight_files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])


def _is_whole(folder: Path) -> bool:
    """Whether there are weights, and every part that an index names; a broken download has neither."""
    for index in folder.glob("*.index.json"):
        parts = set(json.loads(index.read_text())["weight_map"].values())
        if all((folder / part).exists() for part in parts):
            return True
    return any("-of-" not in file.name for file in _weight_files(folder))


def contents(folder: Path, root: Path) -> list[list[str]]:
    """Name and SHA-256 of each weight file; known hashes stay under `root/cache`, by place, size and date."""
    return hashes(_weight_files(folder), root / "cache")


def digest(checkpoint: Checkpoint, cache: Path | None) -> str:
    """8 hex digits that name the contents of its weight files."""
    return fingerprint(hashes(_weight_files(checkpoint.folder), cache))[:8]


def hashes(files: Sequence[Path], cache: Path | None) -> list[list[str]]:
    """Name and SHA-256 of each file; known ones stay in the folder `cache`, by place, size and dates."""
    kept = cache / "weights.json" if cache else None
    known = _known(kept)
    result = []
    for file in files:
        state = file.stat()
        key = f"{file.resolve()}:{state.st_size}:{state.st_mtime_ns}:{state.st_ctime_ns}"
        if key not in known:
            with file.open("rb") as content:
                known[key] = hashlib.file_digest(content, "sha256").hexdigest()
            with contextlib.suppress(OSError):  # a read-only or full disk: it is hashed again the next time
                if kept:
                    write_checked(kept, known)
        result.append([file.name, known[key]])
    return result


def _known(kept: Path | None) -> dict[str, str]:
    """Hashes that are known; none where the file is damaged, so that the weights are hashed again."""
    known = read_checked(kept) if kept else None
    if kept and known is None:
        with contextlib.suppress(OSError, ValueError, RecursionError):
            known = json.loads(bytes_of(kept))  # an earlier version wrote no checksum
    whole = isinstance(known, dict) and all(isinstance(one, str) and len(one) == 64 for one in known.values())
    return known if whole else {}


def _cached(name: str) -> Path | None:
    from huggingface_hub import constants

    # the library's own look-up takes a third of a second to import, too long for every command to pay
    if not Path(constants.HF_HUB_CACHE, "models--" + name.replace("/", "--")).is_dir():
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def mark_standin(folder: Path, name: str) -> None:
    """Mark a checkpoint folder as a stand-in; every score made with it says so, under `name`."""
    (folder / STANDIN_FILE).write_text(json.dumps({"name": name}) + "\n")


def missing(name: str, key: str) -> Problem:
    """The problem to report when `find(name)` gave None for the config key `key`."""
    looks_like_path = name.startswith(("/", ".", "~")) or name.count("/") > 1
    hint = (
        None
        if looks_like_path
        else f"Fetch it: hf download {name}   (on a machine with internet; then copy HF_HOME)"
    )
    what = f"no such folder: {name}" if looks_like_path else f"weights are not on this machine: {name}"
    return Problem(what, key=key, hint=hint)
