"""Tests whose oracle works beside transformers 4 only."""

from importlib import metadata

import pytest

beside_4 = pytest.mark.skipif(
    int(metadata.version("transformers").split(".")[0]) > 4,
    reason="bleurt-pytorch, slow tokenizers and bert-score on blank texts need transformers 4",
)
