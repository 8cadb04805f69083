"""Post-processing of captions before submission: repetitions, capital letter, full stop."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from harness.decoding import postprocess
from harness.records.files import PREDICTIONS, read_captions, write_captions
from harness.steps.base import Step
from harness.steps.inputs import Inputs, values
from harness.steps.predict import given_captions

if TYPE_CHECKING:
    from harness.steps.plan import Plan
    from harness.steps.work import Work


class Postprocess(Step):
    """Writes the captions of one split as they are submitted."""

    kind, version = "postprocess", postprocess.VERSION
    section = ("postprocess", postprocess.PostprocessConfig, postprocess.PostprocessConfig())

    @classmethod
    def of(cls, plan: "Plan", before: Mapping[str, Step]) -> Iterator[Step]:
        for split in plan.splits:
            sources = [step for step in before.values() if step.captions == split]
            if sources:
                facts = {"fallback": plan.fallback.get(split)}
                steps = {sources[-1]: (PREDICTIONS,)}
                yield cls(Inputs(plan, values(plan.config, "postprocess"), steps=steps, facts=facts), split)

    @property
    def captions(self) -> str:
        return self.part

    @property
    def artifacts(self) -> Mapping[str, str]:
        return {f"predictions/{self.part}_after.csv": PREDICTIONS}

    def build(self, work: "Work", directory: Path) -> None:
        (source,) = self.inputs.steps
        rules = self.inputs.config.postprocess
        before = read_captions(source.directory / PREDICTIONS)
        after = {image: postprocess.postprocess(text, rules) for image, text in before.items()}
        write_captions(directory / PREDICTIONS, after | given_captions(self.inputs))
