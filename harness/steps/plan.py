"""The plan of a run: its steps, and what is missing before it can start.

Two variants that differ only in de-duplication share training and captioning. After a crash the same command
continues where it stopped. Nothing here imports torch, so `--dry-run` is fast.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import metrics, records
from harness.concepts.labels import labels_of
from harness.data import QUICK_IMAGES, Dataset, fraction, load, unchecked
from harness.data.checks import WITHOUT_WORDS
from harness.data.images import unbuilt
from harness.data.listing import together
from harness.errors import Problem, UserError
from harness.machine import device
from harness.models import family
from harness.models import problems as model_problems
from harness.steps import STEPS, comparing, epochs, lacking, origins
from harness.steps.base import Step
from harness.steps.detect import has_thresholds
from harness.steps.validating import choosing
from harness.steps.work import Reporter
from harness.store import GONE, RUNS, damage, free, gb
from harness.submission.checks import some

if TYPE_CHECKING:
    from harness.config.schema import Config


@dataclass(frozen=True)
class Plan:
    """The steps of one run and their folders, from config and data alone, without torch."""

    config: "Config"
    data: Dataset
    root: Path = RUNS

    @cached_property
    def steps(self) -> dict[str, Step]:
        """The steps by name, in the order of running."""
        found: dict[str, Step] = {}
        for kind in STEPS:
            found |= {step.name: step for step in kind.of(self, found)}
        return found

    @property
    def folder(self) -> Path:
        """The folder of the run's record."""
        return self.root / self.config.name / self.config.run_name

    @property
    def splits(self) -> list[str]:
        """The configured splits that have images."""
        return [split for split in self.config.predicted if self.data.splits.get(split)]

    @property
    def detected(self) -> list[str]:
        """The splits whose concepts get probabilities: those of `splits`, and valid for the thresholds."""
        if self.config.concepts is None or not self.splits:
            return []
        chosen = has_thresholds(self.config.concepts) and not self.config.full_fit
        chosen_on = ["valid"] if chosen and self.data.splits.get("valid") else []
        return list(dict.fromkeys([*chosen_on, *self.splits]))

    @property
    def submitted(self) -> dict[str, Step]:
        """By split, the step whose captions are submitted: the last one with captions of that split."""
        return {step.captions: step for step in self.steps.values() if step.captions}

    @property
    def concepts(self) -> dict[str, Step]:
        """By split, the step whose concepts are submitted."""
        return {step.part: step for step in self.steps.values() if step.kind == "concepts"}

    def spared(self, step: Step) -> bool:
        """Whether weights of a step are gone, but every step that reads them is done."""
        if not step.weights or _is_whole(step):
            return False
        if any(what != GONE for what in damage(step.directory).values()):
            return False
        readers = [other for other in self.steps.values() if step in other.inputs.steps]
        return bool(readers) and all(_is_whole(other) or self.spared(other) for other in readers)

    @cached_property
    def fallback(self) -> dict[str, dict[str, Any]]:
        """By split, the `ids` of unreadable images, if any, and the `caption` that they get.

        The caption is the constant one of `metrics.constant_baseline`; the model does not write it.
        """
        unreadable = self._unreadable if self.config.captions else {}
        if not unreadable:
            return {}
        caption = metrics.constant_caption([example.caption for example in self.data.splits["train"]])
        return {split: {"caption": caption, "ids": ids} for split, ids in unreadable.items()}

    @cached_property
    def concept_fallback(self) -> dict[str, dict[str, Any]]:
        """By split, the `ids` of unreadable images, if any, and the `concepts` that they get.

        This is the concept of the most training images.
        """
        if self.config.concepts is None or not self._unreadable:
            return {}
        concepts = list(labels_of(self.data.readable("train"), 1)[:1])
        return {split: {"concepts": concepts, "ids": ids} for split, ids in self._unreadable.items()}

    @cached_property
    def _unreadable(self) -> dict[str, list[str]]:
        """The ids of unreadable images by split, of splits that have some."""
        found = {split: [e.id for e in self.data.unreadable(split)] for split in self.splits}
        return {split: ids for split, ids in found.items() if ids}

    @cached_property
    def looks(self) -> dict[str, str]:
        """The shares of the data that runs are quick looks at whose captions or weights this one uses."""
        soup, start = self.config.soup, self.config.train.start_from
        found: dict[str, str] = {}
        for run in (
            *epochs.combined(self.config),
            *(soup.runs if soup else ()),
            *([start] if start and self.config.trains else ()),
        ):
            record = records.read(self.root / run)
            share = fraction.worded(record["config"].get("data", {}).get("fraction"))
            found |= {run: share} if share else record.get("looks", {})
        return found

    @property
    def notes(self) -> list[str]:
        """Notes for readers of the results: rows that are used only in part, or not at all."""
        found = []
        record = {"config": self.config.model_dump(include={"data"}), "looks": self.looks}
        if share := fraction.looked(record):
            found.append(f"data.fraction: a quick look at {share}; its scores get no rank")
        if self.config.full_fit:
            found.append(f"valid has no scores: {records.ON_VALID} (data.fit_on)")
        if left := len(self.data.left_out):
            found.append(f"data.skip_bad: rows with {left:,} problems are left out")
        for split, examples in self.data.splits.items():
            wordless = [f.row[1] for f in self.data.notes if f.row[0] == split and f.cause == WITHOUT_WORDS]
            if wordless:
                found.append(f"{split}: no word in the caption of {some(wordless)}; not trained on")
            unscored = [e.id for e in examples if e.caption is None] if split == "valid" else []
            if unscored and self.config.captions:
                found.append(f"{split}: the caption of {some(unscored)} can't be read; not scored")
        for split, given in self.fallback.items():
            what = f"{some(given['ids'])}; used instead is the constant caption: {given['caption']}"
            found.append(f"{split}: no readable image for {what}")
        for split, given in self.concept_fallback.items():
            used = f"used instead is the most frequent concept: {';'.join(given['concepts'])}"
            what = f"{some(given['ids'])}; {used}"
            found.append(f"{split}: no readable image for {what}")
        return found


def problems(config: "Config") -> list[Problem]:
    """What a run lacks on this machine, such as checkpoints that it would need only hours later."""
    of_model = []
    if config.has_model:
        length = config.predict.max_new_tokens
        of_model = model_problems(config.model, config.train, length, config.captions)
    if not config.captions:
        return of_model
    chosen_by = choosing(config).metrics if config.trains or config.soup else ()
    found = comparing.problems(config)
    compared_by = () if found else comparing.compared_by(config)
    wanted = dict.fromkeys([*config.score.metrics, *chosen_by, *compared_by])
    found += metrics.problems(config.score.model_copy(update={"metrics": tuple(wanted)}), config.edition)
    return found + of_model


def unscalable(config: "Config", kind: device.Kind) -> Problem | None:
    """The problem of fp16 on a device that saturates; loss scaling needs overflows. None if there is none."""
    if config.train.precision != "fp16" or device.overflows(kind):
        return None
    what = f"got fp16, but this {kind} saturates instead of overflowing, so the loss scale would grow forever"
    hint = "Use auto or fp32; this device rounds factors to fp16, but gradients stay fp32."
    return Problem(what, key="train.precision", hint=hint)


def prepare(
    configs: "Sequence[Config]",
    reporter: Reporter,
    root: Path = RUNS,
    loaded: dict[str, Dataset] | None = None,
) -> list[Plan]:
    """Do all checks before any training -> a plan for each config; raises `UserError` with all problems.

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
            found += lacking.problems(plans[-1])
    if found or (found := _lacking_space(epochs.check(plans))):
        hint = next((hint for hint in hints if hint), None)
        raise UserError(list(dict.fromkeys(found)), hint)
    for dataset in (dataset for key, dataset in loaded.items() if key not in known):
        for problem in together(dataset.left_out):
            reporter.say(f"left out: {problem}")
        for problem in together(dataset.notes):
            reporter.say(f"note: {problem}")
    return plans


def _lacking_space(plans: Sequence[Plan]) -> list[Problem]:
    """The problem of a disk that is too small for the decoded images of all unfinished steps."""
    wanted = {}
    for plan in plans:
        if not plan.config.data.cache or family(plan.config.model).WHOLE_IMAGES:
            continue
        unfinished = (step for step in plan.steps.values() if not step.is_done() and not plan.spared(step))
        left = [step.decodes for step in unfinished if step.decodes]
        for split, side in ((split, side) for decodes in left for split, side in decodes.items()):
            key = (plan.config.data.root, split, side, plan.data.fingerprints[split])
            if key not in wanted:
                wanted[key] = unbuilt(plan.data.readable(split), side, plan.root / "cache")
    need = sum(wanted.values())
    room = free(plans[0].root) if need else 0
    if need <= room:
        return []
    what = f"decoded images need {gb(need)} in {plans[0].root}/cache, {gb(room)} are free"
    hint = "Free some space, or decode again in every epoch: --set data.cache=false"
    return [Problem(what, key="data.cache", hint=hint)]


def dry(config: "Config", root: Path = RUNS) -> dict[str, str]:
    """The steps of a run and their states, without drawing data or importing torch."""
    if config.data.phantom and not config.data.root.exists():
        return {"data": f"to do: the made-up set will be drawn into {config.data.root}"}
    if (images := unchecked(config.data, root)) > QUICK_IMAGES:
        return {"data": f"to do: {images} images will be decoded and checked first"}
    plan = Plan(config, load(config.data, root), root)
    if found := lacking.problems(plan):
        raise UserError(found)
    if why := epochs.unknown(plan):
        return {"train": f"to do, but its epochs are not known yet: {why}"}
    if why := config.trains and origins.waiting(plan):
        return {"train": f"to do, but the weights that it starts from are not known yet: {why}"}
    if why := epochs.missing(plan):
        return {"combine": f"to do, but what it takes from other runs is not known yet: {why}"}
    steps = plan.steps
    return {name: f"{_state(plan, step)}  {step.directory}" for name, step in steps.items()}


def _state(plan: Plan, step: Step) -> str:
    if plan.spared(step):
        return "gone, not needed"
    return "done" if step.is_done() else "to do"


def _is_whole(step: Step) -> bool:
    return step.is_done() and not damage(step.directory, thorough=False)
