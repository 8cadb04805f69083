"""Fine-tuning in stages, and resuming after an interruption.

It is independent of metrics and MLflow: `log` gets each row of results, and `evaluate` scores the model on
validation. Every rank of a launch runs the same training on its share of each batch; rank 0 writes.
"""

import contextlib
import gc
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from harness.config.sections import AugmentConfig
from harness.errors import UserError
from harness.machine import device as devices
from harness.machine import ranks
from harness.machine.interrupts import Interrupts
from harness.models import parts
from harness.models.loading import Loaded, load_trained, save_trained
from harness.training import patience, schedule
from harness.training.averages import Average
from harness.training.best import Best
from harness.training.compiling import OFF, Compiler, chosen
from harness.training.engine import engine, gathered, place, release, resume, whole
from harness.training.finite import check_weights
from harness.training.learning import Learner, Row
from harness.training.profile import Profiler
from harness.training.resume import BEST, LOSSES, Checkpoints, forget_rows_after, rows_of
from harness.training.saving import Saver
from harness.training.schedule import Stage, epoch_batches, indivisible, stages
from harness.training.selfcritical import Measure, SelfCritical, without_dropout
from harness.training.settings import TrainConfig
from harness.training.split import Split
from harness.training.validation import validate

_WIDTHS = 8
"""Texts are padded to a multiple of this on accelerators, whose matrix products are faster for it."""


@dataclass
class Training:
    """One training; `run` writes `best.safetensors` and `losses.jsonl` to `directory`.

    `load` gives the model before training. `log` gets every row of `losses.jsonl`. `evaluate(loaded)` scores
    the current model and returns `valid_*` numbers; among them, `valid_primary` chooses the best weights. All
    ranks use rank 0's numbers. `say` prints a line. Without a split `valid` there are no validations, and the
    last weights are kept, or their average. `until` is as in `stages`; if it has `average`, that says which
    of the two. `measure` is needed for the loss `reward`. `validates_by`: the loss of a validation.
    """

    config: TrainConfig
    augmentation: AugmentConfig
    load: Callable[[], Loaded]
    splits: Mapping[str, Split]
    kind: devices.Kind
    seed: int
    directory: Path
    log: Callable[[Row], None]
    evaluate: Callable[[Loaded], dict[str, float]]
    say: Callable[[str], None] = lambda text: None
    until: Mapping[str, Any] | None = None
    measure: Measure | None = None
    validates_by: Literal["caption", "concepts"] = "caption"

    def __post_init__(self) -> None:
        if problem := indivisible(self.config, ranks.world_size()):
            raise UserError([problem])
        self.device = devices.torch_device(self.kind)
        self.multiple = 1 if self.kind == "cpu" else _WIDTHS
        self.interrupts = Interrupts()
        self.compiler = Compiler(chosen(self.config, self.kind), self.say)
        self.checkpoints = Checkpoints(self.directory, self.config.keep_checkpoints)
        self.best = Best(self.directory, self.checkpoints.folder, self.config.keep_best)
        self.average: Average | None = None
        self.saver = Saver(self.config, self.checkpoints)
        profiled = self.config.profile if ranks.rank() == 0 else 0
        self.profiler = Profiler(profiled, self.kind, self.directory)
        self.plan, self.validates = stages(self.config, self.until), "valid" in self.splits
        self.per_epoch = math.ceil(len(self.splits["train"].ids) / self.config.batch_size)
        self.lengths = np.array([len(text.ids) for text in self.splits["train"].captions])

    def run(self) -> Loaded:
        """Train from the newest checkpoint -> the model with its best weights.

        An interruption does not change the weights, because order and randomness of a step depend only on
        seed, stage, step and rank.
        """
        self.loaded = self._placed()
        self.state = self.saver.saved = ranks.agree(self.checkpoints.newest())
        if ranks.rank() == 0:
            forget_rows_after(self.directory / LOSSES, self.state)
            for name in self.checkpoints.damaged(self.state):
                what = "is not used: it is damaged, or another version saved it"
                self.say(f"{self.checkpoints.folder / name} {what}")
        self.best.begin(self.state)
        try:
            for stage in self.plan:
                if stage.number >= self.state.stage and not self.state.ended:
                    self._stage(stage)
        except RuntimeError as error:  # a step with less memory would not know of an interruption
            if devices.out_of_memory(error) and self.interrupts.came is not None:
                raise KeyboardInterrupt from error
            raise
        finally:
            with self.interrupts.wait():
                self.saver.writer.leave()
        if ranks.rank() == 0:
            if not self.state.ended:
                self.best.finish()
                self.state.kept = len(self.best.ranked)
            self.checkpoints.finish(self.state)
        ranks.agree(None)  # waits until rank 0 has written
        load_trained(self.loaded.model, self.directory / BEST)
        return self.loaded

    def _keep_last(self, average: Average | None) -> None:
        """Save the weights that a training without validations ends with, or their average."""
        self.saver.written()
        wanted = average if self.until is None or self.until.get("average") else None
        with wanted.instead(self.loaded.model) if wanted else contextlib.nullcontext():
            if ranks.rank() == 0:
                save_trained(self.loaded.model, self.directory / BEST)

    def _placed(self) -> Loaded:
        loaded = self.load()
        place(loaded.model, self.config, self.kind)
        if self.compiler.used != OFF:
            self.compiler.add(loaded.model.parts_to_compile(self.compiler.used))
        return loaded

    def _stage(self, stage: Stage) -> None:
        """Train one stage from the current state, with its own optimiser and schedule."""
        resumed = self.state.stage == stage.number and self.state.step > 0
        universal = self.saver.for_these_ranks(self.state) if resumed else None
        start = self.checkpoints.start(stage.number)
        if resumed and start.exists():
            load_trained(self.loaded.model, start)
        else:
            if stage.from_best and not resumed:
                ranks.agree(None)  # waits until rank 0 has written
                load_trained(self.loaded.model, self.directory / BEST)
            if ranks.rank() == 0:
                start.parent.mkdir(exist_ok=True)
                save_trained(self.loaded.model, start)
        self.loaded.model.freeze(stage.texts)
        self.say(f"stage {stage.number} trains {parts.worded(parts.counts(self.loaded.model))} parameters")
        ranks.every(None)  # waits until all have loaded, because devices' collectives time out in minutes
        trainer = engine(self.loaded.model, self.config, self.kind, self.directory, universal is not None)
        self.average = None if self.config.ema is None else Average(self.loaded.model, self.config.ema)
        try:
            if resumed:
                resume(trainer, universal or self.checkpoints.path(self.state), universal is not None)
                if self.average:
                    self.average.load(self.checkpoints.path(self.state))
                self.saver.forget(universal)
                if not self.state.validated:
                    validate(self, stage)
            else:
                self.state.stage, self.state.done = stage.number, 0
                patience.begin(self.state)
                if stage.reward and self.validates:
                    validate(self, stage, begins=True)
            with self._sampling(trainer, stage) as critic:
                self._steps(trainer, stage, Learner(self, trainer, stage, critic))
        finally:
            release(trainer)
            average, self.average = self.average, None
            del trainer
            gc.collect()
        self._end(stage)
        if not self.validates and stage is self.plan[-1]:
            self._keep_last(average)

    def _steps(self, trainer: Any, stage: Stage, learner: Learner) -> None:
        """Do the remaining steps of a stage, with checkpoints and validations.

        After an interruption on any rank, all ranks finish the step, save and stop.
        """
        begun = self.state.done
        pauses = schedule.pauses(stage, self.per_epoch) if self.validates else {self.per_epoch}
        check_weights(trainer, self.loaded.model, self.where(stage), self.directory)
        for step in range(begun, round(stage.last * self.per_epoch)):
            if patience.is_over(self.config, self.state.waited):
                break
            epoch, number = divmod(step, self.per_epoch)
            if number == 0 or step == begun:
                order = self._order(stage.number, epoch)
            if step and (number or self.per_epoch) in pauses and self._has_degenerated(stage):
                break
            paused = number + 1 in pauses
            with self.interrupts.wait():
                with self.profiler.step(self.state.step, paused):
                    learner.step(step, order[number])
                if paused or learner.interrupted or self._due(step + 1):
                    learner.read()
                    check_weights(trainer, self.loaded.model, self.where(stage), self.directory)
                    validated = not (paused and self.validates)
                    self.saver.save(trainer, self.state, self.average, validated)
                if learner.interrupted:
                    self.saver.written()
            if learner.interrupted or (paused and self.interrupts.came):
                raise KeyboardInterrupt
            if paused and self.validates:
                validate(self, stage)

    def _due(self, steps: int) -> bool:
        every = self.config.checkpoint_every_steps
        return every > 0 and steps % every == 0

    def _end(self, stage: Stage) -> None:
        """Reassemble the weights that ZeRO-3 sharded, because the next stage shards them in another way."""
        if self.config.zero_stage == 3:
            self.loaded = self.copy(self.checkpoints.start(stage.number + 1))
            ranks.agree(None)  # else rank 0 might delete what others still read

    def copy(self, file: Path) -> Loaded:
        """A whole copy, on every rank, of the model that ZeRO-3 sharded; `file` passes trained weights."""
        with whole(self.loaded.model):
            if ranks.rank() == 0:
                save_trained(self.loaded.model, file)
        ranks.agree(None)
        loaded = self._placed()
        load_trained(loaded.model, file)
        return loaded

    def _order(self, stage: int, epoch: int) -> list[np.ndarray]:
        """The images of each optimiser step of an epoch."""
        grouped = self.config.group_by_length
        return epoch_batches(self.lengths, self.config.batch_size, self.seed, stage, epoch, grouped)

    @contextlib.contextmanager
    def _sampling(self, trainer: Any, stage: Stage) -> Iterator[SelfCritical | None]:
        """The block of a stage's steps; what samples captions in it, if the stage has the loss `reward`."""
        if not stage.reward:
            yield None
            return
        if self.measure is None:
            raise ValueError("the loss reward needs a function that measures captions")
        split = self.splits["train"]
        critic = SelfCritical(
            stage,
            self.loaded,
            split.ids,
            split.captions,
            self.measure,
            self.seed,
            self.multiple,
            partial(gathered, trainer),
        )
        with without_dropout(self.loaded.model):
            yield critic
        if critic.total:
            self.say(critic.worded())

    def _has_degenerated(self, stage: Stage) -> bool:
        """Whether a validation score of the stage fell below its floor (`RewardConfig.stop_when`)."""
        return bool(stage.reward) and bool(ranks.agree(patience.fallen_in(stage, self._rows())))

    def floors(self, stage: Stage) -> dict[str, float]:
        """The floors of this stage's validation scores, by name."""
        return ranks.agree(patience.floors_of(stage, self._rows())) if stage.reward else {}

    def _rows(self) -> Iterable[Row]:
        return rows_of(self.directory / LOSSES) if ranks.rank() == 0 else ()

    @property
    def epoch(self) -> float:
        """The epochs of the stage that are done; whole after an epoch."""
        done, rest = divmod(self.state.done, self.per_epoch)
        return self.state.done / self.per_epoch if rest else done

    def where(self, stage: Stage) -> str:
        """The current step, stage and epoch in words."""
        epoch = math.ceil(self.state.done / self.per_epoch)
        return f"step {self.state.step} (stage {stage.number}, epoch {epoch})"

    def note(self, row: Row) -> None:
        """Give a row of results to `log`, and have rank 0 add it to `losses.jsonl`."""
        row["time"] = time.time()
        if ranks.rank() == 0:
            with (self.directory / LOSSES).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
        self.log(row)
