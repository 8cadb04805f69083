"""Small vision-language checkpoints with random weights, in the layout of transformers, with processors."""

import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    BertTokenizerFast,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GemmaTokenizerFast,
    InstructBlipProcessor,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    Qwen2TokenizerFast,
    Qwen2VLImageProcessor,
    SiglipImageProcessor,
)

from support.models import TEXTS

SIDE, PATCH, WORDS = 32, 8, 120
TOKENS = (SIDE // PATCH) ** 2
SENTENCES = [*(text for pair in TEXTS for text in pair), "Describe the image. A photo of: the user, a model"]
_VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_VISION |= {"image_size": SIDE, "patch_size": PATCH}
_TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256}
_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_USER = (
    "{% for m in messages %}{{ m.role.upper() + ': ' }}{% for c in m.content %}{% if c.type == 'image' %}"
    "{{ '<image>\n' }}{% else %}{{ c.text + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
    "<start_of_image>{% else %}{{ c.text | trim }}{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
"""Chat templates in the forms of Qwen, LLaVA and Gemma 3."""
RUN = """
name: vlm
device: cpu
data:
  root: data/phantom
  phantom: {{train: 24, valid: 6, test: 4, seed: 3}}
model:
  family: vlm
  checkpoint: {folder}
  image_size: 64
  prompt: describe the image
  lora: {{rank: 4, alpha: 8, dropout: 0.05}}
train:
  train_vision: false
  learning_rates: {{connector: 2e-4}}
  stages:
    - {{epochs: 1, losses: {{caption: 1}}}}
    - epochs: 1
      losses: {{reward: 1, caption: 0.1}}
      reward: {{metrics: {{rouge1: 1}}, samples: 2, max_new_tokens: 6}}
  max_caption_tokens: 24
  batch_size: 8
  micro_batch_size: 4
  learning_rate: 1e-3
  warmup_steps: 2
  evaluate_images: 4
predict: {{num_beams: 2, num_return_sequences: 2, max_new_tokens: 8, samples: {{count: 2}}}}
score: {{metrics: [bertscore, rouge1], bertscore: {{checkpoint: standin}}, bootstrap: 50}}
"""
"""An experiment with the checkpoint in `folder`: adapters, two stages, beams and samples."""


def make(kind: str, folder: Path, seed: int = 0) -> Path:
    """A checkpoint of this model type, whose captions differ between images and end at different times."""
    torch.manual_seed(seed)
    processor, values, *rest = {
        "blip": _blip,
        "instructblip": _instructblip,
        "llava": _llava,
        "llava_next": _llava_next,
        "paligemma": _paligemma,
        "gemma3": _gemma3,
        "qwen2_5_vl": _qwen,
        "qwen3_vl": _qwen,
    }[kind](kind)
    config = AutoConfig.for_model(kind, **values)
    if kind == "blip":
        model = BlipForConditionalGeneration(config)
    else:
        model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=1.4 * weight.shape[-1] ** -0.5)
        if "gemma" in kind:  # they multiply embeddings, by which every token would make itself the next one
            model.get_input_embeddings().weight.mul_(0.2)
    model.save_pretrained(folder)
    for part in (processor, *rest):
        part.save_pretrained(folder)
    return folder


def _trained(tokenizer: Tokenizer, special: list[str], alphabet: list[str] | None = None) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet or [], show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def _sentencepiece(special: list[str], prefix: bool) -> Tokenizer:
    """BPE as in the files of Llama (a space before the text, `prefix`) and Gemma (none)."""
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    spaces = normalizers.Replace(" ", "▁")
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    alphabet = sorted({*"".join(SENTENCES).replace(" ", "▁"), "\n", ":", "U", "S", "E", "R", "I", "N"})
    return _trained(made, special, alphabet)


def _llama(special: list[str]) -> PreTrainedTokenizerFast:
    made = _sentencepiece(["<pad>", "<s>", "</s>", "<unk>", *special], prefix=True)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def _gemma_tokens(cls: type, special: list[str], **named: str) -> PreTrainedTokenizerFast:
    made = _sentencepiece(["<pad>", "<eos>", "<bos>", "<unk>", *special], prefix=False)
    made.add_tokens(["\n\n", "\n\n\n"])  # as in Gemma, whose tokenizer joins line breaks
    made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return cls(tokenizer_object=made, **names, extra_special_tokens=named)


def _bert() -> BertTokenizerFast:
    words = sorted({word.strip(".,:").lower() for text in SENTENCES for word in text.split()})
    every = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, ".", ",", ":", "[DEC]"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vocab.txt"
        file.write_text("\n".join(every) + "\n", encoding="utf-8")
        return BertTokenizerFast(str(file))


def _size(processor: type, **values):
    return processor(size={"height": SIDE, "width": SIDE}, **values)


def _blip(kind: str) -> tuple:
    tokens = _bert()
    ids = {"bos_token_id": len(tokens) - 1, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}
    text = {key: value for key, value in _TEXT.items() if key not in ("num_key_value_heads", "head_dim")}
    text |= ids | {"vocab_size": len(tokens), "encoder_hidden_size": 16, "hidden_dropout_prob": 0.0}
    text |= {"attention_probs_dropout_prob": 0.0}
    values = {"vision_config": _VISION, "text_config": text, "projection_dim": 16}
    return BlipProcessor(_size(BlipImageProcessor), tokens), values


def _instructblip(kind: str) -> tuple:
    llama, bert = _llama([]), _bert()
    processor = InstructBlipProcessor(_size(BlipImageProcessor), llama, bert, num_query_tokens=3)
    former = {"vocab_size": len(bert), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    former |= {"intermediate_size": 24, "encoder_hidden_size": 16, "cross_attention_frequency": 1}
    former |= {"max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    text = {"model_type": "llama", **_TEXT, "vocab_size": len(llama)}
    values = {"vision_config": _VISION, "qformer_config": former, "text_config": text}
    return processor, values | {"num_query_tokens": 3, "image_token_index": len(llama) - 1}


def _llava(kind: str) -> tuple:
    tokens = _llama(["<image>"])
    image = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    more = {
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    return LlavaProcessor(image, tokens, chat_template=_USER, **more), _llava_values(tokens)


def _llava_values(tokens: PreTrainedTokenizerFast) -> dict:
    return {
        "vision_config": {"model_type": "clip_vision_model", **_VISION},
        "text_config": {"model_type": "llama", **_TEXT, "vocab_size": len(tokens)},
        "image_token_index": tokens.convert_tokens_to_ids("<image>"),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }


def _llava_next(kind: str) -> tuple:
    tokens, pins = _llama(["<image>"]), [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    sides = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    image = LlavaNextImageProcessor(**sides, image_grid_pinpoints=pins)
    more = {
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    values = _llava_values(tokens) | {"image_grid_pinpoints": pins}
    return LlavaNextProcessor(image, tokens, chat_template=_USER, **more), values


def _paligemma(kind: str) -> tuple:
    tokens = _gemma_tokens(GemmaTokenizerFast, ["<image>"], image_token="<image>")
    processor = PaliGemmaProcessor(_size(SiglipImageProcessor, image_seq_length=TOKENS), tokens)
    values = {
        "vision_config": {"model_type": "siglip_vision_model", **_VISION, "vision_use_head": False},
        "text_config": {"model_type": "gemma", **_TEXT, "vocab_size": len(tokens), "num_key_value_heads": 1},
        "image_token_index": tokens.convert_tokens_to_ids("<image>"),
        "projection_dim": 32,
    }
    return processor, values


def _gemma3(kind: str) -> tuple:
    image = {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }
    turns = ["<start_of_turn>", "<end_of_turn>"]
    tokens = _gemma_tokens(PreTrainedTokenizerFast, [*image.values(), *turns], **image)
    processor = Gemma3Processor(_size(Gemma3ImageProcessor), tokens, chat_template=_GEMMA, image_seq_length=4)
    number = tokens.convert_tokens_to_ids
    values = {
        "vision_config": {"model_type": "siglip_vision_model", **_VISION, "vision_use_head": False},
        "text_config": {
            **_TEXT,
            "vocab_size": len(tokens),
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 8,
            "tie_word_embeddings": False,
        },
        "tie_word_embeddings": False,
        "mm_tokens_per_image": 4,
        "image_token_index": number("<image_soft_token>"),
        "boi_token_index": number("<start_of_image>"),
        "eoi_token_index": number("<end_of_image>"),
    }
    return processor, values


def _qwen(kind: str) -> tuple:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    special += ["<|image_pad|>", "<|video_pad|>"]
    _trained(made, special, pre_tokenizers.ByteLevel.alphabet())
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": _CHATML}
    tokens = Qwen2TokenizerFast(tokenizer_object=made, **names, bos_token=None, unk_token=None)
    image = Qwen2VLImageProcessor(
        patch_size=4, temporal_patch_size=2, merge_size=2, min_pixels=4 * 64, max_pixels=30 * 64
    )
    depth = {"depth": 2, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2}
    depth |= {"spatial_merge_size": 2, "out_hidden_size": 32, "intermediate_size": 24}
    if kind == "qwen2_5_vl":
        depth |= {"window_size": 16, "fullatt_block_indexes": [1]}
        rope = {"type": "mrope", "mrope_section": [1, 1, 2]}
    else:
        depth |= {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
        rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    number = tokens.convert_tokens_to_ids
    ids = {f"{name}_token_id": number(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    ids |= {f"{name}_token_id": number(f"<|{name}_pad|>") for name in ("image", "video")}
    text = {**_TEXT, "vocab_size": len(tokens), "rope_scaling": rope, "num_hidden_layers": 3}
    return tokens, {"vision_config": depth, "text_config": text, **ids}, image
