"""The data of a run's page: its record, captions, scores and images."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from harness import records
from harness.config.editions import EDITIONS
from harness.data.halves import HELD
from harness.data.listing import Example
from harness.data.readers import read
from harness.errors import UserError
from harness.records.files import ATTENTION, LISTS, PREDICTIONS

NEEDS = (
    *("variant", "seed", "started", "ended", "parameters", "standin_model", "git", "environment", "data"),
    *("steps", "made", "seconds", "scores", "image_gap", "baseline", "warnings", "artifacts", "submissions"),
)
"""The fields of a record that a page needs."""
_CAPTION_COLUMNS = ("ID", "reference", "prediction")


@dataclass(frozen=True)
class Run:
    """A run's folder, its `run.json`, and the problems of files that the page omits."""

    folder: Path
    record: Mapping[str, Any]
    left_out: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The name of the run's folder, `<variant>-s<seed>` unless the user renamed it."""
        return self.folder.resolve().name

    @cached_property
    def root(self) -> Path:
        """The folder that holds `steps/` and the experiments."""
        return records.root(self.folder, self.record)

    def read(self, step: str, name: str, reader: Callable[[Path, records.Record], Any]) -> Any:
        """The result of `reader` for a file of a step; empty if the file is absent or can't be read."""
        try:
            file = records.step_file(self.folder, self.record, step, name)
            return reader(file, self.record) if file else {}
        except UserError as error:
            self.left_out.extend(str(problem) for problem in error.problems)
            return {}

    def main_metric(self) -> str | None:
        """The ranking metric of the run's edition, or the first metric with a value."""
        found = {m: s for m, s in main_scores(self.record).items() if s["value"] is not None}
        primary = EDITIONS[self.record["edition"]].primary
        return primary if primary in found else next(iter(found), None)


@dataclass(frozen=True)
class Captions:
    """The validation captions of a run by id, before and after post-processing.

    `scored_before` and `scored_after` are the rows of `per_image.csv`. A stage that has not run is empty.
    """

    before: Mapping[str, str]
    after: Mapping[str, str]
    scored_before: Mapping[str, Mapping[str, str]]
    scored_after: Mapping[str, Mapping[str, str]]
    references: Mapping[str, str]

    @property
    def scored(self) -> Mapping[str, Mapping[str, str]]:
        """The rows of the last scored stage."""
        return self.scored_after or self.scored_before

    @property
    def ids(self) -> list[str]:
        """The ids in the order of the data set."""
        return list(self.scored or self.after or self.before)

    @property
    def metrics(self) -> list[str]:
        """The metrics with a score for each image."""
        return [name for name in next(iter(self.scored.values()), {}) if name not in _CAPTION_COLUMNS]


@dataclass(frozen=True)
class Concepts:
    """The concepts of a run's validation images by id, and the F1 of each; without scores, `f1` is empty.

    `true` are those that the run was scored with; it is empty if there are no references.
    """

    predicted: Mapping[str, Sequence[str]]
    true: Mapping[str, Sequence[str]]
    f1: Mapping[str, float]

    @property
    def ids(self) -> list[str]:
        """The ids in the order of the data set."""
        return list(self.predicted)


@dataclass(frozen=True)
class Images:
    """The validation images in the data folder as it is now: labels and files by id."""

    examples: Mapping[str, Example]
    files: Mapping[str, Path]
    concept_names: Mapping[str, str]


def of(folder: Path) -> Run:
    """The run in a folder; raises `UserError` if there is none."""
    return Run(folder, records.read(folder, NEEDS))


def scores(record: Mapping[str, Any], stage: str) -> Mapping[str, Mapping[str, Any]]:
    """The validation scores of a stage (before or after post-processing) by metric."""
    return record["scores"].get("valid", {}).get(stage, {})


def captions(run: Run, images: Images | None) -> Captions:
    """The captions of a run; for a run without scores, the references come from the data folder."""
    steps = ("predict-valid", "postprocess-valid")
    texts = [run.read(step, PREDICTIONS, records.captions) for step in steps]
    steps = ("score-before", "score-after")
    before, after = (run.read(step, "per_image.csv", records.per_image) for step in steps)
    references = {key: row["reference"] for key, row in (after or before).items()}
    if not references and images:
        labels = {key: images.examples[key].caption for key in texts[0] if key in images.examples}
        references = {key: caption for key, caption in labels.items() if caption is not None}
    return Captions(*texts, before, after, references)


def attention(run: Run, captions: Captions) -> Mapping[str, np.ndarray]:
    """Where the model looks in each image by id, uint8 (h, w); empty if prediction left no such file."""
    maps = run.read("predict-valid", ATTENTION, _maps)
    if len(maps) != len(captions.before):
        return {}
    return {key: one for key, one in zip(captions.before, maps, strict=True) if one.any()}


def _maps(file: Path, record: records.Record) -> np.ndarray:
    try:
        maps = np.load(file, allow_pickle=False)
        if maps.ndim != 3 or maps.dtype != np.uint8:
            raise ValueError(f"{maps.dtype} {maps.shape}")
    except (OSError, ValueError, EOFError) as error:
        raise records.damaged(file, record, f"can't be read: {error}") from None
    return maps


def main_scores(record: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """The scores by which runs are compared: of captions after post-processing, or of concepts alone."""
    if records.task_of(record) == records.CONCEPTS:
        return (record.get("concepts") or {}).get("halves", {}).get(HELD, {})
    return scores(record, "after")


def concepts(run: Run) -> Concepts:
    """The concepts of a run; before they are scored, only the predicted ones."""
    rows = run.read("score-concepts", "per_image.csv", records.per_concept_image)
    if not rows:
        return Concepts(run.read("concepts-valid", LISTS, records.lists), {}, {})
    predicted, true, f1 = ({key: row[at] for key, row in rows.items()} for at in range(3))
    return Concepts(predicted, true, f1)


def images(run: Run) -> Images | None:
    """The validation images; None if the data folder is neither here nor in the parent folder of runs/."""
    data = run.record["data"]
    for root in (Path(data["root"]), run.root.parent / data["root"]):
        listing = read(root, data["layout"]) if root.is_dir() else None
        if listing and listing.splits.get("valid"):
            files = {key: file.path for (split, key), file in listing.files.items() if split == "valid"}
            return Images({e.id: e for e in listing.splits["valid"]}, files, listing.concept_names)
    return None
