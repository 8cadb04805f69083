"""How OpenMP's threads wait: they sleep on a machine that others use, unless the user says otherwise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.machine import launch
from harness.machine.device import cores

CODE = """
import os, sys
from harness.machine.environment import environment
threads = environment("cpu")["threads"]
assert "torch" not in sys.modules
print(os.environ.get("OMP_WAIT_POLICY"), threads, sep="|")
"""

BENCHMARKS = """
import os, sys, psutil
psutil.cpu_percent = lambda interval: 100.0
import real_size
assert "torch" not in sys.modules
import predict
import train
print(os.environ.get("OMP_WAIT_POLICY"))
"""


@pytest.fixture
def busy_machine():
    others = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)
    ]
    yield
    for process in others:
        process.kill()
        process.wait()


def chosen(**variables: str) -> tuple[str, str]:
    """The policy of a process that starts now, and what its record says."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, env=clean | variables, capture_output=True, text=True, check=True)
    policy, _, threads = done.stdout.strip().partition("|")
    return policy, threads


@pytest.mark.skipif(cores() < 2, reason="one thread waits for no other")
def test_threads_sleep_beside_others_unless_the_user_chose(busy_machine):
    assert chosen() == ("PASSIVE", f"{cores()}, passive waiting")
    assert chosen(OMP_WAIT_POLICY="ACTIVE") == ("ACTIVE", f"{cores()}, active waiting")
    assert chosen(GOMP_SPINCOUNT="10000") == ("None", f"{cores()}, 10000 spins before waiting")
    assert chosen(OMP_NUM_THREADS="1") == ("None", "1, active waiting")


@pytest.mark.ci
@pytest.mark.skipif(cores() < 2, reason="one thread waits for no other")
def test_benchmarks_look_at_the_machine_before_they_import_torch():
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    folder = Path(__file__).parents[1] / "benchmarks"
    command = [sys.executable, "-c", BENCHMARKS]
    done = subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True, check=True)
    assert done.stdout == "PASSIVE\n"


@pytest.mark.parametrize(
    ("given", "threads"),
    [
        ({"RANK": "3", "LOCAL_SIZE": "4"}, "2"),
        ({"RANK": "3", "LOCAL_SIZE": "16"}, "1"),
        ({"RANK": "3", "LOCAL_SIZE": "4", "OMP_NUM_THREADS": "5"}, "5"),
        ({"RANK": "0", "LOCAL_SIZE": "1"}, None),
        ({"LOCAL_SIZE": "4"}, None),
    ],
)
def test_ranks_of_deepspeeds_launcher_share_the_cores_of_their_host(monkeypatch, given, threads):
    for name in ("RANK", "LOCAL_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "cores", lambda: 8)
    launch.share_host()
    assert os.environ.pop("OMP_NUM_THREADS", None) == threads


@pytest.mark.parametrize(
    ("processes", "given", "said"),
    [
        (4, {}, "4 processes share 2 cores, one thread each\n"),
        (4, {"RANK": "0"}, "4 processes share 2 cores, one thread each\n"),
        (4, {"RANK": "1"}, ""),
        (4, {"OMP_NUM_THREADS": "1"}, ""),
        (2, {}, ""),
    ],
)
def test_more_processes_than_cores_are_told_once(monkeypatch, capsys, processes, given, said):
    for name in ("RANK", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # so that it is as before after the test
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "cores", lambda: 2)
    launch.share_cores(processes)
    assert os.environ["OMP_NUM_THREADS"] == "1"
    assert capsys.readouterr().err == said
