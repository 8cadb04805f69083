"""A trained model and a split to captions; what was captioned before an interruption is kept."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness.captions import PREDICTIONS, write_captions
from harness.config import PredictConfig
from harness.models.loading import Loaded
from harness.store import write

PARTIAL = "partial.jsonl"


@torch.inference_mode()
def captions(
    loaded: Loaded,
    pixels: Any,
    indices: Sequence[int],
    config: PredictConfig,
    done: Callable[[Sequence[int], Sequence[str]], None] = lambda indices, captions: None,
) -> list[str]:
    """Caption `pixels[indices]` (uint8 (B, S, S, 3) each time); `done` hears of every finished batch."""
    model = loaded.model
    device = model.device
    was_training = model.training
    model.eval()
    prompt = torch.tensor(loaded.caption.prompt, device=device)
    options = {
        "num_beams": config.num_beams,
        "max_new_tokens": config.max_new_tokens,
        "min_new_tokens": config.min_new_tokens,
        "length_penalty": config.length_penalty,
        "repetition_penalty": config.repetition_penalty,
        "no_repeat_ngram_size": config.no_repeat_ngram_size,
    }
    if config.num_beams == 1:
        del options["length_penalty"]
    result: list[str] = []
    for start in range(0, len(indices), config.batch_size):
        part = np.asarray(indices[start : start + config.batch_size])
        batch = torch.from_numpy(np.ascontiguousarray(pixels[part])).to(device)
        ids = model.caption(
            loaded.normalise(batch), prompt, loaded.caption.end, loaded.caption.pad, **options
        )
        texts = [loaded.caption.decode(row) for row in ids.tolist()]
        done([int(i) for i in part], texts)
        result += texts
    model.train(was_training)
    return result


def predict_split(
    loaded: Loaded,
    ids: Sequence[str],
    pixels: Any,
    config: PredictConfig,
    directory: Path,
    progress: Callable[[int, int], None],
) -> None:
    """Write `predictions.csv` (ID, caption), going on after the images in `partial.jsonl`."""
    partial = directory / PARTIAL
    known = _read_partial(partial)
    write(partial, "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in known.items()))
    waiting = [i for i, image in enumerate(ids) if image not in known]
    with partial.open("a", encoding="utf-8") as file:

        def keep(part: Sequence[int], texts: Sequence[str]) -> None:
            for i, text in zip(part, texts, strict=True):
                known[ids[i]] = text
                file.write(json.dumps([ids[i], text], ensure_ascii=False) + "\n")
            file.flush()
            progress(len(known), len(ids))

        captions(loaded, pixels, waiting, config, keep)
    write_captions(directory / PREDICTIONS, {image: known[image] for image in ids})
    partial.unlink()


def _read_partial(file: Path) -> dict[str, str]:
    known = {}
    for line in file.read_text(encoding="utf-8").split("\n") if file.exists() else ():
        try:
            image, caption = json.loads(line)
        except ValueError:  # the line that the interruption cut
            continue
        known[image] = caption
    return known
