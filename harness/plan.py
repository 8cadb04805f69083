"""What a run will do: its steps, what determines each, and what is missing before it may start.

A step is a directory named by the fingerprint of what determines its output: the part of the config that it
reads, the steps and data before it, and the version of its code. Two variants that differ in de-duplication
only share training and generation; the same command after a crash goes on where it stopped. Nothing here
imports torch, so that `--dry-run` answers at once.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from harness import metrics
from harness.captions import PREDICTIONS
from harness.config.editions import EDITIONS
from harness.config.schema import TINY, Config, ScoreConfig
from harness.data import QUICK_IMAGES, Dataset, load, unchecked
from harness.data.checks import WITHOUT_WORDS
from harness.data.images import unbuilt
from harness.data.readers import together
from harness.decoding import postprocess
from harness.errors import Problem, UserError
from harness.machine import device
from harness.models import checkpoints, family
from harness.store import free, gb, is_done, products, step_directory
from harness.submission.checks import some
from harness.training.resume import BEST

RUNS = Path("runs")
# Raise one when its code makes something else of the same inputs: what was made before is then made anew.
TINY_VERSION = 3
TRAIN_VERSION = 3
PREDICT_VERSION = 1
SCORE_VERSION = 3


HOW = {"zero_stage", "offload", "checkpoint_every_steps", "keep_checkpoints"}
"""Keys of `train` that say how training is done, and not what comes out."""


class Reporter(Protocol):
    """What a run tells the person at the terminal."""

    def say(self, text: str) -> None:
        """One line of what is going on."""

    def progress(self, label: str) -> contextlib.AbstractContextManager[Callable[..., None]]:
        """A bar for long work: the context gives `advance(done, total, note="")`."""


@dataclass(frozen=True)
class Plan:
    """The steps of one run and where they lie; made from config and data alone, without torch."""

    config: Config
    data: Dataset
    root: Path = RUNS

    @cached_property
    def inputs(self) -> dict[str, dict[str, Any]]:
        """What determines the output of each step, by step name in the order of running."""
        config, data = self.config, self.data
        model = family(config.model)
        steps: dict[str, dict[str, Any]] = {}
        if config.model.checkpoint == TINY:
            steps["tiny"] = {
                "version": TINY_VERSION,
                "data": data.fingerprints["train"],
                "sizes": config.model.tiny.model_dump(),
                "augment": config.data.augment.model_dump(),
                "prompt": config.model.prompt,
                "caption_cleaning": config.train.caption_cleaning,
                "max_words": config.train.max_words,
            }
        for metric in self.standins:
            steps[f"standin-{metric}"] = {
                "version": checkpoints.STANDIN_VERSION,
                "metric": metric,
                "data": data.fingerprints["train"],
            }
        decoding = config.predict.model_dump(exclude={"splits", "batch_size"})
        steps["train"] = {
            "version": TRAIN_VERSION,
            "data": [data.fingerprints["train"], data.fingerprints["valid"]],
            "checkpoints": [steps.get("tiny"), _identities(model.checkpoints(config.model), self.root)],
            "model": model.settings(config.model),
            "train": config.train.model_dump(exclude=HOW),
            "augment": config.data.augment.model_dump(),
            "seed": config.seed,
            "primary": _primary(config, self.root),
        }
        if self.choosing:
            steps["train"]["standins"] = [steps[f"standin-{metric}"] for metric in self.choosing]
        for split in self.splits:
            steps[f"predict-{split}"] = {
                "version": PREDICT_VERSION,
                "train": steps["train"],
                "data": data.fingerprints[split],
                "decoding": decoding,
            }
            steps[f"postprocess-{split}"] = {
                "version": postprocess.VERSION,
                "captions": steps[f"predict-{split}"],
                "postprocess": config.postprocess.model_dump(),
            }
        for stage, source in (("before", "predict-valid"), ("after", "postprocess-valid")):
            if source in steps:
                steps[f"score-{stage}"] = {
                    "version": SCORE_VERSION,
                    "captions": steps[source],
                    "data": data.fingerprints["valid"],
                    "score": config.score.model_dump(),
                    "weights": metrics.identities_of(config.score, self.root / "cache"),
                    "packages": metrics.versions(),
                    "standins": [steps[f"standin-{metric}"] for metric in self.standins],
                    "edition": config.edition,
                }
        return steps

    @property
    def splits(self) -> list[str]:
        """The configured splits that have images."""
        return [split for split in self.config.predict.splits if self.data.splits.get(split)]

    @property
    def standins(self) -> list[str]:
        """The models of metrics, by the name of their section, whose stand-ins are trained here."""
        return _trained_here(self.config.score)

    @property
    def choosing(self) -> list[str]:
        """Those of the stand-ins that choose the best weights."""
        return _trained_here(_choosing(self.config))

    @cached_property
    def fallback(self) -> dict[str, dict[str, Any]]:
        """By split, the `ids` of images that can't be read, if any, and the `caption` that they get.

        It is the constant caption of `metrics.constant_baseline`, and nothing of the model's.
        """
        unreadable = {split: [e.id for e in self.data.unreadable(split)] for split in self.splits}
        if not any(unreadable.values()):
            return {}
        caption = metrics.constant_caption([example.caption for example in self.data.splits["train"]])
        return {split: {"caption": caption, "ids": ids} for split, ids in unreadable.items() if ids}

    @property
    def notes(self) -> list[str]:
        """What a reader of the results has to know of rows that are used for a part only, or not at all."""
        found = []
        if left := len(self.data.left_out):
            found.append(f"data.skip_bad: rows with {left:,} problems are left out")
        for split, examples in self.data.splits.items():
            wordless = [f.row[1] for f in self.data.notes if f.row[0] == split and f.cause == WITHOUT_WORDS]
            if wordless:
                found.append(f"{split}: no word in the caption of {some(wordless)}; not trained on")
            unscored = [e.id for e in examples if e.caption is None] if split == "valid" else []
            if unscored:
                found.append(f"{split}: the caption of {some(unscored)} can't be read; not scored")
        for split, given in self.fallback.items():
            what = f"{some(given['ids'])}; captioned by the constant caption: {given['caption']}"
            found.append(f"{split}: no image that can be read for {what}")
        return found

    def directory(self, name: str) -> Path:
        """Where a step's output lies, or will lie."""
        return step_directory(self.root, name.split("-")[0], self.inputs[name])

    def sources(self, name: str) -> dict[str, Sequence[str] | None]:
        """The steps that a step reads, and which of their files; None for all."""
        kind, _, part = name.partition("-")
        tiny = {step: None for step in ("tiny",) if step in self.inputs}
        if kind == "train":
            return tiny | {f"standin-{metric}": None for metric in self.choosing}
        if kind == "predict":
            return tiny | {"train": (BEST,)}
        if kind == "postprocess":
            return {f"predict-{part}": (PREDICTIONS,)}
        if kind == "score":
            scored = "predict-valid" if part == "before" else "postprocess-valid"
            return {scored: (PREDICTIONS,)} | {f"standin-{metric}": None for metric in self.standins}
        return {}

    def made_from(self, name: str) -> dict[str, str]:
        """SHA-256 of the files that a step reads, where the steps before it have sealed theirs."""
        found = (products(self.directory(step), files) for step, files in self.sources(name).items())
        return {file: digest for one in found for file, digest in one.items()}

    def done(self, name: str) -> bool:
        """Whether a step ran to its end, has its files, and read those that the steps before it hold now."""
        return is_done(self.directory(name), self.made_from(name))


def _identities(named: Mapping[str, str], root: Path) -> list[Any]:
    """What tells two checkpoints of the same name apart: the contents of their files."""
    found = [(key, name, checkpoints.find(name)) for key, name in named.items()]
    return [[key, name, f and checkpoints.contents(f.folder, root / "cache")] for key, name, f in found]


def _primary(config: Config, root: Path) -> list[Any]:
    """What determines the numbers of the metrics that choose the best weights."""
    name, edition, only = primary_metric(config), EDITIONS[config.edition], _choosing(config)
    sections = {"precision", *metrics.weights_of(only)}
    settings = {key: value for key, value in only.model_dump().items() if key in sections}
    found = [name, edition.rules, settings, metrics.identities_of(only, root / "cache")]
    return [*found, edition.aggregates] if name in edition.aggregates else found


def _choosing(config: Config) -> ScoreConfig:
    """How validation scores, by the metrics alone that choose the best weights."""
    parts = EDITIONS[config.edition].parts(primary_metric(config))
    return config.score.model_copy(update={"metrics": parts})


def _trained_here(config: ScoreConfig) -> list[str]:
    """The sections of wanted metrics whose stand-ins are trained on the training split."""
    return [name for name, weights in metrics.weights_of(config).items() if weights.is_trained_here(config)]


def problems(config: Config) -> list[Problem]:
    """What is missing on this machine for a run: checkpoints that would otherwise be missed hours later."""
    wanted = dict.fromkeys([*config.score.metrics, *_choosing(config).metrics])
    found = metrics.problems(config.score.model_copy(update={"metrics": tuple(wanted)}), config.edition)
    return found + family(config.model).problems(config.model)


def unscalable(config: Config, kind: device.Kind) -> Problem | None:
    """What is wrong with fp16 on a device that does not overflow where losses are scaled too far."""
    if config.train.precision != "fp16" or device.overflows(kind):
        return None
    what = f"got fp16, but this {kind} cuts off what is too large, and the loss scale would grow for ever"
    hint = "Use auto or fp32; this device rounds to fp16 what it multiplies, but gradients stay fp32."
    return Problem(what, key="train.precision", hint=hint)


def prepare(
    configs: Sequence[Config],
    reporter: Reporter,
    root: Path = RUNS,
    loaded: dict[str, Dataset] | None = None,
) -> list[Plan]:
    """Check all that can be checked before any training; raises `UserError` with all problems at once.

    `loaded` keeps the data between calls.
    """
    found = [problem for config in configs for problem in problems(config)]
    found += filter(None, (unscalable(config, device.probe(config.device).kind) for config in configs))
    plans, hints, failed = [], [], set()
    loaded = {} if loaded is None else loaded
    known = set(loaded)
    for config in configs:
        key = config.data.model_dump_json(exclude={"augment", "cache"})
        if key not in loaded and key not in failed:
            try:
                with reporter.progress("Checking images") as advance:
                    loaded[key] = load(config.data, root, advance)
            except UserError as error:
                failed.add(key)
                found += error.problems
                hints.append(error.hint)
        if key in loaded:
            plans.append(Plan(config, loaded[key], root))
    if found or (found := _lacking_space(plans)):
        hint = next((hint for hint in hints if hint), None)
        raise UserError(list(dict.fromkeys(found)), hint)
    for dataset in (dataset for key, dataset in loaded.items() if key not in known):
        for problem in together(dataset.left_out):
            reporter.say(f"left out: {problem}")
        for problem in together(dataset.notes):
            reporter.say(f"note: {problem}")
    return plans


def _lacking_space(plans: Sequence[Plan]) -> list[Problem]:
    """A disk that can't hold the decoded images of all that is left to train and to caption."""
    wanted = {}
    for plan in plans:
        left = set() if plan.done("train") else {"train", "valid"}
        left |= {split for split in plan.splits if not plan.done(f"predict-{split}")}
        size, cache = plan.config.model.image_size, plan.root / "cache"
        for split in left if plan.config.data.cache else ():
            key = (plan.config.data.root, split, size)
            if key not in wanted:
                wanted[key] = unbuilt(plan.data.readable(split), size, cache)
    need = sum(wanted.values())
    room = free(plans[0].root) if need else 0
    if need <= room:
        return []
    what = f"decoded images need {gb(need)} in {plans[0].root}/cache, {gb(room)} are free"
    return [Problem(what, key="data.cache", hint="Or decode anew in every epoch: --set data.cache=false")]


def dry(config: Config, root: Path = RUNS) -> dict[str, str]:
    """The steps of a run and whether they are done, found without drawing data or importing torch."""
    if config.data.phantom and not config.data.root.exists():
        return {"data": f"to do: the made-up set will be drawn into {config.data.root}"}
    if (images := unchecked(config.data, root)) > QUICK_IMAGES:
        return {"data": f"to do: {images} images will be decoded and checked first"}
    plan = Plan(config, load(config.data, root), root)
    states = {name: "done" if plan.done(name) else "to do" for name in plan.inputs}
    return {name: f"{state}  {plan.directory(name)}" for name, state in states.items()}


def primary_metric(config: Config) -> str:
    """The score that chooses the best checkpoint: the edition's primary one where it can be computed.

    That is where all its parts are among the metrics and have weights; else it is BERTScore.
    """
    edition = EDITIONS[config.edition]
    if edition.primary is None:
        return "bertscore"
    lacking = any(metrics.is_absent(part, config.score) for part in edition.parts(edition.primary))
    return "bertscore" if lacking else edition.primary
