"""`ls`, `rm`, `gc` and `--version`, on records made by hand."""

import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path

import pytest
from filelock import FileLock
from typer.testing import CliRunner

from harness.cli import app
from harness.errors import UserError
from harness.keeping import cleaning, listing
from harness.store import write, write_json

SIGNATURE = "bertscore|clef2023|microsoft/deberta-xlarge-mnli|layer:40"


def make(
    run: str, steps: tuple[str, ...] = ("train-1", "score-1"), score: float | None = 0.5, **changes
) -> Path:
    """A run with 1,000 bytes in each of its steps."""
    folder, (name, _, last) = Path("runs") / run, run.rpartition("/")
    variant, _, seed = changes.get("archived", last).partition("-s")
    for step in steps:
        write(Path("runs/steps") / step / "weights", "x" * 1000)
    scores = {
        "bertscore": {"value": score, "official": True, "signature": SIGNATURE, "low": 0.4, "high": 0.6}
    }
    record = {
        "name": name,
        "variant": variant,
        "seed": int(seed.partition("-")[0]),
        "status": "FINISHED",
        "edition": 2023,
        "command": "harness run x.yaml",
        "config": {"model": {}, "data": {}, "score": {}},
        "started": "2026-01-02T03:04:05+00:00",
        "ended": "2026-01-02T04:04:05+00:00",
        "steps": {step.partition("-")[0]: f"steps/{step}" for step in steps},
        "scores": {"valid": {"after": scores}},
        "image_gap": {"rouge1": {"gap": score and score / 2}},
    }
    write_json(folder / "run.json", record | changes)
    write(Path("submissions") / run / "caption-test" / "a.csv", "a|b\n")
    return folder


@pytest.fixture(autouse=True)
def _place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")


def run(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == code, done.output
    return done.output


def names(**how) -> list[str]:
    return [row.run for row in listing.rows(**how)[0]]


def test_runs_are_listed_with_scores_sizes_and_why_one_failed():
    make("a/base-s1", score=0.61)
    why = {"reason": "no space is left", "step": "train", "exit_code": 1}
    make("a/big-s1", status="FAILED", failure=why, scores={}, image_gap=None, steps=("train-2",))
    text = run("ls")
    assert "0.6100" in text
    assert "+0.3050" in text
    assert "a/big-s1: train: no space is left" in text
    assert max(map(len, text.splitlines())) <= 80
    first, second = json.loads(run("ls", "--format", "json", "--sort", "size"))
    assert first["run"] == "a/base-s1"
    assert (
        first["size"]
        == sum(
            f.stat().st_size
            for p in ("a/base-s1", "steps")
            for f in Path("runs", p).rglob("*")
            if f.is_file()
        )
        - 1000
    )
    assert second["why"] == "train: no space is left"
    assert run("ls", "--format", "csv").splitlines()[0].startswith("run,status,edition,metric,value")


def test_runs_are_filtered_and_sorted():
    make("a/x-s1", score=0.2, ended="2026-01-05T00:00:00+00:00")
    make("a/y-s1", score=0.9, ended="2026-01-03T00:00:00+00:00")
    make("b/z-s1", score=None, status="KILLED", ended="2026-01-04T00:00:00+00:00")
    make("b/t-s1", trial={"number": 1})
    make("b/archive/old-s1-20260101-000000", archived="old-s1-20260101-000000", name="b")
    assert names() == ["a/x-s1", "b/z-s1", "a/y-s1"]
    assert names(sort="score") == ["a/y-s1", "a/x-s1", "b/z-s1"]
    assert names(patterns=["b"]) == ["b/z-s1"]
    assert names(patterns=["runs/a/*"]) == ["a/x-s1", "a/y-s1"]
    assert names(status=["killed"]) == ["b/z-s1"]
    assert names(trials=True, patterns=["b/t*"]) == ["b/t-s1"]
    assert names(archived=True, patterns=["b/archive"]) == ["b/archive/old-s1-20260101-000000"]


def test_a_record_that_cannot_be_read_is_named_and_the_others_are_listed():
    make("a/x-s1")
    write(Path("runs/a/y-s1/run.json"), "{")
    assert "left out: runs/a/y-s1/run.json" in run("ls")
    with pytest.raises(UserError, match="y-s1"):
        cleaning.unneeded()


def test_rm_says_what_stays_and_asks(monkeypatch):
    make("a/x-s1", steps=("train-1", "score-1"))
    make(
        "a/y-s1",
        steps=("train-1", "score-2"),
        config={"model": {}, "data": {}, "score": {}, "soup": {"runs": ["a/x-s1"]}},
    )
    (removal,) = cleaning.removals([Path("a/x-s1")])
    assert removal.stays[0] == "the steps that other runs share"
    assert any("gc deletes them: 1" in line for line in removal.stays)
    assert removal.stays[-1] == "a/y-s1, which names this run in its config"
    with pytest.raises(UserError, match="--yes"):
        CliRunner().invoke(app, ["rm", "a/x-s1"], catch_exceptions=False, standalone_mode=False)
    assert Path("runs/a/x-s1").is_dir()
    run("rm", "runs/a/x-s1", "--yes")
    assert not Path("runs/a/x-s1").exists()
    assert not Path("submissions/a/x-s1").exists()
    assert Path("runs/steps/score-1").is_dir()
    assert [item.path.name for item in cleaning.unneeded()] == ["score-1"]


def test_rm_refuses_runs_that_are_not_there_or_are_being_computed():
    now = datetime.now(UTC).isoformat(timespec="seconds")
    make("a/x-s1", status="RUNNING", pid=os.getpid(), host=socket.gethostname(), started=now, ended=None)
    with pytest.raises(UserError) as error:
        cleaning.removals([Path("a/x-s1"), Path("a/nope-s1")])
    assert ["is being computed" in str(p) or "not a run" in str(p) for p in error.value.problems] == [
        True
    ] * 2


def test_gc_deletes_what_no_record_names_and_nothing_else():
    make("a/x-s1", steps=("train-1",))
    make("a/archive/x-s1-1", steps=("train-2",), name="a", archived="x-s1-1")
    make("a/y-s1", steps=("train-3",), status="KILLED", planned=["steps/train-3", "steps/predict-3"])
    for step in ("train-4", "predict-3", "predict-4"):
        write(Path("runs/steps") / step / "weights", "x" * 1000)
    write(Path("runs/steps/train-1/DONE"), "{}")
    write(Path("runs/steps/train-1/checkpoints/a"), "x")
    write(Path("runs/steps/train-3/checkpoints/a"), "x")
    write(Path("runs/cache/pixels-1.npy"), "x")
    write(Path("runs/cache/scores.sqlite"), "x")
    write(Path("runs/cache/.weights.json.999999999.tmp"), "x")
    write(Path(f"runs/cache/.weights.json.{os.getpid()}.tmp"), "x")
    found = {item.path.name: item.kind for item in cleaning.unneeded()}
    assert found == {
        "train-4": "step",
        "predict-4": "step",
        "checkpoints": "checkpoints",
        ".weights.json.999999999.tmp": "left by a killed process",
    }
    before = sorted(Path("runs").rglob("*"))
    assert "nothing was deleted" in run("gc", "--dry-run")
    assert sorted(Path("runs").rglob("*")) == before
    run("gc")
    left = {path for path in before if not path.exists()}
    assert left == {
        path for path in before if set(path.parts) & {"train-4", "predict-4", ".weights.json.999999999.tmp"}
    } | {
        Path("runs/steps/train-1/checkpoints"),
        Path("runs/steps/train-1/checkpoints/a"),
    }
    assert "Nothing to delete" in run("gc")


def test_gc_keeps_a_step_whose_lock_a_process_holds():
    make("a/x-s1")
    write(Path("runs/steps/train-9/weights"), "x")
    with FileLock("runs/steps/train-9.lock"):
        assert "kept, a process uses it: runs/steps/train-9" in run("gc")
        assert Path("runs/steps/train-9/weights").is_file()
    run("gc")
    assert not Path("runs/steps/train-9").exists()


def test_decoded_images_go_when_all_runs_have_finished():
    make("a/x-s1")
    write(Path("runs/cache/pixels-1.npy"), "x")
    assert [item.kind for item in cleaning.unneeded()] == ["decoded images"]


def test_the_version_has_the_commit():
    assert run("--version").startswith("harness ")
