"""MedCAT and AlignScore of 2025 and 2026, on small models in the published layouts."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from harness.metrics import alignscore, medcat
from harness.metrics.base import Absent, Flagged, Inputs
from harness.metrics.settings import ScoreConfig
from harness.models import checkpoints

REFERENCES = [
    "Axial CT of the chest. There is a nodule in the left lung. No effusion was seen.",
    "Chest radiograph of Dr. Smith showing an effusion",
    "MRI of the knee; the meniscus is torn.",
    "Ultrasound of the liver. A mass is seen.",
    "",
    "",
    "A mass.",
]
PREDICTIONS = [
    "CT shows a nodule. The heart is normal in size.",
    "Chest radiograph of Dr. Smith showing an effusion",
    "A torn meniscus",
    "CT shows a nodule. A mass is seen.",
    "",
    "A nodule.",
    " ",
]


def inputs(section: dict, cache: Path | None = None, **options) -> Inputs:
    predictions, references = options.pop("captions", (PREDICTIONS, REFERENCES))
    config = ScoreConfig.model_validate(section | options)
    return Inputs(predictions, references, None, config, 2025, cache=cache)


# --- AlignScore ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def punkt(tmp_path_factory) -> None:
    """A punkt model in nltk's layout, where nltk looks first; the published one is not on every machine."""
    import nltk

    root = tmp_path_factory.mktemp("nltk_data")
    english = root / "tokenizers" / "punkt_tab" / "english"
    english.mkdir(parents=True)
    files = {
        "abbrev_types.txt": "dr\n",
        "collocations.tab": "",
        "sent_starters.txt": "",
        "ortho_context.tab": "",
    }
    for name, content in files.items():
        (english / name).write_text(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nltk.data, "path", [str(root)])
        from nltk.tokenize import _get_punkt_tokenizer

        _get_punkt_tokenizer.cache_clear()
        yield
        _get_punkt_tokenizer.cache_clear()


def byte_pairs(folder: Path, texts: list[str]) -> None:
    """A RoBERTa tokenizer of all bytes and a few merges, in the published files."""
    from tokenizers import pre_tokenizers

    merges = ["Ġ a", "i n", "Ġ t", "o n", "e s", "in g", "Ġt h", "Ġth e"]
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += ["".join(merge.split()) for merge in merges] + ["<mask>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: row for row, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")


@pytest.fixture(scope="module")
def align(tmp_path_factory) -> Path:
    """AlignScore-base.ckpt as Lightning 1 saves it, of a random RoBERTa whose folder it names."""
    import torch
    from transformers import RobertaConfig, RobertaForMaskedLM, RobertaTokenizerFast

    root = tmp_path_factory.mktemp("align")
    byte_pairs(root / "roberta", REFERENCES)
    tokenizer = RobertaTokenizerFast.from_pretrained(root / "roberta", model_max_length=96)
    tokenizer.save_pretrained(root / "roberta")
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=98,
        type_vocab_size=1,
        initializer_range=0.6,
    )
    masked = RobertaForMaskedLM(config)
    masked.save_pretrained(root / "roberta")
    base = transformers_roberta(config)
    state = {f"base_model.{name}": value for name, value in base.state_dict().items()}
    state["base_model.embeddings.position_ids"] = torch.arange(98)[None]
    state |= {f"mlm_head.{name}": value for name, value in masked.lm_head.state_dict().items()}
    for layer, labels in (("bin_layer", 2), ("tri_layer", 3), ("reg_layer", 1)):
        state |= {f"{layer}.{n}": v for n, v in torch.nn.Linear(32, labels).state_dict().items()}
    checkpoint = {
        "epoch": 3,
        "global_step": 100,
        "pytorch-lightning_version": "1.9.5",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"current": {"ready": 3}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_path": "x.ckpt"}},
        "hparams_name": "kwargs",
        "hyper_parameters": {"model": str(root / "roberta"), "using_pretrained": True, "adam_epsilon": 1e-6},
    }
    torch.save(checkpoint, root / "AlignScore-base.ckpt")
    return root / "AlignScore-base.ckpt"


def transformers_roberta(config):
    from transformers import RobertaModel

    return RobertaModel(config).eval()


class CaptionData:
    """Some class, which `torch.load` does not take from strangers."""


class PlainAlignScore:
    """The published inference written down again, one pair at a time and padded to the full length."""

    def __init__(self, file: Path):
        import torch
        from transformers import RobertaConfig, RobertaTokenizer

        kept = torch.load(file, weights_only=False)
        weights, folder = kept["state_dict"], kept["hyper_parameters"]["model"]
        self.tokenizer = RobertaTokenizer.from_pretrained(folder)
        self.model = transformers_roberta(RobertaConfig.from_pretrained(folder))
        self.model.load_state_dict(
            {k[11:]: v for k, v in weights.items() if k.startswith("base_")}, strict=False
        )
        self.weight, self.bias = weights["tri_layer.weight"], weights["tri_layer.bias"]
        self.cut: set[tuple[str, str]] = set()

    def __call__(self, context: str, claim: str) -> float:
        from nltk.tokenize import sent_tokenize

        sentences = sent_tokenize(context) or [""]
        step = max(len(sentences) // (len(context.strip().split()) // 350 + 1), 1)
        chunks = [" ".join(sentences[i : i + step]) for i in range(0, len(sentences), step)]
        best = [max(self.probability(chunk, part) for chunk in chunks) for part in sent_tokenize(claim)]
        return sum(best) / len(best)

    def probability(self, chunk: str, claim: str) -> float:
        import torch

        first = self.tokenizer.encode(chunk, add_special_tokens=False)
        second = self.tokenizer.encode(claim, add_special_tokens=False)
        if len(first) + len(second) > 92:
            self.cut.add((chunk, claim))
        while len(first) + len(second) > 92 and len(second) < 92:
            first.pop()
        while len(first) + len(second) > 92:
            (first if len(first) > len(second) else second).pop()
        ids = [0, *first, 2, 2, *second, 2]
        mask = torch.tensor([[1] * len(ids) + [0] * (96 - len(ids))])
        padded = torch.tensor([ids + [1] * (96 - len(ids))])
        with torch.no_grad():
            pooled = self.model(padded, attention_mask=mask).pooler_output[0]
        logits = (self.weight @ pooled + self.bias).tolist()
        return float(np.exp(logits[0]) / np.exp(logits).sum())


def test_alignscore_equals_the_published_inference_one_pair_at_a_time(align, tmp_path):
    plain = PlainAlignScore(align)
    long = " ".join(f"Finding {n} of the lung is seen." for n in range(120))
    references = [*REFERENCES[:4], "", long, long, REFERENCES[0], REFERENCES[2]]
    predictions = [
        *PREDICTIONS[:4],
        "A nodule.",
        REFERENCES[0],
        "lesion " * 40 + ". A mass.",
        "the lung " * 30,
        "xyz" * 25,
    ]
    found = alignscore.measure(
        inputs({"alignscore": {"checkpoint": align}}, captions=(predictions, references), cache=tmp_path)
    )
    expected, cut = [], []
    for row, pair in enumerate(zip(references, predictions, strict=True)):
        expected.append(plain(*pair))
        cut += [row] if plain.cut else []
        plain.cut.clear()
    np.testing.assert_allclose(found.per_image, expected, atol=2e-6)
    assert np.ptp(found.per_image) > 0.1, "a model that says the same of everything tests nothing"
    assert len(long.split()) > 2 * 350, "so that its context has several chunks"
    assert found.signature.startswith("alignscore|clef2025|AlignScore-base@")
    assert 0 < len(cut) < len(references)
    assert found.warnings == [Flagged(list(cut), "longer than alignscore takes, cut at 96 tokens")]


def test_alignscore_is_official_by_its_contents(align, tmp_path):
    named = {"alignscore": {"checkpoint": align}}
    found = alignscore.measure(inputs(named))
    trusted = hashlib.sha256(align.read_bytes()).hexdigest()
    assert not found.official
    assert trusted in found.doubts[0]
    known = alignscore.measure(inputs(named, trusted=[trusted]))
    assert known.official
    assert f"|AlignScore-base@{trusted[:8]}|" in known.signature
    assert not alignscore.measure(inputs(named, trusted=[trusted], precision="bf16")).official
    renamed = tmp_path / "align-large.ckpt"
    shutil.copyfile(align, renamed)
    assert not alignscore.measure(inputs({"alignscore": {"checkpoint": renamed}}, trusted=[trusted])).official


def test_what_determines_alignscores_numbers_is_in_its_identity(align, tmp_path):
    import nltk

    config = ScoreConfig.model_validate({"alignscore": {"checkpoint": align}}).alignscore
    first = alignscore.identity(config, tmp_path)
    punkt = Path(nltk.data.path[0], "tokenizers", "punkt_tab", "english", "abbrev_types.txt")
    for file in (align.parent / "roberta" / "merges.txt", align.parent / "roberta" / "config.json", punkt):
        content = file.read_bytes()
        file.write_bytes(content + b"\n")
        try:
            assert alignscore.identity(config, tmp_path) != first, file
        finally:
            file.write_bytes(content)
    assert alignscore.identity(config, tmp_path) == first


def test_alignscore_of_a_pair_does_not_depend_on_other_pairs(align):
    scorer = alignscore.load(align, "cpu")
    rows = list(zip(REFERENCES, PREDICTIONS, strict=True))
    whole = scorer.scores(rows)
    assert [scorer.scores([row])[0, 0] for row in rows] == whole[:, 0].tolist()


def test_empty_captions_of_alignscore(align):
    measured = alignscore.measure(inputs({"alignscore": {"checkpoint": align}}))
    found = measured.per_image
    assert found[4] == 1.0
    assert found[5] == pytest.approx(PlainAlignScore(align)("", "A nodule."), abs=2e-6)
    assert found[6] == 0.0
    assert measured.warnings[1:] == [
        Flagged([4], "with both captions of length 0: alignscore is 1"),
        Flagged([6], "with a blank prediction: alignscore is 0; the organisers' code stops there"),
    ]


def test_alignscore_of_a_standin_or_in_bf16_is_not_official(align):
    fine = alignscore.measure(inputs({"alignscore": {"checkpoint": align}}))
    rough = alignscore.measure(inputs({"alignscore": {"checkpoint": align}}, precision="bf16"))
    assert rough.signature == fine.signature.replace("fp32", "bf16")
    assert not rough.official
    assert 0 < np.abs(rough.per_image - fine.per_image).max() < 0.1
    mark = align.with_name(checkpoints.STANDIN_FILE)
    checkpoints.mark_standin(align.parent, "align-1234")
    try:
        marked = alignscore.measure(inputs({"alignscore": {"checkpoint": align}}))
    finally:
        mark.unlink()
    assert marked.signature.startswith("alignscore|clef2025|STAND-IN align-1234@")
    assert not marked.official


def test_alignscore_says_what_is_wrong_with_its_files(align, tmp_path, monkeypatch):
    import torch

    def wrong(file: Path) -> str:
        with pytest.raises(Absent) as raised:
            alignscore.measure(inputs({"alignscore": {"checkpoint": file}}))
        return str(raised.value)

    assert "no such file" in wrong(tmp_path / "AlignScore-base.ckpt")
    assert "a folder, not a file" in wrong(tmp_path)
    (tmp_path / "page.ckpt").write_text("<html>not found</html>")
    assert "not a checkpoint of AlignScore" in wrong(tmp_path / "page.ckpt")
    kept = torch.load(align, weights_only=True)
    torch.save({"state_dict": kept["state_dict"]}, tmp_path / "bare.ckpt")
    assert "not a checkpoint of AlignScore" in wrong(tmp_path / "bare.ckpt")
    torch.save(kept | {"hparams_type": CaptionData}, tmp_path / "objects.ckpt")
    assert "holds Lightning objects" in wrong(tmp_path / "objects.ckpt")
    part = {name: value for name, value in kept["state_dict"].items() if "layer.1" not in name}
    torch.save(kept | {"state_dict": part}, tmp_path / "part.ckpt")
    assert "does not fit" in wrong(tmp_path / "part.ckpt")
    torch.save(kept | {"hyper_parameters": {"model": "roberta-none"}}, tmp_path / "far.ckpt")
    assert "roberta-none" in wrong(tmp_path / "far.ckpt")


def test_alignscore_without_nltks_data_is_absent_and_not_split_otherwise(align, tmp_path, monkeypatch):
    import nltk
    from nltk.tokenize import _get_punkt_tokenizer

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    _get_punkt_tokenizer.cache_clear()
    config = ScoreConfig.model_validate({"alignscore": {"checkpoint": align}}).alignscore
    (problem,) = alignscore.problems(config)
    assert "python -m nltk.downloader punkt_tab" in problem.hint
    with pytest.raises(Absent, match="nltk has no sentence splitter"):
        alignscore.measure(inputs({"alignscore": {"checkpoint": align}}))
    _get_punkt_tokenizer.cache_clear()


# --- MedCAT ----------------------------------------------------------------------------------------------

PACKAGE = '''
class CAT:
    """The parts of MedCAT 1.16 that are used: a dictionary looked up word by word, and its filters."""

    def __init__(self, names):
        self.names = names
        types = {}
        for cui, type_id in names.values():
            types.setdefault(type_id, set()).add(cui)
        self.cdb = Box(addl_info={"type_id2cuis": types}, config=Box(linking={"filters": {"cuis": {"C0"}}}))

    @classmethod
    def load_model_pack(cls, path):
        import json, os, sys
        print("medcat says something")
        if os.path.isdir(path):
            path = os.path.join(path, "cdb.dat")
        return cls(json.load(open(path)))

    def get_entities(self, text):
        words = text.lower().replace(".", " ").split()
        found = [(w, self.names[w][0]) for w in words if w in self.names]
        allowed = self.cdb.config.linking["filters"]["cuis"]
        found = [(w, cui) for w, cui in found if not allowed or cui in allowed]
        entities = {n: {"pretty_name": w, "cui": cui} for n, (w, cui) in enumerate(found)}
        return {"entities": entities, "tokens": []}


class Box:
    def __init__(self, **values):
        vars(self).update(values)
'''
NAMES = {"nodule": ["C1", "T1"], "lung": ["C2", "T2"], "pulmo": ["C2", "T2"], "mass": ["C3", "T1"]}


@pytest.fixture(scope="module")
def second_python(tmp_path_factory) -> Path:
    """A second Python with a package of MedCAT's interface; the real one wants another numpy than ours."""
    root = tmp_path_factory.mktemp("python")
    venv.create(root, symlinks=True)
    (site,) = root.glob("lib/python*/site-packages")
    (site / "medcat").mkdir()
    (site / "medcat" / "__init__.py").touch()
    (site / "medcat" / "cat.py").write_text(PACKAGE)
    (site / "medcat-1.16.12.dist-info").mkdir()
    (site / "medcat-1.16.12.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: medcat\nVersion: 1.16.12\n"
    )
    return root / "bin" / "python"


@pytest.fixture
def pack(tmp_path) -> Path:
    folder = tmp_path / f"{medcat.OFFICIAL}"
    folder.mkdir()
    (folder / "cdb.dat").write_text(json.dumps(NAMES))
    return folder


def with_medcat(pack: Path | None, python: Path | None, predictions=(), references=(), **options) -> Inputs:
    made = inputs({"medcat": {"model_pack": pack}}, captions=(predictions, references), **options)
    section = made.config.medcat.model_copy(update={"python": python})
    return replace(made, config=made.config.model_copy(update={"medcat": section}))


def test_medcat_is_the_f1_of_distinct_concepts_in_a_second_python(pack, second_python, tmp_path):
    pairs = [
        ("A nodule in the lung. Nodule!", "lung mass", 0.5),
        ("pulmo lung", "lung", 1.0),  # two names of one concept count once
        ("nodule", "lung", 0.0),
        ("no such word", "nor here", 0.0),  # as in the evaluator: F1 without concepts is 0 ...
        ("", "", 1.0),  # ... but two empty captions agree
        ("", "lung", 0.0),
        ("nodule mass lung", "", 0.0),
        ("Lung nodule \u2013 \U0001fac1", "lung nodule mass", 0.8),
    ]
    predictions, references, expected = zip(*pairs, strict=True)
    found = medcat.measure(with_medcat(pack, second_python, predictions, references, cache=tmp_path))
    assert found.per_image == pytest.approx(expected, abs=1e-12)
    assert re.fullmatch(
        rf"medcat\|clef2025\|{medcat.OFFICIAL}@[0-9a-f]{{8}}\|pre:raw\|medcat:1.16.12", found.signature
    )


def test_medcat_scores_are_kept(pack, second_python, tmp_path, monkeypatch):
    first = with_medcat(pack, second_python, ["lung nodule"], ["lung"], cache=tmp_path)
    expected = medcat.measure(first).per_image
    monkeypatch.setattr(medcat, "WORKER", tmp_path / "no_worker.py")
    assert medcat.measure(first).per_image == pytest.approx(expected)


def test_medcat_says_what_is_missing(pack, second_python, tmp_path):
    without = tmp_path / "without"
    venv.create(without, symlinks=True)
    wrong = with_medcat(tmp_path / "none.zip", without / "bin" / "python").config.medcat
    assert [problem.key for problem in medcat.problems(wrong)] == [medcat.PACK_KEY, medcat.PYTHON_KEY]
    nowhere = with_medcat(pack, tmp_path / "no" / "python")
    with pytest.raises(Absent, match=r"no such program: .*/no/python\. .*pip install"):
        medcat.measure(nowhere)


def test_medcat_that_fails_gives_its_last_words(pack, second_python):
    (pack / "cdb.dat").write_text("broken")
    with pytest.raises(Absent, match=r"MedCAT failed on .*: json\.decoder\.JSONDecodeError"):
        medcat.measure(with_medcat(pack, second_python, ["lung"], ["lung"]))


@pytest.mark.ci
def test_problems_are_found_without_torch(align, pack):
    code = (
        "import sys\n"
        "from harness.metrics.settings import ScoreConfig\n"
        "from harness.metrics import alignscore, medcat\n"
        "config = ScoreConfig.model_validate_json(sys.argv[1])\n"
        "assert alignscore.problems(config.alignscore) and medcat.problems(config.medcat)\n"
        "assert 'torch' not in sys.modules, 'torch'\n"
    )
    sections = {
        "alignscore": {"checkpoint": str(align)},
        "medcat": {"model_pack": str(pack)},
    }
    environment = os.environ | {"NLTK_DATA": "nowhere"}
    command = [sys.executable, "-c", code, json.dumps(sections)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr
