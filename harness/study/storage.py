"""A study's folder and the storage of its trials (SQLite, journal file, PostgreSQL), samplers and pruners."""

import json
import os
import re
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from filelock import FileLock, Timeout
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend

from harness import records
from harness.errors import Problem, UserError
from harness.output.masking import masked
from harness.store import bytes_of, write_json
from harness.study.spec import Study, trial_name

optuna.logging.set_verbosity(optuna.logging.WARNING)
RECORD = "study.json"
_PATIENCE = 10  # seconds to wait for a connection to a server
FILES = {"sqlite": "study.db", "journal": "study.journal"}


class FileLocked:
    """A lock for a journal that ends with its process; Optuna's own lock stays after a killed process."""

    def __init__(self, file: Path) -> None:
        self.file, self.lock = file, FileLock(f"{file}.flock")

    def acquire(self) -> bool:
        """Wait for the lock, and cut off a last line that a full disk or a power cut left incomplete."""
        self.lock.acquire()
        if self.file.exists() and self.file.stat().st_size:
            with self.file.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    file.truncate(self.file.read_bytes().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        """Release the lock."""
        self.lock.release()


def read_record(folder: Path) -> dict[str, Any]:
    """The content of `study.json` in a folder; empty if the study has not started.

    For a damaged file: `damaged`, and `storage` if a storage file is in the folder.
    """
    file = folder / RECORD
    if not file.exists():
        return {}
    with suppress(OSError, ValueError, RecursionError):
        record = json.loads(bytes_of(file))
        known = ("id", "storage", "study")
        if isinstance(record, dict) and all(isinstance(record.get(key), str) for key in known):
            return record
    beside = [storage for storage, name in FILES.items() if (folder / name).exists()]
    return {"damaged": True} | ({"storage": beside[0]} if beside else {})


def choose(spec: Study, folder: Path, workers: int) -> str:
    """The storage (sqlite, journal or an address): the file's, else the one in use, else by `workers`.

    Raises `UserError` for SQLite with several workers, and for a storage other than the one in use.
    """
    begun = read_record(folder).get("storage")
    wanted = spec.config.storage
    chosen = wanted or begun or ("sqlite" if workers == 1 else "journal")
    if begun is not None and masked(chosen) != begun:
        what = f"got {masked(chosen)}, but the study in {folder} started with {begun}"
        raise UserError([Problem(what, spec.file, key="storage", hint="Give the new study another name.")])
    if chosen == "sqlite" and workers > 1:
        what = f"SQLite has one writer, so {workers} workers would wait for each other and fail"
        if begun:
            hint = f"The study in {folder} uses SQLite: continue with one worker, or give it another name."
        else:
            hint = "Use storage: journal for workers on one disk, or postgresql://... for a team."
        raise UserError([Problem(what, spec.file, key="storage", hint=hint)])
    return chosen


def address(folder: Path, chosen: str) -> str:
    """The storage's address for `optuna.load_study` and optuna-dashboard, without a password."""
    if chosen == "sqlite":
        return f"sqlite:///{folder / FILES['sqlite']}"
    return str(folder / FILES["journal"]) if chosen == "journal" else re.sub(r":[^:/@]*@", "@", _url(chosen))


def _url(chosen: str) -> str:
    """PostgreSQL's address for SQLAlchemy; versions before 2.1 use another driver unless it is named."""
    return chosen.replace("postgresql://", "postgresql+psycopg://", 1)


def failures() -> tuple[type[Exception], ...]:
    """The exceptions of a database that does not answer."""
    from sqlalchemy.exc import SQLAlchemyError

    return SQLAlchemyError, optuna.exceptions.StorageInternalError


@contextmanager
def reachable(chosen: str) -> Iterator[None]:
    """Turn the exceptions of a database that does not answer into a `UserError`."""
    try:
        yield
    except failures() as error:
        why = str(error.__cause__ or error).strip().splitlines()[0]
        what = f"{masked(chosen)}: {masked(why)}"
        hint = "Nothing is lost. When the database answers again, the same command continues."
        if "password" in why:
            hint = "Put the password into ~/.pgpass (chmod 600) as a line host:port:database:user:password."
        raise UserError([Problem(what, key="storage", hint=hint)], exit_code=1) from None


def connect(folder: Path, chosen: str) -> BaseStorage:
    """Open a storage, or create it; raises `UserError` if a server can't be reached."""
    if chosen == "journal":
        file = folder / FILES["journal"]
        return JournalStorage(JournalFileBackend(str(file), FileLocked(file)))
    url = f"sqlite:///{folder / FILES['sqlite']}" if chosen == "sqlite" else _url(chosen)
    limits = {} if chosen == "sqlite" else {"connect_timeout": _PATIENCE}
    try:
        with reachable(chosen):
            storage = RDBStorage(url, engine_kwargs={"pool_pre_ping": True, "connect_args": limits})
    except ImportError:
        hint = "Install it: pip install -e '.[team]'"
        raise UserError([Problem("PostgreSQL needs psycopg", key="storage", hint=hint)]) from None
    return optuna.storages.get_storage(storage)


@contextmanager
def owned(folder: Path, chosen: str) -> Iterator[None]:
    """Lock out other processes from an SQLite study while this one works on it."""
    if chosen != "sqlite":
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "study.db.lock", timeout=0):
            yield
    except Timeout:
        what = f"another process works on the study in {folder}, and SQLite has one writer"
        hint = "Several workers need storage: journal from the first trial."
        raise UserError([Problem(what, key="storage", hint=hint)]) from None


def open_study(
    spec: Study, folder: Path, chosen: str, data: Mapping[str, str] | None = None
) -> tuple[optuna.Study, BaseStorage]:
    """Open the study of a file in its storage, or create it there.

    `data`: the fingerprints of the splits, needed to run trials. Raises `UserError` if the study of that name
    has another base, space, objective, sampler or data, or has its runs in another folder.
    """
    seen = {split: data[split] for split in ("train", "valid")} if data else {}
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "study.lock"):
        runs = [folder / records.FILE, *folder.glob(f"*/{records.FILE}")]
        if not read_record(folder) and any(file.exists() for file in runs):
            what = f"{folder} has runs that do not belong to a study"
            raise UserError([Problem(what, spec.file, key="name", hint="Give the study another name.")])
        storage = connect(folder, chosen)  # under the lock: two processes can't both create the tables
        directions = ["maximize"] * len(spec.objective)
        study = optuna.create_study(
            storage=storage,
            study_name=spec.name,
            directions=directions,
            pruner=pruner(spec),
            load_if_exists=True,
        )
        record = read_record(folder)
        known = study.user_attrs
        if "runs" not in known:
            record = {"id": uuid.uuid4().hex, "storage": masked(chosen), "study": spec.name}
            write_json(folder / RECORD, record)
            study.set_user_attr("question", json.dumps(spec.question | {"data": seen}))
            study.set_user_attr("runs", record["id"])
        elif record.get("damaged"):  # the next trial writes the other fields again
            record = {"id": known["runs"], "storage": masked(chosen), "study": spec.name}
            write_json(folder / RECORD, record)
        elif known["runs"] != record.get("id"):
            what = f"the study {spec.name} in {masked(chosen)} has its runs in another folder"
            hint = "All workers of a study share one runs/. For a new study give another name."
            raise UserError([Problem(what, spec.file, key="storage", hint=hint)])
        elif parts := _differs(spec, json.loads(known["question"]), seen):
            what = f"the study {spec.name} started with another {', '.join(parts)}; trials can't be compared"
            raise UserError([Problem(what, spec.file, hint="Give the new study another name.")])
    return study, storage


def _differs(spec: Study, begun: dict[str, Any], data: Mapping[str, str]) -> list[str]:
    """The parts of a study's question that differ from those that the study started with.

    Compares only base keys that both have, because a newer harness adds keys.
    """
    now = json.loads(json.dumps(spec.question))
    parts = [key for key in ("objective", "sampler") if now[key] != begun[key]]
    spaces = now["space"] | begun["space"]
    parts += [f"{split} split" for split in data if data[split] != begun["data"].get(split, data[split])]
    parts += [f"space of {key}" for key in spaces if now["space"].get(key) != begun["space"].get(key)]
    both = [key for key in now["base"] if key in begun["base"]]
    return parts + [key for key in both if now["base"][key] != begun["base"][key]]


def sampler(spec: Study, slot: int) -> optuna.samplers.BaseSampler:
    """The sampler of trial `slot`; its random draws depend only on the seed and that number."""
    config = spec.config.sampler
    seed = int(np.random.SeedSequence([config.seed, slot]).generate_state(1)[0])
    if config.name != "tpe":
        return optuna.samplers.RandomSampler(seed=seed)
    conditional = any(parameter.how.when for parameter in spec.space)
    several = len(spec.objective) > 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            n_startup_trials=config.startup_trials,
            seed=seed,
            multivariate=not several,
            group=conditional and not several,
            constant_liar=True,
        )


def pruner(spec: Study) -> optuna.pruners.BasePruner:
    """The pruner of a study; it counts epochs over all stages."""
    config = spec.config.pruner
    if config.name == "median":
        return optuna.pruners.MedianPruner(config.startup_trials, config.warmup_epochs)
    if config.name == "hyperband":
        return optuna.pruners.HyperbandPruner(max(1, config.warmup_epochs), max(spec.epochs, 1))
    return optuna.pruners.NopPruner()


def run_file(folder: Path, number: int) -> Path | None:
    """The `run.json` of a trial in the study's folder; None if its run has not started or is gone."""
    return next(folder.glob(f"{trial_name(number)}-s*/{records.FILE}"), None)
