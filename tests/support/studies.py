"""A small study, and its trials as a process sees them."""

import multiprocessing
from pathlib import Path

from harness.study.spec import Study, load
from harness.study.storage import open_study
from harness.study.trials import Trials

BASE = """
name: small
data: {root: data/phantom}
model: {checkpoint: tiny}
predict: {num_beams: 2}
score: {metrics: [bertscore, rouge1]}
"""
STUDY = """
base: small.yaml
space:
  train.learning_rate: {low: 1e-6, high: 1e-3, log: true}
  predict.num_beams: {low: 1, high: 4}
  predict.length_penalty: {low: 0, high: 2, step: 0.1, when: {predict.num_beams: [2, 3, 4]}}
  postprocess.deduplicate: {choices: [false, true]}
sampler: {name: random, seed: 3}
trials: 25
retries: 100
"""
fork = multiprocessing.get_context("fork")


def study(folder: Path, **changes) -> Study:
    """The small study, with other options."""
    (folder / "small.yaml").write_text(BASE)
    (folder / "find.yaml").write_text(STUDY)
    return load(folder / "find.yaml", options=changes)


def opened(spec: Study, folder: Path, chosen: str = "journal") -> Trials:
    """The trials of a study in this process."""
    return Trials(spec, *open_study(spec, folder / spec.name, chosen), folder)
