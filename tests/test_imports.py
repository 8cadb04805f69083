"""Test files do not import each other; shared code is in tests/support/."""

import re
from pathlib import Path

HERE = Path(__file__).parent
TEST = re.compile(r"\b(?:from|import)\s+(?:tests\.|\.*test_)|import_module\(.(?:tests\.|\.*test_)")


def test_the_pattern_finds_an_import_of_a_test_file():
    name = "test_run"
    for line in (f"import {name}", f"from {name} import x", f"from .{name} import x", "import tests.x"):
        assert TEST.search(line), line
    assert not TEST.search("from support.commands import harness")


def test_no_file_imports_a_test_file():
    """Code that a test gives to another Python counts, too."""
    files = [file for file in HERE.rglob("*.py") if file != Path(__file__)]
    assert len(files) > 90
    found = [f"{f.name}: {hit[0]}" for f in files for hit in TEST.finditer(f.read_text(encoding="utf-8"))]
    assert found == []


def test_helpers_are_in_support():
    others = [file.name for file in HERE.glob("*.py") if not file.name.startswith("test_")]
    assert others == ["conftest.py"]
