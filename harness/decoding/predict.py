"""Captions of a split by a model; captions from before an interruption are kept."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.captions import CANDIDATES, PREDICTIONS, Candidate, write_candidates, write_captions
from harness.config.sections import PredictConfig
from harness.decoding.batches import slices
from harness.decoding.search import Captions, sample, search, uniforms
from harness.machine import ranks
from harness.models.loading import Loaded
from harness.models.text import Codec
from harness.store import fingerprint

PARTIALS = "partial-*.jsonl"


def captions(loaded: Loaded, pixels: Any, indices: Sequence[int], config: PredictConfig) -> list[str]:
    """Caption the images `pixels[indices]`, uint8 (B, S, S, 3), by the best beam."""
    return [best.caption for best, *_ in candidates(loaded, pixels, indices, config)]


@torch.inference_mode()
def candidates(
    loaded: Loaded,
    pixels: Any,
    indices: Sequence[int],
    config: PredictConfig,
    draws: Callable[[Sequence[int]], Tensor] | None = None,
    done: Callable[[Sequence[int], Sequence[list[Candidate]]], None] = lambda indices, found: None,
) -> list[list[Candidate]]:
    """The candidates of each of the images `pixels[indices]`, uint8 (B, S, S, 3): beams, best first, samples.

    `draws` gives those of `search.sample` for images by their indices; without it nothing is sampled. `done`
    is called after every batch.
    """
    model = loaded.model
    was_training = model.training
    model.eval()
    result: list[list[Candidate]] = []
    with _speaking(loaded, config) as speak:
        for part in map(np.asarray(indices).__getitem__, slices(len(indices), config, model.device.type)):
            batch = torch.from_numpy(np.ascontiguousarray(pixels[part])).to(model.device)
            found = speak(loaded.normalise(batch), draws(part).to(model.device) if draws else None)
            done([int(i) for i in part], found)
            result += found
    model.train(was_training)
    return result


@contextlib.contextmanager
def _speaking(
    loaded: Loaded, config: PredictConfig
) -> Iterator[Callable[[Tensor, Tensor | None], list[list[Candidate]]]]:
    """A function of pixels (B, 3, S, S) and draws -> the candidates of each image."""
    model, caption, most = loaded.model, loaded.caption, config.max_new_tokens
    prompt = torch.tensor(caption.prompt, device=model.device)
    with contextlib.ExitStack() as opened:
        begin = opened.enter_context(model.decoder(prompt, config.num_beams, most))
        again = config.samples and opened.enter_context(model.decoder(prompt, config.samples.count, most))

        def speak(pixels: Tensor, draws: Tensor | None) -> list[list[Candidate]]:
            beams = search(begin(pixels), config, caption.end, caption.pad)
            found = _worded(beams, config.num_return_sequences, "beam", caption)
            if draws is None:
                return found
            samples = sample(again(pixels), config.samples, config, draws, caption.end, caption.pad)
            more = _worded(samples, config.samples.count, "sample", caption)
            return [[*one, *other] for one, other in zip(found, more, strict=True)]

        yield speak


def _worded(found: Captions, count: int, name: str, codec: Codec) -> list[list[Candidate]]:
    """The first `count` captions of each image as text."""
    rows = zip(found.ids.tolist(), found.log_probabilities.tolist(), strict=True)
    return [
        [
            Candidate(codec.decode(ids), log_probability=own, source=f"{name}{number}")
            for number, (ids, own) in enumerate(zip(captions[:count], sums[:count], strict=True), 1)
        ]
        for captions, sums in rows
    ]


def predict_split(
    loaded: Loaded,
    ids: Sequence[str],
    pixels: Any,
    config: PredictConfig,
    directory: Path,
    progress: Callable[[int, int], None],
    given: Mapping[str, str] | None = None,
    seed: int = 0,
) -> None:
    """Write `predictions.csv` (ID, caption), with captions from `partial-*.jsonl` of an interrupted call.

    If images get further candidates, `candidates.csv` has them all. `given` are the captions of ids whose
    images can't be read; `pixels` (N, S, S, 3) are the other images. `seed` is for samples. Each rank
    captions its share of the remaining images; rank 0 writes.
    """
    given = given or {}
    every, ids = ids, [image for image in ids if image not in given]
    known = ranks.agree(_read_partials(directory))
    waiting = ranks.share([i for i, image in enumerate(ids) if image not in known])
    with (directory / f"partial-{ranks.rank()}.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n")  # ends a line that an interruption left incomplete
        done = len(known)

        def keep(part: Sequence[int], found: Sequence[list[Candidate]]) -> None:
            nonlocal done
            for i, given in zip(part, found, strict=True):
                row = [ids[i], [[one.source, one.log_probability, one.caption] for one in given]]
                file.write(json.dumps([*row, fingerprint(row)], ensure_ascii=False) + "\n")
            file.flush()
            done += len(part) * ranks.world_size()
            progress(min(done, len(ids)), len(ids))

        def draws(part: Sequence[int]) -> Tensor:
            return uniforms(seed, [ids[i] for i in part], config.samples.count, config.max_new_tokens)

        found = candidates(loaded, pixels, waiting, config, draws if config.samples else None, keep)
    known |= ranks.gather([(ids[i], one) for i, one in zip(waiting, found, strict=True)])
    if ranks.rank() == 0:
        known |= {image: [Candidate(caption, source="constant")] for image, caption in given.items()}
        if config.has_candidates:
            write_candidates(directory / CANDIDATES, {image: known[image] for image in every})
        write_captions(directory / PREDICTIONS, {image: known[image][0].caption for image in every})
        for partial in directory.glob(PARTIALS):
            partial.unlink()


def _read_partials(directory: Path) -> dict[str, list[Candidate]]:
    """Candidates by id; a row that an interruption cut, or a bit of which has changed, is left out."""
    known = {}
    for file in sorted(filter(Path.is_file, directory.glob(PARTIALS))):
        for line in file.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError, RecursionError):
                match json.loads(line):
                    case [str(image), list(found), digest] if digest == fingerprint([image, found]):
                        known[image] = [
                            Candidate(caption, log_probability=own, source=source)
                            for source, own, caption in found
                        ]
    return known
