"""Checks on a GPU: training against plain PyTorch, resume to the bit, captioning, metrics.

Each test starts processes that see the GPU, since the process of pytest does not see it.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import ranks
from support.golden_pairs import PREDICTIONS, REFERENCES, written
from support.ranks import TESTS, TRAIN, rows

pytestmark = pytest.mark.cuda


@pytest.fixture(scope="module")
def folder(cuda, tiny_folder, tmp_path_factory) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path_factory.mktemp("cuda") / "tiny"))


def on_device(environment: dict[str, str], task: str, kind: str, folder: Path) -> list:
    command = [sys.executable, "-m", "support.on_device", task, kind, str(folder)]
    pipes = {"capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(command, cwd=TESTS, env=environment, **pipes)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def train(environment: dict[str, str], folder: Path, directory: Path, check: bool = True, **given) -> int:
    """Train on one rank with one GPU -> the launcher's exit code."""
    return ranks.train(folder, directory, 1, check, environment, device="cuda", **given)


def test_training_equals_plain_pytorch(cuda, folder, tmp_path):
    train(cuda, folder, tmp_path / "run")
    losses = on_device(cuda, "plain", "cuda", folder)
    found = [row["loss"] for row in rows(tmp_path / "run") if "loss" in row]
    assert found == pytest.approx(losses, rel=1e-4)
    ours, plain = load_file(tmp_path / "run" / "final.safetensors"), torch.load(folder / "plain.pt")
    names = sorted(ours.keys() & plain.keys())
    assert names
    differences = torch.cat([(ours[name] - plain[name]).abs().flatten() for name in names])
    assert differences.max() < TRAIN["learning_rate"]


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_a_killed_training_goes_on_to_the_same_bits(cuda, folder, tmp_path, zero_stage):
    how = {"train": TRAIN | {"checkpoint_every_steps": 2, "zero_stage": zero_stage}, "dropout": 0.1}
    train(cuda, folder, tmp_path / "whole", **how)
    assert train(cuda, folder, tmp_path / "parts", check=False, kill_at=8, **how) != 0
    train(cuda, folder, tmp_path / "parts", **how)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    whole, parts = (load_file(tmp_path / name / "final.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_captions_are_those_of_the_cpu(cuda, folder):
    there, here = (on_device(cuda, "captions", kind, folder) for kind in ("cuda", "cpu"))
    # where two beams are equal but for rounding, either may win
    assert sum(one == other for one, other in zip(there, here, strict=True)) >= len(here) - 1


def test_captured_steps_give_the_captions_of_plain_steps_and_of_generate(cuda, folder):
    rows = on_device(cuda, "decodings", "cuda", folder)
    for number, (captured, plain, generated) in enumerate(rows):
        assert captured == plain
        # where two beams are equal but for rounding, either may win; in bf16, the second half, it is larger
        allowed = 1 if number < len(rows) // 2 else 4
        assert sum(one != other for one, other in zip(plain, generated, strict=True)) <= allowed


def test_scores_are_those_of_the_cpu(cuda, tmp_path):
    for name, values in (("labels.csv", REFERENCES), ("run.csv", PREDICTIONS)):
        (tmp_path / name).write_text(written(values, ",", True, "\n", quoted=True), encoding="utf-8")
    found = {}
    for kind in ("cuda", "cpu"):
        place = tmp_path / kind  # no cache is shared
        place.mkdir()
        command = [sys.executable, "-m", "harness", "score", "../run.csv", "--references", "../labels.csv"]
        options = ["--metrics", "bertscore", "--standins", "--device", kind, "--format", "json"]
        done = subprocess.run([*command, *options], cwd=place, env=cuda, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found[kind] = json.loads(done.stdout)["scores"]["bertscore"]["value"]
    assert found["cuda"] == pytest.approx(found["cpu"], abs=1e-5)
