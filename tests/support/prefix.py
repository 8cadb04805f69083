"""Small checkpoints of image encoders and causal language models of random weights, as folders."""

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextModel,
    CvtConfig,
    CvtModel,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
WORDS = 259
_GROUPED = LAYERS | {"num_key_value_heads": 1, "vocab_size": WORDS, "initializer_range": 0.3}
VISION: dict[str, Callable[[], PreTrainedModel]] = {
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**LAYERS, image_size=32, patch_size=8)),
    "convnext": lambda: ConvNextModel(ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1])),
    "cvt": lambda: CvtModel(CvtConfig(embed_dim=[8, 16, 32], num_heads=[1, 2, 2], depth=[1, 2, 3])),
}
"""A ViT with a position table, feature maps without and with batch norms."""
LANGUAGE: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=WORDS, n_embd=32, n_layer=2, n_head=2, n_positions=256, initializer_range=0.3)
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=WORDS,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            word_embed_proj_dim=16,
            max_position_embeddings=256,
            init_std=0.3,
        )
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_GROUPED, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_GROUPED)),
    "granite": lambda: GraniteForCausalLM(
        GraniteConfig(**_GROUPED, logits_scaling=4.0, embedding_multiplier=2.0)
    ),
}
"""Position tables or rotations, tied and own heads, grouped keys, words of another width, scaled logits."""
EXPERIMENT = """
name: prefix
device: cpu
data:
  root: data/phantom
  phantom: {train: 24, valid: 6, test: 3, seed: 3}
model:
  family: prefix
  vision_checkpoint: tiny
  language_checkpoint: LANGUAGE
  connector: {kind: pooled, tokens: 4}
  lora: {rank: 2}
  image_size: 56
  tiny: {patch_size: 14, hidden_size: 32, vision_layers: 1, vision_epochs: 1}
train:
  stages:
    - {epochs: 1, losses: {caption: 1}}
    - {epochs: 1, losses: {reward: 1}, reward: {metrics: {rouge1: 1}, samples: 2, max_new_tokens: 12}}
  batch_size: 8
  micro_batch_size: 8
  learning_rate: 1e-2
  warmup_steps: 2
  max_words: 12
  evaluate_images: 6
predict: {num_beams: 2, max_new_tokens: 16}
score:
  metrics: [bertscore, rouge1]
  bertscore: {checkpoint: standin}
  bootstrap: 200
"""
"""An experiment with the language model in LANGUAGE: adapters, two stages, a tiny image encoder."""
_SPECIAL = {
    "gpt2": {"bos_token": "</s>", "eos_token": "</s>"},
    "opt": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
    "llama": {"bos_token": "<s>", "eos_token": "</s>"},
    "granite": {"bos_token": "<s>", "eos_token": "</s>"},
    "qwen2": {"eos_token": "</s>", "pad_token": "<pad>"},
}


def build(folder: Path) -> Path:
    """A folder with a folder for each of `VISION` and `LANGUAGE`."""
    torch.manual_seed(0)
    for name, make in VISION.items():
        model = make()
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):  # statistics that no batch has
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
        model.save_pretrained(folder / name)
    CLIPImageProcessor(image_mean=[0.1, 0.2, 0.3]).save_pretrained(folder / "clip")
    for name, make in LANGUAGE.items():
        model, words = make(), _tokenizer(**_SPECIAL[name])
        for role in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(model.config, role, getattr(words, role))
        model.generation_config = GenerationConfig.from_model_config(model.config)
        model.save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    return folder


def _tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """A tokenizer that reads bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = Tokenizer(models.BPE({letter: at for at, letter in enumerate(letters)}, []))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytes_, **special)
