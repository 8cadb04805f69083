"""The run command on a make-believe NPU with DeepSpeed's own NPU accelerator; nothing uses CUDA."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from support.commands import python
from support.experiments import EXPERIMENT

HERE = Path(__file__).parent
PACKAGE = HERE.parent / "harness"
SUPPORT = HERE / "support"
FAKE = SUPPORT / "make_believe_npu"
HARNESS = ("-m", "harness")
POISONED = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "poisoned_cuda.py")
Environment = dict[str, str]


def plain() -> Environment:
    """An environment without the NPU."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    return environment


@pytest.fixture(scope="session")
def npu(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with two make-believe NPUs; built once for each torch and source, then kept."""
    environment = plain()
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    for tool in ("c++", "ninja"):
        if shutil.which(tool, path=environment["PATH"]) is None:
            pytest.skip(f"the make-believe NPU is built with {tool}, which is not here")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        pytest.skip("the make-believe NPU is built with Python.h, which is not here")
    cache = getattr(request.config, "cache", None)  # absent with -p no:cacheprovider
    place = cache.mkdir("make_believe_npu") if cache else tmp_path_factory.mktemp("make_believe_npu")
    command = [sys.executable, str(FAKE / "build.py"), str(place)]
    built = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr[-4000:]
    return environment | {
        "MAKE_BELIEVE_NPU": built.stdout.splitlines()[-1],
        "MAKE_BELIEVE_NPUS": "2",
        "PYTHONPATH": os.pathsep.join([str(FAKE), *filter(None, [environment.get("PYTHONPATH")])]),
        "ASCEND_HOME_PATH": str(FAKE),
    }


def run(
    folder: Path, environment: Environment, *arguments: str, program: Sequence[str] = HARNESS
) -> subprocess.CompletedProcess:
    command = [sys.executable, *program, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def finished(folder: Path, done: subprocess.CompletedProcess) -> dict:
    """The record of the folder's only run."""
    assert done.returncode == 0, done.stderr[-4000:]
    (file,) = (folder / "runs" / "small").glob("*/run.json")
    record = json.loads(file.read_text())
    assert record["status"] == "FINISHED"
    return record


def losses(folder: Path, record: dict) -> list[float]:
    """Every loss of the run in order, in training and validation."""
    lines = (folder / "runs" / record["artifacts"]["losses.jsonl"]).read_text().splitlines()
    names = ("caption_loss", "concept_loss", "valid_loss")
    return [row[name] for row in map(json.loads, lines) for name in names if name in row]


def captions(folder: Path, record: dict) -> str:
    return (folder / "runs" / record["artifacts"]["predictions/test_before.csv"]).read_text()


def values(record: dict) -> dict[str, float]:
    return {name: score["value"] for name, score in record["scores"]["valid"]["after"].items()}


def experiment() -> str:
    """The small experiment in fp32, without random draws, with a language model that has words."""
    given = yaml.safe_load(EXPERIMENT) | {"device": "auto"}
    given["variants"] = {"opt": {}}
    given["model"]["tiny"]["text_epochs"] = 12
    given["train"] |= {"precision": "fp32", "dropout": 0}
    given["predict"] |= {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3}
    given["score"]["metrics"] = ["bertscore", "rouge1"]
    return yaml.safe_dump(given)


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """The run on two ranks of the CPU, its torch.cuda poisoned."""
    folder = tmp_path_factory.mktemp("cpu")
    (folder / "small.yaml").write_text(experiment())
    shutil.copy(SUPPORT / "poisoned_cuda.py", folder)
    return folder, run(folder, plain(), "run", "small.yaml", "--device", "cpu", program=POISONED)


def beside(on_cpu: tuple[Path, subprocess.CompletedProcess], folder: Path) -> Path:
    """A folder with the data and the untrained model of the run on the CPU."""
    folder.mkdir(exist_ok=True)
    shutil.copy(on_cpu[0] / "small.yaml", folder)
    shutil.copytree(on_cpu[0] / "data", folder / "data")
    for step in (on_cpu[0] / "runs" / "steps").glob("tiny-*"):
        if step.is_dir():
            shutil.copytree(step, folder / "runs" / "steps" / step.name)
    return folder


@pytest.mark.slow
def test_nothing_in_harness_touches_cuda_in_a_whole_run(on_cpu):
    record = finished(*on_cpu)
    assert record["made"]["train"]["ranks"] == 2
    assert "Touched" not in on_cpu[1].stderr


def test_the_poison_works():
    """In a process of its own: torch.cuda refuses harness and nobody else."""
    code = (
        "import torch; from support import poisoned_cuda; poisoned_cuda.poison()\n"
        "torch.cuda.is_available()\n"
        "for call in ('torch.cuda.is_available()', 'torch.ones(1).cuda()', 'torch.nn.Linear(1, 1).cuda()'):\n"
        "    try: exec(call, {'__name__': 'harness.training.train', 'torch': torch})\n"
        "    except poisoned_cuda.Touched as error: print(error)\n"
    )
    done = python(code)
    assert done.stdout.splitlines() == [
        "harness.training.train uses torch.cuda.is_available",
        *["harness.training.train uses .cuda()"] * 2,
    ], done.stderr


def test_cuda_is_named_in_the_table_of_kinds_alone():
    """`"cuda"` as a kind to compare with or to look up is no call; a device string or torch.cuda is one."""
    string = r"(?:device|to|map_location|autocast)\s*[=(]\s*f?[\"']cuda"
    call = re.compile(rf"torch\.cuda|\.cuda\(|from torch import .*\bcuda\b|{string}")
    found = [
        f"{file.relative_to(PACKAGE)}:{number}: {line.strip()}"
        for file in sorted(PACKAGE.rglob("*.py"))
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if call.search(line) and file.name != "device.py"
    ]
    assert found == []
    assert call.search("torch.cuda.synchronize()")
    assert call.search("x.to('cuda:0')")


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_run_on_two_npus_equals_that_on_the_cpu(on_cpu, npu, tmp_path, zero_stage):
    folder = beside(on_cpu, tmp_path)
    sets = ("--set", f"train.zero_stage={zero_stage}")
    record = finished(folder, run(folder, npu, "run", "small.yaml", "--nproc", "2", "--device", "npu", *sets))
    assert record["environment"]["device"] == "npu (make-believe NPU)"
    for step in ("train", "predict-valid", "predict-test", "score-after"):
        assert record["made"][step]["ranks"] == 2
    expected = finished(*on_cpu)
    assert "tiny" not in record["seconds"]
    assert losses(folder, record) == pytest.approx(losses(on_cpu[0], expected), rel=1e-5)
    assert captions(folder, record) == captions(on_cpu[0], expected)
    assert values(record) == pytest.approx(values(expected), abs=1e-5)
    assert min(values(record).values()) > 0


@pytest.mark.slow
def test_neural_metrics_on_the_npu_equal_those_on_the_cpu(on_cpu, npu, tmp_path):
    """The same captions are scored twice, with the stand-ins that the run on the CPU made."""
    shutil.copytree(on_cpu[0], tmp_path / "both")
    metrics = ["--set", "score.metrics=[bertscore, bleurt, clipscore, refclipscore]"]
    metrics += ["--set", "score.bleurt.checkpoint=standin", "--set", "score.clipscore.checkpoint=standin"]
    expected = finished(tmp_path / "both", run(tmp_path / "both", plain(), "run", "small.yaml", *metrics))
    for step in ("score-before", "score-after"):
        shutil.rmtree(tmp_path / "both" / "runs" / expected["steps"][step])
    arguments = ("run", "small.yaml", "--device", "npu", *metrics)
    record = finished(tmp_path / "both", run(tmp_path / "both", npu, *arguments))
    assert set(record["seconds"]) == {"score-before", "score-after"}
    assert set(values(record)) == {"bertscore", "bleurt", "clipscore", "refclipscore"}
    assert values(record) == pytest.approx(values(expected), abs=1e-5)


@pytest.mark.ci
def test_the_doctor_names_the_npu(npu, tmp_path):
    (tmp_path / "small.yaml").write_text(experiment())
    done = run(tmp_path, npu, "doctor", "small.yaml", "--format", "json")
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert checks["device"] == {
        "name": "device",
        "ok": True,
        "found": "npu: 2 x make-believe NPU",
        "fix": None,
    }
    assert "of npu free" in checks["memory of the npu"]["found"]


@pytest.mark.parametrize(
    "masks",
    [pytest.param("as torch", marks=pytest.mark.slow), pytest.param("inverted", marks=pytest.mark.ci)],
)
def test_the_selftest_names_what_an_npu_computes_otherwise(npu, tmp_path, masks):
    """Transformers gives the language model a boolean mask; the text path adds its own mask to the scores."""
    environment = npu | {"MAKE_BELIEVE_NPU_MASKS": masks}
    done = run(tmp_path, environment, "doctor", "--selftest", "--device", "npu", "--format", "json")
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    compared = {name.removeprefix("selftest "): check for name, check in checks.items() if "selftest" in name}
    assert {name.split()[0] for name in compared} == {"fp32", "bf16"}
    wrong = {name for name, check in compared.items() if not check["ok"]}
    needs = ("boolean mask", "language model", "gradients", "training step")
    if masks == "inverted":
        assert wrong >= {f"fp32 {name}" for name in needs}
        assert wrong >= {"bf16 boolean mask", "bf16 language model"}
        assert not {name for name in wrong if name.endswith(("text path", "ViT", "queries", "additive mask"))}
        assert "differs from fp32 on the CPU by" in compared["bf16 boolean mask"]["found"]
        assert done.returncode == 1
    else:
        assert not wrong, compared
        assert "decoding" in str(compared)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"MAKE_BELIEVE_NPUS": "0"}, "torch sees no npu"),
        ({"MAKE_BELIEVE_NPU": "/nowhere/npu.so"}, "torch reports: ImportError"),
        ({"ASCEND_HOME_PATH": None}, "ASCEND_HOME_PATH is not set (source CANN's set_env.sh)"),
    ],
)
def test_an_npu_that_does_not_work_is_passed_over_with_the_reason(npu, tmp_path, changed, reason):
    environment = {name: value for name, value in (npu | changed).items() if value is not None}
    done = run(tmp_path, environment, "doctor", "--format", "json")
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert checks["not used: npu"]["found"].startswith(reason)
    assert not checks["device"]["found"].startswith("npu")


@pytest.mark.slow
def test_the_first_ascend_910_is_not_taken_for_more_than_it_is(npu, tmp_path):
    """It has no bf16, rounds the inputs of products to fp16, and saturates instead of overflowing."""
    first = npu | {"MAKE_BELIEVE_NPU_FIRST": "1"}
    (tmp_path / "small.yaml").write_text(experiment())
    half = ("small.yaml", "--set", "train.precision=fp16", "--set", "train.zero_stage=1")
    done = run(tmp_path, first, "doctor", *half, "--format", "json")
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert checks["bf16"]["ok"]
    assert checks["fp32"]["found"].endswith("neural metrics are computed on the CPU")
    assert not checks["fp16"]["ok"]
    refused = run(tmp_path, first, "run", *half)
    assert refused.returncode == 2
    assert "train.precision: got fp16, but this npu saturates instead of overflowing" in refused.stderr
    code = "from harness.machine import device; device.probe(); print(device.scoring_device('npu'))"
    assert [run(tmp_path, each, code, program=("-c",)).stdout for each in (first, npu)] == [
        "cpu\n",
        "npu:0\n",
    ]


@pytest.mark.slow
def test_a_device_bound_to_a_task_of_slurm_is_the_first_one_on_every_rank(npu, tmp_path):
    told = npu | {"MAKE_BELIEVE_NPUS": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "here"}
    told |= {"SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
    code = (
        "import os\nfrom harness.machine import device, launch\nlaunch.adopt_slurm(os.environ)\n"
        "print(device.torch_device(device.probe().kind))\nimport torch\n"
        "print(torch.npu.conv.allow_hf32, torch.npu.config.allow_internal_format)"
    )
    done = run(tmp_path, told, code, program=("-c",))
    assert done.stdout == "npu:0\nFalse False\n", done.stderr


@pytest.mark.ci
def test_more_ranks_than_npus_are_refused_before_any_starts(npu, tmp_path):
    (tmp_path / "small.yaml").write_text(experiment())
    done = run(tmp_path, npu, "run", "small.yaml", "--nproc", "3")
    assert done.returncode == 2
    assert "--nproc: got 3, but this machine shows 2 npu (make-believe NPU)" in done.stderr
    assert "train.batch_size: got" in done.stderr  # and all else that is wrong
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_torch_npu_that_breaks_torch_leaves_ranks_on_the_cpu_alone(on_cpu, tmp_path):
    """As on a login node: installed, told to torch as a backend to load by itself, and without CANN."""
    info = tmp_path / "installed" / "torch_npu-2.9.dist-info"
    (tmp_path / "installed" / "torch_npu").mkdir(parents=True)
    (tmp_path / "installed" / "torch_npu" / "__init__.py").write_text("raise ImportError('libascend_hal.so')")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.9\n")
    (info / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    environment = plain() | {"PYTHONPATH": str(tmp_path / "installed")}
    environment.pop("TORCH_DEVICE_BACKEND_AUTOLOAD", None)  # which tests of this process may have set
    assert "torch_npu" in run(tmp_path, environment, "import torch", program=("-c",)).stderr
    folder = beside(on_cpu, tmp_path / "project")
    record = finished(folder, run(folder, environment, "run", "small.yaml", "--nproc", "2"))
    assert losses(folder, record) == losses(on_cpu[0], finished(*on_cpu))
