"""A submission is complete or absent: refused, killed, made again; a run's has its whole split."""

import csv
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from support.commands import harness

from harness.errors import UserError
from harness.records import read as run_record
from harness.records.files import write_captions
from harness.store import seal
from harness.submission import check, folder, make
from harness.submission.runs import predictions

IDS = [f"scan_{number}" for number in range(6)]
CAPTIONS = {key: f"caption {key}" for key in IDS}
COMMAND = "harness run experiments/exp.yaml"


def everything(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


REFUSED = {
    "missing": ({**CAPTIONS, "more": "x"}, "caption"),
    "too long": ({**CAPTIONS, IDS[0]: "x" * 131_073}, "caption"),
    "no CUI": ({key: ["D1"] for key in IDS}, "concept"),
    "many": ({key: [f"C{n}" for n in range(101)] for key in IDS}, "concept"),
}


@pytest.mark.parametrize("edition", [2022, 2023, 2025, 2026])
@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_make_leaves_nothing_and_an_earlier_submission_as_it_was(case, edition, tmp_path):
    values, task = REFUSED[case]
    for name in ("new", "earlier"):
        if name == "earlier":
            good = CAPTIONS if task == "caption" else {key: ["C1"] for key in IDS}
            make(good, IDS, edition, tmp_path / name, {"run": "good"}, task=task)
        before = everything(tmp_path)
        with pytest.raises(UserError) as error:
            make(values, IDS, edition, tmp_path / name, {}, task=task)
        assert error.value.exit_code == 3
        assert everything(tmp_path) == before
        assert name == "earlier" or not (tmp_path / name).exists()


def test_all_files_of_a_submission_change_together_and_others_stay(tmp_path):
    upload = make(CAPTIONS, IDS, 2026, tmp_path, {"run": "a"})
    (upload.parent / "notes.txt").write_text("mine")
    (upload.parent / "kept").mkdir()
    (upload.parent / "kept" / "link").symlink_to("nowhere")
    pipes = make(CAPTIONS, IDS, 2023, tmp_path, {"run": "b"})
    names = sorted(path.name for path in pipes.parent.iterdir())
    assert names == ["caption_prediction_test.csv", "kept", "manifest.json", "notes.txt"]
    assert os.readlink(pipes.parent / "kept" / "link") == "nowhere"
    assert os.listdir(tmp_path) == ["caption-test"]


def test_a_disk_that_refuses_leaves_the_earlier_submission(tmp_path, monkeypatch):
    make(CAPTIONS, IDS, 2026, tmp_path, {"run": "a"})
    before = everything(tmp_path)

    def full(path, content):
        if path.name == "manifest.json":
            raise OSError(28, "No space left on device", str(path))
        return write(path, content)

    write = folder.store.write
    monkeypatch.setattr(folder.store, "write", full)
    with pytest.raises(OSError, match="No space"):
        make(dict.fromkeys(IDS, "other"), IDS, 2026, tmp_path, {"run": "b"})
    assert everything(tmp_path) == before


def test_a_file_in_place_of_the_folder_stays(tmp_path):
    (tmp_path / "caption-test").write_text("mine")
    with pytest.raises(NotADirectoryError):
        make(CAPTIONS, IDS, 2026, tmp_path, {"run": "a"})
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("caption-test", "mine")]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_folders_change_places_with_and_without_the_help_of_the_system(can_exchange, tmp_path, monkeypatch):
    if can_exchange and sys.platform != "linux":
        pytest.skip("Linux alone exchanges two folders in one step")
    if not can_exchange:
        monkeypatch.setattr(folder, "_exchanged", lambda one, two: False)
    for run in ("a", "b", "c"):
        upload = make(CAPTIONS, IDS, 2025, tmp_path, {"run": run})
        assert json.loads((upload.parent / "manifest.json").read_text())["run"] == run
        assert os.listdir(tmp_path) == ["caption-test"]
    (tmp_path / "there" / "caption-test").mkdir(parents=True)
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "caption-test").symlink_to(tmp_path / "there" / "caption-test")
    make(CAPTIONS, IDS, 2025, tmp_path / "link", {})
    assert (tmp_path / "link" / "caption-test").is_symlink()
    assert (tmp_path / "there" / "caption-test" / "submission.zip").is_file()


_AGAIN = """
import sys
from pathlib import Path
from harness.submission import make
ids = [f"scan_{n}" for n in range(300)]
print("ready", flush=True)
for n in range(int(sys.argv[2]), 10**9):
    make({key: f"{n} {key}" for key in ids}, ids, 2026, Path(sys.argv[1]), {"round": n})
"""


@pytest.mark.ci
@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone exchanges two folders in one step")
def test_kill_9_at_any_time_leaves_a_whole_submission(tmp_path):
    ids = [f"scan_{number}" for number in range(300)]
    upload = make(dict.fromkeys(ids, "first"), ids, 2026, tmp_path, {"round": -1})
    rounds = set()
    for number in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", _AGAIN, str(tmp_path), str(number * 10**6)], stdout=subprocess.PIPE
        )
        process.stdout.readline()
        time.sleep(random.Random(number).uniform(0.05, 0.4))
        process.send_signal(signal.SIGKILL)
        process.wait()
        manifest = json.loads((upload.parent / "manifest.json").read_text())
        assert manifest["sha256"] == hashlib.sha256(upload.read_bytes()).hexdigest()
        with zipfile.ZipFile(upload) as archive:
            text = archive.read("submission.csv")
        assert text == (upload.parent / "submission.csv").read_bytes()
        row = next(csv.reader(text.decode().splitlines()[1:]))[1]
        assert row == (f"{manifest['round']} scan_0" if manifest["round"] >= 0 else "first")
        assert check(upload, ids, 2026) == []
        rounds.add(manifest["round"])
    assert len(rounds) > 1
    make(dict.fromkeys(ids, "last"), ids, 2026, tmp_path, {})
    assert os.listdir(tmp_path) == ["caption-test"], "what was killed leaves nothing for good"


@pytest.fixture
def run(tmp_path) -> Path:
    """A run that predicted six images of both splits, and its data folder."""
    steps = tmp_path / "runs" / "steps"
    for step in ("predict-1", "postprocess-1"):
        write_captions(steps / step / "predictions.csv", CAPTIONS)
    (steps / "score-1").mkdir()
    rows = "".join(f"{key},a,b,0.5\r\n" for key in IDS)
    (steps / "score-1" / "per_image.csv").write_text(f"ID,reference,prediction,rouge1\r\n{rows}")
    (tmp_path / "data" / "test").mkdir(parents=True)
    (tmp_path / "data" / "test" / "scan_0.jpg").touch()
    for split in ("train", "valid"):
        rows = "".join(f"{key}\tx\n" for key in IDS)
        (tmp_path / "data" / f"caption_prediction_{split}_labels.csv").write_text(f"ID\tcaption\n{rows}")
        (tmp_path / "data" / f"concept_detection_{split}_labels.csv").write_text(f"ID\tcuis\n{rows}")
    (tmp_path / "data" / "test_ids.csv").write_text("\n".join(["ID", *IDS]))
    folder = tmp_path / "runs" / "exp" / "base-s1"
    folder.mkdir(parents=True)
    artifacts = {
        f"predictions/{split}_before.csv": "steps/predict-1/predictions.csv" for split in ("valid", "test")
    }
    artifacts |= {
        f"predictions/{split}_after.csv": "steps/postprocess-1/predictions.csv" for split in ("valid", "test")
    }
    artifacts["scores/valid_after_per_image.csv"] = "steps/score-1/per_image.csv"
    record = {
        "name": "exp",
        "variant": "base",
        "seed": 1,
        "status": "FINISHED",
        "edition": 2026,
        "command": COMMAND,
        "git": {"commit": None, "dirty": None},
        "standin_model": True,
        "config": {},
        "artifacts": artifacts,
        "data": {"root": "data", "layout": "imageclef2023", "splits": {"valid": 6, "test": 6, "train": 6}},
    }
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def others(count: int) -> dict[str, str]:
    return {f"other_{number}": "x" for number in range(count)}


DAMAGE = {
    "cut at a row": (lambda text: "".join(text.splitlines(keepends=True)[:4]), ["3 captions", "has 6"]),
    "cut inside a row": (lambda text: text[: text.index("scan_3") + 9], ["captions; the"]),
    "cut inside quotes": (lambda text: text[:40] + ',"a caption that', ["not CSV"]),
    "empty": (lambda text: "", ["is empty"]),
    "header alone": (lambda text: "ID,caption\r\n", ["a header and nothing else"]),
    "twice": (lambda text: text + "scan_0,again\r\n", ["a repeated id: scan_0"]),
    "one for another": (
        lambda text: text.replace("scan_5", "other"),
        ["1 id (scan_5): missing", "1 id (other): not of the split"],
    ),
    "one more": (lambda text: text + "other,x\r\n", ["7 captions", "other"]),
    "another split": (lambda text: text.replace("scan", "train"), ["6 ids (scan_0", "6 ids (train_0"]),
    "bytes": (lambda text: "\ud8ff" + text, ["UTF-8"]),
}


@pytest.mark.parametrize("split", ["valid", "test"])
@pytest.mark.parametrize("case", DAMAGE)
def test_a_run_knows_its_size_and_its_ids(case, split, run):
    damage, words = DAMAGE[case]
    record = run_record(run)
    assert predictions(run, record, split) == CAPTIONS
    file = run.parents[1] / "steps" / "postprocess-1" / "predictions.csv"
    file.write_bytes(damage(file.read_bytes().decode()).encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError) as error:
        predictions(run, record, split)
    assert error.value.exit_code == 3
    for word in words:
        assert word in str(error.value)
    assert f"The run makes it again: {COMMAND}" in str(error.value)
    assert "Delete" not in str(error.value)


def test_captions_altered_since_the_step_left_them_are_not_submitted(run):
    file = run.parents[1] / "steps" / "postprocess-1" / "predictions.csv"
    seal(file.parent, {})
    assert predictions(run, run_record(run), "test") == CAPTIONS
    file.write_bytes(file.read_bytes().replace(b"caption scan_0", b"caption scan_1"))
    with pytest.raises(UserError) as error:
        predictions(run, run_record(run), "test")
    assert error.value.exit_code == 3
    assert "not what the step left: its SHA-256 differs" in str(error.value)
    assert f"The run makes it again: {COMMAND}" in str(error.value)


def test_a_record_without_sizes_and_layout_is_compared_with_what_there_is(run, monkeypatch):
    monkeypatch.chdir(run.parents[2])
    record = run_record(run)
    for key in ("splits", "layout"):
        del record["data"][key]
        assert predictions(run, record, "test") == CAPTIONS
    file = run.parents[1] / "steps" / "postprocess-1" / "predictions.csv"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:4]))
    with pytest.raises(UserError, match=r"3 ids .*missing"):
        predictions(run, record, "test")
    del record["data"]
    with pytest.raises(UserError, match=r"3 ids .*missing"):
        predictions(run, record, "test")


def test_ids_of_the_data_folder_count_where_none_are_given(run, monkeypatch):
    monkeypatch.chdir(run.parents[2])
    record = run_record(run)
    assert predictions(run, record, "test") == CAPTIONS
    Path("data/test_ids.csv").write_text("\n".join(["ID", *IDS, "scan_6"]))
    with pytest.raises(UserError) as error:
        predictions(run, record, "test")
    assert "1 id (scan_6): missing, compared with the test split in data" in str(error.value)
    assert "--ids FILE" in str(error.value)
    assert predictions(run, record, "test", IDS) == CAPTIONS


def test_make_of_half_a_split_exits_with_3_and_writes_nothing(run):
    file = run.parents[1] / "steps" / "postprocess-1" / "predictions.csv"
    make = ("submission", "make", "runs/exp/base-s1")
    top = run.parents[2]
    assert harness(top, *make).stderr == ""
    before = everything(top / "submissions")
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:4]))
    for more in ([], ["--out", "new"]):
        done = harness(top, *make, *more, code=3)
        assert "holds 3 captions; the test split of the run has 6" in done.stderr
    assert everything(top / "submissions") == before
    assert not (top / "new").exists()


def test_a_pipe_in_place_of_another_file_of_the_run_is_not_waited_for(run):
    other = run.parents[1] / "steps" / "predict-1" / "predictions.csv"
    other.unlink()
    os.mkfifo(other)
    harness(run.parents[2], "submission", "make", "runs/exp/base-s1", timeout=60)
