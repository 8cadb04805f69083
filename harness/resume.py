"""Where a training stands on disk: checkpoints that are whole or do not count, and rows that go with them."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from harness.store import write, write_json

STATE, FINISHED = "state.json", "finished.json"
UNIVERSAL, VALIDATED = "universal", "validated.safetensors"
AFTER = 3
"""The stage after the last."""


@dataclass
class State:
    """Where training stands.

    `done` optimiser steps of `stage` and `step` of all stages are behind; `validated` is false where the
    validation that is due after them is not; `ranks` trained so far, at a ZeRO stage.
    """

    stage: int = 1
    done: int = 0
    step: int = 0
    validated: bool = True
    best: float | None = None
    best_step: int | None = None
    ranks: int = 1
    zero_stage: int = 0


class Checkpoints:
    """The checkpoints of one training, each a folder that is sealed last; only a sealed, whole one counts."""

    def __init__(self, directory: Path, keep: int):
        self.directory, self.folder, self.keep = directory, directory / "checkpoints", keep

    def path(self, state: State) -> Path:
        """The folder of the checkpoint of a state."""
        return self.folder / f"step{state.step:08d}"

    def start(self, stage: int) -> Path:
        """The weights that a stage starts from: its checkpoints hold only what it trains."""
        return self.folder / f"stage{stage}.safetensors"

    def newest(self) -> State:
        """The state of the newest whole checkpoint, or the first; one that was cut short is passed over."""
        finished = self.directory / FINISHED
        if finished.exists():
            return State(**json.loads(finished.read_text()))
        for folder in sorted(self.folder.glob("step*"), reverse=True):
            seal = folder / STATE
            if seal.exists():
                content = json.loads(seal.read_text())
                if content["files"] == _sizes(folder):
                    return State(**content["state"])
        return State()

    def seal(self, state: State) -> None:
        """Say that a state's checkpoint is whole, or what happened since; drop all but the last ones."""
        folder = self.path(state)
        write_json(folder / STATE, {"state": asdict(state), "files": _sizes(folder)})
        for old in sorted(self.folder.glob("step*"), reverse=True)[self.keep :]:
            shutil.rmtree(old, ignore_errors=True)

    def finish(self, state: State) -> None:
        """Say that nothing is left to train, and delete them all."""
        state.stage = AFTER
        write_json(self.directory / FINISHED, asdict(state))
        shutil.rmtree(self.folder, ignore_errors=True)


def _sizes(folder: Path) -> dict[str, int]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and STATE not in path.name)
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def forget_rows_after(file: Path, state: State) -> None:
    """Drop the rows of what will be done again, and a row that an interruption cut in two."""
    if file.exists():
        rows = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
        last = state.step if state.validated else state.step - 0.5
        kept = [row for row in rows if row["step"] <= (last if "valid_loss" in row else state.step)]
        write(file, "".join(json.dumps(row) + "\n" for row in kept))
