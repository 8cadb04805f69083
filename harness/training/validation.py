"""Validation: the loss and the scores of the weights that a training has now; they choose the best ones."""

import contextlib
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from harness.machine import ranks
from harness.machine.device import moved
from harness.models.loading import Loaded, save_trained
from harness.models.text import to_device
from harness.training import patience
from harness.training.best import Validated
from harness.training.finite import check_validation
from harness.training.resume import EMA, FLOOR, PRIMARY, VALIDATED
from harness.training.schedule import Stage
from harness.training.split import batches

if TYPE_CHECKING:
    from harness.training.train import Training

Row = dict[str, Any]


def validate(training: "Training", stage: Stage, begins: bool = False) -> None:
    """Compute validation loss and, if due, scores; keep the best weights so far.

    `begins`: the stage has not yet made a step; a checkpoint would be of the stage before.
    """
    config, state, average = training.config, training.state, training.average
    scores = _scored(training, stage)
    # at ZeRO-3 no rank can caption alone: each layer's forward pass gathers weights from all ranks
    zero3 = config.zero_stage == 3
    loaded = training.copy(training.checkpoints.folder / VALIDATED) if zero3 else training.loaded
    loaded.model.eval()
    row = _measured(training, loaded, stage, scores, begins)
    found = {False: row.get(PRIMARY)}  # by whether they are of the average
    if average and not begins:  # at the start it equals the weights
        with average.instead(loaded.model):
            other = _measured(training, loaded, stage, scores)
        found[True] = other.get(PRIMARY)
        row |= {f"{EMA}{name}": value for name, value in other.items()}
    found = {of_average: score for of_average, score in found.items() if score is not None}
    row |= {PRIMARY: max(found.values())} if found else {}
    training.saver.written()  # else the best weights could be of a later step than the checkpoint
    loaded.model.train()
    if found and config.patience:
        patience.count(state, row[PRIMARY])
        row[patience.WAITED] = state.waited
    epoch = training.epoch
    training.note({"step": state.step, "stage": stage.number, "epoch": epoch, **row})
    if begins and stage.from_best:  # they are kept already
        return
    for of_average, score in found.items():
        _keep(training, loaded, Validated(state.step, stage.number, epoch, score, of_average))
    if not begins:
        training.saver.validated(state)


def _measured(training: "Training", loaded: Loaded, stage: Stage, scores: bool, begins: bool = False) -> Row:
    """The validation loss of the weights that the model has now, and their `scores` if due.

    Without the primary score if another one fell below its floor, so they are never the best.
    """
    row: Row = {"valid_loss": _valid_loss(training, loaded)}
    check_validation(row, training.where(stage))
    row |= ranks.agree(training.evaluate(loaded)) if scores else {}
    if not begins:
        row = {name: value for name, value in row.items() if not name.startswith(FLOOR)}
        if any(row.get(f"valid_{name}", floor) < floor for name, floor in training.floors(stage).items()):
            row.pop(PRIMARY, None)
    check_validation(row, training.where(stage))
    return row


def _keep(training: "Training", loaded: Loaded, new: Validated) -> None:
    """Save weights that were validated just now, if they are among the best so far."""
    best, state = training.best, training.state
    if best.takes(new):
        average = new.average and training.average
        with average.instead(loaded.model) if average else contextlib.nullcontext():
            best.add(new, lambda file: save_trained(loaded.model, file))
    state.best, state.best_step = best.ranked[0].score, best.ranked[0].step


def _scored(training: "Training", stage: Stage) -> bool:
    """Whether a validation of the stage has scores now."""
    every, epoch = training.config.evaluate_every, training.epoch
    last = stage is training.plan[-1] and epoch == stage.epochs
    return last or stage.reward is not None or stage.validations > 1 or (every > 0 and epoch % every == 0)


@torch.no_grad()
def _valid_loss(training: "Training", loaded: Loaded) -> float:
    """The loss of the whole validation split, without label smoothing.

    Mean caption loss per token, or of a training that predicts concepts, mean loss per image.
    """
    split, device, name = training.splits["valid"], training.device, training.validates_by
    count = math.ceil(len(split.ids) / training.config.micro_batch_size)
    own = np.array_split(np.arange(len(split.ids)), count)[ranks.rank() :: ranks.world_size()]
    total = torch.zeros((), device=device)
    for batch in batches(split, loaded, own, (name,), training.multiple):
        pixels = loaded.normalise(batch["pixels"])
        if name == "concepts":
            total += loaded.model(pixels, concepts=moved(batch[name], device)).concepts
        else:
            total += loaded.model(pixels, to_device(batch[name], device)).caption
    count = len(split.ids) if name == "concepts" else sum(text.predicted for text in split.captions)
    return float(ranks.total(total)) / count
