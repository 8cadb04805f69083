"""Several ranks: ZeRO against plain PyTorch, killed ranks, damaged checkpoints, captioning, launching."""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file
from support.commands import harness, python
from support.experiments import EXPERIMENT
from support.ranks import TESTS, TRAIN, TRAINING, rows, train
from support.training import by_hand
from support.training import config as settings

from harness.machine import device, launch
from harness.store import fingerprint
from harness.training.resume import Checkpoints, State
from harness.training.schedule import indivisible
from harness.training.settings import TrainConfig

device.probe("cpu")


@pytest.fixture(scope="module")
def folder(tiny_folder) -> Path:
    return tiny_folder


@pytest.fixture(scope="module")
def plain(folder) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights and losses of 21 steps of plain PyTorch AdamW in one process."""
    model, losses = by_hand(folder, settings(**TRAIN), True)
    return {name: p.detach() for name, p in model.named_parameters()}, losses


def assert_same(file: Path, plain: dict[str, torch.Tensor]) -> None:
    """Weights equal to 1e-5, but for one in 10,000: Adam divides a gradient by its size, so where it is
    nothing but rounding the weight may go either way, by a learning rate at most."""
    found = load_file(file)
    names = sorted(found.keys() & plain.keys())
    differences = torch.cat([(found[name] - plain[name]).abs().flatten() for name in names])
    assert (differences > 1e-5).double().mean() < 1e-4
    assert differences.max() < TRAIN["learning_rate"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero_stage", "offload"),
    [
        *((0, False), (1, False), (1, True), (2, False), (3, False), (3, True)),
        pytest.param(2, True, marks=pytest.mark.ci),
    ],
)
def test_zero_on_two_ranks_equals_plain_pytorch(folder, plain, tmp_path, zero_stage, offload):
    train(folder, tmp_path / "run", train=TRAIN | {"zero_stage": zero_stage, "offload": offload})
    weights, losses = plain
    found = [row["loss"] for row in rows(tmp_path / "run") if "loss" in row]
    assert found == pytest.approx(losses, rel=1e-5)
    assert_same(tmp_path / "run" / "final.safetensors", weights)


@pytest.mark.slow
@pytest.mark.parametrize(("zero_stage", "at"), [(1, 2), (1, 8), (2, 13), (3, 5), (3, 17)])
def test_killed_ranks_go_on_to_the_same_bits(folder, tmp_path, zero_stage, at):
    """SIGKILL at a step of either stage, with dropout and checkpoints within epochs too."""
    how = TRAIN | {"zero_stage": zero_stage, "checkpoint_every_steps": 2}
    train(folder, tmp_path / "whole", train=how, dropout=0.1)
    assert train(folder, tmp_path / "parts", check=False, train=how, dropout=0.1, kill_at=at) != 0
    train(folder, tmp_path / "parts", train=how, dropout=0.1)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    whole, parts = (load_file(tmp_path / name / "final.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


REWARDED = {"metrics": {"rouge1": 1, "bleu1": 1}, "samples": 3, "max_new_tokens": 6}
SELF_CRITICAL = TRAIN | {
    "stages": [
        {"epochs": 1, "losses": {"caption": 1}},
        {
            "epochs": 2,
            "losses": {"reward": 1, "caption": 0.5},
            "reward": REWARDED,
            "validations_per_epoch": 2,
        },
    ],
}


def assert_same_training(one: Path, other: Path) -> None:
    """Losses and, but for rounding that Adam enlarges, weights."""
    losses = [[row["loss"] for row in rows(directory) if "loss" in row] for directory in (one, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-5)
    assert_same(one / "final.safetensors", load_file(other / "final.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_self_critical_training_on_two_ranks_is_that_of_one(folder, tmp_path, zero_stage):
    """Each rank samples its share with the same draws, and both are killed within the stage."""
    settings = SELF_CRITICAL | {"zero_stage": zero_stage, "checkpoint_every_steps": 2}
    train(folder, tmp_path / "one", 1, train=SELF_CRITICAL)
    assert train(folder, tmp_path / "two", 2, check=False, train=settings, kill_at=6) != 0
    train(folder, tmp_path / "two", 2, train=settings)
    assert_same_training(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_a_training_of_three_stages_killed_in_each_goes_on_to_the_same_bits(folder, tmp_path):
    """SIGKILL within and after the first epoch of a stage; the third trains again what the second freezes."""
    both, one = {"caption": 1, "concept": 0.5}, {"caption": 1}
    three = [{"epochs": 2, "losses": both}, {"epochs": 1, "losses": one}, {"epochs": 2, "losses": both}]
    settings = TRAIN | {"stages": three, "checkpoint_every_steps": 2, "evaluate_every": 1}
    train(folder, tmp_path / "whole", 1, train=settings, dropout=0.1)
    for stage, at in ((1, 5), (2, 8), (3, 11)):
        assert train(folder, tmp_path / "parts", 1, check=False, train=settings, dropout=0.1, kill_at=at) != 0
        last = rows(tmp_path / "parts")[-1]
        assert (last["stage"], last["step"]) == (stage, at)
    train(folder, tmp_path / "parts", 1, train=settings, dropout=0.1)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    whole, parts = (load_file(tmp_path / name / "final.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero_stages", "processes", "at"),
    [
        ((0, 0), (2, 1), 6),
        ((1, 1), (2, 1), 5),
        ((2, 2), (1, 2), 17),
        ((3, 3), (2, 1), 8),
        ((1, 2), (2, 4), 7),
    ],
)
def test_another_number_of_ranks_goes_on(folder, plain, tmp_path, zero_stages, processes, at):
    """Killed in either stage and begun again on other ranks, or at another ZeRO stage of the same layout."""
    before, after = (TRAIN | {"zero_stage": stage, "checkpoint_every_steps": 2} for stage in zero_stages)
    assert train(folder, tmp_path / "run", processes[0], check=False, train=before, kill_at=at) != 0
    train(folder, tmp_path / "run", processes[1], train=after)
    found = [row["loss"] for row in rows(tmp_path / "run") if "loss" in row]
    assert found == pytest.approx(plain[1], rel=1e-5)
    assert_same(tmp_path / "run" / "final.safetensors", plain[0])


@pytest.mark.slow
def test_another_layout_of_the_optimiser_is_refused(folder, tmp_path):
    assert train(folder, tmp_path / "run", check=False, train=TRAIN, kill_at=6) != 0
    given = json.loads((tmp_path / "run" / "given.json").read_text())
    given |= {"kill_at": None, "train": TRAIN | {"zero_stage": 1}}
    (tmp_path / "run" / "given.json").write_text(json.dumps(given))
    command = [sys.executable, "-m", TRAINING, str(tmp_path / "run" / "given.json")]
    alone = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, timeout=120)
    assert alone.returncode != 0
    assert "it was interrupted at ZeRO stage 0, whose checkpoints can't be read at stage 1" in alone.stderr


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        state = State(step=step, done=step)
        checkpoints.path(state).mkdir(parents=True)
        (checkpoints.path(state) / "weights.pt").write_bytes(b"x" * 1000 * step)
        checkpoints.seal(state)
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step00000002", "step00000003"]
    assert checkpoints.newest().step == 3
    assert checkpoints.damaged(checkpoints.newest()) == []
    os.truncate(checkpoints.path(State(step=3)) / "weights.pt", 2999)
    assert checkpoints.newest().step == 2
    (checkpoints.path(State(step=2)) / "weights.pt").unlink()
    assert checkpoints.newest() == State()
    assert checkpoints.damaged(State()) == ["step00000002", "step00000003"]
    (checkpoints.folder / "step00000004").mkdir()  # a killed process left it
    assert "step00000004" not in checkpoints.damaged(State())


def test_a_damaged_checkpoint_takes_no_place_among_the_kept_ones(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        if step == 3:
            os.truncate(checkpoints.path(State(step=2)) / "weights.pt", 0)
        state = State(step=step, done=step)
        checkpoints.path(state).mkdir(parents=True)
        (checkpoints.path(state) / "weights.pt").write_bytes(b"x" * 1000)
        checkpoints.seal(state)
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step00000001", "step00000003"]


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """The run command on two ranks; its test split has 7 images."""
    folder = tmp_path_factory.mktemp("ranks")
    text = EXPERIMENT.replace("test: 6", "test: 7").replace("micro_batch_size: 8", "micro_batch_size: 2")
    text = text.replace("batch_size: 16", "batch_size: 12").replace("variants:\n  opt: {}\n  opt_dedup", "#")
    (folder / "small.yaml").write_text(text.replace("predict: {", "predict: {batch_size: 2, "))
    return folder, harness(folder, "run", "small.yaml", "--nproc", "2", "--set", "train.zero_stage=3")


@pytest.mark.slow
def test_the_run_command_on_two_ranks(shared_run):
    folder, done = shared_run
    (file,) = (folder / "runs" / "small").glob("*/run.json")
    record = json.loads(file.read_text())
    assert record["status"] == "FINISHED"
    assert record["made"]["train"]["ranks"] == 2
    assert done.stderr.count(": train\n") == 1  # rank 0 alone speaks
    captions = (folder / "runs" / record["artifacts"]["predictions/test_before.csv"]).read_text()
    ids = [line.partition(",")[0] for line in captions.splitlines()[1:]]
    assert len(ids) == len(set(ids)) == 7
    assert not list((folder / "runs" / "steps").rglob("partial-*.jsonl"))
    maps = np.load(folder / "runs" / record["steps"]["predict-valid"] / "attention.npy")
    assert (maps.max((1, 2)) == 255).all(), "both ranks have told where the model looks"
    assert (file.parent / "report.html").exists()


@pytest.mark.slow
def test_one_rank_captions_as_two_did(shared_run):
    folder, _ = shared_run
    (file,) = (folder / "runs" / "small").glob("*/run.json")
    record = json.loads(file.read_text())
    step = folder / "runs" / record["steps"]["predict-test"]
    before = (step / "predictions.csv").read_bytes()
    (step / "DONE").unlink()
    (step / "predictions.csv").unlink()
    # what a rank that was killed left behind: two captions, and a line cut in two
    rows = before.decode().splitlines()[1:3]
    split = [row.split(",", 1) for row in rows if '"' not in row]
    pairs = [(key, [["beam1", -1.0, text]]) for key, text in split]
    kept = "".join(json.dumps([*pair, fingerprint(pair)]) + "\n" for pair in pairs)
    (step / "partial-1.jsonl").write_bytes(f'{kept}["phantom_te'.encode() + "é".encode()[:1])
    harness(folder, "run", "small.yaml", "--set", "train.zero_stage=2")
    assert (step / "predictions.csv").read_bytes() == before


def test_ranks_that_can_not_share_the_batch_are_not_started(tmp_path):
    (tmp_path / "small.yaml").write_text(EXPERIMENT)
    done = harness(tmp_path, "run", "small.yaml", "--nproc", "3", code=2)
    assert "train.batch_size: got 16, which 3 devices with micro batches of 8 cannot share" in done.stderr
    assert done.stderr.rstrip().endswith("1 problem; nothing was run.")
    assert not (tmp_path / "runs").exists()


def test_ranks_share_any_batch_where_nothing_is_trained():
    assert indivisible(TrainConfig(batch_size=16, micro_batch_size=8), 3)
    assert indivisible(TrainConfig(batch_size=16, micro_batch_size=8, stages=()), 3) is None


@pytest.mark.slow
@pytest.mark.parametrize("how", [pytest.param(signal.SIGINT, marks=pytest.mark.ci), signal.SIGKILL])
def test_a_launcher_that_ends_has_all_ranks_save_and_end(tmp_path, how):
    """SIGKILL is what the system sends when memory is short: the ranks hear of it all the same."""
    text = EXPERIMENT.replace("- {epochs: 2,", "- {epochs: 2000,").replace("opt_dedup", "#")
    (tmp_path / "long.yaml").write_text(text)
    command = [sys.executable, "-m", "harness", "run", "long.yaml", "--nproc", "2"]
    command += ["--set", "train.evaluate_every=0", "--set", "train.batch_size=4"]
    command += ["--set", "train.micro_batch_size=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    losses = tmp_path / "runs" / "steps"
    begun = time.time()
    while not list(losses.glob("train-*/losses.jsonl")) and time.time() - begun < 120:
        time.sleep(0.2)
    ranks = psutil.Process(running.pid).children()
    running.send_signal(how)
    assert running.wait(60) == (130 if how == signal.SIGINT else -how)
    assert psutil.wait_procs(ranks, 60)[1] == []
    (file,) = (tmp_path / "runs" / "small").glob("*/run.json")
    assert json.loads(file.read_text())["status"] == "KILLED"
    directory = next(losses.glob("train-*/losses.jsonl")).parent
    done = rows(directory)[-1]["step"]
    assert Checkpoints(directory, keep=2).newest().step == done  # and not of the last whole epoch


@pytest.mark.slow
@pytest.mark.parametrize(
    "hosts", [["localhost slots=2"], ["localhost slots=1", f"{socket.gethostname()} slots=1"]]
)
def test_hosts_of_a_file_train_together(tmp_path, hosts):
    """DeepSpeed's launcher over ssh; two names of this machine are two hosts to it."""
    for host in hosts:
        command = ["ssh", "-o", "BatchMode=yes", host.split()[0], "true"]
        if shutil.which("ssh") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("needs ssh to this machine without a password")
    if len(hosts) > 1 and shutil.which("pdsh") is None:
        pytest.skip("needs pdsh")
    (tmp_path / "hosts").write_text("\n".join(hosts) + "\n")
    (tmp_path / "small.yaml").write_text(EXPERIMENT.replace("variants:\n  opt: {}\n  opt_dedup", "#"))
    harness(tmp_path, "run", "small.yaml", "--hostfile", "hosts", "--set", "train.zero_stage=2")
    (file,) = (tmp_path / "runs" / "small").glob("*/run.json")
    record = json.loads(file.read_text())
    assert (record["status"], record["made"]["train"]["ranks"]) == ("FINISHED", 2)


@pytest.mark.slow
def test_a_rank_that_fails_alone_is_heard(tmp_path, monkeypatch):
    """Rank 1 may write no large file, so its part of the checkpoint fails, and nobody else's."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, resource\n"
        "if os.environ.get('RANK') == '1':\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "small.yaml").write_text(EXPERIMENT.replace("variants:\n  opt: {}\n  opt_dedup", "#"))
    done = harness(tmp_path, "run", "small.yaml", "--nproc", "2", "--set", "train.zero_stage=1", code=1)
    assert "error: " in done.stderr
    assert "the checkpoint after step 3 could not be written" in done.stderr
    assert "Traceback" not in done.stderr
    (file,) = (tmp_path / "runs" / "small").glob("*/run.json")
    record = json.loads(file.read_text())
    assert (record["status"], record["failure"]["step"]) == ("FAILED", "train")
    assert "another rank failed" in record["failure"]["reason"]
    assert "the checkpoint after step 3 could not be written" in record["failure"]["reason"]


def test_srun_is_understood():
    environment = {
        "SLURM_STEP_NUM_TASKS": "16",
        "SLURM_PROCID": "9",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NODELIST": "node[03-04]",
        "SLURM_JOB_ID": "71",
        "SLURM_STEP_ID": "3",
        "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",  # of the login node where srun was called
        "SLURM_CPUS_PER_TASK": "8",
    }
    launch.adopt_slurm(environment)
    assert environment["RANK"] == "9"
    assert environment["WORLD_SIZE"] == "16"
    assert environment["LOCAL_RANK"] == "1"
    assert environment["MASTER_ADDR"] == "node03"
    assert environment["MASTER_PORT"] == "20374"
    assert environment["OMP_NUM_THREADS"] == "8"


@pytest.mark.parametrize(
    "alone",
    [
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},  # what sbatch says to its script
    ],
)
def test_a_process_alone_in_its_slurm_step_is_no_rank(alone):
    launch.adopt_slurm(alone)
    assert "RANK" not in alone


def in_slurm(*command: str) -> list[str]:
    """The command as a step of SLURM, which has to run here."""
    srun = ["srun", "--immediate=20", "--overcommit", "-n", "2", "--kill-on-bad-exit=1"]
    if shutil.which("srun") is None or subprocess.run([*srun, "true"], capture_output=True).returncode:
        pytest.skip("needs a SLURM that has this machine as its node")
    return [*srun, *command]


@pytest.mark.slow
def test_tasks_of_slurm_train_together(tmp_path):
    (tmp_path / "small.yaml").write_text(EXPERIMENT.replace("variants:\n  opt: {}\n  opt_dedup", "#"))
    command = in_slurm(sys.executable, "-m", "harness", "run", "small.yaml")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    (file,) = (tmp_path / "runs" / "small").glob("*/run.json")
    record = json.loads(file.read_text())
    assert (record["status"], record["made"]["train"]["ranks"]) == ("FINISHED", 2)
    assert done.stderr.count(": train\n") == 1


@pytest.mark.slow
def test_a_script_of_sbatch_is_one_process_that_starts_its_ranks(tmp_path):
    in_slurm()
    (tmp_path / "small.yaml").write_text(EXPERIMENT.replace("variants:\n  opt: {}\n  opt_dedup", "#"))
    (tmp_path / "job.sh").write_text(
        f"#!/bin/sh\n#SBATCH --ntasks=2\n{sys.executable} -m harness run small.yaml --nproc 2\n"
    )
    command = ["sbatch", "--wait", "--output=job.log", "job.sh"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (tmp_path / "job.log").read_text()
    (file,) = (tmp_path / "runs" / "small").glob("*/run.json")
    assert json.loads(file.read_text())["made"]["train"]["ranks"] == 2


@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_whose_others_do_not_come_says_so_in_minutes(number):
    """Whether rank 0 or another is missing; what is sent while training may wait for days."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    code = (
        "from datetime import timedelta\nfrom harness.machine import ranks\n"
        "from harness.errors import UserError\n"
        "ranks._SEARCH = timedelta(seconds=2)\n"
        "try: ranks.start()\nexcept UserError as error: print(error)\n"
    )
    told = {"RANK": str(number), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    done = python(code, env=told)
    assert f"error: not all of the 2 ranks reached rank 0 at localhost:{port} within" in done.stdout
    if number == 0:
        with socket.socket() as taken:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the last one may linger there
            taken.bind(("", port))
            taken.listen()
            done = python(code, env=told)
        assert f"error: the ranks can't meet at localhost:{port}: The server socket has failed" in done.stdout


def test_other_hosts_hear_where_weights_are_and_no_token(tmp_path, monkeypatch):
    """As DeepSpeed's launcher reads and exports it, in a shell."""
    from deepspeed.launcher.multinode_runner import PDSHRunner

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".deepspeed_env").write_text("\nNCCL_SOCKET_IFNAME=ib0")
    given = {"HF_HOME": "/disk/our models", "HF_TOKEN": "secret", "LANG": "C", "HCCL_IF_IP": "10.0.0.1"}
    given |= {"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True", "GLOO_SOCKET_IFNAME": "eth1"}
    runner = PDSHRunner(argparse.Namespace(user_args=[], user_script="", launcher_args=""), "")
    for line in launch._carried(given | {"HF_ODD": "$HOME", "TORCH_CUDA_ARCH_LIST": "8.0;9.0"}):
        runner.add_export(*line.split("=", maxsplit=1))
    script = "".join(f"export {name}={value}; " for name, value in runner.exports.items())
    done = subprocess.run(["env", "-i", "sh", "-c", f"{script}env"], capture_output=True, text=True)
    told = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert {name: value for name, value in told.items() if name not in ("PWD", "SHLVL", "_")} == {
        "HF_HOME": "/disk/our models",
        "HCCL_IF_IP": "10.0.0.1",
        "TORCH_CUDA_ARCH_LIST": "8.0;9.0",
        "NCCL_SOCKET_IFNAME": "ib0",
        "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",
        "GLOO_SOCKET_IFNAME": "eth1",
    }


@pytest.mark.slow
def test_what_stops_all_ranks_is_said_once(tmp_path):
    """Where no launcher takes their errors, as under srun."""
    (tmp_path / "small.yaml").write_text(EXPERIMENT)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    told = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "harness", "run", "small.yaml", "--set", "train.learning_rate=1e30"]
    running = []
    for number in ("0", "1"):
        environment = os.environ | told | {"RANK": number, "LOCAL_RANK": number}
        rank = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
        running.append(rank)
    said = [rank.communicate(timeout=200)[1] for rank in running]
    assert [rank.returncode for rank in running] == [1, 1]
    assert "error: caption_loss became nan" in said[0]
    assert "error" not in said[1]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.ci)])
@pytest.mark.slow
def test_no_process_group_is_left_to_the_interpreter(tmp_path, processes):
    """A single process trains in a group of its own. Ranks end by `os._exit`, without exit handlers."""
    (tmp_path / "command.py").write_text(
        "import atexit, os\n"
        "from harness import cli\n"
        "from harness.machine import device\n"
        "def command(**_):\n"
        "    device.probe('cpu')\n"
        "    from harness.training.engine import _import_deepspeed\n"
        "    _import_deepspeed('cpu')\n"
        "    say('began')\n"
        "    return 0\n"
        "def say(word):\n"
        "    import torch\n"
        "    os.write(1, f'{word} {torch.distributed.is_initialized()}\\n'.encode())  # not in parts\n"
        "leave = os._exit\n"
        "os._exit = lambda code: (say('ended'), leave(code))\n"
        "atexit.register(say, 'ended')\n"
        "cli.app = command\n"
        "cli.main()\n"
    )
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), "command.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"capture_output": True, "text": True, "timeout": 200}
    done = subprocess.run(command, cwd=tmp_path, env=environment, **pipes)
    assert done.returncode == 0, done.stderr
    said = sorted(line for line in done.stdout.splitlines() if line.startswith(("began", "ended")))
    assert said == ["began True"] * processes + ["ended False"] * processes


@pytest.mark.slow
def test_a_rank_that_a_signal_ended_is_told(tmp_path):
    """As when memory is short: rank 0, which speaks for all, can't say it."""
    text = EXPERIMENT.replace("- {epochs: 2,", "- {epochs: 2000,").replace("opt_dedup", "#")
    (tmp_path / "long.yaml").write_text(text)
    command = [sys.executable, "-m", "harness", "run", "long.yaml", "--nproc", "2"]
    command += ["--set", "train.evaluate_every=0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    begun = time.time()
    while not list(tmp_path.glob("runs/steps/train-*/losses.jsonl")) and time.time() - begun < 120:
        time.sleep(0.2)
    first = min(psutil.Process(running.pid).children(), key=lambda child: int(child.environ()["RANK"]))
    first.kill()
    said = running.communicate(timeout=100)[1]
    assert running.returncode == 1
    assert "error: rank 0 was ended by SIGKILL\n" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu1", "gpu1"), ("gpu1,gpu2", "gpu1"), ("n[3-5,9],x", "n3"), ("a-[007]-b,c", "a-007-b")],
)
def test_the_first_host_of_a_slurm_list(nodes, first):
    assert launch._first_host(nodes) == first
