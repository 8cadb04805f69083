"""Checks that losses, gradients, scores and weights are finite; they stop a training that diverged."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from harness.errors import Problem, UserError
from harness.machine import ranks
from harness.models.base import Captioner
from harness.models.loading import trained_weights
from harness.training import losses
from harness.training.outstanding import Outstanding

TERMS = tuple(f"{name}_loss" for name in losses.LOSSES)
DIVERGED = (
    "Training diverged. Lower train.learning_rate, raise train.warmup_steps, set train.max_grad_norm to 1, "
    "or set train.precision: fp32."
)


def gradients(step: Outstanding, norm: float | None) -> dict[str, float]:
    """Norm of the gradients before clipping, if ZeRO computes it, and in fp16 the loss scale.

    Only in fp16 gradients may overflow: the step is skipped and the scale is halved.
    """
    finite = norm is not None and math.isfinite(norm)
    if norm is not None and not finite and step.learnt.scale in (None, 1):
        what = f"the gradients of step {step.step} are not finite, although its loss is"
        raise UserError([Problem(what, hint=DIVERGED)], None, 1)
    row = {"grad_norm": norm} if finite else {}
    return row | ({} if step.learnt.scale is None else {"loss_scale": step.learnt.scale})


def stop(step: Outstanding, ids: Sequence[str]) -> NoReturn:
    """Stop all ranks and name the images, by their `ids`, of the first loss that is not finite."""
    learnt = step.learnt
    bad = [
        (TERMS[term], float(learnt.losses[row, term]), [ids[i] for i in learnt.images[row]])
        for row, term in (~torch.isfinite(learnt.losses)).nonzero().tolist()
    ]
    name, value, images = sorted(ranks.gather(bad))[0]
    what = f"{name} became {value} at step {step.step}; images of that batch: {', '.join(images)}"
    raise UserError([Problem(what, hint=DIVERGED)], None, 1)


def check_validation(row: Mapping[str, float], after: str) -> None:
    """Stop all ranks if a validation gave a number that is not finite."""
    for name, value in row.items():
        if not math.isfinite(value):
            what = f"{name} became {value} in the validation after {after}"
            raise UserError([Problem(what, hint=DIVERGED)], None, 1)


def check_weights(trainer: Any, model: Captioner, after: str, directory: Path) -> None:
    """Stop all ranks if weights or moments are not finite, before they are saved or trained further."""
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    parts = [weight for group in optimizer.param_groups for weight in group["params"]]  # of ZeRO-3
    moments = [part for state in optimizer.state.values() for part in state.values()]
    own = [*trained_weights(model).values(), *parts, *filter(torch.is_tensor, moments)]
    bad = torch.zeros(1, device=model.device)
    for tensor in own:
        bad += (~torch.isfinite(tensor.detach())).any().to(bad)
    if ranks.total(bad).item():
        what = f"the weights or the optimiser's moments after {after} are not finite"
        hint = f"{DIVERGED} To train again with the same config, delete {directory}."
        raise UserError([Problem(what, hint=hint)], None, 1)
