"""Several ranks: started here by torch's or DeepSpeed's launcher, or found to be started by SLURM."""

import contextlib
import ctypes
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path

from harness.errors import Problem, UserError
from harness.machine.device import STEP, cores

FAILED, INTERRUPTED = 1, 130
PARENT = "HARNESS_LAUNCHER"
"""Set in the environment of a rank or worker that a launcher here starts: the launcher's process."""
CARRIED = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TORCH", "XDG_CACHE_HOME", "OMP_", "ASCEND", "HCCL_")
"""How the names of variables begin that `--hostfile` carries to other hosts; tokens stay here."""
_GRACE = 60  # seconds for the ranks to write down that they were interrupted


def is_rank() -> bool:
    """Whether this process was started by a launcher."""
    return "RANK" in os.environ


def end_with_parent() -> None:
    """Get SIGTERM when the launcher in this package that started this process dies, even by SIGKILL.

    On Linux only. Raises `KeyboardInterrupt` where it is gone already.
    """
    parent = os.environ.pop(PARENT, None)  # what this process starts has another parent
    if parent is None or sys.platform != "linux":
        return
    set_death_signal = 1
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGTERM)
    if os.getppid() != int(parent):
        raise KeyboardInterrupt


def here(arguments: Sequence[str], processes: int) -> int:
    """Run `python -m harness ARGUMENTS` as ranks on this machine by torch's elastic launcher.

    Returns the exit code: that of the rank which failed first, 130 after Ctrl-C or SIGTERM. Raises
    `UserError` with what a rank left by `report`, where rank 0, which speaks for itself, did not fail.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        shutdown_timeout=_GRACE,
    )
    share_cores(processes)
    os.environ[PARENT] = str(os.getpid())
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "harness", *arguments)
    except ChildFailedError as error:
        first = min(error.failures.values(), key=lambda failure: failure.timestamp)
        code = first.exitcode if first.exitcode > 0 else FAILED
        told = first.error_file_data.get("message", "")
        alone = all(
            failure.local_rank or failure.exitcode == INTERRUPTED for failure in error.failures.values()
        )
        if alone and told.startswith("error: "):
            raise UserError(told.removeprefix("error: "), exit_code=code) from None
        if first.exitcode < 0:
            what = f"rank {first.local_rank} was ended by {signal.Signals(-first.exitcode).name}"
            hint = "SIGKILL is what the system sends when memory is short. The same command continues."
            raise UserError([Problem(what, hint=hint)], exit_code=FAILED) from None
        return code
    except (SignalException, KeyboardInterrupt):
        return INTERRUPTED
    finally:
        del os.environ[PARENT]
    return 0


def report(text: str) -> bool:
    """Hand an error to the launcher if it accepts errors; returns whether it does."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        Path(file).write_text(json.dumps({"message": text, "timestamp": int(time.time())}), "utf-8")
    return bool(file)


def share_cores(processes: int) -> None:
    """Split the cores among the ranks. If each rank used all cores, all would be slower."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // processes)))


def on_hosts(arguments: Sequence[str], hostfile: Path, processes: int | None) -> int:
    """Run `python -m harness ARGUMENTS` on the hosts of a file by DeepSpeed's launcher -> its exit code.

    The file has a line `name slots=N` for each host; they share this folder and are reached by ssh.
    """
    program = shutil.which("deepspeed", path=str(Path(sys.executable).parent)) or shutil.which("deepspeed")
    problems = []
    if program is None:
        problems.append(Problem("deepspeed is not installed beside this Python", key="--hostfile"))
    if not hostfile.is_file():
        hint = "A line for each host: worker-1 slots=8"
        problems.append(Problem("no such file", hostfile, key="--hostfile", hint=hint))
    if problems:
        raise UserError(problems)
    slots = ["--num_gpus", str(processes)] if processes else []
    options = ["--hostfile", str(hostfile), *slots, "--no_local_rank", "--log_level", "error"]
    command = [program, *options, "--module", "harness", *arguments]
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", prefix="harness-", suffix=".env") as file:
        file.writelines(_carried(os.environ))
        file.flush()
        running = subprocess.Popen(command, env=os.environ | {"DS_ENV_FILE": file.name})
        try:
            return running.wait()
        except KeyboardInterrupt:
            running.terminate()  # and not SIGINT, which a process started in the background ignores
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.wait(_GRACE)
            return INTERRUPTED


def _carried(environment: Mapping[str, str]) -> Iterator[str]:
    """The environment of ranks on other hosts, in addition to what DeepSpeed passes on."""
    for name, value in environment.items():
        if name.startswith(CARRIED) and "TOKEN" not in name and not set(value) & set('\n\\"$`'):
            yield f"{name}={value}\n"  # DeepSpeed puts it between double quotes
    # where DeepSpeed itself looks
    told = environment.get("DS_ENV_FILE")
    for file in [Path(told)] if told else [folder / ".deepspeed_env" for folder in (Path.home(), Path())]:
        lines = file.read_text("utf-8").splitlines() if file.is_file() else []
        yield from (f"{line}\n" for line in lines if "=" in line)


def adopt_slurm(environment: MutableMapping[str, str]) -> None:
    """Set torch's variables (RANK, WORLD_SIZE, ...) from SLURM's if `srun` started more than one task."""
    # a batch script has SLURM_NTASKS and SLURM_PROCID too, but it is no task of a step
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if "RANK" in environment or tasks < 2:
        return
    first = _first_host(environment["SLURM_STEP_NODELIST"])
    job, step = (int(environment.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    port = 20_000 + (job + 101 * step) % 20_000
    environment |= {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": environment.get("MASTER_ADDR", first),
        "MASTER_PORT": environment.get("MASTER_PORT", str(port)),
        STEP: f"{job}.{step}",
        "OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", environment.get("SLURM_CPUS_PER_TASK", "1")),
    }


def _first_host(nodes: str) -> str:
    """The first name of a SLURM list such as `node[03-05,9],gpu1`."""
    found = re.match(r"([^\[,]+)(?:\[([^\]]+)\])?([^\[,]*)", nodes)
    name, numbers, rest = found.groups()
    return name + re.split("[-,]", numbers)[0] + rest if numbers else name
