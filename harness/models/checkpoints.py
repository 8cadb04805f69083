"""Finding weights in a local folder or the Hugging Face cache; no silent download, no unmarked stand-in.

Weights are identified by their contents. Hub weights are official if the hub's client fetched these files;
weights of a local file or folder are official if the user has listed their SHA-256.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import Problem
from harness.models.outline import Flawed, check_weights
from harness.store import fingerprint, read_checked, write_checked

STANDIN_FILE = "standin.json"
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
"""Files with the settings of an image processor, as transformers 4 and 5 write them."""
STANDIN_VERSION = 1
"""Increase it when `standins` trains another model from the same captions."""
_UNREAD = {".md", ".h5", ".msgpack", ".ot", ".onnx"}
"""Files in model folders that no model reads here: of other frameworks, and documents."""
_SETTLED = 2_000_000_000
"""Nanoseconds after which every change of a file is visible in its dates."""
_hashed: dict[str, str] = {}
LAYOUT = (
    "a folder in the layout of transformers: config.json, *.safetensors or pytorch_model.bin, a tokenizer"
)
_FILES = {
    ".pth": "a file of weights for LAVIS or plain PyTorch",
    ".pt": "a file of weights for plain PyTorch",
    ".ckpt": "a file of weights for Lightning",
    ".gguf": "a file of weights for llama.cpp",
    ".bin": "a file of weights without their config",
    ".safetensors": "a file of weights without their config",
    ".zip": "an archive",
    ".gz": "an archive",
    ".tar": "an archive",
}
"""What a file is that a user gives instead of a folder, by its suffix."""


_OTHERS = (".pth", ".pt", ".ckpt", ".gguf")
_CONVERT = (
    'python -c "import transformers as t; '
    "of = {{'pretrained_model_name_or_path': '{0}', 'gguf_file': '{1}'}}; "
    "t.AutoModelForCausalLM.from_pretrained(**of).save_pretrained('{2}'); "
    "t.AutoTokenizer.from_pretrained(**of).save_pretrained('{2}', legacy_format=False)\""
)
"""Writes a checkpoint from a folder, the name of its GGUF file, and the name of the new folder."""


@dataclass(frozen=True)
class Checkpoint:
    """Weights at hand; `local`: the user gave a folder, not a hub name, so its contents can be anything."""

    name: str
    folder: Path
    standin: bool
    local: bool = False


def find(name: str | Path) -> Checkpoint | None:
    """The checkpoint of a hub name or a local folder, or None if its weights are not on this machine.

    A folder with `standin.json` (see `mark_standin`) is a stand-in, also after it is moved.
    """
    folder = Path(name)
    try:
        local = folder.is_dir()
        if not local:
            folder = _cached(str(name))
    except OSError:  # a name that is too long for any folder
        return None
    if folder is None or _odd(folder) or not _is_whole(folder):
        return None
    standin = standin_name(folder)
    return Checkpoint(standin or str(name), folder, standin is not None, local)


def standin_name(folder: Path) -> str | None:
    """The name in a folder's `standin.json`, or None if there is no such file."""
    try:
        return str(json.loads((folder / STANDIN_FILE).read_text(encoding="utf-8"))["name"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, LookupError, TypeError):
        return "unreadable"


def size(folder: Path) -> int:
    """Bytes of the weights in a folder; of a folder with both formats, the smaller one's."""
    formats = [[*folder.glob("*.safetensors")], [*folder.glob("pytorch_model*.bin")]]
    return min((sum(file.stat().st_size for file in files) for files in formats if files), default=0)


def _weight_files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])


def _odd(folder: Path) -> Path | None:
    """A pipe or device in a folder, which would be waited for; None if there is none."""
    files = (file for file in folder.iterdir() if file.exists())
    return next((file for file in files if not (file.is_file() or file.is_dir())), None)


def _is_whole(folder: Path) -> bool:
    """Whether a folder has weights with all parts that an index names; an incomplete download does not."""
    for index in folder.glob("*.index.json"):
        parts = _parts(index)
        if parts and all((folder / part).exists() for part in parts):
            return True
    return any("-of-" not in file.name for file in _weight_files(folder))


def _parts(index: Path) -> set[str]:
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        return {str(part) for part in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    return set()


def flaws(checkpoint: Checkpoint, key: str, config: bool = True, tokenizer: bool = True) -> list[Problem]:
    """The problems that prevent loading the files of a checkpoint, found without torch.

    Such as a `config.json` that is not a mapping, no tokenizer files, or weights that are of another kind,
    truncated or compressed. `key` is the config key of the checkpoint.
    """
    folder = checkpoint.folder
    found = []
    if config and (flaw := _config_flaw(folder)):
        found.append(flaw)
    if tokenizer and not any(any(folder.glob(names)) for names in ("tokenizer*", "vocab*", "*.model")):
        found.append("no files of a tokenizer")
    for file in _weight_files(folder):
        try:
            check_weights(file)
        except Flawed as flaw:
            found.append(f"{file.name} {flaw}")
        except OSError as error:
            found.append(f"{file.name} can't be read: {error.strerror}")
    return [Problem(f"{what}: {folder}", key=key) for what in found]


def _config_flaw(folder: Path) -> str | None:
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "no config.json"
    except (OSError, ValueError, RecursionError) as error:
        return f"config.json can't be read ({error})"
    return None if isinstance(settings, dict) else "config.json is not a mapping"


def config(name: str) -> dict[str, Any] | None:
    """The contents of a checkpoint's `config.json`, also without weights; None if it is not at hand."""
    with contextlib.suppress(OSError):  # a name that is too long for any folder
        folder = Path(name) if Path(name).is_dir() else _cached(name)
        if folder and not _odd(folder) and not _config_flaw(folder):
            return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return None


def image_processor(folder: Path) -> dict[str, Any]:
    """The settings of a checkpoint's image processor, such as `image_mean`; empty if it has none.

    They are in one of `PROCESSORS`, in the second with those of the tokenizer.
    """
    own, both = (folder / name for name in PROCESSORS)
    found = json.loads(both.read_bytes()).get("image_processor") if both.is_file() else None
    return found or (json.loads(own.read_bytes()) if own.is_file() else {})


def contents(folder: Path, cache: Path | None) -> list[list[str]]:
    """Name and SHA-256 of each file that determines the results of a model: weights, config, tokenizer.

    The folder `cache` keeps known hashes.
    """
    return [[name, _sha256(file, cache)] for name, file in _model_files(folder)]


def _model_files(folder: Path) -> list[tuple[str, Path]]:
    """The files that a model may read from a folder, by name; from inner folders only .json and .txt."""
    return [
        (name, file)
        for name, file in walk(folder)
        if file.suffix not in _UNREAD
        and name != "DONE"
        and ("/" not in name or file.suffix in (".json", ".txt"))
    ]


def digest(checkpoint: Checkpoint, cache: Path | None) -> str:
    """8 hex digits that identify a checkpoint: the first of `sha256`, or of `contents` for a stand-in."""
    if checkpoint.standin:
        return fingerprint(contents(checkpoint.folder, cache))[:8]
    return sha256(checkpoint.folder, cache)[:8]


def walk(folder: Path) -> list[tuple[str, Path]]:
    """All files of a folder, recursively, with their relative names, sorted by the bytes of the names.

    Without names that begin with a dot, and without `__pycache__`.
    """
    found, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link to a parent folder
            folders.clear()
            continue
        folders[:] = [name for name in folders if not (name.startswith(".") or name == "__pycache__")]
        seen.add(real)
        files = [Path(place, name) for name in names if not name.startswith(".")]
        found += [(file.relative_to(folder).as_posix(), file) for file in files if file.is_file()]
    return sorted(found, key=lambda pair: os.fsencode(pair[0]))


def sums(path: Path, cache: Path | None) -> list[list[str]]:
    """Name and SHA-256 of a file, or of each file of a folder (`walk`)."""
    files = walk(path) if path.is_dir() else [(path.name, path)]
    return [[name, _sha256(file, cache)] for name, file in files]


def sha256(path: Path, cache: Path | None) -> str:
    """The SHA-256 of a file; for a folder, of the output of `sha256sum` for its files (docs/scoring.md)."""
    if not path.is_dir():
        return _sha256(path, cache)
    lines = b"".join(_line(name, of_file) for name, of_file in sums(path, cache))
    return hashlib.sha256(lines).hexdigest()


def _line(name: str, of_file: str) -> bytes:
    """The line of a file in the output of `sha256sum`, which escapes backslashes and line breaks."""
    escaped = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    mark = "\\" if escaped != name else ""
    return os.fsencode(f"{mark}{of_file}  ./{escaped}\n")


def is_trusted(path: Path, trusted: Collection[str], cache: Path | None) -> bool:
    """Whether the SHA-256 of a file or folder, or of every file in that folder, is among the `trusted`."""
    if not trusted:
        return False
    files = {of_file for _, of_file in sums(path, cache)}
    return bool(files) and (sha256(path, cache) in trusted or files <= set(trusted))


def untrusted(key: str, path: Path, cache: Path | None) -> str:
    """The message for contents that `trusted` does not list, with the SHA-256 to compare and list."""
    found = sha256(path, cache)
    what = f"{key}: the SHA-256 of {path} is {found}, which score.trusted does not list, so it has a star"
    return f"{what}. If it is the published one: --set 'score.trusted=[{found}]'"


def is_fetched(checkpoint: Checkpoint, cache: Path | None) -> bool:
    """Whether the hub's client fetched every file: its cache names files by their hashes.

    The hash is SHA-256 for weights, and git's for small files. A folder made by hand has no such names, and a
    changed file has another hash.
    """
    blobs = checkpoint.folder.parents[1] / "blobs"
    names = {blob.name for blob in blobs.iterdir()} if blobs.is_dir() else set()
    weights = set(_weight_files(checkpoint.folder))
    return bool(names) and all(
        _sha256(file, cache) in names or (file not in weights and _git_hash(file) in names)
        for _, file in _model_files(checkpoint.folder)
    )


def _git_hash(file: Path) -> str:
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _sha256(file: Path, cache: Path | None) -> str:
    """The SHA-256 of a file; known ones are kept in memory and in `cache`, by the file's state (`_state`)."""
    kept = cache / "weights.json" if cache else None
    state, key = _state(file)
    if key not in _hashed:
        found = _known(kept).get(key)
        if found is None:
            with file.open("rb") as content:
                found = hashlib.file_digest(content, "sha256").hexdigest()
            if state > time.time_ns() - _SETTLED or _state(file)[1] != key:
                return found
            with contextlib.suppress(OSError):  # a read-only or full disk: hash it again next time
                if kept:
                    write_checked(kept, _known(kept) | {key: found})
        _hashed[key] = found
    return _hashed[key]


def _state(file: Path) -> tuple[int, str]:
    """When a file last changed (ns), and a key that changes with its contents."""
    state = file.stat()
    dates = (state.st_mtime_ns, state.st_ctime_ns)
    return max(dates), ":".join(map(str, (file.resolve(), state.st_dev, state.st_ino, state.st_size, *dates)))


def _known(kept: Path | None) -> dict[str, Any]:
    """The known hashes; none if the file is damaged, so weights are hashed again."""
    known = read_checked(kept) if kept else None
    whole = isinstance(known, dict) and all(isinstance(one, str) and len(one) == 64 for one in known.values())
    return known if whole else {}


def _cached(name: str) -> Path | None:
    from huggingface_hub import constants

    # importing the library's own look-up takes a third of a second, too long for every command
    if not Path(constants.HF_HUB_CACHE, "models--" + name.replace("/", "--")).is_dir():
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def mark_standin(folder: Path, name: str) -> None:
    """Mark a checkpoint folder as a stand-in; the signature of its scores shows `name`."""
    (folder / STANDIN_FILE).write_text(json.dumps({"name": name}) + "\n", "utf-8")


def missing(name: str, key: str) -> Problem:
    """The problem if `find(name)` gives None for the config key `key`."""
    path = Path(name)
    with contextlib.suppress(OSError, ValueError):  # a name that is too long, or holds a NUL
        if path.is_dir():
            return _not_whole(path, key)
        if path.exists():
            return _no_folder(path, key)
        if name.startswith("~") and path.expanduser().exists():
            return Problem(f"~ is not expanded to a home folder here; write {path.expanduser()}", key=key)
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
    """The problem of a file instead of a folder, with a hint how to get a folder."""
    kind = _FILES.get(path.suffix, "a file") if path.is_file() else "neither a file nor a folder"
    hint = f"Wanted is {LAYOUT}, or a hub name."
    if path.suffix in (".safetensors", ".bin") and (path.parent / "config.json").is_file():
        hint = f"Name the folder: {path.parent}"
    elif path.suffix in (".pth", ".pt", ".ckpt"):
        hint += (
            " transformers has a script that converts LAVIS's files, convert_blip_2_original_to_pytorch.py; "
            "Salesforce/blip2-opt-2.7b-coco is LAVIS's blip2_opt2.7b caption_coco, converted."
        )
    elif path.suffix == ".gguf":
        hint = f"Convert it once, with the package gguf: {_CONVERT.format(path.parent, path.name, path.stem)}"
    elif path.suffix in (".zip", ".gz", ".tar"):
        hint = "Unpack it, and name the folder. " + hint
    return Problem(f"{path} is {kind}, not a folder", key=key, hint=hint)


def _not_whole(folder: Path, key: str) -> Problem:
    """The problem of an incomplete folder: what it lacks, or what is no file."""
    if odd := _odd(folder):
        return Problem(f"{odd} is neither a file nor a folder", key=key)
    others = [file.name for file in sorted(folder.iterdir()) if file.suffix in _OTHERS]
    if others:
        found = _no_folder(folder / others[0], key)
        return Problem(
            f"{folder} has no weights that transformers reads, but {others[0]}", key=key, hint=found.hint
        )
    for index in sorted(folder.glob("*.index.json")):
        what = f"{folder} lacks parts that {index.name} names"
        return Problem(what, key=key, hint="The download is incomplete; the same `hf download` continues it.")
    return Problem(f"{folder} has no weights", key=key, hint=f"Wanted is {LAYOUT}.")


def other_kind(found: Checkpoint, wanted: str, key: str) -> Problem | None:
    """The problem of a checkpoint whose `config.json` is not of the model type `wanted`, or None."""
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
