"""Runs the command line and fails if harness touches CUDA: `poisoned_cuda.py run ...`; used by tests.

torch, DeepSpeed and transformers may still use torch.cuda themselves.
"""

import sys
from types import ModuleType

import torch


class Touched(Exception):
    """Code of harness called for CUDA."""


def _refuse_harness(what: str) -> None:
    caller = sys._getframe(2).f_globals.get("__name__", "")
    if caller.partition(".")[0] == "harness":
        raise Touched(f"{caller} uses {what}")


class Poisoned(ModuleType):
    """torch.cuda, for all but harness."""

    def __getattribute__(self, name: str):
        _refuse_harness(f"torch.cuda.{name}")
        return super().__getattribute__(name)


def poison() -> None:
    """Poison torch.cuda, and `.cuda()` of tensors and modules."""
    torch.cuda.__class__ = Poisoned
    for owner in (torch.Tensor, torch.nn.Module):
        original = owner.cuda

        def cuda(self, *arguments, original=original, **named):
            _refuse_harness(".cuda()")
            return original(self, *arguments, **named)

        owner.cuda = cuda


if __name__ == "__main__":
    poison()
    from harness.cli import main

    main()
