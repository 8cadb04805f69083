"""`harness consensus`: from several captions of each image, the one that agrees best with all."""

import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness.cli import outputs
from harness.cli.score import edition_of
from harness.cli.submission import Split
from harness.cli.terminal import DeviceOption, Report, ReportFormat, ScoreSets, Terminal, runs_by_name
from harness.config.editions import DEFAULT, SPAN
from harness.errors import Flaw, Problem, UserError, grouped
from harness.output.visible import json_text, one_line

if TYPE_CHECKING:
    from harness.data.captionfiles import CaptionFile
    from harness.decoding.consensus import Choice
    from harness.records.files import Candidate

_MOST = 1e6
"""The largest weight."""


def consensus(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="CAPTIONS ...",
            help="Files of any official format or COCO results, with one or several captions for each image; "
            "or runs, whose samples and further beams are candidates too.",
            callback=runs_by_name,
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="OUT.csv", help="Where to write the chosen captions.")],
    weights: Annotated[
        str | None, typer.Option(metavar="2,1,1", help="Weight of each source; by default all are equal.")
    ] = None,
    utility: Annotated[
        str | None,
        typer.Option(
            metavar="A=2,B=1", help="How captions are compared; by default by the edition's primary metric."
        ),
    ] = None,
    edition: Annotated[
        int | None, typer.Option(help=f"Edition of the metrics, {SPAN}; by default {DEFAULT}.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of {ID}.jpg or .png, for CLIPScore.")
    ] = None,
    documents: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Captions whose words CIDEr and BERTScore of 2025 count; by default all candidates.",
        ),
    ] = None,
    split: Annotated[Split, typer.Option(help="Which captions of runs.")] = Split.valid,
    standins: Annotated[
        bool, typer.Option("--standins", help="Use stand-ins if official weights are missing.")
    ] = False,
    per_image: Annotated[
        Path | None,
        typer.Option(metavar="OUT.csv", help="Write for each image the source and the expected utility."),
    ] = None,
    sets: ScoreSets = None,
    device: DeviceOption = None,
    output: ReportFormat = Report.table,
) -> None:
    """Choose for each image the caption with the best mean utility against all its candidates.

    The captions of several systems make an ensemble. Several captions of one system make a consensus of its
    samples. Ties go to the more probable caption, then to the earlier source. No references are needed.

    Example: harness consensus a.csv b.csv samples.json --out run.csv
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from harness import metrics, scoring
    from harness.decoding import consensus as method
    from harness.metrics.base import Documents
    from harness.records.files import write_captions, write_table

    year = edition_of(edition, None)
    _check_outputs(out, per_image, sources)
    runs = [_candidates_of_run(source, split.value) for source in sources]
    read = [run[0] if run else _read(source, split.value) for run, source in zip(runs, sources, strict=True)]
    files = _same_ids(read)
    known = [run and run[1] for run in runs]
    candidates = _candidates(files, known, sources, _weights(weights, len(sources)))
    mixed = method.mixture(_mixture(utility, year), year)
    config = scoring.settings(year, list(mixed), standins, sets or ())
    if problems := metrics.problems(config, year):
        raise UserError(problems, "Or compare by what needs no weights: --utility rouge1")
    seen = _images(images, files[0], scoring)
    texts, pairs = method.cost(candidates)
    say = Terminal().say
    for file in files:
        say(file.described())
        for warning in file.warnings:
            say(f"warning: {file.path.name}: {warning}")
    say(f"{len(candidates):,} images, {texts:,} distinct candidates, {pairs:,} comparisons")
    if undecided := _undecided(candidates):
        say(f"warning: {undecided}")
    counted = _documents(documents, candidates)
    measure = method.Utility(mixed, config, year, _device(device), Documents(counted))
    chosen: dict[str, Choice] = {}
    with Terminal().progress("Comparing") as advance:
        for image, choice in method.choose(candidates, measure, seen):
            chosen[image] = choice
            advance(len(chosen), len(candidates))
    write_captions(out, {image: choice.candidate.caption for image, choice in chosen.items()})
    if per_image:
        rows = [(image, *choice.row) for image, choice in chosen.items()]
        write_table(per_image, [("ID", *method.Choice.COLUMNS), *rows])
    _report(chosen, sources, measure.signatures, out, output)


def _check_outputs(out: Path, per_image: Path | None, sources: Sequence[Path]) -> None:
    """Raise `UserError`, before hours of comparing, for an output that can't be written or is an input."""
    problems = outputs.problems({"--out": out, "--per-image": per_image}, sources)
    again = [source for number, source in enumerate(sources) if source in sources[:number]]
    problems += [Problem("is given twice; give it a weight of 2 instead", source) for source in again]
    if problems:
        raise UserError(problems)


def _candidates_of_run(source: Path, split: str) -> "tuple[CaptionFile, dict[str, list[Candidate]]] | None":
    """The candidates of a run, also as if from a file; None if the source is no run or has only captions."""
    from harness import records, scoring
    from harness.data.captionfiles import CaptionFile

    run = scoring.find_run(source)
    name = f"predictions/{split}_candidates.csv"
    if run is None or name not in run[1].get("artifacts", {}):
        return None
    file = records.artifact(*run, name)
    found = records.candidates(file, run[1])
    captions = {image: [one.caption for one in given] for image, given in found.items()}
    first = {image: given[0] for image, given in captions.items()}
    further = {image: given[1:] for image, given in captions.items() if given[1:]}
    return CaptionFile(file, ",", "candidates of a run", first, {}, further=further), found


def _read(source: Path, split: str) -> "CaptionFile":
    from harness import scoring
    from harness.data.captionfiles import as_predictions, read_candidates
    from harness.records import artifact

    run = scoring.find_run(source)
    found = read_candidates(artifact(*run, f"predictions/{split}_after.csv") if run else source)
    as_predictions(found)  # refuses captions that end at a pipe
    return found


def _same_ids(files: Sequence["CaptionFile"]) -> list["CaptionFile"]:
    """The files with the ids of the first one that has its own; raises `UserError` if they differ."""
    from harness.data.captionfiles import with_ids

    named = next((file for file in files if file.separator), files[0])
    found = [with_ids(file, named.values, named.images) for file in files]
    problems = []
    for file in found:
        lacking = [
            Flaw(named.lines.get(key), f"no caption in {file.path.name}", None, key)
            for key in named.values
            if key not in file.values
        ]
        unknown = [
            Flaw(file.lines.get(key), f"no caption in {named.path.name}", None, key)
            for key in file.values
            if key not in named.values
        ]
        problems += [*grouped(named.path, lacking), *grouped(file.path, unknown)]
    if problems:
        raise UserError(problems)
    return found


def _weights(given: str | None, count: int) -> list[float]:
    try:
        found = [float(one) for one in given.split(",")] if given is not None else [1.0] * count
    except ValueError:
        found = []
    if len(found) != count or not all(0 < one <= _MOST for one in found):
        what = f"got {given!r}; {count} numbers above 0 and up to {_MOST:.0e} are needed, one for each source"
        raise UserError([Problem(what, key="--weights")])
    return found


def _mixture(given: str | None, year: int) -> dict[str, float]:
    """Weights by metric or mean of the edition; raises `UserError` for unknown ones."""
    from harness.config.editions import EDITIONS
    from harness.metrics import METRICS

    if given is None:
        return {EDITIONS[year].primary or "bertscore": 1.0}
    known, found = (*METRICS, *EDITIONS[year].aggregates), {}
    for part in given.split(","):
        name, _, weight = part.strip().partition("=")
        try:
            value = float(weight or 1)
        except ValueError:
            value = 0.0
        if name not in known or name in found or not 0 < value <= _MOST:
            what = f"got {part.strip()!r}; metrics with weights above 0 are allowed: bertscore=2,rouge1=1"
            raise UserError([Problem(what, key="--utility", hint=f"Metrics: {', '.join(known)}.")])
        found[name] = value
    return found


def _candidates(
    files: Sequence["CaptionFile"],
    known: Sequence[dict[str, list["Candidate"]] | None],
    sources: Sequence[Path],
    weights: Sequence[float],
) -> dict[str, list["Candidate"]]:
    """The candidates of each image; those that are `known` have log-probabilities and names of their own."""
    from harness.decoding.consensus import of_source
    from harness.records.files import Candidate

    found: dict[str, list[Candidate]] = {key: [] for key in files[0].values}
    for file, given, source, weight in zip(files, known, sources, weights, strict=True):
        given = given or {key: list(map(Candidate, every)) for key, every in file.candidates.items()}
        for key, every in given.items():
            found[key] += of_source(every, one_line(str(source)), weight)
    return found


def _undecided(candidates: Mapping[str, Sequence["Candidate"]]) -> str | None:
    """A warning if most images have two captions of equal weight, each as near to all as the other."""
    pairs = 0
    for given in candidates.values():
        weights: Counter[str] = Counter()
        for one in given:
            weights[one.caption] += one.weight
        pairs += len(weights) == 2 and len(set(weights.values())) == 1
    if 2 * pairs <= len(candidates):
        return None
    return (
        f"{pairs:,} images have two captions of equal weight. A symmetric metric, such as BERTScore, gives "
        "both the same mean utility, and the first source is taken. Add a source, or --weights"
    )


def _images(folder: Path | None, file: "CaptionFile", scoring: Any) -> Mapping[str, Path] | None:
    if folder is None:
        return None
    found, problems = scoring.images_of(folder, file)
    if problems:
        raise UserError(problems)
    return found


def _documents(file: Path | None, candidates: Mapping[str, Sequence["Candidate"]]) -> list[str]:
    from harness.data.captionfiles import read_candidates

    if file is not None:
        return [caption for given in read_candidates(file).candidates.values() for caption in given]
    return [one.caption for given in candidates.values() for one in given]


def _device(wanted: Any) -> str:
    from harness.machine import device

    return device.scoring_device(device.probe(wanted.value if wanted else "auto").kind)


def _report(
    chosen: Mapping[str, "Choice"],
    sources: Sequence[Path],
    signatures: Mapping[str, str],
    out: Path,
    output: Report,
) -> None:
    """Print how many captions are from each source, and the mean expected utility."""
    names = [one_line(str(source)) for source in sources]
    won = (choice.candidate.source for choice in chosen.values())
    taken = Counter(name if name in names else name.rpartition("/")[0] for name in won)
    counts = {name: taken[name] for name in names}
    mean = sum(choice.utility for choice in chosen.values()) / len(chosen)
    if output is Report.json:
        found = {"images": len(chosen), "utility": mean, "signatures": signatures, "out": str(out)}
        print(json_text(found | {"sources": counts}))
        return
    for name, count in counts.items():
        print(f"{count:>7,}  {name}")
    print(f"expected utility {mean:.4f}: {', '.join(signatures.values())}")
    print(out)
    print("The expected utility is no score: it measures agreement among the candidates.", file=sys.stderr)
