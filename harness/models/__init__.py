"""The captioning models by family, and small checkpoints that replace weights that are not at hand."""

import importlib
from typing import TYPE_CHECKING

from harness.errors import Problem

if TYPE_CHECKING:
    from harness.models.base import Family
    from harness.models.settings import ModelConfig
    from harness.training.settings import TrainConfig

FAMILIES = {
    "blip2": "harness.models.blip2",
    "prefix": "harness.models.prefix",
    "vlm": "harness.models.vlm",
    "encoder": "harness.models.encoder",
}
"""The module of each `model.family`; `base.Family` describes its functions."""


def family(model: "ModelConfig") -> "Family":
    """The family of the configured model; imports its module, without torch."""
    return importlib.import_module(FAMILIES[model.family])


def writes(model: "ModelConfig") -> bool:
    """Whether the model writes captions."""
    return "caption" in family(model).LOSSES


def problems(model: "ModelConfig", train: "TrainConfig", captions: bool = True) -> list[Problem]:
    """The problems of a model on this machine, and of training it in these stages.

    `captions`: whether it shall write captions.
    """
    from harness.models.base import Losses

    chosen = family(model)
    found = chosen.problems(model)
    if not writes(model):
        if captions:
            what = f"the family {model.family} writes no captions; it predicts concepts"
            found.append(Problem(what, key="model.family", hint="Use task: concepts, or another family."))
        found += [
            Problem(f"the family {model.family} has no texts", key=f"train.{key}")
            for key in ("train_language", "dropout", "language_dropout")
            if getattr(train, key)
        ]
    if not captions and not train.trains_head and any(stage.epochs for stage in train.stages):
        what = "no stage has the loss concepts, by which the best weights are chosen if task is concepts"
        hint = "Give it to a stage, such as losses: {concepts: 1}, or train nothing: stages: []"
        found.append(Problem(what, key="train.stages", hint=hint))
    for number, stage in enumerate(train.stages):
        for name, weight in stage.losses:
            needed = (name,) if name in Losses._fields else ("caption", "concept")
            if weight and stage.epochs and not set(needed) <= set(chosen.LOSSES):
                what = f"the family {model.family} has no loss {name}; {', '.join(chosen.LOSSES)} are allowed"
                found.append(Problem(what, key=f"train.stages.{number}.losses.{name}"))
    new = chosen.new(model)
    if new and not any(stage.epochs for stage in train.stages):
        what = f"nothing is trained, but {' and '.join(new)} would be new and random"
        found.append(Problem(what, key="train.stages", hint="Train at least one stage."))
    return found
