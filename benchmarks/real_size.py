"""BLIP-2 at its real size (ViT-g, Q-Former, OPT-2.7B; random weights) on one device: speed, memory, FLOPs.

    python benchmarks/real_size.py                                                  # as the paper trains it
    python benchmarks/real_size.py --image-size 224 --micro-batch 2 --frozen-vit    # on a laptop with 20 GB

A step has two micro batches with texts of 48 tokens and uses gradient checkpointing. Prints images/s of
training and of captioning (32 new tokens, greedy), the peak memory of training with the prediction of
`doctor`, and the share of the device's rate for matrix products that a training step reaches. FLOPs are of
one forward and backward pass, as torch counts them, without what checkpointing computes again.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from harness.machine import device
from harness.models.blip2 import sizes
from harness.models.settings import ModelConfig
from harness.training import memory
from harness.training.memory import GB, Model
from harness.training.settings import TrainConfig

TEXT, NEW, STEPS = 48, 32, 2


def captioner(config: TrainConfig, image_size: int, kind: device.Kind):
    """The model with random weights; its frozen language model has the precision in which it computes."""
    import torch
    from transformers import Blip2Config

    from harness.models.blip2.model import Captioner
    from harness.training.engine import frozen_dtype, place

    blip2 = Blip2Config(
        text_config={"model_type": "opt", **sizes.OPT_2_7B},
        qformer_config={"vocab_size": 30523},
        vision_config={"image_size": image_size},
    )
    blip2.text_config.dtype = frozen_dtype(config, kind)
    with device.torch_device(kind):
        model = Captioner(blip2)
    torch.nn.init.normal_(model.query_tokens, std=0.02)
    place(model, config, kind)
    model.freeze(["caption", "concept"], config.train_vision)
    return model


def batch(config: TrainConfig, image_size: int, place: object) -> tuple:
    """Images and texts of one micro batch, as `Captioner.forward` takes them."""
    import torch

    ids = torch.ones(config.micro_batch_size, TEXT, dtype=torch.long, device=place)
    pixels = torch.rand(config.micro_batch_size, 3, image_size, image_size, device=place)
    return pixels, *[{"ids": ids, "mask": ids, "labels": ids}] * 2


def image_flops(model, inputs: tuple) -> int:
    """FLOPs of the forward and backward pass of one image with its texts."""
    from torch.utils.flop_counter import FlopCounterMode

    model.gradient_checkpointing_disable()
    pixels, *texts = inputs
    with FlopCounterMode(display=False) as counted:
        losses = model(pixels[:1], *({key: ids[:1] for key, ids in text.items()} for text in texts))
        (losses.caption + losses.concept).backward()
    return counted.get_total_flops()


def seconds(act: Callable[[], object], kind: device.Kind, times: int) -> float:
    """Mean seconds of `times` calls, after a first call that does not count."""
    wait = getattr(device.module(kind), "synchronize", lambda: None)
    act()
    wait()
    begun = time.perf_counter()
    for _ in range(times):
        act()
    wait()
    return (time.perf_counter() - begun) / times


def rate(config: TrainConfig, kind: device.Kind) -> float:
    """FLOPs per second of the device's matrix products, in the precision of training."""
    import torch

    from harness.training.engine import frozen_dtype

    square = torch.rand(4096, 4096, device=device.torch_device(kind), dtype=frozen_dtype(config, kind))
    return 2 * 4096**3 / seconds(lambda: square @ square, kind, 10)


def peak(kind: device.Kind) -> int:
    """Peak memory in bytes: of this process on a CPU, else allocated on the device."""
    if kind == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return device.module(kind).max_memory_allocated()


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--image-size", type=int, default=364)
    options.add_argument("--micro-batch", type=int, default=16)
    options.add_argument("--frozen-vit", action="store_true")
    options.add_argument("--device", default="auto", choices=["auto", "npu", "cuda", "cpu"])
    given = options.parse_args()
    found = device.probe(given.device)
    config = TrainConfig(
        micro_batch_size=given.micro_batch,
        batch_size=2 * given.micro_batch,
        max_caption_tokens=TEXT,
        train_vision=not given.frozen_vit,
        gradient_checkpointing=True,
    )
    import torch

    from harness.config.sections import PredictConfig
    from harness.decoding.search import search
    from harness.training.engine import engine, precision

    kind, size = found.kind, given.image_size
    half = precision(config, kind) is not None
    shape = sizes.of_model(ModelConfig(checkpoint=sizes.PUBLISHED[0], image_size=size))
    said = memory.needed(Model(shape, config, kind, half), memory.configured(config, 1))
    best = rate(config, kind)
    model = captioner(config, size, kind)
    inputs = batch(config, size, device.torch_device(kind))
    with tempfile.TemporaryDirectory() as folder:
        trainer = engine(model.train(), config, kind, Path(folder))

        def step() -> None:
            for _ in range(2):
                losses = trainer(*inputs)
                trainer.backward((losses.caption + losses.concept) / inputs[1]["ids"].numel())
                trainer.step()

        training = seconds(step, kind, STEPS)
    reached = peak(kind)
    per_image = image_flops(model, inputs)
    model.eval()
    prompt = torch.ones(4, dtype=torch.long, device=inputs[0].device)
    greedy = PredictConfig(max_new_tokens=NEW, min_new_tokens=NEW, num_beams=1)
    with torch.inference_mode(), model.decoder(prompt, 1, NEW) as begin:
        captioning = seconds(lambda: search(begin(inputs[0]), greedy, 2, 1), kind, 1)

    numbers = sum(p.numel() for p in model.parameters()) / 1e9
    which = "frozen" if given.frozen_vit else "trained"
    print(f"{found.name} ({kind}), {numbers:.2f} B parameters, {size} pixels, ViT {which}, ", end="")
    print(f"micro batch {given.micro_batch}, {'half precision' if half else 'fp32'}")
    print(f"training     {config.batch_size / training:10.3f} images/s   {training:.2f} s a step")
    print(f"captioning   {given.micro_batch / captioning:10.3f} images/s")
    print(f"memory       {reached / GB:10.1f} GB peak   {said / GB:.1f} GB predicted   {said / reached:.2f}")
    done = per_image * config.batch_size / training
    print(f"arithmetic   {done / 1e12:10.3f} TFLOP/s    {per_image / 1e12:.2f} TFLOP an image; ", end="")
    print(f"{done / best:.0%} of {best / 1e12:.3f} TFLOP/s in matrix products")


if __name__ == "__main__":
    main()
