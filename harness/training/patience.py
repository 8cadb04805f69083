"""Early stopping: when `train.patience` ends a stage, and which stages it ended."""

from collections.abc import Iterable, Mapping
from typing import Any

from harness.training.resume import State
from harness.training.schedule import stages
from harness.training.settings import TrainConfig

WAITED = "waited"
"""In a row of `losses.jsonl`: how many validations of the stage came after the one with its best score."""
_ALL = "all epochs are done"


def begin(state: State) -> None:
    """Start to count anew, because each stage counts its own validations."""
    state.stage_best, state.waited = None, 0


def count(state: State, score: float) -> None:
    """Count a validation with this primary score; a score that equals the stage's best is not better."""
    if state.stage_best is None or score > state.stage_best:
        state.stage_best, state.waited = score, 0
    else:
        state.waited += 1


def is_over(config: TrainConfig, waited: float | None) -> bool:
    """Whether a stage ends after so many validations without a better score."""
    return bool(config.patience) and waited is not None and waited >= config.patience


def ends_early(config: TrainConfig, row: Mapping[str, Any]) -> bool:
    """Whether a stage ends with this row of a `losses.jsonl`, before all its epochs are done."""
    return is_over(config, row.get(WAITED)) and row["epoch"] < config.stages[row["stage"] - 1].epochs


def ended(config: TrainConfig, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each stage in the rows of a `losses.jsonl`: its last epoch, its planned epochs, and why it ended.

    A stage that goes on is left out.
    """
    last = {row["stage"]: row for row in rows if "valid_loss" in row and "stage" in row}
    found = []
    for stage in stages(config):
        row = last.get(stage.number, {})
        if ends_early(config, row):
            why = f"{config.patience} validations without a better score (train.patience)"
        elif row.get("epoch") == stage.epochs:
            why = _ALL
        else:
            continue
        found.append({"stage": stage.number, "epoch": row["epoch"], "epochs": stage.epochs, "why": why})
    return found


def at_most(config: TrainConfig) -> str:
    """What follows a forecast of time or steps, which is of all planned epochs."""
    return ", or less if train.patience ends a stage early" if config.patience else ""


def told(found: Iterable[Mapping[str, Any]]) -> list[str]:
    """A sentence for each stage of `ended` that ended early."""
    return [
        f"stage {one['stage']} ended after epoch {one['epoch']} of {one['epochs']}: {one['why']}"
        for one in found
        if one["epoch"] < one["epochs"]
    ]


def saved(found: Iterable[Mapping[str, Any]]) -> int:
    """The epochs that the stages of `ended` leave out."""
    return sum(one["epochs"] - one["epoch"] for one in found)
