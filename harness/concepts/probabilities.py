"""The probabilities of concepts as a file: what a predictor leaves for thresholds and ensembles."""

import io
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from harness.errors import Problem, UserError
from harness.store import write

PROBABILITIES = "probabilities.npz"
_UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    TypeError,
    NotImplementedError,
    BadZipFile,
    zlib.error,
)
_ARRAYS = ("labels", "ids", "values")


@dataclass(frozen=True)
class Probabilities:
    """How probable each concept is in each image: `values` float32 (N, L) of `ids` (N) and `labels` (L).

    A probability of 0 is that of a concept that is never given.
    """

    labels: tuple[str, ...]
    ids: tuple[str, ...]
    values: np.ndarray

    def of(self, ids: Sequence[str]) -> "Probabilities":
        """The rows of these images, in this order; raises `KeyError` for an unknown id."""
        row = {image: number for number, image in enumerate(self.ids)}
        return Probabilities(self.labels, tuple(ids), self.values[[row[image] for image in ids]])


def write_probabilities(path: Path, found: Probabilities) -> Path:
    """Write .npz with `labels`, `ids` and `values`, whole or nothing; raises `UserError` if one is wrong."""
    if faults := _faults(found.labels, found.ids, found.values):
        raise UserError([Problem(fault, path) for fault in faults], exit_code=1)
    content = io.BytesIO()
    arrays = {"labels": np.array(found.labels, dtype=str), "ids": np.array(found.ids, dtype=str)}
    np.savez_compressed(content, **arrays, values=np.ascontiguousarray(found.values, dtype=np.float32))
    return write(path, content.getvalue())


def read_probabilities(
    path: Path, labels: Sequence[str] | None = None, ids: Sequence[str] | None = None
) -> Probabilities:
    """Read what `write_probabilities` wrote; with `ids`, the rows are in their order.

    Raises `UserError` if the file is damaged, has other `labels` or lacks an id, and if a number is no
    probability.
    """
    hint = "Delete it and run the experiment again."
    try:
        with np.load(path, allow_pickle=False) as content:
            lacking = [name for name in _ARRAYS if name not in content.files]
            arrays = {name: content[name] for name in _ARRAYS if name not in lacking}
    except _UNREADABLE as error:
        raise UserError([Problem(f"can't be read: {error}", path, hint=hint)], exit_code=1) from None
    if lacking:
        what = f"has no array {', '.join(lacking)}; probabilities have {', '.join(_ARRAYS)}"
        raise UserError([Problem(what, path, hint=hint)], exit_code=1)
    if faults := _faults(arrays["labels"], arrays["ids"], arrays["values"]):
        raise UserError([Problem(fault, path, hint=hint) for fault in faults], exit_code=1)
    found = Probabilities(tuple(arrays["labels"].tolist()), tuple(arrays["ids"].tolist()), arrays["values"])
    if labels is not None and tuple(labels) != found.labels:
        raise UserError([Problem(_other_labels(found.labels, labels), path, hint=hint)], exit_code=1)
    return found if ids is None else _in_order(found, ids, path)


def aligned(
    given: Sequence[Probabilities], names: Sequence[str]
) -> tuple[tuple[str, ...], list[np.ndarray], list[str]]:
    """The union of the labels of several runs, the values (N, L) of each on it, and notes on what differs.

    Rows are those of the first run. A concept that a run does not know has the probability 0 there, and a
    note says so. `names` are those of the runs, for errors. Raises `UserError` if the images differ.
    """
    first = given[0]
    union = tuple(dict.fromkeys(cui for one in given for cui in one.labels))
    values, notes = [], []
    for one, name in zip(given, names, strict=True):
        same = _in_order(one, first.ids, name, f"those of {names[0]}")
        place = {cui: number for number, cui in enumerate(union)}
        full = np.zeros((len(first.ids), len(union)), dtype=np.float32)
        full[:, [place[cui] for cui in one.labels]] = same.values
        values.append(full)
        if absent := len(union) - len(one.labels):
            notes.append(
                f"{name} does not know {absent:,} of {len(union):,} concepts; their probability is 0"
            )
    return union, values, notes


def _faults(labels: Sequence[str], ids: Sequence[str], values: np.ndarray) -> list[str]:
    """What is wrong with the three arrays."""
    faults = []
    for name, given in (("label", labels), ("id", ids)):
        array = np.asarray(given)
        if array.ndim != 1 or (array.size and array.dtype.kind != "U"):
            return [f"{name}s are no list of texts, but {array.dtype} {array.shape}"]
        distinct, counts = np.unique(array, return_counts=True)
        if (again := counts > 1).any():
            faults.append(f"{again.sum():,} {name}s are listed twice, the first {distinct[again][0]}")
    wanted = (len(ids), len(labels))
    if values.shape != wanted or values.dtype.kind != "f":
        got = f"{values.dtype} {values.shape}"
        return [*faults, f"values are {got}; float32 {wanted} is allowed, for images and labels"]
    if (bad := ~np.isfinite(values).all(axis=1)).any():
        of = f"of {bad.sum():,} of {len(ids):,} images"
        faults.append(f"probabilities {of} are not finite, the first {ids[bad.argmax()]}")
    elif (bad := ((values < 0) | (values > 1)).any(axis=1)).any():
        row = bad.argmax()
        odd = next(value for value in values[row].tolist() if not 0 <= value <= 1)
        of = f"of {bad.sum():,} of {len(ids):,} images"
        faults.append(f"probabilities {of} are outside 0 to 1, the first {odd:g} of {ids[row]}")
    return faults


def _other_labels(found: Sequence[str], wanted: Sequence[str]) -> str:
    lacking, more = len(set(wanted) - set(found)), len(set(found) - set(wanted))
    if not lacking and not more:
        return f"has the {len(wanted):,} labels of this run in another order"
    return f"has other labels: it lacks {lacking:,} of the {len(wanted):,} here, and has {more:,} others"


def _in_order(found: Probabilities, ids: Sequence[str], place: str | Path, whose: str = "") -> Probabilities:
    if found.ids == tuple(ids):
        return found
    known = set(found.ids)
    lacking = [image for image in ids if image not in known]
    if lacking or len(found.ids) != len(ids):
        more = len(known - set(ids))
        what = f"has other images than {whose or 'wanted'}: it lacks {len(lacking):,} of {len(ids):,}"
        what += f" (first {lacking[0]})" if lacking else ""
        what += f" and has {more:,} others"
        raise UserError([Problem(what, place, hint="Name runs on the same data.")])
    return found.of(ids)
