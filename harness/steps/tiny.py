"""The small model, or image encoder, that `tiny` names in `model:`, built from the training split."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from harness.models import family
from harness.models.settings import TINY, prompt_text
from harness.steps.base import Step
from harness.steps.inputs import Inputs, values
from harness.steps.work import texts

if TYPE_CHECKING:
    from harness.steps.plan import Plan
    from harness.steps.work import Work


class Tiny(Step):
    """Writes a checkpoint in the layout of transformers."""

    kind, version, weights = "tiny", 3, True

    @classmethod
    def of(cls, plan: "Plan", before: Mapping[str, Step]) -> Iterator[Step]:
        config = plan.config
        side = family(config.model).built_from(config.model) if config.has_model else None
        if side is None:
            return
        read, facts = values(config, "model.tiny", "data.augment"), {"built_from": side}
        if not config.model.tiny.connector_epochs:  # models from before there was this key are found
            del read["model.tiny"]["connector_epochs"]
        if config.model.checkpoint == TINY:
            read |= values(config, "train.caption_cleaning", "train.max_words")
            read |= {"model.prompt": prompt_text(config.model.prompt)}
        else:
            facts["part"] = "vision"
        yield cls(Inputs(plan, read, ("train",), None, facts, ("data.cache",)))

    @property
    def decodes(self) -> Mapping[str, int]:
        return {"train": self.inputs.facts["built_from"]}

    def build(self, work: "Work", directory: Path) -> None:
        import numpy as np

        from harness.models import tiny

        config, examples = self.inputs.config, self.inputs.data.readable("train")
        names = sorted({cui for example in examples for cui in example.cuis})
        concepts = np.array([[cui in example.cuis for cui in names] for example in examples])
        pixels = work.pixels(self.inputs, "train", self.decodes["train"])
        with work.reporter.progress("Pre-training the tiny model") as advance:
            if "part" in self.inputs.facts:
                sizes, augmentation = config.model.tiny, config.data.augment
                return tiny.build_vision(sizes, pixels, concepts, augmentation, directory, advance)
            tiny.build(
                config.model.tiny,
                [(sentence or "", caption) for sentence, caption in texts(self.inputs, "train")],
                pixels,
                concepts,
                config.data.augment,
                prompt_text(config.model.prompt),
                directory,
                advance,
            )
