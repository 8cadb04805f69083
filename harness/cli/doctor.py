"""`harness doctor`: what this machine has and lacks."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from harness.cli.terminal import DeviceOption, Report, ReportFormat, Sets, all_by_name, configs_of
from harness.output.visible import json_text


def doctor(
    experiments: Annotated[
        list[Path] | None,
        typer.Argument(help="Experiments to check this machine for.", callback=all_by_name),
    ] = None,
    sets: Sets = None,
    device: DeviceOption = None,
    selftest: Annotated[
        bool,
        typer.Option("--selftest", help="Also compare the device's results with the CPU's (a minute)."),
    ] = False,
    output: ReportFormat = Report.table,
) -> None:
    """Show what this machine has and lacks: device, versions, weights, Java, disk and memory.

    Example: harness doctor experiments/ablation_364.yaml
    """
    from harness import doctor as diagnosis

    configs = [config for file in experiments or () for config in configs_of(file, sets, device)]
    checks = diagnosis.examine(configs, device or "auto", selftest)
    if output is Report.json:
        print(json_text([vars(check) for check in checks]))
    else:
        from harness.cli import tables

        tables.show_checks(checks)
    if not all(check.ok for check in checks):
        sys.exit(1)
