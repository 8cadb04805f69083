"""Stand-in BLEURT and CLIP: they learn, load like real checkpoints, and never count as official."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from support.versions import beside_4

from harness import metrics
from harness.config.sections import PhantomConfig
from harness.data import phantom
from harness.metrics import bleurt, clipscore
from harness.metrics.settings import ScoreConfig
from harness.models import checkpoints, standins
from harness.models.bleurt import tokenizer_of

Split = tuple[list[Path], list[str]]


def read(root: Path, split: str) -> Split:
    (labels,) = root.glob(f"*caption_prediction_{split}_labels.csv")
    rows = [line.split("\t") for line in labels.read_text(encoding="utf-8").splitlines()[1:]]
    return [root / split / f"{name}.jpg" for name, _ in rows], [caption for _, caption in rows]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[Split, Split]:
    root = tmp_path_factory.mktemp("standins") / "phantom"
    phantom.draw(root, PhantomConfig(train=250, valid=60, test=1))
    return read(root, "train"), read(root, "valid")


def build(data, root: Path, bleurt_steps: int, clip_steps: int) -> dict[str, Path]:
    (images, captions), _ = data
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(standins, "BLEURT_STEPS", bleurt_steps)
        patch.setattr(standins, "CLIP_STEPS", clip_steps)
        standins.build_bleurt(captions, root / "bleurt")
        standins.build_clip(images, captions, root / "clip")
    return {"bleurt": root / "bleurt", "clipscore": root / "clip"}


@pytest.fixture(scope="module")
def folders(data, tmp_path_factory) -> dict[str, Path]:
    """Stand-ins that have learnt next to nothing: enough for what holds of any weights."""
    return build(data, tmp_path_factory.mktemp("begun"), 10, 4)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> dict[str, Path]:
    return build(data, tmp_path_factory.mktemp("trained"), standins.BLEURT_STEPS, 45)


@pytest.fixture(scope="module")
def scorer(folders) -> bleurt.Scorer:
    return bleurt.load(folders["bleurt"], "cpu")


@pytest.mark.slow
def test_bleurt_ranks_same_above_damaged_above_other(data, trained):
    scorer = bleurt.load(trained["bleurt"], "cpu")
    captions = data[1][1]
    draw = random.Random(0)
    damaged = [" ".join(word for word in c.split() if draw.random() > 0.3) for c in captions]
    other = captions[1:] + captions[:1]
    same, worse, worst = (
        np.mean(scorer.scores(list(zip(captions, given, strict=True))))
        for given in (captions, damaged, other)
    )
    assert same > worse + 0.1
    assert worse > worst + 0.1


@pytest.mark.ci
@beside_4
def test_bleurt_equals_bleurt_pytorch_one_pair_at_a_time(data, folders):
    import torch
    from bleurt_pytorch import BleurtForSequenceClassification, BleurtTokenizer

    captions = [*data[1][1][:12], "", "nodule", "lesion " * 600]
    predictions = captions[3:] + captions[:3]
    tokenizer = BleurtTokenizer.from_pretrained(folders["bleurt"])
    model = BleurtForSequenceClassification.from_pretrained(folders["bleurt"]).eval()
    config = ScoreConfig.model_validate(
        {"metrics": ["bleurt"], "bleurt": {"checkpoint": str(folders["bleurt"])}}
    )
    scores, warnings = metrics.score(predictions, captions, None, config, 2023)
    for row, (reference, prediction) in enumerate(zip(captions, predictions, strict=True)):
        pair = [metrics.text.official(caption) for caption in (reference, prediction)]
        encoded = tokenizer(
            *([caption] for caption in pair), truncation=True, max_length=512, return_tensors="pt"
        )
        with torch.inference_mode():
            expected = model(**encoded).logits.item()
        assert scores["bleurt"].per_image[row] == pytest.approx(expected, abs=1e-5)
    assert any("longer than bleurt takes, cut at 512 tokens" in warning for warning in warnings)


@pytest.mark.ci
def test_bleurt_of_a_pair_does_not_depend_on_other_pairs(data, scorer):
    pairs = [
        (one, other) for one in ["", "ct", *data[1][1][:12]] for other in ("a mass", "ct of the chest " * 9)
    ]
    whole = scorer.scores(pairs)[:, 0].tolist()
    assert [scorer.scores([pair])[0, 0] for pair in pairs] == whole


@pytest.mark.ci
def test_words_are_known_to_the_saved_tokenizers(data, folders):
    """Under transformers 5 bleurt-pytorch's tokenizer knows no word at all, and says nothing."""
    from transformers import AutoTokenizer

    tokenizers = (
        tokenizer_of(folders["bleurt"]).tokenizer,
        AutoTokenizer.from_pretrained(folders["clipscore"]),
    )
    for tokenizer in tokenizers:
        ids = [token for caption in data[1][1] for token in tokenizer(caption)["input_ids"]]
        assert ids.count(tokenizer.unk_token_id) < 0.01 * len(ids)


@pytest.mark.slow
def test_clip_puts_matched_pairs_above_shuffled_ones(data, trained):
    images, captions = data[1]
    config = ScoreConfig.model_validate(
        {"metrics": ["clipscore"], "clipscore": {"checkpoint": str(trained["clipscore"])}}
    )
    matched = metrics.score(captions, captions, images, config, 2023)[0]["clipscore"]
    shuffled = metrics.score(captions[1:] + captions[:1], captions, images, config, 2023)[0]["clipscore"]
    assert matched.value > shuffled.value + 0.2
    assert 0 <= matched.per_image.min() <= matched.per_image.max() <= 2.5


@pytest.mark.ci
def test_clipscore_equals_transformers_one_pair_at_a_time(data, folders):
    import torch
    from transformers import AutoTokenizer, CLIPModel

    images, captions = data[1][0][:6], [*data[1][1][:5], "lesion " * 200]
    model = CLIPModel.from_pretrained(folders["clipscore"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(folders["clipscore"])
    clip = clipscore.Clip(folders["clipscore"], "cpu")
    texts = [clipscore.clean(f"A photo depicts {caption}") for caption in captions]
    found = 2.5 * np.maximum((clip.images(images) * clip.texts(texts)).sum(1), 0)
    for row, (path, caption) in enumerate(zip(images, texts, strict=True)):
        tokens = tokenizer(caption, truncation=True, max_length=77, return_tensors="pt")
        assert tokens["input_ids"][0, -1] == tokenizer.sep_token_id
        pixels = torch.from_numpy(clipscore.pixels(path, 112))[None]
        with torch.inference_mode():
            out = model(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels
            )
        cosine = (out.image_embeds @ out.text_embeds.T).item()
        assert found[row] == pytest.approx(2.5 * max(cosine, 0), abs=1e-5)
    assert clip.cut == {texts[-1]}


@pytest.mark.ci
def test_scores_of_standins_are_marked(data, folders):
    images, captions = data[1]
    config = ScoreConfig.model_validate(
        {
            "metrics": ["bleurt", "clipscore"],
            "bleurt": {"checkpoint": str(folders["bleurt"])},
            "clipscore": {"checkpoint": str(folders["clipscore"])},
        }
    )
    assert metrics.problems(config, 2023) == []
    scores, _ = metrics.score(captions[:8], captions[:8], images[:8], config, 2023)
    for name, folder in folders.items():
        mark = json.loads((folder / checkpoints.STANDIN_FILE).read_text())["name"]
        assert scores[name].signature.startswith(f"{name}|clef2023|STAND-IN {mark}@")
        assert not scores[name].official


@pytest.mark.slow
def test_the_same_captions_train_the_same_model(data, folders, tmp_path, monkeypatch):
    from safetensors.numpy import load_file

    (images, captions), _ = data
    monkeypatch.setattr(standins, "BLEURT_STEPS", 3)
    monkeypatch.setattr(standins, "CLIP_STEPS", 3)
    for attempt in ("first", "again"):
        standins.build_bleurt(captions, tmp_path / attempt / "bleurt")
        standins.build_clip(images[:80], captions[:80], tmp_path / attempt / "clip")
    for kind in ("bleurt", "clip"):
        first, again = (tmp_path / attempt / kind for attempt in ("first", "again"))
        assert (first / "vocab.txt").read_bytes() == (again / "vocab.txt").read_bytes()
        assert checkpoints.find(first).name == checkpoints.find(again).name
        weights = load_file(again / "model.safetensors")
        for name, values in load_file(first / "model.safetensors").items():
            np.testing.assert_allclose(values, weights[name], atol=1e-5)


def test_training_leaves_the_callers_random_numbers_alone(data, tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(standins, "BLEURT_STEPS", 2)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    standins.build_bleurt(data[0][1][:40], tmp_path / "bleurt")
    assert torch.equal(torch.rand(3), expected)
