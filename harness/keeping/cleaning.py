"""What can be deleted: runs with their submissions, and steps and caches that no run needs.

Runs share equal steps. So a run that is deleted leaves its steps, and a step can go when no record names it.
The record of an unfinished run names the steps that are still to come, too.
"""

import contextlib
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import records
from harness.errors import Problem, UserError
from harness.keeping.listing import size
from harness.records.status import alive, status_of
from harness.store import DONE, RUNS
from harness.tracking.bookkeeping import mirrored_as

SUBMISSIONS = "submissions"
_GOING = ".deleted-"
"""Begins the name of a folder that is being deleted."""
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)\.tmp")
"""The names that `store.write` gives to files that are not complete."""


@dataclass(frozen=True)
class Item:
    """A folder or file that can be deleted; `size` in bytes."""

    path: Path
    kind: str
    size: int


@dataclass(frozen=True)
class Removal:
    """A run that is to be deleted: its folders, and in words what stays."""

    run: str
    folders: Sequence[Path]
    size: int
    stays: Sequence[str]


# --- Runs ------------------------------------------------------------------------------------------------


def removals(runs: Sequence[Path], root: Path = RUNS) -> list[Removal]:
    """What deleting these runs deletes, given by name or folder.

    Raises `UserError` with all that are not there or are being computed.
    """
    problems, found = [], []
    for given in dict.fromkeys(runs):
        folder = given if given.is_dir() else root / given
        try:
            record = records.read(folder)
        except UserError as error:
            problems += error.problems
            continue
        if status_of(record, None) == "RUNNING":
            what = f"is being computed by process {record.get('pid')} on {record.get('host')}"
            problems.append(Problem(what, folder, hint="Stop it first; it continues with the same command."))
        else:
            found.append(folder)
    if problems:
        raise UserError(problems)
    return [_removal(folder, root, found) for folder in found]


def _removal(folder: Path, root: Path, others: Sequence[Path]) -> Removal:
    record = records.read(folder)
    name = records.full_name(record)
    submissions = records.root(folder, record).parent / SUBMISSIONS / name
    folders = [folder, *([submissions] if submissions.is_dir() else [])]
    left = unneeded_steps(root, without=others)
    own = {root / place for place in record.get("steps", {}).values()}
    freed = [item for item in left if item.path in own]
    stays = []
    if own - {item.path for item in freed}:
        stays.append("the steps that other runs share")
    if freed:
        stays.append(f"steps that no run needs then; harness gc deletes them: {len(freed)}")
    if mirrored_as(folder):
        stays.append("its run in MLflow, which mlflow ui can delete")
    stays += [f"{user}, which names this run in its config" for user in _users(name, root)]
    return Removal(name, folders, sum(map(size, folders)), stays)


def _users(name: str, root: Path) -> list[str]:
    """The runs whose config names a run."""

    def strings(value: object) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            for inner in value.values():
                yield from strings(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from strings(inner)

    found, _ = records.read_all(records.below(root), ("variant", "seed"))
    return [records.full_name(record) for _, record in found if name in strings(record["config"])]


def remove(removal: Removal) -> None:
    """Delete the folders of a run; a killed process leaves the run whole, or without its submissions."""
    for folder in reversed(removal.folders):
        _delete(folder)


# --- Steps and caches ------------------------------------------------------------------------------------


def unneeded(root: Path = RUNS) -> list[Item]:
    """What no run needs: steps, checkpoints in finished steps, caches and what killed processes left.

    Caches that are made again from images count only if all runs have finished. Raises `UserError` if a
    record can't be read, since nobody knows which steps it needs.
    """
    found = [*unneeded_steps(root), *_left_in_steps(root)]
    known, _ = records.read_all(_records(root))
    if all(status_of(record, None) in ("FINISHED", "PRUNED") for _, record in known):
        caches = root / "cache"
        found += [_item(file, "decoded images") for file in sorted(caches.glob("pixels-*.npy"))]
        found += [_item(place, "compiled code") for place in caches.glob("compiled")]
    for place in sorted(root.rglob(".*")):
        name = _TEMPORARY.fullmatch(place.name)
        if place.name.startswith(_GOING) or (name and not alive(int(name["pid"]))):
            found.append(_item(place, "left by a killed process"))
    return found


def unneeded_steps(root: Path = RUNS, without: Sequence[Path] = ()) -> list[Item]:
    """The steps that no record names, except those of the runs `without`.

    Raises `UserError` if a record can't be read.
    """
    found, left_out = records.read_all(_records(root))
    if left_out:
        hint = "Then it is known again which steps it needs."
        raise UserError([*left_out], hint)
    gone = {folder.resolve() for folder in without}
    needed = {
        (root / place).resolve()
        for folder, record in found
        if folder.resolve() not in gone
        for place in (*record.get("steps", {}).values(), *record.get("planned", ()))
    }
    steps = (place for place in sorted((root / "steps").glob("*-*/")) if not place.name.startswith("."))
    return [_item(place, "step") for place in steps if place.resolve() not in needed]


def delete(items: Sequence[Item], root: Path = RUNS) -> tuple[list[Item], list[Item]]:
    """Delete what is still unneeded -> what was deleted, and what a process uses or needs by now."""
    still = {item.path for item in unneeded(root)}
    done, kept = [], []
    for item in items:
        ours = item.path in still and _delete_unused(item.path)
        (done if ours else kept).append(item)
    return done, kept


def _delete_unused(path: Path) -> bool:
    """Delete a path unless a process holds its lock."""
    from filelock import FileLock, Timeout

    lock = path.with_suffix(".lock")
    try:
        with FileLock(lock, timeout=0) if lock.exists() else contextlib.nullcontext():
            _delete(path)
    except Timeout:
        return False
    return True


def _delete(path: Path) -> None:
    """Delete a file or a folder; a folder gets another name first, so that no half of it looks whole."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    going = path if path.name.startswith(_GOING) else path.with_name(f"{_GOING}{path.name}")
    if going != path:
        shutil.rmtree(going, ignore_errors=True)
        path.rename(going)
    shutil.rmtree(going)


def _records(root: Path) -> list[Path]:
    return [*records.below(root), *records.archived(root)]


def _left_in_steps(root: Path) -> Iterator[Item]:
    """Checkpoints in finished trainings, where a killed process has left them."""
    for place in sorted((root / "steps").glob("train-*/checkpoints")):
        if (place.parent / DONE).exists():
            yield _item(place, "checkpoints")


def _item(path: Path, kind: str) -> Item:
    return Item(path, kind, size(path))
