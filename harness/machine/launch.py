"""Starts several ranks with torch's or DeepSpeed's launcher, and adopts ranks that SLURM started."""

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
from harness.machine.device import STEP, cores, rank

FAILED, INTERRUPTED = 1, 130
PARENT = "HARNESS_LAUNCHER"
"""Environment variable of a rank or worker that a launcher here started: the launcher's process id."""
CARRIED = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "XDG_CACHE_HOME", "TORCH", "PYTORCH_", "OMP_", "GOMP_")
CARRIED += ("ASCEND", "HCCL_", "TASK_QUEUE_ENABLE", "NCCL_", "GLOO_")
"""Prefixes of the variables that `--hostfile` copies to other hosts; tokens are not copied."""
_GRACE = 60  # seconds for the ranks to record that they were interrupted


def is_rank() -> bool:
    """Whether this process was started by a launcher."""
    return "RANK" in os.environ


def end_with_parent() -> None:
    """Let this process receive SIGTERM when its launcher dies, even by SIGKILL.

    It works on Linux only, and for launchers of this package. Raises `KeyboardInterrupt` if the launcher is
    already gone.
    """
    parent = os.environ.pop(PARENT, None)  # child processes have another parent
    if parent is None or sys.platform != "linux":
        return
    set_death_signal = 1
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGTERM)
    if os.getppid() != int(parent):
        raise KeyboardInterrupt


def here(arguments: Sequence[str], processes: int) -> int:
    """Run `harness ARGUMENTS` as ranks on this machine with torch's elastic launcher.

    Returns the exit code of the first rank that failed, 130 after Ctrl-C or SIGTERM, else 0. Rank 0 prints
    its own errors; if it did not fail, raises `UserError` with the error that another rank left by `report`.
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
        message = first.error_file_data.get("message", "")
        alone = all(
            failure.local_rank or failure.exitcode == INTERRUPTED for failure in error.failures.values()
        )
        if alone and message.startswith("error: "):
            raise UserError(message.removeprefix("error: "), exit_code=code) from None
        if first.exitcode < 0:
            what = f"rank {first.local_rank} was ended by {signal.Signals(-first.exitcode).name}"
            hint = "The system sends SIGKILL when memory is short. The same command goes on."
            raise UserError([Problem(what, hint=hint)], exit_code=FAILED) from None
        return code
    except (SignalException, KeyboardInterrupt):
        return INTERRUPTED
    finally:
        del os.environ[PARENT]
    return 0


def report(text: str) -> bool:
    """Leave an error for the launcher; returns whether there is one that takes it."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        Path(file).write_text(json.dumps({"message": text, "timestamp": int(time.time())}), "utf-8")
    return bool(file)


def share_cores(processes: int) -> None:
    """Split the cores among the ranks: with a thread per core in every rank, all would be slower.

    Says so where there are more processes than cores. What the user has set stays.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    most = cores()
    os.environ["OMP_NUM_THREADS"] = str(max(1, most // processes))
    if processes > most and not rank():
        print(f"{processes} processes share {most} core{'s' * (most > 1)}, one thread each", file=sys.stderr)


def share_host() -> None:
    """On a rank of DeepSpeed's launcher, which does not split the cores of its host: split them."""
    ranks = int(os.environ.get("LOCAL_SIZE", "1"))
    if is_rank() and ranks > 1:
        share_cores(ranks)


def on_hosts(arguments: Sequence[str], hostfile: Path, processes: int | None) -> int:
    """Run `harness ARGUMENTS` on the hosts of a file with DeepSpeed's launcher -> its exit code.

    The file has a line `name slots=N` for each host. The hosts share this folder and are reached by ssh.
    """
    program = shutil.which("deepspeed", path=str(Path(sys.executable).parent)) or shutil.which("deepspeed")
    problems = []
    if program is None:
        problems.append(Problem("deepspeed is not installed with this Python", key="--hostfile"))
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
            running.terminate()  # not SIGINT, which a process started in the background ignores
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.wait(_GRACE)
            return INTERRUPTED


def _carried(environment: Mapping[str, str]) -> Iterator[str]:
    """The lines of environment variables for ranks on other hosts, besides those that DeepSpeed copies."""
    for name, value in environment.items():
        if name.startswith(CARRIED) and "TOKEN" not in name and not set(value) & set('\n\\"$`'):
            yield f"{name}={value}\n"  # DeepSpeed puts the value in double quotes
    # the files that DeepSpeed itself reads
    given = environment.get("DS_ENV_FILE")
    for file in [Path(given)] if given else [folder / ".deepspeed_env" for folder in (Path.home(), Path())]:
        lines = file.read_text("utf-8").splitlines() if file.is_file() else []
        yield from (f"{line}\n" for line in lines if "=" in line)


def adopt_slurm(environment: MutableMapping[str, str]) -> None:
    """Set torch's variables (RANK, WORLD_SIZE, ...) from SLURM's, if `srun` started more than one task."""
    # not SLURM_NTASKS and SLURM_PROCID: a batch script also has them but is not a task of a step
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
