"""The inputs and results of every metric, and what metrics share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from harness.config.editions import EDITIONS
from harness.config.sections import Section
from harness.errors import Problem
from harness.machine import ranks
from harness.metrics import text
from harness.metrics.cache import Row, Table, made_by
from harness.metrics.ngrams import Frequencies
from harness.models import checkpoints
from harness.models.checkpoints import Checkpoint
from harness.store import fingerprint

if TYPE_CHECKING:
    from harness.metrics.settings import ScoreConfig

STANDIN = "standin"
"""In place of a checkpoint's name: a small model that needs no download."""
Compute = Callable[[list[Row]], Sequence[Sequence[float]] | np.ndarray]
"""Computes the numbers (m, k) of m rows."""


class Absent(Exception):
    """A score that cannot be computed here; its message says why."""


@dataclass(frozen=True)
class Documents:
    """Captions, as read, that give the document frequencies of words; made once for many calls."""

    captions: Sequence[str]

    @cached_property
    def clean(self) -> list[str]:
        """The captions after the official pre-processing."""
        return [text.official(caption) for caption in self.captions]

    @cached_property
    def identity(self) -> str:
        """A fingerprint of the pre-processed captions."""
        return fingerprint(self.clean)

    @cached_property
    def frequencies(self) -> Frequencies:
        """How many of the pre-processed captions hold each n-gram."""
        return Frequencies(self.clean)


@dataclass(frozen=True)
class Inputs:
    """Captions to score, row by row: `predictions[i]` against `references[i]` and `images[i]`.

    `predictions` and `references` are exactly as read. `images` is None if there are no images; an image is
    None if it can't be read. `documents` give the document frequencies, by default the references do.
    """

    predictions: Sequence[str]
    references: Sequence[str]
    images: Sequence[Path | None] | None
    config: "ScoreConfig"
    edition: int
    device: str = "cpu"
    cache: Path | None = None
    documents: Documents | None = None

    @cached_property
    def pairs(self) -> list[Row]:
        """(prediction, reference) of each row, as read."""
        return list(zip(self.predictions, self.references, strict=True))

    @cached_property
    def clean_predictions(self) -> list[str]:
        """The predictions after the official pre-processing."""
        return [text.official(caption) for caption in self.predictions]

    @cached_property
    def clean_references(self) -> list[str]:
        """The references after the official pre-processing."""
        return [text.official(caption) for caption in self.references]

    @cached_property
    def counted(self) -> Documents:
        """The captions whose words are counted for document frequencies."""
        return Documents(self.references) if self.documents is None else self.documents

    @cached_property
    def clean_pairs(self) -> list[Row]:
        """(prediction, reference) of each row, after the official pre-processing."""
        return list(zip(self.clean_predictions, self.clean_references, strict=True))

    @cached_property
    def agreed(self) -> np.ndarray:
        """Rows (n,) bool with both captions of length 0: as read or pre-processed, by the edition's rule."""
        return empty(self.clean_pairs if EDITIONS[self.edition].blanks.length_of == "clean" else self.pairs)

    def scored(self, what: Any, rows: Sequence[Row], compute: Compute) -> np.ndarray:
        """Numbers (n, k) of rows: known ones from `cache`, new ones from `compute`.

        `what` is all that determines the numbers besides the row; see `cache.Table`.
        """
        table = self._table(what, rows)
        if table.new:
            table.add(compute(table.new))
        return table.numbers()

    def scored_by_all(self, what: Any, rows: Sequence[Row], compute: Compute) -> np.ndarray:
        """As `scored`, but each rank of a launch computes its share, and all ranks get the numbers.

        An error on one rank stops all ranks with `Absent` and its reason.
        """
        table = self._table([what, made_by(self.device)], rows)
        new = ranks.agree(table.new)
        made = self._shared(new, compute) if new else []
        if ranks.rank():
            return ranks.agree(None)
        if new:
            table.add(made)
        return ranks.agree(table.numbers())

    def _shared(self, new: list[Row], compute: Compute) -> list[Any]:
        """The numbers of the rows from all ranks. No rank may leave while others wait for its part."""
        mine, made, failure = ranks.share(new), [], None
        try:
            made = list(compute(list(mine))) if mine else []
        except Exception as error:  # the other ranks must learn of any error before it is raised
            failure = error
        failures = [text for text in ranks.every(None if failure is None else str(failure)) if text]
        if isinstance(failure, Exception) and not isinstance(failure, Absent):
            raise failure
        if failures:
            raise Absent(failures[0])
        return ranks.gather(made)

    def name_of(self, checkpoint: Checkpoint) -> str:
        """The checkpoint's name in signatures: stand-ins are marked, local or changed files have a hash."""
        name = checkpoint.name
        if checkpoint.local or not (checkpoint.standin or self._is_fetched(checkpoint)):
            name += f"@{checkpoints.digest(checkpoint, self.cache)}"
        return f"STAND-IN {name}" if checkpoint.standin else name

    def official(self, checkpoint: Checkpoint, named: str, key: str) -> tuple[bool, list[str]]:
        """Whether a checkpoint is the hub's checkpoint `named`, and a doubt if only its contents say no.

        Files that the hub's client downloaded under that name are official. So is a local folder of that name
        whose contents `score.trusted` lists. `key` is the config key that names the checkpoint.
        """
        folder = checkpoint.folder.resolve() if checkpoint.local else checkpoint.folder
        same = folder.name == named.rpartition("/")[2] if checkpoint.local else checkpoint.name == named
        if checkpoint.standin or not same:
            return False, []
        if self._is_fetched(checkpoint) or self.trusts(checkpoint.folder):
            return True, []
        doubt = checkpoints.untrusted(key, checkpoint.folder, self.cache)
        if not checkpoint.local:
            doubt += f" Or download it again: hf download {named} --force-download"
        return False, [doubt]

    def trusts(self, path: Path) -> bool:
        """Whether `score.trusted` lists the contents of a file or folder."""
        return checkpoints.is_trusted(path, self.config.trusted, self.cache)

    def _is_fetched(self, checkpoint: Checkpoint) -> bool:
        return not checkpoint.local and checkpoints.is_fetched(checkpoint, self.cache)

    def _table(self, what: Any, rows: Sequence[Row]) -> Table:
        return Table(None if ranks.rank() else self.cache, what, rows)


@dataclass(frozen=True)
class Measured:
    """The result of a metric: `per_image` (n,) and how it was computed.

    A corpus metric has its own `value` and, if resamples can be summed, `statistics` (n, k) for
    `Metric.aggregate`. For other metrics the value is the mean of `per_image`. `doubts` say why the score is
    not official if the only reason is the contents of its weights.
    """

    per_image: np.ndarray
    signature: str
    official: bool = True
    value: float | None = None
    statistics: np.ndarray | None = None
    warnings: list["Flagged"] = field(default_factory=list)
    doubts: Sequence[str] = ()


@dataclass(frozen=True)
class Standin:
    """What `standin` means as the name of weights: a small, unofficial model.

    `build` gets images, captions and a folder. It trains the stand-in on the training split and saves it in
    the folder. None: the stand-in comes with an installed package.
    """

    build: Callable[[Sequence[Path], Sequence[str], Path], None] | None = None


Pairs = Sequence[tuple[str, str]]
"""(prediction, reference) of each row."""


@dataclass(frozen=True)
class Original:
    """How the original package scores: `scores` of pairs (n,), one pair at a time unless `corpus`.

    A corpus metric's scores depend on all pairs. The package gets the captions after the official
    pre-processing, or as read if `raw`.
    """

    package: str
    scores: Callable[[Inputs, Pairs], Sequence[float]]
    corpus: bool = False
    raw: bool = False


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Weights:
    """The weights of a metric: the `section` of `score:`, its `schema`, and its `key` that names the weights.

    The name is a hub name or a local path; None leaves the metric absent. `problems` gets the section and
    says what is missing, without loading anything. `identity` gets the section and says what determines the
    numbers; it differs for two weights of one name. Its second argument is a folder that keeps known hashes.
    `unload` forgets the loaded model. `executes`: the section names a program, or files with programs.
    `hint` says how to get the weights, for a metric that is absent because none are named.
    """

    section: str
    schema: type[Section]
    key: str
    problems: Callable[[Any], list[Problem]]
    identity: Callable[[Any, Path | None], Any]
    standin: Standin | None = None
    unload: Callable[[], None] = _nothing
    executes: bool = False
    hint: str = ""

    @property
    def path(self) -> str:
        """The key in an experiment file."""
        return f"score.{self.section}.{self.key}"

    def settings(self, config: "ScoreConfig") -> Any:
        """The section of the config."""
        return getattr(config, self.section)

    def named(self, config: "ScoreConfig") -> str | Path | None:
        """The name of the weights in the config, or None if the metric is absent."""
        return getattr(self.settings(config), self.key)

    def renamed(self, config: "ScoreConfig", name: str | Path | None) -> "ScoreConfig":
        """The config with other weights for this section."""
        settings = self.settings(config).model_copy(update={self.key: name})
        return config.model_copy(update={self.section: settings})

    def check_named(self, config: "ScoreConfig") -> None:
        """Raise `Absent` if the config names no weights."""
        if self.named(config) is None:
            raise Absent(". ".join(filter(None, (f"needs {self.path}", self.hint))))

    def is_trained_here(self, config: "ScoreConfig") -> bool:
        """Whether the config names a stand-in that is trained on the training split."""
        trained = self.standin is not None and self.standin.build is not None
        return trained and self.named(config) == STANDIN

    def missing(self, config: "ScoreConfig") -> list[Problem]:
        """What is wrong with the named weights; empty if the config names none or a stand-in."""
        return [] if self.named(config) in (None, STANDIN) else self.problems(self.settings(config))


@dataclass(frozen=True)
class Metric:
    """A metric of METRICS: how it is measured, and what other code must know about it.

    `aggregate` maps summed statistics (..., k) to the scores (...) of a corpus metric. `neural` metrics use
    the device; the others run at the same time in a thread. `weights` may be shared with another metric.
    `java`: it runs on Java, and `stop` ends Java even in the middle of an answer. `original` is the package
    that it must agree with. `readings` are variants by name, also reported: it is not established which one
    is official.
    """

    measure: Callable[[Inputs], Measured]
    aggregate: Callable[[np.ndarray], np.ndarray] | None = None
    neural: bool = False
    weights: Weights | None = None
    java: bool = False
    stop: Callable[[], None] = _nothing
    original: Original | None = None
    readings: Mapping[str, "Metric"] = field(default_factory=dict)


def empty(pairs: Sequence[Row]) -> np.ndarray:
    """Rows (n,) bool in which every text has length 0; white space has a length."""
    return np.array([not any(pair) for pair in pairs])


def sign(metric: str, edition: int, *parts: Any) -> str:
    """The signature `metric|clef<edition>|part|part`; scores with equal signatures are comparable."""
    return "|".join([metric, f"clef{edition}", *map(str, parts)])


class Flagged(NamedTuple):
    """Rows that a warning is about."""

    rows: Sequence[int]
    what: str

    def message(self, ids: Sequence[str] | None) -> str:
        """A warning that counts the rows and names the first few, by id if there are ids."""
        named = [ids[row] if ids else f"row {row + 1}" for row in self.rows[:5]]
        more = ", ..." if len(self.rows) > 5 else ""
        return (
            f"{len(self.rows)} row{'s' if len(self.rows) > 1 else ''} {self.what} ({', '.join(named)}{more})"
        )


def cut_rows(metric: str, cut: np.ndarray) -> list[Flagged]:
    """The rows that were too long, if any; `cut` (n,) is the tokens that each was cut to, 0 if not cut."""
    rows = np.flatnonzero(cut).tolist()
    return [Flagged(rows, f"longer than {metric} takes, cut at {cut.max():.0f} tokens")] if rows else []
