"""The protocol of a model family: all that the harness asks of a captioning model, and of its module.

A family is a module in `FAMILIES` with the functions of `Family`. None of them but `load` and `codecs` may
import torch, so that `--dry-run` and the memory forecast answer at once. `load` gives a `Loaded`, whose
`model` is a `torch.nn.Module` with the methods of `Captioner`.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from harness.errors import Problem
from harness.models.settings import ModelConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from harness.models.loading import Loaded
    from harness.models.text import Codec
    from harness.training.settings import TrainConfig

FLOAT, HALF, INDEX = 4, 2, 8
"""Bytes of a number in fp32, of one in half precision, and of a token id."""


class Losses(NamedTuple):
    """Sums over tokens, so that any split of a batch adds up to the same loss.

    A sum divided by the number of predicted tokens is the mean loss in nats; None where none was asked for.
    A tuple, since ZeRO-3 looks into tuples and no further for what the backward pass starts from.
    """

    caption: "Tensor | None"
    concept: "Tensor | None"


class Captioner(Protocol):
    """A model of a family, which is also a `torch.nn.Module`."""

    device: "torch.device"

    def __call__(
        self,
        pixels: "Tensor",
        caption: "Mapping[str, Tensor] | None" = None,
        concept: "Mapping[str, Tensor] | None" = None,
        label_smoothing: float = 0.0,
    ) -> Losses:
        """Training losses of one micro-batch by name.

        pixels (B, 3, S, S), as `Loaded.normalise` gives them. `caption` and `concept` are what the codec of
        that text collates: ids, mask and labels, each (B, T), labels -100 where no loss is wanted.
        """

    def caption(self, pixels: "Tensor", prompt: "Tensor", end: int, pad: int, **options: float) -> "Tensor":
        """The best caption of each image: pixels (B, 3, S, S), prompt ids (P,) -> new token ids (B, T).

        `options` are those of transformers' `generate`: num_beams, max_new_tokens, ...
        """

    def image_features(self, pixels: "Tensor") -> "Tensor":
        """What the text parts get of each image: pixels (B, 3, S, S) -> (B, T, D)."""

    def freeze(self, losses: Collection[str], train_vision: bool) -> None:
        """Freeze all but what these losses train; `train_vision`: the image encoder, too.

        `losses` are fields of `Losses`. A parameter that gets no gradient must be frozen and not merely
        unused: ZeRO hands the optimiser a zero gradient for it, and weight decay would erode it.
        """

    def is_saved(self, name: str) -> bool:
        """Whether a weight of the state dict is saved after training, which is all that training may change.

        Of weights that are tied to each other one is saved.
        """

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """The parameters that are not frozen, in groups as torch's AdamW takes them."""

    def compute_in(self, dtype: "torch.dtype | None", vision_in_fp32: bool) -> None:
        """Set the precision of every forward pass: autocast to `dtype`, or fp32 where it is None.

        Trained weights stay fp32, weights that are never trained become `dtype`. `vision_in_fp32` leaves
        the image encoder out of autocast.
        """

    def use_plain_attention(self) -> None:
        """Attend by plain products, which are faster on a CPU than torch's fused attention."""

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any]) -> None:
        """Keep only the inputs of layers, and compute the rest again in the backward pass."""


@dataclass(frozen=True)
class Work:
    """One micro batch: `batch` images, each with a caption and a concept sentence of `tokens` tokens.

    `half`: 2-byte autocast, else fp32; `vision_half`: the same for the ViT. `accelerator`: attention is fused
    and autocast computes norms and softmax in fp32, else as on a CPU. `captions` and `concepts` say which of
    the two losses there are.
    """

    batch: int
    tokens: int
    half: bool
    vision_half: bool
    accelerator: bool
    train_vision: bool = True
    captions: bool = True
    concepts: bool = True
    dropout: float | None = None
    """`train.dropout`; None: as the checkpoint says."""

    @property
    def bytes(self) -> int:
        """Per number that is computed in autocast."""
        return HALF if self.half else FLOAT


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro batch.

    `kept`: saved for the backward pass without gradient checkpointing, `kept_checkpointed` with it. `casts`:
    the trained weights that autocast holds in half precision during the forward pass. `loss`: what computing
    the larger loss takes for a moment; `layer`: what checkpointing computes anew for the largest layer.
    """

    kept: int
    kept_checkpointed: int
    casts: int
    loss: int
    layer: int


class Shape(Protocol):
    """What determines the tensors of a model, known without its weights, for the memory forecast."""

    def trained(self, train_vision: bool) -> int:
        """Parameters that training may change; tied weights count once."""

    def frozen(self, train_vision: bool, half: bool) -> int:
        """Bytes of the weights that are never trained; `half`: the model computes in half precision."""

    def activations(self, work: Work) -> Activations:
        """What one micro batch takes."""


class Family(Protocol):
    """The module of a family."""

    def checkpoints(self, model: ModelConfig) -> dict[str, str]:
        """The checkpoints that are loaded, by their key in `model:`; none of a model that is built here."""

    def problems(self, model: ModelConfig) -> list[Problem]:
        """What keeps these checkpoints from being loaded on this machine."""

    def settings(self, model: ModelConfig) -> dict[str, Any]:
        """What of `model:` training depends on, besides the contents of its checkpoints.

        It is part of the train step's fingerprint, so that it must differ from that of any other family.
        """

    def shape(self, model: ModelConfig) -> Shape | None:
        """The shape of the model; None where its checkpoint is neither at hand nor known."""

    def built_from(self, model: ModelConfig) -> int | None:
        """Side in pixels of the training images that the model is built from; None where it is loaded."""

    def codecs(self, model: ModelConfig, folder: Path, max_tokens: int) -> "tuple[Codec, Codec]":
        """The codecs of captions and of concept sentences, without any weights.

        `folder` is that of `model.checkpoint`. Raises `UserError` where a tokenizer is missing.
        """

    def load(
        self, model: ModelConfig, train: "TrainConfig", folder: Path, frozen_dtype: "torch.dtype"
    ) -> "Loaded":
        """Load the model from `folder`, that of `model.checkpoint`, and from the other checkpoints.

        Weights are fp32; those that are never trained are read as `frozen_dtype`. Raises `UserError` naming
        the weights that no configured checkpoint holds.
        """
