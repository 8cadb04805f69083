"""Checks of files of weights without torch, and without running code or allocating memory for them."""

import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

OUTLINE_BYTES = 200_000_000
"""Maximum size of an outline; names and shapes of every model need less."""
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The first bytes of files of `torch.save` before 1.6, which are not zip files."""


class Flawed(Exception):
    """Raised for a file that is incomplete or does not hold weights; the message is the reason."""


def check_weights(file: Path) -> None:
    """Raise `Flawed` if a `.safetensors` or `.bin` file is not a complete mapping of names to weights."""
    if file.suffix == ".safetensors":
        _check_safetensors(file)
    elif not _is_legacy(file):
        content = read_pickle(file)
        if isinstance(content, Stored) or not isinstance(content, dict) or not content:
            raise Flawed("holds no weights by their names")
        others = [name for name, value in content.items() if not isinstance(value, Stored)]
        if others:
            kind = "a whole training" if "state_dict" in content else "other things than weights"
            raise Flawed(f"holds {kind}: {', '.join(map(str, others[:3]))}")


def read_pickle(file: Path) -> Any:
    """The plain values of a file of `torch.save`, with `Stored` in place of every object.

    Imports and calls nothing that the file names. Raises `Flawed`.
    """
    try:
        with zipfile.ZipFile(file) as parts:
            packed = [part.filename for part in parts.infolist() if part.compress_type != zipfile.ZIP_STORED]
            if packed:
                raise Flawed(f"is a compressed zip, which torch does not write ({packed[0]})")
            outlines = [part for part in parts.infolist() if part.filename.endswith("/data.pkl")]
            if len(outlines) != 1:
                raise Flawed("is a zip and holds no weights of torch")
            if outlines[0].file_size > OUTLINE_BYTES:
                raise Flawed("has an outline of more than 200 MB")
            content = parts.read(outlines[0])
    except zipfile.BadZipFile:
        raise Flawed("is not a complete file of torch.save") from None
    try:
        return _Outline(io.BytesIO(content)).load()
    except Exception as error:  # hostile bytes can raise any exception
        raise Flawed(f"has a damaged outline ({type(error).__name__})") from None


class Stored(dict):
    """Replaces any object in a pickle; as a dict it keeps the names of weights."""

    def __init__(self, *_: Any):
        pass

    def __call__(self, *_: Any) -> "Stored":
        return Stored()

    def __setstate__(self, _: Any) -> None:
        pass

    def extend(self, _: Any) -> None:
        """Ignore the items of a list."""

    append = extend
    __hash__ = object.__hash__


class _Mapping(dict):
    """Replaces `OrderedDict`; it can have attributes too."""


# in Python, because the unpickler in C allocates as many entries as a file claims to have
class _Outline(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _Mapping if (module, name) == ("collections", "OrderedDict") else Stored

    def persistent_load(self, identity: Any) -> Any:
        return Stored()


def _is_legacy(file: Path) -> bool:
    with file.open("rb") as content:
        return content.read(len(_LEGACY)) == _LEGACY


def _check_safetensors(file: Path) -> None:
    size = file.stat().st_size
    with file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        if length > min(size - 8, OUTLINE_BYTES):
            raise Flawed("is not a complete safetensors file")
        header = content.read(length)
    try:
        entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, AttributeError, LookupError, TypeError, RecursionError):
        raise Flawed("has a damaged header") from None
    if end != size - 8 - length:
        raise Flawed(f"is cut short or too long: its header names {end} bytes of weights")
    if not entries:
        raise Flawed("holds no weights")
