"""The captions of a page with their images, and notes on images that are not shown."""

import base64
import io
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from harness.data.images import DAMAGE, decode, each
from harness.pages import link
from harness.report import sources
from harness.report.sources import Captions, Images, Run

SIDE = 192
"""Pixels of a thumbnail's longer side."""
MOST_EMBEDDED = 1_000
"""Maximum number of images in a page, 6 to 10 kB each; the page of a larger set links to the files."""


def shown(
    captions: Captions, images: Images | None, run: Run, page: Path, opening: Sequence[str] = ()
) -> dict[str, Any]:
    """The captions as the page lists them: without absent fields, and with concepts as list positions.

    The images of `opening` are always in the page.
    """
    examples = images.examples if images else {}
    links, thumbnails = pictures(captions.ids, images, page, opening)
    attention = sources.attention(run, captions)
    count = Counter(cui for key in captions.ids if key in examples for cui in examples[key].cuis)
    concepts = {cui: place for place, (cui, _) in enumerate(count.most_common())}
    listed = []
    for key in captions.ids:
        row = {
            "id": key,
            "reference": captions.references.get(key),
            "before": captions.before.get(key),
            "after": captions.after.get(key),
            "scores_before": _numbers(captions.scored_before.get(key), captions.metrics),
            "scores_after": _numbers(captions.scored_after.get(key), captions.metrics),
            "concepts": [concepts[cui] for cui in examples[key].cuis] if key in examples else None,
            "image": links.get(key),
            "thumbnail": thumbnails.get(key),
            "attention": _encoded(attention[key]) if key in thumbnails and key in attention else None,
        }
        listed.append({name: value for name, value in row.items() if value is not None})
    names = images.concept_names if images else {}
    return {
        "metrics": captions.metrics,
        "concepts": [[cui, names.get(cui, cui), count[cui]] for cui in concepts],
        "rows": listed,
        "attention_grid": next((one.shape for one in attention.values()), None),
        "notes": list(_notes(captions, images, run, len(links), len(thumbnails))),
    }


def pictures(
    ids: Sequence[str], images: Images | None, page: Path, always: Collection[str] = ()
) -> tuple[dict[str, str], dict[str, str]]:
    """Links to the images with these ids, and their thumbnails; of too many, only those of `always`."""
    files = {key: images.files[key] for key in ids if key in images.files} if images else {}
    embedded = files if len(files) <= MOST_EMBEDDED else {key: files[key] for key in always if key in files}
    return {key: link(file, page) for key, file in files.items()}, _thumbnails(embedded)


def _notes(captions: Captions, images: Images | None, run: Run, found: int, embedded: int) -> Iterator[str]:
    """Notes on captions and images that are missing or changed."""
    if not captions.ids:
        yield "This run has no validation captions yet."
        return
    if images is None:
        yield gone(run)
        return
    now = {key: example.caption for key, example in images.examples.items()}
    if changed := sum(now.get(key) != caption for key, caption in captions.references.items()):
        total = len(captions.references)
        yield f"The data folder has changed since the run: {changed:,} of {total:,} captions differ."
    yield from missing(len(captions.ids), found, embedded)


def gone(run: Run) -> str:
    """What is said where the data folder is not here."""
    root = run.record["data"]["root"]
    return f"The data folder {root} is not here, so there are no images or names of concepts."


def missing(ids: int, found: int, embedded: int) -> Iterator[str]:
    """Notes on images that are not embedded, of `ids` images with `found` files."""
    if found > MOST_EMBEDDED:
        yield (
            f"{found:,} images are too many to embed (at most {MOST_EMBEDDED:,}). The page shows them from "
            "their files, as long as you do not move the page or the data."
        )
    if missing := ids - (embedded if found <= MOST_EMBEDDED else found):
        yield f"{missing:,} of {ids:,} images are missing or damaged."


def _numbers(row: Mapping[str, str] | None, metrics: Sequence[str]) -> list[float | None] | None:
    """Scores of one image, rounded for the page; None for a score that is not a finite number."""
    if row is None:
        return None
    values = [number(row.get(metric)) for metric in metrics]
    return [None if value is None else round(value, 4) for value in values]


def number(text: str | None) -> float | None:
    """A score of one image as it is in a table; None for one that is not a finite number."""
    try:
        value = float(text or "nan")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _encoded(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode()


def _thumbnails(files: Mapping[str, Path]) -> dict[str, str]:
    """Base64 JPEG thumbnails by id, for the readable images."""
    made = each(_thumbnail, list(files.values()))
    return {key: image for key, image in zip(files, made, strict=True) if image}


def _thumbnail(path: Path) -> str | None:
    try:
        image = decode(path)
    except DAMAGE:
        return None
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return base64.b64encode(file.getvalue()).decode()
