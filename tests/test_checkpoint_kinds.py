# ruff: noqa: E501  (messages stand whole)
"""Wrong files and folders for `model.checkpoint`: the error names the kind and what to do."""

import json
import os

import pytest
from support.commands import harness
from support.experiments import EXPERIMENT

from harness.config.schema import Config
from harness.models.blip2 import sizes
from harness.steps import plan


def configured(checkpoint: str) -> Config:
    score = {"metrics": ["bertscore"], "bertscore": {"checkpoint": "standin"}}
    values = {"name": "a", "data": {"root": "x"}, "model": {"checkpoint": checkpoint}, "score": score}
    return Config.model_validate(values)


def problem(checkpoint: object) -> str:
    config = configured(str(checkpoint))
    sizes.of_model(config.model)
    (found,) = plan.problems(config)
    assert found.key == "model.checkpoint"
    return f"{found.what}\n{found.hint}"


@pytest.fixture
def files(tmp_path):
    for name in ("lavis.pth", "model.safetensors", "pytorch_model.bin", "blip2.zip", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "what", "hint"),
    [
        ("lavis.pth", "a file of weights for LAVIS or plain PyTorch, not a folder", "convert_blip_2_original"),
        ("model.safetensors", "a file of weights without their config, not a folder", "Wanted is a folder in the"),
        ("pytorch_model.bin", "a file of weights without their config, not a folder", "Wanted is a folder in the"),
        ("blip2.zip", "an archive, not a folder", "Unpack it, and name the folder."),
        ("notes.txt", "a file, not a folder", "config.json, *.safetensors or pytorch_model.bin, a tokenizer"),
        ("pipe", "neither a file nor a folder, not a folder", "Wanted is a folder"),
        ("nothing.pth", "no such folder: ", "None"),
    ],
)  # fmt: skip
def test_a_file_is_named_with_what_is_wanted(files, name, what, hint):
    os.mkfifo(files / "pipe")
    told = problem(files / name)
    assert what in told.splitlines()[0]
    assert hint in told.splitlines()[1]


def test_a_file_beside_its_config_leads_to_its_folder(files):
    (files / "config.json").write_text(json.dumps({"model_type": "blip-2"}))
    assert problem(files / "model.safetensors").endswith(f"Name the folder: {files}")


def test_a_folder_that_lacks_something_says_what(files, tmp_path):
    (files / "config.json").write_text(json.dumps({"model_type": "opt"}))
    assert f"{files} holds a model of type opt; blip-2 is allowed" in problem(files)
    (files / "config.json").write_text("[1]")
    assert f"{files / 'config.json'} is not the config of a model" in problem(files)
    (files / "config.json").unlink()
    assert f"{files} has weights, but no config.json" in problem(files)
    lavis = tmp_path / "lavis"
    lavis.mkdir()
    assert f"{lavis} has no weights\n" in problem(lavis)
    (lavis / "blip2.pth").write_bytes(b"x")
    assert f"{lavis} has no weights that transformers reads, but blip2.pth" in problem(lavis)
    cut = tmp_path / "cut"
    cut.mkdir()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (cut / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"{cut} lacks parts that model.safetensors.index.json names" in problem(cut)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "config.json", "tokenizer.json"])
def test_a_pipe_in_a_folder_is_named_instead_of_waited_for(tmp_path, name):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    os.mkfifo(tmp_path / name)
    assert problem(tmp_path) == f"{tmp_path / name} is neither a file nor a folder\nNone"


def test_a_home_folder_is_not_read_and_said_so(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "weights").mkdir()
    assert problem("~/weights").startswith(
        f"~ is not expanded to a home folder here; write {tmp_path}/weights"
    )


@pytest.mark.parametrize("name", ["x" * 200, "x" * 5000, "a/b"], ids=["long", "longer", "hub"])
def test_other_names_are_hub_names(name):
    assert "weights are not on this machine" in problem(name)


def test_a_dry_run_says_it_without_a_traceback(tmp_path):
    (tmp_path / "blip2.pth").write_bytes(b"x")
    (tmp_path / "e.yaml").write_text(EXPERIMENT)
    done = harness(tmp_path, "run", "e.yaml", "--dry-run", "--set", "model.checkpoint=blip2.pth", code=None)
    assert "missing: model.checkpoint: blip2.pth is a file of weights for LAVIS" in done.stdout
    assert "Traceback" not in done.stderr
