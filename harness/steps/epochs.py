"""The epochs that a named run found: what `train.epochs_of` takes from the run's record."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from harness import records
from harness.config.sections import AugmentConfig
from harness.errors import Problem, UserError
from harness.models.settings import ConceptPrompt, ModelConfig
from harness.steps import origins
from harness.training.resume import LOSSES, kept, rows_of
from harness.training.schedule import stages
from harness.training.settings import TrainConfig

if TYPE_CHECKING:
    from harness.config.schema import Config
    from harness.steps.plan import Plan

KEY = "train.epochs_of"
UNTIL = ("stage", "epoch", "before", "average")
"""The keys of `found` that tell what is trained and kept."""
_SCORE = "valid_primary"
_MAY_DIFFER = (
    *("micro_batch_size", "gradient_checkpointing"),
    *("evaluate_every", "evaluate_images", "keep_best", "patience", "epochs_of", "start_from"),
)
"""Keys of `train` that affect neither what a stage is nor how long it trains, besides `INDIFFERENT` ones."""


def found(plan: "Plan") -> dict[str, Any] | None:
    """`run`, and `stage` and `epoch` of its best validation, with the `score`; None without `epochs_of`.

    `before`: the last epoch of each stage before, if one of them ended early. `average`: the best weights are
    those of `train.ema`. Both keys are there only if they are needed.

    Raises `UserError` if the run is not there, has not finished, or is of another model, data or training.
    """
    run = plan.config.train.epochs_of
    if not run:
        return None
    folder = plan.root / run
    record = records.read(folder, ("data", "steps"), KEY)
    if record["status"] != "FINISHED":
        what = f"{run} has no best epoch yet (status {record['status']})"
        raise UserError([Problem(what, key=KEY, hint=records.finish(record))])
    differences = [*differing(plan.config, run, record["config"]), *_other_data(plan, record)]
    if differences:
        raise UserError([_refused(run, differences)])
    file = records.step_file(folder, record, "train", LOSSES)
    rows = [row for row in (rows_of(file) if file else ()) if "valid_loss" in row]
    scored = [row for row in rows if _SCORE in row]
    if not scored:
        what = f"{run} has no validations in its {LOSSES}"
        raise UserError([Problem(what, folder, hint=records.again(record))])
    best = max(scored, key=lambda row: row[_SCORE])  # the first of equal ones, as training takes it
    where = _until(plan.config.train, rows, best)
    if where is None:
        what = f"{run} has its best validation before its first step, so there are no epochs to train"
        raise UserError([Problem(what, key=KEY)])
    averaged = {"average": True} if kept(file.parent)[0].get("average") else {}
    return {"run": run, **where, "score": best[_SCORE], **averaged}


def _until(
    config: TrainConfig, rows: Sequence[Mapping[str, Any]], best: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Where a training ends that has the weights of the validation `best`; None if nothing is trained."""
    last = {row["stage"]: row["epoch"] for row in rows}
    stage, epoch = best["stage"], best["epoch"]
    if not epoch:  # a stage at its start has the weights of the one before
        stage = max((number for number in last if number < stage), default=0)
        epoch = last.get(stage)
    if not epoch:
        return None
    before = [last.get(number, 0) for number in range(1, stage)]
    early = any(before[one.number - 1] < one.epochs for one in stages(config) if one.number < stage)
    return {"stage": stage, "epoch": epoch} | ({"before": before} if early else {})


def check(plans: Sequence["Plan"]) -> list["Plan"]:
    """The plans that are known before the first one runs; the others wait for an earlier one.

    They wait for its epochs (`train.epochs_of`), its weights (`train.start_from`) or its predictions. Raises
    `UserError` if such an earlier run is of another model or training.
    """
    earlier: dict[str, Config] = {}
    known = []
    for plan in plans:
        run, start = plan.config.train.epochs_of, plan.config.train.start_from
        if start in earlier:
            origins.check(plan, earlier[start])
        elif run not in earlier and not earlier.keys() & set(combined(plan.config)):
            known.append(plan)
        if run in earlier:
            differences = differing(plan.config, run, earlier[run].model_dump(mode="json"))
            if differences:
                raise UserError([_refused(run, differences)])
        earlier[f"{plan.config.name}/{plan.config.run_name}"] = plan.config
    return known


def combined(config: "Config") -> list[str]:
    """The other runs whose captions or concepts a run combines with its own, or has in its prompts."""
    sections = (config.consensus, config.concepts)
    prompt = config.model.prompt
    named = [prompt.concepts] if config.has_model and isinstance(prompt, ConceptPrompt) else []
    return [*(one.run for section in sections if section for one in section.runs), *named]


def missing(plan: "Plan") -> str:
    """Why what a run takes from other runs is not known yet; empty if it is."""
    waiting = []
    for run in combined(plan.config):
        try:
            record = records.read(plan.root / run)
            waiting += [] if record["status"] == "FINISHED" else [f"{run} has the status {record['status']}"]
        except UserError as error:
            waiting += map(str, error.problems)
    return "; ".join(waiting)


def unknown(plan: "Plan") -> str:
    """Why the epochs of a run are not known yet; empty if they are."""
    try:
        found(plan)
    except UserError as error:
        return "; ".join(map(str, error.problems))
    return ""


def differing(config: "Config", run: str, other: Mapping[str, Any]) -> list[str]:
    """What tells the model and the training of a config from those in the config of another run's record."""
    from harness.steps.train import INDIFFERENT

    data, ignored = other.get("data") or {}, (*INDIFFERENT, *_MAY_DIFFER)
    if "valid" in data.get("fit_on", ()):
        return [f"{run} was trained on validation images itself, so it has no validations"]
    try:
        theirs = {
            "model": ModelConfig.model_validate(other["model"]),
            "train": TrainConfig.model_validate(other["train"]),
            "data.augment": AugmentConfig.model_validate(data.get("augment", {})),
        }
    except (KeyError, ValidationError):
        return [f"{run} was made by another version, whose config can't be read"]
    ours = {"model": config.model, "train": config.train, "data.augment": config.data.augment}
    differences = []
    for section, own in ours.items():
        here, there = own.model_dump(mode="json"), theirs[section].model_dump(mode="json")
        differences += [
            f"{section}.{key} is {value} here and {there[key]} there"
            for key, value in here.items()
            if value != there[key] and not (section == "train" and key in ignored)
        ]
    return differences


def _other_data(plan: "Plan", record: Mapping[str, Any]) -> list[str]:
    theirs = record["data"].get("fingerprints", {})
    splits = [split for split in ("train", "valid") if theirs.get(split) != plan.data.fingerprints[split]]
    return [f"the images or labels of {split} are not the same" for split in splits]


def _refused(run: str, differences: Sequence[str]) -> Problem:
    what = f"the epochs of {run} are not those of this run: {'; '.join(differences)}"
    return Problem(what, key=KEY, hint="Name a run that differs only in its seed or in data.fit_on.")


def shortened(config: TrainConfig, until: Mapping[str, Any] | None) -> TrainConfig:
    """The config with the stages and epochs up to `until`, as forecasts of steps and time need it.

    Training itself keeps the whole config, because the learning rate follows the schedule of all epochs.
    """
    if until is None:
        return config
    ends = {stage.number: stage.last for stage in stages(config, until)}
    shorter = tuple(
        stage.model_copy(update={"epochs": ends.get(number, 0)})
        for number, stage in enumerate(config.stages[: until["stage"]], 1)
    )
    return config.model_copy(update={"stages": shorter})


def described(config: TrainConfig, until: Mapping[str, Any] | None) -> str:
    """A sentence about the epochs of a training on train and valid."""
    averaged = config.ema is not None and (until is None or until.get("average"))
    kept_ones = "the average of the last weights is kept" if averaged else "the last weights are kept"
    if until is None:
        return f"learns from train and valid for all planned epochs; {kept_ones}"
    planned = config.stages[until["stage"] - 1].epochs
    where = f"stage {until['stage']}, epoch {until['epoch']:.4g} of {planned}"
    best = f"where {until['run']} has its best validation ({until['score']:.4f})"
    early = "; stages before it end after as many epochs as there" if "before" in until else ""
    return f"learns from train and valid up to {where}, {best}{early}; {kept_ones}"
