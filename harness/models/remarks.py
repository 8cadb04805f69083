"""What libraries say although it is expected; it is kept off the terminal."""

import logging

REMARKS = (
    # our own warning names the rows that were cut
    "Token indices sequence length is longer than the specified maximum",
    "Be aware, overflowing tokens are not returned",
    # about `pad`, which CLIP's tokenizer is used with to batch texts of similar length
    "You're using a ",
    # BLEURT's tokenizer reads the files of BERT's tokenizer
    "The tokenizer class you load from this checkpoint is not the same type",
    # missing weights that are used raise our own error
    "Some weights of ",
    # transformers 5: the same pixels by PIL
    "`BlipImageProcessor` requires torchvision",
    "`CLIPImageProcessor` requires torchvision",
    "The `use_fast` parameter is deprecated",
    # transformers 4: of the processor as a whole, which then gets an image processor that was asked for
    "Using a slow image processor as `use_fast` is unset",
)


class _Unexpected(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(REMARKS)


_unexpected = _Unexpected()


def quieten() -> None:
    """Keep `REMARKS` of transformers and its progress bars from the terminal, and nothing else."""
    from transformers.utils import logging as theirs

    theirs.disable_progress_bar()
    theirs.get_logger()  # creates the library's handler
    for handler in logging.getLogger("transformers").handlers:
        handler.addFilter(_unexpected)
