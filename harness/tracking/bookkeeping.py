"""What each tracking server has of an experiment, noted on disk."""

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.output.masking import masked
from harness.store import bytes_of, fingerprint, read_checked, write_checked
from harness.tracking.stores import database_of, tracking_uri

NAMES = "2"
"""The version of the names of metrics. MLflow can't rename one, so a run with other names is made anew."""
STATE, LOCK = "mlflow.json", "mlflow.lock"


@dataclass
class State:
    """What one server has of an experiment; written to disk before and after each change on the server."""

    file: Path
    everything: dict[str, Any]
    parent: dict[str, Any] = field(default_factory=dict)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    found_again: bool = False

    @classmethod
    def load(cls, experiment_directory: Path) -> "State":
        """Read the state; if the file is damaged, the state says to search for the runs on the server."""
        file = experiment_directory / STATE
        everything = _bookkeeping(file)
        database, name = database_of(tracking_uri()), _server_of(experiment_directory)
        if everything is None:
            everything = {name: {"found_again": True}}
        if database and not database.exists():
            everything.pop(name, None)  # the database was deleted, so nothing is mirrored
        elif name not in everything and _is_inside(database, file):
            everything[name] = _before_a_move(everything, database)
        ours = everything.setdefault(name, {})
        here, home = str(experiment_directory.resolve()), ours.get("home")
        if home not in (None, here) and Path(home, STATE).exists() and not _is_inside(database, file):
            ours.clear()  # a copy is a project of its own; its runs on a shared server are the original's
        ours["home"] = here
        found_again = bool(ours.get("found_again"))
        parent, runs = ours.setdefault("parent", {}), ours.setdefault("runs", {})
        return cls(file, everything, parent, runs, found_again)

    def save(self) -> None:
        write_checked(self.file, self.everything)


def _is_inside(database: Path | None, file: Path) -> bool:
    """Whether a store lies in the project of a file, so that it is copied and moved with it."""
    return database is not None and database.parent in file.resolve().parents


def _server_of(experiment_directory: Path) -> str:
    """The name of the present server in the bookkeeping; a store in the project has a path from there."""
    database, uri = database_of(tracking_uri()), masked(tracking_uri())
    if not _is_inside(database, experiment_directory / STATE):
        return uri
    return f"sqlite:{os.path.relpath(database, experiment_directory.resolve())}"


def _before_a_move(everything: dict[str, Any], database: Path) -> dict[str, Any]:
    """What earlier versions noted of a store in the project, under its address before a copy or a move."""
    known = [uri for uri in everything if database_of(uri) and Path(uri).name == database.name]
    return everything.pop(known[-1]) if known else {}


def _bookkeeping(file: Path) -> dict[str, Any] | None:
    """What each server has of an experiment; None if the file is damaged."""
    if not file.exists():
        return {}
    found = read_checked(file)
    if found is None:  # an earlier version wrote no checksum
        with contextlib.suppress(OSError, ValueError, RecursionError):
            found = json.loads(bytes_of(file))
    servers = list(found.values()) if isinstance(found, dict) and "checksum" not in found else [None]
    whole = all(isinstance(server, dict) and _is_server(server) for server in servers)
    return found if whole else None


def _is_server(server: dict[str, Any]) -> bool:
    entries = server.get("runs", {})
    if not isinstance(entries, dict):
        return False
    kinds = {"run_id": str, "token": str, "last_steps": dict, "artifacts": dict, "scores": dict}
    return all(
        isinstance(entry, dict)
        and all(isinstance(entry.get(key, kind()), kind) for key, kind in kinds.items())
        for entry in (server.get("parent", {}), *entries.values())
    )


def mirrored_as(run_directory: Path) -> dict[str, str]:
    """The id of a run on each server that has it."""
    servers = _bookkeeping(run_directory.parent / STATE) or {}
    entries = {name: server.get("runs", {}).get(run_directory.name, {}) for name, server in servers.items()}
    return {name: entry["run_id"] for name, entry in entries.items() if "run_id" in entry}


def pages_of(experiment_directory: Path) -> dict[str, str]:
    """The page with the runs of an experiment on each server that has it, the best run first."""
    servers = _bookkeeping(experiment_directory / STATE) or {}
    parents = {name: server.get("parent", {}) for name, server in servers.items()}
    how = "workflowType=machine_learning&viewStateShareKey=harness"
    return {
        name: f"{site_of(name)}/#/experiments/{parent['experiment']}/runs?{how}"
        for name, parent in parents.items()
        if "view" in parent and "experiment" in parent and site_of(name)
    }


def mark(record: Mapping[str, Any]) -> str:
    """What the bookkeeping notes of a record that is on the server, under the present names."""
    return fingerprint({**record, "names": NAMES})


def site_of(server: str) -> str | None:
    """The address of a server's web pages; that of `mlflow ui` for a file, None if there is none."""
    site = "http://127.0.0.1:5000" if server.startswith("sqlite:") else server.rstrip("/")
    return site if site.startswith(("http://", "https://")) else None


def rename(experiment_directory: Path, run: str, new: str) -> None:
    """Note in the bookkeeping of an experiment that a run has another name; `Mirror` tells the server."""
    from filelock import FileLock

    file = experiment_directory / STATE
    with FileLock(experiment_directory / LOCK, timeout=60):
        everything = _bookkeeping(file)
        for server in (everything or {}).values():
            if entry := server.get("runs", {}).pop(run, None):
                server["runs"][new] = entry
        if everything:
            write_checked(file, everything)
