"""Scores any captions, matched with references by id; `compare` tests differences of scores."""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from harness import metrics, records
from harness.config.editions import EDITIONS
from harness.config.experiment import Place, explain, parse_sets, set_value
from harness.config.schema import Config
from harness.config.sections import Section
from harness.data import folders
from harness.data.captionfiles import (
    CaptionFile,
    few,
    holds_concepts,
    passes_for_header,
    read,
    read_otherwise,
    with_ids,
)
from harness.data.forms import CONCEPTS, Task, bare, plural
from harness.errors import Flaw, Problem, UserError, grouped
from harness.machine import device, ranks
from harness.metrics import Score
from harness.metrics.base import STANDIN
from harness.metrics.settings import ScoreConfig
from harness.models import checkpoints
from harness.records import artifact as run_artifact
from harness.records import read as run_record
from harness.records import root as run_root
from harness.records.files import sameness
from harness.scoring import verify
from harness.store import RUNS, bytes_of, damage, is_done

Run = tuple[Path, Mapping[str, Any]]
"""A run's folder and its `run.json`."""


@dataclass(frozen=True)
class Rows:
    """Captions to score, in the order of the references: `predictions[i]` for `ids[i]`.

    `images` are the files of the rows, or None. `inputs` say how each file was read, `warnings` what was cut
    or ignored in it.
    """

    ids: list[str]
    predictions: list[str]
    references: list[str]
    images: list[Path] | None
    inputs: list[str]
    warnings: list[str]


def find_run(path: Path) -> Run | None:
    """The run in a folder; None if the path is no folder. Raises `UserError` for a folder without a run."""
    return (path, run_record(path)) if path.is_dir() else None


def rows(
    predictions: Path, references: Path | None, images: Path | None = None, task: Task = "caption"
) -> Rows:
    """Match predictions (a file or a run's folder) with references by id; a run has its own references.

    For the task `concept` both hold lists `C1;C2` instead of captions. `images` is a folder with `{ID}.jpg`,
    `.jpeg` or `.png`, in it or one folder deeper. Raises `UserError` with the problems of all inputs at once.
    """
    problems: list[Problem] = []
    files = []
    for load in (
        lambda: _predictions(predictions, task),
        lambda: _references(references, predictions, task),
    ):
        try:
            files.append(load())
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(list(dict.fromkeys(problems)))
    predicted, known = _same_ids(*files)
    problems = [*_misplaced(predicted, task), *_misplaced(known, task)] or _mismatches(predicted, known)
    found = {}
    if images is not None:
        found, more = images_of(images, known)
        problems += more
    if problems:
        raise UserError(problems)
    return Rows(
        list(known.values),
        [predicted.values[key] for key in known.values],
        list(known.values.values()),
        [found[key] for key in known.values] if images is not None else None,
        [file.described(plural(task)) for file in (predicted, known)],
        [
            *(warning for file in (predicted, known) for warning in _warnings(file, known)),
            *_of_predictions(predicted, task),
        ],
    )


def _same_ids(predicted: CaptionFile, known: CaptionFile) -> tuple[CaptionFile, CaptionFile]:
    """Both files; one of COCO results gets the ids of the other one."""
    predicted = with_ids(predicted, known.values, known.images)
    return predicted, with_ids(known, predicted.values, predicted.images)


def _of_predictions(file: CaptionFile, task: Task) -> Iterator[str]:
    """Warnings if the organisers would read the file differently, or if most captions are the same."""
    yield from (f"{file.path.name}: {what}" for what in read_otherwise(file))
    if same := sameness(file.values.values(), plural(task)):
        yield f"{file.path.name}: {same}"


def _predictions(path: Path, task: Task) -> CaptionFile:
    run = find_run(path)
    return read(run_artifact(*run, records.FINAL[task].format(split="valid")) if run else path)


def _references(path: Path | None, predictions: Path, task: Task) -> CaptionFile:
    if path is not None:
        return read(path)
    run = find_run(predictions)
    if run is None:
        raise UserError([Problem("is needed, unless a run's folder is scored", key="--references")])
    table = run_artifact(*run, records.PER_IMAGE[task].format(split="valid"))
    values = {key: row["reference"] for key, row in records.per_image(table, run[1]).items()}
    return CaptionFile(table, ",", "references of the run's validation split", values, {})


def _misplaced(file: CaptionFile, task: Task) -> list[Problem]:
    """Captions where concepts are expected, or a file of concepts where captions are expected."""
    if task == "concept":
        others = [key for key, value in file.values.items() if value and not CONCEPTS.fullmatch(value)]
        hint = "Concepts are written C0040405;C0817096."
        return grouped(
            file.path, [Flaw(file.lines.get(k), "not a list of concepts", hint, k) for k in others]
        )
    return holds_concepts(file)


def _mismatches(predicted: CaptionFile, known: CaptionFile) -> list[Problem]:
    """Ids that are in one file only."""
    missing = [key for key in known.values if key not in predicted.values]
    superfluous = [
        key
        for key in predicted.values
        if key not in known.values and not passes_for_header(key, predicted.separator)
    ]
    hint = None
    if len(missing) == len(known.values):
        hint = "No id is in both files: are they of the same split?"
    absent = f"no prediction in {predicted.path.name}"
    unknown = f"not among the references in {known.path.name}"
    return [
        *grouped(known.path, [Flaw(known.lines.get(key), absent, hint, key) for key in missing]),
        *grouped(
            predicted.path,
            [Flaw(predicted.lines.get(k), unknown, hint or _hint(k, known), k) for k in superfluous],
        ),
    ]


def _hint(key: str, known: CaptionFile) -> str | None:
    if bare(key) in known.values:
        return "Leave out the ending."
    return "The first column of a header is called ID." if "id" in key.lower() else None


def _warnings(file: CaptionFile, known: CaptionFile) -> Iterator[str]:
    name = file.path.name
    yield from (f"{name}: {warning}" for warning in file.warnings)
    if file.cut:
        yield f"{name}: {few(file.cut)} cut at a pipe, as the organisers' loader does"
    ignored = [key for key in file.values if passes_for_header(key, file.separator)]
    if passed := [key for key in ignored if key not in known.values]:
        yield f'{name}: {few(passed)} passed over: the organisers\' loader ignores ids that hold "ID"'
    if kept := [key for key in ignored if key in known.values]:
        what = 'scored; the organisers\' loader would ignore ids that hold "ID", and refuse the file'
        yield f"{name}: {few(kept)} {what}"


def images_of(folder: Path, known: CaptionFile) -> tuple[dict[str, Path], list[Problem]]:
    """The image of each id, in the folder or one folder deeper, and what is wrong with ids without one."""
    if not folder.is_dir():
        return {}, [Problem("no such folder", folder, key="--images")]
    below = sorted(path for path in folder.iterdir() if path.is_dir())
    found = folders.scan([folder, *below], folder)
    if found is None:
        looked = f"looked for {', '.join(folders.IMAGE_SUFFIXES)} in it and one folder deeper"
        return {}, [Problem(f"no images: {looked}", folder, key="--images")]
    rivals = found.ambiguous(known.values)
    hint = f"Looked for ID{', ID'.join(folders.IMAGE_SUFFIXES)}."
    flaws = [
        Flaw(known.lines.get(key), f"no image in {folder}", hint, f"{key} ({instead})" if instead else key)
        for key in known.values
        if key not in found.files and key not in found.rivals
        for instead in [found.instead(key)]
    ]
    problems = [Problem(rivals, folder, hint=folders.KEEP_ONE)] if rivals else []
    return {key: file.path for key, file in found.files.items()}, [*problems, *grouped(known.path, flaws)]


def settings(
    edition: int,
    names: Sequence[str] | None = None,
    standins: bool = False,
    sets: Sequence[str] = (),
    run: Run | None = None,
) -> ScoreConfig:
    """The `score:` section: defaults of the edition or the run, then `names` of metrics, then `--set` values.

    With `standins`, a stand-in replaces an edition's checkpoint that is not on this machine: the MiniLM
    encoder for bertscore; for the others the run's own stand-in, or the newest one of any run. Raises
    `UserError` with every unknown key and every value that is not allowed.
    """
    values = of_run(run, edition) if run else {}
    if names is not None:
        values["metrics"] = list(names)
    config = _overridden(values, sets, run, _unknown_metrics(names or ())).for_edition(edition)
    if standins:
        config = _with_standins(config, ScoreConfig().for_edition(edition))
    return _located(config, run).for_edition(edition)


def of_run(run: Run, edition: int) -> dict[str, Any]:
    """The run's own `score:` section, without what its edition decided if another edition is asked for.

    Sections that scoring would execute are left out, since a run's folder may come from elsewhere.
    """
    values = copy.deepcopy(run[1]["config"].get("score", {}))
    for key in (*_executed(), "trusted"):
        values.pop(key, None)
    if run[1]["edition"] != edition:
        values.pop("metrics", None)
        for section in EDITIONS[edition].weights:
            named = values.get(section)
            if isinstance(named, dict) and named.get(metrics.all_weights()[section].key) != STANDIN:
                del values[section]
    return values


def passed_over(run: Run | None, config: ScoreConfig) -> Iterator[str]:
    """What scoring does not use from a run's `run.json` (programs, sums of weights), and how to set it."""
    named = run[1]["config"].get("score", {}) if run else {}
    for section in _executed():
        section_named = named.get(section)
        values = section_named if isinstance(section_named, dict) else {}
        given = {key: value for key, value in values.items() if value is not None}
        if given and getattr(config, section) == getattr(ScoreConfig(), section):
            sets = " ".join(f"--set score.{section}.{key}={value}" for key, value in given.items())
            what = f"score.{section} of {run[0] / records.FILE} would be executed and is left out"
            yield f"{what}. To use it: {sets}"
    trusted = named.get("trusted")
    if isinstance(trusted, list) and trusted and not config.trusted:
        sums = ",".join(map(str, trusted))
        what = f"score.trusted of {run[0] / records.FILE} is left out: the folder may come from elsewhere"
        yield f"{what}. If you know these sums: --set 'score.trusted=[{sums}]'"


def _executed() -> list[str]:
    """The sections of `score:` that name a program, or files that contain programs."""
    return [section for section, weights in metrics.all_weights().items() if weights.executes]


class _Only(Section):
    score: ScoreConfig = ScoreConfig()


def _unknown_metrics(names: Sequence[str]) -> list[Problem]:
    known = metrics.METRICS
    return [
        Problem(f"got {name!r}; allowed are {', '.join(known)}", key="--metrics")
        for name in names
        if name not in known
    ]


def _overridden(
    values: dict[str, Any], sets: Sequence[str], run: Run | None, problems: list[Problem]
) -> ScoreConfig:
    """The section with `--set` values applied. Raises `UserError` with these `problems` and all new ones."""
    merged: dict[str, Any] = {"score": values if not problems else {}}
    overrides, more = parse_sets(sets)
    problems = [*problems, *more]
    places = {}
    for path, value in overrides:
        if path[0] != "score" and path[0] in Config.model_fields:
            problems.append(Problem("only keys of score are set here", key=f"--set {'.'.join(path)}"))
            continue
        try:
            set_value(merged, path, value)
        except UserError as error:
            problems += error.problems
        places |= {path[: n + 1]: Place(f"--set {'.'.join(path)}") for n in range(len(path))}
    try:
        config = _Only.model_validate(merged).score
    except ValidationError as error:
        problems += explain(error, places, run[0] / records.FILE if run else "--set")
    if problems:
        raise UserError(problems)
    return config


def _with_standins(config: ScoreConfig, official: ScoreConfig) -> ScoreConfig:
    for weights in metrics.weights_of(config).values():
        default = weights.settings(config) == weights.settings(official)
        name = weights.named(config)
        if weights.standin and default and (name is None or checkpoints.find(name) is None):
            config = weights.renamed(config, STANDIN)
    return config


def _located(config: ScoreConfig, run: Run | None) -> ScoreConfig:
    """The config with folders of stand-ins from runs; if there is none, the edition's checkpoint is used."""
    for name, weights in metrics.all_weights().items():
        if weights.is_trained_here(config):
            folder = _standin(name, run)
            if run and folder and folder.is_dir() and name in metrics.weights_of(config):
                records.check_step(folder, run[1])
            config = weights.renamed(config, str(folder) if folder else weights.named(ScoreConfig()))
    return config


def _standin(metric: str, run: Run | None) -> Path | None:
    if run and (step := run[1].get("steps", {}).get(f"standin-{metric}")):
        return run_root(*run) / step
    made = [f for f in (RUNS / "steps").glob("standin-*") if is_done(f) and _made_for(f) == metric]
    made = [folder for folder in made if not damage(folder)]
    return max(made, key=lambda folder: (folder / "DONE").stat().st_mtime_ns, default=None)


def _made_for(folder: Path) -> str | None:
    """The metric of a stand-in; None if it can't be read."""
    try:
        return json.loads(bytes_of(folder / "inputs.json"))["facts"]["metric"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def score(
    scored: Rows, config: ScoreConfig, edition: int, wanted_device: str = "auto"
) -> tuple[dict[str, Score], list[str]]:
    """Score the rows; returns the scores by metric, and warnings about rows and scores.

    In a launch with several ranks, all ranks must call this. They share the neural work, and only rank 0 gets
    the result.
    """
    torch_device = _torch_device(wanted_device)
    if device.world_size() > 1:
        ranks.start()
    scores, warnings = metrics.score(
        scored.predictions,
        scored.references,
        scored.images,
        config,
        edition,
        torch_device,
        RUNS / "cache",
        ids=scored.ids,
    )
    if device.world_size() > 1:
        ranks.stop()
    return scores, [*scored.warnings, *warnings]


def score_concepts(
    scored: Rows, manual: Rows | None, edition: int, bootstrap: int
) -> tuple[dict[str, Score], list[str]]:
    """Score rows of concepts; `manual` are the same predictions with the manually validated references.

    Returns the scores, and warnings about the rows.
    """
    scores = metrics.score_concepts(*_concepts(scored, manual), edition, bootstrap)
    return scores, [*scored.warnings, *_too_many(scored, EDITIONS[edition].max_cuis)]


def _concepts(
    scored: Rows, manual: Rows | None
) -> tuple[list[set[str]], list[set[str]], list[set[str]] | None]:
    """Predicted, reference and (if any) manually validated concepts, row by row."""

    def sets(values: Sequence[str]) -> list[set[str]]:
        return [set(filter(None, map(str.strip, value.split(";")))) for value in values]

    validated = None
    if manual is not None:
        by_id = dict(zip(manual.ids, manual.references, strict=True))
        validated = sets([by_id[key] for key in scored.ids])
    return sets(scored.predictions), sets(scored.references), validated


def verified(
    scored: Rows,
    config: ScoreConfig,
    edition: int,
    scores: Mapping[str, Score],
    rows: int,
    wanted_device: str,
) -> dict[str, verify.Verified]:
    """The scores compared with the original packages', one pair at a time, on some rows; see `verify`."""
    inputs = metrics.Inputs(
        scored.predictions,
        scored.references,
        scored.images,
        config.for_edition(edition),
        edition,
        _torch_device(wanted_device),
    )
    return verify.captions(inputs, scores, rows)


def verified_concepts(
    scored: Rows, manual: Rows | None, edition: int, scores: Mapping[str, Score], rows: int
) -> dict[str, verify.Verified]:
    """As `verified`, for scores of concepts."""
    return verify.concept_lists(*_concepts(scored, manual), scores, edition, rows)


def _too_many(scored: Rows, allowed: int | None) -> Iterator[str]:
    """A warning about the images with more concepts than the organisers' evaluator allows."""
    rows = zip(scored.ids, scored.predictions, strict=True)
    keys = [key for key, value in rows if allowed and value.count(";") >= allowed]
    if keys:
        named = ", ".join(keys[:5]) + (", ..." if len(keys) > 5 else "")
        rows_hold = "row holds" if len(keys) == 1 else "rows hold"
        what = f"{len(keys):,} {rows_hold} more than {allowed} concepts ({named})"
        yield f"{what}; the organisers' evaluator refuses such a file"


def _torch_device(wanted: str) -> str:
    """The torch device; a CPU is found without importing torch."""
    kind = device.probe(wanted).kind
    return device.scoring_device(kind)
