"""Whether a model of transformers can write the captions of a model before it; no weights are read."""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import Problem, UserError
from harness.models import checkpoints as files
from harness.models.needs import as_user_error

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from harness.models.text import Codec

KEY = "model.language_checkpoint"
_WRITES = ("ForCausalLM", "LMHeadModel")
"""How transformers ends the names of classes that continue a text."""
_HINT = "Name one that AutoModelForCausalLM of transformers reads, such as distilgpt2."


def problems(folder: Path) -> list[Problem]:
    """The problem of a checkpoint whose `config.json` is of no causal language model; without torch."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    classes = config.get("architectures") or ()
    if any(str(name).endswith(_WRITES) for name in classes) if classes else "vocab_size" in config:
        return []
    kind = ", ".join(map(str, classes)) or f"a model of type {config.get('model_type')}"
    what = f"{folder} holds {kind}, which is no causal language model"
    return [Problem(what, key=KEY, hint=_HINT)]


def codec(name: str, prompt: str, max_tokens: int) -> "Codec":
    """The codec of captions by the checkpoint `name`: start, prompt, caption, end.

    Raises `UserError` if its config or tokenizer can't be read, or if neither has an end token.
    """
    from transformers import AutoConfig, AutoTokenizer

    from harness.models.blip2.text import language_codec

    folder = files.find(name).folder
    with as_user_error(f"the tokenizer of {folder}", KEY):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    with as_user_error(f"the config of {folder}", KEY):
        values = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    found = language_codec(tokenizer, values, prompt, max_tokens)
    if found.end is None or found.end >= values.vocab_size:
        what = f"the config and tokenizer of {folder} have no usable end token, so no caption would end"
        raise UserError([Problem(what, key=KEY)])
    return found


def room(config: "PretrainedConfig") -> int | None:
    """The most tokens that each layer of a language model attends to; None if nothing limits them."""
    sliding = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)
    limits = [getattr(config, "max_position_embeddings", None), sliding]
    return min(filter(None, limits), default=None)


def check(language: "PreTrainedModel") -> None:
    """Raise `UserError` if `cache.Speaker` can't decode by a language model; nothing else finds it so early.

    Such models read both ways, need an encoder, or keep something else than the keys and values of each
    layer, as Mamba does. Call it in `contentless.without_contents`.
    """
    why = "keeps a state, not the keys and values of tokens" if language._is_stateful else None
    if why := why or _no_decoder(language.config):
        raise UserError([Problem(f"{type(language).__name__} {why}", key=KEY, hint=_HINT)])
    remarks = logging.getLogger("torch._subclasses.fake_tensor")  # it writes a traceback for each error
    before, remarks.disabled = remarks.disabled, True
    try:
        _try(language)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        if type(error).__module__.startswith("torch._subclasses"):  # such as experts, chosen by contents
            return
        first = str(error).strip().partition("\n")[0][:200]
        what = f"harness can't decode by {type(language).__name__}: {type(error).__name__}: {first}"
        hint = f"It keeps keys and values of each layer, and gives one mask for all rows. {_HINT}"
        raise UserError([Problem(what, key=KEY, hint=hint)]) from error
    finally:
        remarks.disabled = before


def _try(language: "PreTrainedModel") -> None:
    """Decode two tokens of three rows after a prefix, as in a run."""
    import torch

    from harness.models.cache import Speaker

    if hasattr(language, "set_experts_implementation"):  # in transformers 5; its others need contents
        language.set_experts_implementation("eager")
    with torch.no_grad():
        prefix = language.get_input_embeddings()(torch.zeros(1, 3, dtype=torch.long))
        begun = Speaker(language, 3, 2)(prefix)
        begun.step(torch.zeros(3, dtype=torch.long))
        begun.step(torch.zeros(3, dtype=torch.long))


def _no_decoder(config: "PretrainedConfig") -> str | None:
    """Why a model does not continue texts, although its class is among those that do; None if it does."""
    from transformers import MODEL_FOR_MASKED_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

    if type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return "is half of a model with an encoder, and needs it"
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        return "reads texts in both directions: is_decoder is not true in its config"
    return None
