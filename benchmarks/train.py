"""Our training step compared with a bare PyTorch loop and transformers' Trainer; two ranks and one.

    python benchmarks/train.py

All use the same model (20 M parameters, random weights), batches, AdamW, clipping and precision, in one
process. Steps of ours and of the bare loop alternate, so that a busy machine slows both. Our time includes
everything from step to step: the next images, DeepSpeed, and the row of losses.jsonl. The bare loop has its
batches in memory and logs nothing. Blocks of Trainer alternate with blocks of ours.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import blip2
import torch
from torch import Tensor, nn

from harness.config.sections import AugmentConfig
from harness.machine import device, ranks
from harness.models.loading import Loaded
from harness.training import train
from harness.training.engine import engine, place, release
from harness.training.learning import Learner
from harness.training.resume import State
from harness.training.schedule import Stage
from harness.training.settings import TrainConfig

device.probe("cpu")
BATCH, MICRO, STEPS, BLOCKS = 8, 4, 10, 3
LOSSES = ("caption", "concept")
STAGE = Stage(1, 1, 1e-4, dict.fromkeys(LOSSES, 1.0))
CONFIG = TrainConfig(batch_size=BATCH, micro_batch_size=MICRO, learning_rate=1e-4, precision="fp32")


class Ours(train.Training):
    """A training whose steps are called from outside."""

    def begin(self) -> None:
        """Do what precedes the first step of a stage."""
        self.loaded, self.state, self.order = self._placed(), State(), self._order(1, 0)
        self.loaded.model.freeze(LOSSES)
        self.trainer = engine(self.loaded.model, self.config, self.kind, self.directory)
        self.learner = Learner(self, self.trainer, STAGE)

    def step(self, number: int) -> None:
        """One optimiser step."""
        number %= self.per_epoch
        self.learner.step(number, self.order[number])


def ours(folder: Path, directory: Path) -> Ours:
    """Our training, ready for its first step."""
    data = blip2.split(blip2.load(folder))
    training = Ours(
        CONFIG,
        AugmentConfig(),
        lambda: blip2.load(folder),
        {"train": data, "valid": data},
        "cpu",
        42,
        directory,
        lambda row: None,
        lambda loaded: {},
    )
    training.begin()
    return training


def ready(training: Ours, loaded: Loaded) -> list[list[dict[str, Any]]]:
    """The micro-batches of each step of an epoch, as tensors."""
    data = training.splits["train"]
    return [
        [
            {
                "pixels": loaded.normalise(torch.from_numpy(data.pixels[part])),
                "caption": loaded.caption.collate([data.captions[i] for i in part]),
                "concept": loaded.concept.collate([data.concepts[i] for i in part]),
                "tokens": (
                    sum(data.captions[i].predicted for i in indices),
                    sum(data.concepts[i].predicted for i in indices),
                ),
            }
            for part in indices.reshape(-1, MICRO)
        ]
        for indices in training.order
    ]


def loss_of(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """A micro-batch's share of the loss."""
    losses = model(batch["pixels"], batch["caption"], batch["concept"], CONFIG.label_smoothing)
    return losses.caption / batch["tokens"][0] + losses.concept / batch["tokens"][1]


def bare(folder: Path, batches: list[list[dict[str, Any]]]) -> Iterator[float]:
    """The losses of successive optimiser steps in plain PyTorch."""
    model = blip2.load(folder).model
    place(model, CONFIG, "cpu")
    model.freeze(LOSSES)
    model.train()
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=1e-4, weight_decay=CONFIG.weight_decay)
    while True:
        for step in batches:
            total = 0.0
            for batch in step:
                loss = loss_of(model, batch)
                loss.backward()
                total += loss.item()
            nn.utils.clip_grad_norm_(own, CONFIG.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            yield total


class Shares(nn.Module):
    """The model in the form for Trainer: from a collated batch to a loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Any) -> dict[str, Tensor]:
        """The mean loss of a micro-batch."""
        return {"loss": loss_of(self.model, batch)}


def trainer_steps(folder: Path, training: Ours, directory: Path) -> list[float]:
    """Seconds from step to step of transformers' Trainer on the same images."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    loaded = blip2.load(folder)
    place(loaded.model, CONFIG, "cpu")
    loaded.model.freeze(LOSSES)
    data, times = training.splits["train"], []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    def collate(rows: list[int]) -> dict[str, Any]:
        captions, concepts = [data.captions[i] for i in rows], [data.concepts[i] for i in rows]
        return {
            "pixels": loaded.normalise(torch.from_numpy(data.pixels[rows])),
            "caption": loaded.caption.collate(captions),
            "concept": loaded.concept.collate(concepts),
            "tokens": (sum(t.predicted for t in captions), sum(t.predicted for t in concepts)),
        }

    arguments = TrainingArguments(
        str(directory),
        max_steps=STEPS,
        per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=BATCH // MICRO,
        learning_rate=1e-4,
        weight_decay=CONFIG.weight_decay,
        max_grad_norm=CONFIG.max_grad_norm,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    images = list(range(len(data.ids)))
    made = Trainer(Shares(loaded.model), arguments, collate, images, callbacks=[Clock()])
    made.log = lambda *_, **__: None
    made.train()
    return [after - before for before, after in pairwise(times)]


def timed(step: Any) -> float:
    """Seconds of one call."""
    begun = time.perf_counter()
    step()
    return time.perf_counter() - begun


def beside_others(folder: Path) -> None:
    """Alternate ours with the bare loop and with Trainer, and print the times."""
    with tempfile.TemporaryDirectory() as directory:
        training = ours(folder, Path(directory))
        loop = bare(folder, ready(training, training.loaded))
        training.step(0), next(loop)
        pairs = [
            (timed(lambda n=n: training.step(n)), timed(lambda: next(loop)))
            for n in range(1, 1 + STEPS * BLOCKS)
        ]
        our, their = (statistics.median(times) for times in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"bare loop        {their:6.3f} s a step")
        more = f"{100 * (ratio - 1):+.1f} % (median of {len(pairs)} pairs)"
        print(f"harness          {our:6.3f} s a step   {more}")
        mine, trainers = [], []
        for _ in range(BLOCKS):
            mine += [timed(lambda n=n: training.step(n)) for n in range(STEPS)][1:]
            trainers += trainer_steps(folder, training, Path(directory))[1:]
        our, their = statistics.median(mine), statistics.median(trainers)
        print(f"Trainer          {BATCH / their:6.1f} images/s")
        print(f"harness          {BATCH / our:6.1f} images/s   {their / our:.2f} x")
        release(training.trainer)


def one_rank(folder: Path) -> None:
    """Run our steps as a rank of a launch; rank 0 prints the images per second."""
    ranks.start()
    with tempfile.TemporaryDirectory() as directory:
        training = ours(folder, Path(directory))
        times = [timed(lambda n=n: training.step(n)) for n in range(STEPS)]
    if ranks.rank() == 0:
        print(json.dumps(BATCH / statistics.median(times[1:])))
    ranks.stop()
    ranks.leave()


def on_ranks(folder: Path, count: int, threads: int) -> float:
    """Images per second with `count` ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command = [sys.executable, *(launcher if count > 1 else []), __file__, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    """Print the three comparisons."""
    with blip2.folder() as folder:
        beside_others(folder)
        cores = len(os.sched_getaffinity(0))
        for _ in range(2):
            one, two = on_ranks(folder, 1, cores), on_ranks(folder, 2, max(1, cores // 2))
            print(f"1 rank, {cores} threads {one:6.1f} images/s")
            print(f"2 ranks, {max(1, cores // 2)} thread each {two:6.1f} images/s   {two / one:.2f} x")


if __name__ == "__main__":
    one_rank(Path(sys.argv[1])) if len(sys.argv) > 1 else main()
