"""Writing: a disk that fills up costs nothing but an error, and no device is replaced."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from support.disks import fill, small_disk
from support.experiments import EXPERIMENT
from support.models import load_tiny, stages

from harness.cli.terminal import Terminal
from harness.config.schema import Config
from harness.errors import UserError
from harness.models.loading import save_trained
from harness.steps.plan import prepare
from harness.store import write
from harness.training.resume import Checkpoints, State

TRAIN = {"stages": stages(8, 2), "evaluate_every": 0, "keep_checkpoints": 2}


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", 64) as place:
        settings = yaml.safe_load(EXPERIMENT)
        settings["variants"] = {"opt": {}}
        settings["train"] |= TRAIN
        settings["score"]["metrics"] = ["bertscore", "rouge1"]
        settings["predict"]["splits"] = ["valid"]
        (place / "small.yaml").write_text(yaml.safe_dump(settings))
        yield place


def start(folder: Path) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, "-m", "harness", "run", "small.yaml"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes)


def sealed(folder: Path, at_least: int) -> list[Path]:
    return sorted(folder.glob("runs/steps/train-*/checkpoints/step*/state.json"))[at_least - 1 :]


def test_a_file_that_can_not_be_replaced_stays_and_nothing_lies_beside_it(tmp_path):
    with small_disk(tmp_path / "disk", 1) as place:
        file = write(place / "file", "whole")
        fill(place, 8192)
        with pytest.raises(OSError, match="No space left"):
            write(file, "x" * 100_000)
        assert file.read_text() == "whole"
        assert sorted(path.name for path in place.iterdir()) == ["file", "filler"]


def test_weights_that_do_not_fit_are_an_error_in_words_and_leave_the_last_ones(tiny_folder, tmp_path):
    """safetensors has an exception of its own for it, which is no OSError."""
    model = load_tiny(tiny_folder).model
    with small_disk(tmp_path / "disk", 2) as place:
        best = place / "best.safetensors"
        save_trained(model, best)
        before = best.read_bytes()
        fill(place, 100_000)
        with pytest.raises(UserError, match="No space left"):
            save_trained(model, best)
        assert best.read_bytes() == before
        assert sorted(path.name for path in place.iterdir()) == ["best.safetensors", "filler"]


@pytest.mark.parametrize("leave", [0, 4096])
def test_a_checkpoint_that_can_not_be_sealed_anew_counts_as_before(tmp_path, leave):
    with small_disk(tmp_path / "disk", 1) as place:
        checkpoints, state = Checkpoints(place, 2), State(done=3, step=3, validated=False)
        checkpoints.path(state).mkdir(parents=True)
        (checkpoints.path(state) / "weights.pt").write_bytes(b"x" * 10_000)
        checkpoints.seal(state)
        fill(place, leave)
        state.validated = True
        try:
            checkpoints.seal(state)
        except OSError:
            state.validated = False
        assert checkpoints.newest() == state


@pytest.mark.slow
@pytest.mark.parametrize("leave", [0, 400_000])
def test_a_checkpoint_that_does_not_fit_ends_the_run_and_costs_no_earlier_one(disk, leave):
    """Nothing is left, or space for a part of the next checkpoint."""
    process = start(disk)
    while process.poll() is None and not sealed(disk, 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)
    filler = fill(disk, leave)
    process.send_signal(signal.SIGCONT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1, error
    assert "Traceback" not in error
    assert "the same command continues" in error
    (directory,) = disk.glob("runs/steps/train-*/")
    reached = Checkpoints(directory, 2).newest()
    assert reached.step >= 6
    filler.unlink()
    again = start(disk)
    _, error = again.communicate(timeout=120)
    assert again.returncode == 0, error
    rows = [json.loads(line) for line in (directory / "losses.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 31))
    begun = [row["time"] for row in rows if "loss" in row]
    assert begun[reached.step] - begun[reached.step - 1] > 1  # where the second process began


def test_a_run_whose_images_would_not_fit_does_not_start(tmp_path):
    """The test split's too, which is decoded when training is done."""
    values = {
        "name": "a",
        "data": {"root": tmp_path / "set", "phantom": {"train": 8, "valid": 4, "test": 8}},
        "model": {"checkpoint": "tiny", "image_size": 224},
        "score": {"bertscore": {"checkpoint": "standin"}, "metrics": ["bertscore"]},
    }
    config = Config.model_validate(values)
    need = 20 * 224 * 224 * 3
    with small_disk(tmp_path / "disk", need // 2**20) as disk:
        with pytest.raises(UserError, match=r"decoded images need 3 MB in .*free"):
            prepare([config, config], Terminal(silent=True), disk / "runs")
        without = Config.model_validate(values | {"data": values["data"] | {"cache": False}})
        assert len(prepare([without], Terminal(silent=True), disk / "runs")) == 1
    with small_disk(tmp_path / "other", need // 2**20 + 2) as disk:
        assert len(prepare([config, config], Terminal(silent=True), disk / "runs")) == 2


def test_a_pipe_or_device_is_not_replaced_by_a_file(tmp_path):
    """As `submission check --fix /dev/null` did for the user root."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileExistsError, match="a device or a pipe"):
        write(tmp_path / "pipe", "x")
    assert (tmp_path / "pipe").is_fifo()
    assert os.listdir(tmp_path) == ["pipe"]
