"""NPU, CUDA or CPU: which one this run uses, why not the others, and its ranks, precision and seeds."""

import ctypes
import functools
import importlib
import importlib.util
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from harness.errors import Problem, UserError

Kind = Literal["npu", "cuda", "cpu"]
STEP = "HARNESS_SLURM_STEP"
"""Environment variable of a rank that is a SLURM task: its job and step."""
_PACKAGES: dict[Kind, str] = {"npu": "torch_npu", "cuda": "torch"}
_SPINNING = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
"""Variables by which a user says how OpenMP's threads wait."""
_LOOK = 0.2  # seconds
_PROBE = (
    "import torch, {package}; of = torch.{kind}; print(n := of.device_count(), n and of.get_device_name(0))"
)


@dataclass(frozen=True)
class Device:
    """The device of this process.

    `kind` is npu, cuda or cpu. `count` devices are visible. `name` is the vendor's name. `why_not` says for
    each kind that was tried before why it is not usable.
    """

    kind: Kind
    count: int
    name: str
    why_not: dict[str, str]

    def __str__(self) -> str:
        return f"{self.kind} ({self.name})"


def rank() -> int:
    """This process's number among all ranks; 0 if it is the only one."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """The number of ranks; 1 if this process is the only one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


@functools.cache
def probe(wanted: Literal["auto", "npu", "cuda", "cpu"] = "auto") -> Device:
    """Find the device to use, and prepare the process so that `import torch` is safe.

    Call it before torch is imported: torch-npu without a usable NPU breaks that import, and with it
    transformers and DeepSpeed. So each accelerator is first tried in a subprocess. Raises `UserError` if the
    wanted kind is not usable.
    """
    why_not: dict[str, str] = {}
    for kind in ("npu", "cuda") if wanted == "auto" else (wanted,):
        if kind == "cpu":
            break
        count, answer = _try(kind)
        if count:
            _prepare(kind)
            _bind(count)
            return Device(kind, count, answer, why_not)
        why_not[kind] = answer
    if wanted not in ("auto", "cpu"):
        raise UserError(
            [Problem(f"got {wanted}, but {why_not[wanted]}", key="device", hint="Use device: auto.")]
        )
    _prepare("cpu")
    return Device("cpu", 1, _cpu_name(), why_not)


def shortage(wanted: Literal["auto", "npu", "cuda", "cpu"], processes: int) -> Problem | None:
    """The problem of a launch with more processes than devices, else None; CPUs allow any number."""
    found = probe(wanted)
    if found.kind == "cpu" or processes <= found.count:
        return None
    what = f"got {processes}, but this machine shows {found.count} {found.kind} ({found.name})"
    return Problem(what, key="--nproc", hint="Several ranks on CPUs: --device cpu.")


def _try(kind: Kind) -> tuple[int, str]:
    package = _PACKAGES[kind]
    if importlib.util.find_spec(package) is None:
        return 0, "torch-npu is not installed (pip install '.[npu]')"
    if kind == "npu" and "ASCEND_HOME_PATH" not in os.environ:  # DeepSpeed does not start without it
        return 0, "ASCEND_HOME_PATH is not set (source CANN's set_env.sh)"
    if kind == "cuda" and not _has_nvidia_driver():
        return 0, "no NVIDIA driver is loaded"
    environment = os.environ | ({} if kind == "npu" else {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE.format(package=package, kind=kind)],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=120,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return 0, f"the {kind} driver did not answer within 120 s"
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return 0, f"torch reports: {reason}"
    count, _, name = done.stdout.strip().splitlines()[-1].partition(" ")
    return int(count), name if int(count) else f"torch sees no {kind}"


def cann_version() -> str | None:
    """The version of CANN in `ASCEND_HOME_PATH`, such as 9.1.0 or 8.3.RC1; None if no file says it."""
    home = os.environ.get("ASCEND_HOME_PATH")
    for file in sorted(Path(home).glob("*-linux/ascend_toolkit_install.info")) if home else ():
        text = file.read_text("utf-8", errors="replace")
        if named := re.search(r"^version=(\d+\.\d+[\w.-]*)", text, re.MULTILINE):
            return named[1]
    return None


def _has_nvidia_driver() -> bool:
    return any(os.path.exists(path) for path in ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/dxg"))


def before_torch() -> None:
    """Set what is read once, when torch is loaded; what the user has set stays. `probe` calls it."""
    # large tensors in large pages: a page fault for each 2 MB and not 4 kB
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if "torch" not in sys.modules and not _SPINNING & os.environ.keys() and _is_shared():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def _prepare(kind: Kind) -> None:
    os.environ["DS_ACCELERATOR"] = kind
    before_torch()
    if kind == "npu":
        # HCCL's default of 2 minutes is too short for ranks that load 15 GB of weights at different speeds
        os.environ.setdefault("HCCL_CONNECT_TIMEOUT", "1800")
        importlib.import_module("torch_npu")  # torch does this itself unless autoloading is off
        npu = module("npu")
        # the first Ascend 910 would compile its operators again for every text length
        npu.set_compile_mode(jit_compile=False)
        # else weights get a layout of the NPU's own, which other operators convert back at each use
        if hasattr(npu, "config"):
            npu.config.allow_internal_format = False
    else:
        os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
        sys.modules["torch_npu"] = None  # so that libraries find it not installed


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _is_shared() -> bool:
    """Whether other processes take a quarter or more of the cores that our threads want.

    OpenMP's threads spin while they wait for each other. Alone that is up to 18 % faster; beside others it
    makes training two to six times slower.
    """
    import psutil

    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    wanted = int(threads) if threads.isdecimal() else cores()
    if wanted < 2:  # one thread waits for no other
        return False
    idle = (1 - psutil.cpu_percent(interval=_LOOK) / 100) * (os.cpu_count() or 1)
    return idle < 0.75 * wanted


def _bind(count: int) -> None:
    """If SLURM shows each task only its own device, that is device 0, also for DeepSpeed."""
    if count == 1 and STEP in os.environ:
        os.environ["LOCAL_RANK"] = "0"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        import platform

        return platform.processor() or platform.machine()


def module(kind: Kind) -> ModuleType:
    """torch.npu, torch.cuda or torch.cpu, which have the same functions."""
    import torch

    return getattr(torch, kind)


def torch_device(kind: Kind) -> Any:
    """The `torch.device` of this rank, set as the current one; fp32 is real fp32, also in convolutions."""
    import torch

    if kind == "cpu":
        return torch.device("cpu")
    if kind == "cuda":
        torch.backends.cudnn.allow_tf32 = False
    else:
        module(kind).conv.allow_hf32 = False
    module(kind).set_device(local_rank())
    return torch.device(kind, local_rank())


def moved(tensor: Any, place: Any) -> Any:
    """A tensor on a device; from the CPU to CUDA by pinned memory, else the copy waits for earlier work."""
    if tensor.device.type == place.type:
        return tensor
    return (tensor.pin_memory() if place.type == "cuda" else tensor).to(place, non_blocking=True)


def scoring_device(kind: Kind) -> str:
    """The torch device of the neural metrics: the CPU if the other device does not compute in fp32."""
    return str(torch_device(kind)) if kind != "cpu" and computes_fp32(kind) else "cpu"


def has_bf16(kind: Kind) -> bool:
    """Whether the hardware computes in bf16; emulated bf16 is slower than fp32."""
    import torch

    if kind == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return module(kind).is_bf16_supported()


def computes_fp32(kind: Kind) -> bool:
    """Whether fp32 matrix products use fp32 numbers: NPUs without bf16 round them to fp16.

    Source: `SetPrecisionMode` in torch-npu's npu_sys_ctrl.cpp (`allow_fp32_to_fp16` below Ascend 910B1).
    """
    return kind != "npu" or has_bf16(kind)


def overflows(kind: Kind) -> bool:
    """Whether fp16 overflow gives infinity, which loss scaling relies on, or saturates."""
    return kind != "npu" or module(kind).utils.is_support_inf_nan()


def out_of_memory(error: RuntimeError) -> bool:
    """Whether this error of torch means that a device has no memory left."""
    return any(words in str(error) for words in ("out of memory", "can't allocate memory"))


def ram() -> float:
    """Bytes of memory that this process can still use, within the machine and its control group."""
    import psutil

    limits = [math.inf]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        file = Path("/sys/fs/cgroup") / name
        if file.exists() and (text := file.read_text("utf-8").strip()).isdigit():
            limits.append(float(text))
    return min(psutil.virtual_memory().available, *limits)


def memory(kind: Kind) -> float:
    """Bytes of memory that this rank can still use: of its device, or its share of the machine's RAM."""
    if kind == "cpu":
        return ram() / int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    module(kind).empty_cache()
    return module(kind).mem_get_info(local_rank())[0]


def can_free_memory() -> bool:
    """Whether `free_memory` works on this system: it needs glibc."""
    return hasattr(ctypes.CDLL(None), "malloc_trim")


def free_memory() -> None:
    """Have glibc give the memory that this process has freed back to the system; it would keep most of it."""
    ctypes.CDLL(None).malloc_trim(0)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch on every device."""
    import random

    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def profiler(kind: Kind) -> Any:
    """A profiler of this process's CPU and device, with the names that torch and torch-npu share."""
    import torch

    profilers = importlib.import_module("torch_npu").profiler if kind == "npu" else torch.profiler
    names = ("CPU",) if kind == "cpu" else ("CPU", kind.upper())
    activities = [getattr(profilers.ProfilerActivity, name) for name in names]
    return profilers.profile(activities=activities)
