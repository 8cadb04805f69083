"""Runs of the families `prefix` and `vlm` by the command: killed, on two ranks, and combined."""

import csv
import functools
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file
from support import prefix, vlm_checkpoints
from support.commands import by_server, harness
from support.shared_folders import made_once

pytestmark = pytest.mark.slow
KEPT = ("step", "loss", "caption_loss", "reward_loss", "valid_loss", "valid_primary")


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """A function that writes the experiment of a family, with changes, into a folder."""
    parts = made_once(tmp_path_factory, "prefix", prefix.build)
    made = functools.cache(lambda kind: vlm_checkpoints.make(kind, tmp_path_factory.mktemp("vlm") / kind))

    def write(folder: Path, kind: str, *changes: tuple[str, str]) -> Path:
        text = prefix.EXPERIMENT.replace("LANGUAGE", str(parts / "llama"))
        if kind != "prefix":
            text = vlm_checkpoints.RUN.format(folder=made(kind))
        for before, after in changes:
            assert before in text
            text = text.replace(before, after)
        folder.mkdir(exist_ok=True)
        (folder / "family.yaml").write_text(text)
        return folder

    return write


def rows(folder: Path) -> list[dict]:
    return [
        json.loads(line)
        for file in folder.glob("runs/steps/train-*/losses.jsonl")
        for line in file.read_text().splitlines()
    ]


def numbers(folder: Path) -> list[dict]:
    return [{key: row[key] for key in KEPT if key in row} for row in rows(folder)]


def captions(folder: Path) -> dict[str, str]:
    (record,) = (json.loads(file.read_text()) for file in folder.glob("runs/*/*/run.json"))
    assert record["status"] == "FINISHED"
    files = {split: record["artifacts"][f"predictions/{split}_before.csv"] for split in ("valid", "test")}
    return {split: (folder / "runs" / file).read_text() for split, file in files.items()}


@pytest.mark.parametrize(("kind", "after"), [("blip", 5), ("qwen2_5_vl", 3), ("gemma3", 5), ("prefix", 5)])
def test_a_killed_run_goes_on_to_the_same_bits(experiment, tmp_path, kind, after):
    """kill -9 in the first or second of two stages, with adapters and dropout; then the same command."""
    often = ("  warmup_steps: 2\n", "  warmup_steps: 2\n  checkpoint_every_steps: 1\n")
    whole, cut = (experiment(tmp_path / name, kind, often) for name in ("whole", "cut"))
    harness(whole, "run", "family.yaml")
    nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = by_server("run", "family.yaml", server="commands")
    process = subprocess.Popen(command, cwd=cut, env=environment, **nowhere)
    until = time.monotonic() + 300
    while len([row for row in rows(cut) if "loss" in row]) < after:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    assert not list(cut.glob("runs/steps/train-*/DONE"))
    harness(cut, "run", "family.yaml")
    assert numbers(cut) == numbers(whole)
    one, other = (
        load_file(next(place.glob("runs/steps/train-*/best.safetensors"))) for place in (whole, cut)
    )
    assert one.keys() == other.keys()
    assert all(bool((one[name] == other[name]).all()) for name in one)
    assert captions(cut) == captions(whole)


@pytest.mark.parametrize("kind", ["blip", "qwen3_vl", "gemma3", "prefix"])
@pytest.mark.parametrize("zero_stage", [0, 2])
def test_two_ranks_train_and_caption_as_one(experiment, tmp_path, kind, zero_stage):
    """Without dropout, which each rank draws for itself; images of a batch differ in shape."""
    one, two = (experiment(tmp_path / name, kind) for name in ("one", "two"))
    settings = ("model.lora.dropout=0", "train.language_dropout=0", "train.micro_batch_size=2")
    common = [word for setting in settings for word in ("--set", setting)]
    harness(one, "run", "family.yaml", *common)
    harness(two, "run", "family.yaml", *common, "--set", f"train.zero_stage={zero_stage}", "--nproc", "2")
    losses = [[row["loss"] for row in rows(folder) if "loss" in row] for folder in (one, two)]
    assert len(losses[0]) == 6
    np.testing.assert_allclose(*losses, rtol=1e-3, atol=1e-4)
    assert captions(one) == captions(two)


COMBINED = """
seeds: [1, 2]
variants:
  plain: {}
  retrieved: {model: {prompt: {retrieved: 3, words: 6, text: see}}}
  agreed: {predict: {samples: {count: 2}}, consensus: {}}
  named: {model: {prompt: {concepts: found/knn-s42, most: 2, text: see}}}
"""
FINDS = """
name: found
task: concepts
model: {family: encoder, vision_checkpoint: tiny, image_size: 28,
        tiny: {patch_size: 14, hidden_size: 32, vision_layers: 1, vision_epochs: 1}}
train: {stages: []}
concepts: {predictor: knn, knn: {neighbours: 3}}
score: {bootstrap: 50}
variants: {knn: {}}
"""
SOUP = """
base: family.yaml
name: soup
seeds: [1]
soup: {runs: [NAME/plain-s1, NAME/plain-s2]}
variants: {average: {}}
"""


@pytest.mark.parametrize(("kind", "name"), [("prefix", "prefix"), ("qwen3_vl", "vlm")])
def test_what_combines_runs_and_captions_works_for_each_family(experiment, tmp_path, kind, name):
    """Soups, retrieved captions or predicted concepts in the prompt, the consensus of beams and samples."""
    folder = experiment(tmp_path, kind)
    data = yaml.safe_load((folder / "family.yaml").read_text())["data"]
    (folder / "found.yaml").write_text(FINDS + yaml.safe_dump({"device": "cpu", "data": data}))
    harness(folder, "run", "found.yaml")
    with (folder / "family.yaml").open("a") as file:
        file.write(COMBINED)
    (folder / "soup.yaml").write_text(SOUP.replace("NAME", name))
    harness(folder, "run", "family.yaml")
    harness(folder, "run", "soup.yaml")
    runs = {file.parent.name: json.loads(file.read_text()) for file in folder.glob("runs/*/*/run.json")}
    assert len(runs) == 10
    assert {run["status"] for run in runs.values()} == {"FINISHED"}
    soup = runs["average-s1"]["soup"]
    assert [one["name"] for one in soup["candidates"]] == [f"{name}/plain-s1", f"{name}/plain-s2"]
    assert all(np.isfinite(one["score"]) for one in [*soup["candidates"], *soup["trials"]])
    assert len(soup["trials"]) == 1

    def table(run: str, artifact: str) -> list[dict[str, str]]:
        with (folder / "runs" / runs[run]["artifacts"][artifact]).open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    prompts = table("retrieved-s1", "prompts/train.csv")
    assert len(prompts) == 24
    for row in prompts:
        neighbours = row["neighbours"].split()
        assert len(neighbours) == 3
        assert row["ID"] not in neighbours
        assert row["prompt"].startswith("Similar: ")
    predicted = {row["ID"]: row["CUIs"] for row in table("knn-s42", "concepts/valid.csv")}
    for row in table("named-s1", "prompts/valid.csv"):
        assert set(row["CUIs"].split(";")) <= set(predicted[row["ID"]].split(";"))
        assert row["prompt"].startswith("The image shows ")
    said = [(row["ID"], row["caption"]) for row in table("agreed-s1", "predictions/valid_candidates.csv")]
    chosen = table("agreed-s1", "consensus/valid.csv")
    assert len(chosen) == 6
    assert all((row["ID"], row["caption"]) in said for row in chosen)
