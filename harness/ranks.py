"""What the processes of one launch tell each other; alone, each of these does nothing."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from harness.device import Kind, rank, world_size
from harness.errors import Problem, UserError

__all__ = [
    "agree",
    "all_interrupted",
    "cut_off",
    "every",
    "gather",
    "joined",
    "leave",
    "rank",
    "say_when_interrupted",
    "share",
    "start",
    "stop",
    "total",
    "world_size",
]

if TYPE_CHECKING:
    from torch import Tensor

Item = TypeVar("Item")
_HERE, _INTERRUPTED = "here-", "interrupted-"
_SEARCH = timedelta(minutes=10)
_PATIENCE = 5  # seconds


def start(kind: Kind = "cpu") -> None:
    """Join the other ranks of a launch; `agree` and `gather` talk over gloo whatever the kind of device."""
    if world_size() == 1:
        return
    import torch.distributed as distributed

    backends = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "npu": "cpu:gloo,npu:hccl"}
    if not distributed.is_initialized():
        os.environ.setdefault("MASTER_ADDR", "localhost")
        os.environ.setdefault("MASTER_PORT", "29500")
        store = _found_each_other()
        # others wait while rank 0 decodes images, or waits for a process that builds the same step
        patience = timedelta(days=7)
        distributed.init_process_group(
            backends[kind], store=store, rank=rank(), world_size=world_size(), timeout=patience
        )
        store.set_timeout(patience)


def _found_each_other() -> Any:
    """The store of a launch, once all its ranks have come to it; raises `UserError` after some minutes."""
    import torch.distributed as distributed

    try:
        store, *_ = next(distributed.rendezvous("env://", timeout=_SEARCH))
        store.set(f"{_HERE}{rank()}", "")
        store.wait([f"{_HERE}{number}" for number in range(world_size())], _SEARCH)
    except distributed.DistError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        minutes = f"{_SEARCH.total_seconds() / 60:g} minutes"
        what = f"not all of the {world_size()} ranks came to {address}, where rank 0 is, within {minutes}"
        hint = "Start as many, with nothing between them and that address."
        raise UserError([Problem(what, hint=hint)], exit_code=1) from error
    return store


def joined() -> bool:
    """Whether this process has joined the others of its launch."""
    if world_size() == 1:
        return False
    import torch.distributed as distributed

    return distributed.is_initialized()


def stop() -> None:
    """Leave the other ranks, once all have come so far."""
    import torch.distributed as distributed

    if world_size() > 1 and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def leave(code: int = 0) -> NoReturn:
    """End a process that was one of several, without what the interpreter does at its end.

    A thread of gloo that still holds a tensor by then aborts the process now and then (pytorch 179291), and
    so does what ZeRO-3 leaves.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # a launcher's echo, when all is said and written
        signal.signal(number, signal.SIG_IGN)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def cut_off(error: BaseException) -> bool:
    """Whether this is what a collective raises when another rank is gone."""
    if world_size() == 1 or not isinstance(error, RuntimeError):
        return False
    import torch.distributed as distributed

    return isinstance(error, distributed.DistError) or "gloo" in str(error)


@contextlib.contextmanager
def say_when_interrupted() -> Iterator[None]:
    """In this block let rank 0 know of Ctrl-C or SIGTERM at once, even within a collective that waits."""
    import torch.distributed as distributed

    store = distributed.distributed_c10d._get_default_store()
    heard, told = os.pipe()
    os.set_blocking(told, False)
    # a signal writes there when it comes; Python runs its handler once the collective has ended
    signal.set_wakeup_fd(told)

    def tell() -> None:
        os.read(heard, 1)
        store.set(f"{_INTERRUPTED}{rank()}", "")

    telling = threading.Thread(target=tell, daemon=True)
    telling.start()
    try:
        yield
    except KeyboardInterrupt:
        telling.join(_PATIENCE)  # or this process would be gone before it has told
        raise


def all_interrupted() -> bool:
    """On rank 0, which was interrupted: whether all were, or just those that launchers end when one fails.

    Waits some seconds for what the others say by `say_when_interrupted`.
    """
    if world_size() == 1:
        return True
    import torch.distributed as distributed

    store = distributed.distributed_c10d._get_default_store()
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
    """This rank's part of the items; together the ranks have each once, in the order of `gather`."""
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
    """The parts of all ranks put together again, in the order before `share`, on every rank."""
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
