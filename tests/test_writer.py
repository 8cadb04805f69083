"""Checkpoints that are written while training goes on: their contents, their order, kills and errors."""

import threading
import time

import pytest
import torch
from safetensors.torch import load_file
from support.models import load_tiny
from support.ranks import TRAIN, rows, train
from support.slow_saves import SlowSave
from support.training import config, run, splits

from harness.errors import UserError
from harness.machine import device
from harness.training import engine as engines
from harness.training import writer as writers
from harness.training.resume import LATEST, Checkpoints
from harness.training.writer import Writer, snapshot

device.probe("cpu")


@pytest.fixture(scope="module")
def folder(tiny_folder):
    return tiny_folder


def assert_equal(one, two):
    """Equal values of equal types, tensors to the bit."""
    assert type(one) is type(two)
    if isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype
        assert torch.equal(one, two)
    elif isinstance(one, dict):
        assert list(one) == list(two)
        for key, value in one.items():
            assert_equal(value, two[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(two)
        for first, second in zip(one, two, strict=True):
            assert_equal(first, second)
    elif hasattr(one, "__dict__"):
        assert_equal(vars(one), vars(two))
    else:
        assert one == two


@pytest.mark.parametrize(
    "changes",
    [
        {"zero_stage": 0},
        {"zero_stage": 1, "precision": "fp16"},
        {"zero_stage": 2, "offload": True},
        {"zero_stage": 3},
    ],
)
def test_a_file_holds_what_deepspeed_would_have_written_when_the_save_began(folder, tmp_path, changes):
    settings, loaded = config(micro_batch_size=8, **changes), load_tiny(folder)
    engines.place(loaded.model, settings, "cpu")
    loaded.model.freeze(["caption"])
    trainer = engines.engine(loaded.model, settings, "cpu", tmp_path)
    split = splits(loaded)["train"]
    captions = loaded.caption.collate(split.captions[:8])
    images = loaded.normalise(torch.from_numpy(split.pixels[:8]))

    def step():
        trainer.backward(trainer(images, captions).caption / 50)
        trainer.step()

    step()
    trainer.save_checkpoint(tmp_path, tag="plain", exclude_frozen_parameters=True)
    writer, go = Writer(), threading.Event()
    writer._thread.submit(go.wait)
    engines.save(trainer, tmp_path / "later", writer.write)
    step()
    go.set()
    writer.wait()
    engines.release(trainer)
    found = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert sorted(path.name for path in (tmp_path / "later").iterdir()) == found
    assert found
    for name in found:
        one, two = (torch.load(tmp_path / kind / name, weights_only=False) for kind in ("plain", "later"))
        assert_equal(one, two)
        sizes = [(tmp_path / kind / name).stat().st_size for kind in ("plain", "later")]
        assert sizes[1] < 1.1 * sizes[0]


def test_tied_weights_stay_tied_and_no_copy_is_what_it_was():
    weight = torch.ones(1000)
    state = {"one": weight, "two": weight.detach(), "numbers": [1, (weight[:2],)]}
    copied = snapshot(state)
    weight += 1
    state["numbers"].append(2)
    assert copied["one"].data_ptr() == copied["two"].data_ptr()
    assert copied["one"].sum() == 1000
    assert copied["numbers"][1][0].tolist() == [1, 1]
    assert len(copied["numbers"]) == 2


def test_it_is_sealed_after_the_files_of_all_ranks(tmp_path):
    writer, sealed = Writer(), []
    own, other = tmp_path / "own", tmp_path / "other"
    writer.write(lambda state, file: file.write_bytes(state), b"x", own)
    writer.seal([own, other], lambda: sealed.append(other.read_bytes()))
    writer.wait()
    time.sleep(4 * writers._LOOK)
    assert not sealed
    other.write_bytes(b"y")
    writer.wait_for_seal()
    assert sealed == [b"y"]


def test_a_file_of_a_rank_that_is_gone_is_not_waited_for_after_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "_PATIENCE", 0.1)
    writer, sealed = Writer(), []
    writer.seal([tmp_path / "other"], lambda: sealed.append(1))
    writer.leave()
    writer._thread.shutdown(wait=True)  # the thread has ended
    (tmp_path / "other").touch()
    assert not sealed


def test_without_memory_for_a_copy_it_is_written_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "ram", lambda: 1e6)
    writer, threads = Writer(), []
    writer.write(lambda *_: threads.append(threading.current_thread()) or _[1].touch(), {}, tmp_path / "a")
    assert threads == [threading.main_thread()]


@pytest.mark.ci
def test_training_goes_on_while_it_is_written_and_one_write_waits_for_the_other(
    folder, tmp_path, monkeypatch
):
    slow = SlowSave(0.5)
    monkeypatch.setattr(torch, "save", slow)
    settings, seen = config(checkpoint_every_steps=1), []

    def log(row):
        latest = tmp_path / "run" / "checkpoints" / LATEST
        named = int(latest.read_text().removeprefix("step")) if latest.exists() else 0
        assert named == Checkpoints(tmp_path / "run", 2).newest().step
        seen.append((row["step"], "valid_loss" in row, len(slow.running), named))

    run(folder, tmp_path / "run", settings, log=log)
    assert max(running for *_, running, _ in seen) == 1
    steps = [row for row in seen if not row[1]]
    assert [running for *_, running, _ in steps if steps] == [0, 1, 1] * 3  # none after a validation
    assert [named for *_, named in steps] == [0, 0, 1, 3, 3, 4, 6, 6, 7]
    assert [named for step, valid, _, named in seen if valid] == [3, 6, 9]


@pytest.mark.ci
def test_an_error_of_the_thread_ends_the_run_and_keeps_the_checkpoint_before(folder, tmp_path, monkeypatch):
    _, whole = run(folder, tmp_path / "whole", config(evaluate_every=0))
    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", SlowSave(0.1, fail_at=2))
        what = r"the checkpoint after step 6 could not be written; .* are free"
        with pytest.raises(UserError, match=what) as caught:
            run(folder, tmp_path / "run", config(evaluate_every=0))
    assert "the same command continues. ([Errno 28] No space left" in str(caught.value)
    assert caught.value.exit_code == 1
    assert Checkpoints(tmp_path / "run", 2).newest().step == 3
    assert not list(tmp_path.glob("run/checkpoints/step*/.*"))
    _, again = run(folder, tmp_path / "run", config(evaluate_every=0))
    assert [row.get("loss") for row in again] == [row.get("loss") for row in whole]


def test_an_error_elsewhere_waits_for_the_checkpoint(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", SlowSave(0.5))

    def stop(row):
        if row["step"] == 3 and "loss" in row:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "run", config(checkpoint_every_steps=2), log=stop)
    assert Checkpoints(tmp_path / "run", 2).newest().step == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "zero_stage", "at", "sealed"),
    [
        (1, 0, 3, 0),
        (1, 0, 5, 3),
        (1, 0, 9, 6),
        (2, 2, 5, 3),
        (2, 3, 9, 6),
    ],
)
def test_killed_while_it_is_written_goes_on_to_the_same_bits(
    folder, tmp_path, processes, zero_stage, at, sealed
):
    """SIGKILL with half a checkpoint on the disk, of step 2, 4 or 8; the epochs have 3 steps."""
    how = {"train": TRAIN | {"zero_stage": zero_stage, "checkpoint_every_steps": 2}, "dropout": 0.1}
    train(folder, tmp_path / "whole", processes, **how)
    assert train(folder, tmp_path / "parts", processes, check=False, **how, kill_at=at, slow=1.0) != 0
    assert rows(tmp_path / "parts")[-1]["step"] == at
    assert list(tmp_path.glob(f"parts/checkpoints/step{at - 1:08d}/.*.tmp"))
    assert Checkpoints(tmp_path / "parts", 2).newest().step == sealed
    train(folder, tmp_path / "parts", processes, **how)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    whole, parts = (load_file(tmp_path / name / "final.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
