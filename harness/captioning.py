"""Captions of any images by the models of a finished run, decoded and post-processed as the run does it."""

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from harness import metrics, records, store
from harness.config.schema import Config
from harness.data import Dataset, fraction, load
from harness.data.given import Found, Given
from harness.data.images import Whole, open_pixels
from harness.decoding import consensus
from harness.decoding.postprocess import postprocess
from harness.errors import Problem, UserError
from harness.machine import device
from harness.metrics.base import Documents
from harness.models import family
from harness.pages import filled
from harness.records.files import CANDIDATES, PREDICTIONS, Candidate, read_candidates
from harness.report.gallery import pictures
from harness.report.sources import Images
from harness.steps import STEPS
from harness.steps.consensus import Consensus
from harness.steps.postprocess import Postprocess
from harness.steps.predict import Predict
from harness.steps.retrieve import Retrieve
from harness.steps.standin import trained_here
from harness.steps.validating import primary_metric
from harness.store import fingerprint
from harness.training import engine, finished

if TYPE_CHECKING:
    from harness.metrics.settings import ScoreConfig
    from harness.steps.work import Reporter

_OWN = "own"
_KNOWN = (Predict, Retrieve, Consensus, Postprocess)
"""The steps that leave captions and that are done here, or refused, for other images."""
_LESS_MEMORY = "Give --batch-size a smaller number, or use --device cpu; then the same command continues."


@dataclass(frozen=True)
class Captioner:
    """Captions images as the run in `folder` captions a split; `of` makes it."""

    folder: Path
    record: Mapping[str, Any]
    config: Config
    members: tuple["Captioner", ...]
    """The captioners of the runs in `consensus.runs`."""

    @property
    def name(self) -> str:
        """The name of the run with that of its experiment."""
        return records.full_name(self.record)

    @property
    def remarks(self) -> Iterator[str]:
        """What readers of the captions must know: a stand-in model, or a quick look at the data."""
        if self.record["standin_model"]:
            yield f"STAND-IN: {self.name} has a stand-in model; its captions are for trying things out only"
        if share := fraction.looked(self.record):
            yield f"{self.name} is a quick look at {share}"

    def fingerprint(self, images: Sequence[Given]) -> str:
        """What determines the captions of these images: the run's steps, its config, and the files."""
        states = [(one.file, one.file.stat()) for one in images]
        files = [[str(file.resolve()), state.st_size, state.st_mtime_ns] for file, state in states]
        steps = [one.record["steps"] for one in (self, *self.members)]
        return fingerprint([steps, self.record["config"], [one.id for one in images], files])

    def captions(self, images: Sequence[Given], work: Path, reporter: "Reporter") -> dict[str, str]:
        """The caption of each image by id, after post-processing.

        `work` is a folder for captions that are done; a call after an interruption continues from them.
        """
        raw = self._raw(images, work, reporter)
        return {image: postprocess(text, self.config.postprocess) for image, text in raw.items()}

    def _raw(self, images: Sequence[Given], work: Path, reporter: "Reporter") -> dict[str, str]:
        """The captions before post-processing."""
        if self.config.consensus is None:
            return {image: found[0].caption for image, found in self._decoded(images, work, reporter).items()}
        sources = [(_OWN, self.config.consensus.own, self._decoded)] if self.config.has_model else []
        weights = [source.weight for source in self.config.consensus.runs]
        sources += [(m.name, w, m._candidates) for m, w in zip(self.members, weights, strict=True)]
        found = [(name, weight, given(images, work, reporter)) for name, weight, given in sources]
        candidates = {
            one.id: [c for name, weight, by in found for c in consensus.of_source(by[one.id], name, weight)]
            for one in images
        }
        utility, seen = self._utility(), {one.id: one.image for one in images}
        chosen = {}
        with reporter.progress("Comparing captions") as advance:
            for image, choice in consensus.choose(candidates, utility, seen):
                chosen[image] = choice.candidate.caption
                advance(len(chosen), len(candidates))
        return chosen

    def _candidates(
        self, images: Sequence[Given], work: Path, reporter: "Reporter"
    ) -> Mapping[str, Sequence[Candidate]]:
        """What another run's consensus takes from this one; see `records.candidates_file`."""
        if self.config.has_model and self.config.predict.has_candidates:
            return self._decoded(images, work, reporter)
        return {image: [Candidate(text)] for image, text in self._raw(images, work, reporter).items()}

    def _decoded(
        self, images: Sequence[Given], work: Path, reporter: "Reporter"
    ) -> Mapping[str, Sequence[Candidate]]:
        """The candidates of the run's own model, best beam first."""
        place = work / fingerprint(self.name)
        file = place / (CANDIDATES if self.config.predict.has_candidates else PREDICTIONS)
        if not file.is_file():
            place.mkdir(parents=True, exist_ok=True)
            try:
                self._decode(images, place, reporter)
            except RuntimeError as error:
                if not device.out_of_memory(error):
                    raise
                what = f"the {self._kind} has not enough memory to caption"
                raise UserError([Problem(what, hint=_LESS_MEMORY)], exit_code=1) from error
        return read_candidates(file)

    def _decode(self, images: Sequence[Given], place: Path, reporter: "Reporter") -> None:
        from harness.decoding import predict

        config, side = self.config, self.config.model.image_size
        whole = family(config.model).WHOLE_IMAGES
        pixels = Whole(images, side) if whole else open_pixels(images, side, None)
        loaded = finished.of(self.folder, self.record).load(engine.frozen_dtype(config.train, self._kind))
        engine.place(loaded.model, config.train, self._kind)
        seed = config.seed if config.predict.samples else 0
        with reporter.progress(f"Captioning by {self.name}") as advance:
            ids = [one.id for one in images]
            predict.predict_split(loaded, ids, pixels, config.predict, place, advance, seed=seed)
        del loaded
        gc.collect()  # the next model, or the metrics, need its memory

    @property
    def _kind(self) -> device.Kind:
        return device.probe(self.config.device).kind

    def _utility(self) -> consensus.Utility:
        """The utility of the run's consensus, as its step has it; see `steps.comparing`."""
        config = self.config
        training = [one.caption for one in self._data.splits["train"] if one.caption]
        return consensus.Utility(
            _compared_by(config),
            self._scoring(),
            config.edition,
            device.scoring_device(self._kind),
            Documents(training),
        )

    def _scoring(self) -> "ScoreConfig":
        """The config of the metrics, with the folders of the stand-ins that the run trained."""
        score, root = self.config.score, records.root(self.folder, self.record)
        for section in trained_here(score):
            place = root / self.record["steps"].get(f"standin-{section}", "")
            if place.is_dir():
                records.check_step(place, self.record)
            score = metrics.all_weights()[section].renamed(score, str(place))
        return score

    @cached_property
    def _data(self) -> Dataset:
        """The run's data, whose training captions give the frequencies of words."""
        found = load(self.config.data, records.root(self.folder, self.record))
        if found.fingerprints["train"] != self.record["data"]["fingerprints"]["train"]:
            what = "the training data has changed since the run, and its consensus weighs words by it"
            raise UserError([Problem(what, self.config.data.root)])
        return found


def of(run: Path, kind: str | None = None, batch_size: int | None = None) -> Captioner:
    """The captioner of the run in a folder, on a `kind` of device, by default that of the run.

    Raises `UserError` with all reasons why a run can't caption other images than its own.
    """
    problems: list[Problem] = []
    found = _of(run, kind, batch_size, problems)
    if problems or found is None:
        raise UserError(problems)
    return found


def _of(run: Path, kind: str | None, batch_size: int | None, problems: list[Problem]) -> Captioner | None:
    record = records.read(run, ("variant", "seed", "steps", "data", "standin_model"))
    try:
        config = Config.model_validate(record["config"])
    except ValidationError:
        what = "another version of the harness wrote this record"
        problems.append(Problem(what, run, hint=records.again(record)))
        return None
    if kind:
        config = config.model_copy(update={"device": kind})
    if batch_size:
        predict = config.predict.model_copy(update={"batch_size": batch_size})
        config = config.model_copy(update={"predict": predict})
    root = records.root(run, record)
    if not config.data.root.is_dir():  # this is another folder than the run's
        data = config.data.model_copy(update={"root": root.parent / config.data.root})
        config = config.model_copy(update={"data": data})
    problems += [Problem(what, run, key=key, hint=hint) for key, what, hint in _refused(config)]
    for kind in _unknown(record):
        problems.append(Problem(f"its step {kind} makes captions of the run's own images only", run))
    if config.captions and config.has_model:
        finished.of(run, record)
    others = config.consensus.runs if config.consensus else ()
    members = [_of(root / source.run, kind, batch_size, problems) for source in others]
    return Captioner(run, record, config, tuple(one for one in members if one))


def _unknown(record: Mapping[str, Any]) -> Iterator[str]:
    """The kinds of the run's steps that leave captions and are not done here."""
    for kind in (step.kind for step in STEPS if step.captions and step not in _KNOWN):
        if any(name.startswith(f"{kind}-") for name in record["steps"]):
            yield kind


def _compared_by(config: Config) -> Mapping[str, float]:
    """The weights by metric of the run's consensus; empty if it has none."""
    if config.consensus is None:
        return {}
    weights = config.consensus.utility or {primary_metric(config): 1.0}
    return consensus.mixture(weights, config.edition)


def _executes(metric: str) -> bool:
    """Whether a metric executes a program that the config names."""
    weights = metrics.METRICS[metric].weights
    return weights is not None and weights.executes


def _refused(config: Config) -> Iterator[tuple[str, str, str | None]]:
    """Why a run can't caption other images than its own: key, reason, and what to do instead."""
    if not config.captions:
        yield "task", "the run predicts concepts, not captions", None
        return
    if config.retrieval:
        what = "its captions are those of similar training images, and only its own images are compared"
        yield "retrieval", what, "Caption with the run of the model alone."
    if config.has_model and not isinstance(config.model.prompt, str):
        kind = "retrieved" if hasattr(config.model.prompt, "retrieved") else "concepts"
        other = "similar training images" if kind == "retrieved" else "the concepts that another run predicts"
        what = f"its prompt begins with a text from {other}, which other images do not have"
        yield f"model.prompt.{kind}", what, "Caption with a run whose prompt is the same text for all images."
    if programs := [name for name in _compared_by(config) if _executes(name)]:
        what = f"its consensus compares by {', '.join(programs)}, which runs programs that its record names"
        yield "consensus.utility", what, None
    if config.consensus and not config.data.root.is_dir():
        what = f"no such folder: {config.data.root}; the consensus weighs words by its training captions"
        yield "data.root", what, "Run this in the folder of the project, or bring the data back."


def write_page(captioner: Captioner, found: Found, captions: Mapping[str, str], page: Path) -> None:
    """Write one self-contained page of images and captions; of very many images it has links alone."""
    pictured = Images({}, {one.id: one.image for one in found.images}, {})
    links, thumbnails = pictures(list(captions), pictured, page.parent)
    rows = [
        {
            "id": one.id,
            "caption": captions[one.id],
            "note": one.note,
            "thumbnail": thumbnails.get(one.id),
            "link": links[one.id] if one.image == one.file else None,  # converted files are temporary
        }
        for one in found.images
    ]
    facts = {
        "run": captioner.name,
        "remarks": [*captioner.remarks, *found.remarks],
        "problems": [str(problem) for problem in found.problems],
        "rows": rows,
    }
    store.write(page, filled("captions.html", facts))
