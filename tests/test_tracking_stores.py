"""Stores that several processes create at once, are incomplete, or refuse; damaged bookkeeping."""

import contextlib
import json
import os
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from socket import create_server
from threading import Thread

import pytest
from support import commands
from support.mirrors import NAME, ROWS, client, history, losses, mlflow_runs, record, root

from harness import tracking
from harness.errors import UserError
from harness.store import write_json
from harness.tracking import stores

__all__ = ["root"]  # a fixture
SECRET = "s3cr3t"


def sync(folder: Path, run: str) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    command = commands.by_server("sync", run)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


@pytest.mark.parametrize(
    "apart", [pytest.param(0.0, marks=pytest.mark.slow), pytest.param(0.4, marks=pytest.mark.ci)]
)
def test_three_first_runs_make_one_store(root, tmp_path, apart):
    """Migrations of several processes at once leave a store that no MLflow can open."""
    (tmp_path / "mlflow.db").unlink()
    names = ["one", "two", "three"]
    for name in names:
        record(root, "base", name=name)
        (root / name).mkdir()
        (root / NAME / "base-s1").rename(root / name / "base-s1")
    started = []
    for name in names:
        started.append(sync(tmp_path, f"runs/{name}"))
        time.sleep(apart)
    for process in started:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, out
    assert {experiment.name for experiment in client().search_experiments()} >= set(names)


def half_made(database: Path, version: str = "451aebb31d03") -> None:
    """What a migration leaves that another one overtook: all tables but a version that is not the last."""
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("DROP TABLE IF EXISTS latest_metrics")
        connection.execute("UPDATE alembic_version SET version_num = ?", (version,))


@pytest.mark.ci
def test_a_half_made_store_is_recognised_and_the_remedy_helps(root, tmp_path):
    folder, database = record(root, "base"), tmp_path / "mlflow.db"
    half_made(database)
    with pytest.raises(UserError) as error:
        tracking.sync(root)
    assert error.value.exit_code == 1
    assert f"{database}: MLflow can't use this store" in str(error.value)
    assert f"mv {database} {database}.old && harness sync" in str(error.value)
    database.rename(f"{database}.old")
    process = sync(tmp_path, "runs")  # as the remedy says: this process has the old store open
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert f"{folder.name}: mirrored to" in out


def test_a_creation_that_is_killed_leaves_no_half_made_store(tmp_path, monkeypatch):
    """A run that ends kills its follower after 20 s; on a busy machine it is still creating the tables."""

    def begin(uri: str) -> None:
        with contextlib.closing(sqlite3.connect(stores.database_of(uri))) as connection, connection:
            connection.execute("CREATE TABLE secrets (number)")
        raise SystemExit

    monkeypatch.setattr(stores, "_client", begin)
    database = tmp_path / "fresh.db"
    for _ in range(2):  # the second time begins anew
        with pytest.raises(SystemExit):
            stores.opened(f"sqlite:///{database}")
        assert database.stat().st_size == 0


def test_a_store_of_a_newer_mlflow_without_one_of_our_tables_is_recognised(root, tmp_path):
    record(root, "base")
    half_made(tmp_path / "mlflow.db", "unknown")
    with pytest.raises(UserError, match="another version's: Can't locate revision identified by 'unknown'"):
        tracking.sync(root)


def test_a_file_that_is_no_database_is_recognised(root, tmp_path):
    record(root, "base")
    (tmp_path / "mlflow.db").write_bytes(b"x" * 9000)
    with pytest.raises(UserError, match="can't use this store"):
        tracking.sync(root)


@pytest.mark.parametrize("sql", ["ALTER TABLE tags DROP COLUMN value", "DROP TABLE latest_metrics"])
def test_a_store_that_lacks_a_part_is_recognised_when_a_run_needs_it(root, tmp_path, capfd, sql):
    """Its version is the last one, so MLflow opens it."""
    tracking.mirror(record(root, "base"))
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as connection, connection:
        connection.execute(sql)
    record(root, "other")
    with pytest.raises(UserError, match="can't use this store") as error:
        tracking.sync(root)
    assert "mlflow.db.old && harness sync" in str(error.value)
    assert "Traceback" not in capfd.readouterr().err


def test_a_folder_in_place_of_the_store_is_said_at_once(root, tmp_path):
    record(root, "base")
    (tmp_path / "mlflow.db").unlink()
    (tmp_path / "mlflow.db").mkdir()
    began = time.monotonic()
    with pytest.raises(UserError, match=r"mlflow\.db: unable to open database file"):
        tracking.sync(root)
    assert time.monotonic() - began < 5


def test_options_in_the_address_of_a_store_are_no_part_of_its_name(root, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db?timeout=30")
    record(root, "base")
    for _ in range(2):
        assert len(tracking.sync(root)) == 1
    assert len(mlflow_runs()) == 2
    assert not list(tmp_path.glob("*[?]*"))


def forget_tokens(file: Path) -> None:
    """As an earlier version left it: a random token, and no checksum."""
    write_json(file, json.loads(file.read_text())["value"])


@pytest.mark.ci
@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": 1}', '{"checksum": "1", "value": {}}', None])
def test_damaged_bookkeeping_is_made_again_without_a_second_run(root, content):
    """`None`: the run that it names is not on the server."""
    file = root / NAME / "mlflow.json"
    losses(root, ROWS)
    for variant in ("base", "other"):
        tracking.mirror(record(root, variant))
    before = {name: run.info.run_id for name, run in mlflow_runs().items()}
    if content is None:
        forget_tokens(file)
        file.write_text(file.read_text().replace(before["base-s1"], "0" * 32))
    else:
        file.write_text(content)
    assert len(tracking.sync(root)) == 2
    after = {name: run.info.run_id for name, run in mlflow_runs().items()}
    assert after == before
    assert history(mlflow_runs()["base-s1"], "train/loss") == [(row["step"], row["loss"]) for row in ROWS]
    (experiment,) = [one for one in client().search_experiments() if one.name == NAME]
    assert len(client().search_runs([experiment.experiment_id])) == 3


def test_runs_with_tokens_of_an_earlier_version_are_found_by_name_and_parameters(root):
    file, folder = root / NAME / "mlflow.json", record(root, "base")
    tracking.mirror(folder)
    for run in mlflow_runs().values():
        client().set_tag(run.info.run_id, "harness.token", f"random-{run.info.run_id}")
    before = {name: run.info.run_id for name, run in mlflow_runs().items()}
    file.write_text("{")
    tracking.sync(root)
    assert {name: run.info.run_id for name, run in mlflow_runs().items()} == before


def test_a_record_that_can_not_be_read_is_left_out_and_named(root):
    record(root, "base")
    (record(root, "other") / "run.json").write_text('{"name": 1')
    left_out, mirrored = tracking.sync(root)
    assert left_out.startswith(f"left out: {root / NAME / 'other-s1' / 'run.json'}: is not what a run writes")
    assert "base-s1: mirrored" in mirrored
    assert "other-s1" not in mlflow_runs()


class Refusing(BaseHTTPRequestHandler):
    code = 401

    def do_GET(self) -> None:
        self.send_response(self.code)
        self.end_headers()
        self.wfile.write(b"<html>password=s3cr3t</html>")

    do_POST = do_GET

    def log_message(self, *_) -> None:
        pass


@contextlib.contextmanager
def refusing(kind: str) -> Iterator[str]:
    """The address of a server that never answers, answers with a code, or speaks another language."""
    if kind in ("silent", "closed"):
        with create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            if kind == "closed":
                listener.close()
            yield f"http://me:{SECRET}@127.0.0.1:{port}"
        return
    code = {"https": 200, "html": 200}.get(kind) or int(kind)
    server = HTTPServer(("127.0.0.1", 0), type("Handler", (Refusing,), {"code": code}))
    Thread(target=server.serve_forever, daemon=True).start()
    scheme = "https" if kind == "https" else "http"
    try:
        yield f"{scheme}://me:{SECRET}@127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.ci
@pytest.mark.parametrize("kind", ["closed", "silent", "401", "403", "500", "html", "https"])
def test_a_server_that_refuses_is_said_in_a_line_within_seconds(root, monkeypatch, kind):
    import mlflow  # noqa: F401  what takes long to import is not what is measured

    record(root, "base")
    for key in stores.HURRIED:
        monkeypatch.delenv(key)
    with refusing(kind) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        began = time.monotonic()
        with pytest.raises(UserError) as error:
            tracking.sync(root)
        assert time.monotonic() - began < 8
    what, hint = str(error.value).splitlines()
    assert "not mirrored to http" in what
    assert "127.0.0.1" in what
    assert SECRET not in what
    assert hint.strip() == "Nothing is lost. Try again: harness sync"


@pytest.mark.parametrize(
    ("address", "driver"),
    [("mysql://u:s3cr3t@h/x", "mysqlclient"), ("postgresql+asyncpg://u:s3cr3t@h/x", "asyncpg")],
)
def test_a_database_without_its_driver_is_told_the_driver(root, monkeypatch, address, driver):
    record(root, "base")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(UserError, match=f"pip install '{driver}'") as error:
        tracking.sync(root)
    assert SECRET not in str(error.value)


def test_postgresql_without_any_driver_is_told_the_extra(root, monkeypatch):
    """In a process that can't import what the extra `team` brings, as on a machine without it."""
    record(root, "base")
    monkeypatch.setattr(stores, "find_spec", lambda name: None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://u:s3cr3t@h/x")
    with pytest.raises(UserError, match=r"the driver psycopg for postgresql is not installed") as error:
        tracking.sync(root)
    assert "pip install -e '.[team]'" in str(error.value)


def test_a_database_server_that_refuses_is_said_at_once(root, monkeypatch):
    pytest.importorskip("psycopg")
    record(root, "base")
    with refusing("closed") as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address.replace("http", "postgresql") + "/x")
        began = time.monotonic()
        with pytest.raises(UserError, match="refused"):
            tracking.sync(root)
        assert time.monotonic() - began < 8
