"""What a run's record is: the keys and types of `run.json` and of a step's scores."""

from datetime import datetime
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter

from harness.config.editions import EDITIONS, LayoutName


def _inside(path: str) -> str:
    """The path, if it stays inside the folder that it starts from."""
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or "\0" in path or not parts.parts:
        raise ValueError("a path inside runs/ is allowed")
    return path


def _moment(text: str) -> str:
    datetime.fromisoformat(text)
    return text


def _edition(year: int) -> int:
    if year not in EDITIONS:
        raise ValueError(f"allowed are {', '.join(map(str, EDITIONS))}")
    return year


Number = Annotated[float, Field(allow_inf_nan=False)]
Inside = Annotated[str, AfterValidator(_inside)]
Moment = Annotated[str, AfterValidator(_moment)]


class _Part(BaseModel):
    """A part of a record. Keys that earlier versions lacked may be absent; types are strict."""

    model_config = ConfigDict(extra="allow", strict=True)


class _Score(_Part):
    value: Number | None
    official: bool
    signature: str
    n: int = 0
    low: Number | None = None
    high: Number | None = None
    reason: str | None = None


class _Gap(_Part):
    gap: Number | None = None
    low: Number | None = None
    high: Number | None = None


class _OnHalf(_Part):
    scores: dict[str, _Score]
    image_gap: dict[str, _Gap | Number | str | None]


class _Floor(_Part):
    value: Number | None = None
    low: Number | None = None
    high: Number | None = None


class _Baseline(_Floor):
    held: _Floor = _Floor()


class _Gain(_Part):
    difference: Number | None = None
    low: Number | None = None
    high: Number | None = None
    p: Number | None = None
    reason: str | None = None


class _Paired(_Gain):
    held: _Gain = _Gain()


class _Concepts(_Part):
    scores: dict[str, dict[str, _Score]] = {}
    halves: dict[str, dict[str, _Score]] = {}
    baselines: dict[str, _Baseline] = {}
    paired: dict[str, _Paired] = {}
    thresholds: dict[str, Any] = {}
    predictor: str | None = None
    labels: int | None = None


class _Git(_Part):
    commit: str | None
    dirty: bool | None


class _Made(_Part):
    command: str
    git: _Git
    seconds: Number
    ranks: Annotated[int, Field(ge=1)] = 1
    environment: dict[str, str] = {}


class _Data(_Part):
    root: str
    layout: LayoutName = "imageclef2023"
    splits: dict[str, int] = {}
    fingerprints: dict[str, str] = {}
    left_out: int = 0
    notes: list[str] = []


class _Fallback(_Part):
    ids: list[str]
    caption: str | None = None
    concepts: list[str] = []


class _Base(_Part):
    file: str
    parameters: dict[str, Any]


class _Weights(_Part):
    step: int | None = None
    stage: int | None = None
    epoch: int | Number | None = None
    average: bool = False


class _Candidate(_Part):
    name: str
    score: Number


class _Soup(_Part):
    members: list[str]
    candidates: list[_Candidate]
    metric: str
    n: int
    half: str | None = None
    official: bool = False


class _ModelConfig(_Part):
    checkpoint: str = ""


class _Training(_Part):
    best: _Weights = _Weights()
    notes: list[str] = []


class _Failure(_Part):
    reason: str
    step: str | None = None
    error: str | None = None
    hint: str | None = None
    exit_code: int | None = None


class _Sections(_Part):
    model: _ModelConfig = _ModelConfig()
    data: dict[str, Any] = {}
    score: dict[str, Any] = {}


class Run(_Part):
    """A run's `run.json`."""

    name: Inside
    status: Literal["RUNNING", "FINISHED", "FAILED", "PRUNED", "KILLED"]
    edition: Annotated[int, AfterValidator(_edition)]
    command: str
    config: _Sections
    variant: Inside = "base"
    seed: int = 0
    pid: int | None = None
    host: str | None = None
    started: Moment = "2000-01-01"
    ended: Moment | None = None
    archived: Inside | None = None
    at: str | None = None
    failure: _Failure | None = None
    parameters: dict[str, Any] = {}
    standin_model: bool = False
    git: _Git = _Git(commit=None, dirty=None)
    environment: dict[str, str] = {}
    data: _Data = _Data(root="")
    training: _Training = _Training()
    fallback: dict[str, _Fallback] = {}
    soup: _Soup | None = None
    steps: dict[str, Inside] = {}
    made: dict[str, _Made | None] = {}
    seconds: dict[str, Number] = {}
    scores: dict[str, dict[str, dict[str, _Score]]] = {}
    unscored: dict[str, str] = {}
    looks: dict[str, str] = {}
    image_gap: dict[str, _Gap | Number | str | None] | None = None
    halves: dict[str, _OnHalf] = {}
    baseline: dict[str, Number | str | list[str] | None] | None = None
    concepts: _Concepts | None = None
    warnings: list[str] = []
    artifacts: dict[str, Inside] = {}
    submissions: list[Inside] = []
    base: _Base | None = None
    trial: dict[str, Any] | None = None


SCORES = TypeAdapter(dict[str, _Score])
"""The scores in a `scores.json`, by name."""
