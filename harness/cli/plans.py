"""`harness run --dry-run`: what each run would do, without doing it."""

import csv
import io
import json
from typing import Any

from harness.cli.terminal import Format
from harness.visible import json_text, print_csv


def show(configs: list[Any], output: Format) -> None:
    """Print what each run would do, as text, JSON or CSV; starts nothing and does not import torch."""
    from harness.steps.plan import dry, problems
    from harness.training.forecast import forecast

    rows = []
    for config in configs:
        resolved = json.loads(config.model_dump_json())
        missing = [str(problem) for problem in problems(config)]
        run = f"{config.name}/{config.run_name}"
        rows.append({"run": run, "steps": dry(config), "missing": missing, "config": resolved})
        rows[-1]["training"] = forecast(config)
    if output is Format.json:
        print(json_text(rows))
    elif output is Format.csv:
        lines = [["run", "step", "state"], *([r["run"], *item] for r in rows for item in r["steps"].items())]
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(lines)
        print_csv(text.getvalue())
    else:
        for row in rows:
            _show_one(row)


def _show_one(row: dict[str, Any]) -> None:
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
