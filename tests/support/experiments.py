"""Experiment files: a small one that runs in seconds, and what a file with mistakes gets to read."""

from pathlib import Path

import pytest

from harness.config.experiment import load
from harness.errors import UserError

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


def write(folder: Path, text: str, name: str = "e.yaml") -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def messages(file: Path, *sets: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(file, sets)
    assert caught.value.exit_code == 2
    return [str(problem) for problem in caught.value.problems]
