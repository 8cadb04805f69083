"""Real servers for the tests of a team: their own PostgreSQL cluster, and `mlflow server` on it.

The system's PostgreSQL is not touched. All processes end with the tests, even if these are killed.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

PASSWORD = "s3cret-of-the-team"


def wait(until: Callable[[], object], seconds: float = 150) -> None:
    """Until something holds; an AssertionError after so many seconds."""
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.02)


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def programs() -> Path | None:
    """Where Debian keeps the programs of its newest PostgreSQL; None where there is none."""
    found = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    return max((file.parent for file in found), key=lambda folder: int(folder.parent.name), default=None)


def bound(command: list[str], at_end: str) -> list[str]:
    """The command, to get a signal when the process that starts it dies."""
    return ["setpriv", "--pdeathsig", at_end, "--", *command]


class Postgresql:
    """A cluster with the databases `mlflow` and `optuna`, which the user `harness` owns."""

    def __init__(self, folder: Path) -> None:
        self.programs, self.data, self.port = programs(), folder / "data", free_port()
        # the server refuses to run as root
        self.user = {"user": "postgres", "group": "postgres", "extra_groups": ()} if not os.geteuid() else {}
        self.log, self.process = folder / "log", None
        self.pgpass = folder / "pgpass"
        self.pgpass.write_text(f"127.0.0.1:{self.port}:*:harness:{PASSWORD}\n")
        self.pgpass.chmod(0o600)
        secret = folder / "secret"
        secret.write_text(PASSWORD)
        if self.user:
            shutil.chown(folder, "postgres", "postgres")
        command = [
            self.programs / "initdb",
            "-D",
            self.data,
            "-U",
            "postgres",
            "--pwfile",
            secret,
            "--no-sync",
        ]
        command += ["--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C.UTF-8"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder, **self.user)

    def start(self) -> None:
        """Start it; it listens on this machine alone, and on no socket in a shared folder."""
        options = ["-h", "127.0.0.1", "-p", str(self.port), "-k", "", "-F"]
        command = bound([str(self.programs / "postgres"), "-D", str(self.data), *options], "INT")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=self.data, start_new_session=True, **self.user
            )
        wait(self._answers)

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        ready = [self.programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        return subprocess.run(ready).returncode == 0

    def stop(self) -> None:
        """Stop it at once; whoever is connected loses the connection."""
        if self.process is not None:
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
            end(self.process)

    def sql(self, *statements: str) -> None:
        """Run statements as the superuser."""
        import psycopg

        login = {"user": "postgres", "password": PASSWORD, "dbname": "postgres"}
        with psycopg.connect(host="127.0.0.1", port=self.port, autocommit=True, **login) as connection:
            for statement in statements:
                connection.execute(statement)

    def address(self, database: str, user: str = "harness") -> str:
        """The address of a database; its password is in the file `pgpass`."""
        return f"postgresql://{user}@127.0.0.1:{self.port}/{database}"

    def dump(self, database: str) -> str:
        """All that a database holds, as SQL."""
        command = [self.programs / "pg_dump", self.address(database)]
        environment = os.environ | {"PGPASSFILE": str(self.pgpass)}
        return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


@contextlib.contextmanager
def postgresql() -> Iterator[Postgresql]:
    """A cluster that runs, with its user and empty databases; gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="harness-team-") as folder:  # pytest's are closed to other users
        cluster = Postgresql(Path(folder))
        try:
            cluster.start()
            cluster.sql(
                f"CREATE ROLE harness LOGIN PASSWORD '{PASSWORD}'",
                "CREATE DATABASE mlflow OWNER harness",
                "CREATE DATABASE optuna OWNER harness",
            )
            yield cluster
        finally:
            cluster.stop()


class MlflowServer:
    """`mlflow server` as the README starts it: on a PostgreSQL database, artifacts in a folder."""

    def __init__(self, cluster: Postgresql, folder: Path) -> None:
        self.port, self.folder = free_port(), folder
        self.address = f"http://127.0.0.1:{self.port}"
        store = cluster.address("mlflow").replace("postgresql", "postgresql+psycopg", 1)
        place = ["--backend-store-uri", store, "--artifacts-destination", str(folder / "artifacts")]
        listen = ["--host", "0.0.0.0", "--port", str(self.port), "--allowed-hosts", f"127.0.0.1:{self.port}"]
        command = [sys.executable, "-m", "mlflow", "server", *place, *listen, "--workers", "1"]
        self.command = bound(command, "TERM")
        self.environment = os.environ | {
            "PGPASSFILE": str(cluster.pgpass),
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, without waiting until it answers."""
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def answers(self) -> bool:
        """Whether it serves; an AssertionError with its log where it has ended."""
        assert self.process.poll() is None, (self.folder / "server.log").read_text()
        try:
            with urllib.request.urlopen(f"{self.address}/health", timeout=2) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def kill(self) -> None:
        """End it in the middle of whatever it does."""
        if self.process is not None:
            end(self.process)


def end(process: subprocess.Popen) -> None:
    """Kill a process that leads a session, and those that it started in it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
