"""The captions of a page, each beside its image, and what to know of those that are not shown."""

import base64
import io
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from harness.data.images import DAMAGE, decode, each
from harness.report.sources import Captions, Images, Run

SIDE = 192
"""Pixels of a thumbnail's longer side."""
MOST_EMBEDDED = 1_000
"""Images that a page holds, 6 to 10 kB each; those of a larger set are shown from their files."""


def shown(captions: Captions, images: Images | None, run: Run, page: Path) -> dict[str, Any]:
    """The captions as the page lists them: absent things left out, concepts by their place in a list."""
    examples, files = (images.examples, images.files) if images else ({}, {})
    files = {key: files[key] for key in captions.ids if key in files}
    thumbnails = _thumbnails(files) if len(files) <= MOST_EMBEDDED else {}
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
            "image": link(files[key], page) if key in files else None,
            "thumbnail": thumbnails.get(key),
        }
        listed.append({name: value for name, value in row.items() if value is not None})
    names = images.concept_names if images else {}
    return {
        "metrics": captions.metrics,
        "concepts": [[cui, names.get(cui, cui), count[cui]] for cui in concepts],
        "rows": listed,
        "notes": list(_notes(captions, images, run, len(files), len(thumbnails))),
    }


def _notes(captions: Captions, images: Images | None, run: Run, found: int, embedded: int) -> Iterator[str]:
    """What to know of the captions and images shown, and of those that are not."""
    if not captions.ids:
        yield "This run has no validation captions yet."
        return
    if images is None:
        root = run.record["data"]["root"]
        yield f"The data folder {root} is not here, and with it images and names of concepts."
        return
    now = {key: example.caption for key, example in images.examples.items()}
    if changed := sum(now.get(key) != caption for key, caption in captions.references.items()):
        total = len(captions.references)
        yield f"The data folder has changed since the run: {changed:,} of {total:,} captions differ."
    if found > MOST_EMBEDDED:
        yield (
            f"{found:,} images are more than a page holds ({MOST_EMBEDDED:,}): they are shown from their "
            "files, as long as this page and the data stay where they are."
        )
    if missing := len(captions.ids) - (embedded if found <= MOST_EMBEDDED else found):
        yield f"{missing:,} of {len(captions.ids):,} images are missing or damaged."


def _numbers(row: Mapping[str, str] | None, metrics: Sequence[str]) -> list[float | None] | None:
    """Scores of one image with the digits that the page shows; None for one that is no number."""
    if row is None:
        return None
    values = [_number(row.get(metric)) for metric in metrics]
    return [round(value, 4) if math.isfinite(value) else None for value in values]


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def _thumbnails(files: Mapping[str, Path]) -> dict[str, str]:
    """Small JPEGs in base64 by id, of the images that can be read."""
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


def link(path: Path, page: Path) -> str:
    """A path as a link from the folder `page`."""
    return quote(os.path.relpath(path, page).replace(os.sep, "/"))
