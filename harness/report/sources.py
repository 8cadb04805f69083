"""What a run and its data folder hold for a page: its record, captions, scores and images."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from harness import records
from harness.captions import PREDICTIONS
from harness.config.editions import EDITIONS
from harness.data.readers import Example, read
from harness.errors import UserError

NEEDS = (
    *("variant", "seed", "started", "ended", "parameters", "standin_model", "git", "environment", "data"),
    *("steps", "made", "seconds", "scores", "image_gap", "baseline", "warnings", "artifacts", "submissions"),
)
"""What a page shows of a record."""
_CAPTION_COLUMNS = ("ID", "reference", "prediction")


@dataclass(frozen=True)
class Run:
    """A run's folder, what `run.json` says in it, and what can't be read and is left out."""

    folder: Path
    record: Mapping[str, Any]
    left_out: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """`<variant>-s<seed>`, or what the user has renamed the folder to."""
        return self.folder.resolve().name

    @cached_property
    def root(self) -> Path:
        """The folder that holds `steps/` and the experiments."""
        return records.root(self.folder, self.record)

    def read(self, step: str, name: str, reader: Callable[[Path, records.Record], Any]) -> Any:
        """What a reader finds in a file of a step; empty where there is none that can be read."""
        try:
            file = records.step_file(self.folder, self.record, step, name)
            return reader(file, self.record) if file else {}
        except UserError as error:
            self.left_out.extend(str(problem) for problem in error.problems)
            return {}

    def main_metric(self) -> str | None:
        """The score that ranks in the run's edition, else the first one that it has."""
        found = {m: s for m, s in scores(self.record, "after").items() if s["value"] is not None}
        primary = EDITIONS[self.record["edition"]].primary
        return primary if primary in found else next(iter(found), None)


@dataclass(frozen=True)
class Captions:
    """The validation captions of a run by id; what the run has not come to is empty.

    Before and after post-processing, the rows of `per_image.csv` for each, and the references.
    """

    before: Mapping[str, str]
    after: Mapping[str, str]
    scored_before: Mapping[str, Mapping[str, str]]
    scored_after: Mapping[str, Mapping[str, str]]
    references: Mapping[str, str]

    @property
    def scored(self) -> Mapping[str, Mapping[str, str]]:
        """The rows of the last stage that was scored."""
        return self.scored_after or self.scored_before

    @property
    def ids(self) -> list[str]:
        """In the order of the data set."""
        return list(self.scored or self.after or self.before)

    @property
    def metrics(self) -> list[str]:
        """Those that have a number for each image."""
        return [name for name in next(iter(self.scored.values()), {}) if name not in _CAPTION_COLUMNS]


@dataclass(frozen=True)
class Images:
    """What the data folder says of the validation images as it lies there now: labels by id, and files."""

    examples: Mapping[str, Example]
    files: Mapping[str, Path]
    concept_names: Mapping[str, str]


def of(folder: Path) -> Run:
    """The run in a folder. Raises `UserError` where there is none."""
    return Run(folder, records.read(folder, NEEDS))


def scores(record: Mapping[str, Any], stage: str) -> Mapping[str, Mapping[str, Any]]:
    """The validation scores of a stage (before or after post-processing) by metric."""
    return record["scores"].get("valid", {}).get(stage, {})


def captions(run: Run, images: Images | None) -> Captions:
    """The captions; those of the data folder are the references of a run that was not scored."""
    steps = ("predict-valid", "postprocess-valid")
    texts = [run.read(step, PREDICTIONS, records.captions) for step in steps]
    steps = ("score-before", "score-after")
    before, after = (run.read(step, "per_image.csv", records.per_image) for step in steps)
    references = {key: row["reference"] for key, row in (after or before).items()}
    if not references and images:
        labels = {key: images.examples[key].caption for key in texts[0] if key in images.examples}
        references = {key: caption for key, caption in labels.items() if caption is not None}
    return Captions(*texts, before, after, references)


def images(run: Run) -> Images | None:
    """The images, looked for from here and from the folder in which runs/ lies; None where there are none."""
    data = run.record["data"]
    for root in (Path(data["root"]), run.root.parent / data["root"]):
        listing = read(root, data["layout"]) if root.is_dir() else None
        if listing and listing.splits.get("valid"):
            files = {key: file.path for (split, key), file in listing.files.items() if split == "valid"}
            return Images({e.id: e for e in listing.splits["valid"]}, files, listing.concept_names)
    return None
