"""A folder of runs with its own MLflow store, and the contents of the store."""

import json
from pathlib import Path
from typing import Any

import pytest

from harness.store import write, write_json

NAME = "phantom/table3"
ROWS = [
    {"step": step, "time": 1.7e9 + step, "stage": 1, "epoch": 0, "loss": 5 - step / 10, "learning_rate": 1e-5}
    for step in range(1, 21)
]
VALID = {"step": 20, "time": 1.7e9 + 21, "epoch": 1, "valid_loss": 3.5, "valid_bertscore": 0.4}


def score(value: float | None, standin: bool = False) -> dict[str, Any]:
    """A score of a record; None: one that is absent."""
    signature = "bertscore|clef2023|STAND-IN mini" if standin else "rouge1|clef2023|rouge-score:0.1.2"
    bounds = {"low": None, "high": None} if value is None else {"low": value - 0.01, "high": value + 0.01}
    reason = {"reason": "no weights"} if value is None else {}
    return {
        "value": value,
        **bounds,
        "n": 9,
        "signature": signature,
        "official": not standin,
        "seconds": 1,
    } | reason


def record(root: Path, variant: str, status: str = "FINISHED", **changes: Any) -> Path:
    """What run.py writes, for a run with the training step `steps/train-1`."""
    folder = root / NAME / f"{variant}-s1"
    write(root / "steps" / "score-1" / "per_image.csv", "ID,rouge1\na,0.5\n")
    write(folder / "config.yaml", "name: x\n")
    scores = {"rouge1": score(0.25), "bertscore": score(0.6, standin=True), "bleurt": score(None)}
    write_json(
        folder / "run.json",
        {
            "name": NAME,
            "variant": variant,
            "seed": 1,
            "status": status,
            "started": "2026-01-02T03:04:05+00:00",
            "ended": None if status == "RUNNING" else "2026-01-02T04:04:05+00:00",
            "command": "harness run experiments/table3.yaml",
            "edition": 2023,
            "config": {"train": {"epochs": 2}},
            "parameters": {
                "train.epochs": 2,
                "data.prompt": "x" * 7000,
                "model.path": None,
                "variant": variant,
            },
            "standin_model": True,
            "git": {"commit": "abc123", "dirty": True},
            "environment": {"python": "3.11.2", "torch": "2.13.0", "device": "cpu (test)"},
            "data": {
                "root": "data/phantom",
                "layout": "imageclef2023",
                "fingerprints": {"train": "1" * 12, "valid": "2" * 12},
                "splits": {"train": 700, "valid": 100},
            },
            "steps": {"train": "steps/train-1"},
            "scores": {"valid": {"before": {"rouge1": score(0.2)}, "after": scores}},
            "image_gap": {
                "rouge1": {"gap": 0.1, "low": 0.05, "high": 0.15},
                "bertscore": {"reason": "x"},
                "n": 9,
            },
            "baseline": {"caption": "a scan", "rouge1": 0.17},
            "warnings": [],
            "artifacts": {
                "config.yaml": f"{NAME}/{variant}-s1/config.yaml",
                "scores/valid_after_per_image.csv": "steps/score-1/per_image.csv",
                "plots/never_made.png": "steps/none.png",
            },
            "submissions": [],
        }
        | changes,
    )
    return folder


def losses(root: Path, rows: list[dict[str, Any]], end: str = "\n") -> None:
    """The losses.jsonl of the training step."""
    text = "\n".join(json.dumps(row) for row in rows) + end
    write(root / "steps" / "train-1" / "losses.jsonl", text)


@pytest.fixture
def root(tmp_path, monkeypatch, empty_store) -> Path:
    """runs/ in a folder of its own, with a store that plain `mlflow ui` would show there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")  # for the follower not to heed
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    (tmp_path / "mlflow.db").write_bytes(empty_store)
    losses(tmp_path / "runs", [*ROWS, VALID])
    return tmp_path / "runs"


def client() -> Any:
    """MLflow's client of the store in the current folder."""
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{Path('mlflow.db').resolve()}")


def mlflow_runs() -> dict[str, Any]:
    """Every run of the experiment by its name, of which there is one each."""
    experiment = client().get_experiment_by_name(NAME)
    runs = client().search_runs([experiment.experiment_id])
    assert len({run.info.run_name for run in runs}) == len(runs)
    return {run.info.run_name: run for run in runs}


def history(run: Any, key: str) -> list[tuple[int, float]]:
    """Step and value of each point of a metric."""
    points = client().get_metric_history(run.info.run_id, key)
    return sorted((point.step, point.value) for point in points)
