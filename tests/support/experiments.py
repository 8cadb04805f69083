"""Experiment files: a small one that runs in seconds, and the messages for a file with mistakes."""

import shutil
from pathlib import Path

import pytest

from harness.config.experiment import load
from harness.errors import UserError
from support.commands import harness

EXPERIMENT = """
name: small
device: cpu
data:
  root: data/phantom
  phantom: {train: 48, valid: 12, test: 6, seed: 3}
model:
  checkpoint: tiny
  image_size: 56
  tiny: {patch_size: 14, hidden_size: 32, vision_layers: 1, qformer_layers: 2, num_query_tokens: 4,
         text_hidden_size: 48, text_layers: 1, vocab_size: 400, text_epochs: 2}
train:
  stages:
    - {epochs: 2, losses: {caption: 1, concept: 1}}
    - {epochs: 1, losses: {caption: 1}}
  batch_size: 16
  micro_batch_size: 8
  learning_rate: 1e-3
  warmup_steps: 2
  evaluate_images: 6
predict: {num_beams: 2, max_new_tokens: 24}
score:
  metrics: [bertscore, rouge1, bleu1, cider]
  bertscore: {checkpoint: standin}
  bootstrap: 200
variants:
  opt: {}
  opt_dedup: {postprocess: {deduplicate: true}}
"""


def run_small(folder: Path, empty_store: bytes) -> None:
    """Run the small experiment in `folder`/run, and keep what it left on disk in `folder`/kept.

    MLflow knows the place of its artifacts, so that only the first is a whole project. Both begin with an
    empty store: to make its tables takes as long as the run.
    """
    place = folder / "run"
    for project in (place, folder / "kept"):
        project.mkdir()
        (project / "mlflow.db").write_bytes(empty_store)
    (place / "small.yaml").write_text(EXPERIMENT)
    done = harness(place, "run", "small.yaml")
    (folder / "stdout").write_text(done.stdout)
    (folder / "stderr").write_text(done.stderr)
    for name in ("data", "runs", "submissions"):
        shutil.copytree(place / name, folder / "kept" / name)


def begin(finished: Path, folder: Path, experiment: str = EXPERIMENT) -> Path:
    """A project with the images and the untrained model of what `run_small` keeps."""
    kept = finished / "kept"
    for name in ("data", *(step.relative_to(kept) for step in kept.glob("runs/steps/tiny-*/"))):
        shutil.copytree(kept / name, folder / name)
    shutil.copy(kept / "mlflow.db", folder)
    (folder / "small.yaml").write_text(experiment)
    return folder


def write(folder: Path, text: str, name: str = "e.yaml") -> Path:
    """An experiment file of this text."""
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def messages(file: Path, *sets: str) -> list[str]:
    """The problems of a file that is refused."""
    with pytest.raises(UserError) as caught:
        load(file, sets)
    assert caught.value.exit_code == 2
    return [str(problem) for problem in caught.value.problems]
