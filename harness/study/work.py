"""One worker of a study: it takes trials, runs each like any other run, and records how it ended."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from harness import run as runs
from harness.data import Dataset
from harness.errors import Problem, Pruned, UserError
from harness.machine import device, ranks
from harness.output.masking import masked
from harness.steps.plan import Plan, prepare
from harness.steps.work import Reporter, Watch
from harness.store import RUNS
from harness.study import results
from harness.study.spec import Study
from harness.study.storage import failures, open_study, owned, reachable
from harness.study.trials import ALIKE, Trial, Trials, absent, counting, scores_of
from harness.training.resume import EMA

WAIT = "wait"
_POLL = 1.0  # seconds between checks for trials that other workers gave back


def work(
    spec: Study, chosen: str, reporter: Reporter, silent: Reporter, command: str, timeout: float | None = None
) -> None:
    """Work on a study until all its trials are done; start no trial after `timeout` seconds.

    Every rank of a launch calls this: rank 0 takes the trials and sends their parameters to the others.
    Raises `UserError` if the base can't run, or if the first trials all fail for the same reason.
    """
    ranks.start(device.probe(spec.base.device).kind)
    if ranks.rank():
        with ranks.say_when_interrupted():
            _assist(spec, silent)
        return
    loaded: dict[str, Dataset] = {}
    (plan,) = prepare([spec.base], reporter, RUNS, loaded)
    ranks.agree(None)  # the data is drawn and checked now, so the other ranks may read it
    with owned(RUNS / spec.name, chosen), reachable(chosen):
        study, storage = open_study(spec, RUNS / spec.name, chosen, plan.data.fingerprints)
        worker = _Worker(spec, Trials(spec, study, storage, RUNS), reporter, command, loaded)
        try:
            worker.run(float("inf") if timeout is None else time.monotonic() + timeout)
        finally:
            results.publish(worker.trials, draw=True)
    ranks.agree(None)


class _Worker:
    def __init__(
        self, spec: Study, trials: Trials, reporter: Reporter, command: str, loaded: dict[str, Dataset]
    ) -> None:
        self.spec, self.trials, self.reporter = spec, trials, reporter
        self.command, self.loaded = command, loaded

    def run(self, until: float) -> None:
        """Run trials; while other workers are busy, wait for trials that they may give back."""
        while time.monotonic() < until:
            trial = self.trials.take()
            if trial is not None:
                failed = self._attempt(trial)
                results.publish(self.trials)
                if failed is not None:
                    self._end_after_failure(failed)
            elif self.trials.busy():
                ranks.agree(WAIT)
                time.sleep(_POLL)
            else:
                return

    def _attempt(self, trial: Trial) -> str | None:
        """Run one trial and record how it ended -> the reason if it failed."""
        values, reason = None, None
        try:
            state, values = "COMPLETE", self._scores(trial)
        except Pruned as why:
            state, reason = "PRUNED", str(why)
        except (UserError, RuntimeError, ValueError) as error:  # torch: out of memory, or values do not fit
            if ranks.cut_off(error):
                self._leave(trial)
                raise KeyboardInterrupt from error
            state, reason = "FAIL", _reason(error)
        except (KeyboardInterrupt, OSError, *failures()):
            self._leave(trial)
            raise
        except BaseException as error:
            self.trials.give_back(trial, _reason(error), lost=True)
            raise
        self.trials.finish(trial, state, values, reason)
        self.reporter.say(results.line(self.trials, trial.number))
        return reason if state == "FAIL" else None

    def _leave(self, trial: Trial) -> None:
        """Give a trial back; it counts as lost if another rank's failure interrupted this one."""
        if ranks.all_interrupted():
            self.trials.give_back(trial)
        else:
            self.trials.give_back(trial, "another rank failed", lost=True)

    def _scores(self, trial: Trial) -> dict[str, float]:
        """Run a trial -> its score for each objective."""
        config = self.spec.trial(trial.number, trial.values)
        ranks.agree((trial.number, trial.values))
        (plan,) = prepare([config], self.reporter, RUNS, self.loaded)
        base = (self.spec.base_file.name, self.spec.base)
        watch = _watch(self.spec, plan, lambda row: self._judge(trial, plan, row))
        record = runs.run(plan, self.reporter, self.command, base, trial.record, watch)
        record = counting(self.spec, plan.folder, record)
        if reasons := absent(record, self.spec.objective):
            raise UserError([Problem(reason) for reason in reasons], exit_code=1)
        return scores_of(record, self.spec.objective)

    def _judge(self, trial: Trial, plan: Plan, row: Mapping[str, Any]) -> str | None:
        """Report a validation to the pruner -> the reason to end the trial now, or None."""
        if row["epoch"] % 1:  # a pruner compares trials after whole epochs
            return None
        (metric,) = self.spec.objective
        name = f"valid_{metric}" if f"valid_{metric}" in row else "valid_primary"
        before = plan.config.train.stages[: row["stage"] - 1]
        epoch = int(row["epoch"]) + sum(stage.epochs for stage in before)
        averaged = f"{EMA}{name}"
        if name != "valid_primary" and row.get(averaged, -math.inf) > row[name]:
            name = averaged  # the better of the two is kept
        trial.report(row[name], epoch)
        if not trial.asked.should_prune():
            return None
        judge = f"{name} {row[name]:.4f} after epoch {epoch}, by {self.spec.config.pruner.name}"
        return judge if metric in name else f"{judge}; training does not compute {metric}"

    def _end_after_failure(self, why: str) -> None:
        if self.trials.failed_alike() == why:
            what = f"the first {ALIKE} trials failed for the same reason, so the study ends: {why}"
            raise UserError([Problem(what, self.spec.file)], exit_code=1)
        if ranks.world_size() > 1:
            # the other ranks may wait in the middle of a step; the launcher restarts all of them
            raise UserError([Problem(f"the ranks restart after: {why}")], exit_code=1)


def _reason(error: BaseException) -> str:
    if isinstance(error, UserError):
        return masked("; ".join(map(str, error.problems)))
    first = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return masked(f"{type(error).__name__}: {first}")


def _watch(spec: Study, plan: Plan, judge: Callable[[Mapping[str, Any]], str | None]) -> Watch | None:
    """A function that every rank calls after each validation; None if there are several objectives.

    It raises `Pruned` if the pruner ends the trial. Optuna does not prune trials with several objectives.
    """
    if len(spec.objective) > 1:
        return None

    def watch(row: Mapping[str, Any]) -> None:
        why = ranks.agree(judge(row) if ranks.rank() == 0 else None)
        if why is not None:
            raise Pruned(why)

    return watch


def _assist(spec: Study, silent: Reporter) -> None:
    """Do the share of a rank other than 0 in each trial that rank 0 takes."""
    loaded: dict[str, Dataset] = {}
    ranks.agree(None)
    while (message := ranks.agree(None)) is not None:
        if message == WAIT:
            continue
        number, values = message
        (plan,) = prepare([spec.trial(number, values)], silent, RUNS, loaded)
        try:
            runs.assist(plan, silent, _watch(spec, plan, lambda row: None))
        except Pruned:
            continue
