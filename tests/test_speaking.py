"""What can't be the language model of a captioner is said before a run, with the reason."""

import pytest
from support import language_models
from support import prefix as small
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from harness.errors import UserError
from harness.machine import device
from harness.models import adapters, problems, speaking
from harness.models.contentless import without_contents
from harness.models.settings import ModelConfig
from harness.training.settings import TrainConfig

device.probe("cpu")
WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
EXPERTS = WIDE | {"num_local_experts": 2, "num_key_value_heads": 2}
TRAIN = TrainConfig(max_caption_tokens=20, stages=[{"epochs": 1, "losses": {"caption": 1}}])
WORDS = {"vocab_size": 259, "n_embd": 16, "n_layer": 1, "n_head": 2}


def refused(kind: str, **values: object) -> str | None:
    """Why a model of this type can't decode."""
    with without_contents(accelerator=False):
        config = AutoConfig.for_model(kind, vocab_size=64, **values)
        model = AutoModelForCausalLM.from_config(config)
        try:
            speaking.check(model)
        except UserError as error:
            (problem,) = error.problems
            assert problem.key == "model.language_checkpoint"
            assert "distilgpt2" in problem.hint
            return problem.what
    return None


@pytest.mark.parametrize(
    ("kind", "values", "why"),
    [
        ("bloom", {"hidden_size": 32, "n_layer": 1, "n_head": 4}, "decode by BloomForCausalLM: ValueError"),
        ("mamba", {"hidden_size": 32, "num_hidden_layers": 1}, "keeps a state"),
        ("jamba", EXPERTS | {"use_mamba_kernels": False, "pad_token_id": 0}, "keeps a state"),
        ("bert", WIDE | {"pad_token_id": 0}, "reads texts in both directions"),
        ("bart", {"d_model": 32, "decoder_layers": 1}, "is half of a model with an encoder"),
    ],
)
def test_a_model_that_cannot_decode_here_is_refused(kind, values, why, capfd):
    assert why in (refused(kind, **values) or "")
    assert "fake_tensor" not in capfd.readouterr().err


@pytest.mark.parametrize("kind", [*language_models.ARCHITECTURES, "gpt_neox", "phi", "gemma2", "mixtral"])
def test_other_models_are_not(kind):
    values = language_models.ARCHITECTURES.get(kind, EXPERTS if kind == "mixtral" else WIDE)
    assert refused(kind, **{"pad_token_id": 0} | values) is None


@pytest.mark.parametrize(
    "kind", [*language_models.ARCHITECTURES, "gpt_neox", "phi", "phi3", "falcon", "gptj", "codegen", "glm"]
)
def test_adapters_are_in_all_linear_layers_by_default(kind):
    """Of attention and MLPs, that is: of all but the head."""
    narrow = {"gptj": {"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4}}
    narrow["codegen"] = narrow["gptj"]
    values = language_models.ARCHITECTURES.get(kind, narrow.get(kind, WIDE))
    with without_contents(accelerator=False):
        config = AutoConfig.for_model(kind, **{"pad_token_id": 0} | values, vocab_size=64)
        model = AutoModelForCausalLM.from_config(config)
    linear = {
        name.rpartition(".")[2]: module
        for name, module in model.named_modules()
        if adapters._is_linear(module) and module is not model.get_output_embeddings()
    }
    assert len(linear) > 2
    assert set(linear) <= set(adapters.ATTENTION_AND_MLP)


@pytest.fixture
def saved(tmp_path):
    """A function that saves a model with a tokenizer of bytes, and gives the folder."""

    def save(model, **special):
        model.save_pretrained(tmp_path)
        small._tokenizer(**special).save_pretrained(tmp_path)
        return str(tmp_path)

    return save


def said(**values: object) -> list[str]:
    """The problems of a tiny BLIP-2, decoding 12 tokens."""
    bare = {"checkpoint": "tiny", "text_checkpoint": None, "text_head_checkpoint": None, "image_size": 56}
    new_tokens = values.pop("new_tokens", 12)
    found = problems(ModelConfig(**bare | values), TRAIN, new_tokens)
    return [f"{one.key}: {one.what}" for one in found]


def test_captions_are_not_longer_than_another_language_model_reads(saved):
    """16 tokens of the image, 11 of the prompt, the start token."""
    config = GPT2Config(**WORDS, n_positions=48, bos_token_id=257, eos_token_id=257)
    folder = saved(GPT2LMHeadModel(config), eos_token="</s>")
    assert said(language_checkpoint=folder, prompt="a photo of") == []
    (one,) = said(language_checkpoint=folder, new_tokens=30)
    assert one.startswith("predict.max_new_tokens: image and prompt have 27 tokens, and 30 follow")
    both = said(language_checkpoint=folder, prompt="a photo of the chest", new_tokens=30)
    assert [one.partition(":")[0] for one in both] == ["train.max_caption_tokens", "predict.max_new_tokens"]


def test_a_language_model_without_an_end_token_is_refused_for_blip2(saved):
    ends = {"bos_token_id": None, "eos_token_id": None}
    folder = saved(GPT2LMHeadModel(GPT2Config(**WORDS, **ends)))
    (one,) = said(language_checkpoint=folder)
    assert "no usable end token" in one


@pytest.mark.parametrize(
    ("config", "cls"),
    [
        (T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2), T5ForConditionalGeneration),
        (BertConfig(**WIDE), BertForMaskedLM),
    ],
)
def test_a_checkpoint_of_another_kind_is_refused_for_blip2(config, cls, saved):
    (one,) = said(language_checkpoint=saved(cls(config)))
    assert f"holds {cls.__name__}, which is no causal language model" in one


@pytest.mark.parametrize(
    ("speaks", "most", "before"), [(True, 512, 1 + 3 + 16), (False, 256, 1)], ids=["opt", "q-former"]
)
def test_captions_are_not_longer_than_the_models_own_position_table(speaks, most, before):
    assert said(language_model=speaks, new_tokens=most - before) == []
    (one,) = said(language_model=speaks, new_tokens=most - before + 1)
    assert one.endswith(f"the language model reads {most}")
