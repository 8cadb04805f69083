"""Records and files of runs that detect concepts, as a run leaves them, written by other code."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sklearn.metrics import f1_score

from support import reports

Image = tuple[str, Sequence[str], Sequence[str]]
"""Id, true and predicted concepts of one image."""
SIGNATURE = "f1|clef2023|all concepts|like:sklearn"


def score(value: float | None, n: int, official: bool = True, **more: Any) -> dict[str, Any]:
    """A score of a record; None: one that is absent."""
    ends = {"low": None, "high": None} if value is None else {"low": value - 0.004, "high": value + 0.004}
    return {"value": value, "n": n, "signature": SIGNATURE, "official": official, **ends} | more


def concepts(
    held: float = 0.52,
    whole: float = 0.54,
    n: int = 10_437,
    secondary: float | None = 0.91,
    chosen_on: str | None = "tune",
    **more: Any,
) -> dict[str, Any]:
    """The part `concepts` of a record."""
    absent = {} if secondary is not None else {"reason": "no manual concepts in the data"}
    half = n // 2

    def both(value: float, images: int) -> dict[str, Any]:
        return {"f1": score(value, images), "f1_secondary": score(secondary, images - 1, **absent)}

    def floor(value: float) -> dict[str, Any]:
        ends = {"low": value - 0.003, "high": value + 0.003}
        return {"value": value, **ends, "held": {"value": value + 0.001, **ends}}

    def gain(value: float) -> dict[str, Any]:
        one = {"difference": value, "low": value - 0.01, "high": value + 0.01, "p": 0.0002}
        return {**one, "held": one | {"difference": value - 0.02}}

    kind = {"kind": "per_concept", "chosen_on": chosen_on} if chosen_on else {}
    found = {
        "scores": {"valid": both(whole, n)},
        "halves": {"tune": both(2 * whole - held, n - half), "held": both(held, half)},
        "baselines": {"most frequent concept": floor(0.31), "most frequent set": floor(0.33)},
        "paired": {"most frequent concept": gain(whole - 0.31), "most frequent set": gain(whole - 0.33)},
        "thresholds": kind,
        "predictor": "classifier",
        "labels": 2,
    }
    return found | more


def record(
    variant: str = "classifier", seed: int = 42, name: str = "concepts", **more: Any
) -> dict[str, Any]:
    """The record of a finished run that detects concepts only and can be ranked; `more` are changes of it."""
    found = {
        "name": name,
        "variant": variant,
        "seed": seed,
        "status": "FINISHED",
        "started": "2026-01-01T00:00:00+00:00",
        "ended": "2026-01-02T03:04:05+00:00",
        "command": "harness run experiments/concepts.yaml",
        "edition": 2023,
        "config": {"task": "concepts", "data": {"phantom": None}, "concepts": {"predictor": "classifier"}},
        "parameters": {"variant": variant, "seed": seed, "task": "concepts"},
        "standin_model": False,
        "git": {"commit": "c0ffee" * 6, "dirty": False},
        "scores": {},
        "image_gap": None,
        "concepts": concepts(),
    }
    return found | more


def report_record(images: Sequence[Image], variant: str = "base", **more: Any) -> dict[str, Any]:
    """The record of a finished run that detects concepts only, as the page of a run reads it."""
    changes = {
        "task": "concepts",
        "model": {"family": "encoder", "vision_checkpoint": "tiny", "image_size": 224},
        "train": {"stages": [{"epochs": 2, "losses": {"concepts": 1}}]},
        "concepts": {"predictor": "classifier"},
    }
    found = reports.record(variant, changes)
    names = ("train", "detect-valid", "thresholds", "concepts-valid", "score-concepts")
    steps = {name: f"steps/{name}-{variant}" for name in names}
    told = "thresholds (per_concept) chosen on the half tune of valid, 2 images: F1 0.7000"
    kind = {"kind": "per_concept", "chosen_on": "tune", "told": told}
    own = concepts(n=len(images), thresholds=kind)
    empty = {"scores": {}, "image_gap": None, "baseline": None, "warnings": []}
    return found | empty | {"steps": steps, "concepts": own} | more


def both_tasks(images: Sequence[Image], captions: Sequence[reports.Caption], project: Path) -> Path:
    """The folder of a run with captions and concepts."""
    found = reports.record(changes={"concepts": {"predictor": "knn"}})
    more = {name: f"steps/{name}-both" for name in ("concepts-valid", "score-concepts")}
    found |= {"steps": found["steps"] | more, "concepts": concepts(n=len(images))}
    write_steps(project, found, images)
    return reports.write_run(project, found, captions)


def write_run(project: Path, run: Mapping[str, Any], images: Sequence[Image]) -> Path:
    """What a run that detects concepts only leaves on disk -> its folder."""
    write_steps(project, run, images)
    return reports.write_run(project, dict(run), [])


def write_steps(project: Path, run: Mapping[str, Any], images: Sequence[Image]) -> None:
    """The predicted concepts and their scores per image; a step that the record lacks has no file."""
    places = {name: project / "runs" / where for name, where in run["steps"].items()}
    if "concepts-valid" in places:
        rows = [(image, ";".join(predicted)) for image, _, predicted in images]
        reports.table(places["concepts-valid"] / "concepts.csv", ["ID", "CUIs"], rows)
    if "score-concepts" in places:
        header = ["ID", "f1", "reference", "prediction", "missed", "invented"]
        reports.table(places["score-concepts"] / "per_image.csv", header, [*map(_row, images)])


def sklearn_f1(true: Sequence[str], predicted: Sequence[str]) -> float:
    """The F1 of one image as the organisers compute it: binary, over the union of its concepts."""
    union = sorted({*true, *predicted})
    if not union:
        return 1.0
    return f1_score([cui in true for cui in union], [cui in predicted for cui in union])


def _row(image: Image) -> list[str]:
    key, true, predicted = image
    missed, invented = ([c for c in a if c not in b] for a, b in ((true, predicted), (predicted, true)))
    lists = [";".join(one) for one in (true, predicted, missed, invented)]
    return [key, f"{sklearn_f1(true, predicted):.6f}", *lists]
