"""What to submit of several finished runs: one alone, a soup, or an ensemble, with or without de-duplication.

Everything is chosen on the tune half of validation and reported on the held half. A difference that the
paired test does not show goes to the simpler choice. nnU-Net's `find_best_configuration` works like this,
without the halves and the tests.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from harness import records, report
from harness.best.candidates import Candidates, Option, Wanted, captions_of, option
from harness.best.options import CAPTIONING, planned
from harness.config.sections import PredictConfig
from harness.data.halves import HALVES, HELD, TUNE
from harness.errors import UserError
from harness.run import run
from harness.scoring.compare import Difference, compare, few_images
from harness.steps.plan import Plan, prepare
from harness.steps.work import Reporter
from harness.store import RUNS

RECORD = "best.json"
"""The last choice, in the folder of its ensembles."""
_DEDUPLICATED = "dedup"


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
    made = option(one, plan.folder)
    captions = captions_of(made, "after")
    same = next((other.label for other in before if captions_of(other, "after") == captions), None)
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
    waiting = [s.name for s in plan.steps.values() if s.kind in CAPTIONING and not s.is_done()]
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
