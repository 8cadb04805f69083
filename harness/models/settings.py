"""The section `model:`, with the sizes of the `tiny` model."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import core_schema

from harness.config.sections import (
    Entries,
    Epochs,
    Layers,
    Positive,
    Section,
    Seed,
    Share,
    Side,
    Tokens,
    Width,
    whole,
)
from harness.errors import AcrossKeys
from harness.models import FAMILIES

TINY = "tiny"
"""The name of the captioning model that is built from the training captions."""


class TinyConfig(Section):
    """Sizes of the BLIP-2 that `model.checkpoint: tiny` builds from the training captions."""

    patch_size: Side = 28
    """Side of a ViT patch in pixels; `model.image_size` must be a multiple of it."""
    hidden_size: Width = 128
    """Width of ViT and Q-Former."""
    vision_layers: Layers = 4
    """Layers of the ViT."""
    qformer_layers: Layers = 4
    """Layers of the Q-Former."""
    num_query_tokens: Tokens = 16
    """Number of queries of the Q-Former: the language model sees an image as this many tokens."""
    text_hidden_size: Width = 192
    """Width of the OPT language model."""
    text_layers: Layers = 3
    """Layers of the OPT language model."""
    vocab_size: Entries = 2000
    """Maximum number of entries in each of the two tokenizers."""
    text_epochs: whole(1, 100_000) = 12
    """Epochs of language modelling before OPT is frozen."""
    vision_epochs: Epochs = 10
    """Epochs in which the ViT learns to predict the concepts of an image, before fine-tuning."""
    connector_epochs: Epochs = 0
    """Epochs in which the Q-Former then learns captions and concept sentences, together with the ViT."""
    seed: Seed = 0
    """Seed of the initial weights and of this pre-training."""


class RetrievedPrompt(Section):
    """Captions of similar training images before the text: `Similar: c1; c2; c3. a photo of`.

    The loss ignores them. A training image gets neither its own caption nor those of its copies.
    """

    retrieved: whole(1, 100)
    """Number of captions, of the training images with the most similar features."""
    words: whole(1, 1000) = 30
    """Most words of each of these captions; all together have at most 2 x `retrieved` x `words` tokens."""
    text: str = "a photo of"
    """Text after them."""
    features: str | None = None
    """A finished run with `retrieval:`, whose image features are used; `null`: those of `checkpoint`."""

    @property
    def tokens(self) -> int:
        """The most tokens before `text`, without the start token."""
        return 2 * self.retrieved * self.words


class ConceptPrompt(Section):
    """The concepts of the image before the text: `The image shows a, b. a photo of`.

    The sentence is that of the paper's stage 1; here the loss ignores it. Images that are trained on get
    their own true concepts. All others get the concepts that another run has predicted, which have mistakes.
    So the model learns to trust its prompt more than it can when it captions.
    """

    concepts: str
    """A finished run with concepts on the same data, of `task: concepts` or with the section `concepts`."""
    most: whole(1, 100) = 10
    """Most concepts of an image, the first of its list; together at most 12 x (`most` + 1) tokens."""
    text: str = "a photo of"
    """Text after them."""

    @property
    def tokens(self) -> int:
        """The most tokens before `text`, without the start token."""
        return 12 * (self.most + 1)


Prompt = str | RetrievedPrompt | ConceptPrompt
"""`model.prompt`: the same text for all images, or a text that begins with one of each image's own."""


class LoraConfig(Section):
    """Low-rank adapters (LoRA) in linear layers, whose own weights are then frozen."""

    rank: whole(1, 4096) = 16
    """Rank of an adapter's two matrices."""
    alpha: Positive = 32.0
    """The adapter's output is scaled by alpha / rank."""
    dropout: Share = 0.05
    """Dropout before an adapter."""
    targets: tuple[str, ...] = ()
    """Names of the layers to adapt, such as [q_proj, v_proj]; empty: all of attention and MLPs."""
    parts: tuple[Literal["language", "vision"], ...] = Field(("language",), min_length=1)
    """The parts to adapt. Their weights are frozen, whatever `train.train_vision` says."""


class ConnectorConfig(Section):
    """What leads from the image encoder of family `prefix` to its language model; it is trained."""

    kind: Literal["linear", "mlp", "pooled"] = "linear"
    """All kinds begin with a layer norm. linear: one matrix; mlp: two, with GELU between them; pooled: as
    linear, on the means of the encoder's features over `tokens` parts of the image."""
    tokens: Tokens | None = None
    """How many tokens the language model reads for an image.

    `pooled` needs a number. The other kinds take `null` and give as many tokens as the encoder does.
    """
    checkpoint: str | None = None
    """A folder with the weights of a connector of the same kind, from `harness export`; `null`: it is new."""

    @model_validator(mode="after")
    def _pools_to_tokens(self) -> "ConnectorConfig":
        if (self.kind == "pooled") != (self.tokens is not None):
            what = (
                f"kind {self.kind} and tokens {self.tokens}: pooled needs tokens, and other kinds have none"
            )
            raise AcrossKeys(what, "kind", "tokens")
        return self


class _TextOrMapping:
    """Validates a `Prompt`; errors name the key and not a branch of a union."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_wrap_validator_function(
            lambda value, check: _prompt(value),
            handler(source),  # tells studies which types are allowed
            serialization=core_schema.simple_ser_schema("any"),
        )


def _prompt(value: Any) -> Prompt:
    if isinstance(value, str | RetrievedPrompt | ConceptPrompt):
        return value
    if not isinstance(value, Mapping):
        what = "a text or a mapping with the key retrieved or concepts is allowed"
        raise ValueError(f"got {value!r}; {what}")
    if {"retrieved", "concepts"} <= value.keys():
        raise ValueError("has retrieved and concepts; one of the two is allowed")
    return (ConceptPrompt if "concepts" in value else RetrievedPrompt).model_validate(value)


class ModelConfig(Section):
    """The captioning model to fine-tune."""

    family: Literal[*FAMILIES] = "blip2"
    """The kind of model in `checkpoint`: how it is built, trained and decoded."""
    checkpoint: str = "Salesforce/blip2-opt-2.7b-coco"
    """A hub name, a local folder, or `tiny`: a small stand-in built from the training captions."""
    image_size: Side = 364
    """Side in pixels of the square to which images are resized; the position table is resized too.

    `vlm`: images keep their shape, and this is the most pixels of their longer side.
    """
    language_model: bool = True
    """false: no language model; the Q-Former's own head is trained on captions and decodes them."""
    language_checkpoint: str | None = None
    """Another language model behind the Q-Former: any causal one of transformers (GPT-2, Llama, Qwen, ...).

    The projection that leads to it is new and must be trained. Family `prefix` needs this key.
    """
    vision_checkpoint: str | None = None
    """Families `prefix` and `encoder`: the image encoder, any of transformers' `AutoModel` (ViT, CLIP, ...).

    Of a BLIP-2 it is the image tower. `tiny`: a small ViT that is built from the training images and their
    concepts.
    """
    connector: ConnectorConfig = ConnectorConfig()
    """Family `prefix`: what leads from the image encoder to the language model."""
    lora: LoraConfig | None = None
    """Adapters (LoRA); `null`: none."""
    text_checkpoint: str | None = None
    """Source of the Q-Former's text path if `checkpoint` lacks it, such as Salesforce/blip2-itm-vit-g."""
    text_head_checkpoint: str | None = None
    """Source of the Q-Former's language-model head if `checkpoint` lacks it, such as bert-base-uncased."""
    prompt: Annotated[Prompt, _TextOrMapping(), "text or mapping"] = "a photo of"
    """Text before every caption; for the family vlm the user turn. The loss ignores it, as in LAVIS.

    A mapping adds similar captions, or concepts.
    """
    tiny: TinyConfig = TinyConfig()
    """Sizes of the `tiny` checkpoint."""


def prompt_text(prompt: Prompt) -> str:
    """The part of a prompt that is the same for all images."""
    return prompt if isinstance(prompt, str) else prompt.text


def longest_prompt(prompt: Prompt) -> int:
    """The most tokens of a prompt that differ between images."""
    return 0 if isinstance(prompt, str) else prompt.tokens
