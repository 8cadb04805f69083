"""The reason why a run ended: in its record, on its page, in MLflow, on the leaderboard, in comparisons."""

import json
import os
import re
import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from support.commands import harness
from support.experiments import EXPERIMENT, begin
from support.mirrors import NAME, record
from support.reports import data_of

from harness import leaderboard, run, tracking
from harness.errors import Problem, Pruned, UserError
from harness.records import status as statuses
from harness.report import sources
from harness.tracking import bookkeeping

ONE = EXPERIMENT.partition("variants:")[0]
DIVERGES = [
    *("--set", "train.learning_rate=1e18", "--set", "train.max_grad_norm=0", "--set", "train.warmup_steps=1"),
    *("--set", "train.stages.0.epochs=1", "--set", "train.stages.1.epochs=0", "--set", "train.batch_size=24"),
]
WHY = "valid_loss became nan in the validation after step 2 (stage 1, epoch 1)"


@pytest.fixture(scope="module")
def folder(small_run, tmp_path_factory) -> Path:
    result = begin(small_run, tmp_path_factory.mktemp("project"), ONE)
    return result


@pytest.fixture(scope="module")
def diverged(folder) -> subprocess.CompletedProcess:
    return harness(folder, "run", "small.yaml", *DIVERGES, code=None)


def test_a_diverged_run_fails_with_its_reason_and_leaves_nothing_that_looks_done(folder, diverged):
    assert diverged.returncode == 1
    assert f"error: {WHY}" in diverged.stderr
    assert "Lower train.learning_rate" in diverged.stderr
    assert "Traceback" not in diverged.stderr
    made = json.loads((folder / "runs/small/base-s42/run.json").read_text())
    assert (made["status"], made["at"]) == ("FAILED", "train")
    assert made["failure"] == {
        "step": "train",
        "error": "UserError",
        "reason": WHY,
        "hint": made["failure"]["hint"],
        "exit_code": 1,
    }
    assert "train.max_grad_norm" in made["failure"]["hint"]
    assert not (folder / "submissions").exists()
    assert not list((folder / "runs/steps").glob("train-*/DONE"))
    for file in (folder / "runs").rglob("*.json*"):
        assert not re.search(r"\b(NaN|Infinity)\b", file.read_text()), file


def test_its_page_says_why(folder, diverged):
    facts = data_of(folder / "runs/small/base-s42/report.html")["facts"]
    assert (facts["status"], facts["failed in"], facts["why"]) == ("FAILED", "train", WHY)
    assert "train.learning_rate" in facts["what helps"]
    assert harness(folder, "report", "runs/small/base-s42").returncode == 0


def test_mlflow_the_leaderboard_and_compare_say_why(folder, diverged):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (mirrored,) = client.search_runs(
        [client.get_experiment_by_name("small").experiment_id], "attributes.run_name = 'base-s42'"
    )
    assert mirrored.info.status == "FAILED"
    assert mirrored.data.tags["failure/reason"] == WHY
    assert mirrored.data.tags["failure/step"] == "train"
    assert mirrored.data.tags["failure/exit_code"] == "1"
    board = json.loads(harness(folder, "leaderboard", "--all", "--format", "json").stdout)
    (entry,) = board[0]["runs"]
    assert entry["failure"]["reason"] == WHY
    assert entry["apart"].startswith(f"the run is FAILED in train: {WHY}; ")
    told = harness(folder, "compare", "runs/small/base-s42", "small.yaml", code=None)
    assert told.returncode == 2
    assert "Traceback" not in told.stderr


@pytest.mark.slow
def test_the_same_command_says_the_same_again(folder, diverged):
    again = harness(folder, "run", "small.yaml", *DIVERGES, code=None)
    assert again.returncode == 1
    assert f"error: {WHY}" in again.stderr


def ended_by(tmp_path: Path, error: BaseException) -> dict:
    """The record of a run that an error ended in its step `train`."""
    made = {"name": "small", "config": {}, "artifacts": {}, "at": "train", "status": "RUNNING"}
    made |= {"failure": None}
    with pytest.raises(type(error)), run._status(made, tmp_path / "base-s42"):
        raise error
    assert json.loads((tmp_path / "base-s42" / "run.json").read_text()) == made
    return made


SECRET = "postgresql://me:hunter2@db/mlflow"


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (UserError([Problem("a", "f", 3, "k"), Problem("b")], exit_code=1), "FAILED", "f:3: k: a; b"),
        (KeyboardInterrupt(), "KILLED", "interrupted by Ctrl-C or a signal; the same command continues"),
        (Pruned("worse than the median"), "PRUNED", "worse than the median"),
        (ZeroDivisionError("division by zero"), "FAILED", "ZeroDivisionError: division by zero"),
        (RuntimeError(), "FAILED", "RuntimeError"),
        (OSError(28, "No space left", "x"), "FAILED", "OSError: [Errno 28] No space left: 'x'"),
        (RuntimeError(f"no {SECRET}\nmore"), "FAILED", "RuntimeError: no postgresql://db/mlflow"),
        (UserError([Problem(f"no {SECRET}", hint=SECRET)]), "FAILED", "no postgresql://db/mlflow"),
    ],
)  # fmt: skip
def test_each_end_has_its_status_and_reason(tmp_path, error, status, reason):
    made = ended_by(tmp_path, error)
    assert made["status"] == status
    assert made["failure"]["reason"] == reason
    assert (made["failure"]["step"], made["failure"]["error"]) == ("train", type(error).__name__)
    codes = {"KILLED": 130, "PRUNED": None, "FAILED": getattr(error, "exit_code", 1)}
    assert made["failure"]["exit_code"] == codes[status]
    assert "hunter2" not in "".join(file.read_text() for file in tmp_path.rglob("*.*"))


def test_a_mistake_of_the_program_leaves_its_traceback_until_the_next_attempt(tmp_path):
    made = ended_by(tmp_path, ZeroDivisionError("division by zero"))
    text = (tmp_path / "base-s42" / "traceback.txt").read_text()
    assert text.startswith("Traceback")
    assert "test_failures.py" in text
    assert made["artifacts"]["traceback.txt"] == "small/base-s42/traceback.txt"
    ended_by(tmp_path, KeyboardInterrupt())
    assert not (tmp_path / "base-s42" / "traceback.txt").exists()


@pytest.fixture
def store(tmp_path, monkeypatch, empty_store) -> Path:
    (tmp_path / "mlflow.db").write_bytes(empty_store)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    return tmp_path / "mlflow.db"


def test_mlflow_forgets_a_reason_once_the_run_has_finished(tmp_path, store):
    failure = {"step": "train", "error": "UserError", "reason": "it diverged", "hint": None}
    where = record(tmp_path / "runs", "a", "FAILED", failure=failure)
    tracking.mirror(where)
    assert _tags(where, store)["failure/reason"] == "it diverged"
    assert "failure/hint" not in _tags(where, store)
    record(tmp_path / "runs", "a", "RUNNING", failure=None, pid=os.getpid(), started=_now(), host=None)
    tracking.mirror(where)
    assert not [key for key in _tags(where, store) if key.startswith("failure/")]
    record(
        tmp_path / "runs", "a", "RUNNING", failure=None, pid=_dead(), host=socket.gethostname(), at="train"
    )
    tracking.mirror(where)
    assert _tags(where, store)["failure/reason"].startswith("its process is gone")
    record(tmp_path / "runs", "a", failure=None)
    tracking.mirror(where)
    assert not [key for key in _tags(where, store) if key.startswith("failure/")]


def _tags(where: Path, store: Path) -> dict[str, str]:
    from mlflow import MlflowClient

    entry = bookkeeping.State.load(where.parent).runs[where.name]
    return MlflowClient(f"sqlite:///{store}").get_run(entry["run_id"]).data.tags


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_run_whose_process_is_gone_or_whose_number_another_has_is_killed():
    running = {"status": "RUNNING", "host": socket.gethostname(), "command": "c", "at": "predict-valid"}
    assert statuses.status_of(running | {"pid": os.getpid(), "started": _now()}, None) == "RUNNING"
    assert statuses.failure_of(running | {"pid": os.getpid(), "started": _now()}) is None
    gone = running | {"pid": _dead(), "started": _now()}
    assert statuses.status_of(gone, None) == "KILLED"
    assert statuses.failure_of(gone)["step"] == "predict-valid"
    earlier = (datetime.now(UTC) - timedelta(days=3)).isoformat()
    other = running | {"pid": os.getpid(), "started": earlier}  # before this process was there
    assert statuses.status_of(other, None) == "KILLED"
    assert "its process is gone" in statuses.failure_of(other)["reason"]
    elsewhere = gone | {"host": "another"}
    assert (statuses.status_of(elsewhere, None), statuses.failure_of(elsewhere)) == ("RUNNING", None)


def test_old_records_with_numbers_that_are_not_finite_are_shown(tmp_path, store):
    where = record(tmp_path / "runs", "a", baseline={"caption": "a", "rouge1": 0.5})
    text = (where / "run.json").read_text()
    (where / "run.json").write_text(text.replace("0.25", "NaN").replace("0.17", "Infinity"))
    shape = {"model.language_model": True, "model.image_size": 364, "postprocess.deduplicate": False}
    changed = {
        "config": {"data": {"phantom": None}},
        "image_gap": {"rouge1": {"gap": float("inf")}},
        "parameters": shape,
        "made": {},
        "seconds": {},
    }
    old = json.loads((where / "run.json").read_text()) | changed
    (where / "run.json").write_text(json.dumps(old))
    tracking.mirror(where)
    board = leaderboard.board(2023, tmp_path / "runs")
    assert board.entries[0].value("rouge1") is None
    json.dumps(leaderboard.as_dict(board), allow_nan=False)
    assert sources.of(where).record["scores"]["valid"]["after"]["rouge1"]["value"] is None
    assert where.parent.name == Path(NAME).name
