"""`python -m harness` in a process of its own, without ten seconds of imports each time.

A server process imports torch, transformers and DeepSpeed once and forks for every command. What a test
gives to a command (folder, environment, streams) reaches the fork; what could act on the imports themselves
(another locale, device or thread count) gets a Python of its own. Quickstart and tests of start-up, signals,
memory and terminals always use one.
"""

import contextlib
import io
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

HEAVY = ("harness.training.train", "harness.decoding.predict", "harness.scoring", "bert_score")
SAFE = ("COLUMNS", "MLFLOW_", "HARNESS_", "PYTEST_")
"""Variables that no import reads, by how their names begin."""

_server: "_Server | None" = None


def harness(
    folder: Path,
    *arguments: str | Path,
    code: int | None = 0,
    env: Mapping[str, str] | None = None,
    timeout: float = 500,
) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does; fails unless it ends with `code` (None: with any)."""
    environment = {"OMP_NUM_THREADS": "1", "COLUMNS": "160", **os.environ, **(env or {})}
    if env is None:
        environment.pop("MLFLOW_TRACKING_URI", None)
    if _acts_on_imports(environment):
        done = _alone(folder, arguments, environment, timeout)
    else:
        done = _warm().run(folder, arguments, environment, timeout)
    assert code is None or done.returncode == code, done.stdout + done.stderr
    return done


def _alone(folder, arguments, environment, timeout) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "harness", *arguments]
    pipes = {"capture_output": True, "encoding": "utf-8", "timeout": timeout}
    return subprocess.run(command, cwd=folder, env=environment, **pipes)


def _acts_on_imports(environment: Mapping[str, str]) -> bool:
    ours = os.environ | {"OMP_NUM_THREADS": "1"}
    names = {name for name in ours.keys() | environment.keys() if ours.get(name) != environment.get(name)}
    return any(not name.startswith(SAFE) for name in names)


def _warm() -> "_Server":
    global _server
    if _server is None or _server.process.poll() is not None:
        _server = _Server()
    return _server


class _Server:
    """The side of the tests."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "support.commands", str(theirs.fileno())]
        tests = Path(__file__).parents[1]
        # Ends with this process: the socket is closed then.
        self.process = subprocess.Popen(command, cwd=tests, env=environment, pass_fds=[theirs.fileno()])
        theirs.close()
        self.socket = ours

    def run(self, folder, arguments, environment, timeout) -> subprocess.CompletedProcess[str]:
        asked = {
            "folder": str(folder),
            "arguments": list(map(str, arguments)),
            "environment": dict(environment),
        }
        with (
            tempfile.TemporaryFile() as given,
            tempfile.TemporaryFile() as out,
            tempfile.TemporaryFile() as err,
        ):
            given.write(json.dumps(asked).encode())
            given.seek(0)
            self.socket.settimeout(timeout)
            socket.send_fds(self.socket, [b"."], [given.fileno(), out.fileno(), err.fileno()])
            try:
                code = int(self.socket.recv(16))
            except TimeoutError:
                os.killpg(self.process.pid, signal.SIGKILL)
                raise
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(io.TextIOWrapper(file, encoding="utf-8").read())
        return subprocess.CompletedProcess(["harness", *arguments], code, *texts)


def _serve(connection: socket.socket) -> None:
    """Fork for every command that is asked for, one at a time, until the tests have ended."""
    while True:
        message, files, _, _ = socket.recv_fds(connection, 1, 3)
        if not message:
            return
        child = os.fork()
        if child == 0:
            connection.close()
            _become(*files)
        for file in files:
            os.close(file)
        _, status = os.waitpid(child, 0)
        connection.send(str(os.waitstatus_to_exitcode(status)).encode().ljust(16))


def _become(given: int, out: int, err: int) -> None:
    """Be `python -m harness` in the folder and environment that were asked for; never returns."""
    with open(given, "rb") as file:
        asked = json.loads(file.read())
    for at, descriptor in enumerate((os.open(os.devnull, os.O_RDONLY), out, err)):
        os.dup2(descriptor, at)
        os.close(descriptor)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, "utf-8", "backslashreplace", closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["folder"])
    sys.path[0] = asked["folder"]
    sys.argv = ["harness", *asked["arguments"]]
    code: object = 1
    try:
        runpy.run_module("harness", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    os.setsid()  # so that a test that hangs is ended with all it has started
    with contextlib.suppress(ImportError):
        for name in HEAVY:
            __import__(name)
    _serve(socket.socket(fileno=int(sys.argv[1])))
