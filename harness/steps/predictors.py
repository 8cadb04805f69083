"""The predictors of concepts: what each reads, and the probabilities that it gives."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from harness.machine import ranks
from harness.records.files import PREDICTIONS, read_captions
from harness.steps.base import Step
from harness.steps.inputs import values
from harness.steps.predict import model_for, reads_model
from harness.steps.prompts import FEATURES, OWN
from harness.store import fingerprint

if TYPE_CHECKING:
    import numpy as np

    from harness.steps.plan import Plan
    from harness.steps.work import Work


class Reads(NamedTuple):
    """What a step declares that uses a predictor, as `Inputs` takes it."""

    config: dict[str, Any]
    steps: dict[Step, Sequence[str] | None]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Predictor:
    """A way to predict concepts.

    `reads(plan, before, split)` is what it declares; `before` are the earlier steps of the run.
    `predict(step, work, labels)` gives the probabilities float32 (N, L) of the readable images of the step's
    split. All ranks call it, and rank 0 gets the result. `decodes`: whether it reads the images itself.
    """

    reads: Callable[["Plan", Mapping[str, Step], str], Reads]
    predict: Callable[[Step, "Work", Sequence[str]], "np.ndarray"]
    decodes: bool = False


def _of_classifier(plan: "Plan", before: Mapping[str, Step], split: str) -> Reads:
    return Reads(*reads_model(plan, before))


def _classify(step: Step, work: "Work", labels: Sequence[str]) -> "np.ndarray":
    """The probabilities of the trained head; each rank predicts its share of the images."""
    import numpy as np

    from harness.models import head

    inputs = step.inputs
    pixels = work.pixels(inputs, step.part, inputs.config.model.image_size)
    own = ranks.share(list(range(len(inputs.data.readable(step.part)))))
    with work.reporter.progress(f"Concepts of {step.part}") as advance:
        found = head.probabilities(model_for(inputs, work), pixels, own, advance=advance)
    return np.array(ranks.gather(list(found)), dtype=np.float32).reshape(-1, len(labels))


def _of_knn(plan: "Plan", before: Mapping[str, Step], split: str) -> Reads:
    read = values(plan.config, "concepts.knn.neighbours", "concepts.knn.weighted")
    features = [before[f"{OWN}-{part}"] for part in dict.fromkeys(("train", split))]
    return Reads(read, dict.fromkeys(features, (FEATURES,)), {})


def _nearest(step: Step, work: "Work", labels: Sequence[str]) -> "np.ndarray":
    import numpy as np

    from harness.concepts import knn

    if ranks.rank():
        return np.zeros((0, len(labels)), np.float32)
    inputs = step.inputs
    database, queries = (
        np.load(inputs.directory(f"{OWN}-{part}") / FEATURES) for part in ("train", step.part)
    )
    training = [example.cuis for example in inputs.data.readable("train")]
    return knn.probabilities(queries, database, training, labels, inputs.config.concepts.knn)


def _of_captions(plan: "Plan", before: Mapping[str, Step], split: str) -> Reads:
    source = [step for step in before.values() if step.captions == split][-1]
    names = fingerprint(dict(plan.data.concept_names))  # those of the splits lack names that hide others
    return Reads({}, {source: (PREDICTIONS,)}, {"names": names})


def _in_captions(step: Step, work: "Work", labels: Sequence[str]) -> "np.ndarray":
    from harness.concepts.names import from_captions

    (source,) = step.inputs.steps
    captions = read_captions(source.directory / PREDICTIONS)
    own = [captions[example.id] for example in step.inputs.data.readable(step.part)]
    return from_captions(own, step.inputs.data.concept_names, labels)


PREDICTORS = {
    "classifier": Predictor(_of_classifier, _classify, decodes=True),
    "knn": Predictor(_of_knn, _nearest),
    "from_captions": Predictor(_of_captions, _in_captions),
}
"""By `concepts.predictor`."""
