"""Fine-tuning in two stages through the DeepSpeed engine: loop, optimiser, schedule, checkpoints.

The only room that imports deepspeed. It knows neither metrics nor MLflow: `log` gets what happened, and
`evaluate` turns the model into validation scores.
"""

import json
import math
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harness import device as devices
from harness.config import AugmentConfig, TrainConfig
from harness.data.augment import augment
from harness.errors import Problem, UserError
from harness.models.blip2 import Captioner, freeze
from harness.models.loading import Loaded, load_trained, save_trained
from harness.models.text import Text, to_device
from harness.schedule import Stage, epoch_batches, learning_rate, stages
from harness.store import write, write_json

BEST, LOSSES, STATE, CHECKPOINTS = "best.safetensors", "losses.jsonl", "state.json", "checkpoints"
FINISHED = 3  # the stage after the last
PRIMARY = "valid_primary"
Row = dict[str, Any]


@dataclass(frozen=True)
class Split:
    """Images and texts of one split; `pixels[indices]` gives uint8 (B, S, S, 3)."""

    ids: Sequence[str]
    pixels: Any
    captions: Sequence[Text]
    concepts: Sequence[Text | None]


@dataclass
class State:
    """Where training stands; written after each epoch, when everything else is on disk."""

    stage: int = 1
    epoch: int = 0
    step: int = 0
    validated: bool = True
    best: float | None = None
    best_step: int | None = None
    checkpoint: str | None = None


def _read_state(directory: Path) -> State:
    file = directory / STATE
    return State(**json.loads(file.read_text())) if file.exists() else State()


def _forget_rows_after(file: Path, state: State) -> None:
    """Drop the rows of what will be done again, and a row that an interruption cut in two."""
    if file.exists():
        rows = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
        last = state.step if state.validated else state.step - 0.5
        kept = [row for row in rows if row["step"] <= (last if "valid_loss" in row else state.step)]
        write(file, "".join(json.dumps(row) + "\n" for row in kept))


@dataclass
class Training:
    """One training, to be `run`: it leaves `best.safetensors` and `losses.jsonl` in `directory`.

    `log` gets every row of `losses.jsonl`. `evaluate()` scores the model as it is and returns `valid_*`
    numbers, with `valid_primary`, which chooses the best weights, among them.
    """

    config: TrainConfig
    augmentation: AugmentConfig
    loaded: Loaded
    splits: Mapping[str, Split]
    kind: devices.Kind
    seed: int
    directory: Path
    log: Callable[[Row], None]
    evaluate: Callable[[], dict[str, float]]

    def __post_init__(self) -> None:
        world = devices.world_size()
        if self.config.batch_size % (self.config.micro_batch_size * world):
            raise UserError([_indivisible(self.config, world)])
        self.accumulation = self.config.batch_size // (self.config.micro_batch_size * world)
        self.device = devices.torch_device(self.kind)
        self.state = _read_state(self.directory)

    def run(self) -> None:
        """Train from the last finished epoch on, and leave the model with its best weights.

        An interrupted training gives the same weights as if never interrupted, since order and randomness of
        an epoch depend on nothing but seed, stage and epoch.
        """
        _forget_rows_after(self.directory / LOSSES, self.state)
        place(self.loaded.model, self.config, self.kind)
        if self.config.gradient_checkpointing:
            self.loaded.model.gradient_checkpointing_enable({"use_reentrant": False})
        plan = stages(self.config)
        for stage in plan:
            if stage.number >= self.state.stage:
                self.stage(stage, last=stage is plan[-1])
        self.finish()
        load_trained(self.loaded.model, self.directory / BEST)
        shutil.rmtree(self.directory / CHECKPOINTS, ignore_errors=True)

    def stage(self, stage: Stage, last: bool) -> None:
        """Train one stage from where the state says, with a fresh optimiser and schedule."""
        text_path = self._reads(stage)
        resumed = self.state.stage == stage.number and self.state.checkpoint is not None
        if resumed and self._frozen.exists():
            load_trained(self.loaded.model, self._frozen)
        freeze(self.loaded.model, self.config.train_vision, text_path)
        engine = _engine(self.loaded.model, self.config, self.kind, self.accumulation, self.directory)
        if resumed:
            engine.load_checkpoint(
                self.directory / CHECKPOINTS, tag=self.state.checkpoint, load_module_strict=False
            )
            if not self.state.validated:
                self._validate(stage, self.state.epoch, last)
        else:
            self.state.stage, self.state.epoch = stage.number, 0
            self._keep_frozen()
        for epoch in range(self.state.epoch, stage.epochs):
            self._epoch(engine, stage, epoch)
            self.state.epoch, self.state.validated = epoch + 1, False
            self._save(engine, stage)
            self._validate(stage, epoch + 1, last)
        engine.destroy()

    @property
    def _frozen(self) -> Path:
        """The weights that a stage starts from: its checkpoints hold only what it trains."""
        return self.directory / CHECKPOINTS / "start.safetensors"

    def _keep_frozen(self) -> None:
        if devices.rank() == 0:
            self._frozen.parent.mkdir(exist_ok=True)
            save_trained(self.loaded.model, self._frozen)

    def finish(self) -> None:
        """Say that nothing is left to train, before the checkpoints go."""
        self.state.stage, self.state.checkpoint = FINISHED, None
        self._write_state()

    def _reads(self, stage: Stage) -> bool:
        return stage.concept_weight > 0 or self.loaded.model.language_model is None

    def _epoch(self, engine: Any, stage: Stage, epoch: int) -> None:
        split = self.splits["train"]
        batches = epoch_batches(len(split.ids), self.config.batch_size, self.seed, stage.number, epoch)
        devices.seed_everything(
            int(np.random.SeedSequence([self.seed, stage.number, epoch]).generate_state(1)[0])
        )
        engine.train()
        for number, indices in enumerate(batches):
            begun = time.perf_counter()
            step = epoch * len(batches) + number
            rate = learning_rate(
                self.config, stage.learning_rate, step, stage.epochs * len(batches), len(batches)
            )
            for group in engine.optimizer.param_groups:
                group["lr"] = rate
            row = self._step(engine, stage, epoch, number, indices)
            self.state.step += 1
            seconds = time.perf_counter() - begun
            self._log(
                {
                    "step": self.state.step,
                    "stage": stage.number,
                    "epoch": epoch + (number + 1) / len(batches),
                    **row,
                    "learning_rate": rate,
                    "images_per_second": len(indices) / seconds,
                }
            )

    def _step(self, engine: Any, stage: Stage, epoch: int, number: int, indices: np.ndarray) -> Row:
        """One optimiser step over a global batch; each loss is the mean over all its tokens in that batch."""
        split = self.splits["train"]
        caption_tokens = sum(split.captions[i].predicted for i in indices)
        concept_tokens = sum(split.concepts[i].predicted for i in indices if split.concepts[i])
        micro_batches = np.split(indices, len(indices) // self.config.micro_batch_size)
        own = micro_batches[devices.rank() :: devices.world_size()]
        draw = torch.Generator().manual_seed(
            int(
                np.random.SeedSequence(
                    [self.seed, stage.number, epoch, number, devices.rank()]
                ).generate_state(1)[0]
            )
        )
        sums = {"caption_loss": 0.0, "concept_loss": 0.0}
        for micro, batch in zip(own, self._batches(split, own, stage), strict=True):
            pixels = augment(batch.pop("pixels").to(self.device, non_blocking=True), self.augmentation, draw)
            losses = engine(
                self.loaded.normalise(pixels),
                to_device(batch["caption"], self.device),
                to_device(batch["concept"], self.device),
                self.config.label_smoothing,
            )
            terms = {}
            if losses.caption is not None:
                terms["caption_loss"] = stage.caption_weight * losses.caption / max(caption_tokens, 1)
            if losses.concept is not None:
                terms["concept_loss"] = stage.concept_weight * losses.concept / max(concept_tokens, 1)
            for name, term in terms.items():
                sums[name] += _finite(term, name, self.state.step + 1, [split.ids[i] for i in micro])
            # the engine averages over micro-batches and ranks, and these terms are shares of a sum
            engine.backward(sum(terms.values()) * self.accumulation * devices.world_size())
            engine.step()
        row: Row = {"loss": sum(sums.values())}
        row |= {name: value for name, value in sums.items() if self._has(stage, name)}
        norm = engine.get_global_grad_norm()
        return row | ({} if norm is None else {"grad_norm": float(norm)})

    def _has(self, stage: Stage, term: str) -> bool:
        return (stage.caption_weight if term == "caption_loss" else stage.concept_weight) > 0

    def _batches(self, split: Split, parts: Sequence[np.ndarray], stage: Stage) -> Iterator[dict[str, Any]]:
        """Collated micro-batches, the next one prepared while the device works on this one."""

        def collate(indices: np.ndarray) -> dict[str, Any]:
            batch: dict[str, Any] = {"pixels": torch.from_numpy(np.ascontiguousarray(split.pixels[indices]))}
            concepts = [split.concepts[i] or Text([self.loaded.concept.pad], 1) for i in indices]
            captions = [split.captions[i] for i in indices]
            batch["caption"] = self.loaded.caption.collate(captions) if stage.caption_weight else None
            batch["concept"] = self.loaded.concept.collate(concepts) if stage.concept_weight else None
            return batch

        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(collate, parts[0])
            for part in [*parts[1:], None]:
                batch = waiting.result()
                if part is not None:
                    waiting = pool.submit(collate, part)
                yield batch

    def _validate(self, stage: Stage, epoch: int, last: bool) -> None:
        """Validation loss and, where due after `epoch` epochs, scores; the best weights so far are kept."""
        every = self.config.evaluate_every
        scores = (last and epoch == stage.epochs) or (every > 0 and epoch % every == 0)
        model = self.loaded.model
        model.eval()
        row = {"valid_loss": self._valid_loss()} | (self.evaluate() if scores else {})
        model.train()
        self._log({"step": self.state.step, "stage": stage.number, "epoch": epoch, **row})
        if scores and (self.state.best is None or row[PRIMARY] > self.state.best):
            self.state.best, self.state.best_step = row[PRIMARY], self.state.step
            save_trained(model, self.directory / BEST)
        self.state.validated = True
        self._write_state()

    @torch.no_grad()
    def _valid_loss(self) -> float:
        """Mean caption loss per token over the whole validation split, without label smoothing."""
        split = self.splits["valid"]
        parts = np.array_split(
            np.arange(len(split.ids)), math.ceil(len(split.ids) / self.config.micro_batch_size)
        )
        total = torch.zeros((), device=self.device)
        for batch in self._batches(split, parts, Stage(0, 0, 0, 1.0, 0.0)):
            pixels = self.loaded.normalise(batch["pixels"].to(self.device))
            total += self.loaded.model(pixels, to_device(batch["caption"], self.device)).caption
        return float(total) / sum(text.predicted for text in split.captions)

    def _save(self, engine: Any, stage: Stage) -> None:
        """A checkpoint of everything that training needs to go on; the pointer to it is written last."""
        folder, previous = self.directory / CHECKPOINTS, self.state.checkpoint
        tag = f"stage{stage.number}-epoch{self.state.epoch}"
        engine.save_checkpoint(folder, tag=tag, exclude_frozen_parameters=True)
        self.state.checkpoint = tag
        self._write_state()
        if previous and previous != tag and devices.rank() == 0:
            shutil.rmtree(folder / previous, ignore_errors=True)

    def _write_state(self) -> None:
        if devices.rank() == 0:
            write_json(self.directory / STATE, asdict(self.state))

    def _log(self, row: Row) -> None:
        row["time"] = time.time()
        if devices.rank() == 0:
            with (self.directory / LOSSES).open("a") as file:
                file.write(json.dumps(row) + "\n")
        self.log(row)


def place(model: Captioner, config: TrainConfig, kind: devices.Kind) -> None:
    """Put a model on its device, the frozen language model in the precision that it computes in."""
    model.autocast_dtype = precision(config, kind)
    if model.language_model is not None and model.autocast_dtype is not None:
        model.language_model.to(model.autocast_dtype)
    if kind == "cpu":  # torch's fused attention is slower there than plain products, backwards above all
        for part in (model.vision_model, model.language_model):
            if part is not None:
                part.set_attn_implementation("eager")
    model.to(devices.torch_device(kind))


def precision(config: TrainConfig, kind: devices.Kind) -> torch.dtype | None:
    """The autocast dtype: bf16 where asked for, or where the device has it; None is fp32."""
    bf16 = config.precision == "bf16" or (config.precision == "auto" and devices.has_bf16(kind))
    return torch.bfloat16 if bf16 else None


def _engine(model: nn.Module, config: TrainConfig, kind: str, accumulation: int, directory: Path) -> Any:
    deepspeed = _import_deepspeed(kind)
    decay = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    rest = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=config.betas,
    )
    settings = _merged(
        {
            "train_micro_batch_size_per_gpu": config.micro_batch_size,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": config.max_grad_norm,
            "zero_optimization": {"stage": 0},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        },
        config.deepspeed,
    )
    if devices.rank() == 0:
        write_json(directory / "ds_config.json", settings)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def _merged(settings: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(settings.get(key), dict)
        settings[key] = _merged(settings[key], value) if both else value
    return settings


def _import_deepspeed(kind: str) -> Any:
    """Import deepspeed and join the process group, alone if no launcher started us."""
    import logging

    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.setdefault("DS_ACCELERATOR", kind)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if kind == "cpu":  # or it compiles a shared-memory kernel for 40 s; gloo does without
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not torch.distributed.is_initialized():
        deepspeed.init_distributed(deepspeed.get_accelerator().communication_backend_name(), verbose=False)
    return deepspeed


def _finite(term: Tensor, name: str, step: int, ids: Sequence[str]) -> float:
    value = float(term.detach())
    if not math.isfinite(value):
        what = f"{name} became {value} at step {step}; images of that batch: {', '.join(ids)}"
        hint = "Lower train.learning_rate, or set train.precision: fp32."
        raise UserError([Problem(what, hint=hint)], exit_code=1)
    return value


def _indivisible(config: TrainConfig, world: int) -> Problem:
    return Problem(
        f"got {config.batch_size}, which {world} devices with micro batches of {config.micro_batch_size} "
        f"cannot share; a multiple of {world * config.micro_batch_size} is allowed",
        key="train.batch_size",
    )
