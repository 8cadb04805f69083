"""The protocol of a model family: what the harness needs from a captioning model and from its module.

A family is a module in `FAMILIES` with the functions of `Family`. Only `load`, `codecs` and `sample` may
import torch, so `--dry-run` and the memory forecast are fast. `load` gives a `Loaded`, whose `model` is a
`torch.nn.Module` with the methods of `Captioner`.
"""

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from harness.errors import Problem
from harness.models.settings import ModelConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from harness.models.head import Head
    from harness.models.loading import Loaded
    from harness.models.text import Codec
    from harness.training.settings import TrainConfig

PARTS = ("vision", "connector", "language")
"""The parts of a captioner: image encoder; what leads from it to the language model; language model."""
FLOAT, HALF, INDEX = 4, 2, 8
"""Bytes of a number in fp32, of a number in half precision, and of a token id."""
LABELS = 2500
"""Labels of a head in forecasts of memory and time; only the data tell how many there are."""


class Losses(NamedTuple):
    """Losses as sums over tokens, so that any split of a batch adds up to the same loss.

    A sum divided by the number of predicted tokens is the mean loss in nats; that of `reward` is divided by
    the number of samples, and that of `concepts` by the number of images. None for a loss that was not
    requested. This is a tuple because ZeRO-3 finds the start of the backward pass only in tuples.
    """

    caption: "Tensor | None"
    concept: "Tensor | None"
    reward: "Tensor | None" = None
    concepts: "Tensor | None" = None


@dataclass(frozen=True)
class Samples:
    """Captions that the model has sampled, N for each image of a micro-batch, in the order of images.

    `text` is from `Codec.collate`: ids, mask and labels, each (B * N, T). `loss` gives the loss, a sum over
    samples, from the logits (B * N, T, V) of the tokens that follow each of the ids.
    """

    text: "Mapping[str, Tensor]"
    loss: "Callable[[Tensor], Tensor]"


class Decoding(Protocol):
    """The captions of a batch of images while they are decoded: R rows, several for each image.

    It begins with `width` rows for each of B images, in the order of images.
    """

    logits: "Tensor"
    """(B, V): the scores of the first token of each image's captions."""
    context: "Tensor"
    """(B, P): the ids before each image's captions that count as said, for penalties of repetition."""
    captured: bool
    """Whether steps are captured for a number of rows, so that changing it is slow and waiting is too."""

    def step(self, tokens: "Tensor") -> "Tensor":
        """The logits (R, V) that follow these tokens (R,); the next step may overwrite them."""

    def reorder(self, rows: "Tensor") -> None:
        """Let each row go on from one of `rows` (R,), which is a row of the same image."""

    def keep(self, rows: "Tensor") -> None:
        """Go on from these rows only, in this order."""


class Pixels(Protocol):
    """The images of a batch as the model takes them, such as a tensor (B, 3, S, S)."""

    def __len__(self) -> int:
        """The number of images."""

    def __getitem__(self, rows: Any) -> "Pixels":
        """These images; `rows` is a list of places in the batch."""


class Captioner(Protocol):
    """A model of a family; it is also a `torch.nn.Module`."""

    device: "torch.device"
    trained_parts: Collection[str]
    """The parts (`PARTS`) all of whose weights training may change."""
    head: "Head | None"
    """The classifier of concepts on the image features, if a stage trains one: see `models.head.attach`.

    Only families with the loss `concepts` have this and the next two; `head` is None at first.
    """
    feature_width: int
    """D of the image features (B, T, D)."""
    class_tokens: int
    """How many of the first image features are of no part of the image, as far as it is known."""

    def __call__(
        self,
        pixels: Pixels,
        caption: "Mapping[str, Tensor] | None" = None,
        concept: "Mapping[str, Tensor] | None" = None,
        label_smoothing: float = 0.0,
        samples: Samples | None = None,
        concepts: "Tensor | None" = None,
    ) -> Losses:
        """Training losses of one micro-batch; the image encoder runs once for all of them.

        `pixels` of B images are from `Loaded.normalise`. `caption` and `concept` are from `Codec.collate`:
        ids, mask and labels, each (B, T), labels -100 for tokens without a loss. `concepts`, uint8 (B, L),
        are the images' labels, and are given only for the loss `concepts`.
        """

    def decoder(
        self, width: int, length: int
    ) -> "AbstractContextManager[Callable[[Pixels, Tensor], Decoding]]":
        """A function that begins the captions of a batch of images, for as long as the context is open.

        The function takes pixels of B images and prompts (B, P), ids that captions follow. Each image has
        `width` rows and room for `length` new tokens. A batch ends when the next one begins.
        """

    def looking(self) -> "AbstractContextManager[Callable[[], Tensor | None]]":
        """While it is open, the function gives where the model looked in the last batch, uint8 (B, h, w).

        For the page of a run; None if that is not known. Only families that can tell have this method.
        """

    def image_features(self, pixels: Pixels) -> "Tensor":
        """The image features that the text parts use, (B, T, D)."""

    def part_of(self, name: str) -> str:
        """The part (`PARTS`) of a parameter or buffer, by the beginning of its name."""

    def freeze(self, losses: Collection[str]) -> None:
        """Freeze all parameters except those of `trained_parts` and adapters that these losses train.

        `losses` are names of `Losses`. A parameter without a gradient must be frozen: ZeRO gives the
        optimiser a zero gradient for it, so weight decay would shrink it. See `parts.train_only`.
        """

    def is_saved(self, name: str) -> bool:
        """Whether a weight of the state dict is saved after training: all that training may change.

        Only one of several tied weights is saved. See `parts.is_saved`.
        """

    def compute_in(self, dtype: "torch.dtype | None", vision_in_fp32: bool) -> None:
        """Set the precision of every forward pass: autocast to `dtype`, or fp32 for None.

        Trained weights stay fp32; weights that are never trained become `dtype`. `vision_in_fp32` excludes
        the image encoder from autocast.
        """

    def use_plain_attention(self) -> None:
        """Use plain products for attention; on a CPU they are faster than torch's fused attention."""

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any]) -> None:
        """Keep only the inputs of layers, and recompute the rest in the backward pass."""

    def parts_to_compile(self, how: Literal["layers", "whole"]) -> "list[torch.nn.Module]":
        """The parts whose forward pass torch.compile should compile, with inputs of one shape in training.

        `layers`: layers that are built alike; compiling is quick. `whole`: few large parts. May be empty.
        """


@dataclass(frozen=True)
class Sample:
    """A small model with random weights and without dropout; it compares a device with the CPU.

    pixels (B, 3, S, S). `texts` are `caption` and `concept` as from `Codec.collate`. `paths` are the parts of
    the forward pass by name: the number of layers, and a function that runs the part on fixed inputs.
    `logits(model, ids)` are those of the token after each of the caption ids (B, T), as (B, T, V).
    """

    model: "Captioner"
    pixels: "Tensor"
    texts: "Mapping[str, Mapping[str, Tensor]]"
    paths: "Mapping[str, tuple[int, Callable[[Captioner], Tensor]]]"
    logits: "Callable[[Captioner, Tensor], Tensor]"


@dataclass(frozen=True)
class Work:
    """One micro batch: `batch` images, each with a caption and a concept sentence of `tokens` tokens.

    `half`: 2-byte autocast, else fp32; `vision_half`: the same for the ViT. `accelerator`: attention is fused
    and autocast computes norms and softmax in fp32; else as on a CPU. `captions`, `concepts`: whether the
    stage has this loss. `samples`: how many captions of `sample_tokens` tokens each image has for the loss
    `reward`. `labels`: how many labels the head has for the loss `concepts`; 0: no such loss.
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
    """`train.dropout`; None: the checkpoint's."""
    samples: int = 0
    sample_tokens: int = 0
    labels: int = 0

    @property
    def says(self) -> bool:
        """Whether the part that writes captions is trained."""
        return self.captions or self.samples > 0

    @property
    def of_samples(self) -> "Work":
        """The work on the samples alone, as if each were the caption of an image."""
        rows = self.batch * self.samples
        alone = {"concepts": False, "samples": 0, "labels": 0}
        return replace(self, batch=rows, tokens=self.sample_tokens, captions=True, **alone)

    @property
    def bytes(self) -> int:
        """Bytes of a number that autocast computes."""
        return HALF if self.half else FLOAT


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro batch.

    `kept`: saved for the backward pass without gradient checkpointing, `kept_checkpointed` with it. `casts`:
    the trained weights that autocast holds in half precision until the optimiser's step. `loss`: temporaries
    of computing the larger loss; `layer`: what checkpointing recomputes for the largest layer.
    A model that was run has all tensors of the worst moment in `kept`.
    """

    kept: int
    kept_checkpointed: int
    casts: int
    loss: int
    layer: int


class Shape(Protocol):
    """The sizes of a model's tensors, known without its weights, for the memory forecast."""

    def trained(self, train_vision: bool) -> int:
        """Number of parameters that training may change; tied weights count once."""

    def frozen(self, train_vision: bool, half: bool) -> int:
        """Bytes of the weights that are never trained; `half`: the model computes in half precision."""

    def flops(self, work: Work) -> int:
        """FLOPs of forward and backward pass of one micro batch, without what checkpointing repeats."""

    def activations(self, work: Work) -> Activations:
        """The activations of one micro batch."""


class Usage(NamedTuple):
    """What an exported folder is for those who lack the harness: `what` in words.

    `script` is Python that prints a caption of each image file in its arguments, by transformers alone. It
    lies in the folder. None if transformers has no class for the model. `decoding` are settings of
    transformers' `GenerationConfig` besides those of the run.
    """

    what: str
    script: str | None = None
    decoding: Mapping[str, Any] = {}


class Family(Protocol):
    """The module of a family."""

    LOSSES: Collection[str]
    """The losses of a stage (`training.losses`) that its models compute."""
    WHOLE_IMAGES: bool
    """Whether images keep their shape; else they are squashed to squares."""

    def checkpoints(self, model: ModelConfig) -> dict[str, str]:
        """The checkpoints to load, by their key in `model:`; empty for a model that is built here."""

    def problems(self, model: ModelConfig, train: "TrainConfig", new_tokens: int) -> list[Problem]:
        """The problems of `model:` and of loading these checkpoints on this machine.

        All that configs, tokenizers and processors tell, since a run reads weights hours later. `new_tokens`
        is the length of decoded captions. It imports no torch unless a checkpoint is at hand.
        """

    def new(self, model: ModelConfig) -> tuple[str, ...]:
        """The modules that no checkpoint has, by design, so they must be trained."""

    def settings(self, model: ModelConfig) -> dict[str, Any]:
        """The part of `model:` that affects training, besides the contents of checkpoints.

        It is part of the train step's fingerprint, so it must differ from that of any other family.
        """

    def shape(self, model: ModelConfig, train: "TrainConfig") -> Shape | None:
        """The shape of the model; None if its checkpoint is neither at hand nor known.

        `train` tells which parts train; `Shape` gets whether the image encoder does.
        """

    def built_from(self, model: ModelConfig) -> int | None:
        """Side in pixels of the training images that the model is built from; None if it is loaded."""

    def codecs(
        self, model: ModelConfig, folder: Path | None, max_tokens: int
    ) -> "tuple[Codec, Codec] | None":
        """The codecs of captions and of concept sentences, without weights; None for a family without texts.

        `folder` is that of `model.checkpoint`, if the family has one. Raises `UserError` if a tokenizer is
        missing.
        """

    def sample(self) -> Sample | None:
        """The small model for `doctor --selftest`, equal in every call; None if the family has none."""

    def load(
        self,
        model: ModelConfig,
        train: "TrainConfig",
        folder: Path | None,
        frozen_dtype: "torch.dtype",
    ) -> "Loaded":
        """Load the model from `folder` (that of `model.checkpoint`) and from the other checkpoints.

        Weights are fp32; those that are never trained are loaded as `frozen_dtype`. Modules that are new by
        design (`Loaded.new`) have the same weights in every call (`parts.new`). Raises `UserError` naming the
        other weights that no configured checkpoint has.
        """

    def export(self, loaded: "Loaded", folder: Path) -> dict[str, str]:
        """Write a model without adapters as checkpoint files that `load` reads, with its tokenizers.

        Returns which place in `folder` each key of `model:` is to name, such as {"checkpoint": "."}.
        """

    def usage(self, model: ModelConfig, loaded: "Loaded") -> Usage:
        """How what `export` wrote is used without the harness."""
