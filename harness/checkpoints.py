"""Where weights lie: a local folder or the Hugging Face cache; no silent download, no unmarked stand-in."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from harness.errors import Problem
from harness.store import write_json

STANDIN_FILE = "standin.json"


@dataclass(frozen=True)
class Checkpoint:
    """Weights at hand, under the name that signatures show."""

    name: str
    folder: Path
    standin: bool


def find(name: str | Path) -> Checkpoint | None:
    """The checkpoint of a hub name or a local folder, or None where its weights are not on this machine.

    A folder that holds `standin.json` (see `mark_standin`) is a stand-in wherever it is moved to.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = _cached(str(name))
    if folder is None or not _is_whole(folder):
        return None
    mark = folder / STANDIN_FILE
    if mark.exists():
        return Checkpoint(json.loads(mark.read_text())["name"], folder, standin=True)
    return Checkpoint(str(name), folder, standin=False)


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
    kept = root / "cache" / "weights.json"
    known = json.loads(kept.read_text()) if kept.exists() else {}
    result = []
    for file in _weight_files(folder):
        state = file.stat()
        key = f"{file.resolve()}:{state.st_size}:{state.st_mtime_ns}"
        if key not in known:
            with file.open("rb") as content:
                known[key] = hashlib.file_digest(content, "sha256").hexdigest()
            write_json(kept, known)
        result.append([file.name, known[key]])
    return result


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
        else f"Fetch it: hf download {name}   (on a machine with internet; then copy the folder)"
    )
    what = f"no such folder: {name}" if looks_like_path else f"weights are not on this machine: {name}"
    return Problem(what, key=key, hint=hint)
