"""A small model in place of a metric's own, trained on the training split where the config says `standin`."""

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
    """Leaves the weights of one stand-in; `part` is the section of `score:` that they belong to."""

    kind, version = "standin", checkpoints.STANDIN_VERSION

    @classmethod
    def of(cls, plan: "Plan", before: Mapping[str, Step]) -> Iterator[Step]:
        for section in trained_here(plan.config.score):
            yield cls(Inputs(plan, {}, ("train",), facts={"metric": section}), section)

    def build(self, work: "Work", directory: Path) -> None:
        examples = self.inputs.data.examples("train")
        images = [example.image for example in examples]
        standin = metrics.all_weights()[self.part].standin
        standin.build(images, [example.caption for example in examples], directory)


def trained_here(config: ScoreConfig) -> list[str]:
    """The sections of wanted metrics whose stand-ins are trained on the training split."""
    return [name for name, weights in metrics.weights_of(config).items() if weights.is_trained_here(config)]


def with_standins(config: ScoreConfig, inputs: Inputs) -> ScoreConfig:
    """The config with the folders of the stand-ins that a step reads in place of the word `standin`."""
    for step in inputs.steps:
        if isinstance(step, Standin):
            config = metrics.all_weights()[step.part].renamed(config, str(step.directory))
    return config
