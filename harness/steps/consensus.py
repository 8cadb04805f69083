"""Consensus over the run's own captions and those of other runs; see `decoding.consensus`."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import records
from harness.decoding import consensus
from harness.decoding.consensus import ConsensusConfig
from harness.errors import Problem, UserError
from harness.models.checkpoints import sha256
from harness.records.files import CANDIDATES, PREDICTIONS, Candidate, read_candidates
from harness.steps import comparing
from harness.steps.base import Step
from harness.steps.inputs import Inputs, values

if TYPE_CHECKING:
    from harness.config.schema import Config
    from harness.steps.plan import Plan
    from harness.steps.work import Work

TABLE = "consensus.csv"
"""For each image: the source of the chosen caption, its expected utility, and the distinct candidates."""
_OWN, _KEY = "own", "consensus.runs"


class Consensus(Step):
    """Writes for each image of a split the candidate that agrees best with all its candidates."""

    kind, version, shared = "consensus", 1, True
    section = ("consensus", ConsensusConfig | None, None)

    @classmethod
    def of(cls, plan: "Plan", before: Mapping[str, Step]) -> Iterator[Step]:
        config = plan.config
        if config.consensus is None:
            return
        read, standins, facts = comparing.reads(plan, before, config.consensus.utility)
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
            steps = {step: (_own_file(step),) for step in own[-1:]} | standins
            yield cls(Inputs(plan, read, ("train", split), steps, facts | own_facts), split)

    @classmethod
    def replaces_model(cls, config: "Config") -> bool:
        return config.captions and config.consensus is not None and not config.consensus.own

    @property
    def captions(self) -> str:
        return self.part

    @property
    def artifacts(self) -> Mapping[str, str]:
        return {f"predictions/{self.part}_before.csv": PREDICTIONS, f"consensus/{self.part}.csv": TABLE}

    def cost(self) -> tuple[int, int]:
        """How many distinct captions it embeds, and how many pairs of captions it compares."""
        return consensus.cost(self._candidates())

    def found(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"standin_model": record["standin_model"] or self.inputs.facts["standin"]}

    def build(self, work: "Work", directory: Path) -> None:
        comparing.write(self, comparing.choose(self, work, self._candidates(), directory), directory, TABLE)

    def _candidates(self) -> dict[str, list[Candidate]]:
        """The candidates of each readable image: the run's own first, then those of other runs."""
        config = self.inputs.config.consensus
        sources = [
            (_OWN, config.own, read_candidates(step.directory / _own_file(step)))
            for step in self.inputs.steps
            if step.captions and config.own
        ]
        for source, digest in zip(config.runs, self.inputs.facts["runs"], strict=True):
            found, now = _candidates_in(self.inputs.root / source.run, self.part)
            if now != digest:
                raise UserError(f"the captions of {source.run} changed; start again", exit_code=1)
            sources.append((source.run, source.weight, found))
        ids = [example.id for example in self.inputs.data.readable(self.part)]
        return {
            image: [
                one
                for name, weight, found in sources
                for one in consensus.of_source(found[image], name, weight)
            ]
            for image in ids
        }


def _own_file(step: Step) -> str:
    """The file of a step's captions that a consensus reads: all candidates if the step has some."""
    return CANDIDATES if CANDIDATES in step.artifacts.values() else PREDICTIONS


def _record(plan: "Plan", run: str) -> dict[str, Any]:
    return records.read(plan.root / run, ("standin_model",), _KEY)


def _digest(plan: "Plan", run: str, split: str) -> str:
    """The fingerprint of a run's captions; raises `UserError` if they are not of these images."""
    found, digest = _candidates_in(plan.root / run, split)
    ids = {example.id for example in plan.data.splits[split]}
    if found.keys() != ids:
        what = f"{run} has captions of {len(found):,} images of {split}, {len(found.keys() & ids):,} of them "
        what += f"among the {len(ids):,} here"
        raise UserError([Problem(what, key=_KEY, hint="Name runs on the same data.")])
    return digest


def _candidates_in(folder: Path, split: str) -> tuple[dict[str, list[Candidate]], str]:
    """The candidates of a run, or else its captions before post-processing; and the file's SHA-256."""
    record = records.read(folder, key=_KEY)
    file = records.candidates_file(folder, record, split)
    return records.candidates(file, record), sha256(file, None)
