"""The table of concept detection: F1 of runs and baselines, on validation and on the half `held`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from harness.cli.widths import Column, Row, Sheet
from harness.data.halves import HELD
from harness.records import name_of

Record = Mapping[str, Any]
F1, SECONDARY = "f1", "f1_secondary"


def table(records: Sequence[Record]) -> Sheet:
    """One row per run, then one per baseline; `records` have concepts."""
    floors = _baselines(records)
    title = f"{records[0]['name']}: concepts, {records[0]['data']['splits']['valid']} validation images"
    if any(record["standin_model"] for record in records):
        title += " (by a STAND-IN model: tiny)"
    best = max(floors, key=lambda name: floors[name]["value"] or 0, default=None)
    columns = [Column("run"), Column(F1, 0), Column(f"{F1} ({HELD})", 1), Column(SECONDARY)]
    columns += [Column(f"above {best} ({HELD})", 2)] if best else []
    rows = []
    for record in records:
        concepts, own = record["concepts"], scores(record)
        held = concepts.get("halves", {}).get(HELD, {}).get(F1, {})
        gain = concepts.get("paired", {}).get(best, {}).get(HELD) or {}
        cells = [_value(own.get(F1, {})), _value(held), _value(own.get(SECONDARY, {}))]
        cells += [_interval(gain.get("difference"), gain, "+")] if best else []
        rows.append(Row([name_of(record), *cells]))
    for name, one in floors.items():
        cells = [name, _value(one), _value(one.get(HELD) or {}), *[""] * (2 if best else 1)]
        rows.append(Row(cells, section=name == next(iter(floors))))
    return Sheet(title, columns, rows)


def notes(records: Sequence[Record]) -> Iterator[str]:
    """What the table's reader must know: how thresholds were chosen, and which scores are absent."""
    for record in records:
        concepts, run = record["concepts"], name_of(record)
        if told := concepts.get("thresholds", {}).get("told"):
            yield f"{run}: {told}"
        for name, score in scores(record).items():
            if score["value"] is None:
                yield f"- {name} is absent: {score['reason']}"
        for name, one in concepts.get("paired", {}).items():
            on_held = one.get("held") or {}
            if on_held.get("low") is not None and on_held["low"] <= 0:
                yield f"{run}: not shown to be better than the {name} on the half {HELD}"
    if any(record["concepts"].get("halves") for record in records):
        yield f"({HELD}): the half of validation on which no threshold was chosen"


def scores(record: Record) -> Mapping[str, Any]:
    """The scores of a run's concepts on validation; none if it learned from validation."""
    return record["concepts"].get("scores", {}).get("valid", {})


def _baselines(records: Sequence[Record]) -> Mapping[str, Any]:
    """The baselines of the first run that has some; they are the same for all runs on the same data."""
    return next((found for record in records if (found := record["concepts"].get("baselines"))), {})


def _value(score: Mapping[str, Any]) -> str:
    return _interval(score.get("value"), score, star="" if score.get("official", True) else "*")


def _interval(value: float | None, ends: Mapping[str, Any], sign: str = "", star: str = "") -> str:
    if value is None:
        return "-"
    interval = "" if ends.get("low") is None else f" [{ends['low']:{sign}.4f}, {ends['high']:{sign}.4f}]"
    return f"{value:{sign}.4f}{star}{interval}"
