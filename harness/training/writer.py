"""Checkpoints are written by a thread while training goes on."""

import contextlib
import copy
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from harness.machine import device

_LOOK, _PATIENCE = 0.05, 10.0  # seconds between looks for other ranks' files, and for them after an error


class Writer:
    """Writes this rank's files of one checkpoint at a time; `wait` comes before the next one.

    A file gets its name only when it is whole. So rank 0 sees by the names alone that the other ranks have
    finished, and the thread takes part in no collective.
    """

    def __init__(self) -> None:
        self.files: list[Path] = []
        """This rank's files of the checkpoint, whole or not."""
        self._thread = ThreadPoolExecutor(1)
        self._parts: list[Future[None]] = []
        self._sealing: list[Future[None]] = []
        self._left = threading.Event()

    def write(self, save: Callable[[Any, Path], None], state: Any, file: Path) -> None:
        """`save` a copy of a state in the thread; or at once, if there is no CPU memory for a copy."""
        self.files.append(file)
        if _fits(state):
            self._parts.append(self._thread.submit(_named_last, save, snapshot(state), file))
        else:
            _named_last(save, state, file)

    def seal(self, files: Sequence[Path], act: Callable[[], None]) -> None:
        """On rank 0: call `act` in the thread when the files of all ranks are whole."""
        self._sealing = [self._thread.submit(self._when_whole, files, act)]

    def wait(self) -> None:
        """Wait until this rank's files are whole; raises what went wrong."""
        self._result(self._parts)
        self.files, self._parts = [], []

    def wait_for_seal(self) -> None:
        """On rank 0, when all ranks have waited: wait until `seal` has acted; raises what went wrong."""
        self._result(self._sealing)
        self._sealing = []

    def _result(self, parts: Sequence[Future[None]]) -> None:
        try:
            for part in parts:
                part.result()
        except Exception:  # not an interruption: `leave` waits after it
            self._left.set()
            raise

    def leave(self) -> None:
        """Finish what is being written, after the training or an error; waits shortly for other ranks."""
        with contextlib.suppress(OSError, RuntimeError):
            for part in self._parts:
                part.result()
            for part in self._sealing:
                part.result(_PATIENCE)
        self._left.set()
        self._thread.shutdown(wait=False)

    def _when_whole(self, files: Sequence[Path], act: Callable[[], None]) -> None:
        while not all(file.exists() for file in files):
            if self._left.wait(_LOOK):
                return
        act()


def snapshot(state: Any) -> Any:
    """A copy of a state that training does not change any more, with its tensors in CPU memory.

    Tensors that share their memory, such as tied weights, share it in the copy too.
    """
    copies: dict[Any, Tensor] = {}
    memo: dict[int, Any] = {}
    for tensor in _tensors(state):
        own = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        if own not in copies:
            copies[own] = tensor.detach().to("cpu", copy=True)
        memo[id(tensor)] = copies[own]
    return copy.deepcopy(state, memo)


def _tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _tensors(value)


def _fits(state: Any) -> bool:
    """Whether each rank of this machine has CPU memory for a copy, where all it uses counts for the limit."""
    import psutil

    copied = sum(tensor.nbytes for tensor in _tensors(state))
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", device.world_size()))  # SLURM does not say how many
    return copied + psutil.Process().memory_info().rss < device.ram() / beside


def _named_last(save: Callable[[Any, Path], None], state: Any, file: Path) -> None:
    """Save a state to a file that gets its name when it is whole."""
    part = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        save(state, part)
        part.replace(file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
