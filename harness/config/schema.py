"""The schema of an experiment: the sections of all packages, and every key by its path."""

import json
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, Field, create_model, model_validator

from harness.config.editions import DEFAULT, EDITIONS
from harness.config.sections import AUTO, DataConfig, Section, Seed, summary
from harness.errors import AcrossKeys
from harness.models.settings import TINY, ModelConfig
from harness.records import ARCHIVE
from harness.steps import STEPS
from harness.steps.detect import has_thresholds, voted
from harness.store import run_name

NAME = "name of letters, digits, `_`, `.` and `-` that begins with a letter or a digit"
PATH_NAME = "one or more names, joined by `/`, of letters, digits, `_`, `.` and `-`"


# In three classes, since keys are listed class by class.
class _Run(Section):
    name: Annotated[
        str, PATH_NAME, Field(pattern=r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)*$", max_length=200)
    ]
    """The experiment's name: its MLflow experiment and its folder under runs/ and submissions/."""
    variant: Annotated[str, NAME, Field(pattern=r"^[A-Za-z0-9][\w.-]*$", max_length=100)] = "base"
    """Name of the variant. A file sets it by `variants:`."""
    seed: Seed = 42
    """Seed of the run. A file gives several runs by `seeds:`."""
    task: Literal["captions", "concepts"] = "captions"
    """What is predicted, scored and submitted. concepts: the CUIs of each image, as `concepts` says.

    A caption experiment with the section `concepts` does both. With `task: concepts` there are no captions:
    of `predict` only `splits` counts, and of `score` only `bootstrap`.
    """
    edition: Literal[*EDITIONS] = DEFAULT
    """The ImageCLEFmedical Caption edition whose metrics and files apply."""
    device: Literal["auto", "npu", "cuda", "cpu"] = "auto"
    """auto: the first of NPU, CUDA and CPU that works."""
    data: DataConfig
    """Where the images, captions and concepts are."""
    model: ModelConfig = ModelConfig()
    """The captioner, or an image encoder with a classifier of concepts."""


def _section(annotation: Any) -> Any:
    """The section of an annotation such as `Section | None`."""
    return next(iter(get_args(annotation)), annotation)


_Steps = create_model(
    "_Steps",
    __base__=_Run,
    **{
        name: (kind, Field(default, description=summary(_section(kind))))
        for name, kind, default in (step.section for step in STEPS if step.section)
    },
)


class Config(_Steps):
    """One run: an experiment file after base, variant, seed and --set."""

    @model_validator(mode="wrap")
    @classmethod
    def _for_its_edition(cls, values: Any, validate: Callable[[Any], "Config"]) -> "Config":
        config = validate(values)
        return config.model_copy(update={"score": config.score.for_edition(config.edition)})

    @model_validator(mode="after")
    def _cross_checks(self) -> "Config":
        if self.name.split("/")[0] in ("steps", "cache", "data"):
            what = f"name: {self.name.split('/')[0]!r} is a folder of the harness itself under runs/"
            raise AcrossKeys(what, "name")
        if ARCHIVE in self.name.split("/"):
            raise AcrossKeys(f"{ARCHIVE!r} is the folder of runs that others replaced", "name")
        if TINY in (self.model.checkpoint, self.model.vision_checkpoint) and (
            self.model.image_size % self.model.tiny.patch_size
        ):
            what = (
                f"model.image_size {self.model.image_size} is not a multiple of "
                f"model.tiny.patch_size {self.model.tiny.patch_size}"
            )
            raise AcrossKeys(what, "model.image_size", "model.tiny.patch_size")
        if self.predict.num_return_sequences > self.predict.num_beams:
            what = f"num_return_sequences is {self.predict.num_return_sequences}, but there are only "
            what += f"{self.predict.num_beams} beams; lower it or raise num_beams"
            raise AcrossKeys(what, "predict.num_return_sequences", "predict.num_beams")
        if self.consensus and not self.has_model and not self.consensus.runs:
            raise AcrossKeys(
                "own is 0 and runs is empty; there are no candidates", "consensus.runs", "consensus.own"
            )
        if not self.has_model and self.retrieval:
            what = "retrieval needs this run's model, but own is 0; use 1 or more"
            raise AcrossKeys(what, "consensus.own", "retrieval")
        if self.full_fit and not self.trains:
            what = "data.fit_on has valid, but nothing is trained"
            raise AcrossKeys(what, "data.fit_on", "train.stages")
        if self.full_fit and self.train.patience and not self.train.epochs_of:
            what = "patience counts validations, but data.fit_on has valid; name a run in train.epochs_of"
            raise AcrossKeys(what, "train.patience", "data.fit_on")
        best = [n for n, one in enumerate(self.train.stages) if one.epochs and one.start == "best"]
        if self.full_fit and best:
            what = "start is best, but data.fit_on has valid, so there are no validations; write last"
            raise AcrossKeys(what, f"train.stages.{best[0]}.start", "data.fit_on")
        if self.predict.splits and not self.predicted:
            what = "data.fit_on has valid, so only test can be predicted, but predict.splits lacks it"
            raise AcrossKeys(what, "predict.splits", "data.fit_on")
        if self.train.epochs_of and not self.full_fit:
            what = "epochs_of needs data.fit_on: [train, valid]"
            raise AcrossKeys(what, "train.epochs_of", "data.fit_on")
        if self.retrieval and self.predict.has_candidates:
            key = "samples" if self.predict.samples else "num_return_sequences"
            what = f"retrieval takes captions of training images, so predict.{key} has no effect"
            raise AcrossKeys(what, "retrieval", f"predict.{key}")
        if not self.has_model and self.soup:
            what = "soup gives this run a model, but own is 0; use 1 or more"
            raise AcrossKeys(what, "consensus.own", "soup")
        if not self.trains and not self.predict.splits:
            what = "nothing is trained and predict.splits is empty; there is nothing to do"
            raise AcrossKeys(what, "predict.splits", "train.stages")
        return self

    @model_validator(mode="before")
    @classmethod
    def _concepts_are_predicted(cls, given: Any) -> Any:
        """With `task: concepts` an unwritten section `concepts` is the default one."""
        if isinstance(given, Mapping) and given.get("task") == "concepts" and given.get("concepts") is None:
            return {**given, "concepts": {}}
        return given

    @model_validator(mode="after")
    def _concepts_can_be_predicted(self) -> "Config":
        conflicts = [*_beside_concepts(self), *_concepts(self)]
        if conflicts:
            what, *keys = conflicts[0]
            raise AcrossKeys(what, *keys)
        return self

    @property
    def captions(self) -> bool:
        """Whether the run predicts captions."""
        return self.task == "captions"

    @property
    def has_model(self) -> bool:
        """Whether the run predicts with a model of its own; an ensemble of other runs alone has none."""
        return not any(step.replaces_model(self) for step in STEPS)

    @property
    def trains(self) -> bool:
        """Whether the run trains its model; a soup averages the weights of other runs instead."""
        return self.has_model and self.soup is None and bool(self.train.stages)

    @property
    def full_fit(self) -> bool:
        """Whether the run learns from validation images, so that no score on them is possible."""
        return "valid" in self.data.fit_on

    @property
    def predicted(self) -> tuple[str, ...]:
        """The splits of `predict.splits` that the run predicts."""
        return tuple(split for split in self.predict.splits if split != "valid" or not self.full_fit)

    @property
    def run_name(self) -> str:
        """The name of this run in its experiment."""
        return run_name(self.variant, self.seed)


def _beside_concepts(config: Config) -> Iterator[tuple[str, ...]]:
    """The sections that need captions in a run of `task: concepts`, each as a message and its keys."""
    if config.captions:
        return
    for name, does, instead in (
        ("consensus", "chooses among captions", "concepts.runs is an ensemble of concepts"),
        ("retrieval", "takes captions of training images", "concepts.predictor: knn takes their concepts"),
        ("soup", "averages weights by scores of captions", "concepts.runs is an ensemble of concepts"),
        ("postprocess", "changes captions", "leave it out"),
    ):
        if getattr(config, name) != type(config).model_fields[name].get_default():
            yield f"{does}, but task is concepts; {instead}", name, "task"
    for number, stage in enumerate(config.train.stages):
        if stage.epochs and stage.losses.reward:
            what = "the loss reward scores captions, but task is concepts; it takes the losses of the family"
            yield what, f"train.stages.{number}.losses.reward", "task"


def _concepts(config: Config) -> Iterator[tuple[str, ...]]:
    """What the section `concepts` lacks, each as a message and its keys."""
    concepts = config.concepts
    learned = [n for n, one in enumerate(config.train.stages) if one.epochs and one.losses.concepts]
    if concepts is None:
        for number in learned:
            what = "the loss concepts needs the section concepts; write concepts: {} for its defaults"
            yield what, f"train.stages.{number}.losses.concepts", "concepts"
        return
    if not concepts.own:
        return
    if config.full_fit and has_thresholds(concepts):
        yield from _without_valid(config)
    if concepts.predictor == "from_captions":
        if not config.captions:
            what = "from_captions reads the captions of this run, but task is concepts; use another predictor"
            yield what, "concepts.predictor", "task"
        elif config.predicted and "valid" not in config.predicted and not config.full_fit:
            what = "thresholds are chosen on valid, but predict.splits lacks it, so it has no captions"
            yield what, "predict.splits", "concepts.predictor"
    elif not config.has_model:
        what = f"{concepts.predictor} needs this run's model, but consensus.own is 0; use 1 or more"
        yield what, "consensus.own", "concepts.predictor"
    elif concepts.predictor == "classifier" and not ((config.trains or config.soup) and learned):
        what = "the classifier needs a stage with the loss concepts, such as losses: {concepts: 1}"
        yield what, "concepts.predictor", "train.stages"


def _without_valid(config: Config) -> Iterator[tuple[str, ...]]:
    """The thresholds that a run can't have that learns from validation images."""
    concepts = config.concepts
    if concepts.runs and not voted(concepts):
        what = "the thresholds of a mean are chosen on valid, which data.fit_on has; use votes"
        yield what, "concepts.combine", "data.fit_on"
    elif concepts.thresholds.start == AUTO and not config.train.epochs_of:
        what = "auto chooses on valid, which data.fit_on has; give a number, or a run in train.epochs_of"
        yield what, "concepts.thresholds.start", "data.fit_on"


def keys(section: type[BaseModel] = Config, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key that an experiment file may have, as a path; 0 stands for any entry of a list."""
    for name, field in section.model_fields.items():
        yield (*path, name)
        entry = ("0",) if get_origin(field.annotation) is tuple else ()
        for inner in _sections(field.annotation):
            yield from keys(inner, (*path, name, *entry))


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if get_origin(annotation) in (Union, types.UnionType, tuple):
        return [s for part in get_args(annotation) for s in _sections(part)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []


def flat(config: Section) -> dict[str, Any]:
    """The config as dotted keys and plain values, for tables and MLflow."""

    def walk(value: Any, path: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
            value = {str(number): entry for number, entry in enumerate(value)}
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                yield from walk(inner, f"{path}.{key}" if path else key)
        else:
            yield path, value

    return dict(walk(json.loads(config.model_dump_json()), ""))
