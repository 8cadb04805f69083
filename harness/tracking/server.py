"""Brings one run up to date on one tracking server, whatever the server had before."""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from harness import records
from harness.records.status import failure_of, status_of
from harness.store import bytes_of, fingerprint
from harness.tracking.bookkeeping import NAMES, State, mark
from harness.tracking.contents import (
    artifacts,
    curves_of,
    cut,
    datasets,
    milliseconds,
    rows,
    scores_of,
    study_scores,
    study_tags,
    summary,
    tags_of,
    view,
)
from harness.tracking.stores import artifacts_of, database_of, opened, set_environment, tracking_uri

_NAMES, _NOTE, _VIEW = "harness.names", "mlflow.note.content", "mlflow.sharedViewState.harness"
_PARENT = "experiment"
"""The name from which the token of a parent run is made, which earlier versions also called it."""
STUDY = "study.json"
_GONE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
_LONGEST_PARAMETER, _LONGEST_TAG = 6000, 5000  # characters that MLflow keeps
_BATCH = {"metrics": 1000, "params": 100, "tags": 100}
_IN_MLFLOW = {"PRUNED": "FINISHED"}
"""MLflow has no status for a run that a study ended early; the tag trial/state says so."""


class Mirror:
    """Brings one run up to date on one server."""

    def __init__(self, directory: Path, record: dict[str, Any], owner: int | None, state: State) -> None:
        set_environment({})
        self.client = opened(tracking_uri())
        self.directory, self.record, self.owner, self.state = directory, record, owner, state
        self.root = records.root(directory, record)
        self.replaced: dict[str, str] | None = None
        self.entry = state.runs.setdefault(directory.name, {})
        self._take_up(fingerprint(record["parameters"]), record["steps"].get("train"))

    def _take_up(self, parameters: str, training: str | None) -> None:
        """Note what the run is of. MLflow's parameters can't change, so with others it is another run."""
        entry = self.entry
        if entry.get("parameters", parameters) != parameters:
            earlier = [*entry.get("earlier", ()), [entry.get("run_id"), entry.get("training")]]
            entry.clear()
            entry["earlier"] = [one for one in earlier if all(one)]
        entry |= {"parameters": parameters, "training": training}

    def bring_up_to_date(self) -> None:
        experiment = _experiment(self.client, self.record["name"])
        self.state.parent["experiment"] = experiment
        parent = self._run(experiment, self.state.parent, _PARENT, {"edition": self.record["edition"]})
        run = self._run(experiment, self.entry, self.directory.name, {"mlflow.parentRunId": parent})
        status = status_of(self.record, self.owner)
        if self.entry.get("status") != status:
            self.client.update_run(run, status="RUNNING")
        self._describe(run, status)
        self._points(run)
        for key, path in artifacts(self.record, self.root, self.directory):
            self._artifact(run, self.entry, key, path)
        if status != "RUNNING":
            ended = milliseconds(self.record["ended"]) or int(time.time() * 1000)
            self.client.set_terminated(run, _IN_MLFLOW.get(status, status), ended)
        if status == "FINISHED":
            self._drop_earlier(run)
        self.entry["status"] = status
        self.entry["mirrored"] = mark(self.record)
        self._study(parent)
        self._archived()
        self._describe_parent(experiment, parent)
        self._close_parent(parent)
        self.state.save()

    def _drop_earlier(self, run: str) -> None:
        """Delete earlier runs of the same training, since this run has all that they have.

        MLflow keeps them among its deleted runs.
        """
        for earlier, training in self.entry.pop("earlier", ()):
            found = self._found(earlier) if training == self.entry["training"] else None
            if found is None or found.info.lifecycle_stage != "active":
                continue
            if note := found.data.tags.get(_NOTE):
                self.client.set_tag(run, _NOTE, note)
            self.client.delete_run(earlier)

    def _study(self, parent: str) -> None:
        """Write the results of a study to the parent run: counts, best trials, plots."""
        from mlflow.entities import Metric, RunTag

        folder = self.directory.parent
        study = read_study(folder)
        if study is None or "objective" not in study:
            return
        for key, path in study.get("artifacts", {}).items():
            if (folder / path).is_file():
                self._artifact(parent, self.state.parent, key, folder / path)
        known, scores = self.state.parent.setdefault("scores", {}), study_scores(study)
        new = [(key, value) for key, value in scores.items() if known.get(key) != value]
        when, step = (
            milliseconds(self.record["ended"] or self.record["started"]),
            sum(study["trials"].values()),
        )
        self._batches(parent, "metrics", [Metric(key, value, when, step) for key, value in new])
        tags = study_tags(study).items()
        self._batches(parent, "tags", [RunTag(key, cut(value, _LONGEST_TAG)) for key, value in tags])
        known.update(scores)
        self.state.parent["study"] = fingerprint(study)

    def _archived(self) -> None:
        """Give runs that others replaced the names of their folders, so that no two runs share a name."""
        for name, entry in self.state.runs.items():
            if name.startswith(f"{records.ARCHIVE}/") and "run_id" in entry and not entry.get("archived"):
                if self._exists(entry):
                    self.client.update_run(entry["run_id"], name=name)
                    self.client.set_tag(entry["run_id"], records.ARCHIVE, "true")
                entry["archived"] = True

    def _describe_parent(self, experiment: str, parent: str) -> None:
        """Name the parent run after its experiment and describe it by the scores of all runs.

        A description that someone has edited in MLflow stays. The view has columns for the main scores.
        """
        needs = ("scores", "parameters")
        found, _ = records.read_all(sorted(self.directory.parent.glob(f"*/{records.FILE}")), needs)
        every = [record for _, record in found]
        known, columns = [self.record["name"], summary(every, _LONGEST_TAG)], view(every)
        if self.state.parent.get("described") != known:
            self.client.update_run(parent, name=known[0])
            tags, before = self.client.get_run(parent).data.tags, self.state.parent.get("described")
            ours = (fingerprint(before[1]) if before else None, tags.get("harness.note"))
            if not tags.get(_NOTE) or fingerprint(tags[_NOTE]) in ours:
                self.client.set_tag(parent, "harness.note", fingerprint(known[1]))
                self.client.set_tag(parent, _NOTE, known[1])
            self.state.parent["described"] = known
        if self.state.parent.get("view") != columns:
            self.client.set_experiment_tag(experiment, _VIEW, columns)
            self.state.parent["view"] = columns

    def _close_parent(self, parent: str) -> None:
        status = _of_all(self.directory.parent, self.owner)
        if status == "RUNNING":
            self.client.update_run(parent, status)
        else:
            self.client.set_terminated(parent, status, milliseconds(self.record["ended"]))

    def _run(self, experiment: str, entry: dict[str, Any], name: str, tags: Mapping[str, Any]) -> str:
        """The run's id on the server; creates the run if it is not there."""
        if "run_id" in entry and not self._exists(entry):
            kept = {key: entry[key] for key in ("parameters", "training", "earlier") if key in entry}
            entry.clear()
            entry.update(kept)
        if "run_id" not in entry:
            # The token is saved before `_create`. If this process is killed in between, or if the bookkeeping
            # is lost, the next call finds the run by its token.
            entry.setdefault("token", self._token(name, entry))
            self.state.save()
            found = self._search(experiment, entry)
            if found is None and self.state.found_again:
                found = self._alike(experiment, entry, name)
            entry["run_id"] = found or self._create(experiment, entry["token"], name, tags)
            self.state.save()
        return entry["run_id"]

    def _token(self, name: str, entry: Mapping[str, Any]) -> str:
        """A name that only a run of this folder and configuration has."""
        place = [self.record.get("host"), str(self.directory.parent), name, entry.get("parameters")]
        place += sorted(one.name for one in self.directory.parent.glob(f"{records.ARCHIVE}/{name}-*"))
        return hashlib.sha256(json.dumps(place).encode()).hexdigest()[:32]

    def _exists(self, entry: Mapping[str, Any]) -> bool:
        """Whether the server has the run, with the token of the bookkeeping."""
        if (run := self._found(entry["run_id"])) is None:
            return False
        token = run.data.tags.get("harness.token")
        known = run.info.lifecycle_stage == "active" and token == entry.get("token", token)
        return known and self._has_our_names(run, entry)

    def _found(self, run: str) -> Any:
        """The run on the server, active or deleted; None if it is not there."""
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_run(run)
        except MlflowException as error:
            if error.error_code in _GONE:
                return None
            raise

    def _has_our_names(self, run: Any, entry: Mapping[str, Any]) -> bool:
        """Whether the metrics of a run have the present names; deletes a run of earlier versions."""
        if entry is self.state.parent or run.data.tags.get(_NAMES) == NAMES:
            return True
        self.replaced = {key: run.data.tags[key] for key in (_NOTE,) if key in run.data.tags}
        self.client.delete_run(run.info.run_id)  # MLflow keeps it among the deleted runs
        return False

    def _search(self, experiment: str, entry: Mapping[str, Any]) -> str | None:
        wanted = f"tags.`harness.token` = '{entry['token']}'"
        found = self.client.search_runs([experiment], wanted, max_results=1)
        return found[0].info.run_id if found and self._has_our_names(found[0], entry) else None

    def _alike(self, experiment: str, entry: dict[str, Any], name: str) -> str | None:
        """The newest run of this name with these parameters; earlier versions gave runs a random token."""
        given = {key: cut(value, _LONGEST_PARAMETER) for key, value in self.record["parameters"].items()}
        ours = given if entry is not self.state.parent else {}
        for named in {name, self.record["name"]} if entry is self.state.parent else {name}:
            wanted = f"attributes.run_name = '{named}'"
            for run in self.client.search_runs([experiment], wanted, max_results=100):
                token = run.data.tags.get("harness.token")
                # one with earlier names may be a teammate's, so it is neither taken nor deleted
                known = entry is self.state.parent or run.data.tags.get(_NAMES) == NAMES
                if token and known and run.data.params.items() <= ours.items():
                    entry["token"] = token
                    return run.info.run_id
        return None

    def _create(self, experiment: str, token: str, name: str, tags: Mapping[str, Any]) -> str:
        created = self.client.create_run(
            experiment,
            start_time=milliseconds(self.record["started"]),
            run_name=name,
            tags={
                "harness.token": token,
                _NAMES: NAMES,
                **(self.replaced or {}),
                **{key: str(value) for key, value in tags.items()},
            },
        )
        return created.info.run_id

    def _describe(self, run: str, status: str) -> None:
        """Write parameters, tags, data sets and scores, if the record has changed."""
        from mlflow.entities import Metric, Param, RunTag

        described = fingerprint({**self.record, "status": status})
        if self.entry.get("described") == described:
            return
        values, tags = self.record["parameters"].items(), self._tags(run).items()
        known = self.entry.setdefault("scores", {})
        scores = {key: value for key, value in scores_of(self.record).items() if known.get(key) != value}
        # The time of the record and not of this call, so that a repeated call adds no second point.
        when = milliseconds(self.record["ended"] or self.record["started"])
        self._batches(run, "params", [Param(key, cut(value, _LONGEST_PARAMETER)) for key, value in values])
        self._batches(run, "tags", [RunTag(key, cut(value, _LONGEST_TAG)) for key, value in tags])
        self._batches(run, "metrics", [Metric(key, value, when, 0) for key, value in scores.items()])
        self.client.log_inputs(run, datasets(self.record))
        known.update(scores)
        self.entry["described"] = described
        self.state.save()

    def _tags(self, run: str) -> dict[str, Any]:
        """The present tags of the run; deletes the failure of an earlier attempt on the server."""
        failure = failure_of(self.record, self.owner) or {}
        failures = {f"failure/{key}": value for key, value in failure.items() if value is not None}
        for key in self.client.get_run(run).data.tags:
            if key.startswith("failure/") and key not in failures:
                self.client.delete_tag(run, key)
        return tags_of(self.record) | failures

    def _batches(
        self, run: str, kind: str, items: list[Any], after: Callable[[list[Any]], None] | None = None
    ) -> None:
        for i in range(0, len(items), _BATCH[kind]):
            batch = items[i : i + _BATCH[kind]]
            self.client.log_batch(run, **{kind: batch})
            if after:
                after(batch)

    def _points(self, run: str) -> None:
        """Write the rows of the training step that are not on the server yet.

        Rows are found by step and not by line: after a crash, training drops the rows after its last
        checkpoint and writes them again.
        """
        from mlflow.entities import Metric

        last = self.entry.setdefault("last_steps", {})

        def remember(batch: list[Any]) -> None:
            last.update({point.key: point.step for point in batch})
            self.state.save()

        new = [
            Metric(key, value, int(row["time"] * 1000), row["step"])
            for row in rows(self.record, self.root)
            for key, value in curves_of(row).items()
            if row["step"] > last.get(key, -1)
        ]
        self._batches(run, "metrics", new, remember)

    def _artifact(self, run: str, entry: dict[str, Any], key: str, path: Path) -> None:
        """Upload a file under its key, unless the server has this version."""
        known = entry.setdefault("artifacts", {})
        stamp = f"{path.stat().st_size} {path.stat().st_mtime_ns}"
        if known.get(key) == stamp:
            return
        folder, name = os.path.split(key)
        with tempfile.TemporaryDirectory() as temporary:
            named = path if path.name == name else Path(temporary, name)
            if named != path:
                named.write_bytes(path.read_bytes())
            self.client.log_artifact(run, str(named), folder or None)
        known[key] = stamp
        self.state.save()


def _experiment(client: Any, name: str) -> str:
    """The id of the MLflow experiment of that name; creates or restores it if needed."""
    found = client.get_experiment_by_name(name)
    if found is None:
        database = database_of(tracking_uri())
        # MLflow's own server puts artifacts there; its client alone would use mlruns/.
        place = artifacts_of(database, name) if database else None
        return client.create_experiment(name, artifact_location=place)
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return found.experiment_id


def read_study(experiment_directory: Path) -> dict[str, Any] | None:
    """The record of a study; None if the experiment is not a study."""
    try:
        study = json.loads(bytes_of(experiment_directory / STUDY))
    except (OSError, ValueError, RecursionError):  # absent or damaged: the next trial writes it again
        return None
    whole = isinstance(study, dict) and all(isinstance(study.get(key), str) for key in ("study", "storage"))
    return study if whole else None


def _of_all(experiment_directory: Path, owner: int | None) -> str:
    """The status of an experiment is that of its least finished run; a study may end with failed trials."""
    found_records, _ = records.read_all(experiment_directory.glob(f"*/{records.FILE}"))
    found = {status_of(record, owner) for _, record in found_records}
    study = read_study(experiment_directory)
    if study is not None and "RUNNING" not in found:
        return "FINISHED" if study.get("ended") else "KILLED"
    return next(status for status in ("RUNNING", "KILLED", "FAILED", "FINISHED", "PRUNED") if status in found)
