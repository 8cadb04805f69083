"""The base class of sections, the types of numbers in them, and the sections that no package owns."""

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator
from pydantic_core import core_schema

from harness.config.editions import LayoutName


def no_bool(value: Any) -> Any:
    """Refuse true and false, which pydantic would take for 1 and 0."""
    if isinstance(value, bool):
        raise ValueError(f"got {str(value).lower()}; a number is allowed")
    return value


def whole(low: int, high: int) -> Any:
    """The type of a whole number from `low` to `high`; its metadata has the range in words."""
    words = f"a whole number from {low:,} to {high:,}"

    def check(value: int) -> int:
        if not low <= value <= high:
            raise ValueError(f"got {value}; {words} is allowed")
        return value

    return Annotated[int, BeforeValidator(no_bool), AfterValidator(check), words]


def number(words: str, allowed: Callable[[float], bool]) -> Any:
    """The type of a finite number that is `allowed`; errors and metadata describe it in `words`."""

    def check(value: float) -> float:
        if not (math.isfinite(value) and allowed(value)):
            raise ValueError(f"got {value}; {words} is allowed")
        return value

    return Annotated[float, BeforeValidator(no_bool), AfterValidator(check), words]


AUTO = "auto"


class _OrAuto:
    """Validates like `kind`, and lets `auto` pass; errors name the key and not a branch of a union."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_wrap_validator_function(
            lambda value, check: value if value == AUTO else check(value),
            handler.generate_schema(self.kind),
            serialization=core_schema.simple_ser_schema("any"),
        )


def or_auto(kind: Any) -> Any:
    """The type of `auto` or a value of `kind`, a number or bool; its metadata has both in words."""
    words = ", true or false" if kind is bool else f" or {kind.__metadata__[-1]}"
    return Annotated[kind | Literal["auto"], _OrAuto(kind), f"`{AUTO}`{words}"]


Fraction = number("a number from 0 to 1", lambda value: 0 <= value <= 1)
Share = number("a number from 0 to below 1", lambda value: 0 <= value < 1)
Mass = number("a number above 0 and up to 1", lambda value: 0 < value <= 1)
Positive = number("a finite number above 0", lambda value: value > 0)
NonNegative = number("a finite number of 0 or more", lambda value: value >= 0)
Finite = number("a finite number", lambda value: True)
Seed = whole(0, 2**32 - 1)
Steps, Images = whole(0, 10**9), whole(1, 10**7)
Epochs, Batch, Tokens = whole(0, 100_000), whole(1, 100_000), whole(1, 10_000)
Side, Width, Layers, Entries = whole(1, 4096), whole(1, 100_000), whole(1, 1000), whole(1, 10**6)
Sha256 = Annotated[
    str, "SHA-256 of 64 hexadecimal digits", Field(pattern=r"^[0-9a-fA-F]{64}$"), AfterValidator(str.lower)
]


class Section(BaseModel):
    """A section of the experiment file; unknown keys are errors, and values never change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), defer_build=True
    )


def summary(documented: Any) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join((inspect.getdoc(documented) or "").partition("\n\n")[0].split())


class PhantomConfig(Section):
    """The made-up data set that is drawn into `data.root` if that folder does not exist."""

    train: Images = 700
    """Images in the training split."""
    valid: Images = 150
    """Images in the validation split."""
    test: Images = 150
    """Images in the test split."""
    seed: Seed = 0
    """The same seed draws the same set, byte for byte."""


class AugmentConfig(Section):
    """Random changes of training images, drawn again for every image and epoch."""

    random_crop: Fraction = 1.0
    """Smallest share of the image's area that a random crop keeps. LAVIS uses 0.5; 1 turns cropping off."""
    horizontal_flip: bool = False
    """Mirror half of the images. LAVIS does this; it swaps left and right in a radiograph."""
    brightness: Fraction = 0.0
    """Brightness and contrast are each scaled by a factor from 1 minus this to 1 plus this."""
    shift: Fraction = 0.0
    """Largest shift in each direction, as a share of the image's side."""
    rotate: NonNegative = 0.0
    """Largest rotation in degrees."""


class FractionConfig(Section):
    """The share of the images of a split that is used; the test split is always whole."""

    train: Mass = 1.0
    """Share of the training images."""
    valid: Mass = 1.0
    """Share of the validation images. Scores on a share get no rank on the leaderboard."""


class DataConfig(Section):
    """Where the images, captions and concepts are."""

    root: Path
    """Folder of the data set."""
    layout: LayoutName = "imageclef2023"
    """Names and format of the files. imageclef2023 also reads 2022; imageclef2024 also reads later years."""
    skip_bad: bool = False
    """Continue despite problems, and list them. Training skips such rows; validation and test keep them."""
    fraction: FractionConfig = FractionConfig()
    """Use only a share of the images, for a quick look. All results of such a run say so.

    The hash of an image's id decides whether it is used. So the choice is the same everywhere, and the images
    of 10 % are among those of 20 %. Other images are neither checked nor decoded.
    """
    cache: bool = True
    """Decode and resize each image once into a memory-mapped file under runs/cache."""
    augment: AugmentConfig = AugmentConfig()
    """Random changes of training images."""
    phantom: PhantomConfig | None = None
    """Draw this made-up set into `root` first, if that folder does not exist."""
    fit_on: tuple[Literal["train", "valid"], ...] = ("train",)
    """The splits that the model learns from: [train], or [train, valid] for a last run before a submission.

    Such a last run has no validation: no scores, no captions of valid, and its last weights are kept.
    `train.epochs_of` says for how long it trains. All else is from train alone: the tiny checkpoint,
    stand-ins of metrics, neighbours, document frequencies, the constant caption.
    """

    @field_validator("fit_on")
    @classmethod
    def _has_train(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        if given not in (("train",), ("train", "valid")):
            raise ValueError(f"got [{', '.join(given)}]; [train] or [train, valid] is allowed")
        return given


class Truncation(Section):
    """The distribution that tokens are sampled from, as in transformers' `generate`."""

    temperature: Positive = 1.0
    """Logits are divided by this; below 1, probable tokens become more probable."""
    top_k: whole(0, 10**6) = 0
    """Only this many of the most probable tokens; 0: all."""
    top_p: Mass = 1.0
    """Only the most probable tokens, until their probabilities sum to this; 1: all."""
    epsilon: Share = 0.0
    """Only tokens of at least this probability (`epsilon_cutoff` in transformers); 0: all."""


class SamplesConfig(Truncation):
    """Captions of each image that are sampled from the model besides the beams; `null` turns it off.

    They depend on the run's seed, and on nothing else that a run draws.
    """

    count: whole(1, 1000) = 16
    """Samples of an image. Its first ones stay the same if this changes."""


class PredictConfig(Section):
    """How captions are decoded."""

    splits: tuple[Literal["valid", "test"], ...] = ("valid", "test")
    """Splits to caption. A split without images is skipped."""
    num_beams: whole(1, 1000) = 5
    """Beams of the search; 1 is greedy."""
    max_new_tokens: Tokens = 128
    """Longest caption in tokens."""
    min_new_tokens: whole(0, 10_000) = 8
    """Shortest caption in tokens."""
    length_penalty: Finite = 1.0
    """As in transformers' `generate`: above 0, beams prefer longer captions. No effect with one beam."""
    repetition_penalty: Positive = 1.0
    """As in transformers' `generate`; 1 is none."""
    no_repeat_ngram_size: whole(0, 10_000) = 0
    """No sequence of this many tokens occurs twice in a caption; 0: no limit."""
    num_return_sequences: whole(1, 1000) = 1
    """Beams of each image that are candidates, best first. The best one is the caption."""
    samples: SamplesConfig | None = None
    """Captions of each image that are sampled from the model besides the beams; `null` turns it off.

    They obey the lengths, the repetition penalty and the n-gram limit, as beams do.
    """
    batch_size: or_auto(Batch) = 16
    """Images decoded together on one device.

    auto: 16 on a CPU. On other devices, the memory of the first 16 decides how many follow.
    """

    @property
    def has_candidates(self) -> bool:
        """Whether an image gets further captions besides the best beam."""
        return self.samples is not None or self.num_return_sequences > 1

    @property
    def rows(self) -> int:
        """The most captions of an image that grow at the same time."""
        return max(self.num_beams, self.samples.count if self.samples else 1)
