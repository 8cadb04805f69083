"""The memory that training needs on each device, and the smallest set-up that fits; no torch.

Weights, gradients and optimiser are counted as DeepSpeed 0.19.8 stores them for our config: fp32 weights that
autocast reads, torch's AdamW, no copy in half precision. The family of the model counts parameters and
activations (`models.base.Shape`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from harness.config.sections import AUTO
from harness.machine import device
from harness.models.base import FLOAT, LABELS, Activations, Shape, Work
from harness.training.schedule import Stage, stages
from harness.training.settings import TrainConfig

GB = 1e9
CARDS = (24, 32, 40, 64, 80)
"""Memory in GB of typical cards, for machines without one."""
DEVICES = (1, 2, 4, 8, 16)
MOMENTS = 2 * FLOAT
"""Bytes of AdamW's two moments for each trained parameter."""
TOKENS = 48
"""Tokens of a text in forecasts of time, as in the measurements on an H200."""
MOST = {"cpu": 16, "cuda": 64, "npu": 64}
"""Largest micro batch that `auto` takes; more gains little. On a CPU 32 took as long an image as 16."""
_STARTING = {"cpu": 1, "cuda": 6, "npu": 6}
"""Images whose arithmetic takes as long as starting the kernels of one micro batch.

Measured on an H200 at 364 pixels: 53 images/s with micro batches of 16, 61 with 32.
"""
_REPEATED = 4 / 3  # gradient checkpointing computes the forward pass again: a third of the arithmetic
# libraries; buffers of the device and of collectives
_CONTEXT = {"cpu": 0.7e9, "freed": 0.6e9, "cuda": 1.2e9, "npu": 1.2e9}
LARGE = 400_000_000
"""Bytes of weights from which a training on a CPU gives freed memory back after each micro batch.

The system clears that memory anew. A step takes 1.03 to 1.14 times as long, of small models up to 1.25.
"""
# An allowance for memory that the allocator does not return; glibc keeps freed blocks (benchmarks/memory.py).
_FRAGMENTED = {"cpu": 0.2, "freed": 0.04, "cuda": 0.05, "npu": 0.05}
_BUCKET = 500_000_000  # numbers in DeepSpeed's buffers for reducing gradients
_LIVE = 1_000_000_000  # numbers that ZeRO-3 gathers at once


@dataclass(frozen=True)
class Setup:
    """The settings that determine memory: devices, micro batch and options that save memory."""

    devices: int
    micro_batch: int
    checkpointing: bool
    zero_stage: int
    offload: bool

    def options(self, config: TrainConfig) -> str:
        """The command-line options that change a config to this set-up; what is auto needs none."""
        wanted = {
            "gradient_checkpointing": self.checkpointing,
            "micro_batch_size": self.micro_batch,
            "zero_stage": self.zero_stage,
            "offload": self.offload,
        }
        changed = {key: value for key, value in wanted.items() if getattr(config, key) not in (value, AUTO)}
        return " ".join(f"--set train.{key}={str(value).lower()}" for key, value in changed.items())


@dataclass(frozen=True)
class Usage:
    """Peak bytes on each device during training; `host`: bytes in CPU memory per device."""

    weights: int
    gradients: int
    optimiser: int
    buffers: int
    activations: int
    rest: int
    host: int

    @property
    def total(self) -> int:
        """The sum of all parts on the device."""
        return self.weights + self.gradients + self.optimiser + self.buffers + self.activations + self.rest


@dataclass(frozen=True)
class Model:
    """A model to train on one kind of device; `half`: it computes in half precision.

    `prompt` is the most tokens of an image's own prompt before a caption. `judges`: bytes of the metrics'
    models that stay beside it for the loss `reward`.
    """

    shape: Shape
    config: TrainConfig
    kind: str
    half: bool
    prompt: int = 0
    judges: int = 0

    @property
    def trained(self) -> int:
        """Number of parameters that a stage with every loss trains; no stage trains more."""
        return self.shape.trained(self.config.train_vision)

    @property
    def frozen(self) -> int:
        """Bytes of the weights that are never trained."""
        return self.shape.frozen(self.config.train_vision, self.half)

    @property
    def weights(self) -> int:
        """Bytes of all weights; every rank loads all of them."""
        return FLOAT * self.trained + self.frozen

    @property
    def frees(self) -> bool:
        """Whether its training gives freed memory back to the system."""
        return frees(self.kind, self.weights)

    def activations(self, micro_batch: int) -> Activations:
        """The activations of the stage that needs most, with texts of maximum length."""
        return max(
            (self.shape.activations(self._work(stage, micro_batch)) for stage in stages(self.config)),
            key=lambda found: found.kept,
        )

    def flops(self, stage: Stage) -> int:
        """FLOPs of one image with its texts in a stage; the texts have `TOKENS` tokens, or the maximum.

        Half of the tokens of an image's own prompt are taken to be in use.
        """
        tokens = min(self.config.max_caption_tokens, TOKENS) + self.prompt // 2
        return self.shape.flops(replace(self._work(stage, 1), tokens=tokens))

    def without_vision(self) -> "Model":
        """The same model with a frozen ViT."""
        return replace(self, config=self.config.model_copy(update={"train_vision": False}))

    def _work(self, stage: Stage, micro_batch: int) -> Work:
        return Work(
            batch=micro_batch,
            tokens=self.config.max_caption_tokens + self.prompt,
            half=self.half,
            vision_half=self.half and self.config.vision_precision != "fp32",
            accelerator=self.kind != "cpu",
            train_vision=self.config.train_vision,
            captions="caption" in stage.texts,
            concepts="concept" in stage.texts,
            dropout=0.0 if stage.reward else self.config.dropout,
            samples=stage.reward.samples if stage.reward else 0,
            sample_tokens=stage.reward.max_new_tokens + self.prompt if stage.reward else 0,
            labels=LABELS if "concepts" in stage.texts else 0,
        )


def frees(kind: str, weights: int) -> bool:
    """Whether a training with so many bytes of weights gives freed memory back to the system."""
    return kind == "cpu" and weights >= LARGE and device.can_free_memory()


def needed(model: Model, setup: Setup) -> int:
    """Bytes that one device must have; a CPU also holds what is offloaded."""
    used = usage(model, setup)
    return used.total + (used.host if model.kind == "cpu" else 0)


def configured(config: TrainConfig, devices: int) -> Setup:
    """The set-up that a config without auto describes."""
    return Setup(
        devices, config.micro_batch_size, config.gradient_checkpointing, config.zero_stage, config.offload
    )


def resolved(config: TrainConfig, micro_batch: int, checkpointing: bool) -> TrainConfig:
    """The config with these values in place of auto."""
    values = {"micro_batch_size": micro_batch, "gradient_checkpointing": checkpointing}
    return config.model_copy(update=values)


def is_auto(config: TrainConfig) -> bool:
    """Whether the config leaves a choice to `chosen`."""
    return AUTO in (config.micro_batch_size, config.gradient_checkpointing)


def choices(config: TrainConfig, devices: int, kind: str) -> list[Setup]:
    """The set-ups that a config allows, fastest first; more than one only if it says auto."""
    sizes, ways = [config.micro_batch_size], [config.gradient_checkpointing]
    if config.micro_batch_size == AUTO:
        sizes = _shares(config, devices, MOST[kind])
    if config.gradient_checkpointing == AUTO:
        ways = [False, True]
    found = [configured(resolved(config, size, way), devices) for way in ways for size in sizes]
    return sorted(found, key=lambda setup: relative_time(setup, kind))


def _shares(config: TrainConfig, devices: int, most: int) -> list[int]:
    """The micro batches of at most `most` captions that divide a device's share of a batch, largest first.

    Only 1 if the devices can't share a batch equally.
    """
    share, rest = divmod(config.batch_size, devices)
    return [1] if rest else [size for size in range(min(most, share), 0, -1) if share % size == 0]


def relative_time(setup: Setup, kind: str) -> float:
    """The time of one image in a training step, in units of its arithmetic."""
    return (1 + _STARTING[kind] / setup.micro_batch) * (_REPEATED if setup.checkpointing else 1)


def chosen(model: Model, devices: int, free: float) -> Setup:
    """The fastest set-up that the config allows and `free` bytes hold; if none fits, the smallest one."""
    found = choices(model.config, devices, model.kind)
    fitting = (setup for setup in found if needed(model, setup) <= free)
    return next(fitting, None) or min(found, key=lambda setup: needed(model, setup))


def safest(config: TrainConfig, devices: int, kind: str) -> Setup:
    """The set-up that needs the least memory, whatever the sizes of the model."""
    found = choices(config, devices, kind)
    return min(found, key=lambda setup: (not setup.checkpointing, setup.micro_batch))


def usage(model: Model, setup: Setup) -> Usage:
    """The memory that a set-up needs on each device.

    Gradients of earlier micro batches are in memory together with the activations of the next one. In the
    optimiser step AdamW needs temporaries as large as the trained weights, but activations are freed by then.
    """
    numbers, shards, stage = model.trained, setup.devices, setup.zero_stage
    whole, shard = FLOAT * numbers, FLOAT * numbers // shards
    weights = model.weights if stage < 3 else model.weights // shards
    averages = 0 if model.config.ema is None else whole if stage < 3 else shard
    weights += averages + model.judges
    bucket = FLOAT * _bucket(model.config)
    copy = shard if stage in (1, 2) else 0  # ZeRO 1 and 2 update a flat copy of their part of the weights
    moments = (MOMENTS * numbers) // (shards if stage else 1)
    gradients = whole if stage < 2 else shard
    buffers = bucket if stage else 0
    if stage == 2:
        # gradients wait for a full bucket to be reduced; with several micro batches they are summed
        buffers += min(bucket, whole)
        gradients += shard if _accumulates(model.config, setup) else 0
    if stage == 3:
        buffers += min(_gathered(model), model.weights)
    host = 0
    if setup.offload:
        # gradients twice; and what glibc keeps, or AdamW's temporaries for a tensor as large as the shard
        host = copy + moments + (2 if model.frees else 4) * shard + (shard if stage < 3 else 0)
        copy = moments = 0
        gradients = whole if stage == 1 else 0
    held = model.activations(setup.micro_batch)
    computing, stepping = _computing(held, setup.checkpointing), _stepping(model, setup, whole, shard)
    # glibc keeps the activations' memory, in pieces too small for the optimiser's flat tensors
    keeps = model.kind == "cpu" and not model.frees
    moment = computing + stepping if keeps else max(computing, stepping)
    if stage == 3:  # validation captions with a whole copy of the model, and samples with gathered weights
        moment = max(moment, model.weights + (whole if averages else 0), _sampling(model, held))
    tensors = weights + gradients + copy + moments + buffers + moment
    how = "freed" if model.frees else model.kind
    rest = int(_CONTEXT[how] + _FRAGMENTED[how] * tensors)
    return Usage(weights, gradients, copy + moments, buffers, moment, rest, host)


def _sampling(model: Model, held: Activations) -> int:
    """Bytes of captions that are sampled with whole weights: layers keep keys and values, not one input."""
    return model.weights + 2 * held.kept_checkpointed if model.config.rewards else 0


def _bucket(config: TrainConfig) -> int:
    zero: Any = config.deepspeed.get("zero_optimization", {})
    return int(zero.get("reduce_bucket_size", _BUCKET))


def _gathered(model: Model) -> int:
    """Bytes of weights that ZeRO-3 gathers at once; assumes trained ones first, because they are larger."""
    zero: Any = model.config.deepspeed.get("zero_optimization", {})
    live = int(zero.get("stage3_max_live_parameters", _LIVE))
    return FLOAT * min(live, model.trained) + 2 * max(live - model.trained, 0)


def _accumulates(config: TrainConfig, setup: Setup) -> bool:
    return config.batch_size > setup.micro_batch * setup.devices


def _computing(held: Activations, checkpointing: bool) -> int:
    """Peak bytes of forward and backward pass: at the loss, or in a layer that is recomputed."""
    if not checkpointing:
        return held.kept + held.casts + held.loss
    return held.kept_checkpointed + max(held.casts + max(held.loss, held.layer), 2 * held.layer)


def _stepping(model: Model, setup: Setup, whole: int, shard: int) -> int:
    """Bytes of an optimiser step's temporaries: AdamW's and, without ZeRO, gradients joined for averaging."""
    if setup.offload:
        return 0
    own = shard if setup.zero_stage else whole
    if model.kind == "cpu":  # fused AdamW has no temporaries; glibc keeps what ZeRO's whole shards leave
        own = 2 * shard if setup.zero_stage and not model.frees else 0
    if setup.zero_stage in (1, 2):
        return own + shard
    joined = min(FLOAT * _BUCKET, whole) if setup.devices > 1 else 0
    return max(own, joined) if not setup.zero_stage else own


def means(config: TrainConfig, devices: int, kind: str = "cuda") -> Iterator[Setup]:
    """Set-ups for this number of devices, simplest first: as configured, smaller micro batches with
    checkpointing, ZeRO 1 to 3, offloading."""
    allowed = choices(config, devices, kind)
    sizes = [max(setup.micro_batch for setup in allowed)]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    sizes = [size for size in sizes if config.batch_size % (size * devices) == 0]
    if sizes and is_auto(config):
        yield from allowed
    elif sizes:
        yield replace(allowed[0], micro_batch=sizes[0])
    others = [replace(allowed[0], micro_batch=size, checkpointing=True) for size in sizes]
    others = [*allowed, *others] if is_auto(config) and sizes else others
    for offload in dict.fromkeys((config.offload, True)):
        for stage in range(max(config.zero_stage, int(offload)), 4):
            yield from (replace(setup, zero_stage=stage, offload=offload) for setup in others)


def smallest(model: Model, free: float, most: int = DEVICES[-1]) -> Setup | None:
    """The set-up with the fewest devices of `free` bytes, and the simplest one on them; None if none fits."""
    for devices in DEVICES:
        for setup in means(model.config, devices, model.kind) if devices <= most else ():
            if needed(model, setup) <= free:
                return setup
    return None


def table(model: Model) -> list[dict[str, Any]]:
    """Usage for each ZeRO stage, number of devices and offload, with and without checkpointing.

    For a micro batch that is auto: with checkpointing of the smallest one, without it of the largest one.
    """
    return [
        _row(model, stage, devices, offload)
        for stage in range(4)
        for devices in DEVICES
        for offload in (False, True)[: 1 + bool(stage)]
    ]


def _row(model: Model, stage: int, devices: int, offload: bool) -> dict[str, Any]:
    sizes = [setup.micro_batch for setup in choices(model.config, devices, model.kind)]
    plain = usage(model, Setup(devices, max(sizes), False, stage, offload))
    less = usage(model, Setup(devices, min(sizes), True, stage, offload))
    return {
        "zero_stage": stage,
        "offload": offload,
        "devices": devices,
        **{key: value for key, value in vars(plain).items() if key != "activations"},
        "activations": plain.activations,
        "activations_checkpointed": less.activations,
        "total": plain.total,
        "total_checkpointed": less.total,
    }


def cards(model: Model, sizes: Sequence[int] = CARDS) -> dict[int, Setup | None]:
    """The smallest set-up for each size of card, in GB."""
    return {size: smallest(model, size * GB) for size in sizes}
