"""Image encoders of transformers as modules that give the features of an image as a sequence."""

import copy
import math
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.models.blip_2.modeling_blip_2 import Blip2VisionModel

from harness.errors import Problem, UserError
from harness.models import checkpoints, head, parts

if TYPE_CHECKING:
    from harness.models.head import Head

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_KEY = "model.vision_checkpoint"
_BLIP2 = "blip_2_vision_model"
"""The model type of BLIP-2's image tower, which AutoModel does not know."""


class Encoder(nn.Module):
    """An image encoder: pixels (B, 3, S, S) -> features (B, N, D), feature maps row by row.

    `tokens` is N, `width` is D. The first `class_tokens` features are of no part of the image, as far as the
    config tells. Batch norms keep the statistics of the checkpoint, so an image's features do
    not depend on its batch. `unused` are the names of weights that the features do not depend on, such as
    those of a pooler. Raises `UserError` if the encoder cannot read images of `size` pixels.
    """

    def __init__(self, model: PreTrainedModel, size: int) -> None:
        super().__init__()
        self.model = model.eval()
        with torch.enable_grad():
            features = self._tried(size)
        self.tokens, self.width = features.shape[1:]
        self.class_tokens = _class_tokens(model.config, size, self.tokens)
        used = _leaves(features)
        self.unused = frozenset(name for name, weight in self.named_parameters() if weight not in used)

    def forward(self, pixels: Tensor) -> Tensor:
        """The features of pixels (B, 3, S, S): (B, N, D)."""
        features = self.model(pixels).last_hidden_state
        return features.flatten(2).transpose(1, 2) if features.ndim == 4 else features

    def train(self, mode: bool = True) -> "Encoder":
        """Set the mode of all modules but batch norms."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def _tried(self, size: int) -> Tensor:
        """The features of a black image; it must be large enough for a token at least."""
        try:
            features = self(torch.zeros(1, 3, size, size))
        except (RuntimeError, ValueError, TypeError, AssertionError, AttributeError) as error:
            first = str(error).strip().partition("\n")[0]
            what = f"{type(self.model).__name__} can't encode images of {size} pixels: {first}"
            raise UserError([Problem(what, key="model.image_size")]) from error
        if features.ndim != 3 or not features.shape[1]:
            what = f"{type(self.model).__name__} gives no features of images of {size} pixels"
            raise UserError([Problem(what, key="model.image_size")])
        return features


def _class_tokens(config: PretrainedConfig, size: int, tokens: int) -> int:
    """How many tokens there are besides one for each patch; 0 if tokens are no patches."""
    patch = getattr(config, "patch_size", None)
    patches = (size // patch) ** 2 if isinstance(patch, int) else 0
    return tokens - patches if 0 < patches <= tokens else 0


class Seeing(nn.Module):
    """What a `base.Captioner` with an `Encoder` does by it; `trained_parts` may change in full."""

    def __init__(self, vision: Encoder, trained_parts: frozenset[str]) -> None:
        super().__init__()
        self.vision, self.trained_parts = vision, trained_parts
        self.head: Head | None = None
        self.feature_width, self.class_tokens = vision.width, vision.class_tokens
        self.unread = {f"vision.{name}" for name in vision.unused}
        self._constant = self.unread | {f"vision.{name}" for name, _ in vision.named_buffers()}
        self._tied: Collection[str] = ()
        self.autocast_dtype: torch.dtype | None = None
        self.vision_in_fp32 = False

    @property
    def device(self) -> torch.device:
        return next(self.vision.parameters()).device

    def part_of(self, name: str) -> str:
        """The part of a parameter or buffer: vision, connector or language; the head is in the connector."""
        first = name.partition(".")[0]
        return "connector" if first == "head" else first

    def autocast(self) -> torch.autocast:
        """The precision of every forward pass: fp32, or autocast to `autocast_dtype`."""
        return parts.autocast(self.device, self.autocast_dtype)

    def see(self, pixels: Tensor) -> Tensor:
        """The features of pixels (B, 3, S, S): (B, N, D)."""
        mixed = torch.is_autocast_enabled(pixels.device.type) and not self.vision_in_fp32
        with torch.autocast(pixels.device.type, dtype=self.autocast_dtype, enabled=mixed):
            return self.vision(pixels)

    @torch.no_grad()
    def image_features(self, pixels: Tensor) -> Tensor:
        """The output of the image encoder: pixels (B, 3, S, S) -> (B, N, D)."""
        with self.autocast():
            return self.see(pixels)

    def compute_in(self, dtype: torch.dtype | None, vision_in_fp32: bool) -> None:
        """Set the precision of every forward pass."""
        self.autocast_dtype, self.vision_in_fp32 = dtype, vision_in_fp32

    def use_plain_attention(self) -> None:
        """Use plain products for attention in the image encoder."""
        self.vision.model.set_attn_implementation("eager")

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any]) -> None:
        """Keep only the inputs of layers, if the image encoder supports it."""
        if self.vision.model.supports_gradient_checkpointing:
            self.vision.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs)

    def parts_to_compile(self, how: Literal["layers", "whole"]) -> list[nn.Module]:
        """The image encoder, or the longest list of its layers; texts differ in length."""
        lists = [module for module in self.vision.modules() if isinstance(module, nn.ModuleList)]
        return [self.vision] if how == "whole" else list(max(lists, key=len, default=()))

    def is_saved(self, name: str) -> bool:
        """Whether training may change a weight; buffers, such as statistics of batch norms, stay."""
        return name not in self._constant and parts.is_saved(self, name, self._tied)

    def freeze(self, losses: Collection[str]) -> None:
        """Freeze all but trained parts and adapters, and weights that the features do not depend on."""
        parts.train_only(self)
        head.freeze(self, losses)
        for name, weight in self.named_parameters():
            if name in self._constant:
                weight.requires_grad_(False)


def _leaves(output: Tensor) -> set[Tensor]:
    """The leaves of autograd's graph that an output depends on."""
    found, seen, waiting = set(), set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        waiting += [before for before, _ in node.next_functions]
    return found


def load(folder: Path, size: int) -> Encoder:
    """The image encoder of a checkpoint, in fp32, for square images of `size` pixels.

    Of a model of images and texts it is the image tower. Position tables are resized once (bicubic), as LAVIS
    does. Raises `UserError` if weights are missing or the encoder cannot read such images.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config = getattr(config, "vision_config", config)
    model, info = _loaded(folder, config)
    if getattr(config, "image_size", size) != size:
        model = _resized(model, folder, config, size)
    encoder = Encoder(model, size)
    _check_repeats(encoder, size)
    lacking = {f"model.{name}" for name in info["missing_keys"]} - encoder.unused
    if lacking := lacking & {name for name, _ in encoder.named_parameters()}:
        raise UserError([unfilled({name.removeprefix("model.") for name in lacking}, folder, _KEY)])
    return encoder


def _check_repeats(encoder: Encoder, size: int) -> None:
    """Raise `UserError` if an image has other features each time, as with ViT-MAE, which hides patches."""
    with torch.no_grad():
        one, other = (encoder(torch.zeros(1, 3, size, size)) for _ in range(2))
    if not torch.allclose(one, other, rtol=1e-3, atol=1e-3):
        what = f"{type(encoder.model).__name__} draws at random, so an image has other features each time"
        raise UserError([Problem(what, key=_KEY, hint="Name an encoder that reads whole images.")])


def without_weights(config: PretrainedConfig, size: int) -> Encoder:
    """The encoder that `load` gives for a config, but with random weights."""
    config = copy.deepcopy(getattr(config, "vision_config", config))
    model = _random(config)
    if getattr(config, "image_size", size) != size:
        config.image_size, own = size, model
        model, known = _random(config), own.state_dict()
        for name, weight in model.state_dict().items():
            if known[name].shape != weight.shape:
                _grids(known[name].shape, weight.shape, name)
    return Encoder(model, size)


def _random(config: PretrainedConfig) -> PreTrainedModel:
    return Blip2VisionModel(config) if config.model_type == _BLIP2 else AutoModel.from_config(config)


def pixel_units(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of pixels from 0 to 1; ImageNet's where the checkpoint does not say."""
    values = checkpoints.image_processor(folder)
    return (
        tuple(values.get("image_mean") or IMAGENET_MEAN),
        tuple(values.get("image_std") or IMAGENET_STD),
    )


def save(encoder: Encoder, mean: Iterable[float], std: Iterable[float], folder: Path) -> None:
    """Write an encoder as a checkpoint folder that `load` reads."""
    from transformers import BlipImageProcessor  # in 5 its import says that torchvision is missing

    encoder.model.save_pretrained(folder)
    BlipImageProcessor(image_mean=list(mean), image_std=list(std)).save_pretrained(folder)


def _loaded(folder: Path, config: PretrainedConfig) -> tuple[PreTrainedModel, dict[str, Iterable]]:
    blip2 = config.model_type == _BLIP2
    names = {"key_mapping": {r"^vision_model\.": ""}} if blip2 else {}  # in the checkpoint of a whole BLIP-2
    try:
        return (Blip2VisionModel if blip2 else AutoModel).from_pretrained(
            folder,
            config=config,
            **names,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )
    except (ValueError, KeyError) as error:
        first = str(error).strip().partition("\n")[0]
        what = f"AutoModel of transformers can't read {folder}: {first}"
        raise UserError([Problem(what, key=_KEY)]) from error


def _resized(model: PreTrainedModel, folder: Path, config: PretrainedConfig, size: int) -> PreTrainedModel:
    """The model for images of another size, with its position tables resized."""
    config = copy.deepcopy(config)
    config.image_size = size
    other, known = _loaded(folder, config)[0], model.state_dict()
    with torch.no_grad():
        for name, weight in other.state_dict().items():
            if known[name].shape != weight.shape:
                weight.copy_(_interpolated(known[name], weight.shape, name))
            elif weight.is_floating_point():
                weight.copy_(known[name])
    return other


def _interpolated(table: Tensor, shape: torch.Size, name: str) -> Tensor:
    """A position table (N, D) or (1, N, D) for another grid; its other rows are of class tokens.

    They are the first; those of BEiT's distances are the last, and its grid is resized as transformers does.
    """
    was, now, extra = _grids(table.shape, shape, name)
    distances, flat = "relative_position" in name, table.view(-1, shape[-1])
    grid, others = (flat[: was**2], flat[was**2 :]) if distances else (flat[extra:], flat[:extra])
    planes = grid.T.reshape(1, -1, was, was)
    mode = "bilinear" if distances else "bicubic"
    planes = F.interpolate(planes, size=(now, now), mode=mode, align_corners=False)
    resized = planes[0].flatten(1).T
    return torch.cat([resized, others] if distances else [others, resized]).view(shape)


def _grids(before: torch.Size, after: torch.Size, name: str) -> tuple[int, int, int]:
    """The sides of the grids of two position tables, and the number of other rows; `UserError` if none."""
    if "position" in name and len(before) == len(after) > 1 and before[-1] == after[-1]:
        was, now = math.isqrt(before[-2]), math.isqrt(after[-2])
        if before[-2] - was**2 == after[-2] - now**2:
            return was, now, before[-2] - was**2
    what = f"weights of this encoder depend on the size of images, and can't be resized: {name}"
    raise UserError([Problem(what, key="model.image_size", hint="Use the size of the checkpoint.")])


def unfilled(lacking: set[str], folder: Path, key: str) -> Problem:
    """The problem of weights that a checkpoint lacks."""
    names = sorted(lacking)
    shown = ", ".join(names[:4]) + (f", ... ({len(names)} in all)" if len(names) > 4 else "")
    return Problem(f"the checkpoint lacks weights, and they can't stay random: {shown}", folder, key=key)
