"""What MLflow gets from a run's record, and under which names."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from harness import records
from harness.config.editions import EDITIONS
from harness.data import fraction
from harness.output.masking import masked
from harness.store import damage_of, fingerprint
from harness.training import soups
from harness.training.resume import LOSSES, described, rows_of

_MOST_PARAMETERS = 4  # columns in the table of runs


def scores_of(record: Mapping[str, Any]) -> dict[str, float]:
    """Scores as `valid/bertscore`, `valid/before/bertscore` before post-processing; none that is absent.

    Those of the halves of validation are `tune/bertscore` and `held/bertscore`. MLflow draws a chart for each
    of its metrics, so intervals and baselines are tags (`intervals_of`).
    """
    return {name: float(one["value"]) for name, one in _measured(record).items() if "baseline/" not in name}


def intervals_of(record: Mapping[str, Any]) -> dict[str, str]:
    """What scores are compared with: `interval/valid/bertscore` as `[0.6049, 0.6113]`, and baselines."""
    found = {}
    for name, one in _measured(record).items():
        low, high = one.get("low"), one.get("high")
        interval = "" if low is None or high is None else f"[{low:.4f}, {high:.4f}]"
        if "baseline/" in name:
            found[name] = f"{one['value']:.4f} {interval}".strip()
        elif interval:
            found[f"interval/{name}"] = interval
    return found


def _measured(record: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Every score, gap and baseline that has a value, with its interval if it has one."""
    values: dict[str, Any] = {}
    for split, stages in record["scores"].items():
        for stage, scores in stages.items():
            for metric, score in scores.items():
                key = f"{split}/{metric}" if stage == "after" else f"{split}/{stage}/{metric}"
                values[key] = score
    for metric, gap in (record.get("image_gap") or {}).items():
        if isinstance(gap, Mapping):
            values[f"image_gap/{metric}"] = {**gap, "value": gap.get("gap")}
    for half, one in (record.get("halves") or {}).items():
        for metric, score in one["scores"].items():
            values[f"{half}/{metric}"] = score
        gap = one["image_gap"]["rouge1"]
        values[f"{half}/image_gap"] = {**gap, "value": gap.get("gap")}
    values |= _concepts(record.get("concepts") or {})
    for metric, value in (record.get("baseline") or {}).items():
        values[f"baseline/{metric}"] = {"value": value}
    return {key: one for key, one in values.items() if is_measured(key, one.get("value"))}


def _concepts(found: Mapping[str, Any]) -> dict[str, Any]:
    """Scores as `valid/concept_f1` and `held/concept_f1`; baselines as `baseline/concept_f1/<name>`."""
    stages = {**found.get("scores", {}), **found.get("halves", {})}
    values = {
        f"{split}/concept_{metric}": score for split, one in stages.items() for metric, score in one.items()
    }
    values |= {f"baseline/concept_f1/{name}": one for name, one in found.get("baselines", {}).items()}
    return values


def curves_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row of `losses.jsonl`, as `train/loss` and `train/valid_loss`."""
    return {f"train/{key}": value for key, value in row.items() if is_measured(key, value)}


def is_measured(key: str, value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and key not in ("step", "time", "stage", "epoch")


def rows(record: Mapping[str, Any], root: Path) -> Iterator[dict[str, Any]]:
    """The rows of the training step's `losses.jsonl`, also while training writes them."""
    step = record["steps"].get("train")
    file = root / step / LOSSES if step else None
    if file and file.is_file():
        yield from (row for row in rows_of(file) if isinstance(row.get("time"), int | float))


def tags_of(record: Mapping[str, Any]) -> dict[str, Any]:
    stages = [stage for stages in record["scores"].values() for stage in stages.values()]
    scores = {metric: score for stage in stages for metric, score in stage.items()}
    concepts = record.get("concepts") or {}
    scores |= {f"concept_{name}": one for name, one in concepts.get("scores", {}).get("valid", {}).items()}
    signatures = {metric: score["signature"] for metric, score in scores.items()}
    reasons = {metric: score["reason"] for metric, score in scores.items() if score.get("reason")}
    made_by_standins = [metric for metric, signature in signatures.items() if "STAND-IN" in signature]
    tags = {
        "mlflow.source.name": masked(record["command"]),
        "mlflow.source.git.commit": record["git"]["commit"],
        "git.dirty": record["git"]["dirty"],
        "standin": ", ".join(made_by_standins) or None,
        "standin_model": record.get("standin_model"),
        "soup": soups.described(record["soup"]) if record.get("soup") else None,
        "task": record["config"].get("task"),
        "predictor": concepts.get("predictor"),
        "best_weights": described((record.get("training") or {}).get("best") or {}),
        **{key: record[key] for key in ("edition", "variant", "seed")},
        "command": masked(record["command"]),
        **{f"signature/{metric}": signature for metric, signature in signatures.items()},
        **{f"absent/{metric}": reason for metric, reason in reasons.items()},
        **{f"absent/{split}": why for split, why in record.get("unscored", {}).items()},
        **{f"environment/{name}": version for name, version in record["environment"].items()},
        "git.commit": record["git"]["commit"],
        "training.notes": "\n".join(record.get("training", {}).get("notes", ())) or None,
        "data.fraction": fraction.looked(record) or None,
        "data.notes": "\n".join(record["data"].get("notes", ())) or None,
        **{f"trial/{key}": value for key, value in (record.get("trial") or {}).items()},
        **intervals_of(record),
    }
    return {key: value for key, value in tags.items() if value is not None}


def summary(found: Sequence[Mapping[str, Any]], longest: int) -> str:
    """The scores of an experiment's runs as a Markdown table, for the description of its parent run.

    The best run comes first. As many runs are listed as `longest` characters hold; a note counts the others.
    """
    scored, names = _best_first(found), _names(found)
    lines = [
        f"| run | {' | '.join([*names, 'image gap (rouge1)', 'status'])} |",
        f"|---|{'---:|' * (len(names) + 1)}---|",
        *(_line(record, scores, names) for record, scores in scored),
    ]
    notes = ["Scores on validation, the best run first."]
    if any(score.get("official") is False for _, scores in scored for score in scores.values()):
        notes.append("\\* not comparable with official scores: another model, precision or reading.")
    if any(record.get("standin_model") for record in found):
        notes.append("Captions by a STAND-IN model: tiny.")
    for listed in range(len(scored), 0, -1):
        left_out = f" {listed} of {len(scored)} runs are listed." if listed < len(scored) else ""
        text = "\n".join([*lines[: listed + 2], "", " ".join(notes) + left_out])
        if len(text) <= longest:
            break
    return text


def view(found: Sequence[Mapping[str, Any]]) -> str:
    """The state of MLflow's table of runs, as its button Share stores it: the best first, main scores, and
    the parameters in which the runs differ."""
    metrics = [f"valid/{name}" for name in _names(found)[:2]]
    if any((record.get("image_gap") or {}).get("rouge1", {}).get("gap") is not None for record in found):
        metrics.append("image_gap/rouge1")
    every = [record["parameters"] for record in found]
    keys = [key for one in every for key in one if key not in ("name", "variant")]
    differing = [
        key for key in dict.fromkeys(keys) if any(one.get(key) != every[0].get(key) for one in every)
    ]
    columns = [f"metrics.`{name}`" for name in metrics]
    columns += [f"params.`{key}`" for key in differing[:_MOST_PARAMETERS]]
    first = columns[0] if metrics else "attributes.start_time"
    return json.dumps({"orderByKey": first, "orderByAsc": False, "selectedColumns": columns})


def _names(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """The scores on validation, the primary one of the edition first."""
    names = dict.fromkeys(name for record in found for name in records.on_valid(record))
    primary = EDITIONS[found[0]["edition"]].primary if found else None
    return sorted(names, key=lambda name: name != primary)  # stable


def _best_first(found: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    main = next(iter(_names(found)), None)
    scored = [(record, records.on_valid(record)) for record in found]

    def worth(one: tuple[Mapping[str, Any], Mapping[str, Any]]) -> float:
        value = one[1].get(main, {}).get("value")
        return -math.inf if value is None else value

    return sorted(scored, key=worth, reverse=True)


def _line(record: Mapping[str, Any], scores: Mapping[str, Any], names: Sequence[str]) -> str:
    gap = ((record.get("image_gap") or {}).get("rouge1") or {}).get("gap")
    cells = [_cell(scores.get(name)) for name in names] + ["-" if gap is None else f"{gap:+.4f}"]
    return f"| {' | '.join([records.name_of(record), *cells, record['status']])} |"


def _cell(score: Mapping[str, Any] | None) -> str:
    if score is None or score["value"] is None:
        return "-"
    return f"{score['value']:.4f}" + ("" if score["official"] else "\\*")


def datasets(record: Mapping[str, Any]) -> list[Any]:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    data = record["data"]
    prints = data.get("fingerprints", {})
    return [
        DatasetInput(
            Dataset(
                name=f"{Path(data['root']).name}/{split}"[-500:],
                digest=str(prints.get(split) or fingerprint(data))[:36],
                source_type="local",
                source=json.dumps({"uri": data["root"], "layout": data.get("layout")}),
                profile=json.dumps({"num_rows": count}),
            ),
            [InputTag("mlflow.data.context", split)],
        )
        for split, count in data["splits"].items()
    ]


def artifacts(record: Mapping[str, Any], root: Path, directory: Path) -> list[tuple[str, Path]]:
    """Key and file of each artifact that is undamaged; a submission with all files of its folder."""
    found = [(key, root / path) for key, path in record["artifacts"].items()]
    for upload in record["submissions"]:
        folder = (root.parent / upload).parent
        found += [(f"submissions/{folder.name}/{path.name}", path) for path in sorted(folder.glob("*"))]
    if record["status"] != "RUNNING":
        found.append((records.FILE, directory / records.FILE))
    return [(key, path) for key, path in found if path.is_file() and not damage_of(path)]


def study_tags(study: Mapping[str, Any]) -> dict[str, Any]:
    """The tags of a study's parent run."""
    best = study.get("best") or []
    return {
        "study": study["study"],
        "study/storage": study["storage"],
        "study/objective": ", ".join(study.get("objective", ())),
        **({"study/half": study["half"]} if study.get("half") else {}),
        "study/best_trial": ", ".join(str(trial["number"]) for trial in best),
        **{f"study/{state}": count for state, count in study.get("trials", {}).items()},
    }


def study_scores(study: Mapping[str, Any]) -> dict[str, float]:
    """The best value of each objective, as `best/bertscore`; for a Pareto front the highest of each."""
    best = study.get("best") or []
    return {
        f"best/{name}": max(trial["values"][name] for trial in best) for name in study["objective"] if best
    }


def milliseconds(moment: str | None) -> int | None:
    return int(datetime.fromisoformat(moment).timestamp() * 1000) if moment else None


def cut(value: Any, longest: int) -> str:
    """The value as text, cut to `longest` characters; the artifact config.yaml has the whole value."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    mark = " ... (cut; see config.yaml)"
    return text if len(text) <= longest else text[: longest - len(mark)] + mark
