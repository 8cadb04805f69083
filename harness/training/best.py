"""The best validated weights of a training, as files: `train.keep_best`."""

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from harness.machine import ranks
from harness.store import write_checked
from harness.training.resume import BEST, KEPT, State, kept


@dataclass(frozen=True)
class Validated:
    """Weights that a validation scored; `average`: those of `train.ema` and not the trained ones."""

    step: int
    stage: int
    epoch: float
    score: float
    average: bool = False


KEYS = tuple(Validated.__dataclass_fields__)


class Best:
    """Keeps the `keep` best validated weights of one training; every rank has the list, and rank 0 writes.

    If more than one is kept, each has its file in `folder` until `finish` gives it a name by its rank.
    """

    def __init__(self, directory: Path, folder: Path, keep: int) -> None:
        self.directory, self.folder, self.keep = directory, folder, keep
        self.ranked: list[Validated] = []

    def begin(self, state: State) -> None:
        """Read the list, without validations that will be repeated; all ranks call this."""
        listed = ({key: one.get(key) for key in KEYS} for one in kept(self.directory))
        known = [Validated(**values) for values in listed if None not in values.values()]
        if not known and state.best is not None:  # begun by an earlier version
            known = [Validated(state.best_step or 0, state.stage, 0, state.best)]
        there = [one for one in known if self.keep == 1 or self._file(one).exists()]
        self.ranked = ranks.agree([one for one in there if one.step <= state.step])

    def takes(self, new: Validated) -> bool:
        """Whether these weights are among the best so far; ties go to those validated first."""
        return new in self._with(new)

    def add(self, new: Validated, save: Callable[[Path], None]) -> None:
        """Have rank 0 `save` weights that `takes` has accepted; all ranks call this."""
        before, self.ranked = self.ranked, self._with(new)
        if ranks.rank():
            return
        if self.keep == 1:
            save(self.directory / BEST)
        else:
            self.folder.mkdir(exist_ok=True)
            save(self._file(new))
            if self.ranked[0] == new:
                _linked(self._file(new), self.directory / BEST)
        self._write()
        for one in before:
            if one not in self.ranked and self._file(one) != self._file(new):
                self._file(one).unlink(missing_ok=True)

    def finish(self) -> None:
        """On rank 0: give the files in `folder` their names by rank, `best-2.safetensors` and so on."""
        for number, one in enumerate(self.ranked[1:], 2):
            _linked(self._file(one), self.directory / _name(number))

    def _with(self, new: Validated) -> list[Validated]:
        others = [one for one in self.ranked if (one.step, one.average) != (new.step, new.average)]
        return sorted([*others, new], key=lambda one: (-one.score, one.step, one.average))[: self.keep]

    def _file(self, one: Validated) -> Path:
        return self.folder / f"best{one.step:08d}{'-average' * one.average}.safetensors"

    def _write(self) -> None:
        found = [{"file": _name(number), **asdict(one)} for number, one in enumerate(self.ranked, 1)]
        write_checked(self.directory / KEPT, found)


def _name(number: int) -> str:
    return BEST if number == 1 else BEST.replace(".", f"-{number}.")


def _linked(source: Path, target: Path) -> None:
    """Give a file a second name, or a copy where the disk knows no links; whole or nothing."""
    temporary = target.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    temporary.replace(target)
