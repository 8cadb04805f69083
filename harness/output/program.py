"""How the user can start this program: every command in a message works where it is read.

Sources and documents write `harness run ...`, the installed script. A user who started the script by its path
(`make quickstart` does), or `python -m harness`, may not have it on the PATH. Then what is printed for
people has what works instead. JSON, CSV and records keep `harness`, since they are read elsewhere.
"""

import functools
import os
import re
import shutil
import sys
from pathlib import Path

_COMMANDS = (
    "best|caption|compare|consensus|data|doctor|export|gc|init|leaderboard|ls|reference|report|rm|run|score|soup|"
    "study|submission|sync"
)
# records of earlier versions have `python -m harness COMMAND`
_NAMED = re.compile(rf"(?<![\w./-])(?:python -m )?harness (?=(?:{_COMMANDS})\b)")


def spelled(text: str) -> str:
    """The text with every `harness COMMAND` as the user can type it."""
    return _NAMED.sub(lambda _: f"{program()} ", text)


@functools.cache
def program() -> str:
    """What starts this program here: harness, the script's path, or a Python with -m harness."""
    script = Path(sys.executable).with_name("harness")
    if script.is_file():
        return "harness" if shutil.which("harness") == str(script) else short(script)
    on_path = shutil.which("python") == sys.executable
    return f"{'python' if on_path else short(Path(sys.executable))} -m harness"


def short(path: Path) -> str:
    """A path from the working directory, if it is below it; as it is if that folder was deleted."""
    try:
        relative = os.path.relpath(path)
    except OSError:
        return str(path)
    return str(path) if relative.startswith("..") else relative
