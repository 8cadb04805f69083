"""Plain training or captions on a device as JSON: `python -m support.on_device TASK DEVICE FOLDER`."""

import itertools
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


def decodings(place: str, folder: Path) -> list[list[list[list[int]]]]:
    """Ids of captions in fp32 and bf16, by each search: with graphs, without, and by `generate`."""
    from harness.decoding.search import search
    from harness.models.cache import CachedDecoding
    from support.generate import SIDE, captioner, generated

    end, pad, most = 5, 1, 20
    noise = torch.randn(16, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).to(place)
    prompt, capture = torch.tensor([2, 7], device=place), CachedDecoding._capture

    def ours(model, beams: int, captured: bool) -> torch.Tensor:
        CachedDecoding._capture = capture if captured else lambda self, tokens: None
        config = PredictConfig(num_beams=beams, max_new_tokens=most, min_new_tokens=0)
        with torch.inference_mode(), model.decoder(beams, most) as begin:
            decoding = begin(noise, prompt.expand(len(noise), -1))
            ids = search(decoding, config, end, pad).ids[:, 0]
        assert decoding.graphs
        assert all((graph is not None) == captured for graph in decoding.graphs.values())
        return ids

    rows = []
    for dtype, language_model, beams in itertools.product((None, torch.bfloat16), (True, False), (1, 3)):
        model = captioner(2, language_model).to(place)
        model.compute_in(dtype, False)
        given = {"num_beams": beams, "max_new_tokens": most, "min_new_tokens": 0}
        found = [ours(model, beams, True), ours(model, beams, False)]
        found.append(generated(model, noise, prompt, end, pad, **given)[1])
        rows.append([[[*row, end][: [*row, end].index(end)] for row in one.tolist()] for one in found])
    return rows


if __name__ == "__main__":
    task, kind, folder = sys.argv[1:]
    place = str(device.torch_device(kind))
    print(
        json.dumps({"plain": plain, "captions": captions, "decodings": decodings}[task](place, Path(folder)))
    )
