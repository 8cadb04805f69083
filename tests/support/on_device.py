"""Plain training or captions on a device as JSON: `python -m support.on_device TASK DEVICE FOLDER`."""

import json
import sys
from pathlib import Path

from harness.machine import device

device.probe(sys.argv[2])

import torch  # noqa: E402

from harness.config.sections import PredictConfig  # noqa: E402
from harness.decoding import predict  # noqa: E402
from support.models import load_tiny, pixels  # noqa: E402


def plain(place: str, folder: Path) -> list[float]:
    """The losses of every step of both stages by PyTorch's own AdamW; the weights go to plain.pt."""
    from support.ranks import TRAIN
    from support.training import by_hand
    from support.training import config as settings

    model, losses = by_hand(folder, settings(**TRAIN), True, place)
    torch.save({name: p.detach().cpu() for name, p in model.named_parameters()}, folder / "plain.pt")
    return losses


def captions(place: str, folder: Path) -> list[str]:
    """Captions of 12 images of noise, by beams."""
    loaded = load_tiny(folder)
    loaded.model.to(place)
    config = PredictConfig(num_beams=3, max_new_tokens=12, min_new_tokens=6, batch_size=5)
    return predict.captions(loaded, pixels(12), range(12), config)


if __name__ == "__main__":
    task, kind, folder = sys.argv[1:]
    place = str(device.torch_device(kind))
    print(json.dumps({"plain": plain, "captions": captions}[task](place, Path(folder))))
