"""Library messages that are expected while scoring; they are kept off the terminal."""

import contextlib
import logging
import os
from collections.abc import Iterator

REMARKS = (
    # our own warning names the rows that were cut
    "Token indices sequence length is longer than the specified maximum",
    "Be aware, overflowing tokens are not returned",
    # about `pad`, which BLEURT's tokenizer is used with to batch texts of similar length
    "You're using a ",
    # BLEURT's tokenizer reads the files of BERT's tokenizer
    "The tokenizer class you load from this checkpoint is not the same type",
    # missing weights that are used raise our own error
    "Some weights of ",
)


class _Unexpected(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(REMARKS)


_unexpected = _Unexpected()


def quieten() -> None:
    """Keep `REMARKS` of transformers from the terminal, and nothing else."""
    from transformers.utils import logging as theirs

    theirs.get_logger()  # creates the library's handler
    for handler in logging.getLogger("transformers").handlers:
        handler.addFilter(_unexpected)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Keeps progress messages of a package and its Java off the terminal; errors are still raised."""
    kept = os.dup(2)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
