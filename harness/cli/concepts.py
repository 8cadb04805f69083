"""The table of concept detection: F1 of runs and baselines, on validation and on the half `held`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from harness.data.halves import HELD
from harness.records import name_of

if TYPE_CHECKING:
    from rich.table import Table

Record = Mapping[str, Any]
F1, SECONDARY = "f1", "f1_secondary"


def table(records: Sequence[Record]) -> "Table":
    """One row per run, then one per baseline; `records` have concepts."""
    from rich.table import Table

    floors = _baselines(records)
    title = f"{records[0]['name']}: concepts, {records[0]['data']['splits']['valid']} validation images"
    if any(record["standin_model"] for record in records):
        title += " (by a STAND-IN model: tiny)"
    found = Table(title=title, title_justify="left")
    found.add_column("run", no_wrap=True)
    best = max(floors, key=lambda name: floors[name]["value"] or 0, default=None)
    for name in (F1, f"{F1} ({HELD})", SECONDARY, *([f"above {best} ({HELD})"] if best else [])):
        found.add_column(name, justify="right")
    for record in records:
        concepts, own = record["concepts"], scores(record)
        held = concepts.get("halves", {}).get(HELD, {}).get(F1, {})
        gain = concepts.get("paired", {}).get(best, {}).get(HELD) or {}
        cells = [_value(own.get(F1, {})), _value(held), _value(own.get(SECONDARY, {}))]
        cells += [_interval(gain.get("difference"), gain, "+")] if best else []
        found.add_row(name_of(record), *cells)
    found.add_section()
    for name, one in floors.items():
        found.add_row(name, _value(one), _value(one.get(HELD) or {}), *[""] * (2 if best else 1))
    return found


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
