"""PNG plots of a run: training curves and caption lengths."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.store import write
from harness.training.resume import SAMPLED, VALIDATION, losses_of, rows_of


def _axes(count: int) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    width = 6 * count  # inches, as the margins; matplotlib's own layouts draw everything twice
    margins = {"left": 0.8 / width, "right": 1 - 0.2 / width, "bottom": 0.14, "top": 0.92}
    return pyplot.subplots(1, count, figsize=(width, 4), gridspec_kw=margins, squeeze=False)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    pyplot.close(figure)
    write(path, image.getvalue())


def curves(losses: Path, path: Path) -> None:
    """Plot losses, learning rate and validation scores of a `losses.jsonl` by optimiser step."""
    rows = list(rows_of(losses))
    rewarded = any("reward_loss" in row for row in rows)
    panels = {
        f"loss (nats per token{'; reward: per sample' * rewarded})": [
            *losses_of(rows),
            *(f"{name}loss" for name in VALIDATION),
        ],
        "learning rate": ["learning_rate"],
        "validation": sorted(
            {k for r in rows for k in r if k.startswith(VALIDATION) and not k.endswith(("_loss", "_primary"))}
        ),
    }
    if any(SAMPLED[0] in row for row in rows):
        panels |= {"samples": [n for n in SAMPLED if n != "sample_length"], "tokens": ["sample_length"]}
    figure, axes = _axes(len(panels))
    for axis, (title, names) in zip(axes[0], panels.items(), strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            if points:
                marker = "o" if name.startswith(VALIDATION) else None
                axis.plot(*zip(*points, strict=True), label=name, marker=marker)
        axis.set(title=title, xlabel="optimiser step")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    _save(figure, path)


def caption_lengths(predictions: Sequence[str], references: Sequence[str], path: Path) -> None:
    """Plot a histogram of words per caption for predictions and references."""
    lengths = [[len(caption.split()) for caption in captions] for captions in (predictions, references)]
    figure, axes = _axes(1)
    top = max(map(max, lengths))
    width = max(top // 30, 1)
    axes[0][0].hist(lengths, bins=range(0, top + 2 * width, width), label=["predictions", "references"])
    axes[0][0].set(xlabel="words", ylabel="captions")
    axes[0][0].legend()
    _save(figure, path)
