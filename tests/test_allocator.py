"""A large training on a CPU gives freed memory back to the system."""

import subprocess
import sys

import pytest

from harness.machine import allocator

BLOCKS = 20
FREED = f"""
import resource, sys
from harness.machine import allocator

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

def freed():
    blocks = [b"x" * 2**22 for _ in range({BLOCKS})]
    last = b"x" * 2**22  # above the others in the heap
    before = resident()
    del blocks
    return (before - resident()) / 2**22

del bytearray(30 * 2**20)[:]  # glibc then takes blocks below this size from the heap
with allocator.returning(float(sys.argv[1])):
    print(freed())
print(freed())
"""


@pytest.mark.skipif(not allocator.returns(allocator.LARGE), reason="needs glibc")
@pytest.mark.parametrize(("weights", "expected"), [(allocator.LARGE, BLOCKS), (allocator.LARGE - 1, 0)])
def test_freed_blocks_go_back_to_the_system_while_a_large_model_trains(weights, expected):
    done = subprocess.run(
        [sys.executable, "-c", FREED, str(weights)], capture_output=True, text=True, check=True
    )
    within, after = map(float, done.stdout.split())
    assert within == pytest.approx(expected, abs=1)
    assert after == pytest.approx(0, abs=1)
