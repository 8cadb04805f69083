"""Training steps a second on a shared CPU: with OpenMP's threads spinning, and as the harness has them wait.

    python benchmarks/busy.py

Trains a small transformer alone, and beside one and two busy processes. Each figure is the median of three
processes of 6 s, and the three ways take turns. `chosen` starts as the harness does and says what it chose.
"""

import os
import statistics
import subprocess
import sys

WAYS = {"spinning": {"OMP_WAIT_POLICY": "ACTIVE"}, "sleeping": {"OMP_WAIT_POLICY": "PASSIVE"}, "chosen": {}}
STEPS = """
import os, time
from harness.machine import device
device.probe("cpu")
import torch
from torch import nn
torch.manual_seed(0)
model = nn.TransformerEncoder(nn.TransformerEncoderLayer(128, 4, 512, batch_first=True, dropout=0), 4)
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
batch = torch.randn(32, 64, 128)
def step():
    optimizer.zero_grad()
    model(batch).square().mean().backward()
    optimizer.step()
for _ in range(3):
    step()
begun, done = time.perf_counter(), 0
while time.perf_counter() - begun < 6:
    step()
    done += 1
print(done / (time.perf_counter() - begun), os.environ.get("OMP_WAIT_POLICY", "ACTIVE"))
"""


def measure(way: dict[str, str]) -> tuple[float, str]:
    """Steps a second of one process, and how its threads waited."""
    clean = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command = [sys.executable, "-c", STEPS]
    done = subprocess.run(command, env=clean | way, capture_output=True, text=True, check=True)
    speed, policy = done.stdout.split()
    return float(speed), policy.lower()


def main() -> None:
    print(f"{'busy processes':16}" + "".join(f"{name:>12}" for name in WAYS) + "   chosen / spinning")
    for busy in range(3):
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
        try:
            rounds = [{name: measure(way) for name, way in WAYS.items()} for _ in range(3)]
        finally:
            for process in others:
                process.kill()
        speed = {name: statistics.median(one[name][0] for one in rounds) for name in WAYS}
        said = ", ".join(dict.fromkeys(one["chosen"][1] for one in rounds))
        row = "".join(f"{value:12.1f}" for value in speed.values())
        print(f"{busy:<16}{row}   {speed['chosen'] / speed['spinning']:.2f} x, {said}")


if __name__ == "__main__":
    main()
