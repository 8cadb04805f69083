"""Training of BLIP-2 at its real size (ViT-g, Q-Former, OPT-2.7B; random weights) on one device, in a table.

    python benchmarks/real_size.py                                  # the recipe at 364 pixels, on a GPU
    python benchmarks/real_size.py --size 0.3B --device cpu --image-size 224 --micro-batch 2

The first row is the recipe as it was. Each further row switches one more improvement on. The last rows are
bare PyTorch loops with everything on, eager and compiled. Each row runs in its own process: steps of two
micro batches with texts of 48 tokens, after one step that does not count. Prints images/s (median of the
steps), the share of the device's rate of matrix products, and the peak memory beside the forecast of
`doctor`. FLOPs are of one forward and backward pass, as torch counts them, without what checkpointing
computes again. Also prints images/s of captioning.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.machine import device
from harness.models.blip2 import sizes
from harness.training import memory
from harness.training.memory import GB, Model
from harness.training.settings import TrainConfig

TEXT, NEW = 48, 32
ROWS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("the recipe as it was", {"gradient_checkpointing": True, "compile": "off", "fused": False}),
    ("no gradient checkpointing", {"gradient_checkpointing": False}),
    ("twice the micro batch", {"times": 2}),
    ("fused AdamW", {"fused": True}),
    ("each layer compiled", {"compile": "layers"}),
    ("ViT compiled as a whole", {"compile": "whole"}),
)
"""Name and changes of each row: keys of `train`, a factor of the micro batch, or AdamW's `fused`."""
BARE = (("bare loop", False), ("bare loop, ViT compiled", True))
SIZES: dict[str, dict[str, Any]] = {
    "real": {"text_config": sizes.OPT_2_7B},
    "0.3B": {
        "vision_config": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 16},
        "qformer_config": {"num_hidden_layers": 6, "encoder_hidden_size": 768},
        "text_config": {"vocab_size": 30000, "word_embed_proj_dim": 768},
    },
    "small": {
        "vision_config": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2},
        "qformer_config": {"num_hidden_layers": 2, "encoder_hidden_size": 64},
        "text_config": {"vocab_size": 1000, "num_hidden_layers": 1, "word_embed_proj_dim": 768},
    },
}
"""What differs from the config of Salesforce/blip2-opt-2.7b with an OPT of 125 M parameters."""


def captioner(config: TrainConfig, given: argparse.Namespace, kind: device.Kind):
    """The model with random weights; its frozen language model has the precision in which it computes."""
    import torch
    from transformers import Blip2Config

    from harness.models.blip2.model import Captioner
    from harness.training.engine import frozen_dtype, place

    parts = SIZES[given.size]
    blip2 = Blip2Config(
        text_config={"model_type": "opt", **parts["text_config"]},
        qformer_config={"vocab_size": 30523, **parts.get("qformer_config", {})},
        vision_config={"image_size": given.image_size, **parts.get("vision_config", {})},
    )
    blip2.text_config.dtype = frozen_dtype(config, kind)
    with device.torch_device(kind):
        model = Captioner(blip2)
    torch.nn.init.normal_(model.query_tokens, std=0.02)
    place(model, config, kind)
    model.freeze(["caption", "concept"])
    return model.train()


def batch(config: TrainConfig, given: argparse.Namespace, place: object) -> tuple:
    """Images and texts of one micro batch, as `Captioner.forward` takes them."""
    import torch

    ids = torch.ones(config.micro_batch_size, TEXT, dtype=torch.long, device=place)
    pixels = torch.rand(config.micro_batch_size, 3, given.image_size, given.image_size, device=place)
    return pixels, *[{"ids": ids, "mask": ids, "labels": ids}] * 2


def image_flops(model, inputs: tuple) -> int:
    """FLOPs of the forward and backward pass of one image with its texts."""
    from torch.utils.flop_counter import FlopCounterMode

    pixels, *texts = inputs
    with FlopCounterMode(display=False) as counted:
        losses = model(pixels[:1], *({key: ids[:1] for key, ids in text.items()} for text in texts))
        (losses.caption + losses.concept).backward()
    return counted.get_total_flops()


def seconds(act: Callable[[], object], kind: device.Kind, times: int) -> float:
    """Median seconds of `times` calls, after a first call that does not count."""
    wait = getattr(device.module(kind), "synchronize", lambda: None)
    found = []
    for _ in range(times + 1):
        begun = time.perf_counter()
        act()
        wait()
        found.append(time.perf_counter() - begun)
    return statistics.median(found[1:])


def facts(config: TrainConfig, given: argparse.Namespace, kind: device.Kind) -> dict[str, Any]:
    """What all rows share: FLOPs of an image, the rate of matrix products, the speed of captioning."""
    import torch

    from harness.config.sections import PredictConfig
    from harness.decoding.search import search
    from harness.training.engine import frozen_dtype

    square = torch.rand(4096, 4096, device=device.torch_device(kind), dtype=frozen_dtype(config, kind))
    rate = 2 * 4096**3 / seconds(lambda: square @ square, kind, 10)
    model = captioner(config, given, kind)
    count = sum(p.numel() for p in model.parameters())
    flops = image_flops(model, batch(config, given, device.torch_device(kind)))
    greedy = PredictConfig(max_new_tokens=NEW, min_new_tokens=NEW, num_beams=1)
    pixels = batch(config, given, square.device)[0]
    prompts = torch.ones(len(pixels), 4, dtype=torch.long, device=square.device)
    model.eval()
    with torch.inference_mode(), model.decoder(1, NEW) as begin:
        captioning = seconds(lambda: search(begin(pixels, prompts), greedy, 2, 1), kind, 1)
    names = {"rate": rate, "flops": flops, "parameters": count, "dtype": str(square.dtype)}
    return names | {"captioning": config.micro_batch_size / captioning}


def harness_step(model, config: TrainConfig, inputs: tuple, kind: device.Kind, fused: bool) -> Callable:
    """An optimiser step with the engine of training; `fused`: AdamW as the engine chooses it."""
    import torch

    from harness.training.engine import backward, engine

    chosen = torch.optim.AdamW
    if not fused:
        torch.optim.AdamW = lambda *given, **how: chosen(*given, **how | {"fused": False})
    with tempfile.TemporaryDirectory() as folder:
        trainer = engine(model, config, kind, Path(folder))
    torch.optim.AdamW = chosen

    def step() -> None:
        for _ in range(2):
            losses = trainer(*inputs)
            backward(trainer, (losses.caption + losses.concept) / inputs[1]["ids"].numel())
            trainer.step()

    return step


def bare_step(model, config: TrainConfig, inputs: tuple, compiled: bool) -> Callable:
    """The same step in plain PyTorch, with fused AdamW and clipping."""
    import torch

    from harness.models import parts

    if compiled:
        model.vision_model.encoder.compile()
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parts.groups(model, config.weight_decay, {}), lr=1e-5, fused=True)

    def step() -> None:
        for _ in range(2):
            losses = model(*inputs)
            ((losses.caption + losses.concept) / inputs[1]["ids"].numel() / 2).backward()
        torch.nn.utils.clip_grad_norm_(own, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak(kind: device.Kind) -> int:
    """Peak memory in bytes: of this process on a CPU, else allocated on the device."""
    if kind == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return device.module(kind).max_memory_allocated()


def settings(changes: dict[str, Any], given: argparse.Namespace) -> TrainConfig:
    """The training of a row."""
    micro = given.micro_batch * changes.get("times", 1)
    return TrainConfig(
        micro_batch_size=micro,
        batch_size=2 * micro,
        max_caption_tokens=TEXT,
        train_vision=not given.frozen_vit,
        **{key: value for key, value in changes.items() if key not in ("times", "fused", "bare")},
    )


def measure(changes: dict[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    """One row, in this process."""
    from harness.training.engine import precision

    kind = device.probe(given.device).kind
    config = settings(changes, given)
    if not changes:
        return facts(config, given, kind)
    model, inputs = captioner(config, given, kind), batch(config, given, device.torch_device(kind))
    if "bare" in changes:
        step = bare_step(model, config, inputs, changes["bare"])
    else:
        step = harness_step(model, config, inputs, kind, changes["fused"])
    taken = seconds(step, kind, given.steps)
    shape = sizes.of(SIZES[given.size], given.image_size, True)
    half = precision(config, kind) is not None
    said = memory.needed(Model(shape, config, kind, half), memory.configured(config, 1))
    return {"speed": config.batch_size / taken, "seconds": taken, "peak": peak(kind), "said": said}


def rows(kind: device.Kind) -> list[tuple[str, dict[str, Any]]]:
    """Name and all changes of each row; CPUs had the fused AdamW before."""
    keys, found, changes = ("times", "fused", *TrainConfig.model_fields), [], {"fused": True}
    for name, change in ROWS:
        known = {key: value for key, value in change.items() if key in keys}
        if kind == "cpu":
            known.pop("fused", None)
        changes = changes | known
        if known:
            found.append((name, changes))
    eager = changes | ({"compile": "off"} if "compile" in changes else {})
    return found + [(name, eager | {"bare": compiled}) for name, compiled in BARE]


def apart(changes: dict[str, Any]) -> dict[str, Any]:
    """The result of `measure` in a process of its own, or the last line of its error."""
    command = [sys.executable, __file__, *sys.argv[1:], "--row", json.dumps(changes)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure each row and print it."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--size", default="real", choices=list(SIZES))
    options.add_argument("--image-size", type=int, default=364)
    options.add_argument("--micro-batch", type=int, default=16)
    options.add_argument("--frozen-vit", action="store_true")
    options.add_argument("--steps", type=int, default=3, help="Steps that count.")
    options.add_argument("--device", default="auto", choices=["auto", "npu", "cuda", "cpu"])
    options.add_argument("--row", type=json.loads, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.row is not None:
        print(json.dumps(measure(given.row, given)))
        return
    found, device_of = apart({}), device.probe(given.device)
    print(f"{device_of.name} ({device_of.kind}), {found['parameters'] / 1e9:.2f} B parameters, ", end="")
    which = "frozen" if given.frozen_vit else "trained"
    print(f"{given.image_size} pixels, ViT {which}, {found['dtype']}")
    print(
        f"{found['flops'] / 1e12:.2f} TFLOP an image, products at {found['rate'] / 1e12:.2f} TFLOP/s; ",
        end="",
    )
    print(
        f"captioning greedily {found['captioning']:.2f} images/s, {NEW} tokens, {given.micro_batch} at once"
    )
    print(f"{'':28}{'batch':>6}{'images/s':>10}{'of products':>13}{'peak':>10}{'forecast':>10}{'ratio':>7}")
    for name, changes in rows(device_of.kind):
        row, micro = apart(changes), given.micro_batch * changes.get("times", 1)
        if "error" in row:
            print(f"{name:28}{micro:>6}  {row['error'][:90]}", flush=True)
            continue
        share = row["speed"] * found["flops"] / found["rate"]
        print(f"{name:28}{micro:>6}{row['speed']:>10.2f}{share:>13.0%}", end="")
        ours = "" if "bare" in changes else f"{row['said'] / GB:>7.2f} GB{row['said'] / row['peak']:>7.2f}"
        print(f"{row['peak'] / GB:>7.2f} GB{ours}", flush=True)


if __name__ == "__main__":
    main()
