"""What the steps of one run share while they are built: device, model in memory, reporter."""

import contextlib
import gc
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from harness import metrics
from harness.concepts.labels import labels_of
from harness.errors import Problem, UserError
from harness.machine import device, ranks
from harness.models import checkpoints, family
from harness.steps.base import Step
from harness.steps.inputs import Inputs

if TYPE_CHECKING:
    from harness.config.schema import Config
    from harness.models.loading import Loaded

LESS_MEMORY = (
    "Other processes may use it. `harness doctor EXPERIMENT` shows what training needs, and which "
    "options need less; for captioning, lower predict.batch_size. Then the same command continues."
)
HEAD = "concepts.head"
"""The key of the settings of a classifier of concepts."""
Watch = Callable[[Mapping[str, Any]], None]
"""Called with every validation of a training, on every rank; may raise `Pruned` on all."""


class Reporter(Protocol):
    """Reports progress to the user."""

    def say(self, text: str) -> None:
        """Print one line."""

    def begin(self, run: str, step: str) -> None:
        """Print that a step of a run begins."""

    def progress(self, label: str) -> contextlib.AbstractContextManager[Callable[..., None]]:
        """Show a bar for long work; the context gives `advance(done, total, note="")`."""


class Work:
    """Builds the steps of one run; `model` is the captioner that training passes to captioning."""

    def __init__(self, config: "Config", reporter: Reporter, watch: Watch | None = None) -> None:
        self.run_name, self.reporter, self.watch = config.run_name, reporter, watch
        found = device.probe(config.device)
        self.kind, self.device = found.kind, str(found)
        self.model: Loaded | None = None
        self.whole_images = family(config.model).WHOLE_IMAGES

    @property
    def scoring_device(self) -> str:
        """The torch device of neural metrics."""
        return device.scoring_device(self.kind)

    def say(self, text: str) -> None:
        """Print one line with the run's name."""
        self.reporter.say(f"{self.run_name}: {text}")

    def build(self, step: Step, directory: Path) -> bool:
        """Build a step into its directory; False if the output is incomplete and a retry may complete it.

        Every rank of a launch calls this. Rank 0 alone builds the steps that are not shared.
        """
        if ranks.rank() and not step.shared:
            return True
        self.reporter.begin(self.run_name, step.name)
        try:
            return step.build(self, directory) is not False
        except RuntimeError as error:
            if not device.out_of_memory(error):
                raise
            self.say(str(error).strip())
            what = f"the {self.kind} has not enough memory for this step"
            raise UserError([Problem(what, key=step.name, hint=LESS_MEMORY)], exit_code=1) from error

    def pixels(self, inputs: Inputs, split: str, side: int) -> Any:
        """The readable images of a split as uint8 (N, side, side, 3); whole ones if the family takes them."""
        from harness.data.images import Whole, open_pixels

        if self.whole_images:
            return Whole(inputs.data.readable(split), side)
        cache = inputs.root / "cache" if inputs.config.data.cache else None
        with self.reporter.progress(f"Decoding {split} images") as advance:
            return open_pixels(inputs.data.readable(split), side, cache, progress=advance)

    def load(self, inputs: Inputs) -> "Loaded":
        """Load the model as it is before training; first unload metrics' models from an accelerator.

        It has a head if the step or an earlier one declares its settings (`HEAD`), as training does.
        """
        from harness.training import engine

        self.unload_metrics()
        gc.collect()  # frees the model of an earlier run, which has reference cycles
        model, config = inputs.config.model, inputs.config.train
        loaded = family(model).load(model, config, base(inputs), engine.frozen_dtype(config, self.kind))
        if HEAD in inputs.keys:
            from harness.models import head

            examples = inputs.data.readable("train")
            images = Counter(cui for example in examples for cui in set(example.cuis))
            head.attach(
                loaded.model, inputs.config.concepts.head, [images[c] for c in labels(inputs)], len(examples)
            )
        return loaded

    def free_memory(self) -> float:
        """Bytes of memory that this rank can use for the captioner."""
        self.drop_model()
        self.unload_metrics()
        return device.memory(self.kind)

    def unload_metrics(self) -> None:
        """Unload the metrics' models from an accelerator, because the captioner needs its memory."""
        if self.kind != "cpu":
            metrics.unload()
            gc.collect()

    def drop_model(self) -> None:
        """Free the captioner's memory."""
        self.model = None
        gc.collect()


def labels(inputs: Inputs) -> tuple[str, ...]:
    """The concepts that a head predicts, in its order. Raises `UserError` if there are none."""
    fewest = inputs.config.concepts.min_images
    found = labels_of(inputs.data.readable("train"), fewest)
    if not found:
        what = f"no concept has {fewest} or more training images, so there is none to predict"
        raise UserError([Problem(what, key="concepts.min_images")], exit_code=1)
    return found


def base(inputs: Inputs) -> Path | None:
    """The folder of `model.checkpoint`; None if the family has no such checkpoint."""
    model = inputs.config.model
    if family(model).built_from(model) is not None:
        return inputs.directory("tiny")
    name = family(model).checkpoints(model).get("checkpoint")
    return checkpoints.find(name).folder if name else None


def texts(inputs: Inputs, split: str) -> list[tuple[str | None, str]]:
    """(concept sentence or None, caption) of each readable image, as the model sees them.

    Without a file of concept names there are no sentences: CUIs are no words.
    """
    from harness.models.text import clean_caption, concept_sentence

    config, names = inputs.config.train, inputs.data.concept_names
    return [
        (
            concept_sentence([names.get(cui, cui) for cui in example.cuis])
            if example.cuis and names
            else None,
            clean_caption(example.caption or "", config.caption_cleaning, config.max_words),
        )
        for example in inputs.data.readable(split)
    ]
