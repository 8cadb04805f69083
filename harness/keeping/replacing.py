"""Runs whose name another config takes: what differs, and the archive that keeps the old run.

A finished run is replaced only if the user says so. Steps lie under their fingerprints, so an archived run
loses none of its captions and scores.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from harness import records
from harness.config.schema import Config, flat
from harness.errors import Problem, UserError
from harness.records import ARCHIVE
from harness.records.status import status_of
from harness.steps.plan import Plan
from harness.steps.train import INDIFFERENT
from harness.steps.work import Reporter
from harness.store import RUNS, write_json
from harness.tracking import bookkeeping

_SHOWN, _LONGEST = 5, 60
"""The most differences of one run in a message, and the most characters of a value there."""
_RESCORED = ("score-", "standin-")
"""Kinds of steps that captions can be scored again by, at no loss."""
_ADDS = ("score.metrics", "predict.splits")
"""Lists that can have more entries without any loss."""
_LITTLE = ("device", "data.cache", *(f"train.{key}" for key in INDIFFERENT))
"""Keys that do not affect a result, except by rounding."""
_OTHER = "made from other weights or other runs, or by another version of harness"
_WAYS = "Keep both: --name NEW_NAME; or put the old run into {archive}/: --replace"


def check(plans: Sequence[Plan], reporter: Reporter, replace: bool = False, ways: str = _WAYS) -> None:
    """Archive the runs that these plans would replace if `replace`, else raise `UserError` with all of them.

    A run that would only gain steps, splits or metrics is not replaced. A run that did not finish is replaced
    without a question, since its finished steps stay; a line says which settings differ. A run of another
    config that is being computed can't be replaced.
    """
    problems, old, refused = [], [], {}
    for plan in plans:
        record = _old(plan)
        if record is None:
            continue
        why = differences(plan, record)
        if not why:
            continue
        name, status = records.full_name(record), status_of(record, None)
        if status == "RUNNING":
            what = f"a run of this name is being computed by process {record.get('pid')} on "
            what += f"{record.get('host')}: {_listed(why)}"
            problems.append(Problem(what, plan.folder, hint="Wait for it, or give this one: --name NEW_NAME"))
        elif status != "FINISHED":
            reporter.say(f"{name}: the run that did not finish ({status}) had other settings: {_listed(why)}")
        elif replace:
            old.append((plan, record))
        else:
            refused.setdefault(tuple(why), []).append(plan)
    problems += [_refused(why, those, ways) for why, those in refused.items()]
    if problems:
        raise UserError(problems)
    for plan, record in old:
        reporter.say(f"{records.full_name(record)}: the old run is now {archive(plan.folder, record)}")


def _refused(why: Sequence[str], plans: Sequence[Plan], ways: str) -> Problem:
    """The problem of finished runs that would all be replaced for the same reasons."""
    first, *others = plans
    has = f"this run and {len(others)} more have" if others else "this run has"
    hint = ways.format(archive=first.folder.parent / ARCHIVE)
    return Problem(f"{has} finished with other settings or data: {_listed(why)}", first.folder, hint=hint)


def _old(plan: Plan) -> dict[str, Any] | None:
    """The record of the run whose name a plan has; None if there is none that can be read."""
    try:
        return records.read(plan.folder, ("steps", "variant", "seed"))
    except UserError:
        return None


def differences(plan: Plan, record: records.Record) -> list[str]:
    """Why a plan gives another run than the record's, in words; empty if the old results all stay."""
    worded, adds = _settings(plan.config, record)
    try:
        there = {name: step.place for name, step in plan.steps.items()}
    except UserError:  # it takes something from an earlier run of the same command
        return worded
    lost = [name for name, place in record["steps"].items() if there.get(name) != place]
    if adds and all(name.startswith(_RESCORED) for name in lost):
        return []
    return worded or _of_data(plan, record) or [f"{', '.join(lost[:_SHOWN])}: {_OTHER}"]


def other_settings(config: Config, root: Path = RUNS) -> list[str]:
    """For dry runs: the other settings of a finished run of this name, in words, as far as a config tells."""
    try:
        record = records.read(root / config.name / config.run_name)
    except UserError:
        return []
    worded, adds = _settings(config, record)
    return [] if adds or status_of(record, None) != "FINISHED" else worded


def _settings(config: Config, record: records.Record) -> tuple[list[str], bool]:
    """The settings of a config that differ from the record's, in words; whether they only add to its run."""
    changed = _changed(config, record)
    adds = all(
        key in _LITTLE or old is None or (key in _ADDS and set(old) <= set(new)) for key, old, new in changed
    )
    return [f"{key} {_short(old)} -> {_short(new)}" for key, old, new in changed if key not in _LITTLE], adds


def _changed(config: Config, record: records.Record) -> list[tuple[str, Any, Any]]:
    """Each key with another value than in the record, and both values; a key it lacks has its default."""
    new = flat(config)
    try:
        old = flat(Config.model_validate(record["config"]))
    except (ValidationError, TypeError, ValueError):  # of another version: what both know is compared
        known = record.get("parameters", {})
        old = {key: known.get(key, value) for key, value in new.items()}
    keys = dict.fromkeys([*new, *old])
    return [(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]


def _of_data(plan: Plan, record: records.Record) -> list[str]:
    """Which splits have other images or labels than in the record."""
    theirs = (record.get("data") or {}).get("fingerprints") or {}
    ours = plan.data.fingerprints
    return [
        f"the images or labels of {split} have changed" for split in ours if ours[split] != theirs.get(split)
    ]


def _listed(found: Sequence[str]) -> str:
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "; ".join(found[:_SHOWN]) + more


def _short(value: Any) -> str:
    text = "nothing" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def archive(folder: Path, record: Mapping[str, Any]) -> Path:
    """Move a run and its submissions into the archive of its experiment -> the run's new folder.

    The archived record has the key `archived` with the name of that folder, which holds the day and time of
    the run's end. MLflow keeps the run; it gets this name at the next mirroring.
    """
    root, old = records.root(folder, record), records.full_name(record)
    place = _free(folder.parent / ARCHIVE / f"{folder.name}-{_stamp(record)}")
    moved = {**record, "archived": place.name}
    new = records.full_name(moved)

    def renamed(path: str) -> str:
        return path.replace(f"{old}/", f"{new}/", 1)

    moved["artifacts"] = {
        name: renamed(path) if path.startswith(f"{old}/") else path
        for name, path in record.get("artifacts", {}).items()
    }
    moved["submissions"] = [renamed(path) for path in record.get("submissions", ())]
    submissions = root.parent / "submissions"
    if (submissions / old).is_dir():
        (submissions / new).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(submissions / old, submissions / new)
    bookkeeping.rename(folder.parent, folder.name, f"{ARCHIVE}/{place.name}")
    place.parent.mkdir(exist_ok=True)
    write_json(folder / records.FILE, moved)
    return folder.rename(place)


def _stamp(record: records.Record) -> str:
    return datetime.fromisoformat(record.get("ended") or record["started"]).strftime("%Y%m%d-%H%M%S")


def _free(place: Path) -> Path:
    """The path, with a number if it exists: two runs may have ended in the same second."""
    tries = (place, *(place.with_name(f"{place.name}-{number}") for number in range(2, 1000)))
    return next(one for one in tries if not one.exists())
