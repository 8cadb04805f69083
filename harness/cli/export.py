"""`harness export`: the trained model of a run as a checkpoint folder."""

from pathlib import Path
from typing import Annotated

import typer

from harness.cli import outputs
from harness.cli.terminal import OfRun


def export(
    run: OfRun,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder for the checkpoint.")],
    hub_ready: Annotated[
        bool,
        typer.Option("--hub-ready", help="Add what a model hub reads: the card's metadata, .gitattributes."),
    ] = False,
) -> None:
    """Write the best weights of a run as a checkpoint folder, with adapters merged into the weights.

    If transformers has a class for the model, it loads the folder alone: caption.py there shows how.

    The model card, README.md, has data, training, scores and licences. Nothing is uploaded.

    Example: harness export runs/quickstart/opt_364-s42 exported/opt_364
    """
    from harness.training import export

    outputs.check_folder(folder, "FOLDER", renamed=True)
    named = export.export(run, folder, hub_ready)
    print(f"{folder}: use it with " + " ".join(f"--set model.{key}={place}" for key, place in named.items()))
    print(f"how to use it without harness: {folder / 'README.md'}")
