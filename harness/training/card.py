"""The model card of an exported run: what it is, what it learned from, how it scores, and how to use it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from harness import records
from harness.data import fraction
from harness.decoding.postprocess import PostprocessConfig
from harness.models import checkpoints, family
from harness.models.base import Usage
from harness.training.finished import Finished

SCRIPT = "caption.py"
_UNKNOWN = "unknown; look at its page, or ask whoever made it"


def card(found: Finished, usage: Usage, named: Mapping[str, str], hub_ready: bool) -> str:
    """The card as Markdown; with `hub_ready` it begins with the metadata that a hub reads.

    `named` are the places in the folder by the key of `model:` that is to name them.
    """
    parts = [_metadata(found, usage)] if hub_ready else []
    parts += [f"# {records.full_name(found.record)}", *_origin(found), *_use(found, usage, named)]
    parts += [*_data(found.record), *_training(found), *_scores(found.record), *_licences(found)]
    return "\n\n".join(parts) + "\n"


def _metadata(found: Finished, usage: Usage) -> str:
    """The YAML block at the head of a card."""
    named = family(found.model).checkpoints(found.model).values()
    bases = [name for name in named if not Path(name).exists()]
    licences = {one for name in bases if (one := _licence(name))}
    values: dict[str, Any] = {
        "library_name": "transformers" if usage.script else "imageclef-harness",
        "pipeline_tag": "image-to-text",
        "language": ["en"],
        "tags": ["medical", "radiology", "image-captioning", "imageclef"],
        # of several licences none speaks for all; "other" sends readers to the card
        "license": licences.pop() if len(licences) == len(set(bases)) == 1 else "other",
    }
    if bases:
        values["base_model"] = bases
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---"


def _origin(found: Finished) -> Iterator[str]:
    if found.standin:
        yield (
            f"> **STAND-IN**: this model comes from a small stand-in ({found.standin}). It shows how things "
            "work. Its captions and scores say nothing of real models."
        )
    if share := fraction.looked(found.record):
        yield f"> **Quick look**: it was trained or scored on {share} only."
    yield "It captions radiology images. A machine wrote the captions: they are not for clinical use."


def _use(found: Finished, usage: Usage, named: Mapping[str, str]) -> Iterator[str]:
    yield f"## How to use it\n\n{usage.what}"
    if usage.script:
        yield f"`python {SCRIPT} IMAGE ...` captions images by torch, transformers and Pillow:"
        yield f"```python\n{usage.script}```"
        yield (
            "`generation_config.json` has the settings of the run's decoding. Weights are fp32. The run "
            f"computed in `train.precision: {found.train.precision}`, so captions may differ in rare cases. "
            "The harness stretches 16-bit images to 8 bits and puts transparent ones on black, and the "
            "script does not."
        )
        yield _after(found.record["config"])
    keys = " ".join(f"--set model.{key}=FOLDER/{place}".removesuffix("/.") for key, place in named.items())
    yield f"With the harness: `harness run EXPERIMENT.yaml {keys}`"


def _after(config: Mapping[str, Any]) -> str:
    """What the run does with the captions of its model."""
    more = [name for name in ("consensus", "retrieval") if config.get(name)]
    more += ["samples"] if config["predict"].get("samples") else []
    rules = PostprocessConfig.model_validate(config.get("postprocess", {}))
    own = ", ".join(name for name, on in rules if on) or "nothing"
    text = f"The run then post-processes captions ({own}); its scores are those after it."
    return text + (f" It also uses {' and '.join(more)}, which this folder does not have." if more else "")


def _data(record: Mapping[str, Any]) -> Iterator[str]:
    data = record["data"]
    splits = ", ".join(f"{count:,} {split}" for split, count in data["splits"].items() if count)
    made_up = " It is the made-up set of the harness." if record["config"]["data"].get("phantom") else ""
    digests = ", ".join(f"{split} `{digest}`" for split, digest in data["fingerprints"].items())
    yield (
        f"## Data\n\nFolder `{Path(data['root']).name}`, layout `{data['layout']}`: {splits} images.{made_up}"
        f" Fingerprints of labels and images: {digests}."
    )
    if data["notes"]:
        yield "\n".join(f"- {note}" for note in data["notes"])


def _training(found: Finished) -> Iterator[str]:
    record, train = found.record, found.train
    rows = [
        f"- stage {number}: {stage.epochs} epochs, "
        f"learning rate {stage.learning_rate or train.learning_rate:g}, "
        f"losses {', '.join(f'{name} ({weight:g})' for name, weight in stage.losses if weight)}"
        for number, stage in enumerate(train.stages, 1)
        if stage.epochs
    ]
    best = record.get("training", {}).get("best", {})
    rows += [f"- best weights: stage {best['stage']}, epoch {best['epoch']}"] if best.get("epoch") else []
    rows += [f"- soup of {', '.join(record['soup']['members'])}"] if record.get("soup") else []
    where = ", ".join(f"{name} {value}" for name, value in record.get("environment", {}).items())
    side = found.model.image_size
    rows.append(f"- batch size {train.batch_size}, images of {side} pixels, seed {record['seed']}")
    commit = (record.get("git") or {}).get("commit")
    rows += [f"- commit `{commit}`"] if commit else []
    rows += [f"- {where}"] if where else []
    yield "## Training\n\n" + "\n".join([*rows, f"- command: `{record['command']}`"])


def _scores(record: Mapping[str, Any]) -> Iterator[str]:
    scores = records.on_valid(record)
    if not scores:
        why = record.get("unscored", {}).get("valid", "the run has none on validation")
        yield f"## Scores\n\nNo scores: {why}."
        return
    year = record["edition"]
    lines = ["| metric | score | 95 % interval | n | signature |", "|---|---|---|---|---|"]
    for name, score in scores.items():
        if score["value"] is None:
            value, interval = f"absent: {score.get('reason') or 'not known'}", ""
        else:
            value = f"{score['value']:.4f}{'' if score['official'] else '*'}"
            ends = score.get("low"), score.get("high")
            interval = f"[{ends[0]:.4f}, {ends[1]:.4f}]" if None not in ends else ""
        signature = score["signature"].replace("|", r"\|")
        lines.append(f"| {name} | {value} | {interval} | {score.get('n', '')} | `{signature}` |")
    yield f"## Scores\n\nOn validation, with the metrics of ImageCLEFmedical Caption {year}."
    yield "\n".join(lines)
    if any(score["value"] is not None and not score["official"] for score in scores.values()):
        yield r"\* not comparable with official scores: another model, precision or reading"


def _licences(found: Finished) -> Iterator[str]:
    lines = [
        f"- `{name}` (`model.{key}`): {_licence(name) or _UNKNOWN}"
        for key, name in family(found.model).checkpoints(found.model).items()
    ]
    if family(found.model).built_from(found.model) is not None:
        lines.append(
            "- `tiny`: built from the training data by the harness; no licence of another model applies"
        )
    yield "## Licence\n\nOf what the model comes from:\n\n" + "\n".join(lines)
    yield "The data may have terms of its own, which also bind models that learned from it."


def _licence(name: str) -> str | None:
    """The licence that a checkpoint's own card names; None if there is no such card here."""
    at_hand = checkpoints.find(name)
    file = at_hand.folder / "README.md" if at_hand else None
    if file is None or not file.is_file():
        return None
    head = file.read_text(encoding="utf-8", errors="replace").split("---")
    try:
        values = yaml.safe_load(head[1]) if len(head) > 2 and not head[0].strip() else None
    except yaml.YAMLError:
        return None
    licence = values.get("license") if isinstance(values, dict) else None
    return str(licence) if licence else None
