"""Small random causal language models of several architectures, saved as checkpoint folders."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
ROTARY = WIDE | {"num_key_value_heads": 2, "max_position_embeddings": 256}
ARCHITECTURES = {
    "opt": WIDE
    | {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0, "max_position_embeddings": 256}
    | {"pad_token_id": 1},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
    | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    "llama": ROTARY,
    "qwen2": ROTARY,
    "granite": ROTARY | {"logits_scaling": 4.0},  # after the head
}
"""Sizes by model type; the heads of OPT and GPT-2 are tied to their word embeddings."""


def build(kind: str, tokenizer: Path, folder: Path) -> Path:
    """A language model of a type in `ARCHITECTURES` with the tokenizer in another folder, in `folder`."""
    words = AutoTokenizer.from_pretrained(tokenizer)
    ids = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    config = AutoConfig.for_model(kind, **ARCHITECTURES[kind] | ids, vocab_size=len(words))
    torch.manual_seed(len(kind))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=2 * weight.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
