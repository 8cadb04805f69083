"""`train.stage1` and `train.stage2` of older files, and the entries of `train.stages` that replaced them."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

_ENTRIES = {"stage1": 0, "stage2": 1}
_LOSSES = {"caption_loss_weight": "caption", "concept_loss_weight": "concept"}


def written(train: Any) -> list[str]:
    """The former keys in a section `train`."""
    return [key for key in _ENTRIES if isinstance(train, Mapping) and key in train]


def renamed(path: Sequence[str]) -> tuple[str, ...] | None:
    """The present path of a former path such as `train.stage1.epochs`; None for any other path."""
    if len(path) != 3 or path[0] != "train" or path[1] not in _ENTRIES:
        return None
    key = ("losses", _LOSSES[path[2]]) if path[2] in _LOSSES else (path[2],)
    return ("train", "stages", str(_ENTRIES[path[1]]), *key)


def explained(train: Mapping[str, Any], default: list[dict[str, Any]]) -> str:
    """What to write instead of the former keys in `train`; `default` are its stages if it has none."""
    stages = copy.deepcopy(train.get("stages", default))
    if not isinstance(stages, list) or len(stages) < 2 or not all(isinstance(s, dict) for s in stages):
        stages = copy.deepcopy(default)
    sets = []
    for path, value in _given(train):
        *inner, last = path[2:]
        entry = stages[int(inner[0])]
        for key in inner[1:]:
            entry[key] = dict(entry[key]) if isinstance(entry.get(key), dict) else {}
            entry = entry[key]
        entry[last] = value
        sets.append(f"{'.'.join(path)}={in_one_line(value)}")
    what = f"train.stages is a list now; write stages: {in_one_line(stages)}"
    return f"{what}, or --set {' --set '.join(sets)}" if sets else what


def _given(train: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for stage in written(train):
        values = train[stage] if isinstance(train[stage], Mapping) else {}
        for key, value in values.items():
            if path := renamed(("train", stage, str(key))):
                yield path, value


def in_one_line(value: Any) -> str:
    """A value as one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=float("inf"))
    return text.removesuffix("\n").removesuffix("\n...")
