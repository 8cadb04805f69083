"""How each step is built: the one room that brings model, data, metrics and post-processing together."""

import contextlib
import gc
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import metrics
from harness.captions import PREDICTIONS, read_captions, write_captions
from harness.config.editions import EDITIONS
from harness.config.schema import TINY, PredictConfig, ScoreConfig
from harness.decoding import postprocess
from harness.errors import Problem, UserError
from harness.machine import device, ranks
from harness.models import checkpoints, family
from harness.plan import Plan, Reporter, primary_metric
from harness.store import damage_of, fingerprint, finite, write, write_json

if TYPE_CHECKING:
    from harness.models.loading import Loaded


SHARED = ("train", "predict", "score")
"""The steps that all ranks work at."""
SCORED = ("scores.json", "per_image.csv", "arrays.npz", "caption_lengths.png")
"""What a score step leaves."""
LESS_MEMORY = (
    "Other processes may have it. `python -m harness doctor EXPERIMENT` says what training needs, and with "
    "what it needs less; captioning does with a lower predict.batch_size. The same command goes on."
)
Watch = Callable[[Mapping[str, Any]], None]
"""Hears of every validation of a training, on every rank; may raise `Pruned` on all."""


class Builder:
    """Builds steps; holds the model between training and prediction."""

    def __init__(self, plan: Plan, reporter: Reporter, watch: Watch | None = None) -> None:
        self.plan, self.config, self.data, self.reporter = plan, plan.config, plan.data, reporter
        self.watch = watch
        self.kind = device.probe(plan.config.device).kind
        self._model: Loaded | None = None

    def build(self, name: str, directory: Path) -> bool:
        """Build a step into its directory; False where something is absent that another try may give.

        Every rank of a launch calls this; they share training, captioning and scoring, rank 0 does the rest.
        """
        kind, _, part = name.partition("-")
        builders: dict[str, Callable[[], bool | None]] = {
            "tiny": lambda: self._tiny(directory),
            "standin": lambda: self._standin(part, directory),
            "train": lambda: self._train(directory),
            "predict": lambda: self._predict(part, directory),
            "postprocess": lambda: self._postprocess(part, directory),
            "score": lambda: self._score(part, directory),
        }
        if ranks.rank() and kind not in SHARED:
            return True
        self.reporter.say(f"{self.config.run_name}: {name}")
        try:
            return builders[kind]() is not False
        except RuntimeError as error:
            if not device.out_of_memory(error):
                raise
            self.reporter.say(f"{self.config.run_name}: {str(error).strip()}")
            what = f"the {self.kind} has not enough memory for this step"
            raise UserError([Problem(what, key=name, hint=LESS_MEMORY)], exit_code=1) from error

    def _pixels(self, split: str, size: int | None = None) -> Any:
        """The readable images of a split as uint8 (N, S, S, 3), S the model's image size or another."""
        from harness.data.images import open_pixels

        cache = self.plan.root / "cache" if self.config.data.cache else None
        with self.reporter.progress(f"Decoding {split} images") as advance:
            size = size or self.config.model.image_size
            return open_pixels(self.data.readable(split), size, cache, progress=advance)

    def _texts(self, split: str) -> list[tuple[str | None, str]]:
        """(concept sentence or None, caption) of each readable image, as the model sees them."""
        from harness.models.text import clean_caption, concept_sentence

        how, most = self.config.train.caption_cleaning, self.config.train.max_words
        names = self.data.concept_names
        return [
            (
                concept_sentence([names.get(cui, cui) for cui in example.cuis]) if example.cuis else None,
                clean_caption(example.caption or "", how, most),
            )
            for example in self.data.readable(split)
        ]

    def _tiny(self, directory: Path) -> None:
        import numpy as np

        from harness.models import tiny

        sizes, examples = self.config.model.tiny, self.data.splits["train"]
        names = sorted({cui for example in examples for cui in example.cuis})
        concepts = np.array([[cui in example.cuis for cui in names] for example in examples])
        with self.reporter.progress("Pre-training the tiny model") as advance:
            tiny.build(
                sizes,
                [(sentence or "", caption) for sentence, caption in self._texts("train")],
                self._pixels("train", tiny.image_side(sizes)),
                concepts,
                self.config.data.augment,
                self.config.model.prompt,
                directory,
                advance,
            )

    def _standin(self, metric: str, directory: Path) -> None:
        examples = self.data.splits["train"]
        images = [example.image for example in examples]
        standin = metrics.all_weights()[metric].standin
        standin.build(images, [example.caption for example in examples], directory)

    @property
    def _checkpoint(self) -> Path:
        name = self.config.model.checkpoint
        return self.plan.directory("tiny") if name == TINY else checkpoints.find(name).folder

    def _load(self) -> "Loaded":
        from harness.training import engine

        self._unload_metrics()
        gc.collect()  # the model of an earlier run, whose parts refer to each other in circles
        model, config = self.config.model, self.config.train
        dtype = engine.frozen_dtype(config, self.kind)
        return family(model).load(model, config, self._checkpoint, dtype)

    def _unload_metrics(self) -> None:
        """Take the metrics' models from a device that the captioner needs for itself."""
        if self.kind != "cpu":
            metrics.unload()
            gc.collect()

    def _train(self, directory: Path) -> None:
        from harness.models.text import Text
        from harness.training import plots, schedule, train

        most = self.config.train.max_caption_tokens
        model = self.config.model
        caption, concept = family(model).codecs(model, self._checkpoint, most)

        def split(name: str) -> train.Split:
            pairs = self._texts(name)
            concepts: list[Text | None] = [concept.encode(s) if s else None for s, _ in pairs]
            captions = [caption.encode(text) for _, text in pairs]
            examples = self.data.readable(name)
            for i, example in enumerate(examples):
                if not example.trains:  # its tokens count in no loss
                    captions[i] = Text(captions[i].ids, len(captions[i].ids))
            return train.Split([e.id for e in examples], self._pixels(name), captions, concepts)

        if not device.computes_fp32(self.kind):
            self.reporter.say(f"this {self.kind} rounds to fp16 what it multiplies, whatever the precision")
        splits = {"train": split("train"), "valid": split("valid")}
        steps = schedule.total_steps(self.config.train, len(splits["train"].ids))
        with self.reporter.progress(f"Training {self.config.variant}") as advance:

            def log(row: train.Row) -> None:
                advance(row["step"], steps, _note(row))
                if "valid_loss" in row:
                    where = f"stage {row['stage']}, epoch {row['epoch']}, step {row['step']} of {steps}"
                    self.reporter.say(f"{self.config.run_name}: {where}: {_note(row)}")
                if train.PRIMARY in row and self.watch:
                    self.watch(row)

            self._model = train.Training(
                self.config.train,
                self.config.data.augment,
                self._load,
                splits,
                self.kind,
                self.config.seed,
                directory,
                log,
                lambda loaded: self._validate(loaded, splits["valid"].pixels),
            ).run()
        if ranks.rank() == 0:
            plots.curves(directory / train.LOSSES, directory / "curves.png")

    def _validate(self, loaded: "Loaded", pixels: Any) -> dict[str, float]:
        """Scores of the model as it is, on the images that the config sets aside for choosing the best.

        Decoded greedily whatever `predict` says, so that a study of decoding trains once.
        """
        import numpy as np

        from harness.decoding import predict
        from harness.training import train

        examples = self.data.readable("valid")
        fit = np.flatnonzero([example.trains for example in examples])
        count = min(self.config.train.evaluate_images, len(fit))
        chosen = np.sort(fit[np.random.default_rng(0).permutation(len(fit))[:count]])
        greedy = PredictConfig(num_beams=1, max_new_tokens=self.config.train.max_caption_tokens)
        captions = ranks.gather(predict.captions(loaded, pixels, ranks.share(chosen), greedy))
        primary = primary_metric(self.config)
        parts = EDITIONS[self.config.edition].parts(primary)
        settings = self._with_standins().model_copy(update={"metrics": (*parts, "rouge1"), "bootstrap": 0})
        references = [examples[i].caption for i in chosen]
        images = [examples[i].image for i in chosen]
        scores, _ = metrics.score(
            captions, references, images, settings, self.config.edition, self._torch_device
        )
        self._unload_metrics()
        if ranks.rank():
            return {}
        row = {f"valid_{name}": score.value for name, score in scores.items() if score.value is not None}
        if f"valid_{primary}" not in row:
            raise UserError(
                f"{primary} chooses the best checkpoint, and {scores[primary].reason}", exit_code=1
            )
        return row | {train.PRIMARY: row[f"valid_{primary}"]}

    @property
    def _torch_device(self) -> str:
        return device.scoring_device(self.kind)

    def _trained(self) -> "Loaded":
        if self._model is None:
            from harness.models.loading import load_trained
            from harness.training import engine, train

            self._model = self._load()
            load_trained(self._model.model, self.plan.directory("train") / train.BEST)
            engine.place(self._model.model, self.config.train, self.kind)
        return self._model

    def _predict(self, split: str, directory: Path) -> None:
        from harness.decoding import predict

        ids = [example.id for example in self.data.splits[split]]
        given = self._given(split)
        with self.reporter.progress(f"Captioning {split}") as advance:
            predict.predict_split(
                self._trained(), ids, self._pixels(split), self.config.predict, directory, advance, given
            )

    def _given(self, split: str) -> dict[str, str]:
        """The captions of images that can't be read, by id."""
        given = self.plan.fallback.get(split)
        return dict.fromkeys(given["ids"], given["caption"]) if given else {}

    def _postprocess(self, split: str, directory: Path) -> None:
        before = read_captions(self.plan.directory(f"predict-{split}") / PREDICTIONS)
        after = {i: postprocess.postprocess(text, self.config.postprocess) for i, text in before.items()}
        write_captions(directory / PREDICTIONS, after | self._given(split))

    def _score(self, stage: str, directory: Path) -> bool:
        """Score captions, or take the scores of the same captions from the step that has them."""
        self._model = None  # the neural metrics want its memory
        gc.collect()
        source = self.plan.directory("predict-valid" if stage == "before" else "postprocess-valid")
        inputs = dict(self.plan.inputs[f"score-{stage}"])
        inputs["captions"] = (source / PREDICTIONS).read_bytes().decode()  # line breaks as they are
        inputs["training"] = self.data.fingerprints["train"]  # the constant caption comes from it
        index = self.plan.root / "cache" / "scored" / fingerprint(inputs)
        with self._alone(index):
            if earlier := ranks.agree(self._scored(index, directory)):
                self.reporter.say(f"{self.config.run_name}: the same captions were scored before")
                if ranks.rank() == 0:
                    for name in SCORED:
                        shutil.copyfile(earlier / name, directory / name)
                return True
            complete = self._compute_scores(source / PREDICTIONS, directory)
            if complete and ranks.rank() == 0:
                write(index, directory.name)
        return complete

    def _scored(self, index: Path, directory: Path) -> Path | None:
        """The other step that an entry of the index names, if it is there and whole."""
        name = index.read_bytes().decode(errors="replace") if index.is_file() else ""
        if name == directory.name or not re.fullmatch("score-[0-9a-f]{12}", name):
            return None
        earlier = self.plan.root / "steps" / name
        whole = all((earlier / file).is_file() and not damage_of(earlier / file) for file in SCORED)
        return earlier if whole else None

    @contextlib.contextmanager
    def _alone(self, index: Path) -> Iterator[None]:
        """Keep other processes from scoring the same captions meanwhile."""
        from filelock import FileLock

        if ranks.rank():
            yield
            return
        index.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(index.with_suffix(".lock")):
            yield

    def _compute_scores(self, captions: Path, directory: Path) -> bool:
        from harness.training import plots

        found = read_captions(captions)
        examples = [example for example in self.data.splits["valid"] if example.caption is not None]
        ids = [example.id for example in examples]
        predictions = [found[example.id] for example in examples]
        references = [example.caption for example in examples]
        settings = self._with_standins()
        self.reporter.say(f"{self.config.run_name}: scoring {len(predictions)} captions")
        images = [None if example.damage else example.image for example in examples]
        how = (settings, self.config.edition, self._torch_device, self.plan.root / "cache")
        scores, warnings = metrics.score(predictions, references, images, *how, ids=ids)
        training = [example.caption for example in self.data.splits["train"]]
        baseline = metrics.constant_baseline(training, references, *how)
        gap = metrics.image_gap(predictions, references, *how)
        if ranks.rank():
            return True
        baseline["standin"] = [n for n, s in scores.items() if n in baseline and not s.official]
        result = {
            "scores": {name: score.as_dict() for name, score in scores.items()},
            "image_gap": gap,
            "baseline": baseline,
            "warnings": warnings,
            "references": metrics.references_fingerprint(ids, references),
        }
        metrics.write_per_image(directory / "per_image.csv", ids, references, predictions, scores)
        metrics.write_arrays(directory / "arrays.npz", ids, scores)
        plots.caption_lengths(predictions, references, directory / "caption_lengths.png")
        write_json(directory / "scores.json", finite(result))
        return all(score.value is not None for score in scores.values())

    def _with_standins(self) -> ScoreConfig:
        config = self.config.score
        for metric in self.plan.standins:
            folder = str(self.plan.directory(f"standin-{metric}"))
            config = metrics.all_weights()[metric].renamed(config, folder)
        return config


def _note(row: Mapping[str, Any]) -> str:
    shown = [n for n in row if n == "loss" or (n.startswith("valid_") and n != "valid_primary")]
    return "  ".join(f"{name} {row[name]:.4f}" for name in shown)
