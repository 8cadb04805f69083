"""What scoring keeps on disk: embeddings of texts, and the numbers of rows that are already scored."""

import contextlib
import functools
import hashlib
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from harness.models.checkpoints import contents
from harness.store import fingerprint

EMBEDDING_BYTES = 4_000_000_000
SCORE_BYTES = 500_000_000
VERSION = 2
"""Raise it when a metric's code gives other numbers for the same signature: old entries are then unused."""
PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "sentencepiece",
    "pillow",
    "ftfy",
    "nltk",
    "regex",
    "pycocoevalcap",
)
_ASKED = 500
_TABLE = "CREATE TABLE IF NOT EXISTS kept (key BLOB UNIQUE, value BLOB)"
_UNUSABLE = (sqlite3.DatabaseError, OSError)

_CHECKSUM = 4  # bytes

Row = tuple[str, ...]


def _checksum(value: bytes) -> bytes:
    return zlib.crc32(value).to_bytes(_CHECKSUM, "little")


class Blobs:
    """An SQLite file of byte strings by key, each with its checksum; processes may share it.

    It holds at most `most` bytes; above that, the oldest quarter is deleted. A file that is damaged, locked
    for long or on a full disk makes scoring slower, never different: reads find nothing, writes do nothing.
    """

    def __init__(self, path: Path, most: int):
        self.path, self.most = path, most

    def get(self, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        """The values of the keys that are there and undamaged."""
        found: dict[bytes, bytes] = {}
        asked = list(keys)
        with contextlib.suppress(*_UNUSABLE), self._open() as database:
            for start in range(0, len(asked), _ASKED):
                part = asked[start : start + _ASKED]
                marks = ",".join("?" * len(part))
                for k, value in database.execute(f"SELECT key, value FROM kept WHERE key IN ({marks})", part):
                    content = value[_CHECKSUM:]
                    if _checksum(content) == value[:_CHECKSUM]:
                        found[k] = content
        return found

    def put(self, values: Mapping[bytes, bytes]) -> None:
        """Store the values; delete the oldest if there are too many."""
        with contextlib.suppress(*_UNUSABLE), self._open() as database:
            summed = ((k, _checksum(value) + value) for k, value in values.items())
            database.executemany("INSERT OR REPLACE INTO kept VALUES (?, ?)", summed)
            (used,) = database.execute(
                "SELECT (page_count - freelist_count) * page_size "
                "FROM pragma_page_count, pragma_freelist_count, pragma_page_size"
            ).fetchone()
            if used > self.most:
                oldest = "SELECT rowid FROM kept ORDER BY rowid LIMIT (SELECT count(*) / 4 + 1 FROM kept)"
                database.execute(f"DELETE FROM kept WHERE rowid IN ({oldest})")

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(self.path, timeout=30)) as database, database:
            database.execute(_TABLE)
            yield database


def made_by(device: str) -> list[str]:
    """What else changes the numbers of neural models: the kind of device, and package versions."""
    return [device.partition(":")[0], *versions()]


def versions() -> list[str]:
    """The versions of the packages that compute scores."""
    return [f"{name}:{_version(name)}" for name in PACKAGES]


_version = functools.cache(metadata.version)  # each call reads the package's whole description


def key(*parts: str) -> bytes:
    """A key for texts; ("a", "bc") and ("ab", "c") have different keys."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode(errors="surrogatepass")
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.digest()


@dataclass(frozen=True)
class Embedded:
    """One text: token `ids` (t,), unit-length `vectors` (t, d) float32, and whether it was `cut`."""

    ids: list[int]
    vectors: np.ndarray
    cut: bool


class TextCache:
    """Embedded texts of one encoder on disk; many runs share references, which are embedded only once."""

    def __init__(self, folder: Path, encoder: Path, *how: Any):
        name = f"embeddings-{fingerprint([VERSION, contents(encoder, folder), *how])}.sqlite"
        self.blobs = Blobs(folder / name, EMBEDDING_BYTES)

    def get(self, texts: Sequence[str]) -> dict[str, Embedded]:
        """The embeddings of the texts that are there."""
        keys = {key(text): text for text in texts}
        return {keys[k]: _unpack(value) for k, value in self.blobs.get(keys).items()}

    def put(self, texts: Mapping[str, Embedded]) -> None:
        """Store the embeddings of the texts."""
        self.blobs.put({key(text): _pack(embedded) for text, embedded in texts.items()})


def _pack(embedded: Embedded) -> bytes:
    head = np.array([embedded.cut, len(embedded.ids), *embedded.ids], dtype=np.int32)
    return head.tobytes() + embedded.vectors.tobytes()


def _unpack(value: bytes) -> Embedded:
    cut, count = np.frombuffer(value, dtype=np.int32, count=2).tolist()
    ids = np.frombuffer(value, dtype=np.int32, count=count, offset=8).tolist()
    vectors = np.frombuffer(value, dtype=np.float32, offset=8 + 4 * count)
    return Embedded(ids, vectors.reshape(count, -1), bool(cut))


class Table:
    """Numbers (k,) of rows of text, kept in `folder` for later calls; each distinct row is computed once.

    `what` is all that determines the numbers besides the row: metric, weights, pre-processing, versions.
    `new` are the rows without numbers yet, the longest first.
    """

    def __init__(self, folder: Path | None, what: Any, rows: Sequence[Row]):
        name = fingerprint([VERSION, what])
        self._rows = rows
        self._keys = {row: key(name, *row) for row in dict.fromkeys(rows)}
        self._blobs = Blobs(folder / "scores.sqlite", SCORE_BYTES) if folder else None
        kept = self._blobs.get(self._keys.values()) if self._blobs else {}
        self._known = {row: np.frombuffer(kept[k]) for row, k in self._keys.items() if k in kept}
        new = (row for row in self._keys if row not in self._known)
        self.new = sorted(new, key=lambda row: sum(map(len, row)), reverse=True)

    def add(self, made: Sequence[Sequence[float]]) -> None:
        """Store the numbers (m, k) of `new`."""
        self._known |= zip(self.new, (np.asarray(numbers, float) for numbers in made), strict=True)
        if self._blobs:
            sound = [row for row in self.new if np.isfinite(self._known[row]).all()]
            self._blobs.put({self._keys[row]: self._known[row].tobytes() for row in sound})

    def numbers(self) -> np.ndarray:
        """The numbers (n, k) of all rows, in their order."""
        return np.array([self._known[row] for row in self._rows])
