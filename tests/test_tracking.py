"""The MLflow mirror on a real SQLite store, read back by MLflow's client; servers that are down or hang."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from support.commands import mirror_by_server
from support.mirrors import NAME, ROWS, VALID, client, history, losses, mlflow_runs, record, root, score

from harness import tracking
from harness.errors import UserError
from harness.output.masking import masked
from harness.records import read
from harness.records.status import alive
from harness.store import write, write_json
from harness.tracking import bookkeeping, contents, server

__all__ = ["root"]  # a fixture


def test_everything_on_disk_is_in_mlflow(root):
    tracking.mirror(record(root, "base"))
    write(root.parent / "submissions" / "x" / "caption-test" / "manifest.json", "{}")
    tracking.mirror(
        record(root, "dedup", submissions=["submissions/x/caption-test/caption_prediction_test.csv"])
    )
    runs = mlflow_runs()
    assert set(runs) == {NAME, "base-s1", "dedup-s1"}
    parent = runs[NAME]
    assert parent.info.status == "FINISHED"
    for name in ("base-s1", "dedup-s1"):
        run = runs[name]
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        # Both share the training step, and both show all of its curve.
        assert history(run, "train/loss") == [(row["step"], row["loss"]) for row in ROWS]
        assert history(run, "train/valid_loss") == [(20, 3.5)]
        assert history(run, "train/epoch") == []
    run = runs["dedup-s1"]
    assert client().get_metric_history(run.info.run_id, "train/loss")[0].timestamp == int(
        ROWS[0]["time"] * 1000
    )
    moment = datetime(2026, 1, 2, 4, 4, 5, tzinfo=UTC).timestamp() * 1000
    assert (run.info.status, run.info.end_time, run.info.start_time) == (
        "FINISHED",
        moment,
        moment - 3_600_000,
    )
    expected = {
        "valid/rouge1": 0.25,
        "valid/before/rouge1": 0.2,
        "image_gap/rouge1": 0.1,
    }
    assert {key: run.data.metrics[key] for key in expected} == pytest.approx(expected)
    assert not any("bleurt" in key for key in run.data.metrics), "an absent score is not a number"
    assert not any(key.endswith((".low", ".high")) or key.startswith("baseline/") for key in run.data.metrics)
    tags = run.data.tags
    assert tags["interval/valid/rouge1"].startswith("[0.2400, ")
    assert tags["interval/image_gap/rouge1"].startswith("[0.0500, ")
    assert tags["baseline/rouge1"] == "0.1700"
    described = parent.data.tags["mlflow.note.content"].splitlines()
    assert described[0].startswith("| run | ")
    assert [line.split(" | ")[0] for line in described[2:4]] == ["| base-s1", "| dedup-s1"]
    assert "0.2500" in described[2]
    assert tags["standin"] == "bertscore"
    assert tags["signature/rouge1"] == "rouge1|clef2023|rouge-score:0.1.2"
    assert tags["absent/bleurt"] == "no weights"
    assert (tags["git.commit"], tags["git.dirty"], tags["environment/torch"]) == ("abc123", "true", "2.13.0")
    parameters = run.data.params
    assert parameters["train.epochs"] == "2"
    assert len(parameters["data.prompt"]) == 6000
    assert parameters["data.prompt"].endswith("config.yaml)")
    inputs = {(item.dataset.name, item.dataset.digest) for item in run.inputs.dataset_inputs}
    assert inputs == {("phantom/train", "1" * 12), ("phantom/valid", "2" * 12)}
    found = {
        item.path
        for folder in ("", "scores", "submissions/caption-test")
        for item in client().list_artifacts(run.info.run_id, folder)
        if not item.is_dir
    }
    per_image = "scores/valid_after_per_image.csv"
    assert found == {"config.yaml", "run.json", per_image, "submissions/caption-test/manifest.json"}
    local = client().download_artifacts(run.info.run_id, per_image)
    assert Path(local).read_text() == "ID,rouge1\na,0.5\n"


def test_mirroring_again_adds_nothing_and_new_rows_are_added(root):
    losses(root, ROWS[:5], end='\n{"step": 6, "ti')
    folder = record(root, "base", "RUNNING", scores={})
    tracking.mirror(folder)
    assert mlflow_runs()["base-s1"].info.status == "RUNNING"
    assert len(history(mlflow_runs()["base-s1"], "train/loss")) == 5
    # After a crash, training forgets the rows after its last checkpoint and writes them again, later.
    again = [{**row, "time": row["time"] + 1000} for row in ROWS]
    losses(root, [*ROWS[:3], *again[3:], VALID])
    for _ in range(2):
        tracking.mirror(record(root, "base"))
    # Even where what was mirrored is forgotten, a store keeps each point once.
    state = json.loads((root / NAME / "mlflow.json").read_text())["value"]
    for known in state.values():
        known["runs"]["base-s1"] = {"run_id": known["runs"]["base-s1"]["run_id"]}
    write_json(root / NAME / "mlflow.json", state)
    losses(root, [*ROWS[:5], *again[5:], VALID])
    tracking.mirror(folder)
    run = mlflow_runs()["base-s1"]
    assert history(run, "train/loss") == [(row["step"], row["loss"]) for row in ROWS]
    assert history(run, "valid/rouge1") == [(0, 0.25)]
    assert len(run.inputs.dataset_inputs) == 2
    assert run.info.status == "FINISHED"


def test_another_configuration_is_another_run_and_a_lost_store_is_filled_again(root, empty_store):
    first = record(root, "base")
    tracking.mirror(first)
    old = mlflow_runs()["base-s1"].info.run_id
    record(root, "base", parameters={"train.epochs": 3}, steps={"train": "steps/train-2"})
    shutil.copytree(root / "steps" / "train-1", root / "steps" / "train-2")
    tracking.mirror(first)
    experiment = client().get_experiment_by_name(NAME).experiment_id
    epochs = {run.data.params.get("train.epochs") for run in client().search_runs([experiment])}
    assert epochs == {None, "2", "3"}
    client().delete_run(mlflow_runs_newest(experiment))
    assert tracking.sync(root)[0].startswith(str(first))
    Path("mlflow.db").write_bytes(empty_store)
    tracking.mirror(first)
    assert mlflow_runs()["base-s1"].info.run_id != old
    assert len(history(mlflow_runs()["base-s1"], "train/loss")) == 20


def test_what_is_added_after_the_same_training_takes_the_place_of_the_run(root, monkeypatch):
    """MLflow can't change a parameter such as score.metrics."""
    folder = record(root, "base")
    tracking.mirror(folder)
    first = mlflow_runs()["base-s1"].info.run_id
    client().set_tag(first, server._NOTE, "mine")
    more = {"score.metrics": ["bleu1", "rouge1"]}
    record(root, "base", "RUNNING", parameters=more, steps={})
    tracking.mirror(folder)
    assert client().get_run(first).info.lifecycle_stage == "active"
    record(root, "base", parameters=more)
    with monkeypatch.context() as killed:  # after the new run was made, before the first was deleted
        killed.setattr(server.Mirror, "_drop_earlier", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tracking.mirror(folder)
    tracking.mirror(folder)
    second = mlflow_runs()["base-s1"]
    assert second.info.run_id != first
    assert client().get_run(first).info.lifecycle_stage == "deleted"
    assert second.data.tags[server._NOTE] == "mine"
    assert history(second, "train/loss") == [(row["step"], row["loss"]) for row in ROWS]
    tracking.mirror(folder)
    assert mlflow_runs()["base-s1"].info.run_id == second.info.run_id


def test_a_run_with_the_names_of_an_earlier_version_is_mirrored_anew_once(root):
    folder = record(root, "base")
    tracking.mirror(folder)
    first = mlflow_runs()["base-s1"].info.run_id
    client().set_tag(first, server._NOTE, "mine")
    assert "anew" not in tracking.sync(root)[0]
    client().delete_tag(first, server._NAMES)  # as earlier versions left it
    assert " anew, " in tracking.sync(root)[0]
    second = mlflow_runs()["base-s1"]
    assert second.info.run_id != first
    assert client().get_run(first).info.lifecycle_stage == "deleted"
    assert second.data.tags[server._NOTE] == "mine"
    assert history(second, "train/loss") == [(row["step"], row["loss"]) for row in ROWS]
    # Also where the bookkeeping is gone, which finds runs by their tokens.
    client().delete_tag(second.info.run_id, server._NAMES)
    (root / NAME / "mlflow.json").unlink()
    assert " anew, " in tracking.sync(root)[0]
    assert set(mlflow_runs()) == {NAME, "base-s1"}
    assert "anew" not in tracking.sync(root)[0]


def test_a_description_that_someone_edits_stays_and_ours_follows_the_runs(root):
    tracking.mirror(record(root, "base"))
    tracking.mirror(record(root, "more"))
    assert "| more-s1 |" in mlflow_runs()[NAME].data.tags[server._NOTE]
    (root / NAME / "mlflow.json").unlink()
    tracking.mirror(record(root, "third"))
    assert "| third-s1 |" in mlflow_runs()[NAME].data.tags[server._NOTE], "ours is known without bookkeeping"
    client().set_tag(mlflow_runs()[NAME].info.run_id, server._NOTE, "Do not stop these!")
    tracking.mirror(record(root, "fourth"))
    assert mlflow_runs()[NAME].data.tags[server._NOTE] == "Do not stop these!"


def test_a_long_table_lists_the_best_runs_whole_and_keeps_its_notes(root):
    found = [read(record(root, f"trial-{number:04}")) for number in range(99)]
    for number, one in enumerate(found):
        one["scores"]["valid"]["after"]["bertscore"] = score(number / 100, standin=True)
    text = contents.summary(found, 5000)
    lines = [line for line in text.splitlines() if line.startswith("| trial")]
    assert len(text) <= 5000
    assert [line.split()[1] for line in lines] == [f"trial-{98 - n:04}-s1" for n in range(len(lines))]
    assert text.endswith(f"Captions by a STAND-IN model: tiny. {len(lines)} of 99 runs are listed.")
    assert "0.9800\\*" in lines[0]
    assert "not comparable" in text
    absent = [{**one, "scores": {}, "image_gap": None} for one in found[:2]]
    assert contents.summary(absent, 5000).count("| trial") == 2


def test_the_printed_page_lists_runs_by_their_primary_score_with_what_differs(root):
    for variant, beams in (("base", 1), ("wide", 4)):
        tracking.mirror(record(root, variant, parameters={"predict.num_beams": beams, "variant": variant}))
    (page,) = bookkeeping.pages_of(root / NAME).values()
    experiment = client().get_experiment_by_name(NAME)
    how = "workflowType=machine_learning&viewStateShareKey=harness"
    assert page == f"http://127.0.0.1:5000/#/experiments/{experiment.experiment_id}/runs?{how}"
    view = json.loads(experiment.tags["mlflow.sharedViewState.harness"])
    assert view["orderByKey"] == "metrics.`valid/bertscore`"
    assert view["selectedColumns"] == [
        "metrics.`valid/bertscore`",
        "metrics.`valid/rouge1`",
        "metrics.`image_gap/rouge1`",
        "params.`predict.num_beams`",
    ]


def mlflow_runs_newest(experiment: str) -> str:
    found = client().search_runs([experiment], "params.`train.epochs` = '3'")
    return found[0].info.run_id


def in_a_process(code: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE)


def killed_in(method: str, count: int, folder: Path) -> None:
    """Mirror in a process of its own, which dies when it has called a method of the client `count` times."""
    import mlflow

    child = os.fork()
    if not child:
        real = getattr(mlflow.MlflowClient, method)
        calls = iter(range(1, 1000))

        def dies(*arguments: Any, **more: Any) -> Any:
            result = real(*arguments, **more)
            if next(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(mlflow.MlflowClient, method, dies)
        try:
            tracking.mirror(folder)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, (method, count)


@pytest.mark.ci
def test_killed_anywhere_the_next_mirror_makes_it_whole_without_duplicates(root, monkeypatch):
    monkeypatch.setitem(server._BATCH, "metrics", 25)
    folder = record(root, "base")
    killed_in("create_run", 1, folder)  # the parent run is there, and nothing on disk says so
    killed_in("create_run", 1, folder)  # the same for the run itself
    killed_in("log_batch", 3, folder)  # scores
    killed_in("log_batch", 5, folder)  # points, of which a part is there
    killed_in("log_artifact", 1, folder)
    tracking.mirror(folder)
    runs = mlflow_runs()
    assert set(runs) == {NAME, "base-s1"}
    assert history(runs["base-s1"], "train/loss") == [(row["step"], row["loss"]) for row in ROWS]
    assert history(runs["base-s1"], "valid/rouge1") == [(0, 0.25)]
    assert runs["base-s1"].info.status == "FINISHED"


def test_follower_mirrors_while_it_goes_on_and_to_the_end(root, monkeypatch):
    mirror_by_server(monkeypatch)
    losses(root, ROWS[:5])
    folder = record(root, "base", "RUNNING", scores={})
    follower = tracking.start(folder.parent)
    try:
        deadline = time.monotonic() + 40
        while "base-s1" not in _names() or len(history(mlflow_runs()["base-s1"], "train/loss")) < 5:
            assert time.monotonic() < deadline, (folder.parent / "mlflow.log").read_text()
            time.sleep(0.3)
        losses(root, [*ROWS, VALID])
        record(root, "base")
    finally:
        late = follower.finish(40)
    assert late is None, (folder.parent / "mlflow.log").read_text()
    assert mlflow_runs()["base-s1"].info.status == "FINISHED"
    assert len(history(mlflow_runs()["base-s1"], "train/loss")) == 20


def _names() -> set[str]:
    return set(mlflow_runs()) if client().get_experiment_by_name(NAME) else set()


@pytest.mark.ci
def test_a_run_whose_process_was_killed_is_shown_as_killed(root):
    record(root, "base", "RUNNING", scores={})
    code = """
import sys, time
from pathlib import Path
from harness import tracking
follower = tracking.start(Path(sys.argv[1]))
print(follower.process.pid, flush=True)
time.sleep(600)
"""
    owner = in_a_process(code, str(root / NAME))
    follower = int(owner.stdout.readline())
    owner.kill()
    owner.wait()
    deadline = time.monotonic() + 40
    while alive(follower):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    runs = mlflow_runs()
    assert runs["base-s1"].info.status == "KILLED"
    assert runs[NAME].info.status == "KILLED"


@contextlib.contextmanager
def dead_server(kind: str) -> Iterator[str]:
    """The address of a closed port, or of a server that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        if kind == "hangs":
            listener.listen(64)
            yield address
    if kind == "closed":
        yield address


@pytest.mark.parametrize("kind", ["closed", pytest.param("hangs", marks=pytest.mark.ci)])
def test_a_server_that_is_down_costs_seconds_and_loses_nothing(kind, root, monkeypatch):
    mirror_by_server(monkeypatch)
    folder = record(root, "base")
    with dead_server(kind) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address.replace("//", "//me:secret@"))
        start = time.monotonic()
        follower = tracking.start(folder.parent)
        assert time.monotonic() - start < 5
        log = folder.parent / "mlflow.log"
        while "base-s1" not in log.read_text():  # it has tried once, as in any real run
            assert time.monotonic() - start < 60
            time.sleep(0.2)
        start = time.monotonic()
        sentence = follower.finish()
        assert time.monotonic() - start < 30
    assert "harness sync" in sentence
    assert address in sentence
    assert "secret" not in sentence + log.read_text()
    assert follower.process.returncode is not None
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert len(tracking.sync(root)) == 1
    assert len(history(mlflow_runs()["base-s1"], "train/loss")) == 20


def test_sync_says_which_runs_are_left(root, monkeypatch):
    folder = record(root, "base")
    with dead_server("closed") as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        with pytest.raises(UserError) as error:
            tracking.sync(root)
    assert str(folder) in str(error.value)
    assert error.value.exit_code == 1


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:secret@host:5000", "http://host:5000"),
        ("postgresql://me:secret@secret@host/db", "postgresql://host/db"),
        ("postgresql://me:se/secret@host/db, then http://host/x", "postgresql://host/db, then http://host/x"),
        (
            "postgresql://host/db?password=secret&sslmode=require",
            "postgresql://host/db?password=***&sslmode=require",
        ),
        ("postgresql://me@host/db", "postgresql://host/db"),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
    ],
)
def test_no_password_is_shown(text, shown):
    assert masked(text) == shown
