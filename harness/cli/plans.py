"""`harness run --dry-run`: what each run would do, without doing it."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.cli.terminal import Format
from harness.cli.widths import Column, Row, Sheet
from harness.output.program import spelled
from harness.output.visible import console, json_text, one_line, print_csv
from harness.store import gb


def show(
    configs: Sequence[Any], output: Format, experiment: Path, verbose: bool = False, replace: bool = False
) -> None:
    """Print what each run would do, as a table, JSON or CSV; starts nothing.

    It imports torch only for a model whose memory is measured, and for the free memory of an accelerator if a
    config says auto.

    A table has a line a run; `verbose` prints the config, steps and forecasts of each run instead. JSON has
    all of it. Runs that `run` would refuse to replace are named, unless `replace`.
    """
    from harness.keeping import replacing
    from harness.steps.plan import dry, problems
    from harness.training.forecast import forecast

    rows = []
    for config in configs:
        resolved = json.loads(config.model_dump_json())
        missing = [str(problem) for problem in problems(config)]
        run = f"{config.name}/{config.run_name}"
        rows.append({"run": run, "steps": dry(config), "missing": missing, "config": resolved})
        rows[-1]["training"] = forecast(config)
        rows[-1]["replaces"] = replacing.other_settings(config)
    if output is Format.json:
        print(json_text(rows))
    elif output is Format.csv:
        lines = [["run", "step", "state"], *([r["run"], *item] for r in rows for item in r["steps"].items())]
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(lines)
        print_csv(text.getvalue())
    elif verbose:
        for row in rows:
            _show_one(row)
    else:
        _show_all(configs[0].name, experiment, rows, [_changes(experiment, config) for config in configs])
    if output is Format.table and not replace:
        for line in _refused(rows):
            console().print(line, soft_wrap=True)


def _refused(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for finished runs that `run` would refuse to replace, by the settings that differ."""
    runs: dict[str, list[str]] = {}
    for row in rows:
        if row["replaces"]:
            runs.setdefault("; ".join(row["replaces"]), []).append(row["run"])
    lines = []
    for why, (first, *others) in runs.items():
        have = f"{first} and {len(others)} more have" if others else f"{first} has"
        lines.append(f"refused: {have} finished with other settings: {why}. Add --name NEW_NAME or --replace")
    return lines


def _changes(experiment: Path, config: Any) -> str:
    """The keys that a variant sets, with their values."""
    from harness.config.experiment import variant_of

    def walk(values: Mapping[str, Any], path: str = "") -> list[str]:
        found = []
        for key, value in values.items():
            inner = isinstance(value, dict) and value
            found += walk(value, f"{path}{key}.") if inner else [f"{path}{key}={_short(value)}"]
        return found

    return ", ".join(walk(variant_of(experiment, config.variant)))


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return one_line(text if len(text) <= 40 else f"{text[:39]}…")


def _show_all(name: str, experiment: Path, rows: Sequence[dict[str, Any]], changes: Sequence[str]) -> None:
    screen = console()
    columns = [Column("run"), Column("state", 0), Column("time", 1), Column("memory", 2), Column("disk", 3)]
    columns.append(Column("differs by", 4, text=True))
    built: set[str] = set()
    table = [
        Row([row["run"].removeprefix(f"{name}/"), *_cells(row, built), changed])
        for row, changed in zip(rows, changes, strict=True)
    ]
    Sheet(f"{name}: {len(rows)} run{'s' * (len(rows) != 1)}, nothing is started", columns, table).show(screen)
    waiting = [f"{step}: {state}" for row in rows for step, state in row["steps"].items() if _waits(state)]
    notes = [note for row in rows for note in row["training"]["notes"]]
    missing = [f"missing: {problem}" for row in rows for problem in row["missing"]]
    unknown = [f"unknown: {reason}" for row in rows for reason in row["training"]["unknown"]]
    for line in dict.fromkeys([*waiting, *notes, *missing, *unknown]):
        screen.print(spelled(line), soft_wrap=True)
    if missing:
        fetch = f"missing: the commands that fetch them: harness doctor {experiment}"
        screen.print(spelled(fetch), soft_wrap=True)
    waits = any(state.startswith("to do") for row in rows for state in row["steps"].values())
    if waits and (times := [row["training"]["time"] for row in rows if row["training"]["time"]]):
        screen.print(f"time: a forecast for one {times[0]['device']}; a dash is a time that is not known")
        if len(rows) > 1 and not waiting:
            screen.print("time: what several runs share counts for the first of them")
    if waits and any(row["training"]["memory"] for row in rows):
        screen.print("memory: of training on one device; a range is what auto may take")
    for line in _auto(rows):
        screen.print(line, soft_wrap=True)
    screen.print("Config, steps, memory on more devices and how times are known: --verbose")


def _auto(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for runs that are to do and whose auto takes the same on one device of this machine."""
    runs: dict[str, list[str]] = {}
    for row in rows:
        if (taken := row["training"]["auto"]) and _trains(row["steps"]):
            runs.setdefault(taken, []).append(row["run"])
    lines = []
    for taken, (first, *others) in runs.items():
        take = f"{first} and {len(others)} more take" if others else f"{first} takes"
        lines.append(f"auto: on one device here, {take} {taken}")
    return lines


def _trains(steps: Mapping[str, str]) -> bool:
    return steps.get("train", "").startswith("to do") or any(map(_waits, steps.values()))


def _waits(state: str) -> bool:
    """Whether the steps of a run are not known yet, so `dry` says why in place of them."""
    return state.startswith("to do") and not state.startswith("to do  ")


def _cells(row: Mapping[str, Any], built: set[str]) -> list[str]:
    """State, time, memory and disk of a run; `built` are the steps that earlier runs of the command make."""
    states, found = list(row["steps"].values()), row["training"]
    to_do = sum(state.startswith("to do") for state in states)
    state = f"to do: {to_do} of {len(states)} steps" if to_do else "done"
    return [
        "to do" if any(map(_waits, states)) else state,
        _time(row, built) if to_do else "-",
        _memory(row) if to_do else "-",
        _disk(found["pixel_cache"]) if to_do else "-",
    ]


def _time(row: Mapping[str, Any], built: set[str]) -> str:
    """The time of the long steps that are to do, without those in `built`, which get the others."""
    from harness.training.speed import duration

    every = (row["training"]["time"] or {}).get("steps", {})
    to_do = {name: state for name, state in row["steps"].items() if state.startswith("to do")}
    left = every if any(map(_waits, to_do.values())) else [n for n, s in to_do.items() if s not in built]
    seconds = [every[name] for name in left if name in every]
    built.update(to_do.values())
    return duration(sum(seconds)) if seconds and None not in seconds else "-"


def _memory(row: Mapping[str, Any]) -> str:
    """The memory of training on one device as configured, in GB."""
    found, train = row["training"]["memory"], row["config"]["train"]
    if not found:
        return "-"
    wanted = (train["zero_stage"], train["offload"], 1)
    one = next(r for r in found["per_device"] if (r["zero_stage"], r["offload"], r["devices"]) == wanted)
    ways = {True: ["total_checkpointed"], False: ["total"]}.get(train["gradient_checkpointing"])
    return " to ".join(f"{one[way] / 1e9:.1f}" for way in ways or ["total_checkpointed", "total"]) + " GB"


def _disk(found: Mapping[str, Any] | None) -> str:
    """What decoded images will need on disk."""
    total = sum(one["bytes"] for one in found["to_build"]) if found else 0
    return gb(total) if total else "-"


def _show_one(row: Mapping[str, Any]) -> None:
    import yaml

    from harness.training.forecast import lines

    print(f"# {row['run']}")
    print(yaml.safe_dump(row["config"], sort_keys=False, allow_unicode=True).rstrip())
    print("# steps")
    for name, state in row["steps"].items():
        print(f"#   {name:24} {state}")
    print("# training")
    for line in lines(row["training"]):
        print(f"#   {line}")
    for problem in row["missing"]:
        print(f"#   missing: {problem}")
    print()
