"""Embeddings of texts on disk, so that references shared by many runs are embedded once."""

import contextlib
import hashlib
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.store import fingerprint

MOST_BYTES = 4_000_000_000
_ASKED = 500
_TABLE = "CREATE TABLE IF NOT EXISTS texts (key BLOB UNIQUE, ids BLOB, vectors BLOB, cut INT)"
_UNUSABLE = (sqlite3.DatabaseError, OSError)


@dataclass(frozen=True)
class Embedded:
    """One text: token `ids` (t,), unit-length `vectors` (t, d) float32, whether it was `cut` to fit."""

    ids: list[int]
    vectors: np.ndarray
    cut: bool


class TextCache:
    """A SQLite file of embedded texts for one encoder; processes may share it.

    It holds at most `MOST_BYTES`, the oldest quarter leaves first. A file that is damaged, locked for long or
    on a full disk makes scoring slower, never different: reads find nothing, writes are left out.
    """

    def __init__(self, folder: Path, encoder: Path, layer: int):
        files = sorted(file for file in encoder.iterdir() if file.is_file())
        states = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        self.path = folder / f"embeddings-{fingerprint([str(encoder.resolve()), layer, states])}.sqlite"

    def get(self, texts: Sequence[str]) -> dict[str, Embedded]:
        """The texts that are there."""
        keys = {_key(text): text for text in texts}
        found = {}
        with contextlib.suppress(*_UNUSABLE), self._open() as database:
            asked = list(keys)
            for start in range(0, len(asked), _ASKED):
                part = asked[start : start + _ASKED]
                marks = ",".join("?" * len(part))
                for key, *values in database.execute(f"SELECT * FROM texts WHERE key IN ({marks})", part):
                    found[keys[key]] = _unpack(*values)
        return found

    def put(self, texts: Mapping[str, Embedded]) -> None:
        """Keep the texts, making room where they would be too many."""
        rows = [
            (_key(t), np.array(e.ids, dtype=np.int32).tobytes(), e.vectors.tobytes(), e.cut)
            for t, e in texts.items()
        ]
        with contextlib.suppress(*_UNUSABLE), self._open() as database:
            database.executemany("INSERT OR IGNORE INTO texts VALUES (?, ?, ?, ?)", rows)
            (used,) = database.execute(
                "SELECT (page_count - freelist_count) * page_size "
                "FROM pragma_page_count, pragma_freelist_count, pragma_page_size"
            ).fetchone()
            if used > MOST_BYTES:
                oldest = "SELECT rowid FROM texts ORDER BY rowid LIMIT (SELECT count(*) / 4 + 1 FROM texts)"
                database.execute(f"DELETE FROM texts WHERE rowid IN ({oldest})")

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(self.path, timeout=30)) as database, database:
            database.execute(_TABLE)
            yield database


def _key(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()


def _unpack(ids: bytes, vectors: bytes, cut: int) -> Embedded:
    tokens = np.frombuffer(ids, dtype=np.int32).tolist()
    return Embedded(tokens, np.frombuffer(vectors, dtype=np.float32).reshape(len(tokens), -1), bool(cut))
