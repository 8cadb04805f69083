"""`harness report`: one run as an HTML page."""

from pathlib import Path
from typing import Annotated

import typer

from harness.cli.terminal import OfRun, Terminal


def report(
    run: OfRun,
    out: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="File to write; by default report.html in the run's folder."),
    ] = None,
) -> None:
    """Write one self-contained page of a run: config, curves, scores, and captions with their images.

    Example: harness report runs/quickstart/opt_364-s42
    """
    from harness import report as pages

    print(pages.write(run, out, Terminal().say))
