"""What to submit of several finished runs: one alone, a soup, or an ensemble, with or without de-duplication.

Everything is chosen on the tune half of validation and reported on the held half. A difference that the
paired test does not show goes to the simpler choice. nnU-Net's `find_best_configuration` works like this,
without the halves and the tests.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from harness import records, report, scoring
from harness.config.editions import EDITIONS
from harness.config.experiment import load
from harness.config.schema import Config
from harness.config.sections import PredictConfig
from harness.data import Dataset
from harness.data.halves import HALVES, HELD, TUNE
from harness.errors import Problem, UserError
from harness.metrics import READINGS
from harness.run import run
from harness.scoring.compare import (
    Difference,
    System,
    compare,
    few_images,
    gap_on_half,
    on_half,
    read_run,
    signature_changes,
)
from harness.steps.plan import Plan, prepare
from harness.steps.work import Reporter
from harness.store import RUNS, fingerprint

RECORD = "best.json"
"""The last choice, in the folder of its ensembles."""
_LONGEST = 80  # characters of a variant's name
_DEDUPLICATED = "dedup"
_CAPTIONING = ("train", "soup", "features", "retrieve", "predict", "consensus")
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


@dataclass
class Choice:
    """The winner and how it was found; `held` are the differences from the best single run on the held half.

    `tuned` are the tests on the tune half, each with what it decided.
    """

    given: Candidates
    options: list[Option]
    single: Option
    winner: Option
    tuned: list[tuple[Difference, str]]
    held: list[Difference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


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
    return _option(Wanted(label, "single", (name,), config), folder)


def _option(one: Wanted, folder: Path) -> Option:
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
    captions = _captions(one, "before")
    twin = next((other for other in others if _captions(other, "before") == captions), None)
    return twin and f"it has the captions of {twin.runs[0]}; de-duplication is decided on the winner"


def _captions(option: Option, stage: str) -> bytes:
    record = records.read(option.folder)
    return records.artifact(option.folder, record, f"predictions/valid_{stage}.csv").read_bytes()


def wanted(given: Candidates, few: int) -> list[Wanted]:
    """The consensus of each run with several captions of an image, of all pairs, and of the best few runs.

    The best are those on the tune half, and `few` at most are in one ensemble. The better run comes first,
    since ties between captions go to the first one.
    """
    ranked = sorted(given.singles.values(), key=lambda one: -one.value(given.metric))
    groups = [[one] for one in ranked if _has_candidates(one)]
    groups += map(list, combinations(ranked, 2) if few > 1 else [])
    groups += [ranked[:size] for size in range(3, min(few, len(ranked)) + 1)]
    return [_consensus(given, group) for group in groups]


def _has_candidates(one: Option) -> bool:
    return "predictions/valid_candidates.csv" in records.read(one.folder).get("artifacts", {})


def _consensus(given: Candidates, group: Sequence[Option]) -> Wanted:
    """An ensemble, or the consensus of one run; data, scores and post-processing are the first run's."""
    first = given.first
    shared = first.model_dump(mode="json", include={"edition", "device", "seed", "data", "score"})
    runs = tuple(one.runs[0] for one in group)
    consensus: dict[str, Any] = {"own": 0, "runs": runs}
    if given.metric != EDITIONS[first.edition].primary:
        consensus["utility"] = {READINGS.get(given.metric, given.metric): 1}
    kind = "ensemble" if len(group) > 1 else "n-best"
    names = [_names(given)[one.label] for one in group] + ([kind] if len(group) == 1 else [])
    config = Config.model_validate(
        shared
        | {
            "name": f"best/{given.name}",
            "variant": _variant(names),
            "predict": {"splits": ["valid"]},
            "postprocess": first.postprocess.model_dump() | {"deduplicate": False},
            "consensus": consensus,
        }
    )
    label = "+".join(one.label for one in group)
    return Wanted(label if len(group) > 1 else f"{label} {kind}", kind, runs, config)


def soup(given: Candidates, few: int) -> Wanted | None:
    """The soup of those of the best few runs that have the best run's model, each with its own training.

    None if there are fewer than two. It has the other settings of the best one.
    """
    ranked = sorted(given.singles.values(), key=lambda one: -one.value(given.metric))
    trained: dict[str, Option] = {}
    for one in ranked[:few]:
        step = records.read(one.folder).get("steps", {}).get("train")
        alone = one.config.retrieval is None and one.config.consensus is None
        if step and alone and all(one.config.model == other.config.model for other in trained.values()):
            trained.setdefault(step, one)
    group = list(trained.values())
    if len(group) < 2:
        return None
    runs = tuple(one.runs[0] for one in group)
    values = group[0].config.model_dump(mode="json", exclude_unset=True) | {
        "name": f"best/{given.name}",
        "variant": _variant(["soup", *(_names(given)[one.label] for one in group)]),
        "soup": {"runs": runs},
    }
    values["predict"] = values.get("predict", {}) | {"splits": ["valid"]}
    label = "soup " + "+".join(one.label for one in group)
    return Wanted(label, "soup", runs, Config.model_validate(values))


def _names(given: Candidates) -> dict[str, str]:
    """The shortest names that tell the runs apart, by label: variant, then with the seed, then all of it."""
    kinds = (
        [one.config.variant for one in given.singles.values()],
        [one.config.run_name for one in given.singles.values()],
        [one.runs[0].replace("/", ".") for one in given.singles.values()],
    )
    names = next((kind for kind in kinds if len(set(kind)) == len(kind)), kinds[-1])
    return dict(zip(given.singles, names, strict=True))


def _variant(names: Sequence[str]) -> str:
    joined = "_".join(names)
    return joined if len(joined) <= _LONGEST else f"{len(names)}-runs-{fingerprint(list(names))}"


def planned(
    given: Candidates, few: int, reporter: Reporter, soups: bool = True
) -> tuple[list[tuple[Wanted, Plan]], list[str]]:
    """The options to make with their plans, and notes: their cost, and why there is no soup."""
    loaded: dict[str, Dataset] = {}
    options = wanted(given, few)
    plans = prepare([one.config for one in options], reporter, RUNS, loaded)
    found, notes = list(zip(options, plans, strict=True)), []
    if soups and (averaged := soup(given, few)):
        try:
            (plan,) = prepare([averaged.config], reporter, RUNS, loaded)
            found.insert(0, (averaged, plan))
            notes += _soup_cost(averaged.label, plan)
        except UserError as error:
            notes.append(f"no {averaged.label}: {'; '.join(map(str, error.problems))}")
    return found, notes + _consensus_cost(plans)


def _soup_cost(label: str, plan: Plan) -> list[str]:
    step = plan.steps["soup"]
    count = len(step.inputs.facts["candidates"])
    what = f"{label} to do: up to {2 * count - 1} averages, each captions tune images; then all of validation"
    return [] if step.is_done() else [what]


def _consensus_cost(plans: Sequence[Plan]) -> list[str]:
    waiting = [plan.steps["consensus-valid"].cost() for plan in plans if not is_captioned(plan)]
    if not waiting:
        return []
    texts, pairs = map(sum, zip(*waiting, strict=True))
    return [f"{len(waiting)} by consensus to do: {texts:,} captions embedded, {pairs:,} comparisons"]


def is_captioned(plan: Plan) -> bool:
    """Whether all captions of a plan are made, so that at most scoring is left."""
    return all(step.is_done() for step in plan.steps.values() if step.kind in _CAPTIONING)


def decide(given: Candidates, few: int, reporter: Reporter, command: str, soups: bool = True) -> Choice:
    """Make and score the options, choose on the tune half, and test on the held half."""
    plans, notes = planned(given, few, reporter, soups)
    for note in notes:
        reporter.say(note)
    options = list(given.singles.values())
    for one, plan in plans:
        options.append(_made(one, plan, options, reporter, command))
    options.sort(key=lambda one: one.cost)
    winner, tuned = choose(options, given.metric)
    single = max(given.singles.values(), key=lambda one: one.value(given.metric))
    choice = Choice(given, options, single, winner, tuned)
    choice.notes += [note for note in notes if note.startswith("no ")]
    _decide_deduplication(choice, reporter, command)
    systems = [one.systems[HELD] for one in options if one.same is None]
    if len(systems) > 1:
        choice.held = compare(systems, [given.metric], against=single.label)
    n = len(single.systems[HELD].ids)
    choice.notes += filter(None, [few_images(n, HELD), *_lacking_test(choice)])
    return choice


def _made(one: Wanted, plan: Plan, before: Sequence[Option], reporter: Reporter, command: str) -> Option:
    """Run a plan -> the option that it is."""
    run(plan, reporter, command, trial={"option": one.label})  # a trial is not on the leaderboard
    report.write(plan.folder)
    made = _option(one, plan.folder)
    captions = _captions(made, "after")
    same = next((other.label for other in before if _captions(other, "after") == captions), None)
    return replace(made, same=same)


def choose(options: Sequence[Option], metric: str) -> tuple[Option, list[tuple[Difference, str]]]:
    """The winner on the tune half, and the tests that led to it.

    The best of the simplest options is taken unless the best of all is shown to be better; else that of the
    next ones, and so on. One model is simpler than several. Equal options go to the first.
    """
    best = max(options, key=lambda one: one.value(metric))
    tests = []
    for cost in sorted({one.cost for one in options}):
        top = max((one for one in options if one.cost == cost), key=lambda one: one.value(metric))
        if top is best:
            break
        test = _tested(top, best, metric)
        if not test.real:
            return top, [*tests, (test, f"{top.label} is simpler and is taken")]
        tests.append((test, f"{top.label} is left"))
    return best, tests


def _tested(a: Option, b: Option, metric: str) -> Difference:
    """The test of `b` minus `a` on the tune half."""
    (found,) = compare([a.systems[TUNE], b.systems[TUNE]], [metric])
    return found


def _decide_deduplication(choice: Choice, reporter: Reporter, command: str) -> None:
    """Replace the winner by the same captions with de-duplication if the tune half shows that it is better.

    A run that was post-processed with it keeps it for the same reason only.
    """
    now, metric = choice.winner, choice.given.metric
    on = not now.config.postprocess.deduplicate
    config = now.config.model_copy(
        update={
            "name": f"best/{choice.given.name}",
            "variant": f"{now.config.variant}_{_DEDUPLICATED if on else 'plain'}",
            "predict": now.config.predict.model_copy(update={"splits": ("valid",)}),
            "postprocess": now.config.postprocess.model_copy(update={"deduplicate": on}),
        }
    )
    (plan,) = prepare([config], reporter)
    waiting = [s.name for s in plan.steps.values() if s.kind in _CAPTIONING and not s.is_done()]
    if waiting:
        choice.notes.append(f"de-duplication is not decided: {', '.join(waiting)} would have to run again")
        return
    label = f"{now.label} {_DEDUPLICATED if on else 'plain'}"
    other = _made(Wanted(label, now.kind, now.runs, config), plan, [now], reporter, command)
    choice.options.append(other)
    without, with_it = (now, other) if on else (other, now)
    test = _tested(without, with_it, metric)
    better = bool(test.real and test.difference > 0)
    choice.winner = with_it if better else without
    choice.tuned.append((test, f"de-duplication is {'on' if better else 'off'}"))


def _lacking_test(choice: Choice) -> list[str]:
    """What must run first, so that the winner can caption the test split."""
    consensus = choice.winner.config.consensus
    found = []
    for name in (source.run for source in (consensus.runs if consensus else ())):
        folder = RUNS / name
        try:
            records.artifact(folder, records.read(folder), "predictions/test_before.csv")
        except UserError as error:
            found += [f"{name} has no test captions. {problem.hint or ''}" for problem in error.problems]
    return found


def as_experiment(choice: Choice, output: Path, command: str) -> str:
    """The YAML of an experiment that makes the winner's captions, scores and submissions on every split."""
    config, metric = choice.winner.config, choice.given.metric
    splits = PredictConfig.model_fields["splits"].default
    changed: dict[str, Any] = {"predict": config.predict.model_copy(update={"splits": splits})}
    if config.name == f"best/{choice.given.name}":
        changed["name"] = f"{config.name}/winner"
    config = config.model_copy(update=changed)
    body = config.model_dump(mode="json", exclude_defaults=True)
    variant, seed = body.pop("variant", "base"), body.pop("seed", config.seed)
    tune, held = (choice.winner.systems[half].scores[metric] for half in HALVES)
    star = "" if held.official else "*"
    interval = "" if held.low is None else f" [{held.low:.4f}, {held.high:.4f}]"
    head = [
        f"# Question  How good is the best of {len(choice.options)} choices, by every score and on test?",
        f"# Command   harness run {output}",
        f"# Expected  {metric} {held.value:.4f}{star}{interval} on the held half of validation (n={held.n});",
        f"#           {tune.value:.4f}{star} on the tune half (n={tune.n}), by which it was chosen",
        "# Cost      the captions of the test split; finished steps are not repeated",
        f"# Made by   {command}",
    ]
    body |= {"seeds": [seed], "variants": {variant: {}}}
    return "\n".join(head) + "\n" + yaml.safe_dump(body, sort_keys=False, allow_unicode=True)
