"""Mean scores of the images of each modality and of each frequent concept."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from harness.data.statistics import MODALITIES, OTHER, modality
from harness.metrics import aggregate, bootstrap

MOST = 20
"""Concepts that are shown, the most frequent first."""
DRAWS = 1_000


def as_dict(
    scores: Mapping[str, Mapping[str, float | None]],
    cuis: Mapping[str, Sequence[str]],
    names: Mapping[str, str],
) -> dict[str, Any] | None:
    """Mean scores by group, from those of each image and from its true concepts, both by id.

    A score that is no mean over images, as BLEU-1, is left out. None if no image has a concept.
    """
    ids = [key for key in scores if key in cuis]
    metrics = [name for name in next(iter(scores.values()), {}) if aggregate(name) is None]
    if not metrics or not any(cuis[key] for key in ids):
        return None
    values = np.array([[_number(scores[key][name]) for name in metrics] for key in ids])
    kinds = [modality(cuis[key]) for key in ids]
    count = Counter(cui for key in ids for cui in set(cuis[key]))
    has = [(names.get(cui) or cui, [cui in cuis[key] for key in ids]) for cui, _ in count.most_common(MOST)]
    modalities = [(name, [kind == name for kind in kinds]) for name in (*MODALITIES.values(), OTHER)]
    return {
        "metrics": metrics,
        "all": _group("all images", values),
        "modalities": [_group(name, values[rows]) for name, rows in modalities if any(rows)],
        "concepts": [_group(name, values[rows]) for name, rows in has],
        "more": len(count) - len(has),
    }


def _number(value: float | None) -> float:
    return np.nan if value is None else value


def _group(name: str, values: np.ndarray) -> dict[str, Any]:
    """Name, number of images, and for each metric [mean, low, high]; None if an image has no such score.

    The interval is that of a bootstrap over the images; one image has none.
    """
    columns = {str(at): column for at, column in enumerate(values.T) if np.isfinite(column).all()}
    drawn = bootstrap.resample(columns, dict.fromkeys(columns), DRAWS) if columns and len(values) > 1 else {}
    ends = {at: bootstrap.interval(one) for at, one in drawn.items()}
    found = [columns.get(str(at)) for at in range(values.shape[1])]
    scores = [
        None if column is None else [float(column.mean()), *ends.get(str(at), (None, None))]
        for at, column in enumerate(found)
    ]
    return {"name": name, "n": len(values), "scores": scores}
