"""`harness run`: an experiment's runs, in this process, on several devices or on several machines."""

import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from harness.cli import plans
from harness.cli.terminal import (
    DeviceOption,
    Experiment,
    Format,
    Output,
    Replace,
    Sets,
    Terminal,
    Variants,
    command_line,
    configs_of,
)
from harness.errors import UserError
from harness.machine import launch, ranks
from harness.output.visible import json_text, print_csv


def run(
    experiment: Experiment,
    variants: Variants = None,
    sets: Sets = None,
    device: DeviceOption = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Devices (or processes, on CPUs) of this machine to train on.")
    ] = None,
    hostfile: Annotated[
        Path | None, typer.Option(help="File with a line `name slots=8` for each host, as for DeepSpeed.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option(help="Print a line for each run: state, time, memory, disk; start nothing.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="With --dry-run: config, steps and forecasts of each run.")
    ] = False,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="Overrides the name of the experiment.")
    ] = None,
    replace: Replace = False,
    weights: Annotated[
        bool, typer.Option("--weights", help="Make deleted weights again, even if no step needs them.")
    ] = False,
    output: Output = Format.table,
) -> None:
    """Train, caption, post-process, score, write the submission, and mirror it all to MLflow.

    After an interruption the same command continues where it stopped. Finished steps are not repeated.

    Example: harness run experiments/quickstart.yaml --dry-run
    """
    configs = configs_of(experiment, [*(sets or ()), *([f"name={name}"] if name else [])], device, variants)
    if dry_run:
        plans.show(configs, output, experiment, verbose, replace)
        return
    if (hostfile or (nproc or 1) > 1) and not launch.is_rank():
        sys.exit(_launched(configs, nproc, hostfile))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    run_all(experiment, configs, output, replace, weights)


def _launched(configs: list[Any], nproc: int | None, hostfile: Path | None) -> int:
    from harness.machine import device
    from harness.training.schedule import indivisible

    if hostfile:
        return launch.on_hosts(sys.argv[1:], hostfile, nproc)
    count = nproc or 1
    found = [device.shortage(config.device, count) for config in configs]
    found += [indivisible(config.train, count) for config in configs if config.trains]
    if problems := list(dict.fromkeys(filter(None, found))):
        raise UserError(problems)
    return launch.here(sys.argv[1:], count)


def run_all(
    experiment: Path, configs: list[Any], output: Format, replace: bool = False, weights: bool = False
) -> list[dict[str, Any]]:
    """Run all configs, in this process or as one of several ranks -> their records.

    Only rank 0 writes and prints; others get no records. `replace` puts finished runs of the same names but
    other settings into the archive; otherwise they raise `UserError`. `weights` makes deleted ones again.
    """
    from harness.machine import device as devices

    kinds = {devices.probe(config.device).kind for config in configs}
    ranks.start(kinds.pop())
    if ranks.rank():
        _assist(configs)
        return []
    from harness import report as reports
    from harness import run as runs
    from harness import tracking
    from harness.cli.ahead import Ahead
    from harness.config.experiment import base_of
    from harness.keeping import replacing
    from harness.steps.plan import prepare
    from harness.store import RUNS

    terminal = Terminal()
    plans = prepare(configs, terminal)
    replacing.check(plans, terminal, replace)
    ranks.agree(None)  # the data is drawn and checked now, so the other ranks may read it
    terminal.ahead = Ahead(plans)
    records: list[dict[str, Any]] = []
    with tracking.mirroring(RUNS / configs[0].name, terminal.say):
        try:
            for plan in plans:
                try:
                    base = base_of(experiment, plan.config.variant)
                    # an earlier run may have changed what this one takes
                    replacing.check([plan], terminal, replace)
                    records.append(runs.run(plan, terminal, command_line(), base, weights=weights))
                except Exception:
                    with contextlib.suppress(Exception):  # the run's own error matters more than the page's
                        reports.write(plan.folder)
                    raise
                reports.write(plan.folder)
        except UserError:
            if records:
                _print_records(records, output)
            raise
    _print_records(records, output)
    return records


def _assist(configs: list[Any]) -> None:
    from harness import run
    from harness.steps.plan import prepare

    silent = Terminal(silent=True)
    ranks.agree(None)
    for plan in prepare(configs, silent):
        run.assist(plan, silent)


def _print_records(records: list[dict[str, Any]], output: Format) -> None:
    from harness.cli import tables

    if output is Format.json:
        print(json_text(records))
    elif output is Format.csv:
        print_csv(tables.csv(records))
    else:
        tables.show(records)
