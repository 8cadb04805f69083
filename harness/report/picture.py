"""The captions that open a run's page as one picture, which MLflow shows beside its files."""

import base64
import io
import textwrap
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness import records, store
from harness.output.visible import visible
from harness.report.gallery import SIDE

PICTURE = "captions.png"
_HEIGHT, _WORDS, _MOST = 1.7, 105, 4  # inches of an example; characters of a line of text, lines of a caption


def write(content: Mapping[str, Any], record: records.Record, folder: Path) -> list[str]:
    """Draw the examples of `as_dict` that have images, with reference, caption and score -> names of files.

    Empty if no example has an image.
    """
    from matplotlib.figure import Figure

    rows = {row["id"]: row for row in content["captions"]["rows"]}
    shown = [(kind, rows[key]) for kind, key in content["examples"]["chosen"] if "thumbnail" in rows[key]]
    if not shown:
        return []
    figure = Figure(figsize=(10, 0.5 + _HEIGHT * len(shown)), layout="constrained")
    figure.suptitle(_title(content, record), parse_math=False)
    if not _official(content, record):
        figure.supxlabel(
            "* not comparable with official scores: another model, precision or reading", fontsize=9
        )
    panels = figure.subplots(len(shown), 2, squeeze=False, width_ratios=(1, 4.5))
    for (image, text), (kind, row) in zip(panels, shown, strict=True):
        image.imshow(_decoded(row["thumbnail"]), cmap="gray", aspect="equal")
        image.set_axis_off()
        text.set_axis_off()
        score = _score(content, record, row)
        parts = [f"{kind}: {row['id']}{score}", _wrapped("reference", row.get("reference"))]
        parts.append(_wrapped("caption", row.get("after", row.get("before"))))
        told = "\n".join(parts)
        text.text(0, 1, told, va="top", fontsize=9, parse_math=False, transform=text.transAxes)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a caption in letters that the font lacks
        figure.savefig(file, format="png", dpi=SIDE / _HEIGHT)
    if not (folder / PICTURE).is_file() or (folder / PICTURE).read_bytes() != file.getvalue():
        store.write(folder / PICTURE, file.getvalue())  # else the mirror would copy it again
    return [PICTURE]


def _title(content: Mapping[str, Any], record: records.Record) -> str:
    return visible(f"{content['experiment']}/{content['run']}: captions of validation images") + (
        " (by a STAND-IN model)" if record["standin_model"] else ""
    )


def _decoded(thumbnail: str) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(base64.b64decode(thumbnail)))


def _score(content: Mapping[str, Any], record: records.Record, row: Mapping[str, Any]) -> str:
    """The score by which the examples were chosen, with a star if it is not official."""
    metric, names = content["examples"]["metric"], content["captions"]["metrics"]
    values = row.get("scores_after", row.get("scores_before"))
    if metric is None or values is None or values[names.index(metric)] is None:
        return ""
    star = "" if _official(content, record) else "*"
    return f"   {metric} {values[names.index(metric)]:.4f}{star}"


def _official(content: Mapping[str, Any], record: records.Record) -> bool:
    return records.on_valid(record).get(content["examples"]["metric"], {}).get("official", False)


def _wrapped(name: str, caption: str | None) -> str:
    text = f"{name}: {visible(caption or '(none)')}"
    return "\n".join(textwrap.wrap(text, _WORDS, max_lines=_MOST, placeholder=" ..."))
