"""Early stopping: when `train.patience` or `stop_when` ends a stage, and which stages they ended."""

from collections.abc import Iterable, Mapping
from typing import Any

from harness.training.resume import State, fallen, floors
from harness.training.schedule import Stage, stages
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


def fallen_in(stage: Stage, rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, float, float]]:
    """The scores that end a self-critical stage (`RewardConfig.stop_when`): name, value and floor."""
    watched = stage.reward.stop_when if stage.reward else ()
    return [one for one in fallen(rows, stage.number) if one[0] in watched]


def floors_of(stage: Stage, rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The floors of the scores that may end a self-critical stage, by name."""
    watched = stage.reward.stop_when if stage.reward else ()
    return {name: floor for name, floor in floors(rows, stage.number).items() if name in watched}


def ended(config: TrainConfig, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each stage in the rows of a `losses.jsonl`: its last epoch, its planned epochs, and why it ended.

    A stage that goes on is left out.
    """
    rows = [row for row in rows if "valid_loss" in row and "stage" in row]
    last, found = {row["stage"]: row for row in rows}, []
    for stage in stages(config):
        row = last.get(stage.number, {})
        if not row.get("epoch"):  # it has not begun, or was only validated at its start
            continue
        if row["epoch"] == stage.epochs:
            why = _ALL
        elif is_over(config, row.get(WAITED)):
            many = "s" * (config.patience > 1)
            why = f"{config.patience} validation{many} without a better score (train.patience)"
        elif below := fallen_in(stage, rows):
            why = ", ".join(f"{name} fell to {value:.4f}, below {floor:.4f}" for name, value, floor in below)
            why += " (stop_when)"
        else:
            continue
        found.append({"stage": stage.number, "epoch": row["epoch"], "epochs": stage.epochs, "why": why})
    return found


def enders(config: TrainConfig) -> list[str]:
    """The keys that may end a stage early."""
    watches = any(stage.reward and stage.reward.stop_when for stage in stages(config))
    return [*["train.patience"] * bool(config.patience), *["stop_when"] * watches]


def at_most(config: TrainConfig) -> str:
    """What follows a forecast of time or steps, which is of all planned epochs."""
    names = " or ".join(enders(config))
    return f", or less if {names} ends a stage early" if names else ""


def described(found: Iterable[Mapping[str, Any]]) -> list[str]:
    """A sentence for each stage of `ended` that ended early."""
    return [
        f"stage {one['stage']} ended after epoch {one['epoch']:.4g} of {one['epochs']}: {one['why']}"
        for one in found
        if one["epoch"] < one["epochs"]
    ]


def saved(found: Iterable[Mapping[str, Any]]) -> float:
    """The epochs that the stages of `ended` leave out."""
    return sum(one["epochs"] - one["epoch"] for one in found)
