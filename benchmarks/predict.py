"""Captioning a split compared with transformers' `generate`, in the same batches and one image at a time.

    python benchmarks/predict.py                                    # on a CPU
    python benchmarks/predict.py --device auto --images 128 --batch 64

All use the same model (20 M parameters, random weights), images and number of tokens. They alternate in one
process. Ours writes predictions as a run does. The others see the images, `generate` and decode. The last row
also has 16 samples of each image.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import blip2
import numpy as np
import torch

from harness.config.sections import PredictConfig, SamplesConfig
from harness.decoding import predict
from harness.machine import device
from harness.models.loading import Loaded
from harness.records.files import read_captions
from harness.training.engine import place
from harness.training.settings import TrainConfig

ROUNDS = 3


def generated(loaded: Loaded, pixels: np.ndarray, config: PredictConfig, batch: int) -> list[str]:
    """Captions of batches of images with BLIP-2 and the language model's own `generate`."""
    model, texts = loaded.model, []
    for start in range(0, len(pixels), batch):
        images = torch.from_numpy(pixels[start : start + batch]).to(model.device)
        prompt = torch.tensor([loaded.caption.prompt] * len(images), device=model.device)
        with torch.inference_mode(), model.autocast():
            queries, _ = model.see(loaded.normalise(images))
            words = model.language_model.get_input_embeddings()(prompt)
            prefix = model.language_projection(queries).to(words.dtype)
            ids = model.language_model.generate(
                inputs_embeds=torch.cat([prefix, words], dim=1),
                attention_mask=prompt.new_ones(len(images), prefix.shape[1] + prompt.shape[1]),
                num_beams=config.num_beams,
                max_new_tokens=config.max_new_tokens,
                min_new_tokens=config.min_new_tokens,
                eos_token_id=loaded.caption.end,
                pad_token_id=loaded.caption.pad,
                do_sample=False,
            )
        texts += [loaded.caption.decode(row) for row in ids.tolist()]
    return texts


def ours(loaded: Loaded, pixels: np.ndarray, config: PredictConfig) -> list[str]:
    """Captions as the step of a run makes them, with its files."""
    ids = [f"image_{i}" for i in range(len(pixels))]
    with tempfile.TemporaryDirectory() as folder:
        predict.predict_split(loaded, ids, pixels, config, Path(folder), lambda done, total: None)
        found = read_captions(Path(folder) / predict.PREDICTIONS)
    return [found[i] for i in ids]


def main() -> None:
    """Print images per second of each, and how many captions are those of the harness."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--images", type=int, default=32)
    options.add_argument("--batch", type=int, default=16)
    options.add_argument("--device", default="cpu", choices=["auto", "npu", "cuda", "cpu"])
    given = options.parse_args()
    kind = device.probe(given.device).kind
    with blip2.folder() as folder:
        loaded = blip2.load(folder)
    place(loaded.model, TrainConfig(), kind)
    loaded.model.eval()
    pixels = blip2.pixels()[: given.images]
    for beams in (1, 5):
        config = PredictConfig(num_beams=beams, max_new_tokens=40, min_new_tokens=40, batch_size=given.batch)
        ways = {
            "one at a time": lambda config=config: generated(loaded, pixels, config, 1),
            "in batches": lambda config=config: generated(loaded, pixels, config, given.batch),
            "harness": lambda config=config: ours(loaded, pixels, config),
        }
        if beams > 1:
            more = config.model_copy(update={"samples": SamplesConfig(top_k=50, top_p=0.9)})
            ways["+ 16 samples"] = lambda config=more: ours(loaded, pixels, config)
        times: dict[str, list[float]] = {name: [] for name in ways}
        found = {}
        for _ in range(ROUNDS):
            for name, how in ways.items():
                begun = time.perf_counter()
                found[name] = how()
                times[name].append(time.perf_counter() - begun)
        taken = {name: statistics.median(values) for name, values in times.items()}
        for name, seconds in taken.items():
            same = sum(a == b for a, b in zip(found[name], found["harness"], strict=True))
            print(f"{beams} beams: {name:<13} {given.images / seconds:8.2f} images/s", end="")
            print(f"   harness {seconds / taken['harness']:.1f} x   {same} of {given.images} captions equal")


if __name__ == "__main__":
    main()
