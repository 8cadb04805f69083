"""Predicted memory compared with the peak of a training process, on this machine's CPU.

    python benchmarks/memory.py [NAME] ...    # of MODELS; without a name, blip2

Trains models with random weights for two steps of two micro batches; `blip2` has 0.3 B parameters. Each
set-up runs in its own process. Prints the prediction of `doctor`, the peak resident memory, and their ratio.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness.models import family
from harness.models.settings import ModelConfig
from harness.training import memory
from harness.training.memory import GB, Model
from harness.training.settings import TrainConfig

TINY = {
    "patch_size": 14,
    "hidden_size": 768,
    "vision_layers": 16,
    "qformer_layers": 6,
    "num_query_tokens": 32,
    "text_hidden_size": 768,
    "text_layers": 12,
    "vocab_size": 30000,
}
SMALLER = TINY | {"hidden_size": 512, "vision_layers": 8}
SMALL = SMALLER | {"hidden_size": 384, "qformer_layers": 4, "text_hidden_size": 384, "vocab_size": 5000}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 768,
    "num_hidden_layers": 10,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "intermediate_size": 2048,
    "vocab_size": 30000,
    "tie_word_embeddings": True,
}
GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 10, "n_head": 12, "vocab_size": 30000}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
}
LLAVA = {
    "model_type": "llava",
    "image_token_index": 29999,
    "text_config": LLAMA,
    "vision_config": CLIP,
    "architectures": ["LlavaForConditionalGeneration"],
}
CONVNEXT = {"model_type": "convnext", "depths": [3, 3, 9, 3], "hidden_sizes": [96, 192, 384, 768]}
QWEN = LLAMA | {
    "model_type": "qwen2",
    "num_key_value_heads": 2,
    "intermediate_size": 3072,
    "hidden_size": 640,
}
QWEN |= {"intermediate_size": 3072, "num_attention_heads": 10, "num_hidden_layers": 14}
PALIGEMMA = {
    "model_type": "paligemma",
    "image_token_index": 29999,
    "hidden_size": 768,
    "projection_dim": 768,
    "text_config": LLAMA | {"model_type": "gemma", "head_dim": 64},
    "vision_config": CLIP | {"model_type": "siglip_vision_model", "projection_dim": 768},
    "architectures": ["PaliGemmaForConditionalGeneration"],
}
PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
TINY_ONE = {"checkpoint": "tiny", "image_size": 224}
MODELS: dict[str, dict[str, Any]] = {
    "blip2": TINY_ONE | {"tiny": TINY},
    "language": TINY_ONE | {"tiny": SMALLER, "language_checkpoint": "gpt2"},
    "lora": TINY_ONE | {"tiny": SMALLER, "language_checkpoint": "llama", "lora": {"rank": 16}},
    "prefix": {
        "family": "prefix",
        "vision_checkpoint": "clip",
        "language_checkpoint": "llama",
        "image_size": 224,
    },
    "vlm": {"family": "vlm", "checkpoint": "llava", "image_size": 224, "lora": {"rank": 16}},
    # these had no part in the choice of what the forecast adds for libraries
    "convnext": {
        "family": "prefix",
        "vision_checkpoint": "convnext",
        "language_checkpoint": "gpt2",
        "image_size": 224,
        "lora": {"rank": 8},
    },
    "qwen": TINY_ONE | {"tiny": SMALLER, "language_checkpoint": "qwen"},
    "paligemma": {"family": "vlm", "checkpoint": "paligemma", "image_size": 224, "lora": {"rank": 16}},
    # keeps the memory that it frees
    "small": TINY_ONE | {"tiny": SMALL},
}
"""The section `model:` of each model."""
CONFIGS = {
    **{"gpt2": GPT2, "llama": LLAMA, "clip": CLIP, "llava": LLAVA},
    **{"convnext": CONVNEXT, "qwen": QWEN, "paligemma": PALIGEMMA},
}
"""The `config.json` of each folder that these name."""
TEXT = 48
ZERO = ({"zero_stage": 1}, {"zero_stage": 2}, {"zero_stage": 3}, {"zero_stage": 2, "offload": True})
SETUPS: dict[str, tuple[dict[str, Any], ...]] = {
    "blip2": ({}, {"gradient_checkpointing": True}, {"micro_batch_size": 8}, *ZERO),
    "prefix": ({}, {"gradient_checkpointing": True}, {"micro_batch_size": 8, "train_language": True}),
}
FEW = ({}, {"gradient_checkpointing": True}, {"micro_batch_size": 8})
"""The set-ups of models that `SETUPS` does not have."""


def settings(changes: dict[str, Any]) -> TrainConfig:
    """The training of one set-up: two micro batches per step, and buckets that are small for the model."""
    values = {"micro_batch_size": 4, "precision": "fp32", "max_caption_tokens": TEXT} | changes
    buckets = {"zero_optimization": {"reduce_bucket_size": 50_000_000}}
    values |= {"stages": [{"epochs": 1, "losses": {"caption": 1}}]} if "stages" not in values else {}
    return TrainConfig(**values, batch_size=2 * values["micro_batch_size"], deepspeed=buckets)


def train(name: str, config: TrainConfig) -> float:
    """Train two steps; the peak resident memory of this process in bytes."""
    from harness.machine import device

    device.probe("cpu")
    import torch

    from harness.models import measured
    from harness.training.engine import backward, engine, place

    own = ModelConfig(**MODELS[name])
    shape = family(own).shape(own, config)
    if not isinstance(shape, measured.Shape):
        from harness.models import blip2
        from harness.models.blip2 import sizes

        shape = blip2.by_running(own, config, sizes.values_of(own), None)
    model = shape.build(config)
    for parameter in model.parameters():  # gradients that overflow would keep ZeRO from any step
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    place(model, config, "cpu")
    losses = _losses(name)
    model.freeze(losses)
    model.train()
    ids = torch.ones(config.micro_batch_size, TEXT, dtype=torch.long)
    texts = {"ids": ids, "mask": ids, "labels": ids}
    pixels = shape.pixels(config.micro_batch_size)
    with tempfile.TemporaryDirectory() as folder:
        deep = engine(model, config, "cpu", Path(folder))
        for _ in range(4):
            found = deep(pixels, *[texts] * len(losses))
            backward(deep, sum(loss for loss in found if loss is not None) / ids.numel())
            deep.step()
    assert (deep.global_steps, deep.skipped_steps) == (2, 0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _losses(name: str) -> list[str]:
    return ["caption", "concept"] if name == "blip2" else ["caption"]


def predicted(name: str, config: TrainConfig) -> int:
    """The bytes that `doctor` predicts for this training."""
    own = ModelConfig(**MODELS[name])
    shape = family(own).shape(own, config)
    assert shape is not None
    return memory.needed(Model(shape, config, "cpu", False), memory.configured(config, 1))


def main(names: list[str]) -> None:
    """Print a line for each set-up of these models."""
    print(f"{'model':10}{'set-up':40}{'predicted':>12}{'peak':>12}{'ratio':>8}")
    for name in names:
        losses = {"stages": [{"epochs": 1, "losses": dict.fromkeys(_losses(name), 1)}]}
        for changes in SETUPS.get(name, FEW):
            given = json.dumps([name, changes | losses])
            done = subprocess.run(
                [sys.executable, __file__, given], stdout=subprocess.PIPE, text=True, check=True
            )
            peak, said = float(done.stdout.splitlines()[-1]), predicted(name, settings(changes | losses))
            what = " ".join(f"{key}={value}" for key, value in changes.items()) or "as it is"
            print(
                f"{name:10}{what:40}{said / GB:>9.2f} GB{peak / GB:>9.2f} GB{said / peak:>8.2f}", flush=True
            )


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].startswith("["):
        name, changes = json.loads(sys.argv[1])
        print(train(name, settings(changes)))
    else:
        with tempfile.TemporaryDirectory() as folder:
            for name, config in CONFIGS.items():
                (Path(folder) / name).mkdir()
                (Path(folder) / name / "config.json").write_text(json.dumps(config))
                (Path(folder) / name / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
            os.environ["PYTHONPATH"] = os.pathsep.join(
                filter(None, (os.environ.get("PYTHONPATH"), os.getcwd()))
            )
            script = Path(__file__).resolve()
            __file__ = str(script)
            os.chdir(folder)
            main(sys.argv[1:] or ["blip2"])
