"""Captions from the most similar training images; see `decoding.retrieval`."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.captions import PREDICTIONS, Candidate
from harness.decoding import retrieval
from harness.decoding.retrieval import RetrievalConfig
from harness.machine import ranks
from harness.steps import comparing
from harness.steps.base import Step
from harness.steps.inputs import Inputs, values
from harness.steps.predict import model_for, reads_checkpoint, reads_model
from harness.steps.prompts import BASE, FEATURES, OWN, prompted

if TYPE_CHECKING:
    from harness.steps.plan import Plan
    from harness.steps.work import Work

TABLE = "neighbours.csv"


class Features(Step):
    """Writes the image features of one split, in the order of its readable images."""

    kind, version, shared = OWN, 1, True

    @classmethod
    def of(cls, plan: "Plan", before: Mapping[str, Step]) -> Iterator[Step]:
        if plan.config.retrieval is None or not plan.config.has_model:
            return
        read, steps, facts = reads_model(plan, before)
        for split in dict.fromkeys(["train", *plan.splits]):
            yield cls(Inputs(plan, read, (split,), steps, facts, ("data.cache",)), split)

    @property
    def decodes(self) -> Mapping[str, int]:
        return {self.part: self.inputs.config.model.image_size}

    def build(self, work: "Work", directory: Path) -> None:
        pixels = work.pixels(self.inputs, self.part, self.inputs.config.model.image_size)
        count = len(self.inputs.data.readable(self.part))
        with work.reporter.progress(f"Features of {self.part}") as advance:
            found = retrieval.features(model_for(self.inputs, work), pixels, count, advance)
        if ranks.rank() == 0:
            retrieval.write_features(directory / FEATURES, found)


class BaseFeatures(Features):
    """Writes the image features of one split by `model.checkpoint` as it is."""

    kind = BASE

    @classmethod
    def of(cls, plan: "Plan", before: Mapping[str, Step]) -> Iterator[Step]:
        splits = prompted(plan)
        if splits and plan.config.model.prompt.features is None:
            read, steps, facts = reads_checkpoint(plan, before)
            for split in dict.fromkeys(["train", *splits]):
                yield cls(Inputs(plan, read, (split,), steps, facts, ("data.cache",)), split)

    def build(self, work: "Work", directory: Path) -> None:
        work.drop_model()  # it may be trained already
        super().build(work, directory)
        work.drop_model()


class Retrieve(Step):
    """Writes for each image of a split a caption of its nearest training images."""

    kind, version, shared = "retrieve", 1, True
    section = ("retrieval", RetrievalConfig | None, None)

    @classmethod
    def of(cls, plan: "Plan", before: Mapping[str, Step]) -> Iterator[Step]:
        found = {step.part: step for step in before.values() if step.kind == OWN}
        if not found:
            return
        read, steps, facts = comparing.reads(plan, before, plan.config.retrieval.utility)
        read |= values(plan.config, "retrieval")
        for split in plan.splits:
            files = {found["train"]: (FEATURES,), found[split]: (FEATURES,)}
            given = {"fallback": plan.fallback.get(split)}
            yield cls(Inputs(plan, read, ("train", split), files | steps, facts | given), split)

    @property
    def captions(self) -> str:
        return self.part

    @property
    def artifacts(self) -> Mapping[str, str]:
        return {f"predictions/{self.part}_before.csv": PREDICTIONS, f"retrieval/{self.part}.csv": TABLE}

    def build(self, work: "Work", directory: Path) -> None:
        import numpy as np

        config, part = self.inputs.config.retrieval, self.part
        training = self.inputs.data.readable("train")
        usable = [row for row, example in enumerate(training) if example.trains]
        database = np.load(self.inputs.directory("features-train") / FEATURES)[usable]
        queries = np.load(self.inputs.directory(f"features-{part}") / FEATURES)
        found = retrieval.nearest(queries, database, config.neighbours)
        examples = self.inputs.data.readable(part)
        candidates = {
            example.id: [
                Candidate(training[usable[row]].caption or "", source=training[usable[row]].id)
                for row in (rows[:1] if _is_near(cosines, config.threshold) else rows)
            ]
            for example, rows, cosines in zip(examples, found.rows, found.cosines, strict=True)
        }
        cosines = {
            example.id: f"{best[0]:.6f}" for example, best in zip(examples, found.cosines, strict=True)
        }
        chosen = comparing.choose(self, work, candidates, directory)
        comparing.write(self, chosen, directory, TABLE, {"cosine": cosines})


def _is_near(cosines: Any, threshold: float | None) -> bool:
    return threshold is not None and bool(cosines[0] >= threshold)
