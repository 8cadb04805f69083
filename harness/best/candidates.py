"""The finished runs that can be chosen from, and why others are left out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from harness import records, scoring
from harness.config.editions import EDITIONS
from harness.config.experiment import load
from harness.config.schema import Config
from harness.data.halves import HALVES, TUNE
from harness.errors import Problem, UserError
from harness.scoring.compare import (
    System,
    gap_on_half,
    on_half,
    read_run,
    signature_changes,
)
from harness.store import RUNS

KINDS = ("single", "soup", "n-best", "ensemble")
"""A run; averaged weights of runs; the consensus of one run's candidates, and that of several runs."""


@dataclass(frozen=True)
class Wanted:
    """An option to make: its `label`, its kind of KINDS, its `runs` by name under runs/, and its config."""

    label: str
    kind: str
    runs: tuple[str, ...]
    config: Config


@dataclass(frozen=True)
class Option(Wanted):
    """One way to caption, with its finished run in `folder`.

    `systems` and `gaps` are its scores and its image gap (ROUGE-1), by half. `same`: the label of an earlier
    option with the same captions.
    """

    folder: Path
    systems: Mapping[str, System]
    gaps: Mapping[str, Mapping[str, Any]]
    same: str | None = None

    @property
    def cost(self) -> tuple[int, int]:
        """The number of models that caption, then the kind; the lower, the simpler."""
        return len(self.runs) if self.kind == "ensemble" else 1, KINDS.index(self.kind)

    def value(self, metric: str, half: str = TUNE) -> float:
        """Its score on a half."""
        return self.systems[half].scores[metric].value


@dataclass(frozen=True)
class Candidates:
    """The finished runs to choose from, by label, and the others with the reason why they are left out."""

    name: str
    metric: str
    singles: Mapping[str, Option]
    left_out: Mapping[str, str]
    notes: Sequence[str] = ()

    @property
    def first(self) -> Config:
        """The config whose data, scores and post-processing the ensembles have."""
        return next(iter(self.singles.values())).config


def find(sources: Sequence[Path], name: str | None, metric: str | None, root: Path = RUNS) -> Candidates:
    """The finished runs of experiment files, or with these names under runs/, that can be compared.

    All are compared with the first one that is finished. Raises `UserError` (exit code 1) if there is none,
    with the reason for each run.
    """
    named = _named(sources, root)
    left_out: dict[str, str] = {}
    singles: dict[str, Option] = {}
    notes: dict[str, None] = {}
    for run_name, config in named.items():
        try:
            one = _single(str(len(singles) + 1), run_name, config, root, notes)
            metric = metric or _primary(one.config)
            if why := _apart(one, list(singles.values()), metric):
                left_out[run_name] = why
            else:
                singles[one.label] = one
        except UserError as error:
            left_out[run_name] = "; ".join(problem.what for problem in error.problems)
    if not singles:
        problems = [Problem(why, root / run_name) for run_name, why in left_out.items()]
        hint = "No run can be used. This makes or finishes one: harness run EXPERIMENT.yaml"
        raise UserError(problems, hint, exit_code=1)
    return Candidates(
        name or Path(next(iter(named))).parent.as_posix(), metric, singles, left_out, list(notes)
    )


def _named(sources: Sequence[Path], root: Path) -> dict[str, Config | None]:
    """The runs by name under `root`, with the config of the experiment file that names them."""
    found: dict[str, Config | None] = {}
    problems = []
    for source in sources:
        if source.suffix in (".yaml", ".yml"):
            found |= {f"{one.name}/{one.run_name}": one for one in load(source)}
            continue
        folder = next((place for place in (source, root / source) if (place / records.FILE).is_file()), None)
        if folder is None or not folder.resolve().is_relative_to(root.resolve()):
            what = f"no run in {root}/ and no experiment file"
            problems.append(Problem(what, source, hint=f"Runs: {', '.join(_runs_of(root)) or 'none yet'}"))
            continue
        found.setdefault(folder.resolve().relative_to(root.resolve()).as_posix(), None)
    if problems:
        raise UserError(problems)
    return found


def _runs_of(root: Path) -> list[str]:
    return [file.parent.relative_to(root).as_posix() for file in records.below(root)][:8]


def _primary(config: Config) -> str:
    primary = EDITIONS[config.edition].primary
    if primary is None:
        what = f"the ranking rule of {config.edition} is not established; name a score: --metric bertscore"
        raise UserError([Problem(what, key="--metric")])
    return primary


def _single(label: str, name: str, given: Config | None, root: Path, notes: dict[str, None]) -> Option:
    """A finished run as an option. Raises `UserError` if it can't be used."""
    folder = root / name
    if not (folder / records.FILE).is_file():
        raise UserError([Problem("it has not run yet", folder)])
    record = records.read(folder, ("variant", "seed", "scores"))
    if record["status"] != "FINISHED":
        raise UserError([Problem(f"its status is {record['status']}", folder)])
    if records.task_of(record) == "concepts":
        what = "it predicts concepts, and best chooses among captions; an ensemble of concepts is written as "
        raise UserError([Problem(what + "concepts: {own: 0, runs: [...]}", folder)])
    values = {**record["config"], "score": scoring.of_run((folder, record), record["edition"])}
    if given is not None:  # the user named the file, so its programs and sums may be used
        own = given.score.model_dump(mode="json", exclude_unset=True)
        values["score"] |= {key: own[key] for key in own if key not in values["score"]}
    try:
        config = Config.model_validate(values)
    except ValidationError:
        raise UserError([Problem("its config is of another version; run it again", folder)]) from None
    if given is None:
        notes |= dict.fromkeys(scoring.passed_over((folder, record), config.score))
    return option(Wanted(label, "single", (name,), config), folder)


def option(one: Wanted, folder: Path) -> Option:
    system, record = read_run(folder, one.label), records.read(folder)
    systems = {half: on_half(system, half) for half in HALVES}
    if empty := [half for half, part in systems.items() if not part.ids]:
        raise UserError([Problem(f"the {empty[0]} half has no images", folder)])
    gaps = {half: gap_on_half(folder, record, half)["rouge1"] for half in HALVES}
    return Option(**vars(one), folder=folder, systems=systems, gaps=gaps)


def _apart(one: Option, others: Sequence[Option], metric: str) -> str | None:
    """Why a run can't be chosen together with the others, or None."""
    score = one.systems[TUNE].scores.get(metric)
    if score is None or score.value is None:
        computed = f"not computed; the run has {', '.join(one.systems[TUNE].scores)}"
        hint = "choose by another one with --metric"
        return f"{metric} is absent: {score.reason if score else computed}; {hint}"
    if not others:
        return None
    first = others[0]
    if one.config.edition != first.config.edition:
        return f"its edition is {one.config.edition}, that of {first.runs[0]} is {first.config.edition}"
    mine, theirs = (option.systems[TUNE] for option in (one, first))
    if set(mine.ids) != set(theirs.ids) or mine.references != theirs.references:
        return f"it has other images or references than {first.runs[0]}"
    wanted = first.systems[TUNE].scores[metric].signature
    if score.signature != wanted:
        return f"its {metric} is not that of {first.runs[0]}: {signature_changes(wanted, score.signature)}"
    captions = captions_of(one, "before")
    twin = next((other for other in others if captions_of(other, "before") == captions), None)
    return twin and f"it has the captions of {twin.runs[0]}; de-duplication is decided on the winner"


def captions_of(option: Option, stage: str) -> bytes:
    record = records.read(option.folder)
    return records.artifact(option.folder, record, f"predictions/valid_{stage}.csv").read_bytes()
