"""What DeepSpeed allocates for a small model, in bytes."""

from collections.abc import Iterable
from pathlib import Path

from harness.machine import device

device.probe("cpu")

import torch  # noqa: E402
from transformers import Blip2Config  # noqa: E402

from harness.models import tiny  # noqa: E402
from harness.models.blip2 import sizes  # noqa: E402
from harness.models.settings import TinyConfig  # noqa: E402
from harness.training.engine import engine, release  # noqa: E402
from harness.training.settings import TrainConfig  # noqa: E402
from support.traces import captioner  # noqa: E402


class Vocabulary(list):
    """Words whose special ones are all the second."""

    bos_token_id = eos_token_id = pad_token_id = 1

    def convert_tokens_to_ids(self, _):
        return 1


def small() -> tuple[Blip2Config, sizes.Shape]:
    """A model of some layers, and the sizes that the forecast reads for it."""
    settings = TinyConfig(hidden_size=64, vision_layers=2, qformer_layers=3, text_hidden_size=96)
    config = tiny._blip2_config(settings, Vocabulary([0] * settings.vocab_size), settings.vocab_size)
    return config, sizes.of_tiny(settings, config.vision_config.image_size, True)


def settings(stage: int) -> dict:
    """The section `train` for a ZeRO stage."""
    values = {"batch_size": 2, "micro_batch_size": 2, "zero_stage": stage, "precision": "fp32"}
    return values | {"deepspeed": {"zero_optimization": {"reduce_bucket_size": 10**6}}}


def size(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors; those that share memory count once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def allocated(stage: int, folder: Path) -> tuple[int, int, int]:
    """Bytes of weights, gradients, and the optimiser's own tensors after a step at a ZeRO stage."""
    config, _ = small()
    model = captioner(config, True, False, False)
    model.freeze(["caption", "concept"])
    deep = engine(model, TrainConfig(**settings(stage)), "cpu", folder)
    side = config.vision_config.image_size
    ids = torch.ones(2, 9, dtype=torch.long)
    texts = {"ids": ids, "mask": ids, "labels": ids}
    losses = deep(torch.rand(2, 3, side, side), texts, texts)
    deep.backward(losses.caption + losses.concept)
    gradients = size(p.grad for p in model.parameters() if p.grad is not None)
    deep.step()
    inner = getattr(deep.optimizer, "optimizer", deep.optimizer)
    states = [t for s in inner.state.values() for t in s.values() if torch.is_tensor(t) and t.numel() > 1]
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    copies = [p for g in inner.param_groups for p in g["params"] if p.untyped_storage().data_ptr() not in own]
    found = size(model.parameters()), gradients, size([*states, *copies])
    release(deep)
    return found
