"""How the processes of one launch communicate; does nothing when there is only one process."""

import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from harness.errors import Problem, UserError
from harness.machine.device import STEP, Kind, rank, world_size

__all__ = [
    "agree",
    "all_interrupted",
    "cut_off",
    "end",
    "every",
    "first_fails_too",
    "gather",
    "joined",
    "leave",
    "parts",
    "rank",
    "say_failed",
    "say_when_interrupted",
    "say_why",
    "share",
    "start",
    "stop",
    "total",
    "why_another_failed",
    "world_size",
]

if TYPE_CHECKING:
    from torch import Tensor

Item = TypeVar("Item")
_HERE, _INTERRUPTED, _FAILED, _WHY = "here-", "interrupted-", "failed", "why"
_SEARCH = timedelta(minutes=10)
_PATIENCE = 5  # seconds
_RECORDING = 30  # seconds for rank 0 to record a failure, on disk and in MLflow


def start(kind: Kind = "cpu") -> None:
    """Join the other ranks of a launch; `agree` and `gather` use gloo on every kind of device."""
    if world_size() == 1:
        return
    import torch.distributed as distributed

    backends = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "npu": "cpu:gloo,npu:hccl"}
    if not distributed.is_initialized():
        os.environ.setdefault("MASTER_ADDR", "localhost")
        os.environ.setdefault("MASTER_PORT", "29500")
        store = _found_each_other()
        # other ranks wait while rank 0 decodes images or waits for a process that builds the same step
        patience = timedelta(days=7)
        distributed.init_process_group(
            backends[kind], store=store, rank=rank(), world_size=world_size(), timeout=patience
        )
        store.set_timeout(patience)


def _found_each_other() -> Any:
    """The store of a launch, after all its ranks have joined; raises `UserError` after `_SEARCH`."""
    import torch.distributed as distributed

    # the prefix separates SLURM steps that share a store by mistake, and the attempts of torchrun, which
    # each node counts on its own
    one_node = os.environ.get("GROUP_WORLD_SIZE") == "1"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "") if one_node else ""
    launch = f"{os.environ.get(STEP, '')}-{attempt}"
    try:
        with _ended_by_signals():
            store, *_ = next(distributed.rendezvous("env://", timeout=_SEARCH))
            store = distributed.PrefixStore(launch, store)
            store.set(f"{_HERE}{rank()}", "")
            store.wait([f"{_HERE}{number}" for number in range(world_size())], _SEARCH)
    except distributed.DistError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        if not re.search("time(d )?out", str(error), re.IGNORECASE):
            why = str(error).strip().splitlines()[0]
            raise UserError([Problem(f"the ranks can't meet at {address}: {why}")], exit_code=1) from error
        minutes = f"{_SEARCH.total_seconds() / 60:g} minutes"
        what = f"not all of the {world_size()} ranks reached rank 0 at {address} within {minutes}"
        hint = "Start that many ranks, and check that all of them can reach that address."
        raise UserError([Problem(what, hint=hint)], exit_code=1) from error
    return store


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """In this block Ctrl-C and SIGTERM end the process: while it waits, Python's own handlers don't run."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        numbers = ()
    before = [signal.signal(number, signal.SIG_DFL) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def joined() -> bool:
    """Whether this process has joined the others of its launch."""
    distributed = sys.modules.get("torch.distributed")  # importing torch is slow and not always safe
    return world_size() > 1 and distributed is not None and distributed.is_initialized()


def say_failed() -> None:
    """On rank 0, after it has reported its failure: tell the other ranks."""
    if joined():
        with contextlib.suppress(RuntimeError):  # they may be gone already
            _store().set(_FAILED, "")


def say_why(reason: str) -> None:
    """On another rank that fails: give rank 0 the reason, for the run's record."""
    if joined():
        with contextlib.suppress(RuntimeError):
            _store().set(_WHY, reason)


def why_another_failed() -> str | None:
    """On rank 0: the reason of another rank that failed; None if no rank has given one."""
    if joined():
        with contextlib.suppress(RuntimeError):
            if _store().check([_WHY]):
                return _store().get(_WHY).decode()
    return None


def first_fails_too() -> bool:
    """On another rank that fails: wait for rank 0; returns whether rank 0 has reported a failure.

    If this rank ended at once, its launcher could end rank 0 before rank 0 has recorded anything.
    """
    if not joined():
        time.sleep(_PATIENCE)
        return False
    import torch.distributed as distributed

    try:
        _store().wait([_FAILED], timedelta(seconds=_RECORDING))
    except distributed.DistError:
        return False
    return True


def _store() -> Any:
    import torch.distributed as distributed

    return distributed.distributed_c10d._get_default_store()


def stop() -> None:
    """Leave the process group, after all ranks have arrived here; also that of a single process."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        every(None)
        distributed.destroy_process_group()


def end() -> None:
    """Leave the process group at a clean end; NCCL warns of a group that is left to the interpreter."""
    if world_size() > 1:
        _ignore_signals()
        # all is saved; a host that is gone without a word would be waited for
        timer = threading.Timer(_RECORDING, os._exit, (0,))
        timer.daemon = True
        timer.start()
    with contextlib.suppress(RuntimeError):  # another rank has failed, and says so
        stop()


def leave(code: int = 0) -> NoReturn:
    """End a process that was one of several, without the interpreter's own shutdown.

    In the shutdown, a gloo thread that still holds a tensor sometimes aborts the process (pytorch 179291).
    What ZeRO-3 leaves in memory can do the same.
    """
    _ignore_signals()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _ignore_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # from the launcher, when all is already saved
        signal.signal(number, signal.SIG_IGN)


def cut_off(error: BaseException) -> bool:
    """Whether this error means that another rank is gone."""
    if world_size() == 1 or not isinstance(error, RuntimeError):
        return False
    import torch.distributed as distributed

    return isinstance(error, distributed.DistError) or "gloo" in str(error)


@contextlib.contextmanager
def say_when_interrupted() -> Iterator[None]:
    """In this block tell rank 0 of Ctrl-C or SIGTERM at once, even while a collective waits."""
    store = _store()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # a signal writes to the pipe at once; Python runs its handler only after the collective has ended
    signal.set_wakeup_fd(writer)

    def tell() -> None:
        os.read(reader, 1)
        store.set(f"{_INTERRUPTED}{rank()}", "")

    telling = threading.Thread(target=tell, daemon=True)
    telling.start()
    try:
        yield
    except KeyboardInterrupt:
        telling.join(_PATIENCE)  # else this process could end before it has told rank 0
        raise


def all_interrupted() -> bool:
    """On an interrupted rank 0: whether all ranks were interrupted.

    When one rank fails, launchers interrupt only the others. Waits `_PATIENCE` seconds for
    `say_when_interrupted`.
    """
    if world_size() == 1:
        return True
    import torch.distributed as distributed

    store = _store()
    others = [f"{_INTERRUPTED}{number}" for number in range(1, world_size())]
    try:
        store.wait(others, timedelta(seconds=_PATIENCE))
    except distributed.DistError:
        return False
    return True


def agree(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if world_size() == 1:
        return value
    import torch.distributed as distributed

    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def share(items: Sequence[Item]) -> Sequence[Item]:
    """This rank's part of the items; each item belongs to one rank, and `gather` restores the order."""
    return items[rank() :: world_size()]


def every(value: Any) -> list[Any]:
    """Each rank's value, in the order of ranks, on every rank."""
    if world_size() == 1:
        return [value]
    import torch.distributed as distributed

    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def gather(part: Sequence[Any]) -> list[Any]:
    """The parts of all ranks together, in the order before `share`, on every rank."""
    if world_size() == 1:
        return list(part)
    parts = every(list(part))
    whole: list[Any] = [None] * sum(map(len, parts))
    for number, items in enumerate(parts):
        whole[number :: world_size()] = items
    return whole


def total(values: "Tensor") -> "Tensor":
    """The sum of all ranks' values, elementwise."""
    if world_size() > 1:
        import torch.distributed as distributed

        distributed.all_reduce(values)
    return values


def parts(own: "Tensor") -> "list[Tensor]":
    """Each rank's tensor, all of one shape, in the order of ranks, on every rank."""
    if world_size() == 1:
        return [own]
    import torch.distributed as distributed

    found = [own.new_empty(own.shape) for _ in range(world_size())]
    distributed.all_gather(found, own)
    return found
