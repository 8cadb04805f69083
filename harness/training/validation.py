"""Validation: the loss and the scores of the weights that a training has now; they choose the best ones."""

import contextlib
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from harness.machine import ranks
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
    """Compute validation loss and, if due after this epoch, scores; keep the best weights so far.

    `begins`: the stage has not yet made a step; a checkpoint would be of the stage before.
    """
    config, state, average = training.config, training.state, training.average
    every, epoch = config.evaluate_every, state.done // training.per_epoch
    last = stage is training.plan[-1] and epoch == stage.epochs
    scores = last or stage.reward is not None or (every > 0 and epoch % every == 0)
    # at ZeRO-3 no rank can caption alone: each layer's forward pass gathers weights from all ranks
    zero3 = config.zero_stage == 3
    loaded = training.copy(training.checkpoints.folder / VALIDATED) if zero3 else training.loaded
    loaded.model.eval()
    row = _measured(training, loaded, stage, scores, begins)
    found = [row.get(PRIMARY)]
    if average and not begins:  # at the start it equals the weights
        with average.instead(loaded.model):
            other = _measured(training, loaded, stage, scores)
        found.append(other.get(PRIMARY))
        row |= {f"{EMA}{name}": value for name, value in other.items()}
        row |= {PRIMARY: max(found)} if scores else {}
    training.saver.written()  # else the best weights could be of a later step than the checkpoint
    loaded.model.train()
    if scores and config.patience:
        patience.count(state, row[PRIMARY])
        row[patience.WAITED] = state.waited
    training.note({"step": state.step, "stage": stage.number, "epoch": epoch, **row})
    for of_average, score in enumerate(found if scores else ()):
        new = Validated(state.step, stage.number, epoch, score, bool(of_average))
        _keep(training, loaded, new)
    if not begins:
        training.saver.validated(state)


def _measured(training: "Training", loaded: Loaded, stage: Stage, scores: bool, floors: bool = False) -> Row:
    """The validation loss of the weights that the model has now, and their `scores` if due."""
    row: Row = {"valid_loss": _valid_loss(training, loaded)}
    check_validation(row, training.where(stage))
    row |= ranks.agree(training.evaluate(loaded)) if scores else {}
    row = {name: value for name, value in row.items() if floors or not name.startswith(FLOOR)}
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


@torch.no_grad()
def _valid_loss(training: "Training", loaded: Loaded) -> float:
    """Mean caption loss per token over the whole validation split, without label smoothing."""
    split, device = training.splits["valid"], training.device
    count = math.ceil(len(split.ids) / training.config.micro_batch_size)
    own = np.array_split(np.arange(len(split.ids)), count)[ranks.rank() :: ranks.world_size()]
    total = torch.zeros((), device=device)
    for batch in batches(split, loaded, own, ("caption",), training.multiple):
        pixels = loaded.normalise(batch["pixels"])
        total += loaded.model(pixels, to_device(batch["caption"], device)).caption
    return float(ranks.total(total)) / sum(text.predicted for text in split.captions)
