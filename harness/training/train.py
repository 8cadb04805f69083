"""Fine-tuning in stages: loop, losses, validation, and resuming after an interruption.

It is independent of metrics and MLflow: `log` gets each row of results, and `evaluate` scores the model on
validation. Every rank of a launch runs the same training on its share of each batch; rank 0 writes.
"""

import contextlib
import gc
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from harness.config.sections import AugmentConfig
from harness.data.augment import augment
from harness.errors import Problem, UserError
from harness.machine import device as devices
from harness.machine import ranks
from harness.machine.interrupts import Interrupts
from harness.models import parts
from harness.models.loading import Loaded, batch_of, load_trained, save_trained, trained_weights
from harness.models.text import Text, to_device
from harness.store import free, gb, write
from harness.training import losses, patience
from harness.training.averages import Average
from harness.training.best import Best, Validated
from harness.training.compiling import OFF, Compiler, chosen
from harness.training.engine import (
    accumulation,
    casts_kept,
    engine,
    place,
    release,
    resume,
    save,
    to_universal,
    whole,
)
from harness.training.outstanding import Learnt, Numbers, Outstanding
from harness.training.profile import Profiler
from harness.training.resume import (
    BEST,
    EMA,
    FLOOR,
    LATEST,
    LOSSES,
    UNIVERSAL,
    VALIDATED,
    Checkpoints,
    forget_rows_after,
    rows_of,
)
from harness.training.schedule import Stage, epoch_batches, indivisible, learning_rate, stages
from harness.training.selfcritical import Measure, SelfCritical, without_dropout
from harness.training.settings import TrainConfig
from harness.training.writer import Writer

PRIMARY = "valid_primary"
TERMS = tuple(f"{name}_loss" for name in losses.LOSSES)
DIVERGED = (
    "Training diverged. Lower train.learning_rate, raise train.warmup_steps, set train.max_grad_norm to 1, "
    "or set train.precision: fp32."
)
_WIDTHS = 8
"""Texts are padded to a multiple of this on accelerators, whose matrix products are faster for it."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Split:
    """Images and texts of one split; `pixels[indices]` gives uint8 (B, S, S, 3)."""

    ids: Sequence[str]
    pixels: Any
    captions: Sequence[Text]
    concepts: Sequence[Text | None]


@dataclass
class Training:
    """One training; `run` writes `best.safetensors` and `losses.jsonl` to `directory`.

    `load` gives the model before training. `log` gets every row of `losses.jsonl`. `evaluate(loaded)` scores
    the current model and returns `valid_*` numbers; among them, `valid_primary` chooses the best weights. All
    ranks use rank 0's numbers. `say` prints a line. Without a split `valid` there are no validations, and the
    last weights are kept, or their average. `until` is as in `stages`; if it has `average`, that says which
    of the two. `measure` is needed for the loss `reward`.
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

    def __post_init__(self) -> None:
        if problem := indivisible(self.config, ranks.world_size()):
            raise UserError([problem])
        self.device = devices.torch_device(self.kind)
        self.multiple = 1 if self.kind == "cpu" else _WIDTHS
        self.interrupts, self.interrupted = Interrupts(), False
        self.outstanding: Outstanding | None = None
        self.critic: SelfCritical | None = None
        self.arrived = -math.inf  # when the numbers of the last step that was read were there
        self.compiler = Compiler(chosen(self.config, self.kind), self.say)
        self.checkpoints = Checkpoints(self.directory, self.config.keep_checkpoints)
        self.best = Best(self.directory, self.checkpoints.folder, self.config.keep_best)
        self.average: Average | None = None
        self.writer = Writer()
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
        self.state = self.saved = ranks.agree(self.checkpoints.newest())
        if ranks.rank() == 0:
            forget_rows_after(self.directory / LOSSES, self.state)
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
                self.writer.leave()
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
        self._written()
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
        universal = self._for_these_ranks() if resumed else None
        start = self.checkpoints.start(stage.number)
        if resumed and start.exists():
            load_trained(self.loaded.model, start)
        elif ranks.rank() == 0:
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
                self._forget(universal)
                if not self.state.validated:
                    self._validate(stage)
            else:
                self.state.stage, self.state.done = stage.number, 0
                patience.begin(self.state)
                if stage.reward and self.validates:
                    self._validate(stage, begins=True)
            with self._sampling(stage):
                self._steps(trainer, stage)
        finally:
            release(trainer)
            average, self.average = self.average, None
            del trainer
            gc.collect()
        self._end(stage)
        if not self.validates and stage is self.plan[-1]:
            self._keep_last(average)

    def _steps(self, trainer: Any, stage: Stage) -> None:
        """Do the remaining steps of a stage, with checkpoints, and validation after each epoch.

        After an interruption on any rank, all ranks finish the step, save and stop.
        """
        begun = self.state.done
        self._check_weights(trainer, stage)
        for step in range(begun, stage.last * self.per_epoch):
            if patience.is_over(self.config, self.state.waited):
                break
            epoch, number = divmod(step, self.per_epoch)
            if number == 0 or step == begun:
                order = self._order(stage.number, epoch)
            if number == 0 and step and self._has_degenerated(stage):
                break
            ended = number + 1 == self.per_epoch
            with self.interrupts.wait():
                with self.profiler.step(self.state.step, ended):
                    self._step(trainer, stage, step, order[number])
                if ended or self.interrupted or self._due(step + 1):
                    self._read()
                    self._check_weights(trainer, stage)
                    self._save(trainer, validated=not (ended and self.validates))
                if self.interrupted:
                    self._written()
            if self.interrupted or (ended and self.interrupts.came):
                raise KeyboardInterrupt
            if ended and self.validates:
                self._validate(stage)

    def _for_these_ranks(self) -> Path | None:
        """The checkpoint converted for another number of ranks; None if no conversion is needed.

        Each rank's checkpoint holds its part of the optimiser; only at ZeRO stage 0 it holds all of it.
        """
        was, now = self.state.zero_stage, self.config.zero_stage
        if was != now and {was, now} != {1, 2}:
            what = f"it was interrupted at ZeRO stage {was}, whose checkpoints can't be read at stage {now}"
            hint = f"Continue at the same stage: --set train.zero_stage={was}"
            raise UserError([Problem(what, self.checkpoints.folder, hint=hint)])
        if now == 0 or (was, self.state.ranks) == (now, ranks.world_size()):
            return None
        target = self.checkpoints.folder / UNIVERSAL
        if ranks.rank() == 0:
            to_universal(self.checkpoints.path(self.state), target)
        ranks.agree(None)
        return target

    def _forget(self, universal: Path | None) -> None:
        """Delete the output of `_for_these_ranks` after all ranks have read it."""
        ranks.agree(None)
        if universal is not None and ranks.rank() == 0:
            shutil.rmtree(universal)

    def _due(self, steps: int) -> bool:
        every = self.config.checkpoint_every_steps
        return every > 0 and steps % every == 0

    def _end(self, stage: Stage) -> None:
        """Reassemble the weights that ZeRO-3 sharded, because the next stage shards them in another way."""
        if self.config.zero_stage == 3:
            self.loaded = self._copy(self.checkpoints.start(stage.number + 1))
            ranks.agree(None)  # else rank 0 might delete what others still read

    def _copy(self, file: Path) -> Loaded:
        """A whole copy, on every rank, of the model that ZeRO-3 sharded; `file` passes trained weights."""
        with whole(self.loaded.model):
            if ranks.rank() == 0:
                save_trained(self.loaded.model, file)
        ranks.agree(None)
        loaded = self._placed()
        load_trained(loaded.model, file)
        return loaded

    def _step(self, trainer: Any, stage: Stage, step: int, indices: np.ndarray) -> None:
        """Give optimiser step `step` (from 0) of a stage to the device, and read the step before it."""
        begun = time.perf_counter()
        steps = stage.epochs * self.per_epoch
        rate = stage.learning_rate
        if not stage.constant:
            rate = learning_rate(self.config, rate, step, steps, self.per_epoch)
        for group in trainer.optimizer.param_groups:
            group["lr"] = rate * group.get("factor", 1.0)  # checkpoints from before factors have none
        self._randomise(stage, step)
        trainer.train()
        learnt = self._learn(trainer, stage, step, indices)
        if self.average:
            self.average.follow(trainer)
        self.state.step, self.state.done = self.state.step + 1, step + 1
        epoch = (step + 1) / self.per_epoch
        given = Outstanding(self.state.step, stage, epoch, rate, begun, learnt)
        self._read()
        self.outstanding = given
        if self.critic:
            self.critic.total += time.perf_counter() - begun

    def _read(self) -> None:
        """Log the outstanding step, if there is one; stop all ranks if its numbers are not finite."""
        step, self.outstanding = self.outstanding, None
        if step is None:
            return
        numbers, arrived = step.learnt.numbers.read()
        terms, (interrupted, *norms) = numbers[: len(TERMS)], numbers[len(TERMS) :]
        self.interrupted = bool(interrupted)
        if not all(map(math.isfinite, terms)):
            self._diverged(step)
        row: Row = {"step": step.step, "stage": step.stage.number, "epoch": step.epoch, "loss": sum(terms)}
        shown = zip(losses.LOSSES, TERMS, terms, strict=True)
        row |= {term: value for name, term, value in shown if name in step.stage.losses}
        row |= self._gradients(step, norms[0] if norms else step.learnt.norm)
        row |= step.learnt.sampled
        speed = self.config.batch_size / step.seconds(arrived, self.arrived)
        self.arrived = arrived
        self._log({**row, "learning_rate": step.learning_rate, "images_per_second": speed})

    def _order(self, stage: int, epoch: int) -> list[np.ndarray]:
        """The images of each optimiser step of an epoch."""
        grouped = self.config.group_by_length
        return epoch_batches(self.lengths, self.config.batch_size, self.seed, stage, epoch, grouped)

    def _randomise(self, stage: Stage, step: int) -> None:
        """Seed dropout and augmentation of a step, so that interruptions do not change them."""
        one, two = np.random.SeedSequence([self.seed, stage.number, step, ranks.rank()]).generate_state(2)
        devices.seed_everything(int(one))
        self.draw = torch.Generator().manual_seed(int(two))

    def _learn(self, trainer: Any, stage: Stage, step: int, indices: np.ndarray) -> Learnt:
        """Learn from a global batch; each loss is the mean over all its tokens in that batch.

        Nothing here waits for the device, but ZeRO does where it looks for an overflow.
        """
        split = self.splits["train"]
        tokens = {
            "caption": sum(split.captions[i].predicted for i in indices),
            "concept": sum(split.concepts[i].predicted for i in indices if split.concepts[i]),
        }
        if stage.reward:
            tokens["reward"] = stage.reward.samples * sum(split.captions[i].predicted > 0 for i in indices)
        micro_batches = np.split(indices, len(indices) // self.config.micro_batch_size)
        own = micro_batches[ranks.rank() :: ranks.world_size()]
        found = []
        batches: Iterable[dict[str, Any]] = self._seen(self._batches(split, own, stage))
        sampled: Row = {}
        if self.critic:  # not below, where casts are kept: autocast would keep some without gradient
            batches = list(batches)
            samples, sampled = self.critic(step, micro_batches, [batch["pixels"] for batch in batches])
            for batch, one in zip(batches, samples, strict=True):
                batch["samples"] = one
        with casts_kept(self.config, self.kind):
            for number, batch in enumerate(batches):
                if number:
                    trainer.step()  # of the micro-batch before
                computed = trainer(
                    batch.pop("pixels"),
                    to_device(batch["caption"], self.device),
                    to_device(batch["concept"], self.device),
                    self.config.label_smoothing,
                    batch.pop("samples", None),
                )
                none = torch.zeros((), device=self.device)
                shares = [
                    loss(computed, tokens, stage.losses[name]) if name in stage.losses else none
                    for name, loss in losses.LOSSES.items()
                ]
                found.append(torch.stack(shares).detach())
                # the engine averages over micro-batches and ranks, but these terms are shares of a sum
                trainer.backward(sum(shares) * accumulation(self.config) * ranks.world_size())
        trainer.step()
        terms, norm = torch.stack(found), trainer.get_global_grad_norm()
        scale = trainer.optimizer.loss_scale if self.config.precision == "fp16" else None
        numbers = Numbers(self._summed(terms, norm), self.kind)
        on_host = None if norm is None or torch.is_tensor(norm) else float(norm)
        return Learnt(own, terms, numbers, on_host, scale, sampled)

    def _seen(self, batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Micro-batches with pixels as the model sees them: on its device, augmented and normalised."""
        for batch in batches:
            images = batch.pop("pixels")
            if torch.is_tensor(images):  # whole images differ in size and stay on the CPU
                images = devices.moved(images, self.device)
            images = augment(images, self.augmentation, self.draw)
            yield batch | {"pixels": self.loaded.normalise(images)}

    @contextlib.contextmanager
    def _sampling(self, stage: Stage) -> Iterator[None]:
        """The block of a stage's steps, which sample captions if the stage has the loss `reward`."""
        if not stage.reward:
            yield
            return
        if self.measure is None:
            raise ValueError("the loss reward needs a function that measures captions")
        split = self.splits["train"]
        self.critic = SelfCritical(
            stage, self.loaded, split.ids, split.captions, self.measure, self.seed, self.multiple
        )
        try:
            with without_dropout(self.loaded.model):
                yield
            if self.critic.total:
                self.say(self.critic.worded())
        finally:
            self.critic = None

    def _has_degenerated(self, stage: Stage) -> bool:
        """Whether a validation score of the stage fell below its floor (`RewardConfig.stop_when`)."""
        if not stage.reward:
            return False
        file = self.directory / LOSSES
        rows = rows_of(file) if ranks.rank() == 0 else ()
        return bool(ranks.agree(patience.fallen_in(stage, rows)))

    def _summed(self, found: Tensor, norm: Any) -> Tensor:
        """Sum loss terms (M, L) over all ranks' micro-batches; the norm of gradients follows if a tensor.

        The same collective tells all ranks whether one was interrupted.
        """
        came = found.new_full((1,), float(self.interrupts.came is not None))
        total = ranks.total(torch.cat([found.sum(0), came]))
        norms = [norm.detach().reshape(1).to(total.device)] if torch.is_tensor(norm) else []
        return torch.cat([total, *norms])

    def _gradients(self, step: Outstanding, norm: float | None) -> Row:
        """Norm of the gradients before clipping, if ZeRO computes it, and in fp16 the loss scale.

        Only in fp16 gradients may overflow: the step is skipped and the scale is halved.
        """
        finite = norm is not None and math.isfinite(norm)
        if norm is not None and not finite and step.learnt.scale in (None, 1):
            what = f"the gradients of step {step.step} are not finite, although its loss is"
            raise UserError([Problem(what, hint=DIVERGED)], None, 1)
        row: Row = {"grad_norm": norm} if finite else {}
        return row | ({} if step.learnt.scale is None else {"loss_scale": step.learnt.scale})

    def _diverged(self, step: Outstanding) -> NoReturn:
        """Stop all ranks and name the images of the first loss that is not finite."""
        ids, learnt = self.splits["train"].ids, step.learnt
        bad = [
            (TERMS[term], float(learnt.losses[row, term]), [ids[i] for i in learnt.images[row]])
            for row, term in (~torch.isfinite(learnt.losses)).nonzero().tolist()
        ]
        name, value, images = sorted(ranks.gather(bad))[0]
        what = f"{name} became {value} at step {step.step}; images of that batch: {', '.join(images)}"
        raise UserError([Problem(what, hint=DIVERGED)], None, 1)

    def _batches(self, split: Split, parts: Sequence[np.ndarray], stage: Stage) -> Iterator[dict[str, Any]]:
        """Collated micro-batches; a thread prepares the next one while the device works on this one."""

        def collate(indices: np.ndarray) -> dict[str, Any]:
            batch: dict[str, Any] = {"pixels": batch_of(split.pixels, indices)}
            concepts = [split.concepts[i] or Text([self.loaded.concept.pad], 1) for i in indices]
            captions = [split.captions[i] for i in indices]
            for name, texts in (("caption", captions), ("concept", concepts)):
                codec = getattr(self.loaded, name)
                batch[name] = codec.collate(texts, self.multiple) if name in stage.texts else None
            return batch

        if not parts:
            return
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(collate, parts[0])
            for part in [*parts[1:], None]:
                batch = waiting.result()
                if part is not None:
                    waiting = pool.submit(collate, part)
                yield batch

    def _validate(self, stage: Stage, begins: bool = False) -> None:
        """Compute validation loss and, if due after this epoch, scores; keep the best weights so far.

        `begins`: the stage has not yet made a step; a checkpoint would be of the stage before.
        """
        every, epoch = self.config.evaluate_every, self.state.done // self.per_epoch
        last = stage is self.plan[-1] and epoch == stage.epochs
        scores = last or stage.reward is not None or (every > 0 and epoch % every == 0)
        # at ZeRO-3 no rank can caption alone: each layer's forward pass gathers weights from all ranks
        zero3 = self.config.zero_stage == 3
        loaded = self._copy(self.checkpoints.folder / VALIDATED) if zero3 else self.loaded
        loaded.model.eval()
        row = self._measured(loaded, stage, scores, begins)
        found = [row.get(PRIMARY)]
        if self.average and not begins:  # at the start it equals the weights
            with self.average.instead(loaded.model):
                other = self._measured(loaded, stage, scores)
            found.append(other.get(PRIMARY))
            row |= {f"{EMA}{name}": value for name, value in other.items()}
            row |= {PRIMARY: max(found)} if scores else {}
        self._written()  # else the best weights could be of a later step than the checkpoint
        loaded.model.train()
        if scores and self.config.patience:
            patience.count(self.state, row[PRIMARY])
            row[patience.WAITED] = self.state.waited
        self._log({"step": self.state.step, "stage": stage.number, "epoch": epoch, **row})
        for average, score in enumerate(found if scores else ()):
            self._keep(loaded, Validated(self.state.step, stage.number, epoch, score, bool(average)))
        if begins:
            return
        self.state.validated = True
        if ranks.rank() == 0:
            with self._has_room():
                self.checkpoints.seal(self.state)

    def _measured(self, loaded: Loaded, stage: Stage, scores: bool, floors: bool = False) -> Row:
        """The validation loss of the weights that the model has now, and their `scores` if due."""
        row = {"valid_loss": self._valid_loss(loaded)}
        self._check_validation(row, stage)
        row |= ranks.agree(self.evaluate(loaded)) if scores else {}
        row = {name: value for name, value in row.items() if floors or not name.startswith(FLOOR)}
        self._check_validation(row, stage)
        return row

    def _keep(self, loaded: Loaded, new: Validated) -> None:
        """Save weights that were validated just now, if they are among the best so far."""
        if self.best.takes(new):
            average = new.average and self.average
            with average.instead(loaded.model) if average else contextlib.nullcontext():
                self.best.add(new, lambda file: save_trained(loaded.model, file))
        self.state.best, self.state.best_step = self.best.ranked[0].score, self.best.ranked[0].step

    def _check_validation(self, row: Row, stage: Stage) -> None:
        """Stop all ranks if a validation gave a number that is not finite."""
        for name, value in row.items():
            if not math.isfinite(value):
                what = f"{name} became {value} in the validation after {self._where(stage)}"
                raise UserError([Problem(what, hint=DIVERGED)], None, 1)

    def _check_weights(self, trainer: Any, stage: Stage) -> None:
        """Stop all ranks if weights or moments are not finite, before they are saved or trained further."""
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        parts = [weight for group in optimizer.param_groups for weight in group["params"]]  # of ZeRO-3
        moments = [part for state in optimizer.state.values() for part in state.values()]
        own = [*trained_weights(self.loaded.model).values(), *parts, *filter(torch.is_tensor, moments)]
        bad = torch.zeros(1, device=self.device)
        for tensor in own:
            bad += (~torch.isfinite(tensor.detach())).any().to(bad)
        if ranks.total(bad).item():
            what = f"the weights or the optimiser's moments after {self._where(stage)} are not finite"
            hint = f"{DIVERGED} To train again with the same config, delete {self.directory}."
            raise UserError([Problem(what, hint=hint)], None, 1)

    def _where(self, stage: Stage) -> str:
        epoch = math.ceil(self.state.done / self.per_epoch)
        return f"step {self.state.step} (stage {stage.number}, epoch {epoch})"

    @torch.no_grad()
    def _valid_loss(self, loaded: Loaded) -> float:
        """Mean caption loss per token over the whole validation split, without label smoothing."""
        split = self.splits["valid"]
        count = math.ceil(len(split.ids) / self.config.micro_batch_size)
        own = np.array_split(np.arange(len(split.ids)), count)[ranks.rank() :: ranks.world_size()]
        total = torch.zeros((), device=self.device)
        for batch in self._batches(split, own, Stage(0, 0, 0, {"caption": 1.0})):
            pixels = loaded.normalise(batch["pixels"])
            total += loaded.model(pixels, to_device(batch["caption"], self.device)).caption
        return float(ranks.total(total)) / sum(text.predicted for text in split.captions)

    def _save(self, trainer: Any, validated: bool) -> None:
        """Begin to write a checkpoint of everything that training needs to resume; it is sealed last."""
        self._written()  # the one before
        self.state.validated = validated
        self.state.ranks, self.state.zero_stage = ranks.world_size(), self.config.zero_stage
        self.saved = replace(self.state)
        path = self.checkpoints.path(self.saved)
        if ranks.rank() == 0:  # a killed launch with another number of ranks may have left a part here
            shutil.rmtree(path, ignore_errors=True)
        ranks.agree(None)
        with self._has_room():
            save(trainer, path, self.writer.write)
            if self.average:
                self.average.save(path, self.writer.write)
        files = [file for own in ranks.every(self.writer.files) for file in own]
        if ranks.rank() == 0:
            self.writer.seal(files, self._seal)

    def _seal(self) -> None:
        self.checkpoints.seal(self.saved)
        write(self.checkpoints.folder / LATEST, self.checkpoints.path(self.saved).name)

    def _written(self) -> None:
        """Wait until the last checkpoint is written and sealed."""
        with self._has_room():
            self.writer.wait()
        ranks.every(None)  # unlike the look for files, this ends if another rank is gone
        with self._has_room():
            self.writer.wait_for_seal()

    @contextlib.contextmanager
    def _has_room(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError for a full disk
            step, room = self.saved.step, gb(free(self.directory))
            what = f"the checkpoint after step {step} could not be written; {room} are free"
            hint = f"Earlier ones are kept. Free some space; then the same command continues. ({error})"
            raise UserError([Problem(what, self.checkpoints.folder, hint=hint)], None, 1) from error

    def _log(self, row: Row) -> None:
        row["time"] = time.time()
        if ranks.rank() == 0:
            with (self.directory / LOSSES).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
        self.log(row)
