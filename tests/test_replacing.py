"""A finished run is replaced only on request; a rerun changes nothing; a copy is a project of its own."""

import hashlib
import json
import os
import shutil
import socket
from datetime import UTC, datetime
from pathlib import Path

import pytest
from mlflow import MlflowClient
from support.commands import harness
from support.experiments import EXPERIMENT

from harness import records, tracking
from harness.cli import plans as plans_of
from harness.cli.terminal import Format, Terminal
from harness.config.experiment import load
from harness.errors import UserError
from harness.keeping import replacing
from harness.leaderboard.entries import editions
from harness.steps.plan import prepare
from harness.store import write_json

OPT, DEDUP = "runs/small/opt-s42", "runs/small/opt_dedup-s42"


@pytest.fixture(scope="module")
def finished(small_run, tmp_path_factory) -> Path:
    """The small project; its store is empty."""
    place = shutil.copytree(small_run / "kept", tmp_path_factory.mktemp("project") / "p")
    (place / "small.yaml").write_text(EXPERIMENT)
    return place


@pytest.fixture
def project(finished, tmp_path, monkeypatch) -> Path:
    place = shutil.copytree(finished, tmp_path / "p")
    monkeypatch.chdir(place)
    return place


def digests(folder: Path) -> dict[str, str]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def plans(*sets: str):
    return prepare(load("small.yaml", sets), Terminal(silent=True))


def check(*sets: str, replace: bool = False) -> list[str]:
    """What is refused, with the hints."""
    said = []
    reporter = Terminal(silent=True)
    reporter.say = said.append
    try:
        replacing.check(plans(*sets), reporter, replace)
    except UserError as error:
        return [f"{problem} {problem.hint}" for problem in error.problems]
    return said


def edit(folder: str, **changes) -> dict:
    record = json.loads((Path(folder) / "run.json").read_text()) | changes
    write_json(Path(folder) / "run.json", record)
    return record


def test_other_settings_are_refused_with_the_old_and_the_new_value_and_two_ways_on(project):
    (told,) = check("train.warmup_steps=3", "predict.num_beams=1")
    assert told.startswith(f"{OPT}: this run and 1 more have finished")
    assert "train.warmup_steps 2 -> 3; predict.num_beams 2 -> 1" in told
    assert "--name NEW_NAME" in told
    assert "runs/small/archive/: --replace" in told


def test_a_dry_run_says_what_run_would_refuse(project, capsys):
    def dry(*sets: str, replace: bool = False) -> str:
        plans_of.show(load("small.yaml", sets), Format.table, Path("small.yaml"), replace=replace)
        return capsys.readouterr().out

    (line,) = [line for line in dry("predict.num_beams=1").splitlines() if line.startswith("refused")]
    assert "small/opt-s42 and 1 more have finished with other settings: predict.num_beams 2 -> 1" in line
    assert "--name NEW_NAME or --replace" in line
    assert "refused" not in dry()
    assert "refused" not in dry("predict.num_beams=1", replace=True)
    assert "refused" not in dry("name=other", "predict.num_beams=1")


@pytest.mark.parametrize(
    "given",
    [
        [],
        ["device=auto", "train.compile=whole", "data.cache=false", "train.keep_checkpoints=3"],
        ["score.metrics=[bertscore,rouge1,bleu1,cider,meteor]"],
    ],
)
def test_settings_by_which_no_result_is_lost_are_not_refused(project, given):
    assert check(*given) == []


@pytest.mark.parametrize("given", ["predict.splits=[test]", "score.metrics=[rouge1]", "score.bootstrap=100"])
def test_settings_by_which_results_are_lost_are_refused(project, given):
    assert given.partition("=")[0] in check(given)[0]


def test_other_data_under_the_same_config_are_refused(project):
    file = next(Path("data/phantom").rglob("*valid*labels*"), None) or next(
        Path("data/phantom").glob("valid*.csv")
    )
    text = file.read_text().splitlines()
    file.write_text("\n".join([text[0], text[1] + " again", *text[2:]]) + "\n")
    assert "the images or labels of valid have changed" in check()[0]


def test_a_record_of_an_older_version_has_the_defaults_of_keys_that_it_lacks(project):
    record = edit(OPT)
    for key in ("keep_best", "patience", "start_from"):
        record["config"]["train"].pop(key)
        record["parameters"].pop(f"train.{key}")
    write_json(Path(OPT) / "run.json", record)
    assert check() == []
    assert replacing.differences(plans("train.warmup_steps=3")[0], record) == ["train.warmup_steps 2 -> 3"]


def test_an_unfinished_run_is_replaced_with_a_line_and_a_running_one_is_not(project):
    edit(OPT, status="FAILED")
    shutil.rmtree(DEDUP)
    (told,) = check("train.warmup_steps=3")
    assert "did not finish (FAILED) had other settings: train.warmup_steps 2 -> 3" in told
    now = datetime.now(UTC).isoformat(timespec="seconds")
    edit(OPT, status="RUNNING", pid=os.getpid(), host=socket.gethostname(), started=now)
    assert "is being computed by process" in check("train.warmup_steps=3", replace=True)[0]
    assert check() == []


def test_an_archived_run_can_be_read_and_is_not_among_the_runs(project):
    old = records.read(Path(OPT))
    assert any("runs/small/archive/opt-s42-" in told for told in check("train.warmup_steps=3", replace=True))
    assert records.below(Path("runs")) == []
    folder = next(Path("runs/small/archive").glob("opt-s42-*"))
    record = records.read(folder)
    assert records.full_name(record) == f"small/archive/{folder.name}"
    assert records.root(folder, record) == project / "runs"
    assert record["scores"] == old["scores"]
    for name in old["artifacts"]:
        assert records.place_of(folder, record, name).is_file(), name
    assert record["submissions"]
    assert all(Path(path).is_file() for path in record["submissions"])
    assert editions(Path("runs")) == []
    assert {file.parent for file in records.archived(Path("runs"))} > {folder}


@pytest.mark.slow
def test_mlflow_keeps_the_replaced_run_under_its_new_name(project):
    def named() -> dict[str, str]:
        client = MlflowClient(f"sqlite:///{project}/mlflow.db")
        (experiment,) = [one for one in client.search_experiments() if one.name == "small"]
        return {run.info.run_id: run.info.run_name for run in client.search_runs([experiment.experiment_id])}

    harness(project, "sync")
    before = named()
    check("train.warmup_steps=3", replace=True)
    copy = shutil.copytree(next(Path("runs/small/archive").glob("opt-s42-*")), OPT)
    record = edit(str(copy))
    del record["archived"]
    write_json(Path(OPT) / "run.json", record)
    harness(project, "sync")
    after = named()
    assert len(after) == len(before) + 1
    (old,) = [run for run, name in before.items() if name == "opt-s42"]
    assert after[old].startswith("archive/opt-s42-")
    assert sorted(after.values()).count("opt-s42") == 1


@pytest.mark.slow
def test_a_run_again_changes_neither_dates_nor_mlflow_nor_any_file_of_results(project):
    harness(project, "sync")
    before = {
        name: digest for name, digest in digests(project).items() if not name.endswith(("log", ".lock"))
    }
    said = harness(project, "run", "small.yaml", "--device", "cpu").stderr
    assert said.count("nothing is left to do") == 2
    after = digests(project)
    changed = {name for name in before if after.get(name) != before[name]}
    assert {Path(name).name for name in changed} <= {"report.html"}


def test_weights_that_are_gone_are_made_again_only_for_what_needs_them(project):
    for file in Path("runs/steps").glob("t*/*.safetensors"):
        file.unlink()
    for folder in Path("runs/steps").glob("tiny-*/"):
        shutil.rmtree(folder)
    plan = plans()[0]
    assert [step.name for step in plan.steps.values() if plan.spared(step)] == ["tiny", "train"]
    assert "nothing is left to do" in harness(project, "run", "small.yaml").stderr
    said = harness(project, "export", OPT, "exported", code=2).stderr
    assert "its weights are gone" in said
    assert "run small.yaml --weights" in said
    for folder in Path("runs/steps").glob("train-*/"):
        shutil.rmtree(folder)
    assert plan.spared(plan.steps["train"])
    next(Path("runs/steps").glob("predict-*/")).rename("elsewhere")
    assert not plan.spared(plan.steps["train"])


@pytest.mark.slow
def test_weights_come_back_on_request_and_the_dates_are_those_of_the_new_training(project):
    old = records.read(Path(OPT))
    for file in Path("runs/steps").glob("train*/*.safetensors"):
        file.unlink()
    harness(project, "run", "small.yaml", "--weights")
    record = records.read(Path(OPT))
    assert record["scores"] == old["scores"]
    assert list(Path("runs/steps").glob("train*/*.safetensors"))
    assert record["ended"] > old["ended"]


@pytest.mark.ci
@pytest.mark.parametrize("moved", [False, True])
def test_a_copied_or_moved_project_has_its_own_artifacts_and_no_second_runs(
    finished, tmp_path, monkeypatch, moved
):
    first = shutil.copytree(finished, tmp_path / "first")
    monkeypatch.chdir(first)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    tracking.sync(Path("runs"))
    place = tmp_path / "other name"
    if moved:
        first.rename(place)
    else:
        shutil.copytree(first, place)
    before = digests(first)
    monkeypatch.chdir(place)
    edit(OPT, warnings=["a change, so that the mirror has to write"])
    harness(place, "sync")
    client = MlflowClient(f"sqlite:///{place}/mlflow.db")
    (experiment,) = [one for one in client.search_experiments() if one.name == "small"]
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["opt-s42", "opt_dedup-s42", "small"]
    assert len(runs) == 3
    for run in runs:
        assert run.info.artifact_uri.startswith((place / "mlartifacts").as_uri())
        for item in client.list_artifacts(run.info.run_id):
            assert (place / "mlartifacts" / "small" / run.info.run_id / "artifacts" / item.path).exists()
    assert digests(first) == before


@pytest.mark.slow
def test_a_copy_has_runs_of_its_own_on_a_shared_server(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/shared/mlflow.db")
    (tmp_path / "shared").mkdir()
    shutil.copy(finished / "mlflow.db", tmp_path / "shared")
    counts = []
    for name in ("first", "second"):
        place = shutil.copytree(finished if name == "first" else tmp_path / "first", tmp_path / name)
        monkeypatch.chdir(place)
        tracking.sync(Path("runs"))
        client = MlflowClient(f"sqlite:///{tmp_path}/shared/mlflow.db")
        (experiment,) = [one for one in client.search_experiments() if one.name == "small"]
        counts.append(len(client.search_runs([experiment.experiment_id])))
    assert counts[1] == counts[0] + 3


def test_sync_of_a_run_that_is_not_there_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="not a run"):
        tracking.sync(Path("runs/nope"))
