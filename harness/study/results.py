"""Results of a study: a line and a row for each trial, and the best config as an experiment."""

import json
import os
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
import yaml
from filelock import FileLock
from optuna.trial import FrozenTrial, TrialState

from harness import records
from harness.config.experiment import merge, parse_sets, set_value, variant_of
from harness.data.halves import HELD
from harness.errors import Problem, UserError
from harness.scoring.compare import record_on_half
from harness.store import RUNS, write_json
from harness.study import plots
from harness.study.against import against_base, folder_of
from harness.study.spec import Study, trial_name
from harness.study.storage import RECORD, read_record
from harness.study.trials import Trials

_REDRAW = 60.0  # seconds between drawings of the plots during a study


def best_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The trial with the highest score (the earliest of equals); for several objectives the Pareto front."""
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(study.directions) == 1:
        return [max(done, key=lambda trial: (trial.value, -trial.number))] if done else []
    return sorted(study.best_trials, key=lambda trial: trial.number)


def line(trials: Trials, number: int) -> str:
    """One line: how a trial ended, and the best trial so far."""
    trial = trials.study.get_trials(deepcopy=False)[number]
    names, best = trials.spec.objective, best_trials(trials.study)
    if trial.state is TrialState.COMPLETE:
        outcome = "  ".join(f"{n} {_digits(trial, v)}" for n, v in zip(names, trial.values, strict=True))
    else:
        outcome = f"{trial.state.name}: {trial.user_attrs.get('reason', '')}"
    if len(names) > 1:
        return f"trial {number}: {outcome} ({len(best)} on the Pareto front)"
    return f"trial {number}: {outcome}" + (
        f" (best {_digits(best[0], best[0].value)}, trial {best[0].number})" if best else ""
    )


def _digits(trial: FrozenTrial, value: float) -> str:
    return f"{value:.4f}" + ("" if trial.user_attrs.get("official", True) else "*")


def rows(study: optuna.Study, spec: Study) -> list[dict[str, Any]]:
    """A row for each trial: number, state, scores, parameters, seconds, reason, and the trial it retries.

    The best trials also have `against_base`. In a study on the tune half they have `held`, their results on
    the other half.
    """
    best = {trial.number for trial in best_trials(study)}
    found = []
    for trial in study.get_trials(deepcopy=False):
        scores = trial.values if trial.state is TrialState.COMPLETE else [None] * len(spec.objective)
        values = {p.key: p.decode(trial.params[p.key]) for p in spec.space if p.key in trial.params}
        found.append(
            {
                "number": trial.number,
                "state": trial.state.name,
                "best": trial.number in best,
                "values": dict(zip(spec.objective, scores, strict=True)),
                "official": trial.user_attrs.get("official"),
                "params": values,
                "seconds": trial.duration.total_seconds() if trial.duration else None,
                "reason": trial.user_attrs.get("reason"),
                "retry_of": trial.user_attrs.get("retry_of"),
            }
        )
        if trial.number in best and (on_held := held(spec, trial, RUNS / spec.name)):
            found[-1]["held"] = on_held
        if trial.number in best and (gain := against_base(spec, trial, RUNS / spec.name)):
            found[-1]["against_base"] = gain
    return found


def held(spec: Study, trial: FrozenTrial, folder: Path) -> dict[str, Any] | None:
    """A trial's objective scores and image gap on the held half; None if the study counts all images.

    `folder` is the study's. If the scores can't be read, there is a `reason`.
    """
    if spec.config.half is None:
        return None
    try:
        run = folder_of(spec, trial.number, folder)
        record = record_on_half(run, records.read(run), HELD)
    except UserError as error:
        return {"reason": "; ".join(map(str, error.problems))}
    scores = {name: records.on_valid(record)[name] for name in spec.objective}
    return {"scores": scores, "image_gap": record["image_gap"]["rouge1"]}


def on_held(found: Mapping[str, Any]) -> str:
    """The results of `held` in one line."""
    if "reason" in found:
        return f"on the held half: {found['reason']}"
    parts = [
        f"{name} {one['value']:.4f}{'' if one['official'] else '*'}{_interval(one)} n={one['n']}"
        for name, one in found["scores"].items()
        if one["value"] is not None
    ]
    gap = found["image_gap"]
    parts += [] if gap.get("gap") is None else [f"image gap {gap['gap']:+.4f}{_interval(gap, '+')}"]
    return f"on the held half: {', '.join(parts)}"


def _interval(one: Mapping[str, Any], sign: str = "") -> str:
    return "" if one.get("low") is None else f" [{one['low']:{sign}.4f}, {one['high']:{sign}.4f}]"


def publish(trials: Trials, draw: bool = False) -> None:
    """Write `study.json` with counts and best trials, and the plots; MLflow's parent run shows them."""
    with FileLock(trials.folder / "study.lock"):
        record = read_record(trials.folder)
        every = trials.study.get_trials(deepcopy=False)
        best, states = best_trials(trials.study), [trial.state.name for trial in every]
        record["trials"] = {state: states.count(state) for state in sorted(set(states))}
        record["objective"] = list(trials.spec.objective)
        record["half"] = trials.spec.config.half
        record["best"] = [
            {"number": one.number, "values": dict(zip(record["objective"], one.values, strict=True))}
            | ({"held": on_held} if (on_held := held(trials.spec, one, trials.folder)) else {})
            for one in best
        ]
        slots = sum("slot" not in trial.user_attrs for trial in every)
        done = slots >= trials.spec.trials and not {"RUNNING", "WAITING"} & set(states)
        record["failed_alike"] = trials.failed_alike()
        record["ended"] = datetime.now(UTC).isoformat(timespec="seconds") if done else None
        if draw or time.time() - record.get("drawn", 0) > _REDRAW:
            names, record["notes"] = plots.draw(trials.study, trials.spec, trials.folder / "plots")
            record["drawn"] = time.time()
            record["artifacts"] = {f"plots/{name}": f"plots/{name}" for name in names}
        write_json(trials.folder / RECORD, record)


def winner(study: optuna.Study, spec: Study, number: int | None) -> FrozenTrial:
    """The trial with this number, by default the best; raises `UserError` if it has not finished or if there
    is no single best."""
    best = best_trials(study)
    if number is not None:
        every = study.get_trials(deepcopy=False)
        if number >= len(every) or every[number].state is not TrialState.COMPLETE:
            raise UserError(
                [Problem(f"got {number}, which is not a finished trial of {spec.name}", key="--trial")]
            )
        return every[number]
    if not best:
        raise UserError([Problem(f"no trial of {spec.name} has finished", spec.file)])
    if len(best) > 1:
        numbers = ", ".join(str(trial.number) for trial in best)
        hint = "Choose one: --trial NUMBER"
        raise UserError(
            [Problem(f"several trials are on the Pareto front: {numbers}", key="--trial", hint=hint)]
        )
    return best[0]


def as_experiment(trial: FrozenTrial, spec: Study, output: Path, command: str) -> str:
    """The YAML of an experiment whose run gives a trial's captions, on every split and with every score.

    `score` and `predict.splits` are the base's, not the study's cheaper ones. The exception is the two keys
    of `score` that affect which weights training keeps as the best.
    """
    changed = variant_of(spec.base_file, spec.base.variant)
    merge(changed, _overrides(spec))
    for parameter in spec.space:
        if parameter.key in trial.params:
            value = parameter.decode(trial.params[parameter.key])
            set_value(changed, parameter.path, value, spec.base.model_dump(mode="json"))
    changed.pop("seed", None)  # the file's `seeds` override it
    seed = trial.params.get("seed", spec.base.seed)
    named = zip(spec.objective, trial.values, strict=True)
    scores = ", ".join(f"{name} {_digits(trial, value)}" for name, value in named)
    star = "" if trial.user_attrs.get("official", True) else " (* by a stand-in)"
    if found := held(spec, trial, RUNS / spec.name):
        scores = f"{scores} on the tune half, by which it was chosen; {on_held(found)}"
    head = [
        f"# Question  How good is this trial of the study {spec.name}, by every score and on test?",
        f"# Command   harness run {output}",
        f"# Expected  validation {scores}{star}, as trial {trial.number} of {spec.trials}",
        f"# Cost      that of {spec.base_file.name}, without the steps that the study has finished",
        f"# Made by   {command}",
    ]
    body = {
        "base": os.path.relpath(spec.base_file.resolve(), output.resolve().parent),
        "name": f"{spec.name}/best",
        "seeds": [seed],
        "variants": {trial_name(trial.number): changed},
    }
    return "\n".join(head) + "\n" + yaml.safe_dump(body, sort_keys=False, allow_unicode=True)


def _overrides(spec: Study) -> dict[str, Any]:
    """What the study's file and `--set` change in the base, except scores, splits and the device."""
    changed: dict[str, Any] = json.loads(json.dumps(spec.config.overrides, default=str))
    for path, value in parse_sets(spec.sets)[0]:
        set_value(changed, path, value, spec.base.model_dump(mode="json"))
    changed.pop("device", None)
    score = changed.pop("score", {})
    if kept := {key: score[key] for key in ("bertscore", "precision") if key in score}:
        changed["score"] = kept
    if "predict" in changed:
        changed["predict"].pop("splits", None)
    return changed
