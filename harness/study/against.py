"""The best trial of a study against its base, by the paired test of `compare`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from harness.data.halves import HELD
from harness.errors import UserError
from harness.scoring.compare import System, compare, on_half, read_run
from harness.study.spec import CONCEPT_SCORES, Study
from harness.study.storage import run_file

_CONCEPT = "concept_"


def folder_of(spec: Study, number: int, folder: Path) -> Path:
    """The folder of a trial's run in the study's folder; raises `UserError` if it is gone."""
    found = run_file(folder, number)
    if found is None:
        raise UserError(f"the run of trial {number} of {spec.name} is gone", exit_code=1)
    return found.parent


def against_base(spec: Study, trial: FrozenTrial, folder: Path) -> dict[str, Any] | None:
    """What a trial gains over trial 0, which is the base: for each objective as `compare.Difference`.

    With `half: tune` the images are those of the held half, which chose nothing; else they are all images, by
    which the trial was chosen. None for the base itself. If they can't be compared, there is a `reason`.
    """
    if trial.number == 0:
        return None
    names = [name.removeprefix(_CONCEPT) if name in CONCEPT_SCORES else name for name in spec.objective]
    try:
        base, own = (_system(spec, number, folder) for number in (0, trial.number))
        found = compare([base, own], names, against=base.label)
    except UserError as error:
        return {"reason": "; ".join(map(str, error.problems))}
    by_name = {one.metric: vars(one) for one in found if one.metric in names}
    differences = {shown: by_name[name] for shown, name in zip(spec.objective, names, strict=True)}
    return {"images": len(own.ids), "half": HELD if spec.config.half else None, "differences": differences}


def _system(spec: Study, number: int, folder: Path) -> System:
    system = read_run(folder_of(spec, number, folder), f"trial {number}")
    return on_half(system, HELD) if spec.config.half else system


def described(found: Mapping[str, Any], trials: int) -> str:
    """The result of `against_base` in words, for the best of this number of trials."""
    if "reason" in found:
        return f"against the base (trial 0): not compared: {found['reason']}"
    parts = [_difference(name, one) for name, one in found["differences"].items()]
    images = f"{found['images']:,} images"
    if found["half"]:
        return f"against the base (trial 0), on the {images} of the half {found['half']}: {', '.join(parts)}"
    chosen = f"These images chose it among {trials} trials, so its gain is too high on average"
    return f"against the base (trial 0), on {images}: {', '.join(parts)}. {chosen} (see half: tune)"


def _difference(name: str, one: Mapping[str, Any]) -> str:
    if one["reason"]:
        return f"{name} not compared: {one['reason']}"
    interval = "" if one["low"] is None else f" [{one['low']:+.4f}, {one['high']:+.4f}]"
    verdict = "" if one["real"] else ", not shown"
    return f"{name} {one['difference']:+.4f}{interval} p={one['adjusted_p']:.3f}{verdict}"
