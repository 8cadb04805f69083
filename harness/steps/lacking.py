"""The keys of an experiment that use the concepts of the data, and the problems if it lacks their files."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from harness.errors import Problem
from harness.models import family
from harness.models.settings import ConceptPrompt

if TYPE_CHECKING:
    from harness.config.schema import Config
    from harness.steps.plan import Plan

_TRAIN, _VALID, _NAMES = "train concepts", "valid concepts", "concept names"
_WITHOUT = "train without it, for example: --set 'train.stages=[{epochs: 5, losses: {caption: 1}}]'"


def problems(plan: "Plan") -> list[Problem]:
    """The keys of a run that use files of concepts which its data lacks."""
    absent, found = plan.data.absent, []
    for key, wanted, instead in _uses(plan.config):
        if files := [absent[what] for what in wanted if what in absent]:
            what = f"it uses concepts, but {plan.data.root} has no file {', no file '.join(files)}"
            hint = f"Put {'it' if len(files) == 1 else 'them'} there, or {instead}"
            found.append(Problem(what, key=key, hint=hint))
    return found


def _uses(config: "Config") -> Iterator[tuple[str, tuple[str, ...], str]]:
    """Each key that uses concepts, what it uses as in `Listing.absent`, and what to do without it."""
    if config.concepts is not None:
        by_name = config.concepts.predictor == "from_captions" and config.concepts.own > 0
        key = "concepts" if config.captions else "task"
        instead = "leave the section concepts out." if config.captions else "set task: captions."
        yield key, (_TRAIN, _VALID, *((_NAMES,) if by_name else ())), instead
    if not config.has_model:
        return
    if isinstance(config.model.prompt, ConceptPrompt):
        yield (
            "model.prompt.concepts",
            (_TRAIN, _NAMES),
            'use the same text for all: model.prompt: "a photo of".',
        )
    if family(config.model).built_from(config.model) is not None and config.model.tiny.vision_epochs:
        instead = "build it without concepts: --set model.tiny.vision_epochs=0"
        yield "model.tiny.vision_epochs", (_TRAIN,), instead
    for number, stage in enumerate(config.train.stages if config.trains else ()):
        if stage.epochs and stage.losses.concept:
            yield f"train.stages.{number}.losses.concept", (_TRAIN, _VALID, _NAMES), _WITHOUT
        if stage.epochs and stage.losses.concepts:
            yield f"train.stages.{number}.losses.concepts", (_TRAIN, _VALID), _WITHOUT
