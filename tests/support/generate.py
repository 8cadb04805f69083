"""Small random captioners, and their captions by transformers' `generate`, the oracle of decoding."""

import torch
from transformers import Blip2Config, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from harness.models.blip2.model import Captioner

WORDS, QUERIES, SIDE = 24, 3, 16


def captioner(seed: int, language_model: bool, twins: bool = False) -> Captioner:
    """A BLIP-2 of few words with random weights, whose captions differ and end at different times.

    `twins`: each word has the weights of its neighbour, so each score occurs twice.
    """
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16}
    opt = {"model_type": "opt", "vocab_size": WORDS, "word_embed_proj_dim": 16, "ffn_dim": 16}
    config = Blip2Config(
        num_query_tokens=QUERIES,
        vision_config=layers | {"image_size": SIDE, "patch_size": SIDE // 2},
        qformer_config=layers | {"vocab_size": WORDS, "encoder_hidden_size": 16},
        text_config=layers | opt | {"max_position_embeddings": 64},
    )
    torch.manual_seed(seed)
    model = Captioner(config, language_model).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=2 * weight.shape[-1] ** -0.5)
        words = (model.language_model if language_model else model).get_input_embeddings().weight
        if twins:
            words[1::2] = words[::2]
        if language_model:  # else every token makes itself the next one
            model.language_model.model.decoder.embed_positions.weight.mul_(4)
    return model


class _Reader(PreTrainedModel, GenerationMixin):
    """The Q-Former's text path for `generate`; it reads all ids again at every step."""

    def __init__(self, captioner: Captioner) -> None:
        super().__init__(captioner.config.qformer_config)
        self.captioner = [captioner]  # in a list, so that it doesn't become a submodule

    @property
    def device(self):
        return self.captioner[0].device

    def forward(self, input_ids, states, attention_mask=None, **_):
        pairs = [tuple(pair.unbind(1)) for pair in states.unbind(1)]
        return CausalLMOutputWithPast(logits=self.captioner[0].read(input_ids, pairs))


@torch.no_grad()
def generated(model: Captioner, pixels: torch.Tensor, prompt: torch.Tensor, end: int, pad: int, **options):
    """What `generate` returns for pixels (B, 3, S, S) after prompt ids (P,), and the new ids (B * N, T)."""
    options = {"do_sample": False} | options | {"eos_token_id": end, "pad_token_id": pad}
    options |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    ids = prompt.expand(len(pixels), -1)
    with model.autocast():
        queries, states = model.see(pixels)
        if model.language_model is None:
            stacked = torch.stack([torch.stack(pair, dim=1) for pair in states], dim=1)
            given = {"input_ids": ids, "states": stacked, "use_cache": False}
            found = _Reader(model).generate(**given, **options)
            return found, found.sequences[:, ids.shape[1] :]
        prefix = model.language_projection(queries)
        words = model.language_model.get_input_embeddings()(ids)
        embeds = torch.cat([prefix.to(words.dtype), words], dim=1)
        ones = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        found = model.language_model.generate(inputs_embeds=embeds, attention_mask=ones, **options)
        return found, found.sequences
