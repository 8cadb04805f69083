"""The average of weights of finished runs, in place of a training; see `training.soups`."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import records
from harness.data.halves import TUNE, half
from harness.errors import Problem, UserError
from harness.machine import ranks
from harness.steps import origins
from harness.steps.base import Step
from harness.steps.inputs import Inputs, values
from harness.steps.prompts import prompts_in
from harness.steps.validating import greedy_scores, validating
from harness.store import fingerprint, parsed, write_json
from harness.training import soups
from harness.training.resume import BEST
from harness.training.soups import SoupConfig

if TYPE_CHECKING:
    from harness.steps.plan import Plan
    from harness.steps.work import Work

RECORD = "soup.json"
"""The candidates with their scores alone, the trials in their order, and which candidates are in the soup."""
_TRIED = "tried.jsonl"
_KEY = "soup.runs"


class Soup(Step):
    """Writes the averaged weights as a training writes its best ones."""

    kind, version, shared, weights = "soup", 1, True, True
    section = ("soup", SoupConfig | None, None)

    @classmethod
    def of(cls, plan: "Plan", before: Mapping[str, Step]) -> Iterator[Step]:
        config = plan.config
        if config.soup is None:
            return
        used = {"precision", "vision_precision", "max_caption_tokens"}
        read, steps, facts = validating(plan, before)
        read |= {"train": config.train.model_dump(include=used)}
        read |= values(config, "soup.half", "soup.images")
        steps |= prompts_in(before, "valid")
        facts["candidates"] = _candidates(plan, origins.before_training(read, facts, steps))
        yield cls(Inputs(plan, read, ("train", "valid"), steps, facts, ("data.cache",)))

    @property
    def artifacts(self) -> Mapping[str, str]:
        return {f"soup/{RECORD}": RECORD}

    @property
    def decodes(self) -> Mapping[str, int]:
        return {"valid": self.inputs.config.model.image_size}

    def found(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"soup": parsed((self.directory / RECORD).read_bytes())}

    def build(self, work: "Work", directory: Path) -> None:
        from harness.models.loading import load_average, save_trained
        from harness.training import engine

        config = self.inputs.config
        work.drop_model()
        files = self._files()
        pixels = work.pixels(self.inputs, "valid", config.model.image_size)
        chosen = self._chosen()
        loaded = work.load(self.inputs)
        engine.place(loaded.model, config.train, work.kind)
        loaded.model.eval()
        known = ranks.agree(_read(directory / _TRIED))
        primary = self.inputs.facts["primary"]

        def score(members: tuple[int, ...]) -> float:
            if members not in known:
                load_average(loaded.model, [files[number] for number in members])
                scores, _ = greedy_scores(self.inputs, work, loaded, pixels, chosen)
                found = ranks.agree(scores[primary])
                if found.value is None:
                    what = f"{primary} must choose the weights, but is absent: {found.reason}"
                    raise UserError(what, exit_code=1)
                known[members] = (found.value, found.official)
                _keep(directory / _TRIED, members, found.value, found.official)
                names = " + ".join(self._names[number] for number in members)
                work.say(f"{primary} {found.value:.4f}{'' if found.official else '*'}  {names}")
            return known[members][0]

        soup = soups.greedy(len(files), score)
        load_average(loaded.model, [files[number] for number in soup.members])
        if ranks.rank() == 0:
            official = all(official for _, official in known.values())
            save_trained(loaded.model, directory / BEST)
            write_json(directory / RECORD, self._described(soup, len(chosen), official))
            (directory / _TRIED).unlink(missing_ok=True)
        ranks.agree(None)  # waits until rank 0 has written
        work.model = loaded

    @property
    def _names(self) -> list[str]:
        """The candidates by run, and by file where a run has several."""
        given = self.inputs.facts["candidates"]
        return [one["run"] if one["file"] == BEST else f"{one['run']}:{one['file']}" for one in given]

    def _files(self) -> list[Path]:
        """The weights of the candidates. Raises `UserError` if one has changed since its training."""
        found = []
        for one in self.inputs.facts["candidates"]:
            record = records.read(self.inputs.root / one["run"])
            found.append(records.checked(self.inputs.root / one["step"] / one["file"], record))
        return found

    def _chosen(self) -> Any:
        """The places of the validation images that choose, among the readable ones."""
        import numpy as np

        config, examples = self.inputs.config.soup, self.inputs.data.readable("valid")
        there = [
            place
            for place, example in enumerate(examples)
            if example.trains and (not config.half or half(example.id) == TUNE)
        ]
        if not there:
            what = "no validation image is in the half tune"
            raise UserError([Problem(what, key="soup.half", hint="Choose on all: --set soup.half=false")])
        drawn = np.random.default_rng(0).permutation(len(there))[: config.images]
        return np.array(there)[np.sort(drawn)]

    def _described(self, soup: soups.Soup, images: int, official: bool) -> dict[str, Any]:
        names = self._names
        return {
            "members": [names[number] for number in soup.members],
            "metric": self.inputs.facts["primary"],
            "official": official,
            "half": TUNE if self.inputs.config.soup.half else None,
            "n": images,
            "candidates": [
                {"name": name, "score": score} for name, score in zip(names, soup.alone, strict=True)
            ],
            "trials": [
                {
                    "added": names[trial.members[-1]],
                    "to": [names[number] for number in trial.members[:-1]],
                    "score": trial.score,
                    "before": trial.best,
                    "kept": trial.kept,
                    "tie": trial.score == trial.best,
                }
                for trial in soup.trials
            ],
        }


def _candidates(plan: "Plan", origin: Mapping[str, Any]) -> list[dict[str, str]]:
    """Run, step, file and SHA-256 of each candidate; raises `UserError` if they can't be averaged."""
    found: list[dict[str, str]] = []
    problems = []
    for run in plan.config.soup.runs:
        try:
            found += _of_run(plan, run, origin)
        except UserError as error:
            problems += error.problems
    steps: dict[str, str] = {}
    for one in found:
        if steps.setdefault(one["step"], one["run"]) != one["run"]:
            what = f"{steps[one['step']]} and {one['run']} share one training; name one of them"
            problems.append(Problem(what, key=_KEY))
    if problems:
        raise UserError(list(dict.fromkeys(problems)))
    if len(found) < 2:
        hint = "Name another seed of it, or train it with train.keep_best of 2 or more."
        raise UserError([Problem(f"{found[0]['run']} has only its best weights", key=_KEY, hint=hint)])
    shapes = [_shapes(plan, one) for one in found]
    for one, own in zip(found, shapes, strict=True):
        if keys := soups.differing(shapes[0], own):
            first, which = found[0]["run"], origins.some(keys)
            what = f"{one['run']} has weights of other names or shapes than {first}: {which}"
            raise UserError([Problem(what, key=_KEY)])
    return found


def _shapes(plan: "Plan", candidate: Mapping[str, str]) -> dict[str, list[int]]:
    file = plan.root / candidate["step"] / candidate["file"]
    try:
        return soups.shapes(file)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, MemoryError) as error:
        record = records.read(plan.root / candidate["run"])
        raise records.damaged(file, record, f"can't be read as weights: {error}") from None


def _of_run(plan: "Plan", run: str, origin: Mapping[str, Any]) -> list[dict[str, str]]:
    """The candidates of one run; raises `UserError` if it has none, or another initialisation."""
    rule = "A soup needs one initialisation: the same model settings and checkpoints. Seeds may differ."
    found = origins.of_run(plan, run, origin, _KEY, ("train",), rule)
    if origins.learned_from_valid(found.record):
        what = f"{run} has learned from the validation images that choose and score a soup (data.fit_on)"
        hint = "Name runs that learn from train alone."
        raise UserError([Problem(what, plan.root / run, key=_KEY, hint=hint)])
    step = str(found.directory.relative_to(plan.root))
    return [
        {"run": run, "step": step, "file": file, "sha256": digest} for file, digest in found.files.items()
    ]


def _keep(file: Path, members: tuple[int, ...], score: float, official: bool) -> None:
    """Append a trial, so that an interruption loses none."""
    if ranks.rank() == 0:
        row = [list(members), score, official]
        with file.open("a", encoding="utf-8") as tried:
            tried.write(json.dumps([*row, fingerprint(row)]) + "\n")


def _read(file: Path) -> dict[tuple[int, ...], tuple[float, bool]]:
    """Score, and whether it is official, of each trial in a file of `_keep`; not of rows that are cut."""
    found = {}
    for line in file.read_bytes().split(b"\n") if file.is_file() else ():
        try:
            members, score, official, digest = json.loads(line)
        except (ValueError, TypeError, RecursionError):
            continue
        if digest == fingerprint([members, score, official]):
            found[tuple(members)] = (score, official)
    return found
