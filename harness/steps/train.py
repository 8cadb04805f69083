"""Fine-tuning in the stages of `train:`, with the validation that chooses the best weights."""

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import records
from harness.config.sections import AUTO
from harness.data.listing import Example
from harness.decoding.consensus import Utility, mixture
from harness.errors import Problem, UserError
from harness.machine import device, ranks
from harness.metrics.base import Documents
from harness.models import family
from harness.models.base import PARTS
from harness.models.measured import Unmeasured
from harness.models.settings import longest_prompt
from harness.steps import epochs, origins
from harness.steps.base import Step
from harness.steps.inputs import Inputs, values
from harness.steps.prompts import prompts_in, prompts_of
from harness.steps.standin import with_standins
from harness.steps.validating import Validation, validating
from harness.steps.work import base, labels, texts
from harness.training import fit, forecast, judges, memory, patience, schedule, speed
from harness.training.memory import Model, Setup
from harness.training.profile import TABLE, TRACE
from harness.training.resume import LOSSES, PRIMARY, kept, rows_of
from harness.training.settings import TrainConfig

if TYPE_CHECKING:
    import numpy as np

    from harness.models.loading import Loaded
    from harness.models.text import Text
    from harness.steps.plan import Plan
    from harness.steps.work import Work
    from harness.training import train
    from harness.training.selfcritical import Measure

INDIFFERENT = ("compile", "zero_stage", "offload", "checkpoint_every_steps", "keep_checkpoints", "profile")
"""Keys of `train` that do not affect the result, except by rounding."""
# Like the number of ranks, these affect only rounding and draws of dropout and augmentation. So auto is the
# recipe's values from before there was auto, and trainings made with them are found.
_AUTO_IS = {"micro_batch_size": 16, "gradient_checkpointing": True}
_LATER = {
    **{"ema": None, "keep_best": 1, "patience": 0},
    **{"train_language": False, "learning_rates": dict.fromkeys(PARTS)},
}
"""Keys that are left out at their defaults, so trainings from before there were these keys are found."""
CURVES = "curves.png"
_BY_AUTO = "auto chose the set-up; it changes the result by rounding and by draws of dropout and augmentation"
FIRST_STEPS = 20
"""Steps of a process in which lack of memory halves the micro batch; after them it says the time left."""


class Train(Step):
    """Writes the best weights, and losses and validation scores in `losses.jsonl`."""

    kind, version, shared, weights = "train", 3, True, True
    section = ("train", TrainConfig, TrainConfig())
    epochs_of: Mapping[str, Any] | None = None
    """The run that found for how long to train, and its best validation."""
    start: Mapping[str, Any] | None = None
    """The weights of another run that the training starts from."""

    @classmethod
    def of(cls, plan: "Plan", before: Mapping[str, Step]) -> Iterator[Step]:
        if not plan.config.trains:
            return
        config = plan.config
        read, steps, facts = validating(plan, before)
        read |= values(config, "data.augment", "seed")
        read["train"] = _written(config.train)
        steps |= prompts_in(before, "train", "valid")
        if any(stage.losses.keys() == {"concept"} for stage in schedule.stages(config.train)):
            # such a stage once left the projection to weight decay; now it is frozen
            facts["unused"] = "frozen"
        found = epochs.found(plan)
        if config.full_fit:
            read |= values(config, "data.fit_on")
            facts["until"] = found and {key: found[key] for key in epochs.UNTIL if key in found}
        if start := origins.start(plan, origins.before_training(read, facts, steps)):
            facts["start"] = start["sha256"]
        step = cls(Inputs(plan, read, ("train", "valid"), steps, facts, ("data.cache", "data.fit_on")))
        step.epochs_of, step.start = found, start
        yield step

    @property
    def _until(self) -> Mapping[str, Any] | None:
        """Where the training ends (`epochs.UNTIL`), if another run found it."""
        return self.inputs.facts.get("until")

    @property
    def artifacts(self) -> Mapping[str, str]:
        profile = {name: name for name in (TRACE, TABLE) if (self.directory / name).is_file()}
        return {LOSSES: LOSSES, f"plots/{CURVES}": CURVES, **profile}

    @property
    def decodes(self) -> Mapping[str, int]:
        return dict.fromkeys(("train", "valid"), self.inputs.config.model.image_size)

    def build(self, work: "Work", directory: Path) -> None:
        from harness.training import compiling, plots

        config = self.inputs.config
        if not device.computes_fp32(work.kind):
            work.reporter.say(f"this {work.kind} rounds factors to fp16, whatever train.precision says")
        if compiling.chosen(config.train, work.kind) != compiling.OFF:
            compiling.keep_code_in(self.inputs.root / "cache" / "compiled")
        if self._full_fit:
            work.say(epochs.described(config.train, self.epochs_of))
        if self.start:
            work.say(origins.in_words(self.start))
        if self._new:
            work.say(f"{self._new}: new, so not in any checkpoint")
        self._fit(work, directory)
        if ranks.rank() == 0:
            plots.curves(directory / LOSSES, directory / CURVES)

    def _fit(self, work: "Work", directory: Path) -> None:
        """Train, with half the micro batch if memory does not suffice in the first steps."""
        from harness.training import train

        config, splits, validation = self.inputs.config, self._splits(work), Validation(self.inputs)
        setup = self._setup(work, directory, len(splits["train"].ids))
        with work.reporter.progress(f"Training {work.run_name}") as advance:
            log = _Log(self, work, directory, len(splits["train"].ids), validation, advance)

            def run(setup: Setup) -> "Loaded":
                training = train.Training(
                    memory.resolved(config.train, setup.micro_batch, setup.checkpointing),
                    config.data.augment,
                    lambda: self._loaded(work),
                    splits,
                    work.kind,
                    config.seed,
                    directory,
                    log,
                    lambda loaded: validation.scores(work, loaded, splits["valid"].pixels),
                    work.say,
                    self._until,
                    self._measure(work),
                    "concepts" if validation.of_concepts else "caption",
                )
                loaded = training.run()
                self.made["compile"] = training.compiler.used
                return loaded

            try:
                work.model = run(setup)
            except RuntimeError as error:
                if not device.out_of_memory(error) or log.seen > FIRST_STEPS:
                    raise
                setup = self._halved(work, directory, setup, error)
                log.speeds.clear()
                work.model = None
            if work.model is None:  # not while the error is handled, because it keeps tensors in memory
                gc.collect()
                work.model = run(setup)

    def _loaded(self, work: "Work") -> "Loaded":
        """The model as it is before the first stage."""
        from harness.models.loading import load_some

        loaded = work.load(self.inputs)
        if self.start:
            root, record = self.inputs.root, records.read(self.inputs.root / self.start["run"])
            file = records.checked(root / self.start["step"] / self.start["file"], record)
            try:
                load_some(loaded.model, file)
            except ValueError as error:
                what = f"the weights of {self.start['run']} are not of this model: {error}"
                raise UserError([Problem(what, key=origins.START)], exit_code=1) from None
        return loaded

    def _setup(self, work: "Work", directory: Path, images: int) -> Setup:
        """The set-up of the training, the same on all ranks; says the time that it takes, if known."""
        from harness.training import engine

        config, devices = self.inputs.config, ranks.world_size()
        shape = family(config.model).shape(config.model, config.train)
        half = engine.precision(config.train, work.kind) is not None
        trained, prompt = epochs.shortened(config.train, self._until), longest_prompt(config.model.prompt)
        model = shape and Model(shape, trained, work.kind, half, prompt, judges.size(config))
        free = min(ranks.every(work.free_memory()))
        try:
            picked = fit.pick(config.train, model, work.kind, devices, free, directory)
        except Unmeasured:
            picked = fit.pick(config.train, None, work.kind, devices, free, directory)
        setup, why = ranks.agree(picked)
        self._record(work, directory, setup, why)
        if model and ranks.rank() == 0:
            with contextlib.suppress(Unmeasured):
                guess = speed.training(model, images, setup, work.device, self.inputs.root)
                if guess.seconds is not None:
                    work.say(f"training steps: {guess}{self._at_most}")
                if trained.rewards:
                    guess = speed.sampling(config.model, model, images, setup, work.device, self.inputs.root)
                    work.say(f"their samples and rewards: {guess}{self._at_most}")
        return setup

    def _halved(self, work: "Work", directory: Path, setup: Setup, error: RuntimeError) -> Setup:
        """The set-up with half the micro batch; raises the error, or `UserError`, if that can't go on.

        The other ranks wait for this one in a collective, so a launch of several ranks ends.
        """
        less = fit.halved(setup)
        if less is None:
            raise error
        what = f"the {work.kind} has not enough memory for micro batches of {setup.micro_batch}"
        if ranks.world_size() > 1:
            work.say(str(error).strip())
            hint = f"Take smaller ones: --set train.micro_batch_size={less.micro_batch}"
            raise UserError([Problem(what, key=self.name, hint=hint)], exit_code=1) from error
        work.say(what)
        self._record(work, directory, less, fit.HALVED)
        return less

    def _record(self, work: "Work", directory: Path, setup: Setup, why: str) -> None:
        if memory.is_auto(self.inputs.config.train) or why == fit.HALVED:
            work.say(f"{forecast.worded(setup)}, {why}")
        if ranks.rank() == 0:
            fit.record(directory, setup, why)

    def found(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        ended = self._ended(self.directory)
        notes = [epochs.described(self.inputs.config.train, self.epochs_of)] if self._full_fit else []
        notes += [origins.in_words(self.start)] if self.start else []
        notes += patience.described(ended)
        notes += [_BY_AUTO] if memory.is_auto(self.inputs.config.train) else []
        return {
            "training": {
                **fit.recorded(self.directory),
                "best": kept(self.directory)[0],
                **({"new": self._new} if self._new else {}),
                **({"epochs_of": self.epochs_of} if self.epochs_of else {}),
                **({"start": self.start} if self.start else {}),
                **({"ended": ended} if ended else {}),
                **({"notes": notes} if notes else {}),
            }
        }

    @property
    def _new(self) -> str:
        """The modules whose weights no checkpoint has."""
        head = ["head"] if self.inputs.config.train.trains_head else []
        return " and ".join([*family(self.inputs.config.model).new(self.inputs.config.model), *head])

    def _ended(self, directory: Path) -> list[dict[str, Any]]:
        """The stages that have ended, if a validation may end them early."""
        config, file = self.inputs.config.train, directory / LOSSES
        return patience.ended(config, rows_of(file)) if self._at_most and file.is_file() else []

    @property
    def _at_most(self) -> str:
        return "" if self._full_fit else patience.at_most(self.inputs.config.train)

    @property
    def _full_fit(self) -> bool:
        return "valid" in self.inputs.config.data.fit_on

    def _examples(self) -> list[Example]:
        """The rows that are trained on, in the order of the training split."""
        if not self._full_fit:
            return self.inputs.data.readable("train")
        fit_on = [e for name in self.inputs.config.data.fit_on for e in self.inputs.data.readable(name)]
        return [example for example in fit_on if example.trains]

    def _splits(self, work: "Work") -> dict[str, "train.Split"]:
        """What is trained on, as `train`, and what is validated on, as `valid`, if anything is."""
        if not self._full_fit:
            return {name: self._split(work, name) for name in ("train", "valid")}
        from harness.training.joined import joined

        fit_on = {name: self._split(work, name) for name in self.inputs.config.data.fit_on}
        used = {
            name: [i for i, example in enumerate(self.inputs.data.readable(name)) if example.trains]
            for name in fit_on
        }
        return {"train": joined([(split, used[name]) for name, split in fit_on.items()])}

    def _split(self, work: "Work", name: str) -> "train.Split":
        """The images of a split with their texts, encoded, and with their labels."""
        from harness.training import train

        examples, side = self.inputs.data.readable(name), self.inputs.config.model.image_size
        captions, concepts = self._texts(name, examples)
        pixels = work.pixels(self.inputs, name, side)
        return train.Split([e.id for e in examples], pixels, captions, concepts, self._labelled(examples))

    def _labelled(self, examples: Sequence[Example]) -> list[list[int]]:
        """The concepts of each image that the head predicts, by their numbers; none without a head."""
        if not self.inputs.config.train.trains_head:
            return []
        number = {cui: place for place, cui in enumerate(labels(self.inputs))}
        return [[number[cui] for cui in set(e.cuis) & number.keys()] for e in examples]

    def _texts(self, name: str, examples: Sequence[Example]) -> "tuple[list[Text], list[Text | None]]":
        """Captions and concept sentences of a split; a family without texts gets empty ones."""
        from harness.models.text import Text

        model, most = self.inputs.config.model, self.inputs.config.train.max_caption_tokens
        codecs = family(model).codecs(model, base(self.inputs), most)
        if codecs is None:
            return [Text([0], 1)] * len(examples), [None] * len(examples)
        (caption, concept), pairs = codecs, texts(self.inputs, name)
        prompts = prompts_of(self.inputs, name, caption)
        captions = [caption.encode(text, own) for (_, text), own in zip(pairs, prompts, strict=True)]
        for i, example in enumerate(examples):
            if not example.trains:  # all tokens become prompt, which has no loss
                captions[i] = Text(captions[i].ids, len(captions[i].ids))
        return captions, [concept.encode(sentence) if sentence else None for sentence, _ in pairs]

    def _measure(self, work: "Work") -> "Measure | None":
        """How the loss `reward` measures captions of training images; None if no stage has it."""
        config = self.inputs.config
        if not judges.needed(config):
            return None
        examples = self._examples()
        documents = Documents([e.caption for e in self.inputs.data.examples("train") if e.caption])

        def measure(
            reward: Mapping[str, float], pairs: Sequence[tuple[int, str]]
        ) -> tuple[dict[str, float], dict[str, "np.ndarray"]]:
            score, weights = with_standins(config.score, self.inputs), mixture(reward, config.edition)
            utility = Utility(weights, score, config.edition, work.scoring_device, documents)
            utility.needed_by = "the loss reward"
            own = [examples[image] for image, _ in pairs]
            captions, references = [text for _, text in pairs], [example.caption or "" for example in own]
            return weights, utility.each(captions, references, [example.image for example in own])

        return measure


class _Log:
    """Tells the progress, the scores and the time left, from the rows of `losses.jsonl`."""

    def __init__(
        self,
        step: Train,
        work: "Work",
        directory: Path,
        images: int,
        validation: Validation,
        advance: Callable[[int, int, str], None],
    ) -> None:
        self.step, self.work, self.directory, self.images = step, work, directory, images
        self.validation, self.advance = validation, advance
        self.seen, self.speeds = 0, []
        self.config = step.inputs.config.train
        shortened = epochs.shortened(self.config, step._until)
        self.steps = schedule.total_steps(shortened, images, patience.saved(step._ended(directory)))

    def __call__(self, row: "train.Row") -> None:
        if not self.seen and (before := row["step"] - ("loss" in row)):
            self.work.say(f"resumed at step {before} of {self.steps}")
        self.seen += 1
        if "loss" in row and len(self.speeds) < FIRST_STEPS:
            self._time(row)
        self.advance(row["step"], self.steps, "" if "valid_loss" in row else self._note(row))
        if "valid_loss" in row:
            where = f"stage {row['stage']}, epoch {row['epoch']:.4g}, step {row['step']} of {self.steps}"
            self.work.say(f"{where}: {self.validation.note(row)}")
            self._shorten(row)
        if PRIMARY in row and self.work.watch:
            self.work.watch(row)

    def _note(self, row: "train.Row") -> str:
        speed = row.get("images_per_second")
        return self.validation.note(row) + (f"  {speed:.3g} images/s" if speed else "")

    def _time(self, row: "train.Row") -> None:
        self.speeds.append(row["images_per_second"])
        if len(self.speeds) == FIRST_STEPS:
            left = speed.remaining(self.speeds, (self.steps - row["step"]) * self.config.batch_size)
            self.work.say(f"training steps that are left: {left}{self.step._at_most}")

    def _shorten(self, row: "train.Row") -> None:
        """Count fewer steps if this validation ended its stage, and say so."""
        ended = self.step._ended(self.directory)
        # rank 0 writes, so a rank ahead of it does not know yet
        if ended and ended[-1]["stage"] == row["stage"]:
            self.steps = schedule.total_steps(self.config, self.images, patience.saved(ended))
            for text in patience.described(ended[-1:]):
                self.work.say(text)


def _written(config: TrainConfig) -> dict[str, Any]:
    """The part of `train:` that determines the result."""
    written = config.model_dump(exclude={*INDIFFERENT, "epochs_of", "start_from"})  # facts have what is named
    for key, default in _LATER.items():
        if written[key] == default:
            del written[key]
    for stage in written["stages"]:  # without keys at their defaults, so that earlier trainings are found
        later = {"reward": None, "schedule": "cosine", "start": "last", "validations_per_epoch": 1}
        for key in [key for key, default in later.items() if stage[key] == default]:
            del stage[key]
        for name in ("reward", "concepts"):
            if not stage["losses"][name]:
                del stage["losses"][name]
    return written | {key: value for key, value in _AUTO_IS.items() if written[key] == AUTO}
