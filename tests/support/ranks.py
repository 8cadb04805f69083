"""Training of a tiny checkpoint on several ranks, each a process."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from support.commands import python
from support.models import stages

TESTS = Path(__file__).parents[1]
TRAINING = "support.ranked_training"
TRAIN = {
    "batch_size": 8,
    "micro_batch_size": 2,
    "learning_rate": 1e-3,
    "warmup_steps": 3,
    "precision": "fp32",
    "stages": stages(4, 3),
    "evaluate_every": 0,
}
KEPT = ("step", "stage", "epoch", "loss", "caption_loss", "concept_loss", "valid_loss", "learning_rate")


def train(
    folder: Path,
    directory: Path,
    processes: int = 2,
    check: bool = True,
    environment: Mapping[str, str] | None = None,
    **given,
) -> int:
    """Train on a number of ranks; `ranked_training` reads what is given. Returns the launcher's exit code."""
    given = {"folder": str(folder), "directory": str(directory), "train": TRAIN} | given
    directory.mkdir(exist_ok=True)
    (directory / "given.json").write_text(json.dumps(given))
    if check and environment is None:
        return _in_forks(directory / "given.json", processes)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *launcher, "-m", TRAINING, str(directory / "given.json")]
    environment = environment or os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(command, cwd=TESTS, env=environment, **pipes)
    assert done.returncode == 0 or not check, done.stderr[-4000:]
    return done.returncode


def _in_forks(given: Path, processes: int) -> int:
    """The same ranks in forks that have imported torch; nobody ends the others where one fails."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    told = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    program = f"import runpy; runpy.run_module({TRAINING!r}, run_name='__main__')"

    def rank(number: str) -> int:
        return python(program, given, env=told | {"RANK": number, "LOCAL_RANK": number}).returncode

    with ThreadPoolExecutor(processes) as ranks:
        return max(ranks.map(rank, map(str, range(processes))))


def rows(directory: Path) -> list[dict]:
    """The rows of losses.jsonl without what differs from run to run."""
    found = [json.loads(line) for line in (directory / "losses.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in KEPT if key in row} for row in found]
