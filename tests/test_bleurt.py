"""BLEURT equals bleurt-pytorch: its scores of made-up checkpoints, and itself where it can be imported."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from support.versions import beside_4

from harness.metrics import bleurt

SENTENCE = "a ct mri of the chest abdomen shows small large nodule mass lesion in left right lung liver no"
WORDS = SENTENCE.split()
PAIRS = [
    ("ct of the chest shows a small nodule in the left lung", "ct shows a nodule in the left lung"),
    ("ct of the chest shows a small nodule in the left lung", "mri of the abdomen shows no mass"),
    ("a large lesion in the liver", "a large lesion in the liver"),
    ("naïve émigré α–β 日本", "µm Ünlü  tab\tend"),
    ("", "no lesion"),
    ("no lesion", ""),
    ("mass " * 40, "small nodule " * 30),
    ("small nodule " * 30, "mass"),
    ("lung", "liver lung " * 50),
]
"""References and predictions; the last three are longer than these checkpoints take."""
GOLDEN = {
    "words": [
        -3.4435139,
        -3.4376736,
        -3.4470105,
        -3.4821386,
        -3.4336607,
        -3.3832707,
        -3.3853104,
        -3.4425669,
        -3.2978542,
    ],
    "sentences": [
        0.3573292,
        0.3582563,
        0.3599761,
        0.3639228,
        0.4102473,
        0.4091293,
        0.3497813,
        0.3585039,
        0.3430308,
    ],
}
"""What bleurt-pytorch 0.0.1 gives for them beside transformers 4.57.6, one pair at a time."""


def pieces(folder: Path) -> int:
    """Write a tokenizer of words and their pieces -> the size of its vocabulary."""
    letters = sorted(set("".join(WORDS)))
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    vocabulary += [*(f"##{letter}" for letter in letters), *(word for word in WORDS if len(word) > 1)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    return len(vocabulary)


def sentence_pieces(folder: Path) -> int:
    """Write a tokenizer of sentencepiece, as BLEURT-20 has one -> the size of its vocabulary."""
    from sentencepiece import sentencepiece_model_pb2 as form

    model = form.ModelProto()
    kinds = form.ModelProto.SentencePiece
    for name, kind in (("<unk>", kinds.UNKNOWN), ("[CLS]", kinds.CONTROL), ("[SEP]", kinds.CONTROL)):
        model.pieces.add(piece=name, score=0, type=kind)
    plain = ["▁", *sorted(set("".join(WORDS))), *(f"▁{word}" for word in WORDS), "odule", "ass", "esion"]
    for number, name in enumerate(plain):
        model.pieces.add(piece=name, score=-1 - number / 8 if len(name) > 1 else -9 - number / 8)
    model.trainer_spec.model_type = form.TrainerSpec.UNIGRAM
    (folder / "spm.model").write_bytes(model.SerializeToString())
    return len(model.pieces)


def checkpoint(folder: Path, kind: str) -> Path:
    """A small BLEURT with weights by a formula; of the kind `sentences`, words are narrower than layers."""
    import torch
    from safetensors.torch import save_file

    from harness.models.bleurt import Bleurt, config_of

    folder.mkdir()
    sizes = {"hidden_size": 36, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 50}
    sizes |= {"vocab_size": (pieces if kind == "words" else sentence_pieces)(folder)}
    sizes |= {"max_position_embeddings": 48, "embedding_size": None if kind == "words" else 20}
    (folder / "config.json").write_text(json.dumps({"model_type": "bleurt"} | sizes))
    weights = {"bleurt.embeddings.position_ids": torch.arange(48)[None]}
    for number, (name, like) in enumerate(sorted(Bleurt(config_of(folder)).state_dict().items())):
        waves = np.sin(np.arange(like.numel()) * (1 + number / 7) + number) / math.sqrt(like.shape[-1])
        waves = waves * 3 + ("LayerNorm.weight" in name)
        weights[name] = torch.tensor(waves.reshape(like.shape), dtype=torch.float32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module", params=["words", "sentences"])
def made(request, tmp_path_factory) -> tuple[str, Path]:
    return request.param, checkpoint(tmp_path_factory.mktemp("bleurt") / request.param, request.param)


def theirs(folder: Path, pairs: list[tuple[str, str]]) -> list[float]:
    """The scores of bleurt-pytorch, one pair at a time."""
    import torch
    from bleurt_pytorch import BleurtForSequenceClassification, BleurtTokenizer

    tokenizer = BleurtTokenizer.from_pretrained(folder)
    model = BleurtForSequenceClassification.from_pretrained(folder).eval()
    how = {"truncation": True, "max_length": 48, "return_tensors": "pt"}
    with torch.inference_mode():
        return [model(**tokenizer([one], [other], **how)).logits.item() for one, other in pairs]


def test_scores_are_those_that_bleurt_pytorch_gave(made):
    kind, folder = made
    scores, cut = bleurt.load(folder, "cpu").scores(PAIRS).T
    np.testing.assert_allclose(scores, GOLDEN[kind], atol=1e-5)
    assert cut.tolist() == [0] * (len(PAIRS) - 3) + [48] * 3


@beside_4
def test_scores_are_those_that_bleurt_pytorch_gives(made):
    kind, folder = made
    draw = random.Random(1)
    letters = " " * 8 + "acdeéαµ日–1\t" + "nodule lesion" * 2
    pairs = [
        tuple("".join(draw.choices([*WORDS, *letters], k=draw.randrange(90))) for _ in range(2))
        for _ in range(40)
    ]
    scores = bleurt.load(folder, "cpu").scores(pairs)[:, 0]
    np.testing.assert_allclose(scores, theirs(folder, pairs), atol=1e-5)
    np.testing.assert_allclose(theirs(folder, PAIRS), GOLDEN[kind], atol=1e-6)
