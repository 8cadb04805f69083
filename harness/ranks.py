"""What the processes of one launch tell each other; alone, each of these does nothing."""

import os
import signal
import threading
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from harness.device import Kind, rank, world_size

__all__ = [
    "agree",
    "all_interrupted",
    "cut_off",
    "every",
    "gather",
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
_INTERRUPTED = "interrupted-"


def start(kind: Kind = "cpu") -> None:
    """Join the other ranks of a launch; `agree` and `gather` talk over gloo whatever the kind of device."""
    if world_size() == 1:
        return
    import torch.distributed as distributed

    backends = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "npu": "cpu:gloo,npu:hccl"}
    if not distributed.is_initialized():
        os.environ.setdefault("MASTER_ADDR", "localhost")
        os.environ.setdefault("MASTER_PORT", "29500")
        # others wait while rank 0 decodes images, or waits for a process that builds the same step
        distributed.init_process_group(backends[kind], timeout=timedelta(days=7))


def stop() -> None:
    """Leave the other ranks, once all have come so far."""
    import torch.distributed as distributed

    if world_size() > 1 and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def cut_off(error: BaseException) -> bool:
    """Whether this is what a collective raises when another rank is gone."""
    if world_size() == 1 or not isinstance(error, RuntimeError):
        return False
    import torch.distributed as distributed

    return isinstance(error, distributed.DistError) or "gloo" in str(error)


def say_when_interrupted() -> None:
    """From now on let rank 0 know of Ctrl-C or SIGTERM at once, even within a collective that waits."""
    import torch.distributed as distributed

    store = distributed.distributed_c10d._get_default_store()
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(
        told
    )  # written to when a signal comes; its handler runs once the collective has ended

    def tell() -> None:
        os.read(heard, 1)
        store.set(f"{_INTERRUPTED}{rank()}", "")

    threading.Thread(target=tell, daemon=True).start()


def all_interrupted(seconds: float = 5) -> bool:
    """On rank 0, which was interrupted: whether all were, or just those that launchers end when one fails.

    Waits so long for what the others say by `say_when_interrupted`.
    """
    if world_size() == 1:
        return True
    import torch.distributed as distributed

    store = distributed.distributed_c10d._get_default_store()
    try:
        store.wait(
            [f"{_INTERRUPTED}{number}" for number in range(1, world_size())], timedelta(seconds=seconds)
        )
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
