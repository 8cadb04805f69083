"""Tables for terminals: scores of runs, checks, statistics."""

import csv as csv_module
import io
import shutil
import statistics as numbers
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.cli import concepts
from harness.config.editions import EDITIONS
from harness.records import comparable, full_name, name_of, nearest_image, task_of
from harness.store import RUNS
from harness.visible import console, json_text, print_csv

if TYPE_CHECKING:
    from rich.table import Table

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
    if captioned:
        screen.print(_captions(captioned))
    if detected:
        screen.print(concepts.table(detected))
    for line in dict.fromkeys([*_notes(records), *concepts.notes(detected), *_rankings(captioned)]):
        screen.print(line)
    screen.print("\nCheckpoints, predictions, scores: " + _paths(f"runs/{full_name(r)}" for r in records))
    screen.print("Reports (images, predictions, curves, for a browser):")
    for record in records:
        screen.print(f"  runs/{full_name(record)}/report.html")
    screen.print("Submissions (checked):")
    for record in records:
        for path in record["submissions"]:
            screen.print(f"  {path}")
    screen.print("All of it, with curves and artifacts:")
    screen.print("  mlflow ui")
    if shutil.which("mlflow") is None:
        screen.print(f"  (first: source {Path(sys.executable).parent / 'activate'})", soft_wrap=True)


def _captions(records: Sequence[Record]) -> "Table":
    """The score table of runs that caption."""
    from rich.table import Table

    names = metric_names(records)
    sizes = records[0]["data"]["splits"]
    title = f"{records[0]['name']}: validation scores, {sizes['valid']} images"
    if any(record["standin_model"] for record in records):
        title += " (captions by a STAND-IN model: tiny)"
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("run", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("image gap (rouge1)", justify="right", no_wrap=True)
    for record in records:
        scores = record["scores"].get("valid", {}).get("after", {})
        table.add_row(name_of(record), *(cell(scores.get(name)) for name in names), _gap(record))
    if baseline := next((record["baseline"] for record in records if record["baseline"]), None):
        values = [_floor(baseline, name) for name in names]
        table.add_section()
        table.add_row("constant caption", *values, "")
    if nearest := _nearest(records):
        row = [cell(score) if score else "" for score in (_beside(nearest, records, name) for name in names)]
        table.add_row("nearest image", *row, _gap(nearest))
    return table


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


def _paths(paths: Any) -> str:
    return ", ".join(dict.fromkeys(paths))


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
        screen.print(f"{check.name:<27} ", end="")
        screen.print(check.found)
        if check.fix:
            screen.print(f"     {check.fix}")


def show_statistics(
    modalities: Mapping[str, Mapping[str, int]], lengths: Mapping[str, Sequence[int]], output: str
) -> None:
    """Print images per modality and the spread of caption lengths, as table, JSON or CSV."""
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
        print(json_text({"modalities": modalities, "caption_lengths": summary}))
        return
    rows = [
        [name, *(modalities[s].get(name, 0) for s in modalities)]
        for name in dict.fromkeys(n for m in modalities.values() for n in m)
    ]
    keys = dict.fromkeys(key for values in summary.values() for key in values)
    more = [[key, *(summary.get(split, {}).get(key, "") for split in modalities)] for key in keys]
    if output == "csv":
        text = io.StringIO()
        csv_module.writer(text, lineterminator="\n").writerows([["", *modalities], *rows, *more])
        print_csv(text.getvalue())
        return
    from rich.table import Table

    for title, body in (("Images per modality", rows), ("Caption lengths", more)):
        table = Table("", *modalities, title=title, title_justify="left")
        for row in body:
            table.add_row(*map(str, row))
        console().print(table)
