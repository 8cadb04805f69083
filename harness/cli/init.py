"""`harness init`: a first experiment for a folder of data."""

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from harness.errors import Problem, UserError
from harness.output.program import spelled
from harness.output.visible import is_terminal, one_line


def init(
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="DATA_FOLDER", help="Folder of the data set; by default the one in this folder or data/."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="EXPERIMENT.yaml", help="Where to write it; by default experiments/<folder>.yaml."
        ),
    ] = None,
) -> None:
    """Look at a folder of data, and write a commented experiment that runs on this machine.

    It finds the layout, the sizes, the concepts, the device and the weights on this machine. It checks the
    experiment as `run --dry-run` does before it writes it. It never overwrites a file.

    Example: harness init data/imageclef2023
    """
    from harness.cli import beginning

    root = folder or _chosen(beginning.candidates(Path()))
    name = re.sub(r"[^\w.-]+", "_", root.resolve().name, flags=re.ASCII).strip("._-") or "mine"
    place = Path("experiments") if Path("experiments").is_dir() else Path()
    file = out or place / f"{name}.yaml"
    if file.suffix not in (".yaml", ".yml"):
        raise UserError([Problem(f"got {file}; a file that ends with .yaml is allowed", key="--out")])
    sight = beginning.look(root)
    print(f"{root}:")
    for line in sight.lines:
        print(one_line(f"  {line}"))
    config, forecast = beginning.write(sight, file, file.stem if out else name)
    for line in forecast:
        print(one_line(f"  {line}"))
    if config.data.skip_bad:
        print(spelled(f"  Some rows have problems and are left out of training: harness data check {root}"))
    print(spelled(f"wrote {file}; next: harness run {file}"))


def _chosen(found: list[Path]) -> Path:
    """The only folder that looks like data; of several, the one that the user names on a terminal."""
    if len(found) == 1:
        return found[0]
    if not found:
        what = "no data set in this folder or in data/"
        raise UserError([Problem(what, key="DATA_FOLDER", hint="Name its folder: harness init DATA_FOLDER")])
    names = ", ".join(map(str, found))
    if is_terminal(sys.stdin) and is_terminal(sys.stdout):
        choice = typer.prompt(f"Which data? {names}", default=str(found[0]))
        return Path(choice)
    raise UserError([Problem(f"several data sets: {names}", key="DATA_FOLDER", hint="Name one of them.")])
