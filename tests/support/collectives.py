"""Counts what two ranks send in an optimiser step: `python -m support.collectives CHECKPOINT`."""

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch.distributed as distributed

from harness.machine import device, ranks

SHARES = {"all_reduce": 2, "all_gather_into_tensor": 1, "reduce_scatter_tensor": 1}
"""How often a ring passes on a tensor, by (N-1)/N of it each time."""
WHOLE = {
    "all_reduce": (0, "tensor"),
    "all_gather_into_tensor": (0, "output_tensor"),
    "reduce_scatter_tensor": (1, "input"),
}
"""Place and name of the argument of each function that is the whole tensor."""
EAGER = {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0}
EAGER |= {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
"""ZeRO-3 keeps small weights and those that it needs soon; of a large model it can't."""
PARTS = 2
sent: Counter[int] = Counter()


def count(stage: list[int | None]) -> None:
    """From now on add the bytes that each function sends to `sent`, under the stage in the list."""
    for name in SHARES:
        setattr(distributed, name, _counting(name, getattr(distributed, name), stage))


def _counting(name: str, act: Callable, stage: list[int | None]) -> Callable:
    place, key = WHOLE[name]

    def counting(*given, **named):
        if stage[0] is not None:
            whole = named[key] if key in named else given[place]
            once = whole.numel() * whole.element_size() * (ranks.world_size() - 1) / ranks.world_size()
            sent[stage[0]] += SHARES[name] * once
        return act(*given, **named)

    return counting


def main(checkpoint: Path) -> None:
    """Do two steps at each ZeRO stage, and print the bytes of the second, of weights and of gradients."""
    device.probe("cpu")
    ranks.start("cpu")
    now: list[int | None] = [None]
    count(now)
    from harness.training import engine
    from harness.training.settings import TrainConfig
    from support.models import batch, load_tiny

    for stage in range(4):
        values = {"zero_stage": stage, "deepspeed": {"zero_optimization": EAGER if stage == 3 else {}}}
        config = TrainConfig(batch_size=8, micro_batch_size=2, precision="fp32", **values)
        loaded = load_tiny(checkpoint)
        loaded.model.freeze(["caption", "concept"])
        every = {p: p.numel() * p.element_size() for p in loaded.model.parameters()}
        sizes = sum(every.values()), sum(size for p, size in every.items() if p.requires_grad)
        with tempfile.TemporaryDirectory() as folder:
            trainer = engine.engine(loaded.model.train(), config, "cpu", Path(folder))
        images, caption, concept = batch(loaded, 2)
        for step in range(2):
            now[0] = stage if step else None
            for _ in range(PARTS):
                losses = trainer(images, caption, concept)
                trainer.backward(losses.caption + losses.concept)
                trainer.step()
        now[0] = None
        engine.release(trainer)
    if ranks.rank() == 0:
        print(json.dumps({"sent": [sent[stage] for stage in range(4)], "sizes": sizes}))
    ranks.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    ranks.leave()
