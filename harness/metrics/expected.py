"""Remarks of libraries that say nothing new to a person who scores: they stay off the terminal."""

import contextlib
import logging
import os
from collections.abc import Iterator

REMARKS = (
    # texts are cut, and the rows that were are named in a warning of ours
    "Token indices sequence length is longer than the specified maximum",
    "Be aware, overflowing tokens are not returned",
    # as BLEURT's tokenizer is used here, to bring texts of like length together
    "You're using a ",
    # BLEURT's tokenizer is another one than BERT's, whose files it reads
    "The tokenizer class you load from this checkpoint is not the same type",
    # what a checkpoint lacks is an error of ours, where it is used
    "Some weights of ",
)


class _Unexpected(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(REMARKS)


_unexpected = _Unexpected()


def quieten() -> None:
    """Keep `REMARKS` of transformers from the terminal, and nothing else."""
    from transformers.utils import logging as theirs

    theirs.get_logger()  # gives the library its handler
    for handler in logging.getLogger("transformers").handlers:
        handler.addFilter(_unexpected)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """What a package and its Java say of their progress, kept off the terminal; errors are raised."""
    kept = os.dup(2)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
