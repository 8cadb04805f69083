"""The concepts of a data set: how frequent they are, which occur together, and which training never shows."""

import io
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import numpy as np

from harness.data.listing import Dataset, Example
from harness.output.visible import one_line
from harness.store import write

FIRST = 20
"""The most frequent concepts, whose co-occurrence is shown."""
_COLOUR, _OTHER = "#35618f", "#c4501b"
_LONGEST = 32  # characters of a name in a picture


class Concept(NamedTuple):
    """A concept, and how many images of each split have it."""

    cui: str
    name: str
    images: dict[str, int]


def frequencies(examples: Iterable[Example]) -> dict[str, int]:
    """How many images have each concept: the most frequent concept first, ties by CUI."""
    counts = Counter(cui for example in examples for cui in set(example.cuis))
    return dict(sorted(counts.items(), key=lambda one: (-one[1], one[0])))


def table(dataset: Dataset) -> list[Concept]:
    """Every concept of the labelled splits: the most frequent in train first, then in valid, ties by CUI."""
    counts = {split: frequencies(dataset.splits[split]) for split in labelled(dataset)}
    cuis = sorted({cui for found in counts.values() for cui in found})
    cuis.sort(key=lambda cui: [-found.get(cui, 0) for found in counts.values()])
    names = dataset.concept_names
    return [
        Concept(cui, names.get(cui, ""), {split: found.get(cui, 0) for split, found in counts.items()})
        for cui in cuis
    ]


def labelled(dataset: Dataset) -> list[str]:
    """The splits in which an image has a concept; the labels of test may be withheld."""
    return [split for split, rows in dataset.splits.items() if any(example.cuis for example in rows)]


def unseen(found: Sequence[Concept]) -> list[Concept]:
    """The concepts of valid that no training image has: no predictor learns them. Most frequent first."""
    return [one for one in found if one.images.get("valid") and not one.images.get("train")]


def per_image(dataset: Dataset) -> dict[str, dict[int, int]]:
    """How many images of each labelled split have 0, 1, 2, ... concepts; numbers of no image are left out."""
    counts = {
        split: Counter(len(set(example.cuis)) for example in dataset.splits[split])
        for split in labelled(dataset)
    }
    return {split: dict(sorted(count.items())) for split, count in counts.items()}


def together(dataset: Dataset, cuis: Sequence[str]) -> np.ndarray:
    """How many training images have both of two concepts, (n, n); on the diagonal, those that have one."""
    place = {cui: number for number, cui in enumerate(cuis)}
    counts = np.zeros((len(cuis), len(cuis)), dtype=int)
    for example in dataset.splits["train"]:
        found = [place[cui] for cui in set(example.cuis) if cui in place]
        counts[np.ix_(found, found)] += 1
    return counts


def summary(dataset: Dataset, found: Sequence[Concept]) -> dict[str, dict[str, Any]]:
    """What tables say of each labelled split; the numbers of concepts are those of its images."""
    result = {}
    new = {one.cui for one in unseen(found)}
    for split in labelled(dataset):
        rows = dataset.splits[split]
        numbers = [len(set(example.cuis)) for example in rows]
        counts = [one.images[split] for one in found if one.images[split]]
        result[split] = {
            "concepts": len(counts),
            "in 1 image only": counts.count(1),
            "per image, mean": round(mean(numbers), 2),
            "per image, median": median(numbers),
            "per image, most": max(numbers),
            "images without any": numbers.count(0),
        }
        if split == "valid":
            holders = sum(not new.isdisjoint(example.cuis) for example in rows)
            result[split] |= {"unseen in train": len(new), "images with an unseen one": holders}
    return result


def described(dataset: Dataset, found: Sequence[Concept]) -> dict[str, Any]:
    """All of it as JSON: `summary`, `per_image`, `frequency`, `co_occurrence` of the first, and `unseen`."""
    first = [one.cui for one in found if one.images.get("train")][:FIRST]
    return {
        "summary": summary(dataset, found),
        "per_image": per_image(dataset),
        "frequency": [one._asdict() for one in found],
        "co_occurrence": {"concepts": first, "images": together(dataset, first).tolist()},
        "unseen": [one._asdict() for one in unseen(found)],
    }


def plot(dataset: Dataset, found: Sequence[Concept], path: Path) -> Path:
    """Write a PNG: co-occurrence and frequency of the first concepts, and below them three panels.

    These are the images of each concept by rank, images per number of concepts, and what is unseen in train.
    """
    from matplotlib.figure import Figure

    first = [one for one in found if one.images.get("train")][:FIRST]
    figure = Figure(figsize=(13, 5 + 0.3 * max(len(first), 8)), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1 + 0.3 * max(len(first), 8), 3.4))
    if first:
        _first(above.subplots(1, 2, width_ratios=(2.2, 1), sharey=True), dataset, first)
    by_rank, numbers, new = below.subplots(1, 3)
    _by_rank(by_rank, found, labelled(dataset))
    _numbers(numbers, per_image(dataset))
    _unseen(new, unseen(found))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return write(path, buffer.getvalue())


def _label(one: Concept) -> str:
    name = one_line(one.name or one.cui)
    return (name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…").replace("$", r"\$")


def _first(panels: Any, dataset: Dataset, first: Sequence[Concept]) -> None:
    """The heat map of the first concepts, and beside its rows how frequent they are."""
    shares, bars = panels
    counts = together(dataset, [one.cui for one in first])
    share = counts / counts.diagonal()[:, None]
    shares.set_facecolor("#d9d9d9")  # the diagonal
    shares.imshow(np.where(np.eye(len(first), dtype=bool), np.nan, share), cmap="Blues", vmin=0, vmax=1)
    for row, column in zip(*np.nonzero(counts), strict=True):
        if row != column:
            colour = "white" if share[row, column] > 0.55 else "#333333"
            text = f"{100 * share[row, column]:.0f}"
            shares.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    places, names = range(len(first)), [_label(one) for one in first]
    shares.set_yticks(places, names, fontsize=8)
    shares.set_xticks(places, names, fontsize=8, rotation=45, ha="right", rotation_mode="anchor")
    shares.set(title="% of the training images with the concept of a row that have that of a column")
    shares.set_aspect("auto")
    total = len(dataset.splits["train"])
    images = [one.images["train"] for one in first]
    bars.barh(places, images, color=_COLOUR)
    for place, count in zip(places, images, strict=True):
        bars.text(count, place, f" {count:,} ({100 * count / total:.0f} %)", va="center", fontsize=8)
    bars.set(title=f"images of train ({total:,})", xlim=(0, 1.3 * max(images)))
    bars.tick_params(axis="y", left=False, labelleft=False)
    _plain(bars)


def _by_rank(axes: Any, found: Sequence[Concept], splits: Sequence[str]) -> None:
    for split, colour in zip(splits, (_COLOUR, _OTHER, "#777777"), strict=False):
        counts = sorted((one.images[split] for one in found if one.images[split]), reverse=True)
        label = f"{split}: {len(counts):,} concept{'s' * (len(counts) != 1)}"
        axes.loglog(range(1, len(counts) + 1), counts, ".-", color=colour, markersize=4, label=label)
    axes.set(title="images of each concept, by rank", xlabel="rank", ylabel="images")
    axes.set(xlim=(0.8, None), ylim=(0.8, None))
    axes.legend(frameon=False)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    _plain(axes)


def _numbers(axes: Any, counts: dict[str, dict[int, int]]) -> None:
    """The share of the images of each split by their number of concepts, as bars side by side."""
    wide = 0.85 / max(len(counts), 1)
    for number, ((split, found), colour) in enumerate(
        zip(counts.items(), (_COLOUR, _OTHER, "#777777"), strict=False)
    ):
        total = sum(found.values())
        places = [concepts + (number - (len(counts) - 1) / 2) * wide for concepts in found]
        label = f"{split}: {total:,} images"
        axes.bar(places, [100 * n / total for n in found.values()], wide, color=colour, label=label)
    axes.set(title="images per number of concepts", xlabel="concepts of an image", ylabel="% of the split")
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.margins(y=0.3)  # room for the legend
    axes.legend(frameon=False, loc="upper left")
    _plain(axes)


def _unseen(axes: Any, found: Sequence[Concept]) -> None:
    axes.set(title=f"concepts of valid unseen in train: {len(found):,}")
    _plain(axes)
    if not found:
        axes.axis("off")
        axes.text(0.5, 0.5, "train has every concept of valid", ha="center", transform=axes.transAxes)
        return
    shown = found[: FIRST // 2]
    axes.barh(range(len(shown)), [one.images["valid"] for one in shown], color=_OTHER)
    axes.set_yticks(range(len(shown)), [_label(one) for one in shown], fontsize=8)
    axes.invert_yaxis()
    more = f" (first {len(shown)})" if len(shown) < len(found) else ""
    axes.set_xlabel(f"images of valid{more}")
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
