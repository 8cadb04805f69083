"""The probability of each concept for each image, by this run and by several runs together."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import records
from harness.concepts import ensembles
from harness.concepts.labels import labels_of
from harness.concepts.probabilities import (
    PROBABILITIES,
    Probabilities,
    aligned,
    read_probabilities,
    write_probabilities,
)
from harness.concepts.settings import ConceptsConfig
from harness.errors import UserError
from harness.machine import ranks
from harness.models.checkpoints import sha256
from harness.steps.base import Step
from harness.steps.inputs import Inputs, values
from harness.steps.origins import check_split
from harness.steps.predictors import PREDICTORS
from harness.steps.work import labels

if TYPE_CHECKING:
    from harness.steps.plan import Plan
    from harness.steps.work import Work

OWN = "own"
SHOWN = "_probabilities.npz"
"""The end of the name of a run's probabilities, after `concepts/<split>`."""
_KEY = "concepts.runs"


def voted(config: ConceptsConfig) -> bool:
    """Whether several runs vote for the concepts that each has decided."""
    return bool(config.runs) and config.combine == "votes"


def by_neighbours(config: ConceptsConfig) -> bool:
    """Whether the neighbours of an image decide this run's concepts by their counts."""
    return config.own > 0 and config.predictor == "knn" and config.knn.rule == "votes"


def has_thresholds(config: ConceptsConfig) -> bool:
    """Whether probabilities are compared with thresholds: this run's own, or the mean of several runs."""
    mean = bool(config.runs) and not voted(config)
    return mean or (config.own > 0 and not by_neighbours(config))


class Detect(Step):
    """Writes the probabilities of the concepts of one split by this run's own predictor."""

    kind, version, shared = "detect", 1, True
    section = ("concepts", ConceptsConfig | None, None)
    alone = True
    """Whether no other runs vote, so that these are the probabilities of the run."""

    @classmethod
    def of(cls, plan: "Plan", before: Mapping[str, Step]) -> Iterator[Step]:
        config = plan.config.concepts
        if config is None or not config.own:
            return
        for split in plan.detected:
            read, steps, facts = PREDICTORS[config.predictor].reads(plan, before, split)
            read |= values(plan.config, "concepts.predictor", "concepts.min_images")
            step = cls(Inputs(plan, read, ("train", split), steps, facts, ("data.cache",)), split)
            step.alone = not voted(config)
            yield step

    @property
    def decodes(self) -> Mapping[str, int]:
        predictor = PREDICTORS[self.inputs.config.concepts.predictor]
        return {self.part: self.inputs.config.model.image_size} if predictor.decodes else {}

    @property
    def artifacts(self) -> Mapping[str, str]:
        return {f"concepts/{self.part}{SHOWN if self.alone else '_own.npz'}": PROBABILITIES}

    def found(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        about = {"predictor": self.inputs.config.concepts.predictor, "labels": len(labels(self.inputs))}
        return {"concepts": (record["concepts"] or {}) | about}

    def build(self, work: "Work", directory: Path) -> None:
        known = labels(self.inputs)
        found = PREDICTORS[self.inputs.config.concepts.predictor].predict(self, work, known)
        if ranks.rank() == 0:
            ids = tuple(example.id for example in self.inputs.data.readable(self.part))
            write_probabilities(directory / PROBABILITIES, Probabilities(known, ids, found))


class Combine(Step):
    """Writes the mean of the probabilities of this run and of others, for one split."""

    kind, version = "combine", 1

    @classmethod
    def of(cls, plan: "Plan", before: Mapping[str, Step]) -> Iterator[Step]:
        config = plan.config.concepts
        if config is None or not config.runs or voted(config):
            return
        read = values(plan.config, "concepts.runs", "concepts.own")
        for split in plan.detected:
            own = before.get(f"{Detect.kind}-{split}")
            facts = of_runs(plan, SHOWN, split)
            steps = {own: (PROBABILITIES,)} if own else {}
            yield cls(Inputs(plan, read, ("train", split), steps, facts), split)

    @property
    def artifacts(self) -> Mapping[str, str]:
        return {f"concepts/{self.part}{SHOWN}": PROBABILITIES}

    def found(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        standin = record["standin_model"] or self.inputs.facts["standin"]
        known = read_probabilities(self.directory / PROBABILITIES).labels
        about = {"predictor": "ensemble", "labels": len(known)}
        return {"standin_model": standin, "concepts": (record["concepts"] or {}) | about}

    def build(self, work: "Work", directory: Path) -> None:
        config = self.inputs.config.concepts
        names = [*([OWN] if self.inputs.steps else []), *(source.run for source in config.runs)]
        weights = [*([config.own] if self.inputs.steps else []), *(source.weight for source in config.runs)]
        ids = [example.id for example in self.inputs.data.readable(self.part)]
        files = [step.directory / PROBABILITIES for step in self.inputs.steps]
        files += files_of_runs(self.inputs, SHOWN, self.part)
        given = [read_probabilities(file, ids=ids) for file in files]
        known, several, notes = aligned(given, names)
        for note in notes:
            work.say(note)
        mean = ensembles.mean(several, weights)
        order = in_order(known, self.inputs)
        place = {cui: number for number, cui in enumerate(known)}
        found = Probabilities(order, tuple(ids), mean[:, [place[cui] for cui in order]])
        write_probabilities(directory / PROBABILITIES, found)


def in_order(concepts: Sequence[str], inputs: Inputs) -> tuple[str, ...]:
    """These concepts, those of most training images first; then those of none, by CUI."""
    rank = {cui: place for place, cui in enumerate(labels_of(inputs.data.readable("train"), 1))}
    return tuple(sorted(set(concepts), key=lambda cui: (rank.get(cui, len(rank)), cui)))


def of_runs(plan: "Plan", kind: str, split: str) -> dict[str, Any]:
    """What a step declares that reads a file of each of `concepts.runs`: SHA-256 of each, and stand-ins.

    `kind` is the end of the file's name among the artifacts of a run. Raises `UserError` with all runs that
    lack the file or have other images or labels of the split.
    """
    digests, standin, problems = [], False, []
    for source in plan.config.concepts.runs:
        try:
            record = records.read(plan.root / source.run, ("standin_model", "data"), _KEY)
            check_split(plan, record, source.run, split, _KEY, "Name runs on the same data.")
            digests.append(sha256(_of_run(plan.root / source.run, kind, split), None))
            standin |= record["standin_model"]
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    return {"runs": digests, "standin": standin}


def files_of_runs(inputs: Inputs, kind: str, split: str) -> list[Path]:
    """The files of which a step declares `of_runs`; raises `UserError` if one has changed since."""
    found = []
    for source, digest in zip(inputs.config.concepts.runs, inputs.facts["runs"], strict=True):
        file = _of_run(inputs.root / source.run, kind, split)
        if sha256(file, None) != digest:
            raise UserError(f"the concepts of {source.run} changed; start again", exit_code=1)
        found.append(file)
    return found


def _of_run(folder: Path, kind: str, split: str) -> Path:
    return records.artifact(folder, records.read(folder, key=_KEY), f"concepts/{split}{kind}")
