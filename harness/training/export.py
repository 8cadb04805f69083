"""The trained model of a finished run as a checkpoint folder, with its adapters merged into the weights."""

import os
import shutil
import tempfile
from pathlib import Path

from harness import records
from harness.errors import Problem, UserError
from harness.models import checkpoints, family
from harness.training import finished


def export(run: Path, folder: Path) -> dict[str, Path]:
    """Write the model of a run's folder to a new `folder`, whole or not at all -> what keys of `model:` name.

    Weights are fp32. Raises `UserError` if the run has no trained weights, if its checkpoints are not on this
    machine, or if `folder` exists and is not empty.
    """
    import torch

    from harness.models import adapters

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        hint = "Name a new folder, or empty this one."
        raise UserError([Problem(f"exists and is not an empty folder: {folder}", key="FOLDER", hint=hint)])
    found = finished.of(run, records.read(run, ("steps",)))
    if found.weights is None:
        what = f"the run trains nothing: its model is {found.model.checkpoint} as it is"
        raise UserError([Problem(what, run)])
    loaded = found.load(torch.float32)
    adapters.merge(loaded.model)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        written = family(found.model).export(loaded, temporary)
        if standin := found.standin:
            for place in written.values():
                checkpoints.mark_standin(temporary / place, standin)
        os.chmod(temporary, 0o755)  # mkdtemp lets nobody else read it
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return {key: folder / place for key, place in written.items()}
