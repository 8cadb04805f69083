"""What differs between the editions of ImageCLEFmedical Caption: one value per year, only data.

What no file, loader or evaluator of the organisers establishes is None or empty, never guessed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

SubmissionFormat = Literal["pipe", "csv-zip"]
"""pipe: `ID|caption` or `ID|C1;C2`, no header, no quoting.
csv-zip: comma, header `ID,Caption` or `ID,CUIs`, as `submission.csv` at the root of a zip."""

LayoutName = Literal["imageclef2023", "imageclef2024", "rocov2"]
"""Names and format of the files of a data set."""


@dataclass(frozen=True)
class Blanks:
    """How an evaluator scores captions that are empty or only white space.

    BERTScore and ROUGE-1 are 1 if both captions have length 0. They are 0 if one of them is blank after the
    pre-processing in any other case.
    """

    length_of: Literal["raw", "clean"]
    """Which captions must have length 0: the captions as read, or after the pre-processing."""
    rule: str
    """The source of the rule, for warnings."""
    similarity_embeds_empty: bool = False
    """If true, Similarity embeds a prediction of length 0, and is 1 if both captions have length 0; if
    false, a prediction of length 0 scores 0."""


@dataclass(frozen=True)
class Edition:
    """One year's files, metrics and ranking."""

    year: int
    caption_format: SubmissionFormat | None
    """None: not established."""
    concept_format: SubmissionFormat | None
    max_cuis: int | None
    """The evaluator refuses more concepts than this for one image; None: not established."""
    metrics: tuple[str, ...]
    """Every caption metric of that year that can be computed with public weights, by its name in harness.
    For 2022 the metrics are not established, so the metrics of 2023 are used."""
    primary: str | None
    """The score that decides the ranking and the best checkpoint."""
    ranking: str
    """The ranking rule in words, for tables and pages."""
    weights: Mapping[str, str]
    """The weights of metrics that use other weights in other years, by the metric's section of `score:`."""
    blanks: Blanks
    strict_checker: bool = False
    """Whether the organisers run a checker that requires the order of the ids file (2026)."""
    skips_ids: bool = False
    """Whether the organisers' loader ignores rows whose id holds "ID" (2023)."""
    bertscore_idf: bool = False
    """Whether BERTScore weighs tokens by their rarity in the references."""
    bertscore_tokens: int | None = None
    """Tokens after which BERTScore cuts a caption, the two special ones included; None: it does not cut.
    The value of 2024 is not established; it is assumed to be the value of 2023."""
    aggregates: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Scores that are the unweighted mean of other scores, in an order in which they can be computed."""
    images: Mapping[str, int] = field(default_factory=dict)
    """Number of images of each split as the organisers released them; empty: not established."""
    teams: Mapping[str, int] = field(default_factory=dict)
    """How many teams took part, by task; empty: not established."""
    subtasks: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Further caption subtasks with their own ids: by name, the number of images of their splits."""

    def parts(self, score: str) -> tuple[str, ...]:
        """The metrics that a score is a mean of, means resolved into metrics; a metric is its own part."""
        means = self.aggregates.get(score)
        return (score,) if means is None else tuple(part for mean in means for part in self.parts(mean))

    @property
    def rules(self) -> list[Any]:
        """What the edition decides about the values of its metrics, besides the config."""
        cut = [self.bertscore_idf, self.bertscore_tokens]
        return [*cut, self.blanks.length_of, self.blanks.similarity_embeds_empty]


_2023 = Edition(
    year=2023,
    caption_format="pipe",
    concept_format="pipe",
    max_cuis=100,
    skips_ids=True,
    metrics=("bertscore", "rouge1", "bleurt", "bleu1", "meteor", "cider", "clipscore"),
    primary="bertscore",
    ranking="by bertscore, highest first",
    weights={"bleurt": "lucadiliello/BLEURT-20"},
    bertscore_tokens=512,
    blanks=Blanks("clean", "the rule of 2023"),
    images={"train": 60_918, "valid": 10_437, "test": 10_473},
    teams={"captions": 13, "concepts": 9},
)
_2025 = Edition(
    year=2025,
    caption_format="csv-zip",
    concept_format="csv-zip",
    max_cuis=100,
    metrics=("bertscore", "rouge1", "similarity", "bleurt", "medcat", "alignscore"),
    primary="overall",
    ranking="by overall (mean of relevance and factuality), highest first",
    weights={"bleurt": "lucadiliello/BLEURT-20-D12"},
    bertscore_idf=True,
    blanks=Blanks("raw", "the rule of 2025", similarity_embeds_empty=True),
    aggregates={
        "relevance": ("bertscore", "rouge1", "similarity"),
        "factuality": ("medcat", "alignscore"),
        "overall": ("relevance", "factuality"),
    },
)
_YEARS = (
    replace(
        _2023,
        year=2022,
        skips_ids=False,
        primary=None,
        ranking="not established",
        blanks=Blanks("clean", "the rule of 2023; that of 2022 is not established"),
        images={},
        teams={},
    ),
    _2023,
    replace(
        _2023,
        year=2024,
        caption_format=None,
        concept_format=None,
        max_cuis=None,
        skips_ids=False,
        metrics=(*_2023.metrics, "refclipscore"),
        blanks=Blanks("clean", "the rule of 2023; that of 2024 is not established"),
        images={},
        teams={},
    ),
    _2025,
    replace(
        _2025,
        year=2026,
        strict_checker=True,
        blanks=Blanks("raw", "the rule of 2026"),
        aggregates=_2025.aggregates | {"relevance": ("bertscore", "rouge1", "similarity", "bleurt")},
        images={"train": 97_364, "valid": 19_240, "test": 15_249},
        subtasks={"Synthetic": {"train": 97_222, "valid": 19_239, "test": 15_262}},
    ),
)
EDITIONS: Mapping[int, Edition] = {edition.year: edition for edition in _YEARS}
DEFAULT = 2023
"""The edition of an experiment or a command that names none."""
SPAN = f"{min(EDITIONS)} to {max(EDITIONS)}"
"""The range of years, for help texts."""
FORMATS = ", ".join(str(year) for year, edition in EDITIONS.items() if edition.caption_format)
"""The years whose submission format is established."""
