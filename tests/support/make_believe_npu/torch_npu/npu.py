"""What torch, DeepSpeed and transformers need of `torch.npu`; its memory is not counted and reads 0."""

import contextlib
import functools
import importlib.util
import os
from types import SimpleNamespace

import torch

_spec = importlib.util.spec_from_file_location("make_believe_npu", os.environ["MAKE_BELIEVE_NPU"])
extension = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(extension)

device_count, current_device = extension.device_count, extension.current_device
MEMORY = 8_000_000_000


def set_device(device):
    index = device if isinstance(device, int) else torch.device(device).index
    extension.set_device(index)


class device(contextlib.ContextDecorator):
    """The current device for a while."""

    def __init__(self, index):
        self.index = index

    def __enter__(self):
        self.before = current_device()
        set_device(self.index)

    def __exit__(self, *_):
        set_device(self.before)


def is_available():
    return device_count() > 0


def is_initialized():
    return True


def _is_in_bad_fork():
    return False


def _lazy_call(callback, **_):
    callback()


def _lazy_init():
    pass


def get_device_name(index=None):
    if not is_available():
        raise RuntimeError("no make-believe NPU is plugged in")
    return "make-believe NPU"


def get_device_properties(index=None):
    return SimpleNamespace(name=get_device_name(index), total_memory=MEMORY)


# the first Ascend 910 has neither bf16 nor numbers beyond the largest
FIRST = os.environ.get("MAKE_BELIEVE_NPU_FIRST") == "1"
conv = SimpleNamespace(allow_hf32=True)
config = SimpleNamespace(allow_internal_format=True)
utils = SimpleNamespace(is_support_inf_nan=lambda: not FIRST)


def set_compile_mode(jit_compile):
    if jit_compile:
        raise RuntimeError("the make-believe NPU compiles nothing")


def is_bf16_supported():
    return not FIRST


def get_amp_supported_dtype():
    return [torch.bfloat16, torch.float16]


def synchronize(device=None):
    pass


def empty_cache():
    pass


def mem_get_info(device=None):
    return MEMORY, MEMORY


def _none(device=None):
    return 0


memory_allocated = max_memory_allocated = memory_reserved = max_memory_reserved = _none
memory_cached = max_memory_cached = reset_max_memory_allocated = reset_max_memory_cached = _none
reset_peak_memory_stats = _none


def memory_stats(device=None):
    return {}


# random numbers are drawn by the CPU's generator, which torch seeds beside the device's
default_generators = [torch.default_generator] * device_count()


def manual_seed(seed):
    torch.default_generator.manual_seed(seed)


def manual_seed_all(seed):
    pass


def initial_seed():
    return torch.initial_seed()


def get_rng_state(device=None):
    return torch.default_generator.get_state()


def set_rng_state(state, device=None):
    torch.default_generator.set_state(state)


# work is done when a call returns: streams are all one, and events are over
Event = functools.partial(torch.Event, "npu")


def current_stream(device=None):
    return torch.Stream("npu")


Stream = default_stream = current_stream


@contextlib.contextmanager
def stream(stream):
    yield


def _typed(dtype):
    return functools.partial(torch.tensor, dtype=dtype, device="npu")


BFloat16Tensor, HalfTensor = _typed(torch.bfloat16), _typed(torch.float16)
FloatTensor, DoubleTensor = _typed(torch.float32), _typed(torch.float64)
ByteTensor, IntTensor, LongTensor = _typed(torch.uint8), _typed(torch.int32), _typed(torch.int64)
