"""Damaged experiment and study files: read, or refused with file and line, within seconds."""

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from support.fuzzing import cases, within

from harness.config.experiment import base_of, load, variant_of
from harness.config.schema import keys
from harness.errors import UserError
from harness.store import fingerprint
from harness.study.spec import load as load_study

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
SEEDS = [*sorted(EXPERIMENTS.glob("*.yaml"))]
LIMIT = 10
"""Seconds for one file: a hundred times what one takes, on a machine that is shared."""
VALUES = re.split(
    r"\s+",
    r""".nan .inf -.inf 1e-5 1e999 1.0e+999 18446744073709551616 100000000000000000000 -1 0 0x_
    0b_ 012 1:30 1_0 0.5 true no ~ null 2024-01-01 2024-99-99 "" "\0" "\ud800" "\e[2J"
    tiny '[]' [] {}
    [1,2] {a:1} [[]] {[a]:b} &a *a *b !!int !!float !!bool !!binary !!set
    !!python/object:os.system !include << = ? : -
    | > % @ ` &a[*a] {<<:*a} {seed:1,seed:2} /dev/null ../.. . base.yaml yes
    9999999999999999999999999999999999999999""",
)


def a_value(draw: random.Random, text: str) -> str:
    """Another value behind a key."""
    lines = text.split("\n")
    at = draw.randrange(len(lines))
    key, colon, _ = lines[at].partition(":")
    lines[at] = f"{key}{colon} {draw.choice(VALUES)}"
    return "\n".join(lines)


def a_key(draw: random.Random, text: str) -> str:
    """One more key, known or not, at any depth."""
    path = draw.choice([*keys(), ("seeds",), ("variants",), ("base",), ("space",), ("<<",), ("x\x1b",)])
    value: object = draw.choice(VALUES)
    for name in reversed(path):
        value = f"{{{name}: {value}}}"
    return f"{text}\n{str(value)[1:-1]}\n"


def a_line_twice(draw: random.Random, text: str) -> str:
    lines = text.split("\n")
    at = draw.randrange(len(lines))
    return "\n".join([*lines[: at + 1], lines[at], *lines[at + 1 :]])


def cut(draw: random.Random, text: str) -> str:
    return text[: draw.randrange(len(text) + 1)]


def a_sign(draw: random.Random, text: str) -> str:
    at = draw.randrange(len(text) + 1)
    sign = draw.choice("\0\t\r\n{}[]:,&*!|>'\"%@`#-?\x07\x85\u2028\ufeff\u202e\U0001f600é")
    return text[:at] + sign * draw.choice((1, 1, 1, 2000)) + text[at:]


def deep(draw: random.Random, text: str) -> str:
    levels = draw.choice((10, 100, 5000))
    inside = draw.choice(("[" * levels, "{a: " * levels, "- " * levels, "[" * levels + "]" * levels))
    return f"{text}\nx: {inside}\n"


def laughs(draw: random.Random, text: str) -> str:
    """Aliases of aliases, as lists, as mappings or merged."""
    shape = draw.choice(("[{}]", "{{a: [{}]}}", "{{<<: [{}]}}"))
    levels = range(1, draw.choice((2, 8, 30)))
    above = (f"x{level}: &x{level} " + shape.format(", ".join([f"*x{level - 1}"] * 9)) for level in levels)
    return "\n".join([text, "x0: &x0 {a: 1}", *above, ""])


def wide(draw: random.Random, text: str) -> str:
    count = draw.choice((60, 2000, 20_000))
    what = draw.choice(("k{}: {}\n", "# {} {}\n", "variants{}: {{a: {}}}\n"))
    return text + "\n" + "".join(what.format(n, n) for n in range(count))


CHANGES: list[Callable[[random.Random, str], str]] = [
    a_value, a_value, a_key, a_key, a_line_twice, cut, a_sign, deep, laughs, wide,
]  # fmt: skip


def broken(draw: random.Random) -> bytes:
    text = draw.choice(SEEDS).read_text(encoding="utf-8")
    for _ in range(draw.choice((1, 1, 2, 4))):
        text = draw.choice(CHANGES)(draw, text)
    encoding = draw.choices(("utf-8", "utf-8-sig", "utf-16", "latin-1"), (20, 1, 1, 1))[0]
    content = bytearray(text.encode(encoding, "surrogatepass" if encoding == "utf-8" else "replace"))
    if content and draw.random() < 0.1:
        content[draw.randrange(len(content))] = draw.randrange(256)
    return bytes(content)


def read(file: Path, sets: list[str]) -> None:
    """All that `--dry-run` and `study show` read of a file."""
    for config in load(file, sets):
        fingerprint(config.model_dump())
        yaml.safe_dump(config.model_dump(mode="json"), allow_unicode=True).encode()
        base_of(file, config.variant)
        variant_of(file, config.variant)


def refused(reader: Callable[[], object]) -> UserError | None:
    try:
        reader()
    except UserError as error:
        return error
    return None


@pytest.mark.parametrize("case", range(cases(150)))
def test_a_broken_file_is_read_or_refused_with_its_place(tmp_path, case):
    draw = random.Random(case)
    for shipped in SEEDS:
        (tmp_path / shipped.name).write_bytes(shipped.read_bytes())
    file = tmp_path / "e.yaml"
    file.write_bytes(broken(draw))
    key = ".".join(draw.choice(list(keys())))
    sets = draw.choice(([], [], [f"{key}={draw.choice(VALUES)}"]))
    for reader in (lambda: read(file, sets), lambda: load_study(file, sets)):
        with within(LIMIT, case):
            refusal = refused(reader)
        if refusal is not None:
            assert refusal.exit_code == 2
            assert refusal.problems
            str(refusal).encode()
            assert all(p.what and (p.file or "--set" in p.what) for p in refusal.problems)
