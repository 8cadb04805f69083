"""User turns and answers of vision-language models: chat templates, end of turn, tokens in context."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import Problem, UserError
from harness.models.text import Codec, Text
from harness.models.vlm.architectures import Architecture

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANSWER = "ANSWER"


@dataclass(frozen=True, kw_only=True)
class TurnCodec(Codec):
    """The codec of a user turn with an image and of the answer to it; the image is one token of the prompt.

    `turn` gives the text before the answer from the user's words, `ids` the ids of a text. An answer is taken
    apart in its context, because tokenizers of SentencePiece begin a text of its own in another way.
    """

    turn: Callable[[str], str]
    ids: Callable[[str], list[int]]

    def prompt_after(self, text: str, most: int) -> tuple[int, ...]:
        """The ids of a user turn that begins with a text of its own, cut to `most` tokens."""
        if not text:
            return self.prompt
        own = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids[:most]
        kept = self.tokenizer.decode(own, skip_special_tokens=True)
        return tuple(self.ids(self.turn(f"{kept} {self.words}".strip())))

    def encode(self, text: str, prompt: Sequence[int] | None = None) -> Text:
        """The ids of an answer, cut to `max_tokens` with the end token; see `Codec.encode`."""
        both = self.ids(self.turn(self.words) + self.separator + text)
        length = len(self.prompt)
        if tuple(both[:length]) != self.prompt:
            return super().encode(text, prompt)
        prompt = self.prompt if prompt is None else prompt
        answer = both[length : length + self.max_tokens - 1]
        return Text([*prompt, *answer, self.end], len(prompt))


def turn_codec(
    processor: Any, folder: Path, kind: str, architecture: Architecture, words: str, max_tokens: int
) -> TurnCodec:
    """The codec of a model of this type, whose user turns are `words` with the image.

    Raises `UserError` if a user turn does not have one image token.
    """
    tokenizer = processor.tokenizer
    template = getattr(processor, "chat_template", None) or _template(folder, tokenizer)

    def rendered(said: str, answer: str | None = None) -> str:
        if template is None:
            plain = architecture.plain.format(prompt=said)
            return plain if answer is None else plain + architecture.separator + answer
        content = [{"type": "image"}, *([{"type": "text", "text": said}] if said else [])]
        chat = [{"role": "user", "content": content}]
        if answer is not None:
            chat.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return tokenizer.apply_chat_template(
            chat, chat_template=template, tokenize=False, add_generation_prompt=answer is None
        )

    def turn(said: str) -> str:
        return _with_one_image(kind, rendered(said), processor)

    def ids(text: str) -> list[int]:
        return _ids(kind, text, processor)

    before = rendered(words)
    separator, end = _answer(before, rendered(words, _ANSWER), tokenizer, architecture.separator)
    pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    prompt = tuple(ids(turn(words)))
    if (found := prompt.count(image_token(kind, processor))) != 1:
        hint = "model.prompt must not hold the image's token, and the chat template must place one image."
        raise UserError([Problem(f"the user turn has {found} image tokens", key="model.prompt", hint=hint)])
    settings = {"separator": separator, "words": words, "turn": turn, "ids": ids}
    return TurnCodec(tokenizer, prompt, end, pad, max_tokens, **settings)


def blip_codec(tokenizer: "PreTrainedTokenizerBase", start: int, words: str, max_tokens: int) -> Codec:
    """The codec of BLIP: its start token in place of BERT's, the words, the caption, [SEP]."""
    ids = tokenizer(words, add_special_tokens=False).input_ids if words else []
    end, pad = tokenizer.sep_token_id, tokenizer.pad_token_id
    return Codec(tokenizer, (start, *ids), end, pad, max_tokens, words=words)


def image_token(kind: str, processor: Any) -> int:
    """The id of the token that stands for the image."""
    if kind == "instructblip":
        return processor.tokenizer.convert_tokens_to_ids(str(processor.image_token))
    if kind == "gemma3":  # its processor of transformers 5 has the token that begins an image by this name
        return processor.tokenizer.image_token_id
    return processor.image_token_id


def _with_one_image(kind: str, text: str, processor: Any) -> str:
    """The text as the processor hands it to the tokenizer, if each image were one token."""
    tokenizer = processor.tokenizer
    if kind == "gemma3":
        image = f"\n\n{tokenizer.boi_token}{tokenizer.image_token}{tokenizer.eoi_token}\n\n"
        return text.replace(tokenizer.boi_token, image)
    if kind == "paligemma":
        return f"{processor.image_token}{tokenizer.bos_token}{text}\n"
    return text


def _ids(kind: str, text: str, processor: Any) -> list[int]:
    """The ids of a text, with the start token once."""
    start = processor.tokenizer.bos_token
    starts = bool(start) and text.startswith(start)
    found = processor.tokenizer(text, add_special_tokens=not starts, verbose=False).input_ids
    return [image_token(kind, processor), *found] if kind == "instructblip" else found


def _template(folder: Path, tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """The chat template of a checkpoint whose processor has none, from its tokenizer or its own file."""
    file = folder / "chat_template.json"  # of checkpoints from before 2025
    if tokenizer.chat_template is None and file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))["chat_template"]
    return tokenizer.chat_template


def _answer(before: str, whole: str, tokenizer: "PreTrainedTokenizerBase", separator: str) -> tuple[str, int]:
    """What stands between a user turn and its answer, and the end token, from the text with an answer."""
    if whole.startswith(before):
        separator, _, after = whole[len(before) :].partition(_ANSWER)
        for token, number in tokenizer.get_added_vocab().items():
            if after.lstrip().startswith(token):
                return separator, number
    return separator, tokenizer.eos_token_id
