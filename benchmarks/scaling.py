"""What several devices gain: the model of harness/training/speed.py for the recipe, and a check of its rings.

python benchmarks/scaling.py            # the tables of docs/scaling.md
python benchmarks/scaling.py --measure  # an all-reduce on two CPU ranks against the model
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from harness.config.experiment import load
from harness.models import family
from harness.training import memory, speed
from harness.training.memory import GB, Model, Setup
from harness.training.schedule import total_steps

RECIPE = Path(__file__).parents[1] / "experiments" / "ablation_364.yaml"
IMAGES = 60_918
CARDS = {"Ascend910A": 32, "A100": 80, "H200": 141}
"""Memory in GB."""
NVLINK, HCCS = speed.LINKS["NVLink 4 (H100, H200)"], speed.LINKS["HCCS (Ascend 910)"]
ONE, EIGHT = speed.NETWORKS["200 Gb/s"], 8 * speed.NETWORKS["400 Gb/s"]
MACHINES = [
    ("1 x H200", "H200", 1, NVLINK, None, 128),
    ("8 x Ascend 910, HCCS", "Ascend910A", 8, HCCS, None, 128),
    ("8 x A100, NVLink 3", "A100", 8, speed.LINKS["NVLink 3 (A100)"], None, 128),
    ("8 x A100, PCIe 4.0", "A100", 8, speed.LINKS["PCIe 4.0 x16"], None, 128),
    ("8 x H200, NVLink 4", "H200", 8, NVLINK, None, 128),
    ("64 x H200, one 200 Gb/s adapter a machine", "H200", 64, NVLINK, ONE, 128),
    ("64 x H200, eight 400 Gb/s adapters a machine", "H200", 64, NVLINK, EIGHT, 128),
    ("the same, batches of 1024", "H200", 64, NVLINK, EIGHT, 1024),
]
"""Name, card, devices, bytes per second inside and between machines, and captions per optimiser step."""
SIZES = (1 << 20, 1 << 23, 1 << 25)
"""Bytes that `--measure` reduces."""


def recipe(batch_size: int, half: bool) -> Model:
    """The recipe at 364 pixels; its language model is frozen."""
    (config,) = load(RECIPE)
    train = config.train.model_copy(update={"batch_size": batch_size})
    shape = family(config.model).shape(config.model, config.train)
    assert shape is not None
    return Model(shape, train, "cuda", half)


def setup_of(model: Model, devices: int, card: str) -> Setup:
    """The simplest set-up that fits the card, as auto and doctor find it."""
    fitting = (s for s in memory.means(model.config, devices) if memory.needed(model, s) <= CARDS[card] * GB)
    return next(fitting)


def tables() -> str:
    """The tables of docs/scaling.md."""
    rows = [["devices", "set-up", "arithmetic a step", "communication a step", "images/s", "hours"]]
    rows += list(_machines())
    stage_rows = [["", "sent by each device in a step", "NVLink 4", "200 Gb/s"]]
    stage_rows += list(_stages())
    return "\n\n".join(map(_table, (rows, stage_rows))) + "\n"


def _machines() -> Iterator[list[str]]:
    for name, card, devices, inside, between, batch in MACHINES:
        model = recipe(batch, card != "Ascend910A")  # that one has no bf16 and keeps activations in fp32
        setup = setup_of(model, devices, card)
        reached = speed.pace(card, model, Path("nowhere"))
        assert isinstance(reached, speed.Pace)
        moved = speed.bandwidth(inside, between)
        own, sending = speed.step(model, setup, reached.flops, moved)
        steps = total_steps(model.config, IMAGES)
        hours = speed.training(model, IMAGES, setup, card, Path("nowhere")).seconds + steps * sending
        ways = [f"micro batch {setup.micro_batch}", "checkpointing" * setup.checkpointing]
        ways += [f"ZeRO {setup.zero_stage}" * bool(setup.zero_stage), "offload" * setup.offload]
        shown = [f"{1000 * own:.0f} ms", f"{1000 * sending:.0f} ms", f"{batch / (own + sending):.0f}"]
        yield [name, ", ".join(filter(None, ways)), *shown, f"{hours / 3600:.1f}"]


def _stages() -> Iterator[list[str]]:
    model = recipe(128, True)
    for stage in range(4):
        sent = speed.sent(model, Setup(8, 8, False, stage, False))
        times = [sent / speed.bandwidth(NVLINK, between) for between in (None, ONE)]
        yield [f"ZeRO {stage}", f"{sent / GB:.1f} GB", *(f"{1000 * seconds:.0f} ms" for seconds in times)]


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rest])


def as_rank() -> None:
    """On each of two ranks: measure exchanges of tensors and all-reduces; rank 0 prints both as JSON."""
    import torch
    import torch.distributed as distributed

    distributed.init_process_group("gloo")
    rank, found = distributed.get_rank(), {}
    for size in SIZES:
        numbers = torch.ones(size // 4)

        def exchange(numbers: torch.Tensor = numbers) -> None:
            sending = distributed.isend(numbers, 1 - rank)
            distributed.recv(torch.empty_like(numbers), 1 - rank)
            sending.wait()

        def reduce(numbers: torch.Tensor = numbers) -> None:
            distributed.all_reduce(numbers)

        found[size] = [_fastest(exchange), _fastest(reduce)]
    if rank == 0:
        print(json.dumps(found))
    distributed.destroy_process_group()


def _fastest(act: Callable[[], None]) -> float:
    import torch.distributed as distributed

    times = []
    for _ in range(7):
        distributed.barrier()
        begun = time.perf_counter()
        act()
        times.append(time.perf_counter() - begun)
    return min(times)


def measured() -> dict[int, tuple[float, float]]:
    """By bytes: seconds of an all-reduce on two ranks as the model has it, and as measured.

    The model's bandwidth is that of an exchange: each rank sends a tensor of that size to the other.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--rank"], env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    return {
        int(size): (2 * speed.passed_on(exchanging, 2), reducing)
        for size, (exchanging, reducing) in json.loads(done.stdout.splitlines()[-1]).items()
    }


def main() -> None:
    """Print the tables, or measure."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--measure", action="store_true")
    options.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.rank:
        as_rank()
    elif given.measure:
        for size, (said, found) in measured().items():
            print(f"{size / 1e6:6.1f} MB   {1000 * said:7.2f} ms predicted   {1000 * found:7.2f} ms measured")
    else:
        print(tables(), end="")


if __name__ == "__main__":
    main()
