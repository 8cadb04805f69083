"""The memory that training takes on each device, and the smallest set-up that fits; no torch.

Weights, gradients and optimiser are counted as DeepSpeed 0.19.8 lays them out for our config (fp32 weights
that autocast reads, torch's AdamW, no master copy in half precision); parameters and activations
by the family of the model (`models.base.Shape`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from harness.models.base import FLOAT, Activations, Shape, Work
from harness.training.schedule import Stage, stages
from harness.training.settings import TrainConfig

GB = 1e9
CARDS = (24, 32, 40, 64, 80)
"""GB of the cards that are asked about where there is none."""
DEVICES = (1, 2, 4, 8, 16)
MOMENTS = 2 * FLOAT
"""Bytes of AdamW's two moments of a trained parameter."""
_CONTEXT = {"cpu": 0.7e9, "cuda": 1.2e9, "npu": 1.2e9}  # libraries, and the device's and collective's buffers
# An allowance for what the allocator keeps; glibc holds on to freed blocks (benchmarks/memory.py).
_FRAGMENTED = {"cpu": 0.3, "cuda": 0.05, "npu": 0.05}
_BUCKET = 500_000_000  # numbers in DeepSpeed's buffers for reducing gradients
_LIVE = 1_000_000_000  # numbers that ZeRO-3 gathers at a time


@dataclass(frozen=True)
class Setup:
    """What decides over memory: devices, micro batch and the means against a shortage."""

    devices: int
    micro_batch: int
    checkpointing: bool
    zero_stage: int
    offload: bool

    def options(self, config: TrainConfig) -> str:
        """The options that turn a config into this set-up, as the command line takes them."""
        wanted = {
            "gradient_checkpointing": self.checkpointing,
            "micro_batch_size": self.micro_batch,
            "zero_stage": self.zero_stage,
            "offload": self.offload,
        }
        changed = {key: value for key, value in wanted.items() if getattr(config, key) != value}
        return " ".join(f"--set train.{key}={str(value).lower()}" for key, value in changed.items())


@dataclass(frozen=True)
class Usage:
    """Bytes on each device at the fullest moment of training; `host`: in the CPU's memory, per device."""

    weights: int
    gradients: int
    optimiser: int
    buffers: int
    activations: int
    rest: int
    host: int

    @property
    def total(self) -> int:
        """All that the device must hold."""
        return self.weights + self.gradients + self.optimiser + self.buffers + self.activations + self.rest


@dataclass(frozen=True)
class Model:
    """A model to be trained on one kind of device: parameters, and what is computed in half precision."""

    shape: Shape
    config: TrainConfig
    kind: str
    half: bool

    @property
    def trained(self) -> int:
        """Parameters that a stage with every loss trains; no stage trains more."""
        return self.shape.trained(self.config.train_vision)

    @property
    def frozen(self) -> int:
        """Bytes of the weights that are never trained."""
        return self.shape.frozen(self.config.train_vision, self.half)

    @property
    def weights(self) -> int:
        """Bytes of all weights, which every rank loads whole."""
        return FLOAT * self.trained + self.frozen

    def activations(self, micro_batch: int) -> Activations:
        """Those of the stage that takes more, with every text as long as the config allows."""
        return max(
            (self.shape.activations(self._work(stage, micro_batch)) for stage in stages(self.config)),
            key=lambda found: found.kept,
        )

    def without_vision(self) -> "Model":
        """The same, with the ViT frozen."""
        return replace(self, config=self.config.model_copy(update={"train_vision": False}))

    def _work(self, stage: Stage, micro_batch: int) -> Work:
        return Work(
            batch=micro_batch,
            tokens=self.config.max_caption_tokens,
            half=self.half,
            vision_half=self.half and self.config.vision_precision != "fp32",
            accelerator=self.kind != "cpu",
            train_vision=self.config.train_vision,
            captions="caption" in stage.texts,
            concepts="concept" in stage.texts,
            dropout=self.config.dropout,
        )


def needed(model: Model, setup: Setup) -> int:
    """Bytes that one device must have; a CPU holds what it computes and what is offloaded to it."""
    used = usage(model, setup)
    return used.total + (used.host if model.kind == "cpu" else 0)


def configured(config: TrainConfig, devices: int) -> Setup:
    """The set-up that the config describes."""
    return Setup(
        devices, config.micro_batch_size, config.gradient_checkpointing, config.zero_stage, config.offload
    )


def usage(model: Model, setup: Setup) -> Usage:
    """What a set-up takes on each device.

    Gradients of earlier micro batches are there while the next one computes, so that everything is held at
    once; an optimiser step, whose AdamW needs the trained weights once more, comes when activations are gone.
    """
    numbers, shards, stage = model.trained, setup.devices, setup.zero_stage
    whole, shard = FLOAT * numbers, FLOAT * numbers // shards
    weights = model.weights if stage < 3 else model.weights // shards
    bucket = FLOAT * _bucket(model.config)
    copy = shard if stage in (1, 2) else 0  # ZeRO 1 and 2 step a flat copy of their part of the weights
    moments = (MOMENTS * numbers) // (shards if stage else 1)
    gradients = whole if stage < 2 else shard
    buffers = bucket if stage else 0
    if (
        stage == 2
    ):  # gradients wait for a full bucket to be reduced; with several micro batches they are summed
        buffers += min(bucket, whole)
        gradients += shard if _accumulates(model.config, setup) else 0
    if stage == 3:
        buffers += min(_gathered(model), model.weights)
    host = 0
    if setup.offload:
        # gradients twice, and what AdamW needs to step a tensor as large as the shard
        host = copy + moments + 4 * shard + (shard if stage < 3 else 0)
        copy = moments = 0
        gradients = whole if stage == 1 else 0
    held = model.activations(setup.micro_batch)
    computing, stepping = _computing(held, setup.checkpointing), _stepping(model, setup, whole, shard)
    # glibc keeps what the activations took, in pieces too small for the optimiser's flat tensors
    moment = computing + stepping if model.kind == "cpu" else max(computing, stepping)
    if stage == 3:  # validation captions with a whole copy
        moment = max(moment, model.weights)
    tensors = weights + gradients + copy + moments + buffers + moment
    rest = int(_CONTEXT[model.kind] + _FRAGMENTED[model.kind] * tensors)
    return Usage(weights, gradients, copy + moments, buffers, moment, rest, host)


def _bucket(config: TrainConfig) -> int:
    zero: Any = config.deepspeed.get("zero_optimization", {})
    return int(zero.get("reduce_bucket_size", _BUCKET))


def _gathered(model: Model) -> int:
    """Bytes of the weights that ZeRO-3 holds whole at a time: the trained ones first, which are larger."""
    zero: Any = model.config.deepspeed.get("zero_optimization", {})
    live = int(zero.get("stage3_max_live_parameters", _LIVE))
    return FLOAT * min(live, model.trained) + 2 * max(live - model.trained, 0)


def _accumulates(config: TrainConfig, setup: Setup) -> bool:
    return config.batch_size > setup.micro_batch * setup.devices


def _computing(held: Activations, checkpointing: bool) -> int:
    """The peak of forward and backward pass: at the loss, or in a layer that is computed again."""
    if not checkpointing:
        return held.kept + held.casts + held.loss
    return held.kept_checkpointed + max(held.casts + held.loss, 2 * held.layer)


def _stepping(model: Model, setup: Setup, whole: int, shard: int) -> int:
    """Temporaries of an optimiser step: AdamW's own and, without ZeRO, gradients joined to be averaged."""
    if setup.offload:
        return 0
    own = shard if setup.zero_stage else whole
    if model.kind == "cpu":  # AdamW steps one tensor after the other there; ZeRO's are as large as the shard
        own = 2 * shard if setup.zero_stage else 0
    if setup.zero_stage in (1, 2):
        return own + shard
    joined = min(FLOAT * _BUCKET, whole) if setup.devices > 1 else 0
    return max(own, joined) if not setup.zero_stage else own


def means(config: TrainConfig, devices: int) -> Iterator[Setup]:
    """Set-ups for so many devices from the simplest on: as configured, checkpointing, smaller micro batches,
    ZeRO 1 to 3, offloading."""
    first = configured(config, devices)
    sizes = [first.micro_batch]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    sizes = [size for size in sizes if config.batch_size % (size * devices) == 0]
    if sizes:
        yield replace(first, micro_batch=sizes[0])
    for offload in dict.fromkeys((first.offload, True)):
        for stage in range(max(first.zero_stage, int(offload)), 4):
            yield from (Setup(devices, size, True, stage, offload) for size in sizes)


def smallest(model: Model, free: float, most: int = DEVICES[-1]) -> Setup | None:
    """The fewest devices with `free` bytes each, and the simplest means on them, that fit; None: none do."""
    for devices in DEVICES:
        for setup in means(model.config, devices) if devices <= most else ():
            if needed(model, setup) <= free:
                return setup
    return None


def table(model: Model) -> list[dict[str, Any]]:
    """Usage for each ZeRO stage, number of devices and offload, with and without checkpointing."""
    micro = model.config.micro_batch_size
    return [
        _row(model, Setup(devices, micro, False, stage, offload))
        for stage in range(4)
        for devices in DEVICES
        for offload in (False, True)[: 1 + bool(stage)]
    ]


def _row(model: Model, setup: Setup) -> dict[str, Any]:
    plain = usage(model, setup)
    less = usage(model, Setup(setup.devices, setup.micro_batch, True, setup.zero_stage, setup.offload))
    return {
        "zero_stage": setup.zero_stage,
        "offload": setup.offload,
        "devices": setup.devices,
        **{key: value for key, value in vars(plain).items() if key != "activations"},
        "activations": plain.activations,
        "activations_checkpointed": less.activations,
        "total": plain.total,
        "total_checkpointed": less.total,
    }


def cards(model: Model, sizes: Sequence[int] = CARDS) -> dict[int, Setup | None]:
    """The smallest set-up for each size of card, in GB."""
    return {size: smallest(model, size * GB) for size in sizes}
