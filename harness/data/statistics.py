"""Statistics of a data set: images per modality (the paper's Table 1) and caption lengths (Figure 2)."""

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from harness.data.listing import Dataset
from harness.store import write

MODALITIES = {
    "C1306645": "X-ray",
    "C0040405": "CT",
    "C0024485": "MRI",
    "C0041618": "ultrasound",
    "C0002978": "angiography",
    "C0032743": "PET",
}
OTHER = "other/unknown"


def modalities(dataset: Dataset) -> dict[str, dict[str, int]]:
    """Images per split and modality; an image's modality is the first one among its concepts.

    An image whose concepts name no modality (as in a test split without labels) counts as other/unknown. This
    row exists only if it is needed, and it is the only one if no image has concepts.
    """
    counts = {}
    known = any(example.cuis for examples in dataset.splits.values() for example in examples)
    for split, examples in dataset.splits.items():
        count = Counter(modality(example.cuis) for example in examples)
        names = [*(MODALITIES.values() if known else ()), *([OTHER] if count[OTHER] else [])]
        counts[split] = {name: count[name] for name in names}
    return counts


def modality(cuis: Sequence[str]) -> str:
    """The modality of an image with these concepts: the first one that is a modality, or other/unknown."""
    return next((MODALITIES[cui] for cui in cuis if cui in MODALITIES), OTHER)


def caption_lengths(dataset: Dataset) -> dict[str, list[int]]:
    """Words per caption, split at white space, of each split; empty if a split has no captions."""
    return {
        split: [len(example.caption.split()) for example in examples if example.caption is not None]
        for split, examples in dataset.splits.items()
    }


def plot_lengths(dataset: Dataset, path: Path) -> Path:
    """Write a PNG histogram of words per caption, one panel per split that has captions."""
    from matplotlib.figure import Figure

    lengths = {split: words for split, words in caption_lengths(dataset).items() if words}
    longest = max(max(words) for words in lengths.values())
    width = max(1, -(-longest // 50))  # whole words per bar, at most 50 bars
    bins = [start - 0.5 for start in range(0, longest + width + 1, width)]
    figure = Figure(figsize=(7, 2.6 * len(lengths)), layout="constrained")
    panels = figure.subplots(len(lengths), sharex=True, squeeze=False)[:, 0]
    for axes, (split, words) in zip(panels, lengths.items(), strict=True):
        axes.hist(words, bins, color="#35618f")
        middle = median(words)
        axes.axvline(middle, color="#c4501b", label=f"median {middle:g} words")
        axes.set(title=f"{split}: {len(words):,} captions", ylabel="captions")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("words per caption")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return write(path, buffer.getvalue())
