"""The weights of finished runs that another run begins with, and whether they fit its model."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from harness import records
from harness.errors import Problem, UserError
from harness.steps.base import Step
from harness.store import INPUTS, bytes_of, parsed, products
from harness.training import soups
from harness.training.resume import BEST, described, kept

if TYPE_CHECKING:
    from harness.config.schema import Config
    from harness.steps.plan import Plan

START = "train.start_from"


class Origin(NamedTuple):
    """The weights of a finished run: the folder of its step, and the SHA-256 of each file, best first."""

    record: records.Record
    directory: Path
    files: Mapping[str, str]


def before_training(
    read: Mapping[str, Any], facts: Mapping[str, Any], steps: Mapping[Step, Any]
) -> dict[str, Any]:
    """What determines the weights before training, by key, as JSON-like values."""
    tiny = {step.name: step.canonical for step in steps if step.kind == "tiny"}
    return _flat({"model": read["model"], "contents": facts["checkpoints"], **_labels(facts)} | tiny)


def of_run(
    plan: "Plan", run: str, own: Mapping[str, Any], key: str, kinds: Sequence[str], rule: str
) -> Origin:
    """The weights of the run that the config names by `key`; `own` is from `before_training`.

    `kinds` of steps may have made them. Raises `UserError` if there are none, or if the run began with other
    weights than this one; then the hint has the `rule`.
    """
    folder = plan.root / run
    record = records.read(folder, ("steps",), key)
    step = next((record["steps"][kind] for kind in kinds if kind in record["steps"]), None)
    if step is None:
        what = f"{run} has no training of its own" if record["steps"] else f"{run} has no steps yet"
        raise UserError([Problem(what, folder, key=key, hint="Name runs that trained.")])
    directory = plan.root / step
    files = [one["file"] for one in kept(directory)]
    digests = products(directory, files)
    if len(digests) < len(files):
        gone = record["status"] == "FINISHED"
        what = f"the weights of {run} are gone" if gone else f"the training of {run} is not finished"
        raise UserError([Problem(what, folder, key=key, hint=records.again(record, weights=gone))])
    made = parsed(bytes_of(records.checked(directory / INPUTS, record)))
    theirs = {"model": made["config"]["model"], "contents": made["facts"]["checkpoints"]}
    theirs |= _labels(made["facts"]) if "labels" in own else {}
    theirs |= {name: value for name, value in made["steps"].items() if name == "tiny"}
    ours = own if "labels" in theirs else {key: value for key, value in own.items() if key != "labels"}
    if keys := soups.differing(ours, _flat(theirs)):
        what = f"{run} starts from other weights: it has another {some(keys)}"
        raise UserError([Problem(what, folder, key=key, hint=rule)])
    return Origin(record, directory, {file: digests[f"{directory.name}/{file}"] for file in files})


def check_split(plan: "Plan", record: records.Record, run: str, split: str, key: str, hint: str) -> None:
    """Raise `UserError` if the run that the config names by `key` has other data of a split."""
    if record["data"]["fingerprints"].get(split) != plan.data.fingerprints[split]:
        raise UserError([Problem(f"{run} has other images or labels of {split}", key=key, hint=hint)])


def _labels(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The labels of a head, by which the weights of two heads are of the same concepts."""
    return {"labels": facts["labels"]} if "labels" in facts else {}


def learned_from_valid(record: records.Record) -> bool:
    """Whether a run was trained on validation images too."""
    return "valid" in (record["config"].get("data") or {}).get("fit_on", ())


def start(plan: "Plan", own: Mapping[str, Any]) -> dict[str, Any] | None:
    """The weights of `train.start_from`: run, step, file, SHA-256 and, in words if known, which they are.

    None if the config names none. Raises `UserError` if this training can't start from them.
    """
    run = plan.config.train.start_from
    if not run:
        return None
    rule = "A training starts from a run with the same model settings and checkpoints."
    found = of_run(plan, run, own, START, ("train", "soup"), rule)
    folder, theirs = plan.root / run, found.record["config"].get("train") or {}
    if learned_from_valid(found.record) and not plan.config.full_fit:
        what = f"{run} has learned from the validation images that choose and score weights (data.fit_on)"
        raise UserError([Problem(what, folder, key=START, hint="Name a run that learns from train alone.")])
    frozen = {"train_vision": True, "train_language": False}  # with their defaults
    for key, default in frozen.items():
        if theirs.get(key, default) and not getattr(plan.config.train, key):
            what = f"{run} has trained weights that this run keeps as they are in the checkpoints"
            hint = f"Train them too: --set train.{key}=true"
            raise UserError([Problem(what, folder, key=START, hint=hint)])
    best = described(kept(found.directory)[0])  # not known of soups, and of runs of earlier versions
    step = str(found.directory.relative_to(plan.root))
    return {"run": run, "step": step, "file": BEST, "sha256": found.files[BEST], "weights": best}


def check(plan: "Plan", earlier: "Config") -> None:
    """Raise `UserError` if a training can't start from the weights of this earlier run of the same file."""
    ours, theirs = (_flat({"model": one.model.model_dump()}) for one in (plan.config, earlier))
    if keys := soups.differing(ours, theirs):
        what = f"{plan.config.train.start_from} is of another model: it has another {some(keys)}"
        raise UserError([Problem(what, key=START)])


def in_words(found: Mapping[str, Any]) -> str:
    """A sentence about what `start` found."""
    which = f": {found['weights']}" if found["weights"] else ""
    return f"starts from the best weights of {found['run']}{which}"


def waiting(plan: "Plan") -> str:
    """Why what a run starts from is not known yet; empty if it is."""
    run = plan.config.train.start_from
    try:
        record = records.read(plan.root / run, ("steps",), START) if run else {"status": "FINISHED"}
    except UserError as error:
        return "; ".join(map(str, error.problems))
    return "" if record["status"] == "FINISHED" else f"{run} is not finished (status {record['status']})"


def some(keys: Sequence[str]) -> str:
    """The first five of these, and how many more there are."""
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Nested JSON-like values by dotted key."""
    if isinstance(value, Mapping) and value:
        parts = (_flat(inner, f"{path}.{key}" if path else key) for key, inner in value.items())
        return {key: inner for part in parts for key, inner in part.items()}
    return {path: json.loads(json.dumps(value, default=str))}
