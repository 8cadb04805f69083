"""Trains a tiny checkpoint as one rank of a launch: `python -m support.ranked_training CONFIG.json`."""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from harness.config.sections import AugmentConfig
from harness.machine import device, ranks
from harness.models.loading import save_trained
from harness.store import write_json
from harness.training import train
from harness.training.settings import TrainConfig
from support.models import load_tiny
from support.slow_saves import SlowSave
from support.training import measure, splits, with_head


def main(given):
    """Train, and leave the final weights, the best ones being the last unless rank 0 has other `scores`."""
    found = device.probe(given.get("device", "cpu"))
    ranks.start(found.kind)
    scores = iter(given.get("scores") or range(1000))

    def load():
        found = load_tiny(Path(given["folder"]), dropout=given.get("dropout", 0.0), **given.get("model", {}))
        return with_head(found, **given["head"]) if "head" in given else found

    def log(row):
        if row["step"] == given.get("kill_at") and "valid_loss" not in row:
            os.kill(os.getpid(), signal.SIGKILL)

    if given.get("slow"):
        torch.save = SlowSave(given["slow"])
    directory = Path(given["directory"])
    directory.mkdir(exist_ok=True)
    images, until = splits(load()), given.get("until")
    if until:  # no validation
        images = {"train": images["train"]}
    training = train.Training(
        TrainConfig.model_validate(given["train"]),
        AugmentConfig(),
        load,
        images,
        str(device.torch_device(found.kind)),
        42,
        directory,
        log,
        lambda loaded: {"valid_primary": float(next(scores)) if ranks.rank() == 0 else -1.0},
        until=until,
        measure=measure,
    )
    loaded = training.run()
    if ranks.rank() == 0:
        write_json(directory / "compiled.json", training.compiler.used)
        save_trained(loaded.model, directory / "final.safetensors")
    ranks.stop()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
    ranks.leave()
