"""`harness sync`: mirror runs to MLflow."""

import os
from pathlib import Path
from typing import Annotated

import typer

from harness.cli.terminal import run_by_name
from harness.output.visible import one_line


def sync(
    run: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN", help="A run or an experiment; by default all runs.", callback=run_by_name
        ),
    ] = None,
    follow: Annotated[Path | None, typer.Option(hidden=True)] = None,
    parent: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Mirror runs to MLflow at MLFLOW_TRACKING_URI, by default mlflow.db in this folder.

    Example: harness sync runs/quickstart
    """
    from harness import tracking
    from harness.store import RUNS

    if follow is not None:
        tracking.follow(follow, parent or os.getppid())
    else:
        for line in tracking.sync(run or RUNS):
            print(one_line(line))
