"""A team on one server: PostgreSQL and `mlflow server` started as in the README, workers, and failures.

The cluster is in a temporary folder; the tests are skipped if Debian's postgresql is not installed. They are
marked slow, and `.ci/run` runs them.
"""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import optuna
import psutil
import pytest
from optuna.trial import TrialState
from support.commands import harness
from support.experiments import EXPERIMENT
from support.studies import opened
from support.studies import study as small_study
from support.team_servers import (
    PASSWORD,
    MlflowServer,
    Postgresql,
    bound,
    end,
    free_port,
    postgresql,
    programs,
    wait,
)

from harness.errors import UserError
from harness.study import storage
from harness.study.spec import load

pytestmark = pytest.mark.ci
pytest.importorskip("psycopg", reason="needs psycopg: pip install -e '.[team]'")
if programs() is None:
    pytest.skip("needs PostgreSQL: apt install postgresql", allow_module_level=True)

STUDY = """
base: small.yaml
variant: opt
name: team
overrides: {score: {metrics: [bertscore, rouge1]}}
space:
  predict.num_beams: {low: 1, high: 3}
  predict.repetition_penalty: {low: 1, high: 2}
  predict.max_new_tokens: {low: 4, high: 24}
sampler: {name: random, seed: 1}
trials: 12
"""
fork = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Postgresql]:
    with postgresql() as running:
        yield running


@pytest.fixture
def passwords(cluster, monkeypatch) -> None:
    """The password for this process, where a user has ~/.pgpass."""
    monkeypatch.setenv("PGPASSFILE", str(cluster.pgpass))


@pytest.fixture(scope="module")
def server(cluster, tmp_path_factory) -> Iterator[MlflowServer]:
    result = MlflowServer(cluster, tmp_path_factory.mktemp("mlflow"))
    result.start()
    try:
        yield result
    finally:
        result.kill()


@pytest.fixture(scope="module")
def folder(cluster, tmp_path_factory) -> Path:
    """A project that two workers share: one has the password in ~/.pgpass, the other in the study's file."""
    result = tmp_path_factory.mktemp("project")
    address = cluster.address("optuna")
    (result / "small.yaml").write_text(EXPERIMENT)
    (result / "team.yaml").write_text(f"{STUDY}storage: {address}\n")
    (result / "mate.yaml").write_text(f"{STUDY}storage: {address.replace('@', f':{PASSWORD}@')}\n")
    return result


class Worker:
    """`harness study FILE` in a process of its own, as in a terminal of its own."""

    def __init__(self, folder: Path, file: str, environment: dict[str, str]) -> None:
        command = bound([sys.executable, "-m", "harness", "study", file], "KILL")
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
        self.said = folder.parent / f"{folder.name}-{file}.log"
        with self.said.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def freeze_in_a_trial(self, folder: Path) -> int:
        """Stop it while it works at a trial -> the trial's number."""

        def frozen() -> bool:
            assert self.process.poll() is None, self.said.read_text()
            if not self.works_at(folder):
                return False
            self.signal(signal.SIGSTOP)
            wait(lambda: psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED, 10)
            if self.works_at(folder):
                return True
            self.signal(signal.SIGCONT)
            return False

        wait(frozen)
        return self.works_at(folder)[0]

    def works_at(self, folder: Path) -> list[int]:
        return [
            record["trial"]["number"]
            for record in records(folder)
            if (record["pid"], record["status"]) == (self.process.pid, "RUNNING")
        ]


@pytest.fixture(scope="module")
def outcome(folder, cluster, server) -> dict:
    """The study: one of two workers is killed in a trial, and MLflow's server from then to the end."""
    secret = server.address.replace("//", f"//me:{PASSWORD}@")
    workers = [
        Worker(folder, "team.yaml", {"MLFLOW_TRACKING_URI": secret, "PGPASSFILE": str(cluster.pgpass)}),
        Worker(folder, "mate.yaml", {"MLFLOW_TRACKING_URI": server.address, "PGPASSFILE": "/dev/null"}),
    ]
    try:
        wait(lambda: len(complete(folder)) >= 3)
        lost = workers[1].freeze_in_a_trial(folder)
        workers[0].freeze_in_a_trial(folder)
        wait(lambda: mirrored(folder, server))  # by the workers' followers, which go on
        found = {"lost": lost, "before": complete(folder), "mirrored": mirrored(folder, server)}
        server.kill()
        workers[1].signal(signal.SIGKILL)
        workers[0].signal(signal.SIGCONT)
        found["code"] = workers[0].process.wait(90)
    finally:
        for worker in workers:
            end(worker.process)
    found["said"] = "".join(worker.said.read_text() for worker in workers)
    server.start()
    wait(server.answers)
    found["synced"] = [sync(folder, secret), sync(folder, secret)]
    return found


def sync(folder: Path, address: str) -> str:
    environment = os.environ | {"MLFLOW_TRACKING_URI": address}
    command = [sys.executable, "-m", "harness", "sync"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def records(folder: Path) -> list[dict]:
    files = sorted((folder / "runs" / "team").glob("trial-*/run.json"))
    return [json.loads(file.read_text()) for file in files]


def complete(folder: Path) -> dict[int, dict]:
    """Parameters and scores of the trials that have ended well, by their numbers."""
    ended = [record["trial"] for record in records(folder) if record["trial"]["state"] == "COMPLETE"]
    return {trial["number"]: trial for trial in ended}


def mirrored(folder: Path, server: MlflowServer) -> list[str]:
    """The runs that are on MLflow's server to their end, says what is kept on disk."""
    file = folder / "runs" / "team" / "mlflow.json"
    known = json.loads(file.read_text())["value"] if file.exists() else {}
    runs = known.get(server.address, {}).get("runs", {})
    return [name for name, entry in runs.items() if entry.get("status") == "FINISHED"]


def test_no_trial_is_lost_or_doubled(folder, outcome):
    assert outcome["code"] == 0, outcome["said"]
    assert 3 <= len(outcome["before"]) < 11, "the kill was not in the middle"
    found = complete(folder)
    assert outcome["before"].items() <= found.items()
    assert len(found) == 12
    (lost,) = [record for record in records(folder) if record["trial"]["number"] not in found]
    assert lost["status"] == "KILLED"
    assert (lost["trial"]["number"], lost["trial"]["state"]) == (outcome["lost"], "FAIL")
    (again,) = [trial for trial in found.values() if trial["retry_of"] is not None]
    assert (again["retry_of"], again["params"]) == (outcome["lost"], lost["trial"]["params"])
    assert lost["trial"]["reason"] == f"its process was gone; tried again as trial {again['number']}"
    assert len({json.dumps(trial["params"]) for trial in found.values()}) == 12
    assert len({trial["values"]["bertscore"] for trial in found.values()}) > 6
    ended = [record for record in records(folder) if record["trial"]["number"] in found]
    assert len({record["steps"]["train"] for record in ended}) == 1
    assert sum("train" in record["seconds"] for record in ended) <= 2


def test_optuna_agrees_with_the_run_directories(folder, cluster, outcome, passwords):
    address = storage.address(folder, cluster.address("optuna"))
    assert address in outcome["said"]
    trials = {trial.number: trial for trial in optuna.load_study(study_name="team", storage=address).trials}
    on_disk = {record["trial"]["number"]: record for record in records(folder)}
    assert set(trials) == set(on_disk) == set(range(13))
    for number, trial in trials.items():
        told = on_disk[number]["trial"]
        assert (trial.state.name, trial.params) == (told["state"], told["params"])
        if trial.state is TrialState.COMPLETE:
            assert "train" in on_disk[number]["steps"]
            score = on_disk[number]["scores"]["valid"]["after"]["bertscore"]["value"]
            assert {"bertscore": trial.value} == told["values"] == {"bertscore": score}


def test_sync_brings_over_what_the_stopped_server_missed(folder, server, outcome):
    assert outcome["mirrored"]
    assert len(outcome["mirrored"]) < 12, "the server had missed nothing"
    assert f"MLflow at {server.address} was not reached" in outcome["said"]
    assert all(told.count("mirrored to") == 13 for told in outcome["synced"])
    client, runs = mlflow_runs(server)
    parent = runs.pop("team")
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["study/storage"] == records_of_study(folder)["storage"]
    best = max(trial["values"]["bertscore"] for trial in complete(folder).values())
    assert parent.data.metrics["best/bertscore"] == pytest.approx(best, abs=1e-12)
    plots = {Path(file.path).name for file in client.list_artifacts(parent.info.run_id, "plots")}
    assert plots == {"history.png"}
    assert set(runs) == {f"{record['variant']}-s42" for record in records(folder)}
    for record in records(folder):
        run, trial = runs[f"{record['variant']}-s42"], record["trial"]
        tags = run.data.tags
        assert tags["mlflow.parentRunId"] == parent.info.run_id
        assert (tags["trial/number"], tags["trial/state"]) == (str(trial["number"]), trial["state"])
        assert json.loads(tags["trial/params"]) == trial["params"]
        assert run.data.params == {key: text(value) for key, value in record["parameters"].items()}
        assert run.info.status == record["status"]
        _has_its_points(client, run, record, folder)
        _has_its_files(client, run, folder / "runs" / "team" / run.info.run_name)


def text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def records_of_study(folder: Path) -> dict:
    return json.loads((folder / "runs" / "team" / "study.json").read_text())


def mlflow_runs(server: MlflowServer) -> tuple:
    """A client, and every run of the study by its name, of which there is one each."""
    from mlflow import MlflowClient

    client = MlflowClient(server.address)
    experiment = client.get_experiment_by_name("team")
    found = client.search_runs([experiment.experiment_id])
    assert len({run.info.run_name for run in found}) == len(found)
    return client, {run.info.run_name: run for run in found}


def _has_its_points(client, run, record: dict, folder: Path) -> None:
    losses = []
    if "train" in record["steps"]:  # else it was killed before
        lines = (folder / "runs" / record["steps"]["train"] / "losses.jsonl").read_text().splitlines()
        losses = [(row["step"], row["loss"]) for row in map(json.loads, lines) if "loss" in row]
        assert losses
    assert history(client, run, "train/loss") == losses
    values = record["trial"]["values"]
    expected = [(0, values["bertscore"])] if values else []
    assert history(client, run, "valid/bertscore") == expected


def history(client, run, key: str) -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, key))


def _has_its_files(client, run, directory: Path) -> None:
    for name in ("config.yaml", "run.json"):
        local = Path(client.download_artifacts(run.info.run_id, name))
        assert local.read_bytes() == (directory / name).read_bytes(), run.info.run_name


def test_no_record_holds_a_password(folder, cluster, server, outcome):
    assert PASSWORD not in outcome["said"] + "".join(outcome["synced"])
    given = {folder / "mate.yaml"}
    for file in [*folder.rglob("*"), *server.folder.rglob("*")]:
        if file.is_file() and file not in given:
            assert PASSWORD.encode() not in file.read_bytes(), file
    assert (folder / "mate.yaml").read_text().count(PASSWORD) == 1
    for database in ("mlflow", "optuna"):
        dump = cluster.dump(database)
        assert "predict.num_beams" in dump
        assert PASSWORD not in dump


def table_maker(folder: Path, address: str, gate) -> None:
    spec = load(folder / "find.yaml", options={"storage": address})
    gate.wait()
    storage.open_study(spec, folder / spec.name, address)
    os._exit(0)


def test_workers_that_begin_at_once_on_an_empty_database_all_do(tmp_path, cluster, passwords):
    cluster.sql("CREATE DATABASE empty OWNER harness")
    small_study(tmp_path)
    gate = fork.Barrier(3)
    workers = [
        fork.Process(target=table_maker, args=(tmp_path, cluster.address("empty"), gate)) for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]


def test_a_database_that_stops_in_a_trial_is_said_and_the_trial_is_done_once(tmp_path, cluster, passwords):
    cluster.sql("CREATE DATABASE stopped OWNER harness")
    address = cluster.address("stopped")
    spec = small_study(tmp_path)
    trials = opened(spec, tmp_path, address)
    trials.finish(trials.take(), "COMPLETE", {"bertscore": 0.4})
    trial = trials.take()
    cluster.stop()
    try:
        with pytest.raises(UserError) as caught, storage.reachable(address):
            trials.finish(trial, "COMPLETE", {"bertscore": 0.5})
    finally:
        cluster.start()
    assert caught.value.exit_code == 1
    assert "the same command continues" in str(caught.value)
    trial.lock.release()  # as the end of the process does
    again = opened(spec, tmp_path, address)
    taken = again.take()
    assert (taken.slot, taken.retry_of, taken.values) == (trial.slot, trial.number, trial.values)
    again.finish(taken, "COMPLETE", {"bertscore": 0.5})
    assert again.take().slot == 2
    done = again.study.get_trials(states=(TrialState.COMPLETE,))
    assert [trial.value for trial in done] == [0.4, 0.5]


def refusal(folder: Path, address: str) -> str:
    with pytest.raises(UserError) as caught:
        storage.connect(folder, address)
    assert caught.value.exit_code == 1
    (problem,) = caught.value.problems
    assert "\n" not in str(problem)
    assert PASSWORD not in str(caught.value)
    return str(caught.value)


def test_a_database_that_can_not_be_used_is_said_in_a_line(tmp_path, cluster, monkeypatch):
    monkeypatch.setenv("PGPASSFILE", "/dev/null")
    right = cluster.address("optuna").replace("@", f":{PASSWORD}@")
    assert "~/.pgpass" in refusal(tmp_path, cluster.address("optuna"))
    text = refusal(tmp_path, cluster.address("optuna").replace("@", f":{PASSWORD}x@"))
    assert 'password authentication failed for user "harness"' in text
    assert 'database "other" does not exist' in refusal(tmp_path, right.replace("/optuna", "/other"))
    text = refusal(tmp_path, right.replace(f":{cluster.port}", f":{free_port()}"))
    assert "Connection refused" in text
    assert "the same command continues" in text
    assert "no-such-host.invalid" in refusal(tmp_path, right.replace("127.0.0.1", "no-such-host.invalid"))


def test_a_database_that_never_answers_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_PATIENCE", 2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"postgresql://me:{PASSWORD}@127.0.0.1:{silent.getsockname()[1]}/optuna"
        assert "timeout" in refusal(tmp_path, address)


def test_the_command_says_it_too(folder, cluster, outcome):
    address = cluster.address("optuna").replace("@", f":not-{PASSWORD}@")
    (folder / "wrong.yaml").write_text(STUDY.replace("name: team", "name: wrong") + f"storage: {address}\n")
    done = harness(folder, "study", "wrong.yaml", code=None)
    assert done.returncode == 1
    assert "password authentication failed" in done.stderr
    assert "Traceback" not in done.stderr
    assert PASSWORD not in done.stderr + done.stdout
