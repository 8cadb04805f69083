"""Validation in training: which metrics choose the best weights, and their values for the current model."""

from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

from harness import metrics
from harness.concepts.labels import labels_of
from harness.config.editions import EDITIONS
from harness.config.sections import PredictConfig
from harness.data.halves import TUNE, half
from harness.data.listing import Example
from harness.errors import UserError
from harness.machine import ranks
from harness.metrics.settings import ScoreConfig
from harness.models import checkpoints, family
from harness.steps.base import Step
from harness.steps.inputs import Inputs, values
from harness.steps.prompts import prompts_of
from harness.steps.standin import Standin, trained_here, with_standins
from harness.steps.work import HEAD, labels
from harness.store import fingerprint
from harness.training import judges
from harness.training.resume import EMA, FLOOR, PRIMARY, VALIDATION
from harness.training.settings import IMAGE_GAP

if TYPE_CHECKING:
    import numpy as np

    from harness.config.schema import Config
    from harness.models.loading import Loaded
    from harness.steps.plan import Plan
    from harness.steps.work import Work

CONCEPT_F1 = "concept_f1"
"""What chooses weights that predict concepts; see `training.detection`."""
_RESAMPLES = 1000  # of the intervals that may end a self-critical stage


def model_of(plan: "Plan") -> dict[str, Any]:
    """The part of `model:` that determines the output of steps that load the model."""
    return {"model": family(plan.config.model).settings(plan.config.model)}


def contents_of(plan: "Plan") -> list[Any]:
    """Key, name and file contents of each checkpoint; contents distinguish checkpoints of the same name."""
    named = family(plan.config.model).checkpoints(plan.config.model)
    found = [(key, name, checkpoints.find(name)) for key, name in named.items()]
    cache = plan.root / "cache"
    return [[key, name, place and checkpoints.contents(place.folder, cache)] for key, name, place in found]


def primary_metric(config: "Config") -> str:
    """The score that chooses the best checkpoint: the edition's primary score, or BERTScore.

    It is BERTScore if a part of the primary score is not among the metrics or lacks weights.
    """
    edition = EDITIONS[config.edition]
    if edition.primary is None:
        return "bertscore"
    lacking = any(metrics.is_absent(part, config.score) for part in edition.parts(edition.primary))
    return "bertscore" if lacking else edition.primary


def choosing(config: "Config") -> ScoreConfig:
    """The score config of training, with only the metrics that choose the best weights, reward or watch."""
    parts = EDITIONS[config.edition].parts(primary_metric(config))
    return config.score.model_copy(update={"metrics": tuple(dict.fromkeys((*parts, *judges.needed(config))))})


def validating(
    plan: "Plan", before: Mapping[str, Step]
) -> tuple[dict[str, Any], dict[Step, Sequence[str] | None], dict[str, Any]]:
    """What a step declares that chooses weights: parts of the config, earlier steps, and facts.

    With a head, these are also its settings and its labels.
    """
    config, only = plan.config, choosing(plan.config)
    read, facts = model_of(plan), {"checkpoints": contents_of(plan)}
    if config.train.trains_head:
        read |= values(config, "concepts.min_images", HEAD)
        found = labels_of(plan.data.readable("train"), config.concepts.min_images)
        facts["labels"] = [len(found), fingerprint(found)]
    if not config.captions:
        tiny = {step: None for name, step in before.items() if name == "tiny"}
        return read, tiny, facts | {"primary": CONCEPT_F1}
    read["score"], read["edition"] = scoring_of(config, only.metrics, primary_metric(config))
    names = {"tiny", *(f"{Standin.kind}-{section}" for section in trained_here(only))}
    steps: dict[Step, Sequence[str] | None] = {step: None for name, step in before.items() if name in names}
    facts |= {
        "primary": primary_metric(config),
        "weights": metrics.identities_of(only, plan.root / "cache"),
    }
    return read, steps, facts


def scoring_of(
    config: "Config", names: Sequence[str], mean: str | None = None
) -> tuple[dict[str, Any], list[Any]]:
    """The parts of `score:` and of the edition that affect metrics, and their `mean` if it is given."""
    edition, only = EDITIONS[config.edition], config.score.model_copy(update={"metrics": tuple(names)})
    sections = {"precision", *metrics.weights_of(only)}
    settings = {key: value for key, value in only.model_dump().items() if key in sections}
    return settings, [edition.rules, edition.aggregates if mean in edition.aggregates else None]


class Validation:
    """The validations of one training, whose `inputs` include those that `validating` declares."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.starred: Set[str] = frozenset()
        """The names of the scores that are not official, known after the first validation."""

    @property
    def of_concepts(self) -> bool:
        """Whether the run predicts concepts and no captions."""
        return self.inputs.facts["primary"] == CONCEPT_F1

    def scores(self, work: "Work", loaded: "Loaded", pixels: Any) -> dict[str, float]:
        """Score the current model on validation images.

        Captions are always decoded greedily, whatever `predict` says, so a study of decoding trains once.
        """
        config, examples = self.inputs.config, self.inputs.data.readable("valid")
        chosen = self._chosen(examples)
        found = self._concepts(loaded, pixels, chosen) if config.train.trains_head else {}
        if self.of_concepts:
            return found | {PRIMARY: found[f"valid_{CONCEPT_F1}"]} if found else {}
        names, watched = judges.needed(config), judges.watched(config.train)
        scores, captions = greedy_scores(
            self.inputs, work, loaded, pixels, chosen, names, _RESAMPLES if watched else 0
        )
        if ranks.rank():
            return {}
        floors = self._floors(scores, captions, [examples[i].caption for i in chosen])
        return self._row(scores) | floors | found

    def _chosen(self, examples: Sequence[Example]) -> "np.ndarray":
        """The places of the images that choose weights: of valid, `train.evaluate_images` at random.

        For concepts, all of the half `tune`, so that scores on the half `held` are of unseen images.
        """
        import numpy as np

        if self.of_concepts:
            tune = np.flatnonzero([half(example.id) == TUNE for example in examples])
            return tune if len(tune) else np.arange(len(examples))
        fit = np.flatnonzero([example.trains for example in examples])
        count = min(self.inputs.config.train.evaluate_images, len(fit))
        return np.sort(fit[np.random.default_rng(0).permutation(len(fit))[:count]])

    def _concepts(self, loaded: "Loaded", pixels: Any, chosen: Sequence[int]) -> dict[str, float]:
        """The F1 of the concepts that the head predicts for these validation images, on rank 0."""
        import numpy as np

        from harness.models import head
        from harness.training.detection import best_f1

        examples, own = self.inputs.data.readable("valid"), labels(self.inputs)
        found = ranks.gather(list(head.probabilities(loaded, pixels, ranks.share(chosen))))
        if ranks.rank():
            return {}
        return {f"valid_{CONCEPT_F1}": best_f1(np.stack(found), own, [examples[i].cuis for i in chosen])}

    def _floors(
        self, scores: Mapping[str, metrics.Score], captions: Sequence[str], references: Sequence[str]
    ) -> dict[str, float]:
        """The floors that these scores set for a self-critical stage, and the image gap if it has one."""
        config, names = self.inputs.config, judges.watched(self.inputs.config.train)
        row = {f"{FLOOR}{name}": scores[name].low for name in names if name in scores}
        if IMAGE_GAP in names:
            resampled = config.score.model_copy(update={"bootstrap": _RESAMPLES})
            gaps = metrics.image_gap(captions, references, resampled, config.edition, names=["rouge1"])
            row |= {f"valid_{IMAGE_GAP}": gaps["rouge1"].get("gap")}
            row |= {f"{FLOOR}{IMAGE_GAP}": gaps["rouge1"].get("low")}
        return {name: value for name, value in row.items() if value is not None}

    def _row(self, scores: Mapping[str, metrics.Score]) -> dict[str, float]:
        primary = self.inputs.facts["primary"]
        row = {f"valid_{name}": score.value for name, score in scores.items() if score.value is not None}
        if f"valid_{primary}" not in row:
            what = f"{primary} must choose the best checkpoint, but is absent: {scores[primary].reason}"
            raise UserError(what, exit_code=1)
        self.starred = {f"valid_{name}" for name, score in scores.items() if not score.official}
        return row | {PRIMARY: row[f"valid_{primary}"]}

    def note(self, row: Mapping[str, Any]) -> str:
        """The losses and scores of a row of `losses.jsonl`, with a star on a score that is not official."""
        shown = [n for n in row if n == "loss" or (n.startswith(VALIDATION) and not n.endswith("_primary"))]
        starred = {name for name in shown if name.removeprefix(EMA) in self.starred}
        return "  ".join(f"{name} {row[name]:.4f}{'*' * (name in starred)}" for name in shown)


def greedy_scores(
    inputs: Inputs,
    work: "Work",
    loaded: "Loaded",
    pixels: Any,
    chosen: Sequence[int],
    names: Sequence[str] = (),
    resamples: int = 0,
) -> tuple[dict[str, metrics.Score], list[str]]:
    """Scores of greedy captions of these validation images, and the captions, on every rank.

    Each rank captions its share. `names` are metrics besides those that choose weights.
    """
    from harness.decoding import predict

    config, examples = inputs.config, inputs.data.readable("valid")
    greedy = PredictConfig(num_beams=1, max_new_tokens=config.train.max_caption_tokens)
    prompts = prompts_of(inputs, "valid", loaded.caption)
    captions = ranks.gather(predict.captions(loaded, pixels, ranks.share(chosen), greedy, prompts))
    parts = EDITIONS[config.edition].parts(inputs.facts["primary"])
    wanted = {"metrics": tuple(dict.fromkeys((*parts, "rouge1", *names))), "bootstrap": resamples}
    settings = with_standins(config.score, inputs).model_copy(update=wanted)
    references = [examples[i].caption for i in chosen]
    images = [examples[i].image for i in chosen]
    scores = metrics.score(captions, references, images, settings, config.edition, work.scoring_device)[0]
    work.unload_metrics()
    return scores, captions
