"""A loaded model with its codecs and pixel statistics; and the file of the weights that training changes."""

import contextlib
import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from harness.errors import Problem, UserError
from harness.machine.device import moved
from harness.models.base import Captioner, Pixels
from harness.models.text import Codec

HEAD = "head."
"""Begins the names of the weights of the classifier of concepts (`models.head`)."""


@dataclass(frozen=True)
class Loaded:
    """A model with the codecs and pixel mean and std of its inputs; it writes captions by `caption`.

    A family without texts has no codecs. `new` names the modules that no checkpoint has, by design.
    """

    model: Captioner
    caption: Codec | None
    concept: Codec | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    new: tuple[str, ...] = ()

    def normalise(self, images: Tensor) -> Pixels:
        """The images (`batch_of`) as the model takes them, on its device.

        Here uint8 (B, S, S, 3) -> float (B, 3, S, S), by the checkpoint's mean and std.
        """
        images = moved(images, self.model.device)
        mean, std = _levels(self.mean, images.device), _levels(self.std, images.device)
        planes = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return planes.sub_(mean).div_(std)


def batch_of(pixels: Any, indices: Sequence[int]) -> Tensor | list[Tensor]:
    """The images at these places of a split: uint8 (B, S, S, 3), or whole images, each (H, W, 3)."""
    found = pixels[np.asarray(indices)]
    if isinstance(found, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(found))
    return [torch.from_numpy(np.ascontiguousarray(image)) for image in found]


@functools.cache
def _levels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Channels of 0 to 1 in grey levels, (3, 1, 1); kept, because a copy to a device waits for it."""
    return 255 * torch.tensor(values, device=device)[:, None, None]


def trained_weights(model: Captioner) -> dict[str, Tensor]:
    """The weights that fine-tuning may change, by name."""
    return {name: weight for name, weight in model.state_dict().items() if model.is_saved(name)}


def save_trained(model: Captioner, path: Path) -> None:
    """Write the weights that fine-tuning may change, atomically; raises `UserError` if one is not finite."""
    temporary = path.with_suffix(".tmp")
    weights = {name: weight.detach().cpu().contiguous() for name, weight in trained_weights(model).items()}
    if bad := [name for name, weight in weights.items() if not torch.isfinite(weight).all()]:
        what = f"{len(bad)} weights are not finite and are not saved; the first is {bad[0]}"
        hint = "Lower train.learning_rate. Before the first step, the weights are model.checkpoint's."
        raise UserError([Problem(what, path, hint=hint)], None, 1)
    try:
        save_file(weights, temporary)
    except SafetensorError as error:  # raised for a full disk instead of OSError
        temporary.unlink(missing_ok=True)
        hint = "Free some space; then the same command continues."
        raise UserError([Problem(f"could not be written: {error}", path, hint=hint)], None, 1) from None
    temporary.replace(path)


def load_trained(model: Captioner, path: Path) -> None:
    """Read a file of `save_trained` into a model of the same shape, one weight at a time.

    Raises `UserError` if it has other weights.
    """
    own = trained_weights(model)
    with safe_open(path, "pt") as weights:
        check_names(own.keys() ^ _names(weights, own), path)
    _load(own, path)


def _names(weights: Any, own: Collection[str]) -> set[str]:
    """The names in an opened file, without those of a head if the model's `own` are without."""
    headless = not any(name.startswith(HEAD) for name in own)
    return {name for name in weights.keys() if not (headless and name.startswith(HEAD))}  # noqa: SIM118


def check_names(others: Collection[str], path: Path) -> None:
    """Raise `UserError` if there are names of weights that either a file or the model lacks."""
    if others:
        what = f"it has other weights than the model: {', '.join(sorted(others)[:4])}"
        hint = "transformers 4 and 5 have other names for those of CLIP and SigLIP: use the one that trained."
        raise UserError([Problem(what, path, hint=hint)], exit_code=1)


def load_some(model: Captioner, path: Path) -> None:
    """Read a file of `save_trained` of a training that may have changed fewer weights."""
    with safe_open(path, "pt") as weights:
        names = set(weights.keys())
    _load({name: weight for name, weight in trained_weights(model).items() if name in names}, path)


def _load(own: dict[str, Tensor], path: Path) -> None:
    """Copy the weights of a file; a model without a head needs none."""
    with safe_open(path, "pt") as weights, torch.no_grad():
        found = _names(weights, own)
        if found != own.keys():
            raise ValueError(f"{path} holds other weights: {sorted(found ^ own.keys())[:4]}")
        for name, weight in own.items():
            read = weights.get_tensor(name)
            if read.shape != weight.shape:
                raise ValueError(f"{path}: {name} is {tuple(read.shape)}, not {tuple(weight.shape)}")
            if not torch.isfinite(read).all():
                hint = f"The training diverged. To train again, delete {path.parent}."
                raise UserError([Problem(f"{name} is not finite", path, hint=hint)], None, 1)
            weight.copy_(read)


def load_average(model: Captioner, paths: Sequence[Path]) -> None:
    """Load the mean of files of `save_trained`, computed in fp32, one weight at a time.

    Raises `UserError` if a file does not have the weights that training may change.
    """
    own = trained_weights(model)
    with contextlib.ExitStack() as opened, torch.no_grad():
        files = [opened.enter_context(safe_open(path, "pt")) for path in paths]
        for path, file in zip(paths, files, strict=True):
            if others := sorted(own.keys() ^ set(file.keys())):
                what = f"it has other weights than this run trains: {', '.join(others[:4])}"
                hint = "Use the train.train_vision, train.train_language and model.lora of the runs."
                raise UserError([Problem(what, path, hint=hint)], exit_code=1)
        for name, weight in own.items():
            weight.copy_(torch.stack([file.get_tensor(name).float() for file in files]).mean(0))
