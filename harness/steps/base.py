"""What every step of a run has."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from harness.steps.inputs import Inputs
from harness.store import is_done, products, step_directory

if TYPE_CHECKING:
    from harness.steps.plan import Plan
    from harness.steps.work import Work


class Step(ABC):
    """One step of a run: what determines it, how it is built, what it leaves.

    `inputs` are all that it reads. `part` tells steps of one kind apart, such as the split that is captioned.
    A step's output lies in the directory that the fingerprint of its `canonical` form names, so that two runs
    share the steps that are determined alike.
    """

    kind: ClassVar[str]
    version: ClassVar[int]
    """Raised when the code makes something else of the same inputs: earlier output is then built anew."""
    shared: ClassVar[bool] = False
    """Whether all ranks of a launch build it together; rank 0 alone builds the others."""
    section: ClassVar[tuple[str, Any, Any] | None] = None
    """Its section of an experiment file, if it has one of its own: key, type and default."""
    captions: str | None = None
    """The split whose captions it leaves in `predictions.csv`, as `captions.read_captions` reads them."""

    def __init__(self, inputs: Inputs, part: str = "") -> None:
        self.inputs, self.part = inputs, part

    @classmethod
    @abstractmethod
    def of(cls, plan: "Plan", before: Mapping[str, "Step"]) -> Iterator["Step"]:
        """The steps of this kind in a run, by its config and data; `before` are the steps before them."""

    @abstractmethod
    def build(self, work: "Work", directory: Path) -> bool | None:
        """Write the output into `directory`; False where something is absent that another try may give."""

    @property
    def artifacts(self) -> Mapping[str, str]:
        """The files that it leaves for readers, by the name that they have in the run's record."""
        return {}

    @property
    def decodes(self) -> Mapping[str, int]:
        """The splits whose images it decodes, and the side in pixels to which it does."""
        return {}

    def found(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """The keys of the run's record that change with what it found."""
        return {}

    @cached_property
    def name(self) -> str:
        """The name of the step in its run, such as `predict-valid`."""
        return f"{self.kind}-{self.part}" if self.part else self.kind

    @cached_property
    def canonical(self) -> dict[str, Any]:
        """All that determines the output, as JSON-like values."""
        return {"version": self.version, **self.inputs.canonical}

    @cached_property
    def directory(self) -> Path:
        """Where the output lies, or will lie."""
        return step_directory(self.inputs.root, self.kind, self.canonical)

    def made_from(self) -> dict[str, str]:
        """SHA-256 of the files that it reads, where the steps before it have sealed theirs."""
        found = (products(step.directory, files) for step, files in self.inputs.steps.items())
        return {file: digest for one in found for file, digest in one.items()}

    def is_done(self) -> bool:
        """Whether it ran to its end, has its files, and read those that the steps before it hold now."""
        return is_done(self.directory, self.made_from())
