"""The model of a finished run: its config, its best weights, and where they came from."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from harness import records
from harness.errors import Problem, UserError
from harness.models import checkpoints, family
from harness.models.settings import TINY, ModelConfig
from harness.store import DONE
from harness.training.resume import BEST
from harness.training.settings import TrainConfig

if TYPE_CHECKING:
    import torch

    from harness.models.loading import Loaded

_WEIGHTS = ("train", "soup")
"""The steps of which one gives the weights of a run."""


@dataclass(frozen=True)
class Finished:
    """The model of the run in `folder`; `weights` is None if the checkpoint is used as it is."""

    folder: Path
    record: Mapping[str, Any]
    model: ModelConfig
    train: TrainConfig
    weights: Path | None

    @property
    def base(self) -> Path | None:
        """The folder of `model.checkpoint`, or of the one that the run built; None if there is none."""
        if family(self.model).built_from(self.model) is not None:
            return records.root(self.folder, self.record) / self.record["steps"][TINY]
        name = family(self.model).checkpoints(self.model).get("checkpoint")
        return checkpoints.find(name).folder if name else None

    @property
    def standin(self) -> str | None:
        """The stand-in that the model comes from, in words; None if it comes from none."""
        if family(self.model).built_from(self.model) is not None:
            return f"trained from {TINY}"
        found = [checkpoints.find(name) for name in family(self.model).checkpoints(self.model).values()]
        return next((one.name for one in found if one and one.standin), None)

    def load(self, frozen_dtype: "torch.dtype") -> "Loaded":
        """The model with its best weights, without the head of a classifier, on the CPU.

        Weights that were never trained are `frozen_dtype`, all others fp32. Raises `UserError` if a
        checkpoint is not on this machine.
        """
        from harness.models.loading import load_trained

        if found := family(self.model).problems(self.model, self.train, 0):
            raise UserError(found)
        loaded = family(self.model).load(self.model, self.train, self.base, frozen_dtype)
        if self.weights:
            load_trained(loaded.model, self.weights)
        return loaded


def of(run: Path, record: Mapping[str, Any]) -> Finished:
    """The model of a run. Raises `UserError` if it has none, or if its training has not finished."""
    concepts = records.task_of(record) == records.CONCEPTS
    section = record["config"].get("concepts" if concepts else "consensus") or {}
    if section.get("own") == 0:
        names = ", ".join(one["run"] for one in section["runs"])
        raise UserError([Problem(f"the run has no model of its own: it combines {names}", run)])
    try:
        model = ModelConfig.model_validate(record["config"]["model"])
        train = TrainConfig.model_validate(record["config"]["train"])
    except (KeyError, ValidationError):
        what = "another version of the harness wrote this record"
        raise UserError([Problem(what, run, hint=records.again(record))]) from None
    trains = record["config"].get("soup") or any(stage.epochs for stage in train.stages)
    steps, root = record["steps"], records.root(run, record)
    places = [root / steps[name] for name in _WEIGHTS if name in steps]
    done = [place for place in places if (place / DONE).exists()]
    if trains and not done:
        what = f"the run has no trained weights (status {record['status']})"
        raise UserError([Problem(what, run, hint=records.finish(record))])
    if done and not (done[0] / BEST).is_file():
        raise UserError([Problem("its weights are gone", run, hint=records.again(record, weights=True))])
    found = Finished(run, record, model, train, records.checked(done[0] / BEST, record) if done else None)
    if family(model).built_from(model) is not None:
        records.check_step(root / steps[TINY], record)
    return found
