"""Signals that wait, sent to this very process."""

import os
import signal
import subprocess
import sys

import pytest

from harness.interrupts import PATIENCE, Interrupts


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
    assert done.stderr == "interrupted; the same command goes on where this one stopped\n"
