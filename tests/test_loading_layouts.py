"""Published checkpoints: names and shapes at full size, and the formats in which they are stored."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForPreTraining,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
)

from harness.errors import UserError
from harness.models import checkpoints
from harness.models.blip2 import loading
from harness.models.blip2.model import Captioner
from harness.models.blip2.sizes import OPT_2_7B
from harness.models.settings import ModelConfig


@pytest.fixture(scope="module")
def folder(tiny_folder) -> Path:
    return tiny_folder


def published_layouts(folder: Path, root: Path) -> tuple[Path, Path, Path]:
    """Small checkpoints with the parameters of blip2-opt-2.7b, blip2-itm-vit-g and bert-base-uncased."""
    config = Blip2Config.from_pretrained(folder)
    config.qformer_config.use_qformer_text_input = False
    captioning = Blip2ForConditionalGeneration(config)
    config = Blip2Config.from_pretrained(folder)
    config.image_text_hidden_size = 16
    matching = Blip2ForImageTextRetrieval(config)
    words = config.qformer_config
    bert = BertForPreTraining(
        BertConfig(
            vocab_size=words.vocab_size - 1,
            hidden_size=words.hidden_size,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=32,
        )
    )
    folders = tuple(root / name for name in ("captioning", "matching", "bert"))
    for model, target in zip((captioning, matching, bert), folders, strict=True):
        model.save_pretrained(target)
    for file in folder.glob("*token*.json"):
        (folders[0] / file.name).write_bytes(file.read_bytes())
    for file in (folder / loading.QFORMER_TOKENIZER).iterdir():
        (folders[1] / file.name).write_bytes(file.read_bytes())
    return folders


@pytest.fixture
def published(folder, tmp_path) -> dict[str, Path]:
    """Small folders with the parameters of the three published checkpoints."""
    return dict(zip(("captioning", "matching", "bert"), published_layouts(folder, tmp_path), strict=True))


def load(published: dict[str, Path]) -> loading.Loaded:
    config = ModelConfig(
        checkpoint=str(published["captioning"]),
        text_checkpoint=str(published["matching"]),
        text_head_checkpoint=str(published["bert"]),
        image_size=64,
    )
    return loading.load(config, published["captioning"], 32)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def store(folder: Path, found: dict[str, torch.Tensor]) -> None:
    save_file(found, folder / "model.safetensors", {"format": "pt"})


# at full size

TIED = {
    *("cls.predictions.decoder.weight", "cls.predictions.decoder.bias", "language_model.lm_head.weight"),
}
"""Weights that no checkpoint needs to have, because they are others."""


def shapes(kind: type, config: object) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(weight.shape) for name, weight in kind(config).state_dict().items()}


@pytest.fixture(scope="module")
def real() -> dict[str, dict[str, tuple[int, ...]]]:
    """Names and shapes of blip2-opt-2.7b-coco, blip2-itm-vit-g and bert-base-uncased, by their configs."""
    words = {"model_type": "opt", **OPT_2_7B}
    coco = Blip2Config(text_config=words, vision_config={"image_size": 364})
    matching = Blip2Config(
        text_config=words,
        qformer_config={"vocab_size": 30523, "use_qformer_text_input": True},
        image_text_hidden_size=256,
    )
    return {
        "captioning": shapes(Blip2ForConditionalGeneration, coco),
        "matching": shapes(Blip2ForImageTextRetrieval, matching),
        "bert": shapes(BertForPreTraining, BertConfig()),
    }


@pytest.fixture(scope="module")
def ours() -> dict[str, tuple[int, ...]]:
    words = {"model_type": "opt", **OPT_2_7B}
    config = Blip2Config(
        text_config=words, vision_config={"image_size": 364}, qformer_config={"vocab_size": 30523}
    )
    return {name: shape for name, shape in shapes(Captioner, config).items() if name not in TIED}


def test_the_published_configs_are_of_the_known_sizes(real):
    assert real["captioning"]["vision_model.embeddings.position_embedding"] == (1, 26 * 26 + 1, 1408)
    assert real["captioning"]["query_tokens"] == (1, 32, 768)
    assert real["captioning"]["language_projection.weight"] == (2560, 768)
    assert real["captioning"]["language_model.model.decoder.embed_tokens.weight"] == (50272, 2560)
    assert real["matching"]["embeddings.word_embeddings.weight"] == (30523, 768)
    assert real["bert"]["cls.predictions.bias"] == (30522,)
    blocks = {name.split(".")[3] for name in real["captioning"] if name.startswith("vision_model.encoder.")}
    assert len(blocks) == 39


def test_every_weight_of_ours_has_its_place_and_shape_in_a_published_checkpoint(real, ours):
    sources = {name: next((s for s in real if name in real[s]), None) for name in ours}
    assert not [name for name, source in sources.items() if source is None]
    for name, source in sources.items():
        if name == "cls.predictions.bias":  # [DEC] is one word more than BERT has
            assert ours[name] == (30523,)
        else:
            assert ours[name] == real[source][name], name
    taken = {s: {name for name, source in sources.items() if source == s} for s in real}
    assert {name.split(".")[0] for name in taken["captioning"]} == {
        "vision_model",
        "query_tokens",
        "qformer",
        "language_projection",
        "language_model",
    }
    for name in taken["matching"]:
        text = r"embeddings\.|qformer\.encoder\.layer\.\d+\.(intermediate|output)\."
        assert re.match(text, name), name
    assert {name.rsplit(".", 1)[0] for name in taken["bert"]} == {
        "cls.predictions",
        "cls.predictions.transform.dense",
        "cls.predictions.transform.LayerNorm",
    }


def test_nothing_of_the_captioning_checkpoint_is_left_aside(real, ours):
    assert set(real["captioning"]) - set(ours) <= TIED


# as they may be stored


def test_text_path_and_head_come_from_the_configured_checkpoints(published):
    ours = load(published).model.state_dict()
    sources = [weights(folder) for folder in published.values()]
    for name, weight in ours.items():
        theirs = next(source[name] for source in sources if name in source or _tied(name, source))
        rows = min(len(theirs), len(weight)) if weight.ndim else None
        assert torch.equal(weight[:rows], theirs[:rows]), name


def _tied(name, source):
    aliases = {
        "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
        "language_model.lm_head.weight": "language_model.model.decoder.embed_tokens.weight",
    }
    if name in aliases and aliases[name] in source:
        source[name] = source[aliases[name]]
        return True
    return False


def resaved(folder: Path, kind: type, **how) -> None:
    model = kind.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, **how)


KINDS = {
    "captioning": Blip2ForConditionalGeneration,
    "matching": Blip2ForImageTextRetrieval,
    "bert": BertForPreTraining,
}


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("size", ["20KB", "1GB"])
def test_one_file_or_shards_of_either_kind_load_alike(published, safe, size):
    expected = load(published).model.state_dict()
    for name, folder in published.items():
        resaved(folder, KINDS[name], safe_serialization=safe, max_shard_size=size)
        files = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
        assert (len(files) > 1) == (size == "20KB")
        assert {file.suffix for file in files} == {".safetensors" if safe else ".bin"}
        assert checkpoints.find(folder).folder == folder
    found = load(published).model.state_dict()
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        if not name.startswith(("embeddings.word", "cls.predictions.bias", "cls.predictions.decoder")):
            assert torch.equal(weight, expected[name]), name
        else:  # the row of [DEC] is made of the others
            assert torch.equal(weight[:-1], expected[name][:-1]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_trained_in_fp32(published, dtype):
    for folder in published.values():
        store(folder, {name: weight.to(dtype) for name, weight in weights(folder).items()})
    stored = {
        name: weight for folder in reversed(published.values()) for name, weight in weights(folder).items()
    }
    for name, weight in load(published).model.state_dict().items():
        assert weight.dtype == torch.float32
        if name in stored and weight.shape == stored[name].shape:
            assert torch.equal(weight, stored[name].float()), name


def test_berts_old_names_of_its_norms_are_read(published):
    expected = load(published).model.cls.predictions.transform.LayerNorm.state_dict()
    head = weights(published["bert"])
    for old, new in (("gamma", "weight"), ("beta", "bias")):
        name = "cls.predictions.transform.LayerNorm."
        head[name + old] = head.pop(name + new) + 1
    store(published["bert"], head)
    found = load(published).model.cls.predictions.transform.LayerNorm.state_dict()
    for name in expected:
        assert torch.equal(found[name], expected[name] + 1)


# what is missing


def test_weights_in_no_checkpoint_are_named_and_refused(published):
    first, second = published["captioning"], published["matching"]
    config = ModelConfig(checkpoint=str(first), text_checkpoint=str(second), image_size=64)
    with pytest.raises(UserError, match=r"(?s)cls\.predictions\..*bert-base-uncased"):
        loading.load(config, first, 32)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("captioning", "language_projection.bias"),
        ("captioning", "language_model.model.decoder.layers.0.fc1.weight"),
        ("captioning", "vision_model.encoder.layers.1.mlp.fc2.bias"),
        ("captioning", "qformer.encoder.layer.0.crossattention.attention.key.weight"),
        ("captioning", "query_tokens"),
        ("matching", "embeddings.word_embeddings.weight"),
        ("matching", "qformer.encoder.layer.1.intermediate.dense.weight"),
        ("bert", "cls.predictions.transform.dense.weight"),
        ("bert", "cls.predictions.bias"),
    ],
)
def test_a_weight_that_its_checkpoint_lacks_is_named(published, source, name):
    """Another checkpoint may hold one of that name, which was trained as a part of something else."""
    kept = weights(published[source])
    del kept[name]
    store(published[source], kept)
    with pytest.raises(UserError, match=re.escape(name)):
        load(published)


def test_a_shard_that_was_not_fetched_makes_no_checkpoint(published):
    folder = published["captioning"]
    resaved(folder, KINDS["captioning"], max_shard_size="20KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    (folder / sorted(set(index["weight_map"].values()))[1]).unlink()
    assert checkpoints.find(folder) is None


@pytest.mark.parametrize("source", ["captioning", "matching", "bert"])
def test_weights_of_another_width_are_named(published, source):
    """A checkpoint of another size of the same architecture, as bert-large for bert-base."""
    other = {}
    for name, weight in weights(published[source]).items():
        own = name.startswith(("cls.", "embeddings.", "qformer."))
        other[name] = torch.cat([weight, weight], dim=-1) if own and weight.ndim else weight
    store(published[source], other)
    with pytest.raises(UserError, match="no configured checkpoint has these weights"):
        load(published)


def test_a_head_of_another_vocabulary_is_named(published):
    """Only [DEC] may be missing; with more, as in bert-base-cased, its rows would be other words."""
    head = weights(published["bert"])
    head["cls.predictions.bias"] = head["cls.predictions.bias"][:-20].clone()
    store(published["bert"], head)
    with pytest.raises(UserError, match=r"cls\.predictions\.bias"):
        load(published)


def test_a_second_copy_is_not_needed(published, tmp_path):
    """One folder that holds everything, as the harness saves a tiny model, serves alone."""
    whole = load(published)
    target = tmp_path / "whole"
    whole.model.save_pretrained(target)
    for file in published["captioning"].iterdir():
        if file.name.startswith(("tokenizer", "special")):
            shutil.copy(file, target)
    whole.concept.tokenizer.save_pretrained(target / loading.QFORMER_TOKENIZER)
    again = loading.load(ModelConfig(checkpoint=str(target), image_size=64), target, 32)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name]), name
