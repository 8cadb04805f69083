"""The run command from YAML to submission, in its own process, on a small made-up set."""

import base64
import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image
from rouge_score import rouge_scorer
from support.commands import by_server, harness, python
from support.experiments import EXPERIMENT, begin
from support.reports import data_of

from harness import report
from harness.metrics.text import official
from harness.records.files import read_captions
from harness.submission import check, read


@pytest.fixture(scope="module")
def folder(small_run) -> Path:
    return small_run / "run"


@pytest.fixture(scope="module")
def finished(small_run) -> subprocess.CompletedProcess:
    out, err = ((small_run / name).read_text() for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(["harness", "run", "small.yaml"], 0, out, err)


def record(folder: Path, run: str) -> dict:
    return json.loads((folder / "runs" / "small" / run / "run.json").read_text())


def trained(folder: Path) -> list[Path]:
    return sorted((folder / "runs" / "steps").glob("train-*/losses.jsonl"))


def test_the_table_says_what_was_scored_by_what(finished):
    assert "opt-s42" in finished.stdout
    assert "opt_dedup-s42" in finished.stdout
    assert "STAND-IN model: tiny" in finished.stdout
    assert "* not comparable with official scores: another model, precision or reading" in finished.stdout
    assert "constant caption" in finished.stdout
    assert "mlflow ui" in finished.stdout
    assert "report.html" in finished.stdout
    assert "submissions/small/" in finished.stdout


def test_a_run_has_a_page_of_all_it_left_and_mlflow_has_the_page(folder, finished):
    (run,) = (folder / "runs" / "small").glob("opt_dedup-s42")
    page, made = data_of(run / "report.html"), record(folder, run.name)
    rows = page["captions"]["rows"]
    assert [row["id"] for row in rows] == [f"phantom_valid_{n:06d}" for n in range(1, 13)]
    assert page["captions"]["notes"] == []
    for at, metric in enumerate(page["captions"]["metrics"]):
        if metric != "bleu1":  # of the whole corpus
            mean = sum(row["scores_after"][at] for row in rows) / len(rows)
            assert mean == pytest.approx(made["scores"]["valid"]["after"][metric]["value"], abs=1e-4)
    for row in rows:
        with Image.open(io.BytesIO(base64.b64decode(row["thumbnail"]))) as image:
            assert max(image.size) <= report.SIDE
        assert (run / row["image"]).is_file()
        assert row["concepts"]
    assert [stage for stage, _ in page["curves"]["stages"]] == [1, 2]
    assert [row["stage"] for row in page["curves"]["valid"]] == [1, 1, 2]
    assert {step["step"] for step in page["steps"]} == set(made["steps"])
    assert {step["by"] for step in page["steps"]} == {"this run", "an earlier run by the same command"}
    assert len(list((folder / "mlartifacts").rglob("report.html"))) == 2
    before = (run / "report.html").read_bytes()
    done = harness(folder, "report", str(run.relative_to(folder)))
    assert done.stdout == f"{run.relative_to(folder)}/report.html\n"
    assert data_of(run / "report.html").keys() == page.keys()
    (run / "report.html").write_bytes(before)


def test_rows_that_differ_in_deduplication_share_training_and_captions(folder, finished):
    first, second = record(folder, "opt-s42"), record(folder, "opt_dedup-s42")
    assert first["status"] == second["status"] == "FINISHED"
    for name in ("train", "predict-valid", "predict-test"):
        assert first["steps"][name] == second["steps"][name]
    assert {"tiny", "train", "predict-valid"} <= set(first["seconds"])
    assert set(second["seconds"]) <= {"postprocess-valid", "postprocess-test", "score-after"}
    (losses,) = trained(folder)
    rows = [json.loads(line) for line in losses.read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 10))


@pytest.mark.slow
def test_a_run_loads_its_weights_once_and_the_frozen_ones_as_they_compute(small_run, tmp_path):
    """At full size they are 10 GB for each rank, and were 30 GB when loaded twice, in fp32."""
    begin(small_run, tmp_path)
    code = """if True:
        from harness import cli
        from harness.models.blip2 import loading
        load = loading.load
        def told(*arguments, **options):
            loaded = load(*arguments, **options)
            print(*{f"{name} in {weight.dtype}" for name, part in loaded.model.named_children()
                    for weight in part.parameters()}, sep="\\n")
            return loaded
        loading.load = told
        cli.main()
    """
    arguments = ("run", "small.yaml", "--set", "train.precision=bf16", "--set", "score.metrics=[rouge1]")
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    told = [line for line in done.stdout.splitlines() if " in torch." in line]
    whole = ["cls", "embeddings", "language_projection", "qformer", "vision_model"]
    assert sorted(told) == sorted(
        ["language_model in torch.bfloat16", *(f"{p} in torch.float32" for p in whole)]
    )


def test_losses_and_validation_are_logged_by_step(folder, finished):
    rows = [json.loads(line) for line in trained(folder)[0].read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert all({"caption_loss", "learning_rate", "images_per_second"} <= set(row) for row in steps)
    assert ["concept_loss" in row for row in steps] == [True] * 6 + [False] * 3
    validations = [row for row in rows if "valid_loss" in row]
    assert [row["step"] for row in validations] == [3, 6, 9]
    assert all({"valid_bertscore", "valid_rouge1"} <= set(row) for row in validations)


def test_scores_are_those_of_the_written_captions(folder, finished):
    run = record(folder, "opt-s42")
    with (folder / "data/phantom").joinpath(_labels(folder)).open(newline="") as file:
        references = dict(line.rstrip("\r\n").split("\t", 1) for line in file.readlines()[1:])
    captions = read_captions(folder / "runs" / run["steps"]["postprocess-valid"] / "predictions.csv")
    scorer = rouge_scorer.RougeScorer(["rouge1"], use_stemmer=False)
    each = [
        scorer.score(official(references[i]), official(captions[i]))["rouge1"].fmeasure for i in references
    ]
    score = run["scores"]["valid"]["after"]["rouge1"]
    assert score["value"] == pytest.approx(sum(each) / len(each), abs=1e-9)
    assert score["low"] <= score["value"] <= score["high"]
    assert score["official"]
    assert score["signature"].startswith("rouge1|clef2023|")


def _labels(folder: Path) -> str:
    return next((folder / "data/phantom").glob("*caption_prediction_valid_labels.csv")).name


def test_stand_ins_are_marked_in_every_file(folder, finished):
    run = record(folder, "opt-s42")
    score = run["scores"]["valid"]["after"]["bertscore"]
    assert not score["official"]
    assert "STAND-IN" in score["signature"]
    assert run["standin_model"]
    manifest = json.loads((folder / run["submissions"][0]).with_name("manifest.json").read_text())
    assert manifest["standin_model"]


def test_before_and_after_are_kept_and_scored(folder, finished):
    run = record(folder, "opt_dedup-s42")
    assert set(run["scores"]["valid"]) == {"before", "after"}
    for name in (
        "predictions/valid_before.csv",
        "predictions/valid_after.csv",
        "config.yaml",
        "plots/curves.png",
    ):
        assert (folder / "runs" / run["artifacts"][name]).stat().st_size > 0
    with (folder / "runs" / run["artifacts"]["scores/valid_after_per_image.csv"]).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert {"ID", "reference", "prediction", "rouge1", "bertscore"} <= set(rows[0])


def test_the_image_gap_is_part_of_the_record(folder, finished):
    gap = record(folder, "opt-s42")["image_gap"]
    assert gap["n"] == 12
    for metric in ("rouge1", "bertscore"):
        assert gap[metric]["gap"] == pytest.approx(gap[metric]["value"] - gap[metric]["permuted"])
        assert gap[metric]["low"] <= gap[metric]["gap"] <= gap[metric]["high"]


def test_submissions_pass_the_check_and_hold_the_captions(folder, finished):
    run = record(folder, "opt_dedup-s42")
    assert len(run["submissions"]) == 2
    for path in run["submissions"]:
        split = "valid" if "valid" in Path(path).name else "test"
        captions = read_captions(folder / "runs" / run["steps"][f"postprocess-{split}"] / "predictions.csv")
        assert check(folder / path, list(captions), 2023) == []
        assert read(folder / path) == {i: " ".join(c.split()).replace("|", "/") for i, c in captions.items()}


@pytest.mark.ci
def test_a_run_without_training_is_captioned_by_the_checkpoint(folder, finished):
    command = ("run", "small.yaml", "--set=name=untrained", "--set=train.stages=[]")
    assert "nothing is trained" in harness(folder, *command, "--dry-run", "--verbose").stdout
    done = harness(folder, *command)
    run = json.loads((folder / "runs/untrained/opt-s42/run.json").read_text())
    assert "train" not in run["steps"]
    assert "losses.jsonl" not in run["artifacts"]
    assert set(run["scores"]["valid"]) == {"before", "after"}
    assert run["steps"]["tiny"] == record(folder, "opt-s42")["steps"]["tiny"]
    assert len(run["submissions"]) == 2
    assert "constant caption" in done.stdout
    assert "opt-s42" in (folder / "runs/untrained/opt-s42/report.html").read_text()


@pytest.mark.ci
def test_captions_that_are_all_the_same_are_warned_of(folder, finished):
    done = harness(
        folder,
        "run",
        "small.yaml",
        "--set=name=same",
        "--set=predict.max_new_tokens=1",
        "--set=predict.num_beams=1",
    )
    run = json.loads((folder / "runs" / "same" / "opt-s42" / "run.json").read_text())
    for split, count in (("valid", 12), ("test", 6)):
        said = f"{split}: all {count} captions are the same: "
        assert f"warning: opt-s42: {said}" in done.stderr
        assert sum(said in warning for warning in run["warnings"]) == 1
    page = data_of(folder / "runs" / "same" / "opt-s42" / "report.html")
    assert page["warnings"] == run["warnings"]
    manifest = folder / "submissions" / "same" / "opt-s42" / "caption-test" / "manifest.json"
    assert "all 6 captions are the same" in json.loads(manifest.read_text())["warnings"][0]


def test_the_same_command_repeats_nothing(folder, finished):
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs/steps").rglob("*") if path.is_file()}
    of_the_first = record(folder, "opt-s42")
    harness(folder, "run", "small.yaml")
    after = {path: path.stat().st_mtime_ns for path in (folder / "runs/steps").rglob("*") if path.is_file()}
    assert before == after
    assert record(folder, "opt-s42") == of_the_first


def test_dry_run_says_which_steps_are_done(folder, finished):
    done = harness(folder, "run", "small.yaml", "--dry-run").stdout
    assert done.count("to do") == 0
    assert done.count("done") == 2
    changed = harness(
        folder, "run", "small.yaml", "--dry-run", "--verbose", "--set", "predict.num_beams=1"
    ).stdout
    states = [line.split()[1:3] for line in changed.splitlines() if line.startswith("#   ")]
    assert ["tiny", "done"] in states
    assert ["train", "done"] in states
    assert ["predict-valid", "to"] in states


def test_mlflow_shows_parent_children_curves_scores_and_artifacts(folder, finished):
    code = """
import json, mlflow
client = mlflow.MlflowClient("sqlite:///mlflow.db")
experiment = client.get_experiment_by_name("small")
runs = client.search_runs([experiment.experiment_id])
children = {r.info.run_name: r for r in runs if "mlflow.parentRunId" in r.data.tags}
run = children["opt-s42"]
print(json.dumps({
    "names": sorted(children), "parents": len(runs) - len(children), "status": run.info.status,
    "losses": [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")],
    "metrics": run.data.metrics, "tags": run.data.tags, "params": run.data.params,
    "artifacts": [a.path for a in client.list_artifacts(run.info.run_id)],
    "datasets": len(run.inputs.dataset_inputs),
}))
"""
    shown = json.loads(python(code, folder=folder, server="mirrors").stdout)
    run = record(folder, "opt-s42")
    rows = [json.loads(line) for line in trained(folder)[0].read_text().splitlines()]
    assert (shown["names"], shown["parents"], shown["status"]) == (
        ["opt-s42", "opt_dedup-s42"],
        1,
        "FINISHED",
    )
    assert shown["losses"] == [[row["step"], row["loss"]] for row in rows if "loss" in row]
    assert shown["metrics"]["valid/rouge1"] == run["scores"]["valid"]["after"]["rouge1"]["value"]
    assert "valid/before/rouge1" in shown["metrics"]
    assert shown["params"]["train.learning_rate"] == "0.001"
    assert "config.yaml" in shown["artifacts"]
    assert shown["datasets"] >= 2
    assert any("STAND-IN" in value for value in shown["tags"].values())


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def start(folder: Path, *arguments: str, fork: bool = False) -> subprocess.Popen:
    """The command as a new Python, or as a fork that is killed with the process returned."""
    command = [sys.executable, "-m", "harness", *arguments]
    if fork:
        command = by_server(*arguments, server="commands")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=folder, env=environment, **nowhere)


def rows_of(folder: Path) -> int:
    return sum(len(file.read_text().splitlines()) for file in trained(folder))


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_to_the_same_captions(small_run, folder, tmp_path, how):
    begin(small_run, tmp_path)
    process = start(tmp_path, "run", "small.yaml", fork=how == signal.SIGKILL)  # which no process handles
    wait_for(lambda: rows_of(tmp_path) >= 6, process)
    process.send_signal(how)
    code = process.wait(60)
    assert code == (-signal.SIGKILL if how == signal.SIGKILL else 130)
    if how == signal.SIGTERM:
        assert record(tmp_path, "opt-s42")["status"] == "KILLED"
    harness(tmp_path, "run", "small.yaml")
    for run in ("opt-s42", "opt_dedup-s42"):
        ours, theirs = record(tmp_path, run), record(folder, run)
        assert ours["status"] == "FINISHED"
        for split in ("valid", "test"):
            found, expected = (
                (root / "runs" / one["steps"][f"postprocess-{split}"] / "predictions.csv").read_bytes()
                for root, one in ((tmp_path, ours), (folder, theirs))
            )
            assert found == expected


def errors(folder: Path, *arguments: str, code: int = 2) -> Sequence[str]:
    """The lines of a refused command: quick, at once, and without a traceback."""
    done = harness(folder, *arguments, code=None)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()


def test_every_problem_of_a_run_is_reported_before_it_starts(folder, finished, tmp_path):
    """A missing image, a broken label file and absent checkpoints, in one go."""
    phantom = harness(tmp_path, "data", "phantom", "set", "--train", "6", "--valid", "3", "--test", "2")
    assert phantom.stdout.startswith("drew 6 + 3 + 2")
    labels = next((tmp_path / "set").glob("*caption_prediction_train_labels.csv"))
    lines = labels.read_bytes().split(b"\r\n")
    lines[3] = lines[3].replace(b"\t", b" ")
    labels.write_bytes(b"\r\n".join(lines))
    (tmp_path / "set" / "phantom.json").unlink()  # from now on it is real data
    image = next((tmp_path / "set" / "valid").iterdir())
    image.unlink()
    (tmp_path / "small.yaml").write_text(EXPERIMENT)
    lines = errors(
        tmp_path,
        "run",
        "small.yaml",
        "--set=data.root=set",
        "--set=model.checkpoint=nobody/nothing",
        "--set=score.bertscore.checkpoint=microsoft/deberta-xlarge-mnli",
    )
    text = "\n".join(lines)
    assert f"{labels.name}:4" in text
    assert image.name in text
    assert "model.checkpoint: weights are not on this machine: nobody/nothing" in text
    assert "hf download microsoft/deberta-xlarge-mnli" in text
    assert lines[-1].endswith("nothing was run.")
    assert not (tmp_path / "runs" / "small").exists()


def test_wrong_options_are_usage_errors(tmp_path):
    assert any("no such file" in line for line in errors(tmp_path, "run", "nothing.yaml"))
    assert errors(tmp_path, "run", "--nonsense")
    assert errors(tmp_path, "data", "check", "nowhere")


def test_help_imports_nothing_heavy():
    code = "import sys; from harness.cli import app; print(sorted(m for m in HEAVY if m in sys.modules))"
    heavy = ("torch", "transformers", "deepspeed", "mlflow", "pandas", "numpy", "scipy", "pydantic")
    done = subprocess.run(
        [sys.executable, "-c", code.replace("HEAVY", repr(heavy))], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_scores_that_were_written_and_not_yet_marked_are_made_again(folder, finished):
    """Killed in between, the list of scored captions names the very step that is to be built."""
    step = folder / "runs" / record(folder, "opt-s42")["steps"]["score-before"]
    (step / "DONE").unlink()
    harness(folder, "run", "small.yaml")
    assert (step / "DONE").exists()
