"""The section `train:`."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, create_model, field_validator, model_validator

from harness.config import deepspeed_keys, former_stages
from harness.config.sections import (
    AUTO,
    Batch,
    Epochs,
    Fraction,
    Images,
    NonNegative,
    Positive,
    Section,
    Share,
    Steps,
    Tokens,
    Truncation,
    no_bool,
    or_auto,
    summary,
    whole,
)
from harness.decoding.consensus import MEANS
from harness.errors import AcrossKeys
from harness.metrics import METRICS
from harness.training.losses import LOSSES

IMAGE_GAP = "image_gap"
"""What the ROUGE-1 of validation loses when its captions move to other images."""
LossesConfig = create_model(
    "LossesConfig",
    __base__=Section,
    __doc__="The weight of each loss of a stage; 0 turns a loss off.",
    **{name: (NonNegative, Field(0.0, description=summary(loss))) for name, loss in LOSSES.items()},
)


class RewardConfig(Truncation):
    """Self-critical training: the model samples captions and learns from their scores.

    The stage begins and each of its epochs ends with a validation that is scored. It computes without
    dropout, so that captions are learned with the probabilities that they were sampled with.
    """

    metrics: dict[Literal[*METRICS, *MEANS], Positive] = Field(min_length=1)
    """The reward: metrics of a caption against the image's own one, with weights; their sum becomes 1.

    CIDEr takes document frequencies from the training captions.
    """
    standardise: bool = False
    """Give each metric mean 0 and deviation 1 over the samples of an optimiser step, before it is weighed."""
    samples: whole(1, 1000) = 5
    """Captions that are sampled for each image."""
    baseline: Literal["leave_one_out", "greedy"] = "leave_one_out"
    """A sample learns from its reward minus this: the mean of the image's other samples, or the reward of
    its greedy caption."""
    max_new_tokens: Tokens = 64
    """Longest sample in tokens."""
    stop_when: tuple[Literal[IMAGE_GAP, *METRICS], ...] = (IMAGE_GAP,)
    """The stage ends if one of these validation scores falls below its 95 % interval at the stage's start.

    `image_gap` is what ROUGE-1 loses when captions move to other images: one caption for all images may earn
    a high reward.
    """

    @model_validator(mode="after")
    def _has_others(self) -> "RewardConfig":
        if self.baseline == "leave_one_out" and self.samples == 1:
            what = "leave_one_out compares a sample with the image's others; use 2 samples or more, or greedy"
            raise AcrossKeys(what, "samples", "baseline")
        return self


class StageConfig(Section):
    """One stage of training."""

    epochs: Epochs
    """0 skips the stage."""
    start: Literal["last", "best"] = "last"
    """The weights that the stage starts from: the last ones of the stage before, or the best ones so far."""
    learning_rate: Positive | None = None
    """Overrides `train.learning_rate` in this stage."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """constant: this stage has its learning rate from the first step to the last, without warm-up."""
    validations_per_epoch: whole(1, 1000) = 1
    """Validations of each epoch, at equal distances. With more than 1 each has scores, whatever
    `train.evaluate_every` says, and each follows a checkpoint."""
    losses: LossesConfig
    """The weight of each loss by name; at least one must be above 0."""
    reward: RewardConfig | None = None
    """What the loss `reward` rewards; needed with this loss, and only then."""

    @model_validator(mode="after")
    def _has_a_loss(self) -> "StageConfig":
        if self.epochs and not any(weight for _, weight in self.losses):
            raise AcrossKeys("no loss has a weight above 0; nothing would be trained", "losses")
        return self

    @model_validator(mode="after")
    def _knows_its_reward(self) -> "StageConfig":
        if self.losses.reward and self.reward is None:
            what = "the loss reward needs the section reward, for example reward: {metrics: {bertscore: 1}}"
            raise AcrossKeys(what, "losses.reward")
        if self.reward is not None and not self.losses.reward:
            raise AcrossKeys("the section reward is for the loss reward, whose weight is 0", "reward")
        return self


PAPERS_STAGES = (
    StageConfig(epochs=50, losses=LossesConfig(caption=1, concept=1)),
    StageConfig(epochs=20, losses=LossesConfig(caption=1)),
)


class LearningRates(Section):
    """The peak of a part's learning rate where `train.learning_rate` is that of the others; null: the same.

    The schedule is the same for all parts. A stage with a learning rate of its own scales all of them alike.
    """

    vision: Positive | None = None
    """Image encoder, or its adapters."""
    connector: Positive | None = None
    """What leads from the image encoder to the language model, such as the Q-Former."""
    language: Positive | None = None
    """Language model, or its adapters."""


class TrainConfig(Section):
    """Fine-tuning in stages."""

    stages: tuple[StageConfig, ...] = PAPERS_STAGES
    """The stages in order of training; each has its own optimiser and schedule.

    With an empty list nothing is trained: the checkpoint captions as it is.
    """
    start_from: str | None = None
    """A finished run, such as quickstart/opt_224-s42: the first stage starts from its best weights.

    It has the same `model`; it may be an earlier run of the same file. null: from the checkpoints of `model`.
    """
    batch_size: Batch = 128
    """Captions per optimiser step over all devices. Gradients are accumulated to reach it."""
    micro_batch_size: or_auto(Batch) = 16
    """Captions per forward pass on one device. auto: with `gradient_checkpointing`, the fastest that fits.

    It does not affect the results, except for rounding and for the draws of dropout and augmentation.
    """
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
    """true: as in LAVIS, warm up only in epoch 0 and change the cosine once per epoch."""
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

    Each rank draws its own dropout: 1 and 2 ranks give equal results only if this and `dropout` are 0.
    """
    train_vision: bool = True
    """false freezes the image encoder."""
    train_language: bool = False
    """true: train all weights of the language model too. `model.lora` trains adapters instead."""
    learning_rates: LearningRates = LearningRates()
    """Learning rates of the parts of a model that differ from `learning_rate`."""
    ema: Share | None = None
    """Decay of an exponential moving average of the trained weights after every step, such as 0.999.

    The average starts anew with each stage, from the weights at its start. Each validation scores both, the
    average as `ema_valid_*` in `losses.jsonl`; the best weights are those of the better score. The next stage
    starts from the weights, not from their average. Training on train and valid has no validation: it keeps
    the average, or what was the better of the two in the run of `epochs_of`.
    """
    gradient_checkpointing: or_auto(bool) = False
    """Use less memory and more time in the ViT, Q-Former and language model. auto: only if it must be."""
    compile: Literal["auto", "off", "layers", "whole"] = "auto"
    """What torch.compile compiles while training: each layer of the image encoder, or the encoder as a whole.

    `auto`: the layers on CUDA, nothing on other devices. If the compiler fails, nothing is compiled. Compiled
    code rounds in other ways, as another device does. It is kept in `runs/cache/compiled`, unless
    `TORCHINDUCTOR_CACHE_DIR` names another folder.
    """
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 autocast if the device has it, else fp32. fp16 needs ZeRO. Trained weights stay fp32."""
    vision_precision: Literal["auto", "fp32"] = "auto"
    """fp32: the ViT computes without autocast. Its weights are fp32 in any case."""
    zero_stage: Annotated[Literal[0, 1, 2, 3], BeforeValidator(no_bool)] = 0
    """What DeepSpeed shards over the ranks. 0: nothing; 1: the optimiser; 2: gradients too; 3: weights too.

    It does not affect the results.
    """
    offload: bool = False
    """Keep the optimiser in CPU memory; needs a zero_stage of 1 or more."""
    checkpoint_every_steps: Steps = 0
    """Optimiser steps between checkpoints within an epoch; 0: none. Each epoch ends with a checkpoint."""
    keep_checkpoints: whole(1, 1000) = 2
    """Number of last checkpoints to keep, in case the newest is damaged."""
    keep_best: whole(1, 100) = 1
    """Number of best validated weights to keep as files, for `soup`; `best.json` lists steps and scores."""
    caption_cleaning: Literal["lavis", "none"] = "lavis"
    """lavis: lower case, without .!\"()*#:;~ ; none: only white space is collapsed."""
    max_words: Tokens = 50
    """Training captions are cut after this many words."""
    max_caption_tokens: Tokens = 128
    """Captions and concept sentences are cut to this many tokens. The end token is kept."""
    evaluate_every: Epochs = 1
    """Epochs between captioning and scoring the validation images; 0: after the last epoch only."""
    patience: Epochs = 0
    """A stage ends after this number of validations without a better primary score; 0: never.

    Each stage counts its own validations, and only those with scores (see `evaluate_every`). The learning
    rate follows the schedule of all planned epochs. The next stage starts from the last weights, as it does
    without patience; the best weights of all stages are those that caption.
    """
    epochs_of: str | None = None
    """With `data.fit_on: [train, valid]`, train up to the best validation of this run, and no further.

    A run of the same model, data and stages, such as full_fit/found-s42; it may be an earlier one of the same
    file. Stages after the best validation are dropped, and a stage that ended early there ends early here.
    The learning rate follows the schedule of all planned epochs, as in that run. null: all epochs are
    trained.
    """
    evaluate_images: Images = 200
    """Validation images that are captioned (greedily) and scored to choose the best checkpoint.

    A head predicts the concepts of as many. With `task: concepts` it predicts all of the half `tune`, and
    these choose the weights.
    """
    profile: whole(0, 1000) = 0
    """Profile this number of steps, after the first three and within one epoch; 0: none.

    The trace and a table of the top operators are linked from the report. A trace has about 1 MB a step.
    """
    deepspeed: dict[str, Any] = Field({})
    """Overrides keys of the generated DeepSpeed config; the keys are those of DeepSpeed 0.19.8."""

    @property
    def rate_factors(self) -> dict[str, float]:
        """The learning rate of each part with its own, divided by `learning_rate`."""
        return {part: rate / self.learning_rate for part, rate in self.learning_rates if rate is not None}

    @property
    def rewards(self) -> list[RewardConfig]:
        """The sections `reward` of the stages that are trained."""
        return [stage.reward for stage in self.stages if stage.reward and stage.epochs]

    @property
    def trains_head(self) -> bool:
        """Whether a stage trains a classifier of concepts."""
        return any(stage.losses.concepts for stage in self.stages if stage.epochs)

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
    def _has_best_weights_to_start_from(self) -> "TrainConfig":
        scored = False
        for number, stage in enumerate(self.stages):
            if stage.epochs and stage.start == "best" and not scored:
                what = "start is best, but no validation before this stage has scores"
                raise AcrossKeys(what, f"stages.{number}.start", "evaluate_every")
            often = stage.reward or stage.validations_per_epoch > 1
            scored |= bool(stage.epochs and (often or 0 < self.evaluate_every <= stage.epochs))
        return self

    @model_validator(mode="after")
    def _has_validations_to_count(self) -> "TrainConfig":
        often = all(stage.reward or stage.validations_per_epoch > 1 for stage in self.stages if stage.epochs)
        if self.patience and not self.evaluate_every and not often:
            what = "patience counts validations with scores, but evaluate_every is 0; use 1 or more"
            raise AcrossKeys(what, "patience", "evaluate_every")
        return self

    @model_validator(mode="after")
    def _offloads_what_is_sharded(self) -> "TrainConfig":
        if self.offload and not self.zero_stage:
            what = "offload is true, but zero_stage 0 does not shard the optimiser; use 1, 2 or 3"
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
            what = "precision is fp16, which needs a zero_stage of 1, 2 or 3 for loss scaling; got 0"
            raise AcrossKeys(what, "precision", "zero_stage")
        return self

    @model_validator(mode="after")
    def _divisible(self) -> "TrainConfig":
        if self.micro_batch_size != AUTO and self.batch_size % self.micro_batch_size:
            what = (
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
            raise AcrossKeys(what, "batch_size", "micro_batch_size")
        return self
