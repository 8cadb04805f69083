"""torch.compile for parts of a model while it trains; a part that can't be compiled computes as before."""

import functools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.machine import device as devices
from harness.training.settings import TrainConfig

OFF = "off"


def chosen(config: TrainConfig, kind: devices.Kind) -> str:
    """What to compile: `train.compile`, and for `auto` what helps on this kind of device."""
    if config.compile != "auto":
        return config.compile
    return "layers" if kind == "cuda" else OFF


def keep_code_in(folder: Path) -> None:
    """Keep compiled code in a folder for later runs, unless the user has chosen another."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder.resolve()))


class Compiler:
    """Compiles parts of a model; `used` is what it compiles, or `off` after a failure.

    `say` gets one line about the first failure.
    """

    def __init__(self, how: str, say: Callable[[str], None]) -> None:
        self.used, self.say = how, say
        if how != OFF:
            import torch._functorch.config

            # else errors in compiling a backward pass appear only there, where nothing can be repeated
            torch._functorch.config.force_non_lazy_backward_lowering = True
            warnings.filterwarnings("ignore", "TensorFloat32")  # fp32 is real fp32 here

    def add(self, parts: Iterable[nn.Module]) -> None:
        """Compile the forward pass of these parts at their first training step; names do not change."""
        for part in parts:
            part.forward = _Compiled(self, part)

    def give_up(self, error: Exception) -> None:
        """Compile no further part."""
        if self.used != OFF:
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if isinstance(error, ImportError):  # a process was killed while it wrote compiled code
                why += f"; if it is damaged, delete {os.environ.get('TORCHINDUCTOR_CACHE_DIR', 'it')}"
            self.say(f"train.compile: {self.used} does not work here, so nothing is compiled ({why})")
        self.used = OFF


class _Compiled:
    """A forward pass that is compiled in training only, so captions do not depend on the compiler.

    A part that has worked stays compiled, because gradient checkpointing repeats what was computed.
    """

    def __init__(self, compiler: Compiler, part: nn.Module) -> None:
        self.compiler, self.part, self.eager = compiler, part, part.forward
        self.works: bool | None = None

    @functools.cached_property
    def compiled(self) -> Callable[..., Any]:
        return torch.compile(self.eager, dynamic=False)

    def __call__(self, *args: Any, **options: Any) -> Any:
        if self.works is None and self.compiler.used == OFF:
            self.works = False
        if self.works is False or not (self.part.training and torch.is_grad_enabled()):
            return self.eager(*args, **options)
        try:
            found = self.compiled(*args, **options)
        except Exception as error:
            if not self._is_of_compiler(error):
                raise
            self.compiler.give_up(error)
            self.works = False
            return self.eager(*args, **options)
        self.works = True
        return found

    def _is_of_compiler(self, error: Exception) -> bool:
        """Whether compiling failed: any error of a part that has not worked yet, but a lack of memory."""
        from torch._dynamo.exc import TorchDynamoException

        return not devices.out_of_memory(error) and (
            not self.works or isinstance(error, TorchDynamoException)
        )


def compiled_parts(model: nn.Module) -> Iterator[nn.Module]:
    """The parts of a model that a `Compiler` compiles."""
    return (part for part in model.modules() if isinstance(part.forward, _Compiled))
