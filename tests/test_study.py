"""The study command, in its own processes, on the small made-up set of the run command's tests."""

import contextlib
import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import psutil
import pytest
from support.commands import harness
from support.experiments import begin

from harness.cli.terminal import Terminal
from harness.study.spec import load
from harness.study.work import work

DECODING = """
base: small.yaml
variant: opt
overrides: {score: {metrics: [bertscore, rouge1]}}
space:
  predict.num_beams: {low: 1, high: 3}
  predict.repetition_penalty: {low: 1, high: 1.5}
  postprocess.deduplicate: {choices: [false, true]}
sampler: {name: random, seed: 1}
trials: 4
"""
PRUNED = """
base: small.yaml
variant: opt
name: pruned
objective: rouge1
overrides:
  model: {language_model: false}
  train:
    learning_rate: 1e-2
    stages: [{epochs: 3, losses: {caption: 1}}, {epochs: 1, losses: {caption: 1}}]
    batch_size: 8
    micro_batch_size: 4
    dropout: 0
    label_smoothing: 0
    max_caption_tokens: 24
  score: {metrics: [bertscore, rouge1]}
space:
  train.learning_rate: {choices: [1e-2, 1e-7, 2e-7]}
pruner: {name: median, startup_trials: 1}
sampler: {name: grid}
"""
EVERY = "  train:\n    evaluate_every: 0\n    checkpoint_every_steps: 1000\n"
NAME = "small/decoding"


@pytest.fixture(scope="module")
def folder(small_run, tmp_path_factory) -> Path:
    result = begin(small_run, tmp_path_factory.mktemp("project"))
    (result / "decoding.yaml").write_text(DECODING)
    (result / "two.yaml").write_text(DECODING + "name: two\n")
    (result / "pruned.yaml").write_text(PRUNED)
    return result


@pytest.fixture(scope="module")
def finished(folder) -> subprocess.CompletedProcess:
    return harness(folder, "study", "decoding.yaml", "--format", "json")


def records(folder: Path, name: str = NAME) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted((folder / "runs" / name).glob("*/run.json"))]


@pytest.mark.ci
def test_a_trial_is_a_run_of_the_base_with_other_values(folder, finished):
    rows, runs = json.loads(finished.stdout), records(folder)
    assert [row["state"] for row in rows] == ["COMPLETE"] * 4
    assert [run["variant"] for run in runs] == [f"trial-{number:04}" for number in range(4)]
    for row, run in zip(rows, runs, strict=True):
        assert run["trial"]["params"] == row["params"]
        assert all(run["parameters"][key] == value for key, value in row["params"].items())
        score = run["scores"]["valid"]["after"]["bertscore"]["value"]
        assert run["trial"]["values"] == row["values"] == {"bertscore": score}
    assert rows[0]["params"] == {
        "predict.num_beams": 2,
        "predict.repetition_penalty": 1.0,
        "postprocess.deduplicate": False,
    }
    assert [row["best"] for row in rows].index(True) == max(
        range(4), key=lambda number: (rows[number]["values"]["bertscore"], -number)
    )


@pytest.mark.ci
def test_a_study_of_decoding_trains_once_and_submits_nothing(folder, finished):
    runs = records(folder)
    assert len({run["steps"]["train"] for run in runs}) == 1
    assert ["train" in run["seconds"] for run in runs] == [True, False, False, False]
    assert not any(step.endswith("-test") for run in runs for step in run["steps"])
    assert not any(run["submissions"] for run in runs)
    assert not (folder / "submissions").exists()


@pytest.mark.ci
def test_the_same_captions_are_never_scored_twice(folder, finished):
    steps = folder / "runs" / "steps"
    wanted = {
        (steps.parent / run["steps"][name] / "predictions.csv").read_bytes()
        for run in records(folder)
        for name in ("predict-valid", "postprocess-valid")
    }
    scored = finished.stderr.count("scoring 12 captions")
    assert scored == len(wanted)
    assert scored + finished.stderr.count("the same captions were scored before") >= len(wanted)


@pytest.mark.ci
def test_mlflow_shows_each_trial_under_the_study(folder, finished):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name(NAME)
    found = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    parent = found.pop(NAME)
    assert set(found) == {f"trial-{number:04}-s42" for number in range(4)}
    for number, name in enumerate(sorted(found)):
        tags, trial = found[name].data.tags, records(folder)[number]["trial"]
        assert tags["mlflow.parentRunId"] == parent.info.run_id
        assert (tags["trial/number"], tags["trial/state"]) == (str(number), "COMPLETE")
        assert json.loads(tags["trial/params"]) == trial["params"]
    best = max(run["trial"]["values"]["bertscore"] for run in records(folder))
    assert parent.data.metrics["best/bertscore"] == pytest.approx(best, abs=1e-12)
    assert parent.info.status == "FINISHED"
    plots = {Path(file.path).name for file in client.list_artifacts(parent.info.run_id, "plots")}
    assert plots == {"history.png"}  # of so few trials, importance would be chance


@pytest.mark.ci
def test_optuna_opens_the_storage(folder, finished):
    study = optuna.load_study(study_name=NAME, storage=f"sqlite:///{folder}/runs/{NAME}/study.db")
    assert [trial.value for trial in study.trials] == [
        run["trial"]["values"]["bertscore"] for run in records(folder)
    ]


@pytest.mark.ci
def test_the_best_is_an_experiment_whose_captions_are_there(folder, finished):
    out = folder / "configs" / "best.yaml"
    told = harness(folder, "study", "best", "decoding.yaml", "--output", str(out))
    rows = list(
        csv.DictReader(
            io.StringIO(harness(folder, "study", "show", "decoding.yaml", "--format", "csv").stdout)
        )
    )
    best = max(rows, key=lambda row: (float(row["bertscore"]), -int(row["number"])))
    assert f"trial {best['number']} of {NAME}" in told.stdout
    text = out.read_text()
    assert [line.split()[1] for line in text.splitlines()[:4]] == ["Question", "Command", "Expected", "Cost"]
    assert f"bertscore {float(best['bertscore']):.4f}" in text
    (run,) = json.loads(harness(folder, "run", str(out), "--dry-run", "--format", "json").stdout)
    assert run["config"]["predict"]["num_beams"] == int(best["predict.num_beams"])
    assert run["config"]["predict"]["splits"] == ["valid", "test"]
    assert run["config"]["score"]["metrics"] == ["bertscore", "rouge1", "bleu1", "cider"]
    states = {name: state.split()[0] for name, state in run["steps"].items()}
    assert states["train"] == states["predict-valid"] == states["postprocess-valid"] == "done"
    assert states["predict-test"] == "to"


@pytest.mark.ci
def test_sqlite_is_refused_for_two_workers_and_a_study_keeps_its_storage(folder, finished):
    done = harness(folder, "study", "decoding.yaml", "--workers", "2", code=None)
    assert done.returncode == 2
    assert "SQLite has one writer" in done.stderr
    assert "continue with one worker" in done.stderr


def values(folder: Path, name: str) -> dict[int, tuple[dict, dict]]:
    """Parameters and scores of finished trials, by the first of their retries."""
    found = {}
    for record in records(folder, name):
        trial = record["trial"]
        if trial["state"] == "COMPLETE":
            first = trial["number"] if trial["retry_of"] is None else trial["retry_of"]
            assert first not in found, "a trial was done twice"
            found[first] = (trial["params"], trial["values"])
    return found


@pytest.mark.slow
def test_two_workers_find_what_one_found_though_interrupted_and_the_command_goes_on(folder, finished):
    command = [sys.executable, "-m", "harness", "study", "two.yaml", "--workers", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
    journal = folder / "runs" / "two" / "study.journal"
    _wait(lambda: list(journal.parent.glob("trial-*/run.json")))
    running.send_signal(signal.SIGINT)
    assert "interrupted; the same command continues" in running.communicate(timeout=60)[1]
    assert running.returncode == 130
    before = values(folder, "two")
    more = harness(folder, *command[3:], "--trials", "5")
    alone, together = values(folder, NAME), values(folder, "two")
    assert [together[first] for first in sorted(together)][:4] == [alone[first] for first in sorted(alone)]
    assert len(together) == 5
    assert before.items() <= together.items()
    assert f"optuna-dashboard {journal.relative_to(folder)}" in more.stdout


def _wait(until, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_a_bad_trial_ends_early_and_keeps_its_losses_and_reason(folder, monkeypatch):
    monkeypatch.chdir(folder)
    silent = Terminal(silent=True)
    work(load(Path("pruned.yaml")), "sqlite", silent, silent, "a test")
    _prunes(folder)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["launcher", "rank"])
def test_two_ranks_give_a_trial_back_and_lose_it_only_where_one_failed(folder, finished, victim):
    """Interrupted, it goes on; with a rank killed, `retries` counts it."""
    name = f"back-{victim}"
    text = PRUNED.replace("name: pruned", f"name: {name}").replace("[1e-2, 1e-7, 2e-7]", "[1e-2]")
    text = text.replace("[{epochs: 3,", "[{epochs: 60,").replace("  train:\n", EVERY)
    (folder / f"{name}.yaml").write_text(text + "retries: 0\n")
    command = [sys.executable, "-m", "harness", "study", f"{name}.yaml", "--nproc", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
    trial = folder / "runs" / name / "trial-0000-s42" / "run.json"
    _wait(lambda: trial.exists() and "train" in json.loads(trial.read_text())["steps"])
    time.sleep(2)
    if victim == "launcher":
        running.send_signal(signal.SIGINT)
    else:
        ranks = psutil.Process(running.pid).children()
        next(rank for rank in ranks if rank.environ()["RANK"] == "1").kill()
    error = running.communicate(timeout=100)[1]
    assert "Traceback" not in error, error
    assert (running.returncode == 130) == (victim == "launcher")
    states = [run["trial"]["state"] for run in records(folder, name)]
    reasons = [run["trial"]["reason"] for run in records(folder, name)]
    assert states == ["FAIL"] * len(states)
    if victim == "launcher":
        assert reasons == ["interrupted; tried again as trial 1"]
    else:
        assert reasons == ["another rank failed, 1 times in a row"]


@pytest.mark.slow
def test_two_ranks_prune_together(folder):
    (folder / "pruned2.yaml").write_text(
        PRUNED.replace("name: pruned", "name: pruned2").replace("e-7", "e-8")
    )
    harness(folder, "study", "pruned2.yaml", "--nproc", "2")
    _prunes(folder, "pruned2")


@pytest.mark.slow
def test_a_trial_that_fails_on_two_ranks_does_not_end_the_study(folder):
    space = "  train.micro_batch_size: {choices: [16, 8]}\n"
    text = DECODING.partition("space:")[0] + "name: ranks\nspace:\n" + space + "sampler: {name: grid}\n"
    (folder / "ranks.yaml").write_text(text)
    told = harness(folder, "study", "ranks.yaml", "--nproc", "2", "--format", "json")
    rows = json.loads(told.stdout)
    assert [row["params"]["train.micro_batch_size"] for row in rows][:2] == [8, 16]
    assert rows[0]["state"] == "COMPLETE"
    assert all(row["state"] == "FAIL" for row in rows[1:])
    assert "which 2 devices with micro batches of 16 cannot share" in rows[-1]["reason"]


def _prunes(folder: Path, name: str = "pruned") -> None:
    good, *bad = records(folder, name)
    assert (good["status"], good["trial"]["state"]) == ("FINISHED", "COMPLETE")
    assert len(bad) == 2
    for run in bad:
        assert (run["status"], run["trial"]["state"]) == ("PRUNED", "PRUNED")
        assert run["trial"]["reason"].startswith("valid_rouge1 0.")
        assert "by median" in run["trial"]["reason"]
        losses = folder / "runs" / run["steps"]["train"] / "losses.jsonl"
        rows = [json.loads(line) for line in losses.read_text().splitlines()]
        told = [row["valid_rouge1"] for row in rows if "valid_rouge1" in row]
        assert 0 < len(told) < 4
        assert f"{told[-1]:.4f}" in run["trial"]["reason"]
        assert not (losses.parent / "DONE").exists()


@pytest.fixture
def long_study(folder, finished) -> list[str]:
    text = DECODING.replace("trials: 4", "trials: 12\nretries: 20") + "name: killed\n"
    (folder / "killed.yaml").write_text(text)
    return [sys.executable, "-m", "harness", "study", "killed.yaml", "--workers", "2"]


def _workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    found = []
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(process.pid).children():
            with contextlib.suppress(psutil.Error):  # a zombie has no command line
                found += [child] if "study" in child.cmdline() else []
    return found


@pytest.mark.slow
def test_workers_killed_at_random_lose_no_finished_trial(folder, long_study):
    import random

    draw, finished, kills = random.Random(1), {}, 0
    while kills < 4 and len(finished) < 12:
        running = subprocess.Popen(long_study, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"})
        while running.poll() is None and kills < 4:
            time.sleep(draw.uniform(6, 12))
            if workers := _workers_of(running):
                draw.choice(workers).kill()
                kills += 1
            now = values(folder, "killed")
            assert all(now[number] == told for number, told in finished.items())
            finished = now
        running.wait()
    harness(folder, *long_study[3:])
    found = values(folder, "killed")
    assert all(found[number] == told for number, told in finished.items())
    assert len(found) == 12
    assert kills
    study = harness(folder, "study", "show", "killed.yaml", "--format", "json")
    states = [row["state"] for row in json.loads(study.stdout)]
    assert states.count("COMPLETE") == 12
    assert set(states) <= {"COMPLETE", "FAIL"}


@pytest.mark.ci
def test_a_reason_with_brackets_is_shown_as_it_is(folder, capsys):
    from harness.cli.study import _table

    row = {"number": 0, "state": "FAIL", "best": False, "values": {"bertscore": None}, "official": None}
    _table(
        load(folder / "decoding.yaml"),
        [row | {"params": {}, "seconds": None, "reason": "[/a/pair.cc] gone", "retry_of": None}],
        "",
    )
    assert "[/a/pair.cc] gone" in capsys.readouterr().out


@pytest.mark.ci
def test_more_trials_than_points_are_said_and_not_run(folder, finished):
    """The points are those of a study that has run, so that nothing is trained."""
    text = DECODING.partition("space:")[0] + "name: points\nspace: {predict.num_beams: {choices: [2, 1]}}\n"
    (folder / "points.yaml").write_text(text + "trials: 5\n")
    done = harness(folder, "study", "points.yaml", "--format", "json")
    assert "the space has 2 points, so the study runs 2 trials, not 5" in done.stderr
    rows = json.loads(done.stdout)
    assert [row["params"] for row in rows] == [{"predict.num_beams": 2}, {"predict.num_beams": 1}]
    assert json.loads((folder / "runs/points/study.json").read_text())["ended"]


@pytest.mark.ci
def test_a_trial_that_diverges_fails_with_its_reason_and_the_study_goes_on(folder, finished):
    text = DECODING.partition("space:")[0].replace("overrides: {", "overrides: {train: {max_grad_norm: 0}, ")
    space = "name: diverged\nspace: {train.learning_rate: {choices: [1e-3, 1e18]}}\ntrials: 2\n"
    (folder / "diverged.yaml").write_text(text + space)
    done = harness(folder, "study", "diverged.yaml", "--format", "json")
    good, bad = json.loads(done.stdout)
    assert (good["state"], bad["state"], bad["values"]) == ("COMPLETE", "FAIL", {"bertscore": None})
    assert "became" in bad["reason"]
    (made,) = [one for one in records(folder, "diverged") if one["variant"] == "trial-0001"]
    assert (made["status"], made["failure"]["reason"]) == ("FAILED", bad["reason"])
    shown = harness(folder, "study", "show", "diverged.yaml").stdout
    assert "caption_loss" in shown or "valid_loss" in shown
    board = harness(folder, "leaderboard", "--all", "--format", "json").stdout
    apart = {(entry["experiment"], entry["run"]): entry["apart"] for entry in json.loads(board)[0]["runs"]}
    assert apart["diverged", "trial-0001-s42"].startswith(
        f"the run is FAILED in train: {bad['reason']}; it is a trial"
    )
