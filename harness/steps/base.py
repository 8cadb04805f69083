"""The base class of all steps of a run."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from harness.steps.inputs import Inputs
from harness.store import is_done, products, step_directory

if TYPE_CHECKING:
    from harness.config.schema import Config
    from harness.steps.plan import Plan
    from harness.steps.work import Work


class Step(ABC):
    """One step of a run: its inputs, how to build it, and its output.

    `inputs` are all that the step may read. `part` distinguishes steps of one kind, such as the split to
    caption. The fingerprint of the `canonical` form names the output's directory, so runs share equal steps.
    """

    kind: ClassVar[str]
    version: ClassVar[int]
    """Increase it when the code gives another output for the same inputs; old output is then not reused."""
    shared: ClassVar[bool] = False
    """Whether all ranks of a launch build the step together; otherwise only rank 0 does."""
    section: ClassVar[tuple[str, Any, Any] | None] = None
    """Key, type and default of the step's own section of an experiment file, or None."""
    weights: ClassVar[bool] = False
    """Whether the output is weights, which are made again only for a step that needs them."""
    captions: str | None = None
    """The split whose captions the step writes to `predictions.csv` (see `records.files.read_captions`)."""

    def __init__(self, inputs: Inputs, part: str = "") -> None:
        self.inputs, self.part = inputs, part
        self.made: dict[str, Any] = {}
        """What `build` adds to the record of how the step was built."""

    @classmethod
    @abstractmethod
    def of(cls, plan: "Plan", before: Mapping[str, "Step"]) -> Iterator["Step"]:
        """The steps of this kind in a run, from its config and data; `before` are the earlier steps."""

    @classmethod
    def replaces_model(cls, config: "Config") -> bool:
        """Whether this step predicts in place of the run's own model, which is then neither made nor used."""
        return False

    @abstractmethod
    def build(self, work: "Work", directory: Path) -> bool | None:
        """Write the output into `directory`; False if it is incomplete and a retry may complete it."""

    @property
    def artifacts(self) -> Mapping[str, str]:
        """The output files for readers, by their name in the run's record."""
        return {}

    @property
    def decodes(self) -> Mapping[str, int]:
        """The splits whose images the step decodes, with the side in pixels."""
        return {}

    def found(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """The step's results as keys of the run's record."""
        return {}

    @cached_property
    def name(self) -> str:
        """The name of the step in its run, such as `predict-valid`."""
        return f"{self.kind}-{self.part}" if self.part else self.kind

    @cached_property
    def canonical(self) -> dict[str, Any]:
        """Everything that determines the output, as JSON-like values."""
        return {"version": self.version, **self.inputs.canonical}

    @cached_property
    def directory(self) -> Path:
        """The output's directory, also before the step is built."""
        return step_directory(self.inputs.root, self.kind, self.canonical)

    @property
    def place(self) -> str:
        """The output's directory as records name it, from the folder of all runs."""
        return str(self.directory.relative_to(self.inputs.root))

    def made_from(self) -> dict[str, str]:
        """SHA-256 of the files that the step reads, as far as earlier steps have recorded them."""
        found = (products(step.directory, files) for step, files in self.inputs.steps.items())
        return {file: digest for one in found for file, digest in one.items()}

    def is_done(self) -> bool:
        """Whether the step finished, its files exist, and its inputs have not changed since."""
        return is_done(self.directory, self.made_from())
