"""What the processes of one launch tell each other; alone, each of these does nothing."""

import os
from collections.abc import Sequence
from typing import Any, TypeVar

from harness.device import rank, world_size

__all__ = ["agree", "gather", "rank", "share", "start", "stop", "world_size"]

Item = TypeVar("Item")


def start() -> None:
    """Join the other ranks of a torchrun launch, so that `agree` and `gather` work; talk goes over gloo."""
    import torch.distributed as distributed

    if world_size() > 1 and not distributed.is_initialized():
        os.environ.setdefault("MASTER_ADDR", "localhost")
        os.environ.setdefault("MASTER_PORT", "29500")
        distributed.init_process_group("gloo")


def stop() -> None:
    """Leave the other ranks, once all have come so far."""
    import torch.distributed as distributed

    if world_size() > 1 and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


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


def gather(part: Sequence[Any]) -> list[Any]:
    """The parts of all ranks put together again, in the order before `share`, on every rank."""
    if world_size() == 1:
        return list(part)
    import torch.distributed as distributed

    parts: list[Any] = [None] * world_size()
    distributed.all_gather_object(parts, list(part))
    whole: list[Any] = [None] * sum(map(len, parts))
    for number, items in enumerate(parts):
        whole[number :: world_size()] = items
    return whole
