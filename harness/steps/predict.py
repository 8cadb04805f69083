"""Captions of a split by the fine-tuned model, or by the checkpoint itself if nothing is trained."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.config.sections import PredictConfig
from harness.records.files import CANDIDATES, PREDICTIONS
from harness.steps.base import Step
from harness.steps.inputs import Inputs, values
from harness.steps.prompts import prompts_in, prompts_of
from harness.steps.validating import contents_of, model_of
from harness.training.resume import BEST

if TYPE_CHECKING:
    from harness.config.schema import Config
    from harness.models.loading import Loaded
    from harness.steps.plan import Plan
    from harness.steps.work import Work


FINE_TUNED = ("train", "soup")
"""The steps of which one gives the weights of a run."""


class Predict(Step):
    """Writes the model's captions of one split."""

    kind, version, shared = "predict", 1, True
    section = ("predict", PredictConfig, PredictConfig())

    @classmethod
    def of(cls, plan: "Plan", before: Mapping[str, Step]) -> Iterator[Step]:
        if not plan.config.captions or not plan.config.has_model or plan.config.retrieval:
            return
        read, steps, facts = reads_model(plan, before)
        read |= _written(plan.config)
        for split in plan.splits:
            given = {"fallback": plan.fallback.get(split)}
            own = steps | prompts_in(before, split)
            yield cls(Inputs(plan, read, (split,), own, facts | given, ("data.cache",)), split)

    @property
    def captions(self) -> str:
        return self.part

    @property
    def artifacts(self) -> Mapping[str, str]:
        found = {f"predictions/{self.part}_before.csv": PREDICTIONS}
        if self.inputs.config.predict.has_candidates:
            found[f"predictions/{self.part}_candidates.csv"] = CANDIDATES
        return found

    @property
    def decodes(self) -> Mapping[str, int]:
        return {self.part: self.inputs.config.model.image_size}

    def build(self, work: "Work", directory: Path) -> None:
        from harness.decoding import predict

        ids = [example.id for example in self.inputs.data.examples(self.part)]
        config = self.inputs.config.predict
        pixels = work.pixels(self.inputs, self.part, self.inputs.config.model.image_size)
        given = given_captions(self.inputs)
        loaded = model_for(self.inputs, work)
        prompts = prompts_of(self.inputs, self.part, loaded.caption)
        with work.reporter.progress(f"Captioning {self.part}") as advance:
            predict.predict_split(
                loaded,
                ids,
                pixels,
                config,
                directory,
                advance,
                given,
                self.inputs.config.seed if config.samples else 0,
                prompts,
                look=self.part == "valid",
            )


def _written(config: "Config") -> dict[str, Any]:
    """The part of the config that determines captions; without candidates as it was before they existed."""
    predict, indifferent = config.predict, {"splits", "batch_size"}
    if not predict.has_candidates:
        indifferent |= {"num_return_sequences", "samples"}
    written = {"predict": predict.model_dump(exclude=indifferent)}
    return written | (values(config, "seed") if predict.samples else {})


def reads_model(
    plan: "Plan", before: Mapping[str, Step]
) -> tuple[dict[str, Any], dict[Step, Sequence[str] | None], dict[str, Any]]:
    """What a step declares that uses the run's model: parts of the config, earlier steps, and facts."""
    steps: dict[Step, Sequence[str] | None] = {s: None for s in before.values() if s.kind == "tiny"}
    for source in (before[name] for name in FINE_TUNED if name in before):
        return {}, steps | {source: (BEST,)}, {}
    return reads_checkpoint(plan, before)


def reads_checkpoint(
    plan: "Plan", before: Mapping[str, Step]
) -> tuple[dict[str, Any], dict[Step, Sequence[str] | None], dict[str, Any]]:
    """What a step declares that uses `model.checkpoint` as it is."""
    steps: dict[Step, Sequence[str] | None] = {s: None for s in before.values() if s.kind == "tiny"}
    precision = plan.config.train.model_dump(include={"precision", "vision_precision"})
    return model_of(plan) | {"train": precision}, steps, {"checkpoints": contents_of(plan)}


def model_for(inputs: Inputs, work: "Work") -> "Loaded":
    """The trained model that a step reads, or the checkpoint; from memory if it is there."""
    if work.model is None:
        from harness.models.loading import load_trained
        from harness.training import engine

        work.model = work.load(inputs)
        for source in (step for step in inputs.steps if step.name in FINE_TUNED):
            load_trained(work.model.model, source.directory / BEST)
        engine.place(work.model.model, inputs.config.train, work.kind)
    return work.model


def given_captions(inputs: Inputs) -> dict[str, str]:
    """The captions of unreadable images, by id."""
    given = inputs.facts["fallback"]
    return dict.fromkeys(given["ids"], given["caption"]) if given else {}
