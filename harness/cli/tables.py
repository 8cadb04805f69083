"""Tables for terminals: scores of runs, checks, statistics."""

import csv as csv_module
import io
import shutil
import statistics as numbers
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.cli import between, concepts
from harness.cli.widths import Column, Row, Sheet, wrapped
from harness.config.editions import EDITIONS
from harness.output.program import spelled
from harness.output.visible import console, json_text, print_csv
from harness.records import comparable, full_name, name_of, nearest_image, task_of
from harness.store import RUNS
from harness.tracking.bookkeeping import pages_of

NOT_COMPARABLE = "* not comparable with official scores: another model, precision or reading"
Record = Mapping[str, Any]


def metric_names(records: Sequence[Record]) -> list[str]:
    """The metrics of these runs on validation, in configured order."""
    names: dict[str, None] = {}
    for record in records:
        for scores in record["scores"].get("valid", {}).values():
            names |= dict.fromkeys(scores)
    return list(names)


def cell(score: Mapping[str, Any] | None) -> str:
    """A score as tables show it: four decimals, a star if it is not official, a dash if it is absent."""
    if score is None or score["value"] is None:
        return "-"
    return f"{score['value']:.4f}" + ("" if score["official"] else "*")


def csv(records: Sequence[Record]) -> str:
    """One row per run, stage and metric, with interval and signature."""
    text = io.StringIO()
    writer = csv_module.writer(text, lineterminator="\n")
    columns = ("value", "low", "high", "n", "official", "signature", "reason")
    writer.writerow(["experiment", "run", "split", "captions", "metric", *columns])
    for record in records:
        stages = [(split, *one) for split, found in record["scores"].items() for one in found.items()]
        found = (record.get("concepts") or {}).get("scores", {})
        stages += [(split, "concepts", scores) for split, scores in found.items()]
        for split, stage, scores in stages:
            for name, score in scores.items():
                values = ["" if score.get(c) is None else score[c] for c in columns]
                writer.writerow([record["name"], name_of(record), split, stage, name, *values])
    return text.getvalue()


def show(records: Sequence[Record]) -> None:
    """Print the score tables of an experiment, their notes, and the paths of all results."""
    screen = console()
    captioned = [record for record in records if task_of(record) == "captions"]
    detected = [record for record in records if record.get("concepts")]
    scored = [record for record in captioned if record["scores"].get("valid")]
    known = [record for record in detected if concepts.scores(record)]
    if scored:
        _captions(captioned).show(screen)
    if known:
        concepts.table(detected).show(screen)
    if not scored and not known:
        screen.print(_unscored(records[0]))
    for line in dict.fromkeys([*_notes(records), *concepts.notes(detected), *_rankings(scored)]):
        screen.print(line)
    for line in between.described(records):
        screen.print(line)
    _next(screen, records)


def _next(screen: Any, records: Sequence[Record]) -> None:
    """Print what to look at next: the page of the best run, the official files, all runs in MLflow."""
    first = between.best(records)
    screen.print("\nNext:")
    screen.print(f"  the best run, in a browser         runs/{full_name(first)}/report.html", soft_wrap=True)
    if any(record["submissions"] for record in records):
        screen.print(f"  the official files, checked        submissions/{first['name']}/", soft_wrap=True)
    screen.print("  all runs side by side              mlflow ui")
    for page in pages_of(RUNS / first["name"]).values():
        screen.print(f"                                     {page}", soft_wrap=True)
    if shutil.which("mlflow") is None:
        screen.print(f"  (first: source {Path(sys.executable).parent / 'activate'})", soft_wrap=True)


def _unscored(record: Record) -> str:
    """Why an experiment has no table of scores."""
    splits = ", ".join(record["config"].get("predict", {}).get("splits") or ())
    predicts = f"it predicts {splits} alone" if splits else "it predicts no split (predict.splits)"
    why = record.get("unscored", {}).get("valid") or predicts
    return f"{record['name']}: no scores on validation: {why}"


def _captions(records: Sequence[Record]) -> Sheet:
    """The score table of runs that caption."""
    names = metric_names(records)
    sizes = records[0]["data"]["splits"]
    title = f"{records[0]['name']}: validation scores, {sizes['valid']} images"
    if any(record["standin_model"] for record in records):
        title += " (captions by a STAND-IN model: tiny)"
    columns = [
        Column("run"),
        *score_columns(names, EDITIONS[records[0]["edition"]].primary),
        Column("image gap (rouge1)", 2),
    ]
    rows = []
    for record in records:
        scores = record["scores"].get("valid", {}).get("after", {})
        rows.append(Row([name_of(record), *(cell(scores.get(name)) for name in names), _gap(record)]))
    if baseline := next((record["baseline"] for record in records if record["baseline"]), None):
        values = [_floor(baseline, name) for name in names]
        rows.append(Row(["constant caption", *values, ""], section=True))
    if nearest := _nearest(records):
        row = [cell(score) if score else "" for score in (_beside(nearest, records, name) for name in names)]
        rows.append(Row(["nearest image", *row, _gap(nearest)], section=not baseline))
    return Sheet(title, columns, rows)


def score_columns(names: Sequence[str], primary: str | None) -> list[Column]:
    """A column for each metric; a narrow terminal keeps the primary and the first other one."""
    first = sorted(names, key=lambda name: name != primary)[:2]
    kept = {name: place for place, name in enumerate(first)}
    return [Column(name, kept.get(name)) for name in names]


def _floor(baseline: Mapping[str, Any], name: str) -> str:
    if name not in baseline:
        return ""
    return cell({"value": baseline[name], "official": name not in baseline["standin"]})


def _nearest(records: Sequence[Record]) -> Record | None:
    """The run with the captions of nearest training images, if there is one and it is not in the table."""
    found = nearest_image(records[0], RUNS)
    return None if found and full_name(found) in map(full_name, records) else found


def _beside(nearest: Record, records: Sequence[Record], name: str) -> Mapping[str, Any] | None:
    """The score of the nearest images, if a run of the table has one that compares."""
    score, *own = (one["scores"].get("valid", {}).get("after", {}).get(name) for one in (nearest, *records))
    return score if any(comparable(score, other) for other in own) else None


def _gap(record: Record) -> str:
    gap = (record["image_gap"] or {}).get("rouge1", {})
    if gap.get("gap") is None:
        return "-"
    interval = f" [{gap['low']:+.4f}, {gap['high']:+.4f}]" if gap.get("low") is not None else ""
    return f"{gap['gap']:+.4f}{interval}"


def _notes(records: Sequence[Record]) -> list[str]:
    notes: dict[str, None] = {}
    captioned = [record for record in records if task_of(record) == "captions"]
    if captioned and (nearest := _nearest(captioned)):
        notes[f"nearest image: the caption of the most similar training image ({full_name(nearest)})"] = None
    every = [
        s for r in records for stages in r["scores"].values() for one in stages.values() for s in one.items()
    ]
    starred = [score for _, score in every]
    starred += [score for r in records if r.get("concepts") for score in concepts.scores(r).values()]
    if any(not score["official"] and score["value"] is not None for score in starred):
        notes[NOT_COMPARABLE] = None
    for name, score in every:
        if score["value"] is None:
            notes[f"- {name} is absent: {score['reason']}"] = None
    for record in records:
        notes |= dict.fromkeys([*record["warnings"], *record["data"].get("notes", ())])
        told = record.get("training", {}).get("notes", ())
        notes |= dict.fromkeys(f"{name_of(record)}: {text}" for text in told)
        gap = (record["image_gap"] or {}).get("rouge1", {})
        if gap.get("low") is not None and gap["low"] <= 0:
            notes[f"{name_of(record)}: its captions fit other images equally well (image gap)"] = None
    return list(notes)


def _rankings(records: Sequence[Record]) -> list[str]:
    return [f"Ranking in {r['edition']}: {EDITIONS[r['edition']].ranking}" for r in records[:1]]


def show_checks(checks: Sequence[Any]) -> None:
    """Print the doctor's checks: one line each, with the fix below if one is needed."""
    screen = console()
    for check in checks:
        screen.print("ok  " if check.ok else "FIX ", style="green" if check.ok else "red", end="")
        first, *more = wrapped(spelled(f"{check.name:<27} {check.found}"), screen.width - 4, " " * 8)
        screen.print("\n".join([first, *more]), soft_wrap=True)
        if check.fix:
            screen.print(spelled(f"     {check.fix}"), soft_wrap=True)  # a command is copied whole


_SHOWN = 20  # concepts in a table


def show_statistics(
    modalities: Mapping[str, Mapping[str, int]],
    lengths: Mapping[str, Sequence[int]],
    concepts: Mapping[str, Any],
    output: str,
) -> None:
    """Print images per modality, the spread of caption lengths, and concepts, as table, JSON or CSV.

    `concepts` are from `data.concepts.described`.
    """
    summary = {
        split: {
            "captions": len(words),
            "words, mean": round(numbers.mean(words), 1),
            "words, median": numbers.median(words),
            "words, longest": max(words),
            "over 32 words": f"{sum(w > 32 for w in words) / len(words):.1%}",
        }
        for split, words in lengths.items()
        if words
    }
    if output == "json":
        print(json_text({"modalities": modalities, "caption_lengths": summary, "concepts": concepts}))
        return
    every = output == "csv"
    bodies = {
        "Images per modality": _by_split(modalities, modalities, 0),
        "Caption lengths": _by_split(summary, modalities),
        "Concepts": _by_split(concepts["summary"], modalities),
        "Images per number of concepts": _per_number(concepts["per_image"], modalities),
        "Images of each concept": _images_of(concepts["frequency"], modalities, every),
        "Concepts of valid that are unseen in train": _images_of(concepts["unseen"], modalities, every),
    }
    if every:
        del bodies["Concepts of valid that are unseen in train"]  # they are in the table of all concepts
        text = io.StringIO()
        rows = [row for body in bodies.values() for row in body]
        csv_module.writer(text, lineterminator="\n").writerows([["", *modalities], *rows])
        print_csv(text.getvalue())
        return
    columns = [Column(""), *(Column(split, number) for number, split in enumerate(modalities))]
    for title, body in bodies.items():
        if body:
            Sheet(title, columns, [Row(list(map(str, row))) for row in body]).show(console())


def _by_split(found: Mapping[str, Mapping[str, Any]], splits: Iterable[str], absent: Any = "") -> list[Any]:
    """A row for each key of any split, with the value of each split."""
    keys = dict.fromkeys(key for values in found.values() for key in values)
    return [[key, *(found.get(split, {}).get(key, absent) for split in splits)] for key in keys]


def _per_number(found: Mapping[str, Mapping[int, int]], splits: Iterable[str]) -> list[Any]:
    """A row for each number of concepts that an image has; a split without labels has no numbers."""
    most = range(min(map(min, found.values()), default=0), max(map(max, found.values()), default=-1) + 1)
    rows = {
        split: {f"{n} concept{'s' * (n != 1)}": counts.get(n, 0) for n in most}
        for split, counts in found.items()
    }
    return _by_split(rows, splits)


def _images_of(found: Sequence[Mapping[str, Any]], splits: Iterable[str], every: bool) -> list[Any]:
    """A row for each concept, or for the first ones and the number of the others."""
    shown = found if every else found[:_SHOWN]
    rows = [
        [f"{one['cui']} {one['name']}".strip(), *(one["images"].get(s, "") for s in splits)] for one in shown
    ]
    if more := len(found) - len(shown):
        rows.append([f"and {more:,} more: --format csv", *("" for _ in splits)])
    return rows
