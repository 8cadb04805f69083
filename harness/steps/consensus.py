"""Consensus over the run's own captions and those of other runs; see `decoding.consensus`."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import metrics, records
from harness.captions import PREDICTIONS, read_captions, write_captions, write_table
from harness.config.editions import EDITIONS
from harness.decoding import consensus
from harness.decoding.consensus import Candidate, Choice, ConsensusConfig
from harness.errors import Problem, UserError
from harness.machine import ranks
from harness.metrics.base import Documents
from harness.steps.base import Step
from harness.steps.inputs import Inputs, values
from harness.steps.predict import given_captions
from harness.steps.standin import with_standins
from harness.steps.train import primary_metric, scoring_of
from harness.store import fingerprint
from harness.training import judges

if TYPE_CHECKING:
    from harness.config.schema import Config
    from harness.steps.plan import Plan
    from harness.steps.work import Work

TABLE = "consensus.csv"
"""For each image: the source of the chosen caption, its expected utility, and the distinct candidates."""
_PARTIAL = "partial.jsonl"
_OWN = "own"


class Consensus(Step):
    """Writes for each image of a split the candidate that agrees best with all its candidates."""

    kind, version, shared = "consensus", 1, True
    section = ("consensus", ConsensusConfig | None, None)

    @classmethod
    def of(cls, plan: "Plan", before: Mapping[str, Step]) -> Iterator[Step]:
        config = plan.config
        if config.consensus is None:
            return
        read, standins, facts = comparing(plan, before, config.consensus.utility)
        read |= values(config, "consensus.own", "consensus.runs", "consensus.utility")
        for split in plan.splits:
            own = [step for step in before.values() if step.captions == split]
            own_facts = {
                "runs": [_digest(plan, source.run, split) for source in config.consensus.runs],
                "standin": any(
                    _record(plan, source.run)["standin_model"] for source in config.consensus.runs
                ),
                "fallback": plan.fallback.get(split),
            }
            steps = dict.fromkeys(own[-1:], (PREDICTIONS,)) | standins
            yield cls(Inputs(plan, read, ("train", split), steps, facts | own_facts), split)

    @property
    def captions(self) -> str:
        return self.part

    @property
    def artifacts(self) -> Mapping[str, str]:
        return {f"predictions/{self.part}_before.csv": PREDICTIONS, f"consensus/{self.part}.csv": TABLE}

    def found(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"standin_model": record["standin_model"] or self.inputs.facts["standin"]}

    def build(self, work: "Work", directory: Path) -> None:
        work.drop_model()  # the neural metrics need its memory
        candidates = self._candidates()
        texts, pairs = consensus.cost(candidates)
        work.say(f"{len(candidates):,} images, {texts:,} distinct candidates, {pairs:,} comparisons")
        known = ranks.agree(_read(directory / _PARTIAL, candidates))
        waiting = {image: given for image, given in candidates.items() if image not in known}
        images = {example.id: example.image for example in self.inputs.data.readable(self.part)}
        with work.reporter.progress(f"Comparing captions of {self.part}") as advance:
            for image, choice in consensus.choose(waiting, utility_for(self.inputs, work), images):
                known[image] = choice
                _keep(directory / _PARTIAL, image, candidates[image].index(choice.candidate), choice)
                advance(len(known), len(candidates))
        if ranks.rank() == 0:
            rows = [(image, *known[image].row) for image in candidates]
            write_table(directory / TABLE, [("ID", *Choice.COLUMNS), *rows])
            chosen = {image: known[image].candidate.caption for image in candidates}
            every = [example.id for example in self.inputs.data.examples(self.part)]
            given = given_captions(self.inputs)
            write_captions(directory / PREDICTIONS, {image: (chosen | given)[image] for image in every})
            (directory / _PARTIAL).unlink(missing_ok=True)

    def _candidates(self) -> dict[str, list[Candidate]]:
        """The candidates of each readable image: the run's own caption first, then those of other runs."""
        config = self.inputs.config.consensus
        sources = [
            (_OWN, config.own, read_captions(step.directory / PREDICTIONS))
            for step in self.inputs.steps
            if step.captions and config.own
        ]
        for source, digest in zip(config.runs, self.inputs.facts["runs"], strict=True):
            found, now = _captions_in(self.inputs.root / source.run, self.part)
            if now != digest:
                raise UserError(f"the captions of {source.run} changed; start again", exit_code=1)
            sources.append((source.run, source.weight, found))
        ids = [example.id for example in self.inputs.data.readable(self.part)]
        return {
            image: [Candidate(captions[image], weight, source=name) for name, weight, captions in sources]
            for image in ids
        }


def comparing(
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


def utility_for(inputs: Inputs, work: "Work") -> consensus.Utility:
    """The utility of a step that declares `comparing`; training captions give the document frequencies."""
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


def _record(plan: "Plan", run: str) -> dict[str, Any]:
    return records.read(plan.root / run, ("standin_model",))


def _digest(plan: "Plan", run: str, split: str) -> str:
    """The fingerprint of a run's captions; raises `UserError` if they are not of these images."""
    found, digest = _captions_in(plan.root / run, split)
    ids = {example.id for example in plan.data.splits[split]}
    if found.keys() != ids:
        what = f"{run} has captions of {len(found):,} images of {split}, {len(found.keys() & ids):,} of them "
        what += f"among the {len(ids):,} here"
        raise UserError([Problem(what, key="consensus.runs", hint="Name runs on the same data.")])
    return digest


def _captions_in(folder: Path, split: str) -> tuple[dict[str, str], str]:
    """The captions of a run before post-processing, and their SHA-256."""
    record = records.read(folder)
    file = records.artifact(folder, record, f"predictions/{split}_before.csv")
    return records.captions(file, record), hashlib.sha256(file.read_bytes()).hexdigest()


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
