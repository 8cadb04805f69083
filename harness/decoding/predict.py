"""Captions of a split by a model; captions from before an interruption are kept."""

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness.captions import PREDICTIONS, write_captions
from harness.config.sections import PredictConfig
from harness.decoding.batches import slices
from harness.decoding.search import search
from harness.machine import ranks
from harness.models.loading import Loaded
from harness.store import fingerprint

PARTIALS = "partial-*.jsonl"


@torch.inference_mode()
def captions(
    loaded: Loaded,
    pixels: Any,
    indices: Sequence[int],
    config: PredictConfig,
    done: Callable[[Sequence[int], Sequence[str]], None] = lambda indices, captions: None,
    prompts: Sequence[Sequence[int]] | None = None,
) -> list[str]:
    """Caption the images `pixels[indices]`, uint8 (B, S, S, 3); `done` is called after every batch.

    `prompts` are the ids before the caption of each of `pixels`; by default, those of the codec. Images with
    prompts of one length are decoded together, so that no caption depends on padding.
    """
    model = loaded.model
    device = model.device
    was_training = model.training
    model.eval()
    own = {int(i): loaded.caption.prompt if prompts is None else prompts[i] for i in indices}
    order = sorted(own, key=lambda i: -len(own[i]))  # the longest need the most memory
    breaks = [n for n in range(1, len(order)) if len(own[order[n]]) != len(own[order[n - 1]])]
    result: dict[int, str] = {}
    with model.decoder(config.num_beams, config.max_new_tokens) as begin:
        for part in map(order.__getitem__, slices(len(order), config, device.type, breaks)):
            batch = torch.from_numpy(np.ascontiguousarray(pixels[np.array(part)])).to(device)
            decoding = begin(loaded.normalise(batch), torch.tensor([own[i] for i in part], device=device))
            # what an own prompt has more is no text of the caption, so penalties do not count it
            decoding.context = decoding.context[:, : len(loaded.caption.prompt)]
            found = search(decoding, config, loaded.caption.end, loaded.caption.pad)
            texts = [loaded.caption.decode(row) for row in found.ids[:, 0].tolist()]
            done(part, texts)
            result |= zip(part, texts, strict=True)
    model.train(was_training)
    return [result[int(i)] for i in indices]


def predict_split(
    loaded: Loaded,
    ids: Sequence[str],
    pixels: Any,
    config: PredictConfig,
    directory: Path,
    progress: Callable[[int, int], None],
    given: Mapping[str, str] | None = None,
) -> None:
    """Write `predictions.csv` (ID, caption), with captions from `partial-*.jsonl` of an interrupted call.

    `given` are the captions of ids whose images can't be read; `pixels` (N, S, S, 3) are the other images.
    Each rank captions its share of the remaining images; rank 0 writes.
    """
    given = given or {}
    every, ids = ids, [image for image in ids if image not in given]
    known = ranks.agree(_read_partials(directory))
    waiting = ranks.share([i for i, image in enumerate(ids) if image not in known])
    with (directory / f"partial-{ranks.rank()}.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n")  # ends a line that an interruption left incomplete
        done = len(known)

        def keep(part: Sequence[int], texts: Sequence[str]) -> None:
            nonlocal done
            for i, text in zip(part, texts, strict=True):
                row = [ids[i], text]
                file.write(json.dumps([*row, fingerprint(row)], ensure_ascii=False) + "\n")
            file.flush()
            done += len(part) * ranks.world_size()
            progress(min(done, len(ids)), len(ids))

        texts = captions(loaded, pixels, waiting, config, keep)
    known |= ranks.gather([(ids[i], text) for i, text in zip(waiting, texts, strict=True)])
    if ranks.rank() == 0:
        known |= given
        write_captions(directory / PREDICTIONS, {image: known[image] for image in every})
        for partial in directory.glob(PARTIALS):
            partial.unlink()


def _read_partials(directory: Path) -> dict[str, str]:
    """Captions by id; a row that an interruption cut, or a bit of which has changed, is left out."""
    known = {}
    for file in sorted(filter(Path.is_file, directory.glob(PARTIALS))):
        for line in file.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError, RecursionError):
                match json.loads(line):
                    case [str(image), str(caption), digest] if digest == fingerprint([image, caption]):
                        known[image] = caption
    return known
