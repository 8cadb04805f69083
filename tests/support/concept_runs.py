"""Records and files of runs that detect concepts, as a run leaves them, written by other code."""

from typing import Any

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
        "command": "python -m harness run experiments/concepts.yaml",
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
