"""What a step may read. The step's fingerprint is computed from the canonical form of `Inputs`."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.config.sections import Section
from harness.data import Dataset
from harness.data.listing import Example

if TYPE_CHECKING:
    from harness.config.schema import Config
    from harness.steps.base import Step
    from harness.steps.plan import Plan


MANUAL = "manual"
"""The fact that identifies the manually validated concepts, in a step that reads them."""


class Undeclared(Exception):
    """Raised if a step reads something outside its fingerprint: a bug in the step's code."""


class Settings:
    """A section of the config; only declared keys can be read."""

    def __init__(self, section: Section, keys: frozenset[str], path: str = "") -> None:
        self._section, self._keys, self._path = section, keys, path

    def __getattr__(self, name: str) -> Any:
        value, path = getattr(self._section, name), f"{self._path}{name}"
        if path in self._keys:
            return value
        if any(key.startswith(f"{path}.") for key in self._keys):
            return Settings(value, self._keys, f"{path}.")
        raise Undeclared(f"{path} is read; declared are {', '.join(sorted(self._keys))}")


class Rows:
    """A data set; only declared splits can be read, and manual concepts only with a fact of that name."""

    def __init__(self, data: Dataset, splits: frozenset[str], facts: Mapping[str, Any]) -> None:
        self._data, self._splits, self._facts = data, splits, facts

    @property
    def concept_names(self) -> Mapping[str, str]:
        """The name of each concept; the fingerprint of a split covers the names of its concepts."""
        return self._data.concept_names

    def examples(self, split: str) -> Sequence[Example]:
        """All rows of a split."""
        self._check(split)
        return self._data.splits[split]

    def readable(self, split: str) -> list[Example]:
        """The rows of a split whose images can be read."""
        self._check(split)
        return self._data.readable(split)

    def manual(self, split: str) -> Mapping[str, tuple[str, ...]]:
        """The manually validated concepts of a split by id; the fingerprint of the split lacks them."""
        self._check(split)
        if MANUAL not in self._facts:
            raise Undeclared(f"the manual concepts of {split} are read, but no fact declares them")
        return self._data.manual[split]

    def _check(self, split: str) -> None:
        if split not in self._splits:
            raise Undeclared(f"the split {split} is read; declared are {', '.join(sorted(self._splits))}")


class Inputs:
    """What one step of a run reads, and which part of it determines the step's output.

    `config`: parts of the config that determine the output, by dotted key; their keys can be read. `besides`:
    keys that can also be read but do not affect the output. `data`: splits. `steps`: earlier steps with the
    files that are read, None for all; this step can read what they can read. `facts`: other facts that
    determine the output, such as the contents of weights. `canonical`: all that determines the output, as
    JSON-like values.
    """

    def __init__(
        self,
        plan: "Plan",
        config: Mapping[str, Any],
        data: Sequence[str] = (),
        steps: Mapping["Step", Sequence[str] | None] | None = None,
        facts: Mapping[str, Any] | None = None,
        besides: Iterable[str] = (),
    ) -> None:
        self.root: Path = plan.root
        self.steps, self.facts = dict(steps or {}), dict(facts or {})
        earlier = [step.inputs for step in self.steps]
        self.keys = frozenset({*config, *besides}.union(*(inputs.keys for inputs in earlier)))
        self.splits = frozenset({*data}.union(*(inputs.splits for inputs in earlier)))
        self.config: Any = Settings(plan.config, self.keys)
        self.data = Rows(plan.data, self.splits, self.facts)
        self.canonical = {
            "config": dict(config),
            "data": {split: plan.data.fingerprints[split] for split in data},
            "steps": {step.name: step.canonical for step in self.steps},
            "facts": self.facts,
        }

    def directory(self, name: str) -> Path:
        """The output directory of an earlier step."""
        for step in self.steps:
            if step.name == name:
                return step.directory
        raise Undeclared(f"the step {name} is read; declared are {', '.join(s.name for s in self.steps)}")


def values(config: "Config", *keys: str) -> dict[str, Any]:
    """Parts of the config by dotted key, as JSON-like values."""
    found = {}
    for key in keys:
        value: Any = config
        for name in key.split("."):
            value = getattr(value, name)
        found[key] = value.model_dump() if isinstance(value, Section) else value
    return found
