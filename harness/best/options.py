"""What can be made of finished runs: soups, and the consensus of one or several; its plan and cost."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

from harness import records
from harness.best.candidates import Candidates, Option, Wanted
from harness.config.editions import EDITIONS
from harness.config.schema import Config
from harness.data import Dataset
from harness.errors import UserError
from harness.metrics import READINGS
from harness.steps.plan import Plan, prepare
from harness.steps.work import Reporter
from harness.store import RUNS, fingerprint

_LONGEST = 80  # characters of a variant's name
CAPTIONING = ("train", "soup", "features", "retrieve", "predict", "consensus")


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
    return all(step.is_done() for step in plan.steps.values() if step.kind in CAPTIONING)
