"""Several workers of one study on this machine: processes of one command, each with its own devices."""

import os
import subprocess
import sys
from collections.abc import Sequence

from harness.machine import launch
from harness.machine.device import Device

WORKER = "HARNESS_STUDY_WORKER"
"""The environment variable with a worker's number."""
_VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "npu": "ASCEND_RT_VISIBLE_DEVICES"}
_GRACE = 60  # seconds for workers to give their trials back


def is_worker() -> bool:
    """Whether this process is a worker that `start` started."""
    return WORKER in os.environ


def start(arguments: Sequence[str], workers: int, device: Device, ranks: int) -> list[int]:
    """Run `python -m harness ARGUMENTS` in `workers` processes -> their exit codes.

    Ctrl-C and SIGTERM end the workers too, and raise `KeyboardInterrupt` when all have ended.
    """
    launch.share_cores(workers * ranks)
    command = [sys.executable, "-u", "-m", "harness", *arguments]
    running: list[subprocess.Popen[bytes]] = []
    try:
        for number in range(workers):
            own = os.environ | environment(number, device, ranks) | {launch.PARENT: str(os.getpid())}
            running.append(subprocess.Popen(command, env=own, start_new_session=True))
        return [process.wait() for process in running]
    except KeyboardInterrupt:
        for process in running:
            process.terminate()  # not SIGINT: under cron or `&` they ignore it
        for process in running:
            _end(process)
        raise


def environment(number: int, device: Device, ranks: int) -> dict[str, str]:
    """Environment variables of a worker: its number, and its share of the devices if there are several."""
    own = {WORKER: str(number)}
    variable = _VISIBLE.get(device.kind)
    if variable is None or device.count < 2:
        return own
    visible = os.environ.get(variable, ",".join(map(str, range(device.count)))).split(",")
    mine = [visible[(number * ranks + i) % len(visible)] for i in range(ranks)]
    return own | {variable: ",".join(dict.fromkeys(mine))}


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
