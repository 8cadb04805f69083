"""What steps share that choose a caption of each image by comparing candidates; see `decoding.consensus`."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import metrics
from harness.config.editions import EDITIONS
from harness.decoding import consensus
from harness.decoding.consensus import Choice
from harness.errors import Problem
from harness.machine import ranks
from harness.metrics.base import Documents
from harness.records.files import PREDICTIONS, Candidate, write_captions, write_table
from harness.steps.base import Step
from harness.steps.inputs import Inputs
from harness.steps.predict import given_captions
from harness.steps.standin import with_standins
from harness.steps.validating import primary_metric, scoring_of
from harness.store import fingerprint
from harness.training import judges

if TYPE_CHECKING:
    from harness.config.schema import Config
    from harness.steps.plan import Plan
    from harness.steps.work import Work

_PARTIAL = "partial.jsonl"


def reads(
    plan: "Plan", before: Mapping[str, Step], utility: Mapping[str, float]
) -> tuple[dict[str, Any], dict[Step, Sequence[str] | None], dict[str, Any]]:
    """What a step declares that compares captions: parts of the config, earlier steps, and facts."""
    config = plan.config
    mixed = consensus.mixture(utility or {primary_metric(config): 1.0}, config.edition)
    only = config.score.model_copy(update={"metrics": tuple(mixed)})
    scored, edition = scoring_of(config, only.metrics)
    steps = {step: None for step in before.values() if step.kind == "standin"}
    facts = {"weights": metrics.identities_of(only, plan.root / "cache"), "utility": mixed}
    return {"score": scored, "edition": edition}, steps, facts


def choose(
    step: Step, work: "Work", candidates: Mapping[str, list[Candidate]], directory: Path
) -> dict[str, Choice]:
    """The choice of each image, by all ranks; choices from before an interruption are kept."""
    work.drop_model()  # the neural metrics need its memory
    texts, pairs = consensus.cost(candidates)
    work.say(f"{len(candidates):,} images, {texts:,} distinct candidates, {pairs:,} comparisons")
    known = ranks.agree(_read(directory / _PARTIAL, candidates))
    waiting = {image: given for image, given in candidates.items() if image not in known}
    images = {example.id: example.image for example in step.inputs.data.readable(step.part)}
    with work.reporter.progress(f"Comparing captions of {step.part}") as advance:
        for image, choice in consensus.choose(waiting, _utility(step.inputs, work), images):
            known[image] = choice
            _keep(directory / _PARTIAL, image, candidates[image].index(choice.candidate), choice)
            advance(len(known), len(candidates))
    return {image: known[image] for image in candidates}


def write(
    step: Step,
    chosen: Mapping[str, Choice],
    directory: Path,
    table: str,
    facts: Mapping[str, Mapping[str, str]] | None = None,
) -> None:
    """Write the chosen captions, and a table of the choices with further `facts` of each image, by column."""
    if ranks.rank():
        return
    facts = facts or {}
    rows = [(image, *(one[image] for one in facts.values()), *choice.row) for image, choice in chosen.items()]
    write_table(directory / table, [("ID", *facts, *Choice.COLUMNS), *rows])
    captions = {image: choice.candidate.caption for image, choice in chosen.items()}
    captions |= given_captions(step.inputs)
    every = step.inputs.data.examples(step.part)
    write_captions(directory / PREDICTIONS, {example.id: captions[example.id] for example in every})
    (directory / _PARTIAL).unlink(missing_ok=True)


def _utility(inputs: Inputs, work: "Work") -> consensus.Utility:
    """The utility of a step that declares `reads`; training captions give the document frequencies."""
    training = [example.caption for example in inputs.data.examples("train") if example.caption]
    return consensus.Utility(
        inputs.facts["utility"],
        with_standins(inputs.config.score, inputs),
        inputs.config.edition,
        work.scoring_device,
        Documents(training) if training else None,
    )


def compared_by(config: "Config") -> tuple[str, ...]:
    """The metrics by which the steps of a run compare captions."""
    sections = [section for section in (config.retrieval, config.consensus) if section]
    mixed = [
        consensus.mixture(section.utility or {primary_metric(config): 1.0}, config.edition)
        for section in sections
    ]
    return tuple(dict.fromkeys(name for one in mixed for name in one))


def problems(config: "Config") -> list[Problem]:
    """What is wrong with how the steps of a run compare captions, found without its data."""
    means = EDITIONS[config.edition].aggregates
    unknown = [
        Problem(f"{name} is no score of {config.edition}", key=f"{key}.utility")
        for key, section in (("retrieval", config.retrieval), ("consensus", config.consensus))
        for name in (section.utility if section else ())
        if name not in metrics.METRICS and name not in means
    ]
    unknown += [
        Problem(f"{name} is no score of {config.edition}", key=f"train.stages.{number}.reward.metrics")
        for number, stage in enumerate(config.train.stages if config.trains else ())
        for name in (stage.reward.metrics if stage.reward else ())
        if name not in metrics.METRICS and name not in means
    ]
    return unknown or list(_lacking(config))


def _lacking(config: "Config") -> Iterator[Problem]:
    """The metrics that compare captions and have no weights, or whose stand-in is not trained in this run."""
    rewards = judges.needed(config) if config.trains else ()
    for name in dict.fromkeys((*compared_by(config), *rewards)):
        weights = metrics.METRICS[name].weights
        if weights and weights.named(config.score) is None:
            yield Problem(f"{name} compares captions, but no weights are named", key=weights.path)
        elif weights and weights.is_trained_here(config.score) and name not in config.score.metrics:
            hint = f"Add {name} to score.metrics: only stand-ins of those are trained."
            yield Problem(
                f"{name} compares captions, but its stand-in is not trained", key=weights.path, hint=hint
            )


def _keep(file: Path, image: str, number: int, choice: Choice) -> None:
    """Append a choice, so that an interruption loses none; `number` is the candidate's place."""
    if ranks.rank() == 0:
        row = [image, number, choice.utility, choice.distinct]
        with file.open("a", encoding="utf-8") as partial:
            partial.write(json.dumps([*row, fingerprint(row)]) + "\n")


def _read(file: Path, candidates: Mapping[str, list[Candidate]]) -> dict[str, Choice]:
    """The choices in a file of `_keep`, without rows that are cut or altered."""
    found = {}
    for line in file.read_bytes().split(b"\n") if file.is_file() else ():
        with contextlib.suppress(ValueError, RecursionError):
            match json.loads(line):
                case [str(image), int(number), float(utility), int(distinct), digest] if (
                    digest == fingerprint([image, number, utility, distinct])
                ):
                    found[image] = Choice(candidates[image][number], utility, distinct)
    return found
