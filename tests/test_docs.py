"""The reference agrees with the code, every key has its own docstring, and every link works."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from harness.cli import app
from harness.config import reference
from harness.config.editions import EDITIONS
from harness.config.schema import Config
from harness.config.sections import Section
from harness.data.readers import LAYOUTS, read

ROOT = Path(__file__).parents[1]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "submissions" / "README.md",
]
LINKS = re.compile(r"""(?:\]\(|src="|srcset=")([^)"]+)[)"]""")
PICTURES = sorted(file for kind in ("png", "svg") for file in (ROOT / "docs").glob(f"*.{kind}"))


def printed() -> str:
    return CliRunner().invoke(app, ["reference"], catch_exceptions=False).stdout


def sections(section: type[Section] = Config) -> Iterator[type[Section]]:
    yield section
    for field in section.model_fields.values():
        for inner in reference._inner(field.annotation):
            yield from sections(inner)


def test_the_reference_is_not_stale():
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert text == printed(), f"docs/reference.md is stale; run: {reference.COMMAND}"


@pytest.mark.parametrize(
    "section",
    list(sections()),
    ids=lambda section: section.__name__,
)
def test_every_key_has_a_docstring_of_its_own(section):
    assert vars(section)["__doc__"]
    texts = [field.description for field in section.model_fields.values()]
    assert all(texts)
    assert len(texts) == len(set(texts))


@pytest.mark.parametrize(
    ("key", "kind", "default"),
    [
        ("train.batch_size", "a whole number from 1 to 100,000", "`128`"),
        ("train.betas", "list of 2 times a number from 0 to below 1", "`[0.9, 0.999]`"),
        ("train.dropout", "a number from 0 to 1 or `null`", "`null`"),
        ("data.root", "path", "required"),
        ("predict.splits", "list of `valid` or `test`", '`["valid", "test"]`'),
        ("model.checkpoint", "text", '`"Salesforce/blip2-opt-2.7b-coco"`'),
    ],
)
def test_the_reference_has_type_range_and_default(key, kind, default):
    assert f"| `{key}` | {kind} | {default} | " in printed()


def test_the_reference_has_the_ranking_rules_of_the_editions():
    (row,) = re.findall(r"^\| ranks \| (.+) \|$", printed(), re.MULTILINE)
    assert row.split(" | ") == [edition.ranking for edition in EDITIONS.values()]


def test_every_command_has_a_panel_and_an_example():
    commands = re.findall(r"^\| `([a-z ]+)` \|", printed().partition("\n## Commands\n")[2], re.MULTILINE)
    assert {"run", "score", "submission make", "data check"} <= set(commands)
    for command in commands:
        text = CliRunner().invoke(app, [*command.split(), "--help"], catch_exceptions=False).stdout
        assert f"Example: harness {command}".removesuffix(" run") in text
    assert "─ Commands ─" not in CliRunner().invoke(app, ["--help"], catch_exceptions=False).stdout


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_that_stand_beside_a_command_are_its_own(page):
    rows = re.findall(
        r"`((?:run|best|doctor|study|score|compare|report|sync)) (--[a-z-]+)", page.read_text("utf-8")
    )
    for command, option in rows:
        asked = ["study", "run"] if command == "study" else [command]
        shown = CliRunner().invoke(app, [*asked, "--help"], env={"COLUMNS": "200"}).stdout
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", shown), f"{command} has no {option}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in LINKS.findall(page.read_text(encoding="utf-8")):
        if "://" not in target:
            name, _, anchor = target.partition("#")
            there = page.parent / name if name else page
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), target


def test_the_table_of_rooms_names_all_of_them():
    text = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
    table = text[text.index("## The rooms of") : text.index("## A metric")]
    named = re.findall(
        r"`([\w.]+?)/?`", "\n".join(line.split("|")[1] for line in table.splitlines() if "|" in line)
    )
    there = [
        p.name
        for p in (ROOT / "harness").iterdir()
        if not p.name.startswith("__") and p.suffix in ("", ".py")
    ]
    assert sorted(named) == sorted(there)


def test_pictures_are_small_and_shown():
    shown = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert len(PICTURES) >= 4
    for picture in PICTURES:
        assert picture.stat().st_size < 150_000
        assert picture.name in shown


def test_the_two_pictures_of_the_flow_differ_in_colours_alone():
    light, dark = (
        (ROOT / "docs" / f"flow-{name}.svg").read_text(encoding="utf-8") for name in ("light", "dark")
    )
    color = re.compile(r"#[0-9a-f]{6}\b")
    assert light != dark
    assert color.sub("", light) == color.sub("", dark)


def test_the_sample_rows_of_each_layout_are_read(tmp_path):
    text = (ROOT / "docs" / "own-data.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\n(ID<tab>.+?)```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2  # captions and concepts
    for column, layout in enumerate(("imageclef2023", "imageclef2024")):
        how, root = LAYOUTS[layout], tmp_path / layout
        for split in ("train", "valid"):
            (root / split).mkdir(parents=True)
            for name in ("img_0001.jpg", "img_0002.jpg"):
                (root / split / name).touch()
            for name, block in zip((how.captions, how.concepts), blocks, strict=True):
                rows = [re.split(r" {3,}", line)[column] for line in block.splitlines()]
                lines = "".join(f"{row}\n" for row in rows).replace("<tab>", "\t")
                (root / name.format(split=split)).write_text(lines)
        listing = read(root, layout)
        assert not listing.fatal
        assert not listing.findings
        assert [len(listing.splits[split]) for split in ("train", "valid")] == [2, 2]
