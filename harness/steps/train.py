"""Fine-tuning in the stages of `train:`, with the validation that chooses the best weights."""

import contextlib
import gc
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import metrics, records
from harness.concepts.labels import labels_of
from harness.config.editions import EDITIONS
from harness.config.sections import AUTO, PredictConfig
from harness.data.halves import TUNE, half
from harness.data.readers import Example
from harness.decoding.consensus import Utility, mixture
from harness.errors import Problem, UserError
from harness.machine import device, ranks
from harness.metrics.base import Documents
from harness.metrics.settings import ScoreConfig
from harness.models import checkpoints, family
from harness.models.base import PARTS
from harness.models.measured import Unmeasured
from harness.models.settings import longest_prompt
from harness.steps import epochs, origins
from harness.steps.base import Step
from harness.steps.inputs import Inputs, values
from harness.steps.prompts import prompts_in, prompts_of
from harness.steps.standin import Standin, trained_here, with_standins
from harness.steps.work import HEAD, base, labels, texts
from harness.store import fingerprint
from harness.training import fit, forecast, judges, memory, patience, speed
from harness.training.memory import Model, Setup
from harness.training.profile import TABLE, TRACE
from harness.training.resume import EMA, FLOOR, LOSSES, PRIMARY, VALIDATION, kept, rows_of
from harness.training.settings import IMAGE_GAP, TrainConfig

if TYPE_CHECKING:
    import numpy as np

    from harness.config.schema import Config
    from harness.models.loading import Loaded
    from harness.models.text import Text
    from harness.steps.plan import Plan
    from harness.steps.work import Work
    from harness.training import train
    from harness.training.selfcritical import Measure

INDIFFERENT = ("compile", "zero_stage", "offload", "checkpoint_every_steps", "keep_checkpoints", "profile")
"""Keys of `train` that do not affect the result, except by rounding."""
# Like the number of ranks, these two affect only the draws of dropout and rounding. So auto stands for the
# recipe's values from before there was auto, and trainings made with them are found.
_AUTO_IS = {"micro_batch_size": 16, "gradient_checkpointing": True}
_LATER = {
    **{"ema": None, "keep_best": 1, "patience": 0},
    **{"train_language": False, "learning_rates": dict.fromkeys(PARTS)},
}
"""Keys that are left out at their defaults, so trainings from before there were these keys are found."""
CURVES = "curves.png"
CONCEPT_F1 = "concept_f1"
"""What chooses weights that predict concepts; see `training.detection`."""
_RESAMPLES = 1000  # of the intervals that may end a self-critical stage
FIRST_STEPS = 20
"""Steps of a process in which lack of memory halves the micro batch; after them it says the time left."""


class Train(Step):
    """Writes the best weights, and losses and validation scores in `losses.jsonl`."""

    kind, version, shared = "train", 3, True
    section = ("train", TrainConfig, TrainConfig())
    starred: Set[str] = frozenset()
    """The validation scores that are not official."""
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
        from harness.training import compiling, plots, schedule, train

        config = self.inputs.config
        if not device.computes_fp32(work.kind):
            work.reporter.say(f"this {work.kind} rounds factors to fp16, whatever train.precision says")
        if compiling.chosen(config.train, work.kind) != compiling.OFF:
            compiling.keep_code_in(self.inputs.root / "cache" / "compiled")
        if self._full_fit:
            work.say(epochs.told(config.train, self.epochs_of))
        if self.start:
            work.say(origins.told(self.start))
        if self._new:
            work.say(f"{self._new}: new, so not in any checkpoint")
        splits = self._splits(work)
        images, trained = len(splits["train"].ids), epochs.shortened(config.train, self._until)
        steps = schedule.total_steps(trained, images, patience.saved(self._ended(directory)))
        setup, seen, speeds = self._setup(work, directory, images), 0, []
        with work.reporter.progress(f"Training {work.run_name}") as advance:

            def log(row: train.Row) -> None:
                nonlocal seen, steps
                seen += 1
                if "loss" in row and len(speeds) < FIRST_STEPS:
                    speeds.append(row["images_per_second"])
                    if len(speeds) == FIRST_STEPS:
                        left = speed.remaining(speeds, (steps - row["step"]) * config.train.batch_size)
                        work.say(f"training steps that are left: {left}{self._at_most}")
                advance(row["step"], steps, self._note(row))
                if "valid_loss" in row:
                    where = f"stage {row['stage']}, epoch {row['epoch']:.4g}, step {row['step']} of {steps}"
                    work.say(f"{where}: {self._note(row)}")
                ended = self._ended(directory) if "valid_loss" in row else []
                # rank 0 writes, so a rank ahead of it does not know yet
                if ended and ended[-1]["stage"] == row["stage"]:
                    steps = schedule.total_steps(config.train, images, patience.saved(ended))
                    for text in patience.told(ended[-1:]):
                        work.say(text)
                if PRIMARY in row and work.watch:
                    work.watch(row)

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
                    lambda loaded: self.validate(work, loaded, splits["valid"].pixels),
                    work.say,
                    self._until,
                    self._measure(work),
                    "concepts" if self._detects else "caption",
                )
                loaded = training.run()
                self.made["compile"] = training.compiler.used
                return loaded

            try:
                work.model = run(setup)
            except RuntimeError as error:
                if not device.out_of_memory(error) or seen > FIRST_STEPS:
                    raise
                setup = self._halved(work, directory, setup, error)
                speeds.clear()
                work.model = None
            if work.model is None:  # not while the error is handled, because it keeps tensors in memory
                gc.collect()
                work.model = run(setup)
        if ranks.rank() == 0:
            plots.curves(directory / LOSSES, directory / CURVES)

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
                    how = (config.model, model, images, setup, work.device, self.inputs.root)
                    work.say(f"their samples and rewards: {speed.sampling(*how)}{self._at_most}")
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
        notes = [epochs.told(self.inputs.config.train, self.epochs_of)] if self._full_fit else []
        notes += [origins.told(self.start)] if self.start else []
        notes += patience.told(ended)
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

    @property
    def _detects(self) -> bool:
        """Whether the run predicts concepts and no captions."""
        return self.inputs.facts["primary"] == CONCEPT_F1

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

    def validate(self, work: "Work", loaded: "Loaded", pixels: Any) -> dict[str, float]:
        """Score the current model on validation images.

        Captions are always decoded greedily, whatever `predict` says, so a study of decoding trains once.
        """
        config, examples = self.inputs.config, self.inputs.data.readable("valid")
        chosen = self._validated_on(examples)
        found = self._detected(loaded, pixels, chosen) if config.train.trains_head else {}
        if self._detects:
            return found | {PRIMARY: found[f"valid_{CONCEPT_F1}"]} if found else {}
        names, watched = judges.needed(config), judges.watched(config.train)
        scores, captions = greedy_scores(
            self.inputs, work, loaded, pixels, chosen, names, _RESAMPLES if watched else 0
        )
        if ranks.rank():
            return {}
        floors = self._floors(scores, captions, [examples[i].caption for i in chosen])
        return self._row(scores) | floors | found

    def _validated_on(self, examples: Sequence[Example]) -> "np.ndarray":
        """The places of the images that choose weights: of valid, `train.evaluate_images` at random.

        For concepts, all of the half `tune`, so that scores on the half `held` are of unseen images.
        """
        import numpy as np

        if self._detects:
            tune = np.flatnonzero([half(example.id) == TUNE for example in examples])
            return tune if len(tune) else np.arange(len(examples))
        fit = np.flatnonzero([example.trains for example in examples])
        count = min(self.inputs.config.train.evaluate_images, len(fit))
        return np.sort(fit[np.random.default_rng(0).permutation(len(fit))[:count]])

    def _detected(self, loaded: "Loaded", pixels: Any, chosen: Sequence[int]) -> dict[str, float]:
        """The F1 of the concepts that the head predicts for these validation images, on rank 0."""
        import numpy as np

        from harness.models import head
        from harness.training.detection import best_f1

        examples, own = self.inputs.data.readable("valid"), labels(self.inputs)
        found = ranks.gather(list(head.probabilities(loaded, pixels, ranks.share(chosen))))
        if ranks.rank():
            return {}
        return {f"valid_{CONCEPT_F1}": best_f1(np.stack(found), own, [examples[i].cuis for i in chosen])}

    def _floors(
        self, scores: Mapping[str, metrics.Score], captions: Sequence[str], references: Sequence[str]
    ) -> dict[str, float]:
        """The floors that these scores set for a self-critical stage, and the image gap if it has one."""
        config, names = self.inputs.config, judges.watched(self.inputs.config.train)
        row = {f"{FLOOR}{name}": scores[name].low for name in names if name in scores}
        if IMAGE_GAP in names:
            resampled = config.score.model_copy(update={"bootstrap": _RESAMPLES})
            gaps = metrics.image_gap(captions, references, resampled, config.edition, names=["rouge1"])
            row |= {f"valid_{IMAGE_GAP}": gaps["rouge1"].get("gap")}
            row |= {f"{FLOOR}{IMAGE_GAP}": gaps["rouge1"].get("low")}
        return {name: value for name, value in row.items() if value is not None}

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

    def _row(self, scores: Mapping[str, metrics.Score]) -> dict[str, float]:
        primary = self.inputs.facts["primary"]
        row = {f"valid_{name}": score.value for name, score in scores.items() if score.value is not None}
        if f"valid_{primary}" not in row:
            what = f"{primary} must choose the best checkpoint, but is absent: {scores[primary].reason}"
            raise UserError(what, exit_code=1)
        self.starred = {f"valid_{name}" for name, score in scores.items() if not score.official}
        return row | {PRIMARY: row[f"valid_{primary}"]}

    def _note(self, row: Mapping[str, Any]) -> str:
        """The losses and scores of a row of `losses.jsonl`, with a star on a score that is not official."""
        shown = [n for n in row if n == "loss" or (n.startswith(VALIDATION) and not n.endswith("_primary"))]
        starred = {name for name in shown if name.removeprefix(EMA) in self.starred}
        return "  ".join(f"{name} {row[name]:.4f}{'*' * (name in starred)}" for name in shown)


def greedy_scores(
    inputs: Inputs,
    work: "Work",
    loaded: "Loaded",
    pixels: Any,
    chosen: Sequence[int],
    names: Sequence[str] = (),
    resamples: int = 0,
) -> tuple[dict[str, metrics.Score], list[str]]:
    """Scores of greedy captions of these validation images, and the captions, on every rank.

    Each rank captions its share. `names` are metrics besides those that choose weights.
    """
    from harness.decoding import predict

    config, examples = inputs.config, inputs.data.readable("valid")
    greedy = PredictConfig(num_beams=1, max_new_tokens=config.train.max_caption_tokens)
    prompts = prompts_of(inputs, "valid", loaded.caption)
    captions = ranks.gather(predict.captions(loaded, pixels, ranks.share(chosen), greedy, prompts))
    parts = EDITIONS[config.edition].parts(inputs.facts["primary"])
    wanted = {"metrics": tuple(dict.fromkeys((*parts, "rouge1", *names))), "bootstrap": resamples}
    settings = with_standins(config.score, inputs).model_copy(update=wanted)
    references = [examples[i].caption for i in chosen]
    images = [examples[i].image for i in chosen]
    scores = metrics.score(captions, references, images, settings, config.edition, work.scoring_device)[0]
    work.unload_metrics()
    return scores, captions


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


def model_of(plan: "Plan") -> dict[str, Any]:
    """The part of `model:` that determines the output of steps that load the model."""
    return {"model": family(plan.config.model).settings(plan.config.model)}


def contents_of(plan: "Plan") -> list[Any]:
    """Key, name and file contents of each checkpoint; contents distinguish checkpoints of the same name."""
    named = family(plan.config.model).checkpoints(plan.config.model)
    found = [(key, name, checkpoints.find(name)) for key, name in named.items()]
    cache = plan.root / "cache"
    return [[key, name, place and checkpoints.contents(place.folder, cache)] for key, name, place in found]


def primary_metric(config: "Config") -> str:
    """The score that chooses the best checkpoint: the edition's primary score, or BERTScore.

    It is BERTScore if a part of the primary score is not among the metrics or lacks weights.
    """
    edition = EDITIONS[config.edition]
    if edition.primary is None:
        return "bertscore"
    lacking = any(metrics.is_absent(part, config.score) for part in edition.parts(edition.primary))
    return "bertscore" if lacking else edition.primary


def choosing(config: "Config") -> ScoreConfig:
    """The score config of training, with only the metrics that choose the best weights, reward or watch."""
    parts = EDITIONS[config.edition].parts(primary_metric(config))
    return config.score.model_copy(update={"metrics": tuple(dict.fromkeys((*parts, *judges.needed(config))))})


def validating(
    plan: "Plan", before: Mapping[str, Step]
) -> tuple[dict[str, Any], dict[Step, Sequence[str] | None], dict[str, Any]]:
    """What a step declares that chooses weights: parts of the config, earlier steps, and facts.

    With a head, these are also its settings and its labels.
    """
    config, only = plan.config, choosing(plan.config)
    read, facts = model_of(plan), {"checkpoints": contents_of(plan)}
    if config.train.trains_head:
        read |= values(config, "concepts.min_images", HEAD)
        found = labels_of(plan.data.readable("train"), config.concepts.min_images)
        facts["labels"] = [len(found), fingerprint(found)]
    if not config.captions:
        tiny = {step: None for name, step in before.items() if name == "tiny"}
        return read, tiny, facts | {"primary": CONCEPT_F1}
    read["score"], read["edition"] = scoring_of(config, only.metrics, primary_metric(config))
    names = {"tiny", *(f"{Standin.kind}-{section}" for section in trained_here(only))}
    steps: dict[Step, Sequence[str] | None] = {step: None for name, step in before.items() if name in names}
    facts |= {
        "primary": primary_metric(config),
        "weights": metrics.identities_of(only, plan.root / "cache"),
    }
    return read, steps, facts


def scoring_of(
    config: "Config", names: Sequence[str], mean: str | None = None
) -> tuple[dict[str, Any], list[Any]]:
    """The parts of `score:` and of the edition that affect metrics, and their `mean` if it is given."""
    edition, only = EDITIONS[config.edition], config.score.model_copy(update={"metrics": tuple(names)})
    sections = {"precision", *metrics.weights_of(only)}
    settings = {key: value for key, value in only.model_dump().items() if key in sections}
    return settings, [edition.rules, edition.aggregates if mean in edition.aggregates else None]
