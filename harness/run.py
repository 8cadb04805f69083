"""Execute one planned run: build the steps that are not done, and record all steps in the run's folder."""

import contextlib
import json
import os
import socket
import time
import traceback
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from harness import records, submission
from harness.config.editions import EDITIONS
from harness.config.schema import Config, flat
from harness.data.forms import other_editions, plural
from harness.data.halves import HALVES
from harness.errors import Pruned, UserError
from harness.machine import ranks
from harness.machine.environment import environment, git_state
from harness.machine.launch import INTERRUPTED
from harness.models import checkpoints, family
from harness.models.settings import ModelConfig
from harness.output.masking import masked
from harness.records.files import LISTS, PREDICTIONS, read_captions, read_lists, same_in
from harness.scoring.compare import record_on_half
from harness.steps.base import Step
from harness.steps.plan import Plan
from harness.steps.work import Reporter, Watch, Work
from harness.store import DONE, MADE, bytes_of, damage, once, write, write_json

TRACEBACK = "traceback.txt"
SUBMISSIONS = Path("submissions")
_OF_THE_WORK = ("started", "ended", "command", "git", "environment", "seconds", "host", "pid")
"""Keys of a record that tell of the process that built its steps."""
_ABOUT = ("base", "trial", "data", "fallback", "looks", "unscored", "edition")
"""Keys of a record that come neither from its steps nor from the process that built them."""


def assist(plan: Plan, reporter: Reporter, watch: Watch | None = None) -> None:
    """Do the share of a rank other than 0 in the steps that rank 0 builds."""
    work = Work(plan.config, reporter, watch)
    while (name := ranks.agree(None)) is not None:
        work.build(plan.steps[name], plan.steps[name].directory)


def run(
    plan: Plan,
    reporter: Reporter,
    command: str,
    base: tuple[str, Config] | None = None,
    trial: Mapping[str, Any] | None = None,
    watch: Watch | None = None,
    weights: bool = False,
) -> dict[str, Any]:
    """Run the unfinished steps of one plan -> its record, also kept in `runs/<name>/<variant>-s<seed>/`.

    `base`: file name and config of the experiment that this one starts from; the report shows differences.
    `trial`: the trial's record if the run belongs to a study; such a run makes no submission. `watch` may end
    training with `Pruned`. With several ranks, rank 0 calls this and the others call `assist`.

    A run that is finished stays as it is, with its dates. Weights that are gone are made again only if a step
    needs them, or if `weights`.
    """
    record = _new_record(plan, command)
    record["base"] = base and {"file": base[0], "parameters": flat(base[1])}
    if trial is not None:
        record["trial"] = dict(trial)
    folder = plan.folder
    old = _finished(folder)
    if old and not weights and _is_same(plan, record, old):
        reporter.say(f"{plan.config.run_name}: finished on {old['ended'][:16]}; nothing is left to do")
        ranks.agree(None)
        return old
    with _status(record, folder):
        record["planned"] = [step.place for step in plan.steps.values()]
        steps = _Steps(Work(plan.config, reporter, watch), record, folder)
        for name, step in plan.steps.items():
            record["steps"][name] = place = step.place
            record["at"] = name
            spared = not weights and _is_spared(plan, step, old)
            if not spared:
                steps.ensure(step)
            record["made"][name] = _made_by(step.directory) or old.get("made", {}).get(name)
            left = {
                shown: file for shown, file in step.artifacts.items() if not spared or _is_left(step, file)
            }
            record["artifacts"] |= {shown: f"{place}/{file}" for shown, file in left.items()}
            record |= _found_before(old) if spared and not _is_left(step, DONE) else step.found(record)
            write_json(folder / records.FILE, record)
        ranks.agree(None)
        record["warnings"] += _all_the_same(plan, reporter)
        if record["scores"].get("valid", {}).get("after"):
            try:
                record["halves"] = _halves(folder, record)
            except UserError as error:  # the scores themselves are there
                record["warnings"] += [f"no scores of halves: {problem}" for problem in error.problems]
        record["at"] = "submission"
        record["submissions"] = _submit(plan, record) if trial is None else []
        if old.get("steps") == record["steps"] and not steps.built:
            record |= {key: old[key] for key in _OF_THE_WORK if key in old}
        del record["planned"]  # by now these are the steps
    return record


def _finished(folder: Path) -> dict[str, Any]:
    """The record of the finished run in a folder; empty if there is none."""
    try:
        record = records.read(folder, ("steps", "made", "ended"))
    except UserError:
        return {}
    return record if record["status"] == "FINISHED" else {}


def _is_same(plan: Plan, record: dict[str, Any], old: records.Record) -> bool:
    """Whether a finished run would be the same again: each step and submission is there and unchanged."""
    places = {name: step.place for name, step in plan.steps.items()}
    facts = [
        json.loads(json.dumps({key: one.get(key) for key in _ABOUT}, default=str)) for one in (record, old)
    ]
    if places != old["steps"] or facts[0] != facts[1] or not record.keys() <= old.keys():
        return False
    whole = (
        (step.is_done() and not damage(step.directory, thorough=False)) or _is_spared(plan, step, old)
        for step in plan.steps.values()
    )
    return all(whole) and all(submission.is_intact(Path(made)) for made in old["submissions"])


def _is_spared(plan: Plan, step: Step, old: records.Record) -> bool:
    """Whether a step's weights are gone, are not needed, and it is known what else the step has left."""
    known = old.get("steps", {}).get(step.name) == step.place
    return plan.spared(step) and (known or _is_left(step, DONE))


def _is_left(step: Step, file: str) -> bool:
    return (step.directory / file).is_file()


def _found_before(old: records.Record) -> dict[str, Any]:
    """What the record has from a step of weights."""
    return {key: old[key] for key in ("training", "soup") if key in old}


class _Steps:
    """Builds the steps of a run, with all ranks, if they are not done or their files have changed."""

    def __init__(self, work: Work, record: dict[str, Any], folder: Path) -> None:
        self.work, self.record, self.folder = work, record, folder
        self.built = False

    def ensure(self, step: Step, thorough: bool = False) -> None:
        """Build a step and first its inputs, unless it is done; `thorough` checks large weights too."""
        damaged = damage(step.directory, thorough)
        if not damaged and step.is_done():
            return
        for file, what in damaged.items():
            place = step.directory / file
            self.work.say(f"{step.name}: {place} has changed since the step ({what}); it is built again")
        for source in step.inputs.steps:
            self.ensure(source, thorough=True)
        write_json(self.folder / records.FILE, self.record)  # MLflow follows the losses from now on
        begun = time.perf_counter()
        once(step.directory, step.canonical, lambda where: self._build(step, where), step.made_from())
        self.record["seconds"][step.name] = round(time.perf_counter() - begun, 1)

    def _build(self, step: Step, directory: Path) -> bool:
        """Build with all ranks; record commit, environment and command for later runs that share the step."""
        ranks.agree(step.name)
        self.built = True
        begun = time.perf_counter()
        complete = self.work.build(step, directory)
        made = {key: self.record[key] for key in ("git", "environment", "command")}
        made |= {"ranks": ranks.world_size()} | step.made
        write_json(directory / MADE, made | {"seconds": round(time.perf_counter() - begun, 1)})
        return complete


def _made_by(directory: Path) -> dict[str, Any] | None:
    """The step's record of how it was built; None if it is absent or can't be read."""
    try:
        made = json.loads(bytes_of(directory / MADE))
    except (OSError, ValueError, RecursionError):
        return None
    return made if isinstance(made, dict) else None


def _new_record(plan: Plan, command: str) -> dict[str, Any]:
    config = plan.config
    return {
        "name": config.name,
        "variant": config.variant,
        "seed": config.seed,
        "status": "RUNNING",
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "ended": None,
        "at": None,
        "failure": None,
        "command": command,
        "edition": config.edition,
        "config": json.loads(config.model_dump_json()),
        "parameters": flat(config),
        "standin_model": config.has_model and _is_standin(config.model),
        "git": git_state(),
        "environment": environment(config.device),
        "data": {
            "root": str(plan.data.root),
            "layout": plan.data.layout,
            "fingerprints": dict(plan.data.fingerprints),
            "splits": {split: len(examples) for split, examples in plan.data.splits.items()},
            "left_out": len(plan.data.left_out),
            "notes": plan.notes,
        },
        "fallback": _fallback(plan),
        "steps": {},
        "made": {},
        "seconds": {},
        "scores": {},
        "looks": plan.looks,
        "unscored": {"valid": records.ON_VALID} if config.full_fit else {},
        "image_gap": None,
        "baseline": None,
        "concepts": None,
        "warnings": [],
        "artifacts": {},
        "submissions": [],
    }


def _fallback(plan: Plan) -> dict[str, dict[str, Any]]:
    """By split, the ids of unreadable images and what they get: a caption, concepts, or both."""
    splits = [*plan.fallback, *plan.concept_fallback]
    return {split: plan.fallback.get(split, {}) | plan.concept_fallback.get(split, {}) for split in splits}


def _is_standin(model: ModelConfig) -> bool:
    """Whether a model or a part of it is built here, or is in a folder that is marked so."""
    chosen = family(model)
    found = map(checkpoints.find, chosen.checkpoints(model).values())
    return chosen.built_from(model) is not None or any(one is not None and one.standin for one in found)


@contextlib.contextmanager
def _status(record: dict[str, Any], folder: Path) -> Iterator[None]:
    """Keep the status in `run.json`: RUNNING, then FINISHED, FAILED, PRUNED or KILLED with the reason."""
    write(folder / records.CONFIG, yaml.safe_dump(record["config"], sort_keys=False, allow_unicode=True))
    record["artifacts"]["config.yaml"] = f"{record['name']}/{folder.name}/config.yaml"
    write_json(folder / records.FILE, record)
    (folder / TRACEBACK).unlink(missing_ok=True)
    try:
        yield
        record["status"], record["at"] = "FINISHED", None
    except BaseException as error:
        record["status"], record["failure"] = _failure(error, record["at"])
        if record["status"] == "FAILED" and not isinstance(error, UserError):
            with contextlib.suppress(OSError):  # a full disk may be the cause of the failure
                write(folder / TRACEBACK, masked(traceback.format_exc()))
                record["artifacts"][TRACEBACK] = f"{record['name']}/{folder.name}/{TRACEBACK}"
        raise
    finally:
        record["ended"] = record.get("ended") or datetime.now(UTC).isoformat(timespec="seconds")
        try:
            write_json(folder / records.FILE, record)
        except OSError:  # a full disk may be the cause of the failure, which says more
            if record["status"] == "FINISHED":
                raise


def _failure(error: BaseException, at: str | None) -> tuple[str, dict[str, Any]]:
    """The status of a run that an error ended, and its failure record: step, reason, hint, exit code."""
    hints: list[str | None] = []
    code: int | None = 1
    # A launcher interrupts rank 0 when another rank fails.
    cut_off = isinstance(error, KeyboardInterrupt) or ranks.cut_off(error)
    if cut_off and (why := ranks.why_another_failed()):
        status, reason = "FAILED", f"another rank failed: {why}"
    elif isinstance(error, KeyboardInterrupt):
        status, reason = "KILLED", "interrupted by Ctrl-C or a signal; the same command continues"
        code = INTERRUPTED
    elif isinstance(error, Pruned):
        status, reason, code = "PRUNED", str(error), None  # the study continues
    elif isinstance(error, UserError):
        status, reason, code = "FAILED", "; ".join(map(str, error.problems)), error.exit_code
        hints = [*(problem.hint for problem in error.problems), error.hint]
    elif cut_off:
        status, reason = "FAILED", "another rank of this launch has ended; the same command continues"
    else:
        first = (str(error).strip().splitlines() or [""])[0]
        status, reason = "FAILED", f"{type(error).__name__}: {first}".removesuffix(": ")
    hint = masked(" ".join(filter(None, hints))) or None
    return status, {
        "step": at,
        "error": type(error).__name__,
        "reason": masked(reason),
        "hint": hint,
        "exit_code": code,
    }


def _halves(folder: Path, record: records.Record) -> dict[str, Any]:
    """The scores after post-processing and the image gap of each half of validation."""
    found = {half: record_on_half(folder, record, half) for half in HALVES}
    return {
        half: {"scores": one["scores"]["valid"]["after"], "image_gap": one["image_gap"]}
        for half, one in found.items()
    }


def _all_the_same(plan: Plan, reporter: Reporter) -> list[str]:
    """A warning for each split whose captions, or concepts, are nearly all the same; prints each at once."""
    found = []
    for split, step in plan.submitted.items():
        found += same_in(split, read_captions(step.directory / PREDICTIONS))
    for split, step in plan.concepts.items():
        lists = read_lists(step.directory / LISTS)
        found += same_in(split, {image: ";".join(cuis) for image, cuis in lists.items()}, plural("concept"))
    for warning in found:
        reporter.say(f"warning: {plan.config.run_name}: {warning}")
    return found


def _submit(plan: Plan, record: dict[str, Any]) -> list[str]:
    """Write and check the official file of every predicted split, if the edition's format is established."""
    edition, made = EDITIONS[plan.config.edition], []
    tasks: dict[submission.Task, tuple[Any, Mapping[str, Step], str, Any, Any]] = {
        "caption": (edition.caption_format, plan.submitted, PREDICTIONS, read_captions, plan.fallback),
        "concept": (edition.concept_format, plan.concepts, LISTS, read_lists, plan.concept_fallback),
    }
    for task, (form, steps, file, read, fallback) in tasks.items():
        if steps and form is None:
            what = f"no submission file: its format in {edition.year} is not established"
            record["warnings"].append(f"{what}. {other_editions(task)}")
            continue
        for split, step in steps.items():
            values = read(step.directory / file)
            ids = [example.id for example in plan.data.splits[split]]
            manifest = _manifest(plan, record, split, fallback.get(split))
            folder = SUBMISSIONS / records.full_name(record)
            made.append(str(submission.make(values, ids, edition.year, folder, manifest, split, task)))
    return made


def _manifest(plan: Plan, record: records.Record, split: str, fallback: Any) -> dict[str, Any]:
    return {
        "run": records.full_name(record),
        "split": split,
        "standin_model": record["standin_model"],
        "commit": record["git"],
        "made": record["made"],
        "command": record["command"],
        "config": record["config"],
        "fallback": fallback,
        "notes": [*plan.notes, *record.get("training", {}).get("notes", ())],
    }
