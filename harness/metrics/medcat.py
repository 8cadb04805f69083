"""Concept F1 of 2025 and 2026: do caption and reference name the same UMLS concepts, as MedCAT finds them?

The organisers pin MedCAT below 2, which wants numpy below 2, so it cannot live beside this program. It runs
in a second process, by a Python that has it: `medcat_worker.py`.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from harness.checkpoints import hashes
from harness.config import MedCatConfig
from harness.editions import EDITIONS
from harness.errors import Problem
from harness.metrics.base import Absent, Flagged, Inputs, Measured, empty, sign
from harness.metrics.cache import Row, state
from harness.metrics.images import identities
from harness.store import fingerprint

OFFICIAL = "umls_self_train_model_pt2ch_3760d588371755d0"
"""The UMLS full model of the organisers' README; its licence is a personal one of UTS."""
PACK_KEY, PYTHON_KEY = "score.medcat.model_pack", "score.medcat.python"
PACK_HINT = f"With a UMLS licence, download {OFFICIAL}.zip from MedCAT's model page and name it as {PACK_KEY}"
PYTHON_HINT = (
    "MedCAT 1 does not go with the numpy of this program: python -m venv medcat && "
    f"medcat/bin/pip install 'medcat<2' 'pyarrow<20', then {PYTHON_KEY}: medcat/bin/python"
)
WORKER = Path(__file__).with_name("medcat_worker.py")
_VERSION = "from importlib.metadata import version; print(version('medcat'))"


def problems(config: MedCatConfig) -> list[Problem]:
    """What is wrong with the model pack and the Python for it, where a pack is named."""
    if config.model_pack is None:
        return []
    found = []
    if (
        not (config.model_pack.suffix == ".zip" and config.model_pack.is_file())
        and not (config.model_pack / "cdb.dat").is_file()
    ):
        what = f"no model pack of MedCAT 1 (a zip, or a folder with cdb.dat): {config.model_pack}"
        found.append(Problem(what, key=PACK_KEY, hint=PACK_HINT))
    version = _version(_python(config))
    if version is None or not version.startswith("1."):
        what = f"{_python(config)} has " + (f"MedCAT {version}" if version else "no package medcat")
        found.append(Problem(f"{what}; the organisers use MedCAT 1", key=PYTHON_KEY, hint=PYTHON_HINT))
    return found


def measure(inputs: Inputs) -> Measured:
    """F1 of the UMLS concepts that MedCAT finds in each raw prediction and its raw reference.

    Concepts count once for a caption, in 0 to 1; two captions of length 0 are 1, two captions without any
    concept are 0, white space included, as in the evaluators of 2025 and 2026.
    """
    config = inputs.config.medcat
    if config.model_pack is None:
        raise Absent(f"needs {PACK_KEY}. {PACK_HINT}")
    if wrong := problems(config):
        raise Absent("; ".join(f"{problem}. {problem.hint}" for problem in wrong))
    python = _python(config)
    name = config.model_pack.stem
    packed = config.model_pack if config.model_pack.is_file() else config.model_pack / "cdb.dat"
    contents = fingerprint(hashes([packed], inputs.cache))[:8]
    signature = sign("medcat", inputs.edition, f"{name}@{contents}", "pre:raw", f"medcat:{_version(python)}")

    pack = identities([config.model_pack]) if config.model_pack.is_file() else state(config.model_pack)

    def compute(rows: Sequence[Row]) -> list[list[float]]:
        found = concepts({caption for row in rows for caption in row}, config.model_pack, python)
        return [[_score(row, found)] for row in rows]

    per_image = inputs.scored([signature, pack], inputs.pairs, compute)[:, 0]
    rows = np.flatnonzero(empty(inputs.pairs)).tolist()
    said = f"with both captions of length 0: medcat is 1 by {EDITIONS[inputs.edition].blanks.rule}"
    warnings = [Flagged(rows, said)] if rows else []
    return Measured(per_image, signature, official=name == OFFICIAL, warnings=warnings)


def concepts(captions: set[str], pack: Path, python: Path) -> dict[str, set[str]]:
    """The CUIs that MedCAT finds in each caption; raises `Absent` with its last words where it fails."""
    asked = sorted(captions)
    with TemporaryDirectory() as folder:
        texts, found = Path(folder, "texts.json"), Path(folder, "concepts.json")
        texts.write_text(json.dumps(asked), encoding="utf-8")
        command = [python, "-I", WORKER, pack.resolve(), texts, found]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=folder)
        if done.returncode:
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            raise Absent(f"MedCAT failed on {pack} (exit code {done.returncode}): {last}")
        answers = json.loads(found.read_text(encoding="utf-8"))
    return {caption: set(cuis) for caption, cuis in zip(asked, answers, strict=True)}


def _score(pair: Row, found: Mapping[str, set[str]]) -> float:
    if not any(pair):
        return 1.0
    ours, theirs = (found[caption] for caption in pair)
    return 2 * len(ours & theirs) / (len(ours) + len(theirs)) if ours & theirs else 0.0


def _python(config: MedCatConfig) -> Path:
    return Path(config.python or sys.executable)


def _version(python: Path) -> str | None:
    """The version of MedCAT that a Python has, or None where it has none or is no Python."""
    try:
        done = subprocess.run([python, "-I", "-c", _VERSION], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None
