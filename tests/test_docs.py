"""The guide says of every key what the schema says, and every link and command in it leads somewhere."""

import json
import re
from pathlib import Path

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from harness.config.editions import EDITIONS
from harness.config.schema import Config, _sections, keys

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "guide.md"
PAGES = [*sorted(ROOT.glob("*.md")), GUIDE, ROOT / "docs" / "security.md", ROOT / "submissions" / "README.md"]


def key_rows() -> dict[str, tuple[str, str]]:
    """Default and meaning by key, from the tables of the guide."""
    pattern = re.compile(r"^\| `([a-z0-9_.]+)` \| (.+?) \| (.*) \|$", re.MULTILINE)
    section = GUIDE.read_text(encoding="utf-8").partition("\n## Every key\n")[2].partition("\n## ")[0]
    found = pattern.findall(section)
    assert len(found) == len({key for key, *_ in found})
    return {key: (default, meaning) for key, default, meaning in found}


def field(path: tuple[str, ...]) -> FieldInfo:
    section: type[BaseModel] = Config
    for name in path[:-1]:
        if name == "0":  # an entry of a list
            continue
        section = _sections(section.model_fields[name].annotation)[0]
    return section.model_fields[path[-1]]


def shown(default: object) -> str:
    if default is PydanticUndefined:
        return "required"
    if isinstance(default, tuple) and any(isinstance(entry, BaseModel) for entry in default):
        default = [entry.model_dump(exclude_defaults=True) for entry in default]
    return "a section" if isinstance(default, BaseModel) else f"`{json.dumps(default)}`"


def test_the_guide_has_every_key_and_no_other():
    assert list(key_rows()) == [".".join(path) for path in keys()]


@pytest.mark.parametrize("path", keys(), ids=".".join)
def test_the_guide_tells_a_key_as_the_schema_does(path):
    default, meaning = key_rows()[".".join(path)]
    assert default == shown(field(path).default)
    assert meaning.startswith(field(path).description or "")
    assert meaning


def test_the_ranking_rules_are_those_of_the_editions():
    text = GUIDE.read_text(encoding="utf-8")
    for year, edition in EDITIONS.items():
        row = next(line for line in text.splitlines() if re.match(rf"\| [\d, ]*{year}[\d, ]* \|", line))
        name = {"bertscore": "BERTScore", "overall": "overall", None: "not established"}[edition.primary]
        assert name in row.split("|")[2]
        established = {"pipe": "caption`", "csv-zip": "zip", None: "not established"}[edition.caption_format]
        assert established in row.split("|", 3)[3]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    anchors = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif "://" not in target:
            assert (page.parent / target.partition("#")[0]).exists(), target
