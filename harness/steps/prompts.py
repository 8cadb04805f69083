"""Prompts that begin with a text of each image's own: captions of similar images, or concepts.

The former are `model.prompt: {retrieved: ...}`, the latter `model.prompt: {concepts: ...}`.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import records
from harness.concepts.labels import labels_of
from harness.decoding import retrieval
from harness.errors import Problem, UserError
from harness.models.checkpoints import sha256
from harness.models.settings import ConceptPrompt, longest_prompt
from harness.records.files import read_lists, read_rows, write_table
from harness.steps.base import Step
from harness.steps.inputs import Inputs, values
from harness.steps.origins import check_split
from harness.store import products

if TYPE_CHECKING:
    import numpy as np

    from harness.models.text import Codec
    from harness.steps.plan import Plan
    from harness.steps.work import Work

FEATURES, PROMPTS = "features.npy", "prompts.csv"
"""For each readable image: its features; its prompt, and the nearest training images or concepts in it."""
OWN, BASE = "features", "base_features"
"""The kinds of steps with image features: of the run's own model, and of `model.checkpoint` as it is."""
_COLUMNS = ("ID", "neighbours", "prompt")
_KEY, _CONCEPTS = "model.prompt.features", "model.prompt.concepts"


class Prompts(Step):
    """Writes for each image of a split the captions, or the concepts, that its prompt begins with."""

    kind, version = "prompts", 1

    @classmethod
    def of(cls, plan: "Plan", before: Mapping[str, Step]) -> Iterator[Step]:
        splits = prompted(plan)
        if isinstance(plan.config.model.prompt, ConceptPrompt):
            yield from (cls(_reads_concepts(plan, split), split) for split in splits)
            return
        read = ("model.prompt.retrieved", "model.prompt.words", "model.image_size", "train.caption_cleaning")
        for split in splits:
            parts = ("train", split)
            steps: dict[Step, Sequence[str] | None] = {
                step: (FEATURES,) for step in before.values() if step.kind == BASE and step.part in parts
            }
            facts = {} if steps else {"features": {part: _named(plan, part)[1] for part in parts}}
            besides = ("data.cache", _KEY)
            yield cls(Inputs(plan, values(plan.config, *read), parts, steps, facts, besides), split)

    @property
    def artifacts(self) -> Mapping[str, str]:
        return {f"prompts/{self.part}.csv": PROMPTS}

    @property
    def decodes(self) -> Mapping[str, int]:
        if self._of_concepts:
            return {}
        return dict.fromkeys(("train", self.part), self.inputs.config.model.image_size)

    def found(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"standin_model": record["standin_model"] or self.inputs.facts.get("standin", False)}

    @property
    def _of_concepts(self) -> bool:
        return "predicted" in self.inputs.facts

    def build(self, work: "Work", directory: Path) -> None:
        write_table(directory / PROMPTS, self._concepts() if self._of_concepts else self._captions(work))

    def _concepts(self) -> list[tuple[str, ...]]:
        """The concepts of each image and their sentence; an image without concepts gets neither."""
        from harness.models.text import concept_sentence

        data, most = self.inputs.data, self.inputs.config.model.prompt.most
        place = {cui: number for number, cui in enumerate(labels_of(data.readable("train"), 1))}
        predicted = self._predicted()
        rows = [("ID", "CUIs", "prompt")]
        for example in data.readable(self.part):
            cuis = example.cuis if predicted is None else predicted[example.id]
            kept = list(dict.fromkeys(cuis))[:most]
            # one order for true and predicted concepts, which are listed in orders of their own
            kept.sort(key=lambda cui: (place.get(cui, len(place)), cui))
            names = [data.concept_names.get(cui, cui) for cui in kept]
            rows.append((example.id, ";".join(kept), concept_sentence(names) if names else ""))
        return rows

    def _predicted(self) -> dict[str, tuple[str, ...]] | None:
        """The concepts that the named run has predicted; None if the true ones are used."""
        digest = self.inputs.facts["predicted"]
        if digest is None:
            return None
        run = self.inputs.config.model.prompt.concepts
        folder = self.inputs.root / run
        file = records.artifact(folder, records.read(folder, key=_CONCEPTS), _lists(self.part))
        if sha256(file, None) != digest:
            raise UserError(f"the concepts of {run} changed; start again", exit_code=1)
        return read_lists(file)

    def _captions(self, work: "Work") -> list[tuple[str, ...]]:
        """The neighbours of each image and their captions."""
        from harness.models.text import clean_caption

        cleaning, words = self.inputs.config.train.caption_cleaning, self.inputs.config.model.prompt.words
        training, examples = (self.inputs.data.readable(split) for split in ("train", self.part))
        captions = [
            clean_caption(example.caption or "", cleaning, words).rstrip(" .,;") for example in training
        ]
        rows = [
            (
                example.id,
                " ".join(training[row].id for row in near),
                f"Similar: {'; '.join(captions[row] for row in near)}." if near else "",
            )
            for example, near in zip(examples, self._neighbours(work), strict=True)
        ]
        return [_COLUMNS, *rows]

    def _neighbours(self, work: "Work") -> list[list[int]]:
        """The nearest training images of each image, by row; a training image gets no copy of itself."""
        import numpy as np

        count, side = self.inputs.config.model.prompt.retrieved, self.inputs.config.model.image_size
        training = self._features("train")
        mean = training.mean(0)
        database = retrieval.centred(training, mean)
        if self.part != "train":
            queries = retrieval.centred(self._features(self.part), mean)
            return retrieval.nearest(queries, database, count).rows.tolist()
        pixels = work.pixels(self.inputs, "train", side)

        @functools.lru_cache(maxsize=10_000)
        def thumbnail(row: int) -> np.ndarray:
            return retrieval.thumbnail(np.asarray(pixels[row]))

        def is_copy(row: int, other: int, cosine: float) -> bool:
            if row == other or cosine >= retrieval.TWINS:
                return True
            return cosine >= retrieval.ALIKE and retrieval.are_one(thumbnail(row), thumbnail(other))

        with work.reporter.progress("Similar images of train") as advance:
            return retrieval.others(database, count, is_copy, advance)

    def _features(self, split: str) -> "np.ndarray":
        import numpy as np

        if "features" not in self.inputs.facts:
            return np.load(self.inputs.directory(f"{BASE}-{split}") / FEATURES)
        run = self.inputs.config.model.prompt.features
        folder = self.inputs.root / run
        file = records.step_file(folder, records.read(folder), f"{OWN}-{split}", FEATURES)
        return np.load(file)


def prompts_of(inputs: Inputs, split: str, codec: "Codec") -> "list[tuple[int, ...]]":
    """The ids before the caption of each readable image of a split, for a step that reads its prompts."""
    examples = inputs.data.readable(split)
    found = [step for step in inputs.steps if step.kind == Prompts.kind and step.part == split]
    if not found:
        return [codec.prompt] * len(examples)
    given = {row["ID"]: row["prompt"] for row in read_rows(found[0].directory / PROMPTS)}
    most = longest_prompt(inputs.config.model.prompt)
    return [codec.prompt_after(given[example.id], most) for example in examples]


def prompts_in(before: Mapping[str, Step], *splits: str) -> dict[Step, Sequence[str] | None]:
    """The prompts of these splits among earlier steps, as a step declares them that reads them."""
    wanted = [f"{Prompts.kind}-{split}" for split in splits]
    return {before[name]: (PROMPTS,) for name in wanted if name in before}


def _reads_concepts(plan: "Plan", split: str) -> Inputs:
    """What the prompts of a split are made of: its own concepts if it is trained on, else predicted ones.

    Raises `UserError` if the named run has not finished, or has no concepts of these images.
    """
    read = values(plan.config, "model.prompt.most")
    if plan.config.trains and split in plan.config.data.fit_on:
        return Inputs(plan, read, ("train", split), {}, {"predicted": None})
    run, hint = plan.config.model.prompt.concepts, "Name a finished run with concepts on the same data."
    folder = plan.root / run
    record = records.read(folder, ("standin_model", "data"), _CONCEPTS)
    if record["status"] != "FINISHED":
        what = f"{run} has not finished (status {record['status']})"
        raise UserError([Problem(what, folder, key=_CONCEPTS, hint=records.finish(record))])
    check_split(plan, record, run, split, _CONCEPTS, hint)
    digest = sha256(records.artifact(folder, record, _lists(split)), None)
    facts = {"predicted": digest, "standin": record["standin_model"]}
    return Inputs(plan, read, ("train", split), {}, facts, (_CONCEPTS,))


def _lists(split: str) -> str:
    return records.FINAL["concept"].format(split=split)


def prompted(plan: "Plan") -> list[str]:
    """The splits whose images need prompts of their own."""
    config = plan.config
    if isinstance(config.model.prompt, str) or not config.has_model:
        return []
    captioned = plan.splits if config.captions and not config.retrieval else []
    used = ("train", "valid") if config.trains else ("valid",) if config.soup else ()
    return list(dict.fromkeys([*used, *captioned]))


def _named(plan: "Plan", split: str) -> tuple[Path, str]:
    """The file of a named run's image features, and its SHA-256; raises `UserError` if there is none."""
    run, hint = plan.config.model.prompt.features, "Name a finished run with retrieval: on the same data."
    folder = plan.root / run
    record = records.read(folder, key=_KEY)
    place = record["steps"].get(f"{OWN}-{split}")
    if place is None or not (found := list(products(plan.root / place, (FEATURES,)).values())):
        raise UserError([Problem(f"{run} has no image features of {split}", key=_KEY, hint=hint)])
    check_split(plan, record, run, split, _KEY, hint)
    return plan.root / place / FEATURES, found[0]
