"""`harness soup`: an experiment that averages the weights of finished runs, written from their records."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from harness.cli import compare
from harness.cli.run import run_all
from harness.cli.terminal import DeviceOption, Format, Output, Replace, Sets, configs_of
from harness.errors import Problem, UserError
from harness.machine import launch
from harness.store import RUNS, fingerprint, write

_HEAD = """\
# Question  Does the average of these weights score better than the best of them?
# Command   harness run {file}
# Expected  the score of the best run, or better: an average that scores less is not kept
# Cost      two scored validations of {images} images at most for each candidate; nothing is trained
"""


def soup(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN ...", help="Finished runs of one initialisation.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="EXPERIMENT.yaml", help="Where to write the experiment; by default runs/soup/."),
    ] = None,
    half: Annotated[
        bool, typer.Option("--half/--all", help="Choose on one half of the validation images, or on all.")
    ] = True,
    sets: Sets = None,
    device: DeviceOption = None,
    replace: Replace = False,
    output: Output = Format.table,
) -> None:
    """Average the weights of runs if that scores better, and run what it gives: captions, scores, submission.

    It starts from the best weights and adds the others one by one. It keeps one if the score does not fall.

    All weights that train.keep_best kept are candidates. At the end it compares the soup with the best run.

    Example: harness soup quickstart/opt_224-s42 quickstart/opt_224-s43
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    file = experiment(runs, out, half)
    configs = configs_of(file, sets, device)
    records = run_all(file, configs, output, replace)
    print(f"the experiment: {file}", file=sys.stderr)
    if records and output is Format.table and not launch.is_rank():
        member = best_member(records[0])
        if len(records[0]["soup"]["members"]) == 1:
            print(f"No average scored better than {member} alone: the soup has its weights.")
            return
        compare.compare([RUNS / member, RUNS / configs[0].name / configs[0].run_name])


def experiment(runs: Sequence[Path], out: Path | None, half: bool) -> Path:
    """Write the experiment that averages these runs -> its file; by default under runs/soup."""
    import yaml

    found = [_read(given) for given in runs]
    config = _config(found, half)
    file = out or RUNS / config["name"] / f"{config['variant']}.yaml"
    head = _HEAD.format(file=file, images=config["soup"]["images"])
    text = head + yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=110)
    if out is not None and out.exists() and (not out.is_file() or out.read_bytes() != text.encode()):
        hint = f"Name a new file, or run that one: harness run {out}"
        raise UserError([Problem(f"exists and is another experiment: {out}", key="--out", hint=hint)])
    return write(file, text)


def best_member(record: Mapping[str, Any]) -> str:
    """The run of the candidate that scored best alone, from the record of a soup."""
    best = max(record["soup"]["candidates"], key=lambda one: one["score"])
    return best["name"].partition(":")[0]


def _read(given: Path) -> dict[str, Any]:
    """The record of a run under runs/, given by its name or its folder."""
    from harness import records

    folder = given if (given / records.FILE).is_file() else RUNS / given
    record = records.read(folder, ("variant", "seed"))
    if folder.resolve() != (RUNS / records.full_name(record)).resolve():
        hint = "Start the command in the folder that holds runs/."
        raise UserError([Problem(f"is not {RUNS / records.full_name(record)}", folder, hint=hint)])
    return record


def _config(found: Sequence[Mapping[str, Any]], half: bool) -> dict[str, Any]:
    """The first run's config, with a soup in place of its training; its name says whose soup it is."""
    from harness import records

    names = [records.full_name(record) for record in found]
    together = len({record["name"] for record in found}) == 1
    named = list(map(records.name_of, found)) if together else names
    parts = [name.replace("/", ".") for name in named]
    joined = "_".join(parts)
    if len(joined) > 90:
        joined = f"{parts[0][:60]}_{len(names)}_{fingerprint(names)}"
    name = f"soup/{found[0]['name']}" if together else "soup"
    soup = {"runs": names, "half": half, "images": 1000}
    return found[0]["config"] | {"name": name, "variant": joined, "soup": soup}
