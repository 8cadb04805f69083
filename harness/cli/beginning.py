"""A first experiment for a folder of data: what lies there, and a commented file that runs here."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from PIL import Image

from harness import metrics, store
from harness.config.experiment import load
from harness.config.schema import Config
from harness.data.images import DAMAGE, FORMATS
from harness.data.listing import Listing
from harness.data.readers import LAYOUTS, read
from harness.errors import Problem, UserError
from harness.machine import device
from harness.models import checkpoints
from harness.output.visible import one_line
from harness.steps.plan import dry, problems
from harness.store import gb
from harness.training import forecast

REAL = "Salesforce/blip2-opt-2.7b-coco"
_PARTS = (REAL, "Salesforce/blip2-itm-vit-g", "bert-base-uncased")
"""The checkpoints of the paper's model: `checkpoint`, `text_checkpoint`, `text_head_checkpoint`."""
_ENOUGH = 20e9  # bytes of an accelerator for the paper's model with gradient checkpointing
_TOLD = ("stage", "time", "unknown")
"""How the lines of a forecast begin that a first look needs."""
_LOOKED = 60  # images whose sizes are read
_EDITIONS = {"imageclef2023": 2023, "imageclef2024": 2025, "rocov2": 2025}
"""The edition by layout: of several years, the one whose formats are established."""


@dataclass(frozen=True)
class Sight:
    """What lies in a folder of data, and what this machine has for it."""

    root: Path
    layout: str
    listing: Listing
    faults: int
    """Rows with problems in the label files."""
    sides: str
    """The sizes of images, in words."""
    device: str
    real: bool
    """Whether the paper's model fits here, and its weights are on this machine."""
    why: str
    """Why the model is the one that it is."""

    @property
    def count(self) -> dict[str, int]:
        """Images by split; without test if there are none."""
        return {split: len(rows) for split, rows in self.listing.splits.items() if rows}

    @property
    def concepts(self) -> bool:
        """Whether train and valid have files of concepts, with their names."""
        return not self.listing.absent

    @property
    def words(self) -> str:
        """The lengths of training captions, in words."""
        lengths = sorted(len(one.caption.split()) for one in self.listing.splits["train"] if one.caption)
        if not lengths:
            return "no training caption can be read"
        longest = lengths[min(len(lengths) - 1, int(0.95 * len(lengths)))]
        return f"median {median(lengths):g} words, 95 % have at most {longest}"

    @property
    def lines(self) -> list[str]:
        """All of it, a line each."""
        images = ", ".join(f"{count:,} {split}" for split, count in self.count.items())
        lacking = ", ".join(self.listing.absent)
        told = "yes" if self.concepts else f"no files of {lacking}"
        return [
            f"layout    {self.layout}",
            f"images    {images}; {self.sides}",
            f"captions  {self.words}",
            f"concepts  {told}",
            f"problems  {f'{self.faults:,} in label files' if self.faults else 'none in label files'}",
            f"device    {self.device}",
            f"model     {self.why}",
        ]


def candidates(place: Path) -> list[Path]:
    """The folders in `place` and in its `data` that look like data sets."""
    around = [place, *(folder for name in (".", "data") for folder in sorted((place / name).glob("*/")))]
    return [one for one in around if any(not read(one, layout).fatal for layout in LAYOUTS)]


def look(root: Path) -> Sight:
    """What lies in a folder. Raises `UserError` with what was found if no layout fits."""
    if not root.is_dir():
        raise UserError([Problem(f"no such folder: {root}", key="DATA_FOLDER")])
    layout, listing = _layout(root)
    found = device.probe("auto")
    room = gb(device.memory(found.kind))
    fits = found.kind != "cpu" and device.memory(found.kind) >= _ENOUGH
    lacking = [name for name in _PARTS if checkpoints.find(name) is None]
    if fits and not lacking:
        why = f"{REAL}, fine-tuned as the paper does"
    elif fits:
        why = f"tiny, a STAND-IN: {', '.join(lacking)} are not on this machine (hf download NAME)"
    else:
        why = f"tiny, a STAND-IN: {REAL} needs a GPU or NPU with {gb(_ENOUGH)} or more"
    told = f"{found.kind} ({found.name}), {room} free"
    return Sight(
        root, layout, listing, len(listing.findings), _sides(listing), told, fits and not lacking, why
    )


def _layout(root: Path) -> tuple[str, Listing]:
    """The layout of a folder; of equal ones, `rocov2` if it has manual concepts, else the first."""
    listings = {layout: read(root, layout) for layout in LAYOUTS}
    fitting = [layout for layout, listing in listings.items() if not listing.fatal]
    if "rocov2" in fitting and listings["rocov2"].manual:
        return "rocov2", listings["rocov2"]
    if fitting:
        return fitting[0], listings[fitting[0]]
    nearest = min(listings, key=lambda layout: len(listings[layout].fatal))
    names = ", ".join(listings)
    hint = f"The folder must have one of the layouts {names}: docs/own-data.md shows their files."
    first = Problem(f"no layout fits; {nearest} is the nearest, and lacks:", root)
    raise UserError([first, *listings[nearest].fatal], hint)


def _sides(listing: Listing) -> str:
    """The sizes of some images, in words."""
    files = list(listing.files.values())
    sizes = []
    for file in files[:: max(1, len(files) // _LOOKED)][:_LOOKED]:
        try:
            with Image.open(file.path, formats=FORMATS) as image:
                sizes.append(image.size)
        except DAMAGE:
            continue
    if not sizes:
        return "none can be opened"
    low, high = (tuple(pick(side) for side in zip(*sizes, strict=True)) for pick in (min, max))
    return f"{low[0]} x {low[1]} to {high[0]} x {high[1]} pixels in a sample of {len(sizes)}"


def write(sight: Sight, file: Path, name: str) -> tuple[Config, list[str]]:
    """Write an experiment for what was seen -> its config, and the forecast as lines.

    It is checked as `run --dry-run` checks it, and written only then. If rows of the data have problems, the
    experiment leaves them out. Raises `UserError` if a file is there already, or if it could not run.
    """
    if file.exists():
        hint = "Name another file: --out OTHER.yaml"
        raise UserError([Problem("is there already, and is not overwritten", file, hint=hint)])
    try:
        text, config = _checked(sight, file, name, skip_bad=False)
    except UserError as error:
        try:
            text, config = _checked(sight, file, name, skip_bad=True)
        except UserError:
            raise error from None
    told = [line for line in forecast.lines(forecast.forecast(config)) if line.startswith(_TOLD)]
    store.write(file, text)
    return config, told


def _checked(sight: Sight, file: Path, name: str, skip_bad: bool) -> tuple[str, Config]:
    """The text of an experiment that could run, and its config; stand-ins replace missing weights."""
    standins: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / file.name
        while True:
            text = _text(sight, file, name, standins, skip_bad)
            draft.write_text(text, encoding="utf-8")
            (config,) = load(draft, [])
            lacking = problems(config)
            known = {weights.path: section for section, weights in metrics.all_weights().items()}
            more = [known[problem.key] for problem in lacking if problem.key in known]
            if not lacking:
                break
            if not more or set(more) & set(standins):
                raise UserError(lacking)
            standins += more
    dry(config)
    return text, config


def _text(sight: Sight, file: Path, name: str, standins: Sequence[str], skip_bad: bool) -> str:
    """The experiment as YAML with comments."""
    train = sight.count["train"]
    batch = next((size for size in (32, 16, 8, 4, 2) if 4 * size <= train), 1)
    parts = [
        f"# Question  What does a first model learn from {_line(sight.root)}?\n"
        f"# Command   harness run {_line(file)}\n"
        "# Expected  not known yet; the run prints the scores of the constant caption too, to compare with\n"
        f"# Data      {_line(sight.lines[1][10:])}\n"
        f"# Captions  {_line(sight.lines[2][10:])}\n"
        f"# Made by   harness init; docs/reference.md describes every key\n"
        f"name: {json.dumps(name)}\n"
        f"edition: {_EDITIONS[sight.layout]}             # whose metrics and submission files apply\n"
        "seeds: [42]\n"
        "data:\n"
        f"  root: {json.dumps(str(sight.root), ensure_ascii=False)}\n"
        f"  layout: {sight.layout}\n",
        "  skip_bad: true            # rows with problems: see `harness data check`\n" if skip_bad else "",
        "  # fraction: {train: 0.1}  # for a quick look at a tenth of the training images\n",
        _paper(sight) if sight.real else _tiny(sight, train, batch),
    ]
    if standins:
        parts.append(
            "score:                      # official weights are not on this machine: scores get a star\n"
        )
        parts += [f"  {section}: {{checkpoint: standin}}\n" for section in dict.fromkeys(standins)]
    return "".join(parts)


def _line(text: object) -> str:
    """A text for a comment: one line of visible characters."""
    return one_line(str(text))


def _paper(sight: Sight) -> str:
    """The paper's model, with a tenth of its epochs at first."""
    losses = "{caption: 1, concept: 1}" if sight.concepts else "{caption: 1}"
    note = "captions, and sentences of concepts" if sight.concepts else "there are no files of concepts"
    return f"""model:
  checkpoint: {_PARTS[0]}
  text_checkpoint: {_PARTS[1]}
  text_head_checkpoint: {_PARTS[2]}
  image_size: 224           # the paper's best is 364, which needs 3 times the time
  language_model: true      # false: the Q-Former alone writes the captions, which needs less memory
train:
  stages:                   # the paper trains 50 and 20 epochs
    - {{epochs: 5, losses: {losses}}}   # {note}
    - {{epochs: 2, losses: {{caption: 1}}}}
  batch_size: 128
  micro_batch_size: auto    # the most images that fit
  gradient_checkpointing: auto
  learning_rate: 1e-5
  warmup_steps: 200
predict:
  num_beams: 5
  max_new_tokens: 128
  min_new_tokens: 8
postprocess:
  deduplicate: true
"""


def _tiny(sight: Sight, train: int, batch: int) -> str:
    """The stand-in, with epochs for about 600 steps."""
    epochs = max(2, min(20, round(600 * batch / train)))
    first = max(1, epochs // 4)
    stages = f"    - {{epochs: {epochs}, losses: {{caption: 1}}}}   # there are no files of concepts\n"
    if sight.concepts:
        stages = (
            f"    - {{epochs: {first}, losses: {{caption: 1, concept: 1}}}}   # and sentences of concepts\n"
        )
        stages += f"    - {{epochs: {epochs - first}, losses: {{caption: 1}}}}\n"
    seen = 8 if sight.concepts else 0
    told = "the image encoder learns concepts first" if sight.concepts else "it would learn concepts first"
    return f"""model:                      # {_line(sight.why)}
  checkpoint: tiny          # built from the training captions; its scores get a star and no rank
  image_size: 112           # a multiple of patch_size
  language_model: true      # false: the Q-Former alone writes the captions
  tiny:
    patch_size: 14
    hidden_size: 96
    vision_layers: 2
    qformer_layers: 2
    num_query_tokens: 8
    text_hidden_size: 128
    text_layers: 2
    text_epochs: 8
    vision_epochs: {seen}        # {told}
train:
  stages:
{stages}  batch_size: {batch}
  micro_batch_size: {batch}
  learning_rate: 3e-3
  warmup_steps: 20
  dropout: 0
  gradient_checkpointing: false
  evaluate_every: 0           # scores only at the end
predict:
  num_beams: 2
  max_new_tokens: 64
  batch_size: 50
"""
