"""The state of a training on disk: its complete checkpoints and the rows of its losses."""

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness.store import bytes_of, parsed, read_checked, write, write_json

BEST, LOSSES = "best.safetensors", "losses.jsonl"
STATE, FINISHED = "state.json", "finished.json"
UNIVERSAL, VALIDATED = "universal", "validated.safetensors"
KEPT = "best.json"
"""The list of the kept weights, best first: file, step, stage, epoch, score, and whether of `train.ema`."""
PRIMARY = "valid_primary"
"""The validation score that chooses the best weights."""
EMA = "ema_"
"""Begins the names of the average's validation scores."""
VALIDATION = ("valid_", f"{EMA}valid_")
"""Begin the names of validation scores in a `losses.jsonl`."""
FLOOR = "floor_"
"""In the row of a validation at the start of a stage: below this number, the score of that name ends it."""
SAMPLED = ("reward", "reward_baseline", "distinct_samples", "sample_length", "sample_entropy")
"""Columns of the steps of self-critical stages, about their samples."""
LATEST = "latest"
"""The file that names the newest checkpoint for DeepSpeed's own tools."""


@dataclass
class State:
    """The progress of a training.

    `done` optimiser steps of `stage` are finished, and `step` steps of all stages. `validated` is false if
    the validation after them is still due. `ranks` and `zero_stage` are those of the last checkpoint. `ended`
    is true if nothing is left to train; then `kept` is the number of files of the best weights. `stage_best`
    is the best score of the stage, and `waited` counts the validations since then; see `patience`.
    """

    stage: int = 1
    done: int = 0
    step: int = 0
    validated: bool = True
    best: float | None = None
    best_step: int | None = None
    ranks: int = 1
    zero_stage: int = 0
    ended: bool = False
    kept: int = 1
    stage_best: float | None = None
    waited: int = 0


class Checkpoints:
    """The checkpoints of one training; each is a folder, and counts only after `seal` and with all files."""

    def __init__(self, directory: Path, keep: int):
        self.directory, self.folder, self.keep = directory, directory / "checkpoints", keep

    def path(self, state: State) -> Path:
        """The folder of a state's checkpoint."""
        return self.folder / f"step{state.step:08d}"

    def start(self, stage: int) -> Path:
        """The file of the weights that a stage starts from; checkpoints hold only what their stage trains."""
        return self.folder / f"stage{stage}.safetensors"

    def newest(self) -> State:
        """The state of the newest complete checkpoint, or the initial state; incomplete ones are ignored.

        A training that has ended starts again if its weights or its losses are missing.
        """
        ended = _state(_read(self.directory / FINISHED))
        files = [LOSSES, *(one["file"] for one in kept(self.directory))]
        if ended and len(files) > ended.kept and all((self.directory / name).is_file() for name in files):
            return ended
        for folder in sorted(self.folder.glob("step*"), reverse=True):
            if state := _sealed(folder):
                return state
        return State()

    def damaged(self, newest: State) -> list[str]:
        """The names of later checkpoints that were sealed and can't be used any more."""
        first = self.path(newest).name
        later = sorted(folder for folder in self.folder.glob("step*") if folder.name > first)
        return [folder.name for folder in later if (folder / STATE).exists()]

    def seal(self, state: State) -> None:
        """Mark a state's checkpoint as complete, or update its state; delete all but the last whole ones."""
        folder = self.path(state)
        write_json(folder / STATE, {"state": asdict(state), "files": _sizes(folder)})
        # later ones are what a killed process left; they are written again
        found = sorted(path for path in self.folder.glob("step*") if path.name <= folder.name)
        whole = [path for path in found if _sealed(path)][-self.keep :]
        for old in [path for path in found if path not in whole]:
            shutil.rmtree(old, ignore_errors=True)

    def finish(self, state: State) -> None:
        """Record that nothing is left to train, and delete all checkpoints."""
        state.ended = True
        write_json(self.directory / FINISHED, asdict(state))
        shutil.rmtree(self.folder, ignore_errors=True)


def kept(directory: Path) -> list[dict[str, Any]]:
    """The entries of `KEPT`; without it, as in earlier versions, one with the file of the best weights."""
    found = read_checked(directory / KEPT)
    whole = isinstance(found, list) and all(isinstance(one, dict) and "file" in one for one in found)
    return found if whole and found else [{"file": BEST}]


def described(best: Mapping[str, Any]) -> str | None:
    """The origin of the best weights in words, from an entry of `kept`; None if it is not known."""
    if best.get("step") is None:
        return None
    which = "the average of train.ema" if best.get("average") else "the trained weights"
    epoch = best.get("epoch")
    epoch = epoch if epoch is None else f"{epoch:.4g}"
    return f"{which} after step {best['step']} (stage {best.get('stage')}, epoch {epoch})"


def _read(file: Path) -> dict[str, Any]:
    """The JSON mapping in a file; empty if the file is missing or damaged."""
    try:
        content = json.loads(bytes_of(file))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _state(values: Any) -> State | None:
    """The state with these values of `asdict`; None if they are not valid."""
    known = asdict(State())
    if not values or not isinstance(values, dict) or not values.keys() <= known.keys():
        return None
    optional = {"best": float, "best_step": int, "stage_best": float}
    for key, value in values.items():
        wanted = optional.get(key) or type(known[key])
        if type(value) is not wanted and not (key in optional and value is None):
            return None
    return State(**values)


def _sealed(folder: Path) -> State | None:
    """The state of a checkpoint; None if it was not sealed, or if its files have other sizes since."""
    content = _read(folder / STATE)
    return _state(content.get("state")) if content.get("files") == _sizes(folder) else None


def _sizes(folder: Path) -> dict[str, int]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and STATE not in path.name)
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def _begins_again(row: Mapping[str, Any], state: State) -> bool:
    """Whether the stage that a validation was the start of has no checkpoint yet, so it starts once more."""
    return (row.get("stage", 0), 1) > (state.stage, state.done)


def rows_of(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a `losses.jsonl`, numbers by name, without incomplete or damaged rows."""
    for line in file.read_bytes().splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            row = parsed(line)
            numbers = isinstance(row, dict) and all(isinstance(n, int | float | None) for n in row.values())
            if numbers and isinstance(row.get("step"), int):
                yield row


def losses_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The names of the training losses in rows of a `losses.jsonl`; the first is `loss`, their sum."""
    names = dict.fromkeys(name for row in rows if "loss" in row for name in row if name.endswith("_loss"))
    return ["loss", *names]


def floors(rows: Iterable[Mapping[str, Any]], stage: int) -> dict[str, float]:
    """The floors of scores, by their name, that the validation at the start of a stage has set."""
    own = [row for row in rows if row.get("stage") == stage]
    return {name.removeprefix(FLOOR): row[name] for row in own for name in row if name.startswith(FLOOR)}


def fallen(rows: Iterable[Mapping[str, Any]], stage: int) -> list[tuple[str, float, float]]:
    """The scores of a stage's last validation that are below their floors: name, value and floor."""
    own = [row for row in rows if row.get("stage") == stage and "valid_loss" in row]
    found = [(name, own[-1].get(f"valid_{name}"), floor) for name, floor in floors(own, stage).items()]
    return [(name, value, floor) for name, value, floor in found if value is not None and value < floor]


def forget_rows_after(file: Path, state: State) -> None:
    """Delete the rows of steps that will be repeated, and a row that an interruption left incomplete."""
    if file.exists():
        rows = list(rows_of(file))
        last = state.step if state.validated else state.step - 0.5
        kept = [row for row in rows if row["step"] <= (last if "valid_loss" in row else state.step)]
        kept = [row for row in kept if row.get("epoch") != 0 or not _begins_again(row, state)]
        write(file, "".join(json.dumps(row) + "\n" for row in kept))
