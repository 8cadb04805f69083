"""Builds the make-believe NPU, once for each torch and source: `build.py CACHE` prints the module's path."""

import hashlib
import os
import sys
import tempfile
from pathlib import Path

NAME = "make_believe_npu"
SOURCE = Path(__file__).with_name("npu.cpp")


def build(cache: Path) -> Path:
    """The module under `cache`; processes that want it at once build it once.

    Built in a folder that is dropped afterwards: torch's own lock in it would outlive a killed build.
    """
    import torch
    from filelock import FileLock
    from torch.utils.cpp_extension import load

    what = torch.__version__.encode() + sys.version.encode() + SOURCE.read_bytes()
    built = cache / hashlib.sha256(what).hexdigest()[:16] / f"{NAME}.so"
    built.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{built}.lock"):
        if not built.exists():
            with tempfile.TemporaryDirectory(dir=built.parent) as folder:
                load(NAME, [str(SOURCE)], build_directory=folder, extra_cflags=["-O1"])
                os.replace(Path(folder) / built.name, built)
    return built


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
