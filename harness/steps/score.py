"""Scores of the validation captions before and after post-processing, with all configured metrics."""

import contextlib
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import metrics
from harness.machine import ranks
from harness.metrics.settings import ScoreConfig
from harness.records.files import PREDICTIONS, read_captions
from harness.steps.base import Step
from harness.steps.inputs import Inputs, values
from harness.steps.standin import with_standins
from harness.store import damage_of, fingerprint, finite, parsed, write, write_json

if TYPE_CHECKING:
    from harness.steps.plan import Plan
    from harness.steps.work import Work

SCORES, PER_IMAGE, ARRAYS, LENGTHS = "scores.json", "per_image.csv", "arrays.npz", "caption_lengths.png"
FILES = (SCORES, PER_IMAGE, ARRAYS, LENGTHS)
"""The output files of a score step."""


class Score(Step):
    """Writes scores with their signatures, and the score of every image; `part` is before or after."""

    kind, version, shared = "score", 3, True
    section = ("score", ScoreConfig, ScoreConfig())

    @classmethod
    def of(cls, plan: "Plan", before: Mapping[str, Step]) -> Iterator[Step]:
        if plan.config.full_fit:  # such a score would be of images that the model has seen
            return
        captions = [step for step in before.values() if step.captions == "valid"]
        if not captions:
            return
        standins = {step: None for step in before.values() if step.kind == "standin"}
        facts = {
            "weights": metrics.identities_of(plan.config.score, plan.root / "cache"),
            "packages": metrics.versions(),
        }
        for part, source in zip(("before", "after"), captions[-2:], strict=False):
            read, steps = values(plan.config, "score", "edition"), {source: (PREDICTIONS,)} | standins
            yield cls(Inputs(plan, read, ("train", "valid"), steps, facts), part)

    @property
    def artifacts(self) -> Mapping[str, str]:
        name = f"scores/valid_{self.part}"
        found = {f"{name}.json": SCORES, f"{name}_per_image.csv": PER_IMAGE}
        return found | ({f"plots/{LENGTHS}": LENGTHS} if self.part == "after" else {})

    def found(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        result = parsed((self.directory / SCORES).read_bytes())
        valid = record["scores"].get("valid", {}) | {self.part: result["scores"]}
        about = ("image_gap", "baseline", "warnings") if self.part == "after" else ()
        own = {key: result[key] for key in about}
        if "warnings" in own:
            own["warnings"] = [*record["warnings"], *own["warnings"]]
        return {"scores": record["scores"] | {"valid": valid}, **own}

    def build(self, work: "Work", directory: Path) -> bool:
        """Score captions, or copy the scores of the same captions from another step."""
        work.drop_model()  # the neural metrics need its memory
        index = self.inputs.root / "cache" / "scored" / self._same_captions()
        with _alone(index):
            if earlier := ranks.agree(self._scored(index, directory)):
                work.say("the same captions were scored before")
                if ranks.rank() == 0:
                    for name in FILES:
                        shutil.copyfile(earlier / name, directory / name)
                return True
            complete = self._compute(work, directory)
            if complete and ranks.rank() == 0:
                write(index, directory.name)
        return complete

    @property
    def _captions(self) -> Path:
        """The file of the captions to score."""
        (source,) = (step for step in self.inputs.steps if step.captions)
        return source.directory / PREDICTIONS

    def _same_captions(self) -> str:
        """The fingerprint of this step with the captions' text instead of the step that wrote them."""
        steps = {step.name: step.canonical for step in self.inputs.steps if not step.captions}
        text = self._captions.read_bytes().decode()  # keeps the line breaks
        return fingerprint(self.canonical | {"steps": steps, "captions": text})

    def _scored(self, index: Path, directory: Path) -> Path | None:
        """The other step that an entry of the index names, if it exists and is undamaged."""
        name = index.read_bytes().decode(errors="replace") if index.is_file() else ""
        if name == directory.name or not re.fullmatch(f"{self.kind}-[0-9a-f]{{12}}", name):
            return None
        earlier = directory.with_name(name)
        whole = all((earlier / file).is_file() and not damage_of(earlier / file) for file in FILES)
        return earlier if whole else None

    def _compute(self, work: "Work", directory: Path) -> bool:
        from harness.training import plots

        found = read_captions(self._captions)
        examples = [e for e in self.inputs.data.examples("valid") if e.caption is not None]
        ids = [example.id for example in examples]
        predictions = [found[example.id] for example in examples]
        references = [example.caption for example in examples]
        images = [None if example.damage else example.image for example in examples]
        training = [example.caption for example in self.inputs.data.examples("train")]
        config = with_standins(self.inputs.config.score, self.inputs)
        how = (config, self.inputs.config.edition, work.scoring_device, self.inputs.root / "cache")
        work.say(f"scoring {len(predictions)} captions")
        scores, warnings = metrics.score(predictions, references, images, *how, ids=ids)
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
        metrics.write_per_image(directory / PER_IMAGE, ids, references, predictions, scores)
        metrics.write_arrays(directory / ARRAYS, ids, scores)
        plots.caption_lengths(predictions, references, directory / LENGTHS)
        write_json(directory / SCORES, finite(result))
        return all(score.value is not None for score in scores.values())


@contextlib.contextmanager
def _alone(index: Path) -> Iterator[None]:
    """Lock out other processes that score the same captions."""
    from filelock import FileLock

    if ranks.rank():
        yield
        return
    index.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(index.with_suffix(".lock")):
        yield
