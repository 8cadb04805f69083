"""BLIP: a text decoder that attends to the image, without image tokens among its ids."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from harness.models.cache import keyword
from harness.models.vlm.images import Images
from harness.models.vlm.model import Captioner, Growing, Seen


class Blip(Captioner):
    """`BlipForConditionalGeneration`; its start token stands before the prompt, in training as in LAVIS."""

    smooths = True

    def _see(self, pixels: Images) -> Seen:
        return Seen(list(self.model.vision_model(**pixels.joined()).last_hidden_state), [])

    def _say(self, seen: Seen, text: Mapping[str, Tensor]) -> Tensor:
        return self.model.text_decoder(
            input_ids=text["ids"],
            attention_mask=text["mask"],
            encoder_hidden_states=torch.stack(seen.images),
            use_cache=False,
        ).logits

    def _begin(self, seen: Seen, prompts: Tensor) -> Growing:
        image, mask = torch.stack(seen.images), torch.ones_like(prompts)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())

        def forward(tokens: Tensor, state: Growing) -> Tensor:
            # keys and values of the image are in the cache, so only the number of rows matters here
            shown = image[:1].expand(len(tokens), -1, -1)
            return read(tokens[:, None], state.mask, shown)

        def read(ids: Tensor, mask: Tensor, image: Tensor) -> Tensor:
            output = self.model.text_decoder(
                input_ids=ids,
                attention_mask=mask,
                encoder_hidden_states=image,
                use_cache=True,
                **{keyword(self.model.text_decoder): cache},
            )
            return output.logits[:, -1]

        return Growing(forward, read(prompts, mask, image), cache, mask, mask.sum(1))
