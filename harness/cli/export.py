"""`harness export`: the trained model of a run as a checkpoint folder."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    run: Annotated[Path, typer.Argument(help="A run's folder, runs/<experiment>/<variant>-s<seed>.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder for the checkpoint.")],
) -> None:
    """Write the best weights of a run as a checkpoint folder, with adapters merged into the weights.

    Other experiments read it by the keys that it prints, transformers by from_pretrained.

    Example: harness export runs/quickstart/opt_364-s42 exported/opt_364
    """
    from harness.training import export

    named = export.export(run, folder)
    print(f"{folder}: use it with " + " ".join(f"--set model.{key}={place}" for key, place in named.items()))
