"""What loading a tokenizer or processor of transformers lacks on this machine, in words; no torch."""

import contextlib
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from harness.errors import Problem, UserError

if TYPE_CHECKING:
    from harness.training.settings import TrainConfig

PACKAGES = ("sentencepiece", "protobuf", "tiktoken", "torchvision", "timm", "num2words", "av", "decord")
"""What tokenizers and processors of transformers may need besides what the harness installs."""
_UNKNOWN = r"does not (exist|recognize)|[Uu]nrecognized|should have a `model_type`"
"""In what transformers says about classes and types of models that it does not have."""


@contextlib.contextmanager
def as_user_error(what: str, key: str) -> Iterator[None]:
    """Raise `UserError` for anything that is raised in this block, where `what` is loaded; key of the config.

    All kinds of errors, since the code of any tokenizer or processor of transformers runs in it.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        why = f"{type(error).__name__}: {said[:200]}{'...' if len(said) > 200 else ''}"
        raise UserError([Problem(f"{what} can't be loaded: {why}", key=key, hint=_hint(said))]) from error


def lengths(train: "TrainConfig", new_tokens: int) -> dict[str, int]:
    """The tokens that captions may have while training and decoding, by the key of the config."""
    found = {"train.max_caption_tokens": train.max_caption_tokens, "predict.max_new_tokens": new_tokens}
    for number, stage in enumerate(train.stages):
        if stage.reward:
            found[f"train.stages.{number}.reward.max_new_tokens"] = stage.reward.max_new_tokens
    return found


def too_long(room: int | None, before: int, new: int, key: str, shorter: str = "") -> list[Problem]:
    """The problem of a language model that can't read `before` tokens and `new` ones after them.

    `room` is the most that it reads; None: any number. `shorter` says how an image gets fewer tokens.
    """
    if room is None or before + new <= room:
        return []
    what = f"image and prompt have {before} tokens, and {new} follow; the language model reads {room}"
    return [Problem(what, key=key, hint=f"Lower {key}{shorter}.")]


def _hint(said: str) -> str | None:
    """The next command after an error of transformers, if what it says tells that."""
    named = [name for name in PACKAGES if re.search(rf"\b{name}\b", said, re.IGNORECASE)]
    # an image processor of this kind exists for torchvision alone
    named += ["torchvision"] if "does not have a slow version" in said else []
    if lacking := [name for name in named if not _is_installed(name)]:
        return f"Install what it needs: pip install {' '.join(dict.fromkeys(lacking))}"
    if re.search(_UNKNOWN, said):
        return f"Another version of transformers may read it; this one is {version('transformers')}."
    return None


def _is_installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False
