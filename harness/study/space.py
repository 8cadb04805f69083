"""The search space of a study: how a file describes the values of a key, and the points of the space."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field, FiniteFloat, model_validator

from harness.config.schema import Config
from harness.config.sections import Section

FIXED = ("name", "variant", "task", "edition", "score", "predict.splits", "data.fit_on")
"""Keys that no study searches, because they name or compare trials."""

MOST_POINTS = 100_000
"""A space with more points is not listed and counts as infinite."""


class ParameterConfig(Section):
    """The values of one key: a range of numbers, or a list of choices."""

    low: FiniteFloat | None = None
    """Least value."""
    high: FiniteFloat | None = None
    """Greatest value; in the range."""
    log: bool = False
    """Draw evenly on a logarithmic scale."""
    step: FiniteFloat | None = None
    """Only `low`, `low` + `step`, ...; by default 1 for whole numbers, none for others."""
    choices: list[Any] | None = None
    """Instead of a range: these values, of any type that the key takes."""
    when: dict[str, Any] = Field(default_factory=dict)
    """Search this key only if each of these other keys has the given value, or one of the given list."""

    @model_validator(mode="after")
    def _range_or_choices(self) -> "ParameterConfig":
        ranged = self.low is not None and self.high is not None
        if ranged == (self.choices is not None) or (self.choices is not None and self._ranges):
            raise ValueError("give low and high, or choices")
        if self.choices is not None and not self.choices:
            raise ValueError("choices is empty")
        if ranged and self.low >= self.high:
            raise ValueError(f"low {self.low:g} is not below high {self.high:g}")
        if self.step is not None and (self.log or self.step <= 0):
            raise ValueError("a step must be above 0, and can't be used with log")
        if self.log and self.low <= 0:
            raise ValueError(f"low is {self.low:g}; with log it must be above 0")
        return self

    @property
    def _ranges(self) -> bool:
        return bool(self.low is not None or self.high is not None or self.log or self.step)


@dataclass(frozen=True)
class Parameter:
    """One key of the space; `whole` if its values are whole numbers."""

    key: str
    how: ParameterConfig
    whole: bool

    @property
    def path(self) -> tuple[str, ...]:
        """The key split into the names of nested sections."""
        return tuple(self.key.split("."))

    @property
    def step(self) -> float | None:
        """The distance between values; None for a continuous range."""
        return 1 if self.whole and self.how.step is None else self.how.step

    @property
    def ends(self) -> list[tuple[str, Any]]:
        """(key of the file, value) pairs; if these values are valid, all values are."""
        if self.how.choices is not None:
            return [("choices", value) for value in self.how.choices]
        return [("low", self._number(self.how.low)), ("high", self._number(self.how.high))]

    def has(self, value: Any) -> bool:
        """Whether a value of the config is in the space."""
        if self.how.choices is not None:
            return encode(value) in self.encoded
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if not self.how.low <= value <= self.how.high:
            return False
        steps = 0.0 if self.how.log or not self.step else (value - self.how.low) / self.step
        return math.isclose(steps, round(steps), abs_tol=1e-6)

    @property
    def encoded(self) -> list[Any]:
        """The choices as the storage keeps them."""
        return [encode(value) for value in self.how.choices or ()]

    def decode(self, stored: Any) -> Any:
        """The config's value for a stored one."""
        if self.how.choices is None:
            return stored
        found = [value for value in self.how.choices if _same(encode(value), stored)]
        return found[0]

    def values(self) -> list[Any]:
        """All values in order; not for a continuous range."""
        if self.how.choices is not None:
            return list(self.how.choices)
        return [self._number(round(self.how.low + i * self.step, 12)) for i in range(self.count)]

    @property
    def count(self) -> int | float:
        """The number of values; `inf` for a continuous range."""
        if self.how.choices is not None:
            return len(self.how.choices)
        steps = (self.how.high - self.how.low) / self.step if self.step else math.inf
        return math.floor(steps + 1e-9) + 1 if math.isfinite(steps) else math.inf

    @property
    def listable(self) -> bool:
        """Whether `values` can list all values."""
        return self.how.choices is not None or (self.step is not None and not self.how.log)

    def active(self, values: Mapping[str, Any]) -> bool:
        """Whether this key is searched, given the values of other keys."""
        return all(
            key in values and any(_same(encode(values[key]), encode(one)) for one in several(wanted))
            for key, wanted in self.how.when.items()
        )

    def _number(self, value: float) -> Any:
        return int(value) if self.whole and float(value).is_integer() else value


def several(wanted: Any) -> list[Any]:
    """The values of a `when`: one, or a list of them."""
    return wanted if isinstance(wanted, list) else [wanted]


def encode(value: Any) -> Any:
    """A choice as the storage can keep it: lists and mappings become JSON."""
    return json.dumps(value) if isinstance(value, list | tuple | dict) else value


def _same(one: Any, other: Any) -> bool:
    """Whether two values are equal; True does not equal 1."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def is_whole(key: str) -> bool | None:
    """Whether a numeric key of the config takes whole numbers only; None if it is not numeric."""
    schema = Config.model_json_schema()
    node: Mapping[str, Any] = schema
    for name in key.split("."):
        if "items" in node:  # an entry of a list
            node = node["items"]
            continue
        sections = [one["$ref"].rpartition("/")[2] for one in _options(node) if "$ref" in one]
        node = (schema["$defs"][sections[0]] if sections else node)["properties"][name]
    types = {one.get("type") for one in _options(node)}
    return False if "number" in types else True if "integer" in types else None


def _options(node: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return node.get("anyOf", [node])


def ordered(space: Sequence[Parameter]) -> list[Parameter]:
    """The parameters, each after the keys in its `when`; raises `ValueError` for a cycle."""
    waiting, done = list(space), {}
    while waiting:
        ready = [p for p in waiting if set(p.how.when) <= set(done)]
        if not ready:
            raise ValueError(", ".join(p.key for p in waiting))
        done |= {p.key: p for p in ready}
        waiting = [p for p in waiting if p.key not in done]
    return list(done.values())


def points(space: Sequence[Parameter]) -> list[dict[str, Any]] | None:
    """Every point of a space, in the order of its values; None for more than `MOST_POINTS` combinations."""
    if math.prod(parameter.count for parameter in space) > MOST_POINTS:
        return None
    found: dict[str, dict[str, Any]] = {}
    for combination in itertools.product(*(parameter.values() for parameter in space)):
        point: dict[str, Any] = {}
        for parameter, value in zip(space, combination, strict=True):
            if parameter.active(point):
                point[parameter.key] = value
        found.setdefault(name_of(point), point)
    return list(found.values())


def name_of(point: Mapping[str, Any]) -> str:
    """A text that identifies a point; rounding errors do not change it."""
    values = {key: round(v, 12) if isinstance(v, float) else encode(v) for key, v in point.items()}
    return json.dumps(values, sort_keys=True)
