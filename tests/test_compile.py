"""Compiled parts of the model: the numbers of eager code, no trace outside training, and going on without."""

import gc
import json
import os

import pytest
import torch
from support.commands import harness
from support.experiments import EXPERIMENT
from support.models import batch, load_tiny, stages
from support.ranks import TRAIN, rows, train
from support.training import Interrupted, alive, config, run

from harness.machine import device
from harness.training.compiling import Compiler, chosen, keep_code_in

device.probe("cpu")


@pytest.fixture(scope="module")
def folder(tiny_folder):
    return tiny_folder


def learn(loaded) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of one batch, and the gradients by name."""
    loaded.model.zero_grad()
    found = loaded.model(*batch(loaded))
    loss = found.caption + found.concept
    loss.backward()
    return loss.item(), {n: p.grad for n, p in loaded.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", ["layers", pytest.param("whole", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_compiled_parts_give_the_losses_and_gradients_of_eager_ones(folder, how, checkpointing):
    """In fp32 a sum of up to 64 terms may be added in another order: 64 roundings of 6e-8.

    Gradients that are 0 but for rounding, those of keys' biases, are small beside the largest one.
    """
    loaded, lines = load_tiny(folder), []
    loaded.model.freeze(["caption", "concept"])
    loaded.model.train()
    if checkpointing:
        loaded.model.gradient_checkpointing_enable({"use_reentrant": False})
    names = list(loaded.model.state_dict())
    loss, gradients = learn(loaded)
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    compiler = Compiler(how, lines.append)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiler.add(loaded.model.parts_to_compile(how))
    assert list(loaded.model.state_dict()) == names
    for _ in range(2):
        again, found = learn(loaded)
        assert again == pytest.approx(loss, rel=4e-6)
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=4e-6 * largest, msg=name)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert (compiler.used, lines) == (how, [])


def test_captions_are_not_computed_by_compiled_parts(folder, monkeypatch):
    """Else they would depend on whether the same process has trained the model."""
    loaded = load_tiny(folder)
    images = batch(loaded)[0]
    loaded.model.eval()
    features = loaded.model.image_features(images)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    Compiler("layers", pytest.fail).add(loaded.model.parts_to_compile("layers"))
    assert torch.equal(loaded.model.image_features(images), features)
    with torch.no_grad():
        loaded.model.train()
        loaded.model(*batch(loaded))


def test_a_compiler_that_fails_is_named_once_and_changes_no_bit(folder, monkeypatch):
    def broken(eager, **_):
        def fail(*args, **options):
            raise RuntimeError("no working compiler\nat line 1\nat line 2")

        return fail

    loaded, lines = load_tiny(folder), []
    loaded.model.train()
    loss, gradients = learn(loaded)
    monkeypatch.setattr(torch, "compile", broken)
    compiler = Compiler("layers", lines.append)
    compiler.add(loaded.model.parts_to_compile("layers"))
    for _ in range(2):
        again, found = learn(loaded)
        assert again == loss
        assert all(torch.equal(found[name], gradients[name]) for name in gradients)
    assert compiler.used == "off"
    assert lines == ["train.compile: layers does not work here, so nothing is compiled (no working compiler)"]


def test_an_error_of_the_model_itself_is_raised(folder, monkeypatch):
    """What fails in eager code too is no failure of the compiler; neither is a lack of memory."""
    loaded = load_tiny(folder)
    loaded.model.train()
    Compiler("layers", lambda line: None).add(parts := loaded.model.parts_to_compile("layers"))
    with pytest.raises(TypeError):
        parts[0](1, 2, 3, 4)

    def full(eager, **_):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(torch, "compile", full)
    Compiler("layers", pytest.fail).add(parts := load_tiny(folder).model.train().parts_to_compile("layers"))
    with pytest.raises(RuntimeError, match="out of memory"):
        parts[0](torch.zeros(1, 4, 32), None)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1])
def test_a_compiled_training_goes_on_to_the_same_bits_and_leaves_nothing(folder, tmp_path, zero_stage):
    """With dropout, and stopped in either stage; the losses are those of eager training but for rounding."""
    plain = {"evaluate_every": 0, "zero_stage": zero_stage}
    settings = config(compile="layers", gradient_checkpointing=True, **plain)
    before = set(map(id, alive()))
    eager = run(folder, tmp_path / "eager", config(**plain), dropout=0.1)[1]
    whole, found = run(folder, tmp_path / "whole", settings, dropout=0.1)
    for at in (2, 8):

        def stop(row, at=at):
            if row["step"] == at:
                raise Interrupted

        with pytest.raises(Interrupted):
            run(folder, tmp_path / "parts", settings, dropout=0.1, log=stop)
    resumed, again = run(folder, tmp_path / "parts", settings, dropout=0.1)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    losses = [[row["loss"] for row in rows if "loss" in row] for rows in (again, found, eager)]
    assert losses[0] == losses[1]
    assert losses[1] == pytest.approx(losses[2], rel=1e-5)
    del whole, resumed
    gc.collect()
    assert [kept for kept in alive() if id(kept) not in before] == []


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_compiled_ranks_train_as_eager_ones(folder, tmp_path, zero_stage):
    how = TRAIN | {"zero_stage": zero_stage, "stages": stages(1, 1)}
    train(folder, tmp_path / "eager", train=how)
    train(folder, tmp_path / "compiled", train=how | {"compile": "layers"})
    files = [rows(tmp_path / name) for name in ("compiled", "eager")]
    found, expected = ([row["loss"] for row in file if "loss" in row] for file in files)
    assert found == pytest.approx(expected, rel=1e-5)
    assert json.loads((tmp_path / "compiled" / "compiled.json").read_text()) == "layers"


@pytest.mark.slow
def test_a_run_without_a_compiler_says_so_in_one_line_and_records_it(tmp_path):
    (tmp_path / "small.yaml").write_text(EXPERIMENT.replace("variants:\n  opt: {}\n  opt_dedup", "#"))
    done = harness(tmp_path, "run", "small.yaml", "--set", "train.compile=layers", env={"CXX": "/bin/false"})
    assert done.stderr.count("train.compile: layers does not work here, so nothing is compiled") == 1
    assert "Traceback" not in done.stderr
    (file,) = (tmp_path / "runs" / "small").glob("*/run.json")
    assert json.loads(file.read_text())["made"]["train"]["compile"] == "off"


def test_compiled_code_is_kept_where_the_user_wants(monkeypatch, tmp_path):
    for wanted, kept in ((None, tmp_path / "code"), ("/elsewhere", "/elsewhere")):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", wanted or "")
        if not wanted:
            monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
        keep_code_in(tmp_path / "code")
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(kept)


def test_auto_compiles_on_cuda_only():
    assert [chosen(config(), kind) for kind in ("cuda", "npu", "cpu")] == ["layers", "off", "off"]
    assert chosen(config(compile="whole"), "cpu") == "whole"
