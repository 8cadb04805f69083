"""`harness data`: check a data set, describe it, or draw a made-up one."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from harness.cli import outputs
from harness.cli.terminal import Format, Output, Report, ReportFormat, Terminal
from harness.errors import Problem, UserError
from harness.output.visible import json_text

app = typer.Typer(
    help="Check a data set, describe it, or draw a made-up one.\n\n"
    "Example: harness data check data/imageclef2023",
    no_args_is_help=True,
)

Root = Annotated[Path, typer.Argument(help="Folder of the data set.")]
LayoutOption = Annotated[
    str, typer.Option("--layout", help="imageclef2023, imageclef2024 (since 2024) or rocov2.")
]


def _data_config(root: Path, layout: str, **more: Any) -> Any:
    from pydantic import ValidationError

    from harness.config.sections import DataConfig
    from harness.config.words import allowed

    try:
        return DataConfig(root=root, layout=layout, **more)
    except ValidationError as error:
        raise UserError(
            [Problem(f"got {layout!r}; {allowed(error.errors()[0], DataConfig)} is allowed", key="--layout")]
        ) from None


@app.command("phantom")
def data_phantom(
    folder: Annotated[Path, typer.Argument(help="Where to draw it; must not exist yet.")],
    train: Annotated[int, typer.Option(min=1)] = 700,
    valid: Annotated[int, typer.Option(min=1)] = 150,
    test: Annotated[int, typer.Option(min=1)] = 150,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Draw a made-up radiology set in the 2023 layout; the same seed draws the same bytes.

    Example: harness data phantom data/phantom --train 700 --valid 100 --test 100
    """
    from harness.config.sections import PhantomConfig
    from harness.data import phantom

    config = PhantomConfig(train=train, valid=valid, test=test, seed=seed)
    there = os.path.exists(folder / phantom.MARKER)  # Path.exists raises for a name that is too long
    if not there:
        outputs.check_folder(folder, "FOLDER", renamed=True)
    draw = phantom.ensure if there else phantom.draw
    draw(folder, config)
    print(f"drew {train} + {valid} + {test} images into {folder}")


@app.command("check")
def data_check(
    root: Root, layout: LayoutOption = "imageclef2023", output: ReportFormat = Report.table
) -> None:
    """Verify labels and images, and print every problem with file and line; exit code 2 if there are any.

    A row that is odd but no mistake, such as a blank caption, gives a note. Only training leaves it out.

    Example: harness data check data/imageclef2023
    """
    from harness.data import REPAIR, examine
    from harness.data.listing import SPLITS, together
    from harness.store import RUNS

    with Terminal().progress("Checking images") as advance:
        found = examine(_data_config(root, layout), RUNS, advance)
    if output is Report.json:
        notes = [finding.problem for finding in found.notes]
        rows = [_plain(p, "problem") for p in found.problems] + [_plain(p, "note") for p in notes]
        print(json_text(rows))
        if found.problems:
            sys.exit(2)
        return
    for note in together(found.notes):
        print(f"note: {note}")
    if found.problems:
        raise UserError(found.causes, REPAIR if found.findings and not found.fatal else None)
    rows = ", ".join(f"{split} {found.rows[split]:,}" for split in SPLITS if split in found.rows)
    print(f"ok: no problems (images: {rows})")


def _plain(problem: Problem, kind: str) -> dict[str, Any]:
    values = {key: value if value is None else str(value) for key, value in vars(problem).items()}
    return {"kind": kind, **values}


@app.command("stats")
def data_stats(
    root: Root,
    layout: LayoutOption = "imageclef2023",
    plot: Annotated[Path, typer.Option(help="Where the histogram of caption lengths goes.")] = Path(
        "caption_lengths.png"
    ),
    concept_plot: Annotated[Path, typer.Option(help="Where the picture of the concepts goes.")] = Path(
        "concepts.png"
    ),
    output: Output = Format.table,
) -> None:
    """Images per modality (the paper's Table 1), caption lengths (Figure 2, as PNG), and concepts (as PNG).

    For concepts: how frequent they are, which occur together, images per number of concepts, and concepts of
    valid that are unseen in train. JSON and CSV have all of them, the table the first ones.

    Example: harness data stats data/imageclef2023 --plot lengths.png
    """
    from harness.cli import tables
    from harness.data import concepts, load, statistics
    from harness.store import RUNS

    with Terminal().progress("Checking images") as advance:
        dataset = load(_data_config(root, layout, skip_bad=True), RUNS, advance)
    modalities, lengths = statistics.modalities(dataset), statistics.caption_lengths(dataset)
    statistics.plot_lengths(dataset, plot)
    found = concepts.table(dataset)
    tables.show_statistics(modalities, lengths, concepts.described(dataset, found), output.value)
    print(f"histogram: {plot}", file=sys.stderr)
    if found:
        print(f"concepts: {concepts.plot(dataset, found, concept_plot)}", file=sys.stderr)
