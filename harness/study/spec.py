"""A study file: its schema, and all checks before the first trial."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_core import ErrorDetails

from harness.config import experiment, former_stages
from harness.config.editions import EDITIONS
from harness.config.schema import PATH_NAME, Config, flat, keys
from harness.config.sections import Epochs, Section, Seed, whole
from harness.config.words import allowed
from harness.config.yamlfile import KeyPath, Place, no_file, parse, places_of
from harness.errors import Problem, UserError
from harness.steps import train
from harness.study.space import (
    FIXED,
    MOST_POINTS,
    Parameter,
    ParameterConfig,
    is_whole,
    name_of,
    ordered,
    points,
    several,
)

_TRAINED = (f"train.{key}" for key in train.INDIFFERENT)
INDIFFERENT = ("name", "variant", "device", "predict.batch_size", *_TRAINED)
"""Keys of the base that may change during a study."""
CONCEPT_SCORES = ("concept_f1", "concept_f1_secondary")
"""The scores of `task: concepts`, the primary one first."""
ADDRESS = re.compile(
    r"postgresql(\+psycopg)?://"
    r"([^\s/?@:]+(:[^\s/?@:]*)?@)?"  # user, password
    r"(\[[\da-fA-F:.]+\]|[^\s/?@:\[\]]*)(:\d+)?"  # host, port
    r"/[^\s/?@:]+(\?\S*)?"  # database, libpq's options
)


class SamplerConfig(Section):
    """How the parameters of a trial are chosen."""

    name: Literal["tpe", "random", "grid"] = "tpe"
    """tpe learns from earlier trials; random draws evenly; grid tries every combination once."""
    seed: Seed = 0
    """A trial draws by this seed and its own number, so random trials do not depend on the workers."""
    startup_trials: whole(1, 10**6) = 10
    """Number of random trials before tpe starts to learn."""


class PrunerConfig(Section):
    """When to end a trial early, by its validation scores; epochs count over all stages."""

    name: Literal["none", "median", "hyperband"] = "none"
    """median ends a trial below the median of earlier trials at that epoch; hyperband halves successively."""
    startup_trials: whole(0, 10**6) = 5
    """Number of trials that must end before median ends one early."""
    warmup_epochs: Epochs = 0
    """Number of first epochs in which median ends no trial; the fewest epochs that hyperband gives one."""


class StudyConfig(Section):
    """The keys of a study file."""

    base: str
    """The experiment file that every trial starts from; the path is relative to this file."""
    variant: str | None = None
    """The variant of the base; needed if it has several."""
    name: Annotated[str, PATH_NAME, Field(pattern=r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)*$")] | None = (
        None
    )
    """Folder under runs/ and MLflow experiment; by default `<name of the base>/<name of this file>`."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Changes to the base for all trials, such as fewer metrics."""
    space: dict[str, ParameterConfig]
    """The search space: keys of the experiment, such as `predict.num_beams`, and their values."""
    objective: tuple[str, ...] = ("bertscore",)
    """The validation score to maximise, after post-processing; several scores give a Pareto front.

    With `task: concepts` in the base it is concept_f1 by default.
    """
    half: Literal["tune"] | None = None
    """tune: the objective is the score on half of the validation images. The best trial is also reported on
    the held half, which no choice has seen. By default all images count."""
    sampler: SamplerConfig = SamplerConfig()
    pruner: PrunerConfig = PrunerConfig()
    storage: str | None = None
    """sqlite, journal or postgresql://...; by default sqlite for one worker and journal for more."""
    trials: whole(1, 10**6) = 20
    """Number of trials over all calls."""
    retries: whole(0, 1000) = 2
    """How often to repeat a trial whose process was killed."""

    @field_validator("objective", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("storage")
    @classmethod
    def _is_known(cls, value: str | None) -> str | None:
        # the message does not show the value: it may hold a password
        if value in (None, "sqlite", "journal"):
            return value
        if not ADDRESS.fullmatch(value):
            what = "give sqlite, journal or postgresql://user@host/database"
            raise ValueError(
                f"{what}; write @ : / ? in a password as %40 %3A %2F %3F, or put the password into ~/.pgpass"
            )
        if "password=" in value:
            raise ValueError("put the password before the @, or better into ~/.pgpass")
        return value


@dataclass(frozen=True)
class Study:
    """A checked study: `base` is the config of trial 0, read from `base_file` and overridden by `sets`."""

    file: Path
    config: StudyConfig
    name: str
    base_file: Path
    base: Config
    space: tuple[Parameter, ...]
    sets: tuple[str, ...] = ()

    @property
    def objective(self) -> tuple[str, ...]:
        """The names of the scores to maximise."""
        return _objective(self.config, self.base)

    @cached_property
    def grid(self) -> list[dict[str, Any]] | None:
        """All points except the base's for the grid sampler; None for other samplers."""
        if self.config.sampler.name != "grid" or self.points is None:
            return None
        return [point for point in self.points if name_of(point) != name_of(self.start)]

    @cached_property
    def points(self) -> list[dict[str, Any]] | None:
        """All points of the space, each tried once; None for an infinite space."""
        return points(self.space)

    @cached_property
    def start(self) -> dict[str, Any]:
        """The point of trial 0: the base's values of the searched keys."""
        values: dict[str, Any] = {}
        for parameter in self.space:
            if parameter.active(values):
                values[parameter.key] = experiment.value_at(self._base_values, parameter.path)
        return values

    def fixed(self, slot: int) -> dict[str, Any] | None:
        """The point of trial `slot` (retries not counted); None if a sampler draws it."""
        if slot == 0:
            return self.start
        return self.grid[slot - 1] if self.grid is not None else None

    @property
    def trials(self) -> int:
        """The number of trials, at most the number of points."""
        most = self.config.trials
        return most if self.points is None else min(most, len(self.points))

    @property
    def epochs(self) -> int:
        """The total number of epochs of all stages of the base."""
        return sum(stage.epochs for stage in self.base.train.stages)

    @cached_property
    def _base_values(self) -> dict[str, Any]:
        return self.base.model_dump(mode="json")

    def trial(self, number: int, values: Mapping[str, Any]) -> Config:
        """The config of a trial; raises `UserError` if the values are not valid together."""
        changed = self.base.model_dump(mode="json") | {"name": self.name, "variant": trial_name(number)}
        for key, value in values.items():
            experiment.set_value(changed, tuple(key.split(".")), value)
        try:
            return Config.model_validate(changed)
        except ValidationError as error:
            raise UserError(experiment.explain(error, {}, self.file), exit_code=1) from None

    @property
    def question(self) -> dict[str, Any]:
        """What must not change: else trials are not comparable, or a grid has another order."""
        base = {key: value for key, value in flat(self.base).items() if key not in INDIFFERENT}
        space = {p.key: p.how.model_dump(mode="json") for p in self.space}
        sampler = self.config.sampler.name
        return {"base": base, "space": space, "objective": list(self.objective), "sampler": sampler} | (
            {"half": self.config.half} if self.config.half else {}
        )


def trial_name(number: int) -> str:
    """The name of a trial, which is the variant of its run."""
    return f"trial-{number:04}"


def load(
    file: Path,
    sets: Sequence[str] = (),
    base: Path | None = None,
    variant: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Study:
    """Read and check a study file; `base`, `variant` and `options` override its keys.

    Raises `UserError` with all problems of the file, its base, the space and the options at once.
    """
    problems: list[Problem] = []
    node, values = _read(file, problems)
    places = dict(places_of(node, (), file))
    given = {key: value for key, value in (options or {}).items() if value is not None}
    if base is not None or variant is not None:
        given["variant"] = variant
    places |= {(key,): Place(f"--{key}") for key in given}
    try:
        config = StudyConfig.model_validate(values | given)
    except ValidationError as error:
        known = list(_known(values))
        raise UserError(problems + experiment.explain(error, places, file, known)) from None
    base_file = base or file.parent / config.base
    if what := no_file(base_file):
        raise UserError([*problems, experiment.problem_at(f"{what}: {base_file}", ("base",), places, file)])
    start = _base(config, base_file, sets, places, file)
    name = config.name or f"{start.name}/{file.stem}"
    space, found = _space(config, start, places, file)
    problems += found + _name_problems(name, start, places, file)
    problems += _objective_problems(config, start, places, file)
    if problems:
        raise UserError(problems)
    study = Study(file, config, name, base_file, start, space, tuple(sets))
    if problems := _start_problems(study, places):
        raise UserError(problems)
    return study


def _read(file: Path, problems: list[Problem]) -> tuple[Any, dict[str, Any]]:
    if what := no_file(file):
        near = sorted(map(str, file.parent.glob("study*.yaml"))) if file.parent.is_dir() else []
        hint = f"In that folder: {', '.join(near)}" if near else "Studies are in experiments/."
        raise UserError([Problem(what, file, hint=hint)])
    node, values = parse(file, problems)
    if not isinstance(values, dict):
        raise UserError([Problem("a study is a mapping of keys to values", file, 1)])
    if "data" in values and "space" not in values:
        hint = f"Run it: harness run {file}"
        raise UserError([Problem("this is an experiment, not a study", file, hint=hint)])
    return node, values


def _known(values: Mapping[str, Any]) -> list[KeyPath]:
    """All keys that this file may have."""
    space = values.get("space")
    searched = list(space) if isinstance(space, dict) else []
    return [
        *keys(StudyConfig),
        *(("space", key, *path) for key in searched for path in keys(ParameterConfig)),
    ]


def _base(
    config: StudyConfig, base_file: Path, sets: Sequence[str], places: Mapping[KeyPath, Place], file: Path
) -> Config:
    """The config that trials start from: one run of the base with the study's overrides."""
    amended = json.loads(json.dumps(config.overrides, default=str))
    where = {path[1:]: place for path, place in places.items() if path[0] == "overrides" and path[1:]}
    runs = experiment.load(base_file, [*sets, "predict.splits=[valid]"], (amended, where))
    variants = list(dict.fromkeys(run.variant for run in runs))
    wanted = config.variant
    if wanted is None and len(variants) > 1:
        what = f"{base_file} has variants: {', '.join(variants)}; choose one"
        raise UserError([experiment.problem_at(what, ("variant",), places, file)])
    if wanted is not None and wanted not in variants:
        what = f"got {wanted}; {base_file} has {', '.join(variants)}"
        raise UserError([experiment.problem_at(what, ("variant",), places, file)])
    runs = [run for run in runs if wanted in (None, run.variant)]
    if len({run.seed for run in runs}) > 1:
        seeds = ", ".join(str(run.seed) for run in runs)
        what = f"{base_file} has seeds: {seeds}; a study takes one, e.g. overrides: {{seed: {runs[0].seed}}}"
        raise UserError([experiment.problem_at(what, ("base",), places, file)])
    return runs[0]


def _space(
    config: StudyConfig, base: Config, places: Mapping[KeyPath, Place], file: Path
) -> tuple[tuple[Parameter, ...], list[Problem]]:
    """The parameters in the order of drawing, and all problems of the space."""
    problems: list[Problem] = []
    known = list(keys())
    space: list[Parameter] = []
    for key, how in config.space.items():
        path = tuple(key.split("."))
        if now := former_stages.renamed(path):
            shown = former_stages.in_one_line(how.model_dump(exclude_unset=True))
            what = f"train.stages is a list now; write {'.'.join(now)}: {shown}"
        elif tuple("0" if name.isdecimal() else name for name in path) not in known:
            what = "is not a key of an experiment." + experiment.did_you_mean(path)
        elif wrong := _no_entry(base, path):
            what = wrong
        elif any(key == fixed or key.startswith(f"{fixed}.") for fixed in FIXED):
            what = "can't be searched: it names or compares trials"
        elif wider := next((one for one in config.space if key.startswith(f"{one}.")), None):
            what = f"is part of {wider}, which is searched as a whole"
        elif how.choices is None and is_whole(key) is None:
            what = "is not a number; give choices"
        else:
            space.append(Parameter(key, _as_parsed(key, how, base), bool(is_whole(key))))
            continue
        problems.append(experiment.problem_at(what, ("space", key), places, file))
    for parameter in space:
        problems += _parameter_problems(parameter, config, space, base, places, file)
    size = math.prod(parameter.count for parameter in space)
    if config.sampler.name == "grid" and math.isfinite(size) and size > MOST_POINTS:
        what = f"a grid of {size:,} points; at most {MOST_POINTS:,} are allowed"
        problems.append(experiment.problem_at(what, ("space",), places, file))
    if problems:
        return (), problems
    try:
        return tuple(ordered(space)), []
    except ValueError as error:
        what = f"{error} depend on each other by their `when`"
        return (), [experiment.problem_at(what, ("space",), places, file)]


def _no_entry(base: Config, path: KeyPath) -> str | None:
    """The problem of a path through a list entry that the base does not have, or None."""
    try:
        experiment.set_value(base.model_dump(mode="json"), path, None)
    except UserError as error:
        return error.problems[0].what
    return None


def _as_parsed(key: str, how: ParameterConfig, base: Config) -> ParameterConfig:
    """Choices and conditions with the config's types; YAML reads 1e-2 as text, the config as a number."""

    def parsed(name: str, value: Any) -> Any:
        values, path = base.model_dump(mode="json"), tuple(name.split("."))
        try:
            experiment.set_value(values, path, value)
            return experiment.value_at(Config.model_validate(values).model_dump(mode="json"), path)
        except (ValidationError, UserError):  # reported later, with its place
            return value

    choices = None if how.choices is None else [parsed(key, choice) for choice in how.choices]
    when = {name: [parsed(name, one) for one in several(wanted)] for name, wanted in how.when.items()}
    return how.model_copy(update={"choices": choices, "when": when})


def _parameter_problems(
    parameter: Parameter,
    config: StudyConfig,
    space: Sequence[Parameter],
    base: Config,
    places: Mapping[KeyPath, Place],
    file: Path,
) -> list[Problem]:
    here = ("space", parameter.key)
    problems: list[tuple[str, KeyPath]] = []
    if config.sampler.name == "grid" and not parameter.listable:
        problems.append(("a grid needs choices, or a step without log", here))
    if parameter.whole and (parameter.how.step or 1) % 1:
        problems.append((f"got {parameter.how.step:g}; {parameter.key} takes whole numbers", (*here, "step")))
    values = base.model_dump(mode="json")
    for key, wanted in parameter.how.when.items():
        other = next((one for one in space if one.key == key), None)
        if other is None:
            problems.append((f"{key} is not in the space", (*here, "when", key)))
            continue
        never = [value for value in several(wanted) if not other.has(value)]
        problems += [(f"{key} is never {value!r}", (*here, "when", key)) for value in never]
        experiment.set_value(values, other.path, several(wanted)[0])
    found = [experiment.problem_at(what, path, places, file) for what, path in problems]
    for end, value in parameter.ends:
        changed = json.loads(json.dumps(values))
        experiment.set_value(changed, parameter.path, value)
        try:
            Config.model_validate(changed)
        except ValidationError as error:
            why = _because(error.errors()[0]).removeprefix(f"got {value}; ")
            what = f"{value!r} is not allowed: {why}"
            found.append(experiment.problem_at(what, (*here, end), places, file))
    return found


def _because(error: ErrorDetails) -> str:
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return f"{allowed(error, Config)} is allowed"


def _name_problems(name: str, base: Config, places: Mapping[KeyPath, Place], file: Path) -> list[Problem]:
    try:
        Config.model_validate(base.model_dump(mode="json") | {"name": name})
    except ValidationError as error:
        what = f"got {name}; {_because(error.errors()[0]).removeprefix('name: ')}"
        return [experiment.problem_at(what, ("name",), places, file)]
    return []


def _objective_problems(
    config: StudyConfig, base: Config, places: Mapping[KeyPath, Place], file: Path
) -> list[Problem]:
    scored = [*base.score.metrics, *EDITIONS[base.edition].aggregates] if base.captions else CONCEPT_SCORES
    objective, problems = _objective(config, base), []
    if base.full_fit:
        what = "the base learns from validation images (data.fit_on), so its trials have no scores"
        problems.append(experiment.problem_at(what, ("base",), places, file))
    for metric in objective:
        if metric not in scored:
            what = f"got {metric}; the base scores {', '.join(scored)}"
            problems.append(experiment.problem_at(what, ("objective",), places, file))
    if len(set(objective)) != len(objective) or not objective:
        problems.append(experiment.problem_at("name each score once", ("objective",), places, file))
    if len(objective) > 1 and config.pruner.name != "none":
        what = "a pruner can't rank trials with several objectives; use none"
        problems.append(experiment.problem_at(what, ("pruner", "name"), places, file))
    if config.half and config.pruner.name != "none":
        what = "a pruner judges by validations on both halves; with half: tune use none"
        problems.append(experiment.problem_at(what, ("pruner", "name"), places, file))
    return problems


def _objective(config: StudyConfig, base: Config) -> tuple[str, ...]:
    """The scores to maximise: those of the file, else the primary one of the base's task."""
    written = base.captions or "objective" in config.model_fields_set
    return config.objective if written else CONCEPT_SCORES[:1]


def _start_problems(study: Study, places: Mapping[KeyPath, Place]) -> list[Problem]:
    """Trial 0 is the base, so the base's values must be in the space."""
    problems = []
    for parameter in study.space:
        value = study.start.get(parameter.key)
        if parameter.key in study.start and not parameter.has(value):
            what = f"the base has {json.dumps(value)}, which is not in the space, and trial 0 is the base"
            hint = f"Widen the space, or put another {parameter.key} into overrides."
            problem = experiment.problem_at(what, ("space", parameter.key), places, study.file)
            problems.append(replace(problem, hint=hint))
    return problems
