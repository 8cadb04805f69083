"""Writing the checkpoints of a training, and reading one on another number of ranks."""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.errors import Problem, UserError
from harness.machine import ranks
from harness.store import free, gb, write
from harness.training.averages import Average
from harness.training.engine import save, to_universal
from harness.training.resume import LATEST, UNIVERSAL, Checkpoints, State
from harness.training.settings import TrainConfig
from harness.training.writer import Writer


class Saver:
    """Writes the checkpoints of one training, in a thread, and waits for them."""

    def __init__(self, config: TrainConfig, checkpoints: Checkpoints) -> None:
        self.config, self.checkpoints = config, checkpoints
        self.writer = Writer()
        self.saved = State()

    def save(self, trainer: Any, state: State, average: Average | None, validated: bool) -> None:
        """Begin to write a checkpoint of everything that training needs to resume; it is sealed last."""
        self.written()  # the one before
        state.validated = validated
        state.ranks, state.zero_stage = ranks.world_size(), self.config.zero_stage
        self.saved = replace(state)
        path = self.checkpoints.path(self.saved)
        if ranks.rank() == 0:  # a killed launch with another number of ranks may have left a part here
            shutil.rmtree(path, ignore_errors=True)
        ranks.agree(None)
        with self._has_room():
            save(trainer, path, self.writer.write)
            if average:
                average.save(path, self.writer.write)
        files = [file for own in ranks.every(self.writer.files) for file in own]
        if ranks.rank() == 0:
            self.writer.seal(files, self._seal)

    def _seal(self) -> None:
        self.checkpoints.seal(self.saved)
        write(self.checkpoints.folder / LATEST, self.checkpoints.path(self.saved).name)

    def validated(self, state: State) -> None:
        """Have rank 0 record in the checkpoint of this state that the validation after it is done."""
        state.validated = True
        if ranks.rank() == 0:
            with self._has_room():
                self.checkpoints.seal(state)

    def written(self) -> None:
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
            folder, room = self.checkpoints.folder, gb(free(self.checkpoints.directory))
            what = f"the checkpoint after step {self.saved.step} could not be written; {room} are free"
            hint = f"Earlier ones are kept. Free some space; then the same command continues. ({error})"
            raise UserError([Problem(what, folder, hint=hint)], None, 1) from error

    def for_these_ranks(self, state: State) -> Path | None:
        """The checkpoint converted for another number of ranks; None if no conversion is needed.

        Each rank's checkpoint holds its part of the optimiser; only at ZeRO stage 0 it holds all of it.
        """
        was, now = state.zero_stage, self.config.zero_stage
        if was != now and {was, now} != {1, 2}:
            what = f"it was interrupted at ZeRO stage {was}, whose checkpoints can't be read at stage {now}"
            hint = f"Continue at the same stage: --set train.zero_stage={was}"
            raise UserError([Problem(what, self.checkpoints.folder, hint=hint)])
        if now == 0 or (was, state.ranks) == (now, ranks.world_size()):
            return None
        target = self.checkpoints.folder / UNIVERSAL
        if ranks.rank() == 0:
            to_universal(self.checkpoints.path(state), target)
        ranks.agree(None)
        return target

    def forget(self, universal: Path | None) -> None:
        """Delete the output of `for_these_ranks` after all ranks have read it."""
        ranks.agree(None)
        if universal is not None and ranks.rank() == 0:
            shutil.rmtree(universal)
