"""From probabilities to concepts: thresholds, the concepts of each image, and their scores."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harness import metrics, records
from harness.concepts import ensembles, knn, results, thresholds
from harness.concepts.baselines import BASELINES
from harness.concepts.labels import labels_of
from harness.concepts.probabilities import PROBABILITIES, Probabilities, read_probabilities
from harness.config.editions import EDITIONS
from harness.data.halves import HALVES, HELD, TUNE, half
from harness.errors import Problem, UserError
from harness.metrics import Score, concepts
from harness.records.files import LISTS, read_lists, write_lists
from harness.steps.base import Step
from harness.steps.detect import (
    Combine,
    Detect,
    by_neighbours,
    files_of_runs,
    has_thresholds,
    in_order,
    of_runs,
    voted,
)
from harness.steps.inputs import MANUAL, Inputs, values
from harness.store import fingerprint, finite, parsed, write_json

if TYPE_CHECKING:
    from harness.config.schema import Config
    from harness.data.listing import Example
    from harness.steps.plan import Plan
    from harness.steps.work import Work

THRESHOLDS, SCORES, PER_IMAGE, PER_CONCEPT, ARRAYS = (
    *("thresholds.json", "scores.json", "per_image.csv", "per_concept.csv", "arrays.npz"),
)
_KEY = "train.epochs_of"


class Thresholds(Step):
    """Writes the threshold of each concept, chosen on the half `tune` of validation."""

    kind, version = "thresholds", 1

    @classmethod
    def of(cls, plan: "Plan", before: Mapping[str, Step]) -> Iterator[Step]:
        config = plan.config.concepts
        if config is None or not has_thresholds(config) or not plan.splits:
            return
        read = values(plan.config, "concepts.thresholds")
        if plan.config.full_fit:
            read |= values(plan.config, "concepts.min_images")
            yield cls(Inputs(plan, read, ("train",), facts={"of": _of_run(plan)}))
        elif "valid" in plan.detected:
            yield cls(Inputs(plan, read, ("valid",), {_probabilities(before, "valid"): (PROBABILITIES,)}))

    @property
    def artifacts(self) -> Mapping[str, str]:
        return {f"concepts/{THRESHOLDS}": THRESHOLDS}

    def found(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        about = parsed((self.directory / THRESHOLDS).read_bytes())["about"]
        return {"concepts": (record["concepts"] or {}) | {"thresholds": about}}

    def build(self, work: "Work", directory: Path) -> None:
        found, about = self._chosen() if self.inputs.steps else self._given()
        work.say(about["told"])
        write_json(directory / THRESHOLDS, found.as_dict() | {"about": about})

    def _chosen(self) -> tuple[thresholds.Thresholds, dict[str, Any]]:
        config = self.inputs.config.concepts.thresholds
        (source,) = self.inputs.steps
        examples = [e for e in self.inputs.data.readable("valid") if half(e.id) == TUNE]
        ids = [example.id for example in examples]
        given = read_probabilities(source.directory / PROBABILITIES).of(ids)
        references = [set(example.cuis) for example in examples]
        found = thresholds.choose(given.values, given.labels, references, config)
        lists = thresholds.decide(given.values, found)
        f1 = float(concepts.scores([set(own) for own in lists], references).mean())
        told = (
            f"thresholds ({config.kind}) chosen on the half {TUNE} of valid, {len(ids):,} images: F1 {f1:.4f}"
        )
        return found, {"kind": config.kind, "chosen_on": TUNE, "n": len(ids), "f1": f1, "told": told}

    def _given(self) -> tuple[thresholds.Thresholds, dict[str, Any]]:
        """The thresholds of another run, or the same for all, since no validation image is unseen."""
        config, source = self.inputs.config.concepts, self.inputs.facts["of"]
        labels = labels_of(self.inputs.data.readable("train"), config.min_images)
        about = {"kind": config.thresholds.kind, "chosen_on": source and source["run"]}
        if source is None:
            start = np.full(len(labels), config.thresholds.start, np.float32)
            told = f"all thresholds are {config.thresholds.start}, since valid is trained on"
            return thresholds.Thresholds(labels, start, config.thresholds.fallback), about | {"told": told}
        found = thresholds.Thresholds.from_dict(source["thresholds"])
        return found, about | {"told": f"the thresholds are those of {source['run']}"}


def _of_run(plan: "Plan") -> dict[str, Any] | None:
    """The thresholds of the run of `train.epochs_of`; None without one.

    Raises `UserError` if it has none, or other labels.
    """
    run, config = plan.config.train.epochs_of, plan.config.concepts
    if not run:
        return None
    folder = plan.root / run
    record = records.read(folder, key=_KEY)
    file = records.artifact(folder, record, f"concepts/{THRESHOLDS}")
    found = parsed(file.read_bytes())
    labels = labels_of(plan.data.readable("train"), config.min_images)
    if tuple(found["thresholds"]) != labels:
        what = f"the thresholds of {run} are of other concepts than the {len(labels):,} here"
        raise UserError([Problem(what, key=_KEY, hint="Use the same concepts.min_images, and no ensemble.")])
    given = {"thresholds": found["thresholds"], "fallback": config.thresholds.fallback}
    return {"run": run, "thresholds": given}


class Decide(Step):
    """Writes the concepts of each image of a split, as they are submitted."""

    kind, version = "concepts", 1

    @classmethod
    def of(cls, plan: "Plan", before: Mapping[str, Step]) -> Iterator[Step]:
        config = plan.config.concepts
        if config is None:
            return
        read = values(plan.config, "concepts.thresholds.fallback")
        if by_neighbours(config):
            read |= values(plan.config, "concepts.predictor", "concepts.knn.rule", "concepts.knn.limits")
        if voted(config):
            keys = ("concepts.runs", "concepts.own", "concepts.combine", "concepts.vote_share")
            read |= values(plan.config, *keys)
        for split in plan.splits:
            steps = {before[Thresholds.kind]: (THRESHOLDS,)} if Thresholds.kind in before else {}
            if (source := _probabilities(before, split)) is not None:
                steps |= {source: (PROBABILITIES,)}
            facts = {"fallback": plan.concept_fallback.get(split)}
            facts |= {"most": EDITIONS[plan.config.edition].max_cuis}
            facts |= of_runs(plan, ".csv", split) if voted(config) else {}
            yield cls(Inputs(plan, read, ("train", split), steps, facts), split)

    @classmethod
    def replaces_model(cls, config: "Config") -> bool:
        return not config.captions and not config.concepts.own

    @property
    def artifacts(self) -> Mapping[str, str]:
        return {f"concepts/{self.part}.csv": LISTS}

    def found(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        standin = record["standin_model"] or self.inputs.facts.get("standin", False)
        about = {"predictor": "votes"} if "runs" in self.inputs.facts else {}
        return {"standin_model": standin, "concepts": (record["concepts"] or {}) | about}

    def build(self, work: "Work", directory: Path) -> None:
        ids = [example.id for example in self.inputs.data.readable(self.part)]
        source = next((step for step in self.inputs.steps if step.kind in (Detect.kind, Combine.kind)), None)
        given = read_probabilities(source.directory / PROBABILITIES, ids=ids) if source else None
        own = self._own(given) if given else []
        lists = self._voted(own, ids) if "runs" in self.inputs.facts else own
        found = {image: cuis[: self.inputs.facts["most"]] for image, cuis in zip(ids, lists, strict=True)}
        fallback = self.inputs.facts["fallback"]
        found |= dict.fromkeys(fallback["ids"], fallback["concepts"]) if fallback else {}
        every = self.inputs.data.examples(self.part)
        write_lists(directory / LISTS, {example.id: found[example.id] for example in every})

    def _own(self, given: Probabilities) -> Sequence[Sequence[str]]:
        """The concepts by this run's probabilities, the most probable first."""
        if all(step.kind != Thresholds.kind for step in self.inputs.steps):
            return knn.decide(given.values, given.labels, self.inputs.config.concepts.knn.limits)
        file = self.inputs.directory(Thresholds.kind) / THRESHOLDS
        return thresholds.decide(given.values, thresholds.Thresholds.from_dict(parsed(file.read_bytes())))

    def _voted(self, own: Sequence[Sequence[str]], ids: Sequence[str]) -> Sequence[Sequence[str]]:
        """The concepts by votes of this run, if it has concepts of its own, and of other runs."""
        config = self.inputs.config.concepts
        found = [read_lists(file) for file in files_of_runs(self.inputs, ".csv", self.part)]
        members = [*([own] if own else []), *([one[image] for image in ids] for one in found)]
        weights = [*([config.own] if own else []), *(source.weight for source in config.runs)]
        labels = in_order([cui for lists in members for cuis in lists for cui in cuis], self.inputs)
        fallback = config.thresholds.fallback
        return ensembles.votes(members, weights, labels, config.vote_share, fallback)


class ScoreConcepts(Step):
    """Writes the scores of the concepts of valid, on all of it and on each half, and those of baselines."""

    kind, version = "score-concepts", 1

    @classmethod
    def of(cls, plan: "Plan", before: Mapping[str, Step]) -> Iterator[Step]:
        source = before.get(f"{Decide.kind}-valid")
        if source is None or plan.config.full_fit:
            return
        read, manual = values(plan.config, "score.bootstrap", "edition"), plan.data.manual.get("valid")
        facts = {} if manual is None else {MANUAL: fingerprint(manual)}
        yield cls(Inputs(plan, read, ("train", "valid"), {source: (LISTS,)}, facts))

    @property
    def artifacts(self) -> Mapping[str, str]:
        name = "scores/valid_concepts"
        return {
            f"{name}.json": SCORES,
            f"{name}_per_image.csv": PER_IMAGE,
            f"{name}_per_concept.csv": PER_CONCEPT,
        }

    def found(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        result = parsed((self.directory / SCORES).read_bytes())
        found = {"scores": {"valid": result["scores"]}}
        found |= {key: result[key] for key in ("halves", "baselines", "paired")}
        return {"concepts": (record["concepts"] or {}) | found}

    def build(self, work: "Work", directory: Path) -> None:
        (source,) = self.inputs.steps
        examples = self.inputs.data.examples("valid")
        lists = read_lists(source.directory / LISTS)
        predictions = [lists[example.id] for example in examples]
        references = [example.cuis for example in examples]
        ids, scores = [example.id for example in examples], self._scored(predictions, examples)
        held = np.array([half(image) == HELD for image in ids], dtype=bool)
        floors = {
            name: self._scored([given(self.inputs.data.examples("train"))] * len(ids), examples)["f1"]
            for name, given in BASELINES.items()
        }
        on = {TUNE: ~held, HELD: held}
        result = {
            "scores": _as_dicts(scores),
            "halves": {part: _as_dicts(self._on(scores, on[part])) for part in HALVES},
            "baselines": {name: self._floor(one, held) for name, one in floors.items()},
            "paired": {name: _gain(scores["f1"], one, held) for name, one in floors.items()},
            "references": metrics.references_fingerprint(ids, [";".join(one) for one in references]),
        }
        names = self.inputs.data.concept_names
        results.write_per_image(directory / PER_IMAGE, results.per_image(ids, predictions, references))
        results.write_per_concept(
            directory / PER_CONCEPT, results.per_concept(predictions, references, names)
        )
        metrics.write_arrays(directory / ARRAYS, ids, scores)
        write_json(directory / SCORES, finite(result))

    def _scored(
        self, predictions: Sequence[Sequence[str]], examples: Sequence["Example"]
    ) -> dict[str, Score]:
        """The scores; the secondary one is official if the data have manually validated concepts.

        Without them it compares with the concepts of the data, which nobody has validated.
        """
        config = self.inputs.config
        own, true = [set(cuis) for cuis in predictions], [set(example.cuis) for example in examples]
        secondary, validated = true, MANUAL in self.inputs.facts
        if validated:
            manual = self.inputs.data.manual("valid")
            secondary = [set(manual.get(example.id, ())) for example in examples]
        resamples = config.score.bootstrap
        return metrics.score_concepts(own, true, secondary, config.edition, resamples, validated)

    def _on(self, scores: Mapping[str, Score], rows: np.ndarray) -> dict[str, Score]:
        return metrics.on_rows(scores, rows, self.inputs.config.score.bootstrap)

    def _floor(self, score: Score, held: np.ndarray) -> dict[str, Any]:
        on_held = self._on({"f1": score}, held)["f1"]
        return _interval(score) | {"held": _interval(on_held)}


def _as_dicts(scores: Mapping[str, Score]) -> dict[str, Any]:
    return {name: score.as_dict() for name, score in scores.items()}


def _interval(score: Score) -> dict[str, Any]:
    return {"value": score.value, "low": score.low, "high": score.high}


def _gain(score: Score, floor: Score, held: np.ndarray) -> dict[str, Any]:
    """What the F1 of each image gains over a baseline, tested on all images and on the held half."""
    pairs = [(score.per_image[rows], floor.per_image[rows]) for rows in (np.full(len(held), True), held)]
    whole, on_held = (results.paired(*pair) for pair in pairs)
    return whole | {"held": on_held}


def _probabilities(before: Mapping[str, Step], split: str) -> Step | None:
    """The step with the probabilities by which the concepts of a split are decided."""
    return before.get(f"{Combine.kind}-{split}") or before.get(f"{Detect.kind}-{split}")
