"""The trained model of a finished run as a checkpoint folder, with its adapters merged into the weights."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from harness import records
from harness.errors import Problem, UserError
from harness.models import checkpoints, family
from harness.models.settings import TINY, ModelConfig
from harness.training.resume import BEST
from harness.training.settings import TrainConfig

if TYPE_CHECKING:
    from harness.models.loading import Loaded

_WEIGHTS = ("train", "soup")
"""The steps of which one gives the weights of a run."""


def export(run: Path, folder: Path) -> dict[str, Path]:
    """Write the model of a run's folder to a new `folder`, whole or not at all -> what keys of `model:` name.

    Weights are fp32. Raises `UserError` if the run has no trained weights, if its checkpoints are not on this
    machine, or if `folder` exists and is not empty.
    """
    from harness.models import adapters

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        hint = "Name a new folder, or empty this one."
        raise UserError([Problem(f"exists and is not an empty folder: {folder}", key="FOLDER", hint=hint)])
    record = records.read(run)
    model, loaded = _loaded(run, record)
    adapters.merge(loaded.model)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        written = family(model).export(loaded, temporary)
        if standin := _standin(model):
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


def _loaded(run: Path, record: Mapping[str, Any]) -> "tuple[ModelConfig, Loaded]":
    """The config of a run's model, and the model with its best weights."""
    import torch

    from harness.models.loading import load_trained

    files = [found for step in _WEIGHTS if (found := records.step_file(run, record, step, BEST))]
    if not files:
        hint = f"Finish it: {record['command']}"
        if record["status"] == "FINISHED":
            trained = any(step in record.get("steps", {}) for step in _WEIGHTS)
            hint = records.again(record, weights=True) if trained else None
        raise UserError([Problem("the run has no trained weights", run, hint=hint)])
    try:
        model = ModelConfig.model_validate(record["config"]["model"])
        train = TrainConfig.model_validate(record["config"]["train"])
    except (KeyError, ValidationError):
        what = "another version of the harness wrote this record"
        raise UserError([Problem(what, run, hint=records.again(record))]) from None
    if found := family(model).problems(model, train, 0):
        raise UserError(found)
    loaded = family(model).load(model, train, _base(run, record, model), torch.float32)
    load_trained(loaded.model, files[0])
    return model, loaded


def _base(run: Path, record: Mapping[str, Any], model: ModelConfig) -> Path | None:
    """The folder of `model.checkpoint`, or of the checkpoint that the run built."""
    if family(model).built_from(model) is not None:
        return records.root(run, record) / record["steps"][TINY]
    name = family(model).checkpoints(model).get("checkpoint")
    return checkpoints.find(name).folder if name else None


def _standin(model: ModelConfig) -> str | None:
    """What the scores of the exported model say of its origin, if it comes from a stand-in."""
    if family(model).built_from(model) is not None:
        return "trained from tiny"
    found = [checkpoints.find(name) for name in family(model).checkpoints(model).values()]
    return next((one.name for one in found if one and one.standin), None)
