"""The tracking server: its address, how to open it, and the errors of opening it."""

import contextlib
import logging
import os
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from typing import Any

from harness.errors import Problem, UserError
from harness.output.masking import masked
from harness.store import fingerprint

DEFAULT_URI = "sqlite:///mlflow.db"
HURRIED = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "4", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
"""Limits that let a request fail within seconds if no server answers."""
_CONNECT = 4  # seconds for a database to take a connection
_CREATION = 120  # seconds that a process waits while another one creates the tables
_ELSEWHERE = 20.0  # seconds to wait for tables that `mlflow ui` creates, which does not use our lock
_PASSING = ("is locked", "disk is full", "readonly", "unable to open")
"""Errors of SQLite that do not mean that the store is damaged."""
_BROKEN = ("no such table", "no such column", "no column named", "malformed", "not a database")
"""Errors of SQLite that no further attempt repairs; some come only when a run is mirrored."""
_opened: set[str] = set()


def tracking_uri() -> str:
    """The address of the tracking server, valid from any folder."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI
    database = database_of(uri)
    _, mark, options = uri.partition("?")
    return f"sqlite:///{database}{mark}{options}" if database else uri


def database_of(uri: str) -> Path | None:
    """The file of an SQLite store; None for any other server."""
    path, _, _ = uri.removeprefix("sqlite:///").partition("?")
    return Path(path).resolve() if uri.startswith("sqlite:///") else None


def set_environment(limits: Mapping[str, str]) -> None:
    """Set MLflow's environment variables; values that the user has set stay."""
    quiet = {"GIT_PYTHON_REFRESH": "quiet", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    quiet["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # with the password that it may hold
    for key, value in {**quiet, **limits}.items():
        os.environ.setdefault(key, value)


def failures() -> tuple[type[Exception], ...]:
    """The exceptions of a server, a database or a disk that can't be reached."""
    from alembic.util import CommandError  # a newer MLflow's store, without a table
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, SQLAlchemyError, CommandError, OSError, ValueError)


def first_line(error: Exception) -> str:
    """The first line of an exception's message, without passwords."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return masked(line)[:500]


def opened(uri: str) -> Any:
    """A client of the server; creates the tables in an empty database.

    If several processes find an empty database, one of them creates the tables. Raises `UserError` (exit code
    1) if the driver of a database is not installed or an SQLite store is incomplete, else one of
    `failures()`.
    """
    import mlflow

    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it prints tracebacks
    driven = _with_driver(uri)
    mlflow.set_tracking_uri(driven)  # some artifact stores ask for the global one
    database = database_of(uri)
    if uri in _opened and (database is None or database.exists()):
        return mlflow.MlflowClient(driven)
    with _alone(driven):
        client = _client(driven) if database is None else _of_sqlite(driven, database)
        if database is not None:
            _bring_home(database)
    _opened.add(uri)
    return client


def _client(uri: str) -> Any:
    """A client that has received one answer."""
    import mlflow

    client = mlflow.MlflowClient(uri)
    client.search_experiments(max_results=1)
    return client


def _of_sqlite(uri: str, database: Path) -> Any:
    """A client of an SQLite store; `mlflow ui` may be creating its tables at the same time."""
    try:
        sqlite3.connect(database).close()
    except sqlite3.Error as error:  # MLflow would try for minutes
        raise OSError(f"{database}: {error}") from None
    if not _is_begun(database):
        _create(uri, database)
    until = time.monotonic() + _ELSEWHERE
    while True:
        try:
            return _client(uri)
        except failures() as error:
            if not _is_begun(database) or any(word in str(error) for word in _PASSING):
                raise
            if time.monotonic() > until or not _changes(database):
                raise _broken(database, error) from None


def _create(uri: str, database: Path) -> None:
    """Create the tables in a file beside the database and move it there whole.

    This takes seconds, and a run that has ended kills its follower, which would leave half of the tables.
    """
    new = Path(f"{database}.new")
    _, mark, options = uri.partition("?")
    for left in (new, Path(f"{new}-journal")):
        left.unlink(missing_ok=True)
    _client(f"sqlite:///{new}{mark}{options}")
    if _is_begun(database):  # `mlflow ui` was faster
        new.unlink()
    else:
        new.replace(database)


def artifacts_of(database: Path, experiment: str) -> str:
    """The address of an experiment's artifacts beside the store, as MLflow's own server has it."""
    return (database.parent / "mlartifacts" / experiment).as_uri()


def _bring_home(database: Path) -> None:
    """Let a copied or moved store keep its artifacts beside it, and not in the original's folder."""
    with contextlib.closing(sqlite3.connect(database, timeout=20)) as connection, connection:
        known = connection.execute("SELECT experiment_id, name, artifact_location FROM experiments")
        for number, name, old in known.fetchall():
            new = artifacts_of(database, name)
            if name == "Default":  # MLflow's own, with a path
                new = str(database.parent / "mlruns" / str(number))
            inside = new.removeprefix(database.parent.as_uri()).removeprefix(str(database.parent))
            if not old or old == new or not (old.startswith(("file:", "/")) and old.endswith(inside)):
                continue
            where = "UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?"
            connection.execute(where, (new, number))
            where = "UPDATE runs SET artifact_uri = ? || substr(artifact_uri, ?) "
            where += "WHERE experiment_id = ? AND substr(artifact_uri, 1, ?) = ?"
            connection.execute(where, (new, len(old) + 1, number, len(old), old))


def _is_begun(database: Path) -> bool:
    """Whether the file is not empty: someone began to create MLflow's tables, or it is not an SQLite file."""
    return database.is_file() and database.stat().st_size > 0


def _changes(database: Path) -> bool:
    """Whether another process writes to the file within the next seconds."""
    for _ in range(4):
        before = database.stat().st_mtime_ns
        time.sleep(0.5)
        if database.stat().st_mtime_ns != before:
            return True
    return False


def refuse_broken(error: Exception) -> None:
    """Raise `UserError` (exit code 1) with the remedy if an error in use means a damaged SQLite store."""
    database = database_of(tracking_uri())
    if database and any(word in str(error) for word in _BROKEN):
        raise _broken(database, error) from None


def _broken(database: Path, error: Exception) -> UserError:
    what = f"MLflow can't use this store; its tables are incomplete or another version's: {first_line(error)}"
    move = f"mv {quote(str(database))} {quote(f'{database}.old')}"
    hint = f"Nothing is lost, since runs/ has all: {move} && harness sync"
    return UserError([Problem(what, database, hint=hint)], exit_code=1)


@contextlib.contextmanager
def _alone(uri: str) -> Iterator[None]:
    """Let only one process create the tables of a database; a server does this itself."""
    from filelock import FileLock

    if uri.startswith(("http:", "https:", "file:")) or "://" not in uri:
        yield
        return
    database = database_of(uri)
    file = (
        Path(f"{database}.lock")
        if database
        else Path(tempfile.gettempdir(), f"harness-{fingerprint(uri)}.lock")
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file, timeout=_CREATION), _locked(uri):
        yield


@contextlib.contextmanager
def _locked(uri: str) -> Iterator[None]:
    """Hold a lock in the database itself, for processes on other machines; fails if no database answers."""
    if not uri.startswith(("postgresql", "mysql")):
        yield
        return
    import sqlalchemy

    engine = sqlalchemy.create_engine(uri, connect_args={"connect_timeout": _CONNECT})
    try:
        with engine.connect() as connection:  # fails at once; MLflow would try for minutes
            if uri.startswith("postgresql"):
                number = {"number": int(fingerprint("harness makes the tables of MLflow"), 16)}
                connection.execute(sqlalchemy.text("SELECT pg_advisory_lock(:number)"), number)
            yield
    finally:
        engine.dispose()


_DRIVERS = {"postgresql": "psycopg2", "mysql": "MySQLdb", "mssql": "pyodbc", "oracle": "cx_Oracle"}
"""The drivers that SQLAlchemy uses if the address names none."""
_PACKAGES = {"MySQLdb": "mysqlclient", "psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary"}


def _with_driver(uri: str) -> str:
    """The address with an installed driver. Raises `UserError` (exit code 1) with the driver it needs."""
    scheme, mark, rest = uri.partition("://")
    dialect, _, driver = scheme.partition("+")
    if not mark or dialect not in _DRIVERS:
        return uri
    if dialect == "postgresql" and not driver and not find_spec("psycopg2"):
        driver = "psycopg"  # from the extra `team`; SQLAlchemy uses psycopg2 unless the address names this
        uri = f"postgresql+psycopg://{rest}"
    needed = driver or _DRIVERS[dialect]
    if find_spec({"mysqldb": "MySQLdb"}.get(needed, needed)):
        return uri
    hint = f"Install it: python -m pip install '{_PACKAGES.get(needed, needed)}'"
    if needed == "psycopg":
        hint = "Install it: pip install -e '.[team]'   (the package psycopg)"
    what = f"the driver {needed} for {dialect} is not installed"
    raise UserError([Problem(what, key="MLFLOW_TRACKING_URI", hint=hint)], exit_code=1)
