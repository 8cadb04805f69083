"""Predicted memory compared with the peak of a training process, on this machine's CPU.

    python benchmarks/memory.py

Trains a BLIP-2 of 0.3 B parameters with random weights for two steps of two micro batches. Each set-up runs
in its own process. Prints the prediction of `doctor`, the peak resident memory, and their ratio.
"""

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from harness.models.blip2 import sizes
from harness.models.settings import ModelConfig, TinyConfig
from harness.training import memory
from harness.training.memory import GB, Model
from harness.training.settings import TrainConfig

MODEL = ModelConfig(
    checkpoint="tiny",
    image_size=224,
    tiny=TinyConfig(
        patch_size=14,
        hidden_size=768,
        vision_layers=16,
        qformer_layers=6,
        num_query_tokens=32,
        text_hidden_size=768,
        text_layers=12,
        vocab_size=30000,
    ),
)
TEXT = 48
SETUPS = (
    {},
    {"gradient_checkpointing": True},
    {"micro_batch_size": 8},
    {"zero_stage": 1},
    {"zero_stage": 2},
    {"zero_stage": 3},
    {"zero_stage": 2, "offload": True},
)


def settings(changes: dict) -> TrainConfig:
    """The training of one set-up: two micro batches per step, and buckets that are small for the model."""
    values = {"micro_batch_size": 4, "precision": "fp32", "max_caption_tokens": TEXT} | changes
    buckets = {"zero_optimization": {"reduce_bucket_size": 50_000_000}}
    return TrainConfig(**values, batch_size=2 * values["micro_batch_size"], deepspeed=buckets)


def train(config: TrainConfig) -> float:
    """Train two steps; the peak resident memory of this process in bytes."""
    from harness.machine import device

    device.probe("cpu")
    import torch

    from harness.models.blip2.model import Captioner
    from harness.models.tiny import _blip2_config
    from harness.training.engine import engine, place

    class Vocabulary(list):
        bos_token_id = eos_token_id = pad_token_id = 1

        def convert_tokens_to_ids(self, _: str) -> int:
            return 1

    tiny = MODEL.tiny
    blip2 = _blip2_config(tiny, Vocabulary([0] * tiny.vocab_size), tiny.vocab_size)
    blip2.vision_config.image_size = MODEL.image_size
    model = Captioner(blip2)
    place(model, config, "cpu")
    model.freeze(["caption", "concept"])
    model.train()
    ids = torch.ones(config.micro_batch_size, TEXT, dtype=torch.long)
    texts = {"ids": ids, "mask": ids, "labels": ids}
    pixels = torch.rand(config.micro_batch_size, 3, MODEL.image_size, MODEL.image_size)
    with tempfile.TemporaryDirectory() as folder:
        deep = engine(model, config, "cpu", Path(folder))
        for _ in range(4):
            losses = deep(pixels, texts, texts)
            deep.backward((losses.caption + losses.concept) / ids.numel())
            deep.step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def predicted(config: TrainConfig) -> int:
    """The bytes that `doctor` predicts for this training."""
    shape = sizes.of_model(MODEL)
    assert shape is not None
    return memory.needed(Model(shape, config, "cpu", False), memory.configured(config, 1))


def main() -> None:
    """Print a line for each set-up."""
    print(f"{'set-up':36}{'predicted':>12}{'peak':>12}{'ratio':>8}")
    for changes in SETUPS:
        done = subprocess.run(
            [sys.executable, __file__, json.dumps(changes)], capture_output=True, text=True, check=True
        )
        peak, said = float(done.stdout.splitlines()[-1]), predicted(settings(changes))
        name = " ".join(f"{key}={value}" for key, value in changes.items()) or "as it is"
        print(f"{name:36}{said / GB:>9.2f} GB{peak / GB:>9.2f} GB{said / peak:>8.2f}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(train(settings(json.loads(sys.argv[1]))))
    else:
        main()
