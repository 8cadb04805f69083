"""HTML pages in one file: a template with its styles and scripts, and data that can't become code."""

import json
import os
import re
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from harness.output.visible import visible
from harness.store import finite


def filled(template: str, data: Any) -> str:
    """A template of this folder with the styles and scripts that it names, and the data as JSON.

    The data can't become markup: in a JSON string "</script>" would end the element, and "<!--" would hide
    its end. Characters that reverse text or are invisible become escapes, as on a terminal. NaN and infinity
    are shown as absent values.
    """
    text = json.dumps(_shown(finite(data)), allow_nan=False, separators=(",", ":"))
    text = text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    # one pass, so that nothing in the data or in a script is taken for a name
    return re.sub(r"{{([\w.]+)}}", lambda one: text if one[1] == "data" else _file(one[1]), _file(template))


def link(path: Path, page: Path) -> str:
    """A path as a link from the folder `page`."""
    return quote(os.path.relpath(path, page).replace(os.sep, "/"))


def _file(name: str) -> str:
    return files("harness.pages").joinpath(name).read_text(encoding="utf-8")


def _shown(value: Any) -> Any:
    """The data with `visible` texts."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, dict):
        return {_shown(key): _shown(one) for key, one in value.items()}
    return [_shown(one) for one in value] if isinstance(value, list | tuple) else value
