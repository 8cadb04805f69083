"""Captions from the most similar training images; see `decoding.retrieval`."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.decoding import retrieval
from harness.decoding.retrieval import RetrievalConfig
from harness.machine import ranks
from harness.models.settings import RetrievedPrompt
from harness.records.files import PREDICTIONS, Candidate, read_rows, write_table
from harness.steps import comparing
from harness.steps.base import Step
from harness.steps.inputs import Inputs, values
from harness.steps.predict import model_for, reads_checkpoint, reads_model
from harness.steps.prompts import BASE, FEATURES, OWN, prompted
from harness.submission.checks import some

if TYPE_CHECKING:
    from harness.config.schema import Config
    from harness.steps.plan import Plan
    from harness.steps.work import Work

TABLE, COPIES = "neighbours.csv", "copies.csv"
"""For each image: the chosen caption, and the copy of the image in train, if there is one."""


class Features(Step):
    """Writes the image features of one split, in the order of its readable images."""

    kind, version, shared = OWN, 1, True

    @classmethod
    def of(cls, plan: "Plan", before: Mapping[str, Step]) -> Iterator[Step]:
        if not plan.config.has_model or not _searched(plan.config):
            return
        read, steps, facts = reads_model(plan, before)
        for split in dict.fromkeys(["train", *plan.splits, *plan.detected]):
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
        prompt = plan.config.model.prompt
        if splits and isinstance(prompt, RetrievedPrompt) and prompt.features is None:
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
        if plan.config.retrieval is None or not plan.config.has_model:
            return
        found = {step.part: step for step in before.values() if step.kind == OWN}
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
        copied = (self.directory / COPIES).is_file()
        return {
            f"predictions/{self.part}_before.csv": PREDICTIONS,
            f"retrieval/{self.part}.csv": TABLE,
            **({f"retrieval/{self.part}_copies.csv": COPIES} if copied else {}),
        }

    def found(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        file = self.directory / COPIES
        if not file.is_file():
            return {}
        shown, count = some([row["ID"] for row in read_rows(file)]), len(self.inputs.data.examples(self.part))
        what = f"{self.part}: {shown} of {count:,} images are also in train; their scores measure memory"
        return {"warnings": [*record["warnings"], what]}

    def build(self, work: "Work", directory: Path) -> None:
        import numpy as np

        config, part = self.inputs.config.retrieval, self.part
        training = self.inputs.data.readable("train")
        usable = [row for row, example in enumerate(training) if example.trains]
        database = np.load(self.inputs.directory("features-train") / FEATURES)[usable]
        queries = np.load(self.inputs.directory(f"features-{part}") / FEATURES)
        found = retrieval.nearest(queries, database, max(config.neighbours, retrieval.LOOKED))
        examples = self.inputs.data.readable(part)
        candidates = {
            example.id: [
                Candidate(training[usable[row]].caption or "", source=training[usable[row]].id)
                for row in (rows[:1] if _is_near(cosines, config.threshold) else rows[: config.neighbours])
            ]
            for example, rows, cosines in zip(examples, found.rows, found.cosines, strict=True)
        }
        cosines = {
            example.id: f"{best[0]:.6f}" for example, best in zip(examples, found.cosines, strict=True)
        }
        chosen = comparing.choose(self, work, candidates, directory)
        comparing.write(self, chosen, directory, TABLE, {"cosine": cosines})
        if ranks.rank() == 0:
            self._write_copies(directory, queries, database, found, usable)

    def _write_copies(
        self, directory: Path, queries: Any, database: Any, found: retrieval.Neighbours, usable: list[int]
    ) -> None:
        """Write which images have a copy in train, if any has."""
        import numpy as np

        from harness.data.images import decode

        training, examples = (self.inputs.data.readable(split) for split in ("train", self.part))

        def same(query: int, row: int) -> bool:
            pair = examples[query].image, training[usable[row]].image
            return retrieval.are_one(*(retrieval.thumbnail(np.asarray(decode(image))) for image in pair))

        copies = retrieval.copies(queries, database, found, same)
        if copies:
            rows = [(examples[query].id, training[usable[row]].id) for query, row in copies.items()]
            write_table(directory / COPIES, [("ID", "train"), *rows])


def _searched(config: "Config") -> bool:
    """Whether the run looks for similar training images by the features of its own model."""
    concepts = config.concepts
    by_concepts = concepts is not None and concepts.predictor == "knn" and concepts.own > 0
    return config.retrieval is not None or by_concepts


def _is_near(cosines: Any, threshold: float | None) -> bool:
    return threshold is not None and bool(cosines[0] >= threshold)
