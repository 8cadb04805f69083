"""Captions of a split by the fine-tuned model, or by the checkpoint itself if nothing is trained."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.captions import PREDICTIONS
from harness.config.sections import PredictConfig
from harness.steps.base import Step
from harness.steps.inputs import Inputs
from harness.steps.train import contents_of, model_of
from harness.training.resume import BEST

if TYPE_CHECKING:
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
        if not plan.config.has_model or plan.config.retrieval:
            return
        read, steps, facts = reads_model(plan, before)
        read["predict"] = plan.config.predict.model_dump(exclude={"splits", "batch_size"})
        for split in plan.splits:
            given = {"fallback": plan.fallback.get(split)}
            yield cls(Inputs(plan, read, (split,), steps, facts | given, ("data.cache",)), split)

    @property
    def captions(self) -> str:
        return self.part

    @property
    def artifacts(self) -> Mapping[str, str]:
        return {f"predictions/{self.part}_before.csv": PREDICTIONS}

    @property
    def decodes(self) -> Mapping[str, int]:
        return {self.part: self.inputs.config.model.image_size}

    def build(self, work: "Work", directory: Path) -> None:
        from harness.decoding import predict

        ids = [example.id for example in self.inputs.data.examples(self.part)]
        pixels = work.pixels(self.inputs, self.part, self.inputs.config.model.image_size)
        given = given_captions(self.inputs)
        with work.reporter.progress(f"Captioning {self.part}") as advance:
            predict.predict_split(
                model_for(self.inputs, work),
                ids,
                pixels,
                self.inputs.config.predict,
                directory,
                advance,
                given,
            )


def reads_model(
    plan: "Plan", before: Mapping[str, Step]
) -> tuple[dict[str, Any], dict[Step, Sequence[str] | None], dict[str, Any]]:
    """What a step declares that uses the run's model: parts of the config, earlier steps, and facts."""
    steps: dict[Step, Sequence[str] | None] = {s: None for s in before.values() if s.kind == "tiny"}
    for source in (before[name] for name in FINE_TUNED if name in before):
        return {}, steps | {source: (BEST,)}, {}
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
