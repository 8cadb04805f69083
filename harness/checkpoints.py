"""Where weights lie: a local folder or the Hugging Face cache; no silent download, no unmarked stand-in."""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.errors import Problem
from harness.store import fingerprint, write_json

STANDIN_FILE = "standin.json"
LAYOUT = (
    "a folder in the layout of transformers: config.json, *.safetensors or pytorch_model.bin, a tokenizer"
)
_FILES = {
    ".pth": "a file of weights for LAVIS or plain PyTorch",
    ".pt": "a file of weights for plain PyTorch",
    ".ckpt": "a file of weights for Lightning",
    ".bin": "a file of weights without their config",
    ".safetensors": "a file of weights without their config",
    ".zip": "an archive",
    ".gz": "an archive",
    ".tar": "an archive",
}
"""What files are that people name in place of a folder."""


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
    try:
        local = folder.is_dir()
        if not local:
            folder = _cached(str(name))
    except OSError:  # a name that is too long for any folder
        return None
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
                    write_json(kept, known)
        result.append([file.name, known[key]])
    return result


def _known(kept: Path | None) -> dict[str, str]:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(kept.read_text()) if kept else {}
    return {}


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
    path = Path(name)
    with contextlib.suppress(OSError, ValueError):  # a name that is too long, or holds a NUL
        if path.is_dir():
            return _not_whole(path, key)
        if path.exists():
            return _no_folder(path, key)
        if name.startswith("~") and path.expanduser().exists():
            return Problem(f"~ is not read as a home folder here; write {path.expanduser()}", key=key)
    looks_like_path = name.startswith(("/", ".", "~")) or name.count("/") > 1
    looks_like_path = looks_like_path or path.suffix in _FILES
    hint = (
        None
        if looks_like_path
        else f"Fetch it: hf download {name}   (on a machine with internet; then copy HF_HOME)"
    )
    what = f"no such folder: {name}" if looks_like_path else f"weights are not on this machine: {name}"
    return Problem(what, key=key, hint=hint)


def _no_folder(path: Path, key: str) -> Problem:
    """What a file is, and how to come from it to a folder."""
    kind = _FILES.get(path.suffix, "a file") if path.is_file() else "neither a file nor a folder"
    hint = f"Wanted is {LAYOUT}, or a hub name."
    if path.suffix in (".safetensors", ".bin") and (path.parent / "config.json").is_file():
        hint = f"Name the folder: {path.parent}"
    elif path.suffix in (".pth", ".pt", ".ckpt"):
        hint += (
            " transformers has a script that converts LAVIS's files, convert_blip_2_original_to_pytorch.py; "
            "Salesforce/blip2-opt-2.7b-coco is LAVIS's blip2_opt2.7b caption_coco, converted."
        )
    elif path.suffix in (".zip", ".gz", ".tar"):
        hint = "Unpack it, and name the folder. " + hint
    return Problem(f"{path} is {kind}, not a folder", key=key, hint=hint)


def _not_whole(folder: Path, key: str) -> Problem:
    """What a folder lacks."""
    others = [file.name for file in sorted(folder.iterdir()) if file.suffix in (".pth", ".pt", ".ckpt")]
    if others:
        found = _no_folder(folder / others[0], key)
        return Problem(
            f"{folder} has no weights that transformers reads, but {others[0]}", key=key, hint=found.hint
        )
    for index in sorted(folder.glob("*.index.json")):
        what = f"{folder} lacks parts that {index.name} names"
        return Problem(what, key=key, hint="The download was cut short; the same `hf download` goes on.")
    return Problem(f"{folder} has no weights", key=key, hint=f"Wanted is {LAYOUT}.")


def other_kind(found: Checkpoint, wanted: str, key: str) -> Problem | None:
    """What is wrong with the `config.json` of a checkpoint that should be of the model type `wanted`."""
    file = found.folder / "config.json"
    try:
        kind = json.loads(file.read_text(encoding="utf-8"))["model_type"]
    except OSError:
        what = f"{found.folder} has weights, but no config.json"
        return Problem(what, key=key, hint=f"Wanted is {LAYOUT}.")
    except (ValueError, TypeError, KeyError):
        return Problem(f"{file} is not the config of a model", key=key, hint=f"Wanted is {LAYOUT}.")
    if kind == wanted:
        return None
    hint = "Name a BLIP-2, for example Salesforce/blip2-opt-2.7b-coco."
    return Problem(f"{found.folder} holds a model of type {kind}; {wanted} is allowed", key=key, hint=hint)
