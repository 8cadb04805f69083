"""Captioning a split compared with `generate` for one image at a time, with and without beams.

    python benchmarks/predict.py

Both use the same model (20 M parameters, random weights), images and number of tokens. They alternate in one
process. Ours writes predictions as a run does. The other is the usual loop: one image, `generate`, decode.
"""

import statistics
import tempfile
import time
from pathlib import Path

import blip2
import numpy as np
import torch

from harness.captions import read_captions
from harness.config.sections import PredictConfig
from harness.decoding import predict
from harness.machine import device
from harness.models.loading import Loaded

device.probe("cpu")
IMAGES, ROUNDS = 32, 3


def one_at_a_time(loaded: Loaded, pixels: np.ndarray, config: PredictConfig) -> list[str]:
    """Captions of each image with BLIP-2 and the language model's own `generate`."""
    model, texts = loaded.model, []
    prompt = torch.tensor([loaded.caption.prompt])
    for image in pixels:
        with torch.no_grad():
            queries, _ = model.see(loaded.normalise(torch.from_numpy(image[None])))
            words = model.language_model.get_input_embeddings()(prompt)
            ids = model.language_model.generate(
                inputs_embeds=torch.cat([model.language_projection(queries), words], dim=1),
                attention_mask=torch.ones(1, queries.shape[1] + prompt.shape[1], dtype=torch.long),
                num_beams=config.num_beams,
                max_new_tokens=config.max_new_tokens,
                min_new_tokens=config.min_new_tokens,
                eos_token_id=loaded.caption.end,
                pad_token_id=loaded.caption.pad,
                do_sample=False,
            )
        texts.append(loaded.caption.decode(ids[0].tolist()))
    return texts


def ours(loaded: Loaded, pixels: np.ndarray, config: PredictConfig) -> list[str]:
    """Captions as the step of a run makes them, with its files."""
    ids = [f"image_{i}" for i in range(len(pixels))]
    with tempfile.TemporaryDirectory() as folder:
        predict.predict_split(loaded, ids, pixels, config, Path(folder), lambda done, total: None)
        found = read_captions(Path(folder) / predict.PREDICTIONS)
    return [found[i] for i in ids]


def main() -> None:
    """Print images per second of both, and how many captions are equal."""
    with blip2.folder() as folder:
        loaded = blip2.load(folder)
    loaded.model.eval()
    pixels = blip2.pixels()[:IMAGES]
    for beams in (1, 5):
        config = PredictConfig(num_beams=beams, max_new_tokens=40, min_new_tokens=40, batch_size=16)
        times: dict[str, list[float]] = {"one at a time": [], "harness": []}
        found = {}
        for _ in range(ROUNDS):
            for name, how in (("one at a time", one_at_a_time), ("harness", ours)):
                begun = time.perf_counter()
                found[name] = how(loaded, pixels, config)
                times[name].append(time.perf_counter() - begun)
        theirs, mine = (statistics.median(times[name]) for name in times)
        same = sum(a == b for a, b in zip(*found.values(), strict=True))
        print(f"{beams} beams: one at a time {IMAGES / theirs:6.2f} images/s")
        print(f"{beams} beams: harness       {IMAGES / mine:6.2f} images/s   {theirs / mine:.1f} x", end="")
        print(f"   {same} of {IMAGES} captions equal")


if __name__ == "__main__":
    main()
