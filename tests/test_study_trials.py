"""Which worker has which trial: real storages, real processes, and SIGKILL at any moment."""

import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from support.studies import BASE, STUDY, fork, opened, study

from harness.cli.terminal import Terminal
from harness.config.experiment import load as load_experiment
from harness.config.schema import Config
from harness.errors import UserError
from harness.machine.device import Device
from harness.study import workers
from harness.study.results import as_experiment, winner
from harness.study.spec import Study, load
from harness.study.storage import address, choose, open_study, owned
from harness.study.trials import ALIKE, Trials
from harness.study.work import _Worker


def score(values: dict) -> float:
    """Any number that the values determine."""
    return values["train.learning_rate"] * 100 + values["predict.num_beams"] / 10


def worker(spec: Study, folder: Path, log: Path, pause: float) -> None:
    """Take trials and finish them, noting each that came to its end; stay until `over` is there."""
    trials = opened(spec, folder)
    while True:
        trial = trials.take()
        if trial is None:
            if not trials.busy() and (folder / "over").exists():
                os._exit(0)
            time.sleep(0.01)
            continue
        time.sleep(pause)
        trials.finish(trial, "COMPLETE", {"bertscore": score(trial.values)})
        with log.open("a") as file:
            file.write(json.dumps([trial.number, trial.slot, trial.values]) + "\n")


def results(trials: Trials) -> dict[int, tuple[dict, float]]:
    """Parameters and score by slot."""
    done = trials.study.get_trials(states=(TrialState.COMPLETE,))
    slots = [trials.slot_of(trial) for trial in done]
    assert len(set(slots)) == len(slots), "a trial was done twice"
    return {slot: (trial.params, trial.value) for slot, trial in zip(slots, done, strict=True)}


def alone(tmp_path: Path, **changes) -> dict[int, tuple[dict, float]]:
    """The same study by one undisturbed process."""
    folder = tmp_path / "alone"
    folder.mkdir()
    spec = study(folder, **changes)
    trials = opened(spec, folder)
    while (trial := trials.take()) is not None:
        trials.finish(trial, "COMPLETE", {"bertscore": score(trial.values)})
    return results(trials)


@pytest.mark.slow
def test_ten_workers_killed_at_random_lose_and_double_nothing(tmp_path):
    spec, log = study(tmp_path, trials=60), tmp_path / "log"
    draw = random.Random(5)

    def begin() -> multiprocessing.Process:
        process = fork.Process(target=worker, args=(spec, tmp_path, log, 0.2))
        process.start()
        return process

    log.touch()
    running, done, end = [begin(), begin()], 0, time.monotonic() + 100
    for _ in range(10):
        while len(log.read_text().splitlines()) == done:
            assert time.monotonic() < end
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.2))
        done = len(log.read_text().splitlines())
        victim = running.pop(draw.randrange(2))
        victim.kill()
        victim.join()
        running.append(begin())
    (tmp_path / "over").touch()
    for process in running:
        process.join(100)
        assert process.exitcode == 0
    trials = opened(spec, tmp_path)
    found = results(trials)
    assert found == alone(tmp_path, trials=60)
    assert sum("retry_of" in trial.user_attrs for trial in trials.study.trials) > 3
    assert len(found) == spec.trials
    for line in log.read_text().splitlines():
        number, slot, values = json.loads(line)
        assert found[slot][1] == score(values)
        assert opened(spec, tmp_path).study.trials[number].state is TrialState.COMPLETE


def holder(spec: Study, folder: Path, taken: Path) -> None:
    trial = opened(spec, folder).take()
    trial.report(0.5, trial.number + 1)
    taken.write_text(json.dumps([trial.number, trial.values]))
    time.sleep(60)


def kill_one_that_holds_a_trial(spec: Study, folder: Path) -> tuple[int, dict]:
    taken = folder / "taken"
    taken.unlink(missing_ok=True)
    process = fork.Process(target=holder, args=(spec, folder, taken))
    process.start()
    while not taken.exists() or not taken.read_text():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return json.loads(taken.read_text())


def test_a_trial_that_is_worked_at_is_left_alone(tmp_path):
    spec = study(tmp_path)
    trials = opened(spec, tmp_path)
    first = trials.take()
    second = opened(spec, tmp_path).take()
    assert (first.number, second.number) == (0, 1)
    assert [trial.state for trial in trials.study.trials] == [TrialState.RUNNING] * 2


def test_a_lost_trial_is_retried_with_its_parameters_as_often_as_allowed(tmp_path):
    spec = study(tmp_path, retries=2)
    lost = [kill_one_that_holds_a_trial(spec, tmp_path) for _ in range(3)]
    assert [number for number, _ in lost] == [0, 1, 2]
    assert lost[0][1] == lost[1][1] == lost[2][1] == spec.start
    trials = opened(spec, tmp_path)
    next_one = trials.take()
    assert (next_one.slot, next_one.retry_of) == (1, None)
    told = trials.study.trials
    assert [trial.state for trial in told[:3]] == [TrialState.FAIL] * 3
    assert [trial.user_attrs["reason"] for trial in told[:3]] == [
        "its process was gone; tried again as trial 1",
        "its process was gone; tried again as trial 2",
        "its process was gone, 3 times in a row",
    ]
    assert [trial.user_attrs.get("retry_of") for trial in told[:3]] == [None, 0, 0]
    # the pruner knows what training will not validate again
    assert [set(trial.intermediate_values) for trial in told[:4]] == [{1}, {1, 2}, {1, 2, 3}, set()]


def taker(spec: Study, folder: Path, gate: Path, log: Path) -> None:
    trials = opened(spec, folder)
    while not gate.exists():
        pass
    trial = trials.take()
    with log.open("a") as file:
        file.write(f"{trial.retry_of}\n")
    while len(log.read_text().splitlines()) < 4:  # the trial of one who leaves is lost, and found again
        time.sleep(0.01)


def test_two_that_find_the_same_lost_trial_retry_it_once(tmp_path):
    spec, gate, log = study(tmp_path), tmp_path / "gate", tmp_path / "log"
    number, _ = kill_one_that_holds_a_trial(spec, tmp_path)
    finders = [fork.Process(target=taker, args=(spec, tmp_path, gate, log)) for _ in range(4)]
    for process in finders:
        process.start()
    gate.touch()
    for process in finders:
        process.join()
    assert Counter(log.read_text().split()) == {str(number): 1, "None": 3}


def test_an_interrupted_trial_goes_on_and_does_not_count_as_lost(tmp_path):
    spec = study(tmp_path, retries=0)
    trials = opened(spec, tmp_path)
    values = []
    for _ in range(3):
        trial = trials.take()
        values.append(trial.values)
        trials.give_back(trial)
    assert trials.take().values == values[0] == values[1] == values[2]
    assert trials.study.trials[0].user_attrs["reason"] == "interrupted; tried again as trial 1"


def test_what_had_been_scored_before_the_kill_is_not_done_again(tmp_path):
    spec = study(tmp_path)
    number, _ = kill_one_that_holds_a_trial(spec, tmp_path)
    run = tmp_path / spec.name / f"trial-{number:04}-s42" / "run.json"
    run.parent.mkdir()
    score = {"value": 0.5, "official": False, "signature": "bertscore|STAND-IN"}
    record = {"name": spec.name, "status": "FINISHED", "edition": 2023, "command": "x", "config": {}}
    record |= {"scores": {"valid": {"after": {"bertscore": score}}}, "trial": {"state": "RUNNING"}}
    run.write_text(json.dumps(record))
    trials = opened(spec, tmp_path)
    assert trials.take().slot == 1
    assert (trials.study.trials[0].state, trials.study.trials[0].value) == (TrialState.COMPLETE, 0.5)
    assert json.loads(run.read_text())["trial"]["state"] == "COMPLETE"


@pytest.mark.ci
def test_random_trials_are_the_same_in_any_storage_and_another_seed_gives_others(tmp_path):
    drawn = {}
    for name in ("journal", "sqlite", "another"):
        folder = tmp_path / name
        folder.mkdir()
        sampler = {"name": "random", "seed": 4 if name == "another" else 3}
        trials = opened(study(folder, sampler=sampler), folder, name if name != "another" else "journal")
        taken = [trials.take() for _ in range(5)]
        drawn[name] = [trial.values for trial in taken]
    assert drawn["journal"] == drawn["sqlite"]
    assert drawn["journal"][0] == drawn["another"][0]
    assert all(one != other for one, other in zip(drawn["journal"][1:], drawn["another"][1:], strict=True))


def test_optuna_reads_the_storage_by_the_address_that_is_printed(tmp_path):
    spec = study(tmp_path)
    for chosen in ("sqlite", "journal"):
        trials = opened(spec, tmp_path / chosen, chosen)
        trials.finish(trials.take(), "COMPLETE", {"bertscore": 0.5})
        where = address(tmp_path / chosen / spec.name, chosen)
        if chosen == "journal":
            backend = optuna.storages.journal.JournalFileBackend(where)
            where = optuna.storages.JournalStorage(backend)
        assert optuna.load_study(study_name=spec.name, storage=where).best_value == 0.5


def test_a_line_that_was_cut_off_does_not_spoil_the_journal(tmp_path):
    spec = study(tmp_path)
    trials = opened(spec, tmp_path)
    trials.finish(trials.take(), "COMPLETE", {"bertscore": 0.5})
    with (tmp_path / spec.name / "study.journal").open("a") as file:
        file.write('{"op_code": 5, "wor')
    again = opened(spec, tmp_path)
    again.finish(again.take(), "COMPLETE", {"bertscore": 0.6})
    assert [trial.value for trial in opened(spec, tmp_path).study.trials] == [0.5, 0.6]


def refused(spec: Study, folder: Path, workers: int) -> str:
    with pytest.raises(UserError) as caught:
        choose(spec, folder / spec.name, workers)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.ci
def test_the_storage_is_that_which_suits_the_workers_and_stays(tmp_path):
    spec = study(tmp_path)
    assert choose(spec, tmp_path / spec.name, 1) == "sqlite"
    assert choose(spec, tmp_path / spec.name, 2) == "journal"
    assert "SQLite has one writer" in refused(study(tmp_path, storage="sqlite"), tmp_path, 2)
    opened(spec, tmp_path, "sqlite")
    assert "uses SQLite: continue with one worker" in refused(spec, tmp_path, 2)
    other = study(tmp_path, storage="postgresql://me:secret@server/optuna")
    text = refused(other, tmp_path, 1)
    assert "got postgresql://server/optuna" in text
    assert "started with sqlite" in text


def test_a_second_process_at_an_sqlite_study_is_refused(tmp_path):
    with owned(tmp_path, "sqlite"):
        with pytest.raises(UserError, match="another process works on the study"), owned(tmp_path, "sqlite"):
            pass
        with owned(tmp_path, "journal"), owned(tmp_path, "journal"):
            pass


def test_another_question_under_the_same_name_is_refused(tmp_path):
    spec = study(tmp_path)
    opened(spec, tmp_path)
    opened(study(tmp_path, trials=3), tmp_path)
    (tmp_path / "small.yaml").write_text(BASE + "train: {dropout: 0.3}\n")
    (tmp_path / "find.yaml").write_text(STUDY.replace("high: 4", "high: 5"))
    with pytest.raises(UserError) as caught:
        opened(load(tmp_path / "find.yaml"), tmp_path)
    assert "another space of predict.num_beams, train.dropout;" in str(caught.value)


def test_runs_in_another_folder_are_refused(tmp_path):
    spec = study(tmp_path)
    opened(spec, tmp_path)
    (tmp_path / spec.name / "study.json").unlink()
    with pytest.raises(UserError, match="has its runs in another folder"):
        opened(spec, tmp_path)


def test_workers_share_the_devices_that_are_visible(monkeypatch):
    two, four = Device("cuda", 2, "", {}), Device("npu", 4, "", {})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)
    told = [workers.environment(number, two, 1) for number in range(3)]
    assert [one["CUDA_VISIBLE_DEVICES"] for one in told] == ["4", "6", "4"]
    told = [workers.environment(number, four, 2) for number in range(2)]
    assert [one["ASCEND_RT_VISIBLE_DEVICES"] for one in told] == ["0,1", "2,3"]
    assert workers.environment(1, Device("cpu", 1, "", {}), 2) == {workers.WORKER: "1"}


def written(folder: Path, text: str) -> Config:
    """What the best of a study that was scored once is as an experiment: the one run that it holds."""
    (folder / "small.yaml").write_text(BASE)
    (folder / "find.yaml").write_text(text)
    spec = load(folder / "find.yaml")
    trials = opened(spec, folder)
    trials.finish(trials.take(), "COMPLETE", {"bertscore": 0.5})
    trials.finish(trials.take(), "COMPLETE", {"bertscore": 0.6})
    best = winner(trials.study, spec, None)
    (folder / "best.yaml").write_text(as_experiment(best, spec, folder / "best.yaml", "a test"))
    (run,) = load_experiment(folder / "best.yaml")
    tried = spec.trial(best.number, {p.key: p.decode(best.params[p.key]) for p in spec.space})
    assert (run.seed, run.train, run.predict.num_beams) == (tried.seed, tried.train, tried.predict.num_beams)
    return run


def test_the_best_keeps_its_seed_and_what_chose_its_weights(tmp_path):
    seeds = "base: small.yaml\nsampler: {name: grid}\nspace: {seed: {choices: [42, 1]}}\n"
    assert written(tmp_path, seeds + "name: a\n").seed == 1
    space = "base: small.yaml\nsampler: {name: grid}\nspace: {predict.num_beams: {choices: [2, 3]}}\n"
    overrides = (
        "overrides: {seed: 7, score: {metrics: [bertscore], precision: bf16, bertscore: {layer: 3}}}\n"
    )
    run = written(tmp_path, space + overrides + "name: b\n")
    assert (run.seed, run.score.precision, run.score.bertscore.layer) == (7, "bf16", 3)
    assert run.score.metrics == ("bertscore", "rouge1")


def ending(trials: Trials, error: BaseException) -> TrialState:
    """How a trial ends in whose run `error` comes up."""

    class Failing(_Worker):
        def _scores(self, trial):
            raise error

    one = Failing(trials.spec, trials, Terminal(silent=True), "a test", {})
    taken = trials.take()
    if isinstance(error, ValueError | RuntimeError):
        assert one._attempt(taken) == f"{type(error).__name__}: {error}"
    else:
        with pytest.raises(type(error)):
            one._attempt(taken)
    return trials.study.trials[taken.number]


def test_a_value_error_fails_a_trial_and_an_unknown_error_is_tried_again_within_limits(tmp_path):
    trials = opened(study(tmp_path, retries=1), tmp_path)
    ended = ending(trials, ValueError("no such shape"))
    assert (ended.state, ended.user_attrs["reason"]) == (TrialState.FAIL, "ValueError: no such shape")
    for _ in range(3):
        assert ending(trials, KeyboardInterrupt()).user_attrs["reason"].startswith("interrupted; tried again")
    assert "KeyError: 'x'; tried again" in ending(trials, KeyError("x")).user_attrs["reason"]
    assert ending(trials, KeyError("x")).user_attrs["reason"] == "KeyError: 'x', 2 times in a row"
    assert trials.take().slot == 2


def test_first_trials_that_fail_alike_are_known_to_every_process(tmp_path):
    spec = study(tmp_path)
    for _ in range(ALIKE):
        trials = opened(spec, tmp_path)  # as ranks that start anew
        assert trials.failed_alike() is None
        trials.finish(trials.take(), "FAIL", reason="short of memory")
    assert opened(spec, tmp_path).failed_alike() == "short of memory"
    trials.finish(trials.take(), "FAIL", reason="another")  # what was wrong first is repaired
    assert opened(spec, tmp_path).failed_alike() is None


def test_other_data_under_the_same_name_is_refused(tmp_path):
    spec = study(tmp_path)
    folder, data = tmp_path / spec.name, {"train": "a", "valid": "b", "test": "c"}
    open_study(spec, folder, "journal", data)
    open_study(spec, folder, "journal", data | {"test": "d"})
    open_study(spec, folder, "journal")
    with pytest.raises(UserError, match=r"started with another valid split;[\s\S]*another name"):
        open_study(spec, folder, "journal", data | {"valid": "d"})


@pytest.mark.parametrize("place", ["run.json", "base-s42/run.json"])
def test_a_folder_with_runs_of_an_experiment_is_refused(tmp_path, place):
    spec = study(tmp_path)
    file = tmp_path / spec.name / place
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    with pytest.raises(UserError, match="has runs that do not belong to a study"):
        opened(spec, tmp_path)
