"""`python -m harness` in its own process, without ten seconds of imports each time.

A server process imports torch, transformers and DeepSpeed once and forks for every command. Another one
imports MLflow and forks for every process that mirrors runs while a command runs. The fork gets what a test
gives a command (folder, environment, streams). A test that changes the imports themselves (another locale,
device or thread count) gets a new Python. Quickstart and tests of start-up, signals, memory and terminals
always use a new Python. Other programs of tests run in such forks, too.
"""

import contextlib
import gc
import io
import json
import logging
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

TESTS = Path(__file__).parents[1]
IMPORTS = {
    "commands": (
        "harness.training.train",
        "harness.decoding.predict",
        "harness.scoring",
        "harness.cli.tables",
        "harness.run",
        "harness.report",
        "harness.submission",
        "harness.tracking",
        "harness.models.tiny",
        "harness.training.plots",
        "bert_score",
        "deepspeed.ops",
        "matplotlib.pyplot",
    ),
    "mirrors": ("harness.cli", "harness.tracking", "mlflow.store.tracking.sqlalchemy_store"),
}
"""What the servers import before they fork."""
SAFE = ("COLUMNS", "MLFLOW_", "HARNESS_", "PYTEST_")
"""Variables that no import reads, by how their names begin."""
SHARED = "HARNESS_TESTS_"
"""How the variables begin that tell xdist's workers the socket of each server."""
FOLLOW = ["-m", "harness", "sync", "--follow"]
"""The arguments of a process that mirrors runs while they go on."""

_servers: dict[str, "_Server"] = {}


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
        done = _by("commands", folder, arguments, environment, timeout)
    assert code is None or done.returncode == code, done.stdout + done.stderr
    return done


def python(
    program: str,
    *arguments: str | Path,
    folder: Path = TESTS,
    server: str = "commands",
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program as `python -c` does, in a fork of a server; fails unless it ends with 0."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
    done = _by(server, folder, ["-c", program, *arguments], environment, 500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def _by(name, folder, arguments, environment, timeout) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        streams = (out.fileno(), err.fileno())
        ended = _server(name).run(folder, arguments, environment, timeout, streams)
        return subprocess.CompletedProcess([*arguments], ended, _read(out), _read(err))


def on_streams(
    folder: Path,
    arguments: Sequence[str | Path],
    environment: Mapping[str, str],
    streams: tuple[int, int],
    timeout: float = 500,
) -> int:
    """Run the command line on file descriptors for what it prints and for its errors -> its exit code."""
    return _server("commands").run(folder, arguments, environment, timeout, streams)


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return io.TextIOWrapper(file, encoding="utf-8").read()


def by_server(*arguments: str, server: str = "mirrors") -> list[str]:
    """A command that is `python -m harness ARGUMENTS` without the imports of a server; it may be killed."""
    return _asking(_server(server).path, arguments)


def _asking(path: str, arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-IS", __file__, "ask", path, *arguments]


def mirror_by_server(monkeypatch) -> None:
    """Have commands that run in this process start what mirrors their runs by the server for it, too."""
    monkeypatch.setattr(_Popen, "mirrors", _server("mirrors").path)
    monkeypatch.setattr(subprocess, "Popen", _Popen)


def _alone(folder, arguments, environment, timeout) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "harness", *arguments]
    pipes = {"capture_output": True, "encoding": "utf-8", "timeout": timeout}
    return subprocess.run(command, cwd=folder, env=environment, **pipes)


def _acts_on_imports(environment: Mapping[str, str]) -> bool:
    ours = os.environ | {"OMP_NUM_THREADS": "1"}
    names = {name for name in ours.keys() | environment.keys() if ours.get(name) != environment.get(name)}
    return any(not name.startswith(SAFE) for name in names)


def _server(name: str) -> "_Server":
    if name not in _servers or _servers[name].ended():
        _servers[name] = _Server(name)
    return _servers[name]


def share() -> None:
    """Start the servers here for all of xdist's workers, which this process is about to start."""
    for name in IMPORTS:
        os.environ[f"{SHARED}{name.upper()}"] = _server(name).path


class _Server:
    """The side of the tests: a server process, which ends with the one that starts it, and its socket."""

    def __init__(self, name: str) -> None:
        self.process, self.path = None, os.environ.get(f"{SHARED}{name.upper()}")
        if self.path is None:
            self._start(IMPORTS[name])

    def _start(self, imports: tuple[str, ...]) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.path = f"{self.folder.name}/socket"
        command = [sys.executable, "-m", "support.commands", "serve"]
        pipes = {"stdin": subprocess.PIPE, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "cwd": TESTS}
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self.path)
            listener.listen()
            number = listener.fileno()
            self.process = subprocess.Popen([*command, str(number), *imports], pass_fds=[number], **pipes)

    def ended(self) -> bool:
        """Whether it has to be started again."""
        return self.process is not None and self.process.poll() is not None

    def run(self, folder, arguments, environment, timeout, streams: tuple[int, int]) -> int:
        """Run a command that writes to `streams` -> its exit code."""
        asked = {
            "folder": str(folder),
            "arguments": list(map(str, arguments)),
            "environment": dict(environment),
            "mirrors": _server("mirrors").path if arguments[0] in ("run", "study") else None,
        }
        with open(os.devnull, "rb") as nothing:
            return _ask(self.path, asked, (nothing.fileno(), *streams), timeout)


def _ask(path: str, asked: dict, streams: tuple[int, int, int], timeout: float | None) -> int:
    """Have a server run a command -> its exit code. The command is killed when this process is gone."""
    with socket.socket(socket.AF_UNIX) as connection, tempfile.TemporaryFile() as given:
        given.write(json.dumps(asked).encode())
        given.seek(0)
        connection.settimeout(timeout)
        connection.connect(path)
        socket.send_fds(connection, [b"."], [given.fileno(), *streams])
        return int(connection.recv(16))


class _Command(NamedTuple):
    """What a server runs: the process, what becomes readable when it ends, and who asked for it."""

    pid: int
    ended: int
    asker: socket.socket


def _serve(listener: socket.socket) -> None:
    """Fork for every command that is asked for, until the tests have ended."""
    waiting = selectors.DefaultSelector()
    waiting.register(listener, selectors.EVENT_READ)
    waiting.register(0, selectors.EVENT_READ)
    while True:
        for key, _ in waiting.select():
            if waiting.get_map().get(key.fd) is not key:
                continue  # it went with another one
            if key.fd == 0:
                return  # the tests have ended
            if key.fileobj is listener:
                _begin(listener, waiting)
            elif key.fd == key.data.ended:
                _end(key.data, waiting)
            else:  # the one who asked is gone
                waiting.unregister(key.fileobj)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(key.data.pid, signal.SIGKILL)


def _begin(listener: socket.socket, waiting: selectors.BaseSelector) -> None:
    asker, _ = listener.accept()
    _, files, _, _ = socket.recv_fds(asker, 1, 4)
    pid = os.fork()
    if pid == 0:
        for number in list(waiting.get_map()):
            os.close(number)
        asker.detach()
        _become(*files)
    for file in files:
        os.close(file)
    command = _Command(pid, os.pidfd_open(pid), asker)
    waiting.register(command.ended, selectors.EVENT_READ, command)
    waiting.register(asker, selectors.EVENT_READ, command)


def _end(command: _Command, waiting: selectors.BaseSelector) -> None:
    _, status = os.waitpid(command.pid, 0)
    with contextlib.suppress(OSError):  # the one who asked may be gone
        command.asker.send(str(os.waitstatus_to_exitcode(status)).encode())
    waiting.unregister(command.ended)
    if command.asker in waiting.get_map():
        waiting.unregister(command.asker)
    os.close(command.ended)
    command.asker.close()


def _become(given: int, *streams: int) -> None:
    """Be `python -m harness` in the folder and environment that were asked for; never returns."""
    os.setsid()  # so that a command that hangs is ended with all it has started
    with open(given, "rb") as file:
        asked = json.loads(file.read())
    for at, descriptor in enumerate(streams):
        os.dup2(descriptor, at)
    os.closerange(3, max(streams) + 1)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, "utf-8", "backslashreplace", closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["folder"])
    sys.path[0] = asked["folder"]
    program = asked["arguments"][1] if asked["arguments"][0] == "-c" else None
    sys.argv = ["-c", *asked["arguments"][2:]] if program else ["harness", *asked["arguments"]]
    _Popen.mirrors = asked["mirrors"]
    subprocess.Popen = _Popen
    code: object = 1
    try:
        if program:
            exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_module("harness", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code if isinstance(code, int) else 1)


class _Popen(subprocess.Popen):
    """Starts processes that mirror runs by the server for them, through a small process in their place."""

    mirrors: str | None = None

    def __init__(self, args, *more, **named) -> None:
        if self.mirrors and list(args[1:5]) == FOLLOW:
            args = _asking(self.mirrors, args[3:])
        super().__init__(args, *more, **named)


if __name__ == "__main__":
    if sys.argv[1] == "ask":
        there = {"folder": os.getcwd(), "environment": dict(os.environ)}
        there["mirrors"] = os.environ.get(f"{SHARED}MIRRORS")
        sys.exit(_ask(sys.argv[2], there | {"arguments": sys.argv[3:]}, (0, 1, 2), None))
    os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed looks for one when it is imported
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with contextlib.suppress(ImportError):
        for name in sys.argv[3:]:
            __import__(name)
    gc.collect()
    gc.freeze()  # else each collection in a fork goes through all that was imported, and copies it
    _serve(socket.socket(fileno=int(sys.argv[2])))
