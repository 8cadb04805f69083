"""How workers share trials: they take one at a time, give it back when interrupted, and recover lost ones.

Storages differ in what they record about workers, so each worker holds a file lock for its trial. The system
releases the lock if the process dies. One more lock protects all changes of a study, so two workers never
take or retry the same trial.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from harness import records
from harness.errors import UserError
from harness.scoring.compare import record_on_half
from harness.store import write_json
from harness.study.space import Parameter, encode, name_of
from harness.study.spec import Study, trial_name
from harness.study.storage import run_file, sampler

_DRAWS = 20
"""Attempts of a sampler to draw a new point; after that the next untried point in order is used."""
ALIKE = 3
"""The study ends if this number of first trials fail for the same reason."""
State = str
"""COMPLETE, PRUNED or FAIL, as Optuna calls them."""


@dataclass
class Trial:
    """One trial that this process works on; `slot` counts trials without retries."""

    number: int
    slot: int
    values: dict[str, Any]
    retry_of: int | None
    asked: optuna.Trial
    lock: FileLock
    reported: set[int] = field(default_factory=set)

    def report(self, value: float, epoch: int) -> None:
        """Report a validation score to the pruner; for a repeated epoch the first score counts."""
        if epoch not in self.reported:
            self.asked.report(value, epoch)
            self.reported.add(epoch)

    @property
    def record(self) -> dict[str, Any]:
        """The section `trial` of `run.json`."""
        return {
            "number": self.number,
            "state": "RUNNING",
            "params": self.values,
            "retry_of": self.retry_of,
            "values": None,
            "reason": None,
        }


class Trials:
    """The trials of one study, as one worker sees and changes them."""

    def __init__(self, spec: Study, study: optuna.Study, storage: BaseStorage, root: Path) -> None:
        self.spec, self.study, self.storage = spec, study, storage
        self.folder = root / spec.name
        self.study_id = storage.get_study_id_from_name(spec.name)

    def take(self) -> Trial | None:
        """The next trial to work on; None if all trials have started.

        Trials to be repeated, after a lost process or an interruption, come first.
        """
        with self._alone():
            self._recover()
            known = self.study.get_trials(deepcopy=False)
            waiting = [trial for trial in known if trial.state is TrialState.WAITING]
            slot = sum("slot" not in trial.user_attrs for trial in known)
            if waiting:
                slot = self.slot_of(waiting[0])
            elif slot >= self.spec.trials:
                return None
            elif (fixed := self.spec.fixed(slot) or self._untried(slot, known)) is not None:
                self.study.enqueue_trial({key: encode(value) for key, value in fixed.items()})
            self.study.sampler = sampler(self.spec, slot)
            asked = self.study.ask()
            lock = self._lock_of(asked.number)
            lock.acquire()
        trial = Trial(asked.number, slot, self._draw(asked), asked.user_attrs.get("retry_of"), asked, lock)
        if (before := asked.user_attrs.get("after")) is not None:  # its training resumes that trial's
            for epoch, value in sorted(known[before].intermediate_values.items()):
                trial.report(value, epoch)
        return trial

    def _untried(self, slot: int, known: Sequence[FrozenTrial]) -> dict[str, Any] | None:
        """A point of a finite space that no trial has used, drawn by the sampler; None for an infinite space.

        The draws happen in a copy of the study. A draw that is not new stays there, so that tpe avoids it.
        """
        if self.spec.points is None:
            return None
        tried = {
            name_of(self._values(trial.system_attrs.get("fixed_params", trial.params))) for trial in known
        }
        copy = optuna.create_study(directions=self.study.directions, sampler=sampler(self.spec, slot))
        copy.add_trials(known)
        for _ in range(_DRAWS):
            point = self._draw(copy.ask())
            if name_of(point) not in tried:
                return point
        return next((point for point in self.spec.points if name_of(point) not in tried), None)

    def _values(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        return {p.key: p.decode(stored[p.key]) for p in self.spec.space if p.key in stored}

    def busy(self) -> bool:
        """Whether other processes work on trials; such trials may still be given back."""
        return any(trial.state is TrialState.RUNNING for trial in self.study.get_trials(deepcopy=False))

    def failed_alike(self) -> str | None:
        """The reason of failure that the first `ALIKE` trials and the last ended one share, or None."""
        last: dict[int, FrozenTrial] = {}
        for trial in self.study.get_trials(deepcopy=False):
            last[self.slot_of(trial)] = trial
        ended = [trial for trial in last.values() if trial.state.is_finished()]
        first = [last[slot] for slot in range(ALIKE) if slot in last]
        if not ended or len(first) < ALIKE:
            return None
        first.append(max(ended, key=lambda trial: trial.datetime_complete))
        reasons = {t.user_attrs.get("reason") if t.state is TrialState.FAIL else None for t in first}
        return reasons.pop() if len(reasons) == 1 else None

    def finish(
        self, trial: Trial, state: State, values: Mapping[str, float] | None = None, reason: str | None = None
    ) -> None:
        """Record how a trial ended; a COMPLETE trial has scores."""
        with self._alone():
            self._tell(trial.number, state, values, reason)
        trial.lock.release()

    def give_back(self, trial: Trial, why: str = "interrupted", lost: bool = False) -> None:
        """Queue a trial again with the same parameters; a lost one only as often as `retries` allows."""
        frozen = self.study.get_trials(deepcopy=False)[trial.number]
        with self._alone():
            if lost:
                self._retry(frozen, why)
            else:
                self._again(frozen, why)
        trial.lock.release()

    def _recover(self) -> None:
        """Find trials whose process has ended: finish those with scores, queue the others again."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            lock = self._lock_of(trial.number)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            scores = self._left(trial.number)
            if scores:
                self._tell(trial.number, "COMPLETE", scores)
            else:
                self._retry(trial, "its process was gone")
            lock.release()

    def _left(self, number: int) -> dict[str, float] | None:
        """The scores that a lost trial left; None if its run has not finished or they can't be read."""
        record = self.read_run(number)
        if record is None or record["status"] != "FINISHED":
            return None
        try:
            counted = counting(self.spec, run_file(self.folder, number).parent, record)
        except UserError:
            return None
        return None if absent(counted, self.spec.objective) else scores_of(counted, self.spec.objective)

    def _retry(self, trial: FrozenTrial, why: str) -> None:
        """Queue a lost trial again, unless it was lost too often."""
        times = self._losses(trial) + 1
        if times > self.spec.config.retries:
            self._tell(trial.number, "FAIL", reason=f"{why}, {times} times in a row")
        else:
            self._again(trial, why, lost=True)

    def _losses(self, trial: FrozenTrial) -> int:
        """How often this trial was lost with its process, over all its retries."""
        known, slot = self.study.get_trials(deepcopy=False), self.slot_of(trial)
        return sum(one.user_attrs.get("lost", False) and self.slot_of(one) == slot for one in known)

    def slot_of(self, trial: FrozenTrial) -> int:
        """The number of this trial without counting retries."""
        if "slot" in trial.user_attrs:
            return trial.user_attrs["slot"]
        known = self.study.get_trials(deepcopy=False)
        return sum("slot" not in one.user_attrs for one in known if one.number < trial.number)

    def _again(self, trial: FrozenTrial, why: str, lost: bool = False) -> None:
        """Queue a trial again and end it; after a crash in between, the next call finds it queued."""
        known = self.study.get_trials(deepcopy=False)
        queued = next((one.number for one in known if one.user_attrs.get("after") == trial.number), None)
        if queued is None:
            first = trial.user_attrs.get("retry_of", trial.number)
            attributes = {"slot": self.slot_of(trial), "retry_of": first, "after": trial.number}
            self.study.enqueue_trial(self._parameters(trial), attributes)
            queued = len(known)
        self._attribute(trial.number, "lost", lost)
        self._tell(trial.number, "FAIL", reason=f"{why}; tried again as trial {queued}")

    def _parameters(self, trial: FrozenTrial) -> dict[str, Any]:
        """The trial's complete parameters, or only its fixed ones: the same seed draws the others again."""
        drawn = dict(trial.params)
        values = self._values(drawn)
        wanted = [p.key for p in self.spec.space if p.active(values)]
        return drawn if set(wanted) <= set(drawn) else trial.system_attrs.get("fixed_params", {})

    def _tell(
        self,
        number: int,
        state: State,
        values: Mapping[str, float] | None = None,
        reason: str | None = None,
    ) -> None:
        """Write how a trial ended to its run's record, then to the storage."""
        if reason is not None:
            self._attribute(number, "reason", reason)
        record = self.read_run(number)
        if record is not None:
            if values:
                self._attribute(number, "official", is_official(record, values))
            if record["status"] == "RUNNING":
                record["status"] = "KILLED"
                record["failure"] = {"step": record.get("at"), "error": None, "reason": reason, "hint": None}
            record["trial"] = (record["trial"] or {}) | {
                "state": state,
                "values": values and dict(values),
                "half": self.spec.config.half,
                "reason": reason,
            }
            write_json(run_file(self.folder, number), record)
        scores = [values[name] for name in self.spec.objective] if state == "COMPLETE" and values else None
        self.study.tell(number, scores, None if scores else TrialState[state])

    def _attribute(self, number: int, key: str, value: Any) -> None:
        trial_id = self.storage.get_trial_id_from_study_id_trial_number(self.study_id, number)
        self.storage.set_trial_user_attr(trial_id, key, value)

    def _draw(self, asked: optuna.Trial) -> dict[str, Any]:
        """Draw a trial's parameters -> their values with the config's types."""
        values: dict[str, Any] = {}
        for parameter in self.spec.space:
            if parameter.active(values):
                values[parameter.key] = parameter.decode(_suggest(asked, parameter))
        return values

    def read_run(self, number: int) -> dict[str, Any] | None:
        """The record of a trial's run; None if the run has not started or its record can't be read."""
        file = run_file(self.folder, number)
        found, _ = records.read_all([file] if file else [], ("trial", "scores"))
        return found[0][1] if found else None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with FileLock(self.folder / "study.lock"):
            yield

    def _lock_of(self, number: int) -> FileLock:
        folder = self.folder / "locks"
        folder.mkdir(exist_ok=True)
        return FileLock(folder / f"{trial_name(number)}.lock")


def _suggest(asked: optuna.Trial, parameter: Parameter) -> Any:
    how, key = parameter.how, parameter.key
    if how.choices is not None:
        return asked.suggest_categorical(key, parameter.encoded)
    if parameter.whole:
        step = 1 if how.step is None else int(how.step)
        return asked.suggest_int(key, int(how.low), int(how.high), step=step, log=how.log)
    return asked.suggest_float(key, how.low, how.high, step=how.step, log=how.log)


def counting(spec: Study, folder: Path, record: records.Record) -> records.Record:
    """A finished trial's record with the scores that count: those of the study's half, or of all images."""
    return record_on_half(folder, record, spec.config.half) if spec.config.half else record


def absent(record: Mapping[str, Any], objective: Sequence[str]) -> list[str]:
    """The reasons for absent objective scores of a finished run."""
    scores = records.on_valid(record)
    none = {"value": None, "reason": "not computed"}
    found = {name: scores.get(name, none) for name in objective}
    return [
        f"{name} is absent: {score.get('reason', 'it is not a finite number')}"
        for name, score in found.items()
        if score["value"] is None
    ]


def scores_of(record: Mapping[str, Any], objective: Sequence[str]) -> dict[str, float]:
    """The objective's validation scores (`records.on_valid`); the finished run must have them."""
    scores = records.on_valid(record)
    return {name: scores[name]["value"] for name in objective}


def is_official(record: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Whether all these scores are official: no stand-ins and no unclear readings of a metric."""
    scores = records.on_valid(record)
    return all(scores[name]["official"] for name in names)
