"""Captions of a split by a model; captions from before an interruption are kept."""

import base64
import contextlib
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.config.sections import PredictConfig
from harness.decoding.batches import slices
from harness.decoding.search import Captions, sample, search, uniforms
from harness.errors import Problem, UserError
from harness.machine import ranks
from harness.models.base import Decoding, Pixels
from harness.models.loading import Loaded, batch_of
from harness.models.text import Codec
from harness.records.files import (
    ATTENTION,
    CANDIDATES,
    PREDICTIONS,
    Candidate,
    write_candidates,
    write_captions,
)
from harness.store import fingerprint, write

PARTIALS = "partial-*.jsonl"
_NAMED = 5  # of many images with the same fault
_Begin = Callable[[Pixels, Tensor], Decoding]
_Done = tuple[list[Candidate], np.ndarray | None]
"""The candidates of an image, and where the model looked in it, uint8 (h, w), if that is known."""
_Speak = Callable[[Pixels, Tensor, Tensor | None], list[list[Candidate]]]


def captions(
    loaded: Loaded,
    pixels: Any,
    indices: Sequence[int],
    config: PredictConfig,
    prompts: Sequence[Sequence[int]] | None = None,
) -> list[str]:
    """Caption the images `pixels[indices]`, uint8 (B, S, S, 3), by the best beam; see `candidates`."""
    found = candidates(loaded, pixels, indices, config, prompts=prompts)
    return [best.caption for best, *_ in found]


@torch.inference_mode()
def candidates(
    loaded: Loaded,
    pixels: Any,
    indices: Sequence[int],
    config: PredictConfig,
    draws: Callable[[Sequence[int]], Tensor] | None = None,
    done: Callable[[Sequence[int], Sequence[list[Candidate]]], None] = lambda indices, found: None,
    prompts: Sequence[Sequence[int]] | None = None,
    ids: Sequence[str] | None = None,
) -> list[list[Candidate]]:
    """The candidates of each of the images `pixels[indices]`, uint8 (B, S, S, 3): beams, best first, samples.

    `draws` gives those of `search.sample` for images by their indices; without it nothing is sampled. `done`
    is called after every batch. `prompts` are the ids before the caption of each of `pixels`; by default,
    those of the codec. Images with prompts of one length are decoded together, so that no caption depends on
    padding. Raises `UserError` if the model gives an image no numbers; it names it by `ids`.
    """
    model = loaded.model
    was_training = model.training
    model.eval()
    own = {int(i): loaded.caption.prompt if prompts is None else prompts[i] for i in indices}
    order = sorted(own, key=lambda i: -len(own[i]))  # the longest need the most memory
    breaks = [n for n in range(1, len(order)) if len(own[order[n]]) != len(own[order[n - 1]])]
    result: dict[int, list[Candidate]] = {}
    with _speaking(loaded, config) as speak:
        for part in map(order.__getitem__, slices(len(order), config, model.device.type, breaks)):
            batch = batch_of(pixels, part)
            said = torch.tensor([own[i] for i in part], device=model.device)
            found = speak(loaded.normalise(batch), said, draws(part).to(model.device) if draws else None)
            _check_numbers(found, [f"image {i}" if ids is None else ids[i] for i in part])
            done(part, found)
            result |= zip(part, found, strict=True)
    model.train(was_training)
    return [result[int(i)] for i in indices]


@contextlib.contextmanager
def _speaking(loaded: Loaded, config: PredictConfig) -> Iterator[_Speak]:
    """A function of pixels of B images, prompts (B, P) and draws -> the candidates of each image."""
    model, caption, most = loaded.model, loaded.caption, config.max_new_tokens

    def begun(begin: _Begin, pixels: Pixels, prompts: Tensor) -> Decoding:
        decoding = begin(pixels, prompts)
        # an image's own words in the prompt are not part of its caption, so penalties do not count them
        decoding.context = decoding.context[:, : len(caption.prompt)]
        return decoding

    with contextlib.ExitStack() as opened:
        begin = opened.enter_context(model.decoder(config.num_beams, most))
        again = config.samples and opened.enter_context(model.decoder(config.samples.count, most))

        def speak(pixels: Pixels, prompts: Tensor, draws: Tensor | None) -> list[list[Candidate]]:
            beams = search(begun(begin, pixels, prompts), config, caption.end, caption.pad)
            found = _worded(beams, config.num_return_sequences, "beam", caption)
            if draws is None:
                return found
            decoding = begun(again, pixels, prompts)
            samples = sample(decoding, config.samples, config, draws, caption.end, caption.pad)
            more = _worded(samples, config.samples.count, "sample", caption)
            return [[*one, *other] for one, other in zip(found, more, strict=True)]

        yield speak


def _check_numbers(found: Sequence[list[Candidate]], ids: Sequence[str]) -> None:
    """Weights may be finite, but not what they give: without a validation, or in half precision."""
    pairs = zip(ids, found, strict=True)
    bad = [image for image, own in pairs if any(math.isnan(one.log_probability) for one in own)]
    if bad:
        more = f" and {len(bad) - _NAMED} more of this batch" if len(bad) > _NAMED else ""
        what = f"the model's numbers became nan in the captions of {', '.join(bad[:_NAMED])}{more}"
        hint = "If it was trained, lower train.learning_rate. If it is sound, set train.precision: fp32."
        raise UserError([Problem(what, hint=hint)], None, 1)


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
    prompts: Sequence[Sequence[int]] | None = None,
    look: bool = False,
) -> None:
    """Write `predictions.csv` (ID, caption), with captions from `partial-*.jsonl` of an interrupted call.

    With `look`, `attention.npy` tells where the model looked, if its family can.

    If images get further candidates, `candidates.csv` has them all. `given` are the captions of ids whose
    images can't be read; `pixels` (N, S, S, 3) are the other images. `seed` is for samples. `prompts`
    are the ids before the captions of `pixels`. Each rank captions its share of the remaining images; rank 0
    writes.
    """
    given = given or {}
    every, ids = ids, [image for image in ids if image not in given]
    known: dict[str, _Done] = ranks.agree(_read_partials(directory))
    waiting = ranks.share([i for i, image in enumerate(ids) if image not in known])
    with (directory / f"partial-{ranks.rank()}.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n")  # ends a line that an interruption left incomplete
        done, maps = len(known), {}

        def keep(part: Sequence[int], found: Sequence[list[Candidate]]) -> None:
            nonlocal done
            looked = seen()
            maps.update(zip(part, [None] * len(part) if looked is None else looked.numpy(), strict=True))
            for i, given in zip(part, found, strict=True):
                row = [ids[i], [[one.source, one.log_probability, one.caption] for one in given]]
                row += [] if maps[i] is None else [_packed(maps[i])]
                file.write(json.dumps([*row, fingerprint(row)], ensure_ascii=False) + "\n")
            file.flush()
            done += len(part) * ranks.world_size()
            progress(min(done, len(ids)), len(ids))

        def draws(part: Sequence[int]) -> Tensor:
            return uniforms(seed, [ids[i] for i in part], config.samples.count, config.max_new_tokens)

        watched = loaded.model.looking() if look and hasattr(loaded.model, "looking") else None
        with watched or contextlib.nullcontext(lambda: None) as seen:
            found = candidates(
                loaded, pixels, waiting, config, draws if config.samples else None, keep, prompts, ids
            )
    known |= ranks.gather([(ids[i], (one, maps[i])) for i, one in zip(waiting, found, strict=True)])
    if ranks.rank() == 0:
        known |= {image: ([Candidate(caption, source="constant")], None) for image, caption in given.items()}
        if config.has_candidates:
            write_candidates(directory / CANDIDATES, {image: known[image][0] for image in every})
        _write_maps(directory / ATTENTION, [known[image][1] for image in every])
        write_captions(directory / PREDICTIONS, {image: known[image][0][0].caption for image in every})
        for partial in directory.glob(PARTIALS):
            partial.unlink()


def _write_maps(path: Path, maps: Sequence[np.ndarray | None]) -> None:
    """Write the maps of all images, 0 everywhere for an image without one; nothing if no image has one."""
    shape = next((one.shape for one in maps if one is not None), None)
    if shape is None:
        return
    content = io.BytesIO()
    np.save(content, np.stack([np.zeros(shape, np.uint8) if one is None else one for one in maps]))
    write(path, content.getvalue())


def _packed(values: np.ndarray) -> list[Any]:
    return [*values.shape, base64.b64encode(values.tobytes()).decode()]


def _unpacked(height: int, width: int, text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), np.uint8).reshape(height, width)


def _read_partials(directory: Path) -> dict[str, _Done]:
    """What is done by id; a row that an interruption cut, or a bit of which has changed, is left out."""
    known = {}
    for file in sorted(filter(Path.is_file, directory.glob(PARTIALS))):
        for line in file.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError, RecursionError):
                match json.loads(line):
                    case [*row, digest] if digest == fingerprint(row):
                        image, found, *rest = row
                        made = [
                            Candidate(caption, log_probability=own, source=source)
                            for source, own, caption in found
                        ]
                        known[image] = made, _unpacked(*rest[0]) if rest else None
    return known
