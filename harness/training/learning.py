"""The optimiser steps of one stage, on this rank's share of each batch."""

import math
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from harness.data.augment import augment
from harness.machine import device as devices
from harness.machine import ranks
from harness.models.text import to_device
from harness.training import finite, losses
from harness.training.engine import accumulation, backward, casts_kept
from harness.training.finite import TERMS
from harness.training.outstanding import Learnt, Numbers, Outstanding
from harness.training.schedule import Stage, learning_rate
from harness.training.selfcritical import SelfCritical
from harness.training.split import batches

if TYPE_CHECKING:
    from harness.training.train import Training

Row = dict[str, Any]


class Learner:
    """Does the steps of a stage with its engine `trainer`, and logs each while the device does the next.

    `critic` makes the samples of a self-critical stage. `interrupted`: whether a rank was, as of the last
    step that was read.
    """

    def __init__(
        self, training: "Training", trainer: Any, stage: Stage, critic: SelfCritical | None = None
    ) -> None:
        self.training, self.trainer, self.stage, self.critic = training, trainer, stage, critic
        self.config, self.device = training.config, training.device
        self.interrupted = False
        self.outstanding: Outstanding | None = None
        self.arrived = -math.inf  # when the numbers of the last step that was read were there

    def step(self, step: int, indices: np.ndarray) -> None:
        """Give optimiser step `step` (from 0) of the stage to the device, and read the step before it."""
        begun = time.perf_counter()
        state, per_epoch = self.training.state, self.training.per_epoch
        rate = self.stage.learning_rate
        if not self.stage.constant:
            rate = learning_rate(self.config, rate, step, self.stage.epochs * per_epoch, per_epoch)
        for group in self.trainer.optimizer.param_groups:
            group["lr"] = rate * group.get("factor", 1.0)  # checkpoints from before factors have none
        self._randomise(step)
        self.trainer.train()
        learnt = self._learn(step, indices)
        if self.training.average:
            self.training.average.follow(self.trainer)
        state.step, state.done = state.step + 1, step + 1
        given = Outstanding(state.step, self.stage, (step + 1) / per_epoch, rate, begun, learnt)
        self.read()
        self.outstanding = given
        if self.critic:
            self.critic.total += time.perf_counter() - begun

    def read(self) -> None:
        """Log the outstanding step, if there is one; stop all ranks if its numbers are not finite."""
        step, self.outstanding = self.outstanding, None
        if step is None:
            return
        numbers, arrived = step.learnt.numbers.read()
        terms, (interrupted, *norms) = numbers[: len(TERMS)], numbers[len(TERMS) :]
        self.interrupted = bool(interrupted)
        if not all(map(math.isfinite, terms)):
            finite.stop(step, self.training.splits["train"].ids)
        row: Row = {"step": step.step, "stage": step.stage.number, "epoch": step.epoch, "loss": sum(terms)}
        shown = zip(losses.LOSSES, TERMS, terms, strict=True)
        row |= {term: value for name, term, value in shown if name in step.stage.losses}
        row |= finite.gradients(step, norms[0] if norms else step.learnt.norm)
        row |= step.learnt.sampled
        speed = self.config.batch_size / step.seconds(arrived, self.arrived)
        self.arrived = arrived
        self.training.note({**row, "learning_rate": step.learning_rate, "images_per_second": speed})

    def _randomise(self, step: int) -> None:
        """Seed dropout and augmentation of a step, so that interruptions do not change them."""
        own = [self.training.seed, self.stage.number, step, ranks.rank()]
        one, two = np.random.SeedSequence(own).generate_state(2)
        devices.seed_everything(int(one))
        self.draw = torch.Generator().manual_seed(int(two))

    def _learn(self, step: int, indices: np.ndarray) -> Learnt:
        """Learn from a global batch; each loss is the mean over all its tokens in that batch.

        Nothing here waits for the device, but ZeRO does where it looks for an overflow.
        """
        stage, trainer, tokens = self.stage, self.trainer, self._counted(indices)
        micro_batches = np.split(indices, len(indices) // self.config.micro_batch_size)
        own = micro_batches[ranks.rank() :: ranks.world_size()]
        found = []
        read = batches(
            self.training.splits["train"], self.training.loaded, own, stage.texts, self.training.multiple
        )
        seen: Iterable[dict[str, Any]] = self._seen(read)
        sampled: Row = {}
        if self.critic:  # not below, where casts are kept: autocast would keep some without gradient
            seen = list(seen)
            samples, sampled = self.critic(step, micro_batches, [batch["pixels"] for batch in seen])
            for batch, one in zip(seen, samples, strict=True):
                batch["samples"] = one
        with casts_kept(self.config, self.training.kind):
            for number, batch in enumerate(seen):
                if number:
                    trainer.step()  # of the micro-batch before
                labels = {
                    name: devices.moved(batch[name], self.device) for name in {"concepts"} & batch.keys()
                }
                computed = trainer(
                    batch.pop("pixels"),
                    to_device(batch["caption"], self.device),
                    to_device(batch["concept"], self.device),
                    self.config.label_smoothing,
                    batch.pop("samples", None),
                    **labels,
                )
                none = torch.zeros((), device=self.device)
                shares = [
                    loss(computed, tokens, stage.losses[name]) if name in stage.losses else none
                    for name, loss in losses.LOSSES.items()
                ]
                found.append(torch.stack(shares).detach())
                # the engine averages over micro-batches and ranks, but these terms are shares of a sum
                backward(trainer, sum(shares) * accumulation(self.config) * ranks.world_size())
        trainer.step()
        terms, norm = torch.stack(found), trainer.get_global_grad_norm()
        scale = trainer.optimizer.loss_scale if self.config.precision == "fp16" else None
        numbers = Numbers(self._summed(terms, norm), self.training.kind)
        on_host = None if norm is None or torch.is_tensor(norm) else float(norm)
        return Learnt(own, terms, numbers, on_host, scale, sampled)

    def _counted(self, indices: np.ndarray) -> dict[str, int]:
        """The tokens, samples or images of a global batch, by loss."""
        split, reward = self.training.splits["train"], self.stage.reward
        counts = {
            "caption": sum(split.captions[i].predicted for i in indices),
            "concept": sum(split.concepts[i].predicted for i in indices if split.concepts[i]),
            "concepts": len(indices),
        }
        if reward:
            counts["reward"] = reward.samples * sum(split.captions[i].predicted > 0 for i in indices)
        return counts

    def _seen(self, read: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Micro-batches with pixels as the model sees them: on its device, augmented and normalised."""
        training = self.training
        for batch in read:
            images = batch.pop("pixels")
            if torch.is_tensor(images):  # whole images differ in size and stay on the CPU
                images = devices.moved(images, self.device)
            images = augment(images, training.augmentation, self.draw)
            yield batch | {"pixels": training.loaded.normalise(images)}

    def _summed(self, found: Tensor, norm: Any) -> Tensor:
        """Sum loss terms (M, L) over all ranks' micro-batches; the norm of gradients follows if a tensor.

        The same collective tells all ranks whether one was interrupted.
        """
        came = found.new_full((1,), float(self.training.interrupts.came is not None))
        total = ranks.total(torch.cat([found.sum(0), came]))
        norms = [norm.detach().reshape(1).to(total.device)] if torch.is_tensor(norm) else []
        return torch.cat([total, *norms])
