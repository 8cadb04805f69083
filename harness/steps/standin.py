"""A small model that replaces a metric's own if the config says `standin`, trained on the training split."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from harness import metrics
from harness.metrics.settings import ScoreConfig
from harness.models import checkpoints
from harness.steps.base import Step
from harness.steps.inputs import Inputs

if TYPE_CHECKING:
    from harness.steps.plan import Plan
    from harness.steps.work import Work


class Standin(Step):
    """Writes the weights of one stand-in; `part` is its section of `score:`."""

    kind, version, weights = "standin", checkpoints.STANDIN_VERSION, True

    @classmethod
    def of(cls, plan: "Plan", before: Mapping[str, Step]) -> Iterator[Step]:
        for section in trained_here(plan.config.score) if plan.config.captions else ():
            yield cls(Inputs(plan, {}, ("train",), facts={"metric": section}), section)

    def build(self, work: "Work", directory: Path) -> None:
        examples = self.inputs.data.examples("train")
        images = [example.image for example in examples]
        standin = metrics.all_weights()[self.part].standin
        standin.build(images, [example.caption for example in examples], directory)


def trained_here(config: ScoreConfig) -> list[str]:
    """The sections of configured metrics whose stand-ins are trained on the training split."""
    return [name for name, weights in metrics.weights_of(config).items() if weights.is_trained_here(config)]


def with_standins(config: ScoreConfig, inputs: Inputs) -> ScoreConfig:
    """The config in which the word `standin` is replaced by the folder of the stand-in that a step reads."""
    for step in inputs.steps:
        if isinstance(step, Standin):
            config = metrics.all_weights()[step.part].renamed(config, str(step.directory))
    return config
