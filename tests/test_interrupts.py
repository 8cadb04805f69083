"""Delayed signals, sent to this process; signals that end a command."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from support.golden_pairs import PREDICTIONS, REFERENCES, written

from harness.machine.interrupts import PATIENCE, Interrupts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_and_its_echo_too(number):
    interrupts = Interrupts()
    before = signal.getsignal(number)
    with interrupts.wait():
        assert interrupts.came is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)  # what a launcher makes of it
    assert interrupts.came is not None
    assert signal.getsignal(number) is before


def test_a_second_one_after_a_while_does_not_wait():
    interrupts = Interrupts()
    with interrupts.wait():
        os.kill(os.getpid(), signal.SIGINT)
        interrupts.came -= PATIENCE + 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        interrupts = Interrupts()
        with interrupts.wait():
            os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.came is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_in_a_finaliser_is_not_lost(tmp_path):
    """Python only prints what is raised there, and goes on."""
    code = """if True:
        import os, signal, time
        from harness import cli
        class Left:
            def __del__(self):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
        def command(**_):
            Left()
            time.sleep(20)
            return 0
        cli.app = command
        cli.main()
    """
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 130
    assert done.stderr == "interrupted; the same command continues where this one stopped\n"


SAID = "interrupted; the same command continues where this one stopped\n"


@pytest.fixture
def scored(tmp_path) -> list[str]:
    """The command that scores the golden pairs, many times over so that it takes a while."""
    for name, values in (("labels.csv", REFERENCES), ("run.csv", PREDICTIONS)):
        many = {f"{key}_{n}": value for n in range(30) for key, value in values.items()}
        (tmp_path / name).write_text(written(many, ",", True, "\n", quoted=True), encoding="utf-8")
    return [sys.executable, "-m", "harness", "score", "run.csv", "--references", "labels.csv", "--standins"]


def ended(
    command: list[str], folder: Path, number: int, ready
) -> tuple[int, str, float, list[psutil.Process]]:
    """Exit code, standard error, seconds from the signal to the end, and children that are left."""
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 120
    while not ready(process) and time.monotonic() < until:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    sent = time.monotonic()
    said = process.communicate(timeout=60)[1]
    seconds = time.monotonic() - sent
    _, left = psutil.wait_procs(children, timeout=5)
    return process.returncode, said, seconds, left


def has(word: str):
    """Whether a child of a process has this word in its command line."""

    def look(process: subprocess.Popen) -> bool:
        children = psutil.Process(process.pid).children(recursive=True)
        return any(word in " ".join(child.cmdline()) for child in children if child.is_running())

    return look


def has_loaded(library: str):
    """Whether a process has a shared library in memory."""
    return lambda process: library in Path(f"/proc/{process.pid}/maps").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize(
    ("metrics", "ready"),
    [
        ("meteor", has("meteor-1.5")),
        ("cider", has("PTBTokenizer")),
        ("bertscore,meteor", has_loaded("libtorch_cpu")),
        ("rouge1", has_loaded("_multiarray")),
    ],
    ids=["METEOR's Java", "PTB's Java", "import torch", "import numpy"],
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.slow
def test_score_ends_within_seconds_and_leaves_no_process(scored, tmp_path, metrics, ready, number):
    if number != signal.SIGTERM and "meteor" not in metrics:
        pytest.skip("once is enough")
    code, said, seconds, left = ended([*scored, "--metrics", metrics], tmp_path, number, ready)
    assert code == 130
    assert said.endswith(SAID)
    assert "Traceback" not in said
    assert seconds < 20  # on a machine that does much else; about 0.2 s on an idle one
    assert not left


def test_what_a_library_makes_of_an_interruption_is_one(tmp_path):
    code = """if True:
        import os, signal
        from harness import cli
        def command(**_):
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            except KeyboardInterrupt:
                raise ImportError("numpy failed to load")
        cli.app = command
        cli.main()
    """
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (130, SAID)
