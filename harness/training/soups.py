"""Greedy soups: the average of those weights that together score best (Wortsman et al., ICML 2022)."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import field_validator

from harness.config.sections import Images, Section


class SoupConfig(Section):
    """Average weights of finished runs in place of training: those that raise the score; `null` turns it off.

    The runs must start from one initialisation: they have the same `model` and checkpoints.
    """

    runs: tuple[str, ...]
    """Finished runs, `<experiment>/<variant>-s<seed>` as under runs/.

    All weights that `train.keep_best` kept of them are candidates.
    """
    half: bool = True
    """Choose on the half `tune` of the validation images only, so that the other half shows the gain."""
    images: Images = 1000
    """Most validation images that are captioned (greedily) and scored for each trial."""

    @field_validator("runs")
    @classmethod
    def _distinct(cls, runs: tuple[str, ...]) -> tuple[str, ...]:
        if not runs:
            raise ValueError("got no run; name at least one")
        if again := [name for name in dict.fromkeys(runs) if runs.count(name) > 1]:
            raise ValueError(f"{', '.join(again)} is named twice")
        return runs


@dataclass(frozen=True)
class Trial:
    """One average: candidates by number, its score, and the `best` score before it."""

    members: tuple[int, ...]
    score: float
    best: float

    @property
    def kept(self) -> bool:
        """Whether the last member stays: the score does not fall, so a tie keeps it."""
        return self.score >= self.best


@dataclass(frozen=True)
class Soup:
    """What `greedy` chose: `members` by number, the scores of all candidates alone, and its trials."""

    members: tuple[int, ...]
    alone: Sequence[float]
    trials: Sequence[Trial]


def greedy(candidates: int, score: Callable[[tuple[int, ...]], float]) -> Soup:
    """Start with the best candidate and add the others in the order of their scores, if the score holds.

    `score` scores the average of some candidates. Equal candidates are tried in their order.
    """
    alone = [score((number,)) for number in range(candidates)]
    order = sorted(range(candidates), key=lambda number: -alone[number])
    members, best, trials = (order[0],), alone[order[0]], []
    for number in order[1:]:
        trial = Trial((*members, number), score((*members, number)), best)
        trials.append(trial)
        if trial.kept:
            members, best = trial.members, trial.score
    return Soup(members, alone, trials)


def described(found: Mapping[str, Any]) -> str:
    """What is in a soup and how it was chosen, in words, from a run's record."""
    where = f"the half {found['half']} of validation" if found.get("half") else "validation"
    metric, count = found["metric"] + "*" * (not found.get("official")), len(found["members"])
    which = f"the average of {count} of {len(found['candidates'])} weights ({', '.join(found['members'])})"
    return f"{which}, chosen by {metric} on {found['n']} images of {where}"


def shapes(file: Path) -> dict[str, list[int]]:
    """The shape of each weight in a safetensors file, from its header. Raises `ValueError` if it has none."""
    with file.open("rb") as content:
        header = json.loads(content.read(int.from_bytes(content.read(8), "little")))
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}


def differing(one: Mapping[str, object], other: Mapping[str, object]) -> list[str]:
    """The keys whose values differ, or that only one of the two has."""
    return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
