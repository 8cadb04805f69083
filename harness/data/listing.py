"""The rows of a data set, right or wrong, and what was found of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from harness.data.folders import File
from harness.errors import Problem

SPLITS = ("train", "valid", "test")
Row = tuple[str, str]
"""(split, id) of one example."""
Table = dict[str, tuple[int | None, str | None]]
"""Line and value by id; the value is None if the row can't be read, or has only an id."""
_APART = 3  # up to this number, problems of one cause are listed one by one


@dataclass(frozen=True)
class Example:
    """One image and its labels; `line` is its line in the captions (or ids) file.

    `caption` is None if there is none or its row can't be read. `damage` says why the image can't be read.
    """

    id: str
    image: Path
    caption: str | None
    cuis: tuple[str, ...]
    line: int | None
    damage: str = ""

    @property
    def trains(self) -> bool:
        """Whether the row is fit for training: its image can be read, and its caption has words."""
        return not self.damage and self.caption is not None and has_words(self.caption)


@dataclass(frozen=True)
class Dataset:
    """A checked data set; `splits` has the keys train, valid and test, and test may lack captions.

    Train holds the rows that are fit for training. Valid and test hold every listed row, since all of them
    must be captioned and submitted. `fingerprints` identify the contents of each split's labels and images,
    whatever their path and date. `left_out` are rows that are not used, `notes` rows that are used only for
    some purposes.

    `manual` are the manually validated concepts by split and id, for splits with a file of them. Only scores
    read them, so they are no part of `fingerprints`.
    """

    root: Path
    layout: str
    splits: Mapping[str, tuple[Example, ...]]
    concept_names: Mapping[str, str]
    fingerprints: Mapping[str, str]
    left_out: tuple["Finding", ...]
    notes: tuple["Finding", ...] = ()
    manual: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    """The files of concepts that the data lacks, as in `Listing.absent`."""

    def readable(self, split: str) -> list[Example]:
        """The rows of a split whose images can be read."""
        return [example for example in self.splits[split] if not example.damage]

    def unreadable(self, split: str) -> list[Example]:
        """The rows of a split whose images can't be read; the model can't caption them."""
        return [example for example in self.splits[split] if example.damage]


class Finding(NamedTuple):
    """A problem with a row (None: with a line that is not a row); one `cause` is reported once."""

    problem: Problem
    row: Row | None
    cause: str


@dataclass
class Listing:
    """The contents of the label files and folders of a data set, right or wrong."""

    splits: dict[str, list[Example]] = field(default_factory=dict)
    sources: dict[str, Path | None] = field(default_factory=dict)
    """Per split, the file that `Example.line` refers to; None if the ids come from the images."""
    concepts: dict[str, tuple[Path | None, Mapping[str, int | None]]] = field(default_factory=dict)
    """Per split, the file of concepts, and the line of each id in it."""
    files: dict[Row, File] = field(default_factory=dict)
    """The images that exist."""
    lacking: dict[Row, str] = field(default_factory=dict)
    """For each row without an image, the reason."""
    concept_names: dict[str, str] = field(default_factory=dict)
    manual: dict[str, dict[str, tuple[str, ...]]] = field(default_factory=dict)
    """Per split with such a file, the manually validated concepts of each image."""
    findings: list[Finding] = field(default_factory=list)
    doubtful: dict[str, set[str]] = field(default_factory=lambda: {split: set() for split in SPLITS})
    """Per split, the supposed ids of rows that can't be read."""
    fatal: list[Problem] = field(default_factory=list)
    """Problems that leaving out rows does not solve."""
    absent: dict[str, str] = field(default_factory=dict)
    """The missing files of `train concepts`, `valid concepts` and `concept names`, as looked for.

    Captions need none of them.
    """


def has_words(caption: str) -> bool:
    """Whether a caption has a letter or a digit; without them there is nothing to learn."""
    return any(map(str.isalnum, caption))


def together(findings: Iterable[Finding]) -> list[Problem]:
    """The problems; many of one cause in one file become one, at its first row, with the number of others."""
    causes: dict[tuple[str, str], list[Problem]] = {}
    for problem, row, cause in findings:
        place = str(problem.file) if problem.line else row[0] if row else ""
        causes.setdefault((place, cause), []).append(problem)
    return [problem for same in causes.values() for problem in _shortened(same)]


def _shortened(same: list[Problem]) -> list[Problem]:
    if len(same) <= _APART:
        return same
    first, rest = same[0], same[1:]
    lines = [str(problem.line) for problem in rest if problem.line]
    named = f" (lines {', '.join(lines[:5])}{', ...' if len(lines) > 5 else ''})" if lines else ""
    return [replace(first, what=f"{first.what}; and {len(rest):,} more like it{named}")]
