"""A project with the official standings and records of runs, and `harness leaderboard` on it."""

import json
from pathlib import Path

import numpy as np
import pytest

from harness import leaderboard
from harness.metrics import Score, bootstrap, write_arrays
from harness.store import write_json
from support import commands

ROOT = Path(__file__).parents[2]
SIGNATURE = "bertscore|clef2023|microsoft/deberta-xlarge-mnli|layer:40|idf:no|rescale:no|fp32"


def score(value: float | None, official: bool = True, n: int = 10_437, **more) -> dict:
    """A score of a record; the number of images is that of the validation split of 2023."""
    low, high = (None, None) if value is None else (value - 0.003, value + 0.003)
    signature = SIGNATURE if official else "bertscore|clef2023|STAND-IN x"
    base = {"value": value, "low": low, "high": high, "n": n, "signature": signature, "official": official}
    return base | more


def record(
    name="imageclef2023/table3",
    variant="opt_364",
    bertscore=0.61,
    rouge1=0.25,
    split="valid",
    seed=42,
    parameters_changed=None,
    **more,
) -> dict:
    """The record of a finished run that can be ranked; `more` are changes of the record."""
    scores = {"bertscore": score(bertscore), "rouge1": score(rouge1), "bleurt": score(0.9, official=False)}
    if split == "test":
        scores = {metric: one | {"n": 10_473} for metric, one in scores.items()}
    parameters = {
        "variant": variant,
        "seed": seed,
        "model.language_model": True,
        "model.image_size": 364,
        "postprocess.deduplicate": False,
    }
    found = {
        "name": name,
        "variant": variant,
        "seed": seed,
        "status": "FINISHED",
        "started": "2026-01-01T00:00:00+00:00",
        "ended": "2026-01-02T03:04:05+00:00",
        "command": "harness run experiments/table3.yaml",
        "edition": 2023,
        "config": {"data": {"phantom": None}},
        "parameters": parameters | (parameters_changed or {}),
        "standin_model": False,
        "git": {"commit": "c0ffee" * 6, "dirty": False},
        "scores": {split: {"before": scores, "after": scores}},
        "image_gap": {"rouge1": {"gap": 0.02, "low": 0.01, "high": 0.03}},
    }
    return found | more


def scored(values: np.ndarray, metric: str = "bertscore", signature: str = SIGNATURE) -> Score:
    """The score of images with these values (n,), with its interval."""
    low, high = bootstrap.interval(bootstrap.resample({"": values}, {"": None}, 1_000)[""])
    return Score(metric, float(values.mean()), low, high, len(values), signature, True, 0.0, per_image=values)


def write_scored(root: Path, run: dict, scores: dict[str, Score], references: str = "same") -> Path:
    """The folder of a run with these scores of its images after post-processing, as scoring leaves them."""
    (split,) = run["scores"]
    plain = {metric: one.as_dict() for metric, one in scores.items()}
    step = f"steps/score-{run['variant']}-{run['seed']}"
    ids = [f"i{n}" for n in range(next(iter(scores.values())).n)]
    write_arrays(root / "runs" / step / "arrays.npz", ids, scores)
    write_json(root / "runs" / step / "scores.json", {"scores": plain, "references": references})
    after = run["scores"][split]["after"] | plain
    steps = {"steps": {"score-after": step}} if split == "valid" else {}
    return write_run(root, run | steps | {"artifacts": {}, "scores": {split: {"after": after}}})


def write_run(root: Path, run: dict) -> Path:
    """The folder of a run with this record."""
    folder = root / "runs" / run["name"] / f"{run['variant']}-s{run['seed']}"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "config.yaml").write_text("name: x\n")
    return folder


@pytest.fixture
def project(tmp_path) -> Path:
    """A folder with the official standings and no runs."""
    (tmp_path / "leaderboard").mkdir()
    for year in (2023, 2026):
        text = (ROOT / "leaderboard" / f"{year}.csv").read_bytes()
        (tmp_path / "leaderboard" / f"{year}.csv").write_bytes(text)
    return tmp_path


def board(project: Path, edition: int = 2023) -> leaderboard.Board:
    """The leaderboard of a project."""
    return leaderboard.board(edition, project / "runs", project / "leaderboard")


def harness(folder: Path, *arguments: str, code: int = 0) -> str:
    """What `harness leaderboard` prints."""
    done = commands.harness(folder, "leaderboard", *arguments, code=code)
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr
