"""Files that are not weights, or the wrong weights: one reason, no traceback, no memory used."""

import functools
import io
import json
import os
import pickle
import resource
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness import metrics
from harness.config.schema import Config
from harness.errors import UserError
from harness.metrics import alignscore, bertscore
from harness.metrics.settings import ScoreConfig
from harness.models import checkpoints
from harness.models.outline import Flawed, check_weights, read_pickle
from harness.steps.plan import problems

TENSOR = torch.arange(6.0)


class Evil:
    """Would write a file if it were unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def packed(content: bytes) -> bytes:
    """The zip of `torch.save`, deflated."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as plain, zipfile.ZipFile(buffer, "w") as deflated:
        for part in plain.infolist():
            deflated.writestr(part.filename, plain.read(part), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


@functools.cache
def bomb(size: int) -> bytes:
    """A zip of a few hundred KB whose outline has `size` bytes."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as parts,
        parts.open("archive/data.pkl", "w", force_zip64=True) as outline,
    ):
        for _ in range(size // 2**20):
            outline.write(bytes(2**20))
    return buffer.getvalue()


def other_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as parts:
        parts.writestr("readme.txt", "hello")
    return buffer.getvalue()


def outlined(outline: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as parts:
        parts.writestr("archive/data.pkl", outline)
    return buffer.getvalue()


KINDS: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "text": lambda: b"<html>not found</html>",
    "other zip": other_zip,
    "plain pickle": lambda: pickle.dumps({"a": 1}),
    "cut": lambda: saved({"a": TENSOR})[:-40],
    "tensor": lambda: saved(TENSOR),
    "list": lambda: saved([TENSOR]),
    "number": lambda: saved(3),
    "empty": lambda: saved({}),
    "lightning": lambda: saved({"state_dict": {"a": TENSOR}, "epoch": 3}),
    "settings of another kind": lambda: saved({"state_dict": 3, "hyper_parameters": [1]}),
    "name that is none": lambda: saved(
        {"state_dict": {"tri_layer.weight": TENSOR}, "hyper_parameters": {"model": {"a": 1}}}
    ),
    "deflated": lambda: packed(saved({"a": TENSOR})),
    "bomb": lambda: bomb(2**30),
    "no pickle": lambda: outlined(b"hello"),
    "empty outline": lambda: outlined(b""),
    "memo of 2**31": lambda: outlined(b"\x80\x02K\x01r\xff\xff\xff\x7f."),
    "length of 2**62": lambda: outlined(b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"."),
    "stack of nothing": lambda: outlined(b"\x80\x02\x85."),
}


@pytest.mark.ci
@pytest.mark.parametrize("kind", KINDS)
def test_no_kind_of_file_is_taken_for_weights_or_for_alignscore(kind, tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    file = tmp_path / "AlignScore-base.ckpt"
    file.write_bytes(KINDS[kind]())
    made = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Flawed):
        check_weights(file)
    config = ScoreConfig.model_validate({"metrics": ["alignscore"], "alignscore": {"checkpoint": str(file)}})
    found = alignscore.problems(config.alignscore)
    assert found[0].what.startswith(f"not a checkpoint of AlignScore: {file} ")
    scores, _ = metrics.score(["a"], ["a"], None, config, 2025)
    assert "not a checkpoint of AlignScore" in scores["alignscore"].reason
    assert "\n" not in scores["alignscore"].reason
    metrics.identities_of(config, tmp_path)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - max(before, made)
    assert grown < 300_000, "KB"


def test_a_folder_is_no_checkpoint_of_alignscore(tmp_path):
    config = ScoreConfig.model_validate({"alignscore": {"checkpoint": str(tmp_path)}})
    (problem,) = alignscore.problems(config.alignscore)
    assert problem.what == f"a folder, not a file: {tmp_path}"


def test_code_in_a_pickle_is_not_run(tmp_path):
    mark = tmp_path / "executed"
    (tmp_path / "pytorch_model.bin").write_bytes(saved({"a": TENSOR, "b": Evil(mark)}))
    read_pickle(tmp_path / "pytorch_model.bin")
    check_weights(tmp_path / "pytorch_model.bin")
    assert not mark.exists()


def test_code_in_a_checkpoint_of_deepspeed_is_not_run(tmp_path):
    """DeepSpeed loads its own with `weights_only=False`."""
    from harness.training import engine

    file, mark = tmp_path / "mp_rank_00_model_states.pt", tmp_path / "executed"
    file.write_bytes(saved({"module": {"a": TENSOR}, "b": Evil(mark)}))
    with pytest.raises(UserError, match="more than weights") as raised, engine.weights_only():
        torch.load(file, weights_only=False)
    assert raised.value.exit_code == 1
    assert not mark.exists()
    assert engine._FORCE not in os.environ
    file.write_bytes(saved({"module": {"a": TENSOR}}))
    with engine.weights_only():
        assert torch.load(file, weights_only=False)["module"]["a"].equal(TENSOR)


def test_whole_weights_have_no_flaw(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(saved(torch.nn.Linear(2, 3).state_dict()))
    torch.save({"a": TENSOR}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    save_file({"a": TENSOR}, tmp_path / "model.safetensors")
    for name in ("pytorch_model.bin", "old.bin", "model.safetensors"):
        check_weights(tmp_path / name)


# --- Model folders ---------------------------------------------------------------------------------------


@pytest.fixture
def encoder(tmp_path) -> Path:
    source = bertscore.locate(ScoreConfig.model_validate({"bertscore": {"checkpoint": "standin"}}).bertscore)
    folder = tmp_path / "encoder"
    shutil.copytree(source[0].folder, folder)
    return folder


def reason(folder: Path) -> str:
    """Why there is no BERTScore by a folder; what is found before scoring says the same."""
    values = {"bertscore": {"checkpoint": str(folder), "layer": 6}, "metrics": ["bertscore"]}
    scores, _ = metrics.score(["a nodule"], ["a mass"], None, ScoreConfig.model_validate(values), 2023)
    assert scores["bertscore"].value is None
    assert "\n" not in scores["bertscore"].reason
    assert str(folder) in scores["bertscore"].reason
    return scores["bertscore"].reason


def lying(end: int, name: str = "a") -> bytes:
    header = json.dumps({name: {"dtype": "F32", "shape": [end // 4], "data_offsets": [0, end]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(24)


@pytest.mark.parametrize(
    "content",
    [b"", struct.pack("<Q", 2**63), b"\xff" * 64, lying(24)[:-8], lying(2**40), struct.pack("<Q", 2) + b"[]"],
    ids=["empty", "header of 2**63", "bytes", "cut", "names 1 TB", "list"],
)
def test_safetensors_that_lie(content, encoder):
    (encoder / "model.safetensors").write_bytes(content)
    assert "model.safetensors" in reason(encoder)


@pytest.mark.parametrize("kind", ["tensor", "list", "lightning", "cut", "bomb", "text"])
def test_a_bin_of_another_kind(kind, encoder):
    (encoder / "model.safetensors").unlink()
    (encoder / "pytorch_model.bin").write_bytes(KINDS[kind]())
    assert "pytorch_model.bin" in reason(encoder)


def test_a_bin_with_code_is_refused_and_not_run(encoder, tmp_path):
    weights = load_file(encoder / "model.safetensors")
    (encoder / "model.safetensors").unlink()
    (encoder / "pytorch_model.bin").write_bytes(saved(weights | {"b": Evil(tmp_path / "executed")}))
    reason(encoder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", ["[]", "3", "{", "", '{"model_type": "no_such_model"}', "[" * 10**5])
def test_a_config_that_is_no_mapping(content, encoder):
    (encoder / "config.json").write_text(content)
    reason(encoder)


def test_a_folder_without_a_tokenizer(encoder):
    for file in [*encoder.glob("tokenizer*"), *encoder.glob("vocab*"), *encoder.glob("special*")]:
        file.unlink()
    assert "tokenizer" in reason(encoder)


def test_weights_that_are_lacking_are_not_drawn_at_random(encoder):
    weights = load_file(encoder / "model.safetensors")
    gone = next(name for name in weights if "layer.3.attention.self.query.weight" in name)
    save_file(
        {n: w for n, w in weights.items() if n != gone}, encoder / "model.safetensors", {"format": "pt"}
    )
    assert "lacks 1 weights" in reason(encoder)


def test_a_standin_mark_that_cannot_be_read_is_still_a_mark(encoder):
    for content in ("", "[]", '{"name": 3}', "{"):
        (encoder / checkpoints.STANDIN_FILE).write_text(content)
        assert checkpoints.find(encoder).standin


@pytest.mark.parametrize("index", ["[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_an_index_that_is_none(index, encoder):
    (encoder / "model.safetensors").rename(encoder / "model-00001-of-00001.safetensors")
    (encoder / "model.safetensors.index.json").write_text(index)
    reason(encoder)


@pytest.mark.parametrize("key", ["checkpoint", "text_checkpoint"])
def test_the_captioners_weights_are_looked_at_before_anything_starts(key, encoder, tmp_path):
    (encoder / "model.safetensors").write_bytes(lying(2**40))
    model = {"checkpoint": str(encoder), key: str(encoder)}
    values = {"name": "x", "data": {"root": tmp_path}, "model": model}
    values["score"] = {"metrics": ["rouge1"], "bertscore": {"checkpoint": "standin"}}
    assert f"model.{key}" in [problem.key for problem in problems(Config.model_validate(values))]


class ByGetattr:
    """What Python 3.11.0 to 3.11.3 pickle in place of a member of an enum."""

    def __init__(self, owner: object, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


def test_a_checkpoint_by_an_older_python_names_the_zero_stage_by_getattr(tmp_path):
    from deepspeed.runtime.zero.config import ZeroStageEnum

    from harness.training import engine

    file = tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"zero_stage": ByGetattr(ZeroStageEnum, "gradients"), "a": TENSOR}, file)
    with engine.weights_only():
        found = torch.load(file, weights_only=False)
    assert found["zero_stage"] is ZeroStageEnum.gradients
    assert found["a"].equal(TENSOR)


@pytest.mark.parametrize("name", ["mro", "__subclasses__", "__init__"])
def test_no_other_getattr_is_called_by_a_checkpoint(tmp_path, name):
    from deepspeed.runtime.zero.config import ZeroStageEnum

    from harness.training import engine

    file = tmp_path / "states.pt"
    torch.save({"zero_stage": ByGetattr(ZeroStageEnum, name)}, file)
    with pytest.raises(UserError, match=f"more than weights: getattr of .*{name}"), engine.weights_only():
        torch.load(file, weights_only=False)
