"""Output on the terminal: hostile text through every command, and lost streams."""

import ast
import contextlib
import csv
import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support import commands
from support.leaderboards import record, write_run

from harness import pages
from harness.errors import Problem, UserError
from harness.output.visible import json_text, one_line, visible

ROOT = Path(__file__).parents[1]
SGR = "\x1b[8;5m"  # hides what follows
MARKUP = "[red]a[bold]:smile:"
HOSTILE = f"\x1b]52;c;aGk=\x07\x1b]0;own\x07{SGR}\u202e\u2066\x9b2J\u200b\u2028\x85\x7f\x08{MARKUP}"
LEGITIMATE = "Ωμέγα عربي 中文 é e\u0301 👩\u200d⚕\ufe0f می\u200cخواهم 3\u202fmm — ×"
STYLING = re.compile(r"\x1b\[[0-9;]*m|\r|\x1b\[(?:[0-9]*[AK]|\?25[lh])")  # colours, and moves of a bar
EXPERIMENT = "name: {}\ndata: {{root: x, {}: 1}}\n"


def hidden(text: str) -> set[str]:
    """The characters that a terminal obeys or does not show, beside line ends, tabs and joiners."""
    kinds = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return {char for char in text if unicodedata.category(char) in kinds} - set("\n\t\u200c\u200d")


def quoted(text: str) -> str:
    """A YAML scalar of any text."""
    return json.dumps(text)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Files and a run whose ids, names and values are hostile."""
    root = tmp_path_factory.mktemp("hostile")
    ids = ["".join(f"i{n}{HOSTILE}{LEGITIMATE}".split()) for n in range(3)]  # ids hold no white space
    (root / "labels.csv").write_text("ID\tcaption\n" + "".join(f"{one}\tct of a mass\n" for one in ids))
    (root / f"p{HOSTILE}.csv").write_text("".join(f"{one}|{HOSTILE} ct\n" for one in ids))
    (root / "other.csv").write_text("".join(f"{one}|ct of {LEGITIMATE}\n" for one in ids))
    (root / "few.csv").write_text(f"{ids[0]}|a\nx{HOSTILE}|b\n{ids[0]}|c\n")
    (root / "concepts.csv").write_text(f"ID\tcuis\n{ids[0]}\tC1;{HOSTILE}\n")
    (root / "set" / "train").mkdir(parents=True)
    (root / "set" / "train" / f"b{HOSTILE}.jpg").write_bytes(b"no image")
    prefix = "ImageCLEFmedical_Caption_2023_"
    for kind in ("caption_prediction", "concept_detection"):
        for split in ("train", "valid"):
            text = f"ID\tcaption\n{ids[0]}\t{HOSTILE}\n{HOSTILE}\n"
            (root / "set" / f"{prefix}{kind}_{split}_labels.csv").write_text(text)
    (root / "e.yaml").write_text(EXPERIMENT.format(quoted(HOSTILE), quoted(HOSTILE)))
    (root / "study.yaml").write_text(f"base: {quoted(HOSTILE)}\nname: s\n{quoted(HOSTILE)}: 1\n")
    (root / "leaderboard").mkdir()
    shutil.copy(ROOT / "leaderboard" / "2023.csv", root / "leaderboard")
    write_run(root, record("a", bertscore=0.6) | {"name": f"n{HOSTILE}", "command": HOSTILE})
    return root


PREDICTIONS = f"p{HOSTILE}.csv"
COMMANDS = {
    "score": ["score", PREDICTIONS, "--references", "labels.csv", "--metrics", "rouge1"],
    "score other ids": ["score", "few.csv", "--references", "labels.csv", "--metrics", "rouge1"],
    "score key": ["score", "few.csv", "--references", "labels.csv", "--set", f"score.{HOSTILE}=1"],
    "compare": ["compare", PREDICTIONS, "other.csv", "--references", "labels.csv", "--metrics", "rouge1"],
    "check": ["submission", "check", "few.csv", "--edition", "2023", "--ids", "labels.csv"],
    "make": ["submission", "make", "few.csv", "--edition", "2023", "--ids", "labels.csv"],
    "make to": [
        "submission",
        "make",
        "other.csv",
        "--edition",
        "2023",
        "--ids",
        "labels.csv",
        "--out",
        HOSTILE,
    ],
    "concepts": ["score", "concepts.csv", "--references", "concepts.csv", "--task", "concept"],
    "data": ["data", "check", "set"],
    "layout": ["data", "check", "set", "--layout", HOSTILE],
    "run": ["run", "e.yaml"],
    "dry run": ["run", f"nothing{HOSTILE}.yaml", "--dry-run"],
    "doctor": ["doctor", "e.yaml"],
    "study": ["study", "study.yaml"],
    "leaderboard": ["leaderboard"],
    "page": ["leaderboard", "--format", "html"],
    "report": ["report", f"runs/{HOSTILE}"],
    "sync": ["sync", f"runs/{HOSTILE}"],
    "no command": [HOSTILE],
    "no option": ["score", f"--{HOSTILE.replace('=', '')}"],
}


def on_terminal(place: Path, *arguments: str) -> str:
    """What a command writes to a terminal, where it may use colours."""
    parent, child = pty.openpty()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm-256color", "COLUMNS": "200"}
    with ThreadPoolExecutor(1) as beside:
        ended = beside.submit(commands.on_streams, place, arguments, environment, (child, child))
        ended.add_done_callback(lambda _: os.close(child))
        shown = b""
        with contextlib.suppress(OSError):  # how a terminal ends
            while part := os.read(parent, 1 << 16):
                shown += part
    os.close(parent)
    ended.result()
    return shown.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_from_outside_acts_on_a_terminal(place, name):
    shown = on_terminal(place, *COMMANDS[name])
    assert "Traceback" not in shown
    assert SGR not in shown
    assert not hidden(STYLING.sub("", shown))
    if r"\x1b" in shown and name != "no command":  # which typer quotes as Python does
        assert MARKUP in re.sub(r"\n *", "", shown)


@pytest.mark.parametrize("name", ["score", "compare", "data", "check", "leaderboard"])
def test_json_and_csv_are_valid_and_say_what_the_files_say(place, name):
    done = commands.harness(place, *COMMANDS[name], "--format", "json", code=None)
    assert not hidden(done.stdout + done.stderr)
    found = json.loads(done.stdout)
    if name in ("compare", "leaderboard"):
        assert HOSTILE in "\n".join(strings(found))
    if name == "compare":
        done = commands.harness(place, *COMMANDS[name], "--format", "csv")
        assert PREDICTIONS in {row["a"] for row in csv.DictReader(io.StringIO(done.stdout, newline=""))}
        assert not hidden(on_terminal(place, *COMMANDS[name], "--format", "csv"))


def strings(value) -> list[str]:
    if isinstance(value, dict | list):
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        return [text for part in parts for text in strings(part)]
    return [value] if isinstance(value, str) else []


def test_legitimate_text_stays_readable():
    assert visible(LEGITIMATE) == LEGITIMATE
    assert one_line(f"{LEGITIMATE}\t") == f"{LEGITIMATE}\t"
    assert json.loads(json_text([LEGITIMATE])) == [LEGITIMATE]
    assert LEGITIMATE in json_text([LEGITIMATE])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[0m\x07", r"\x1b[0m\x07"),
        ("a\u202eb\u2069", r"a\u202eb\u2069"),
        ("\x00\x9b\x85\xad", r"\x00\x9b\x85\xad"),
        ("a\u200db \u200c", r"a\u200db \u200c"),
        ("\udc80\ufeff\U000e0041", r"\udc80\ufeff\U000e0041"),
        ("\r\u2028\u3164", r"\r\u2028\u3164"),
    ],
)
def test_what_acts_or_hides_is_written_out(text, shown):
    assert visible(text) == shown
    assert json.loads(json_text(text)) == text
    assert not hidden(json_text(text))


def test_no_value_forges_a_line():
    error = UserError([Problem("got 'a'\nerror: b", "f\n.csv", 3, hint="c\nd")])
    assert str(error) == "error: f\\n.csv:3: got 'a'\\nerror: b\n       c\\nd"


def test_pages_show_what_turns_text_around():
    page = pages.filled("report.html", {"caption": "a\u202eb\x00", "legitimate": LEGITIMATE})
    data = json.loads(re.search(r'{"caption".*?}', page)[0])
    assert data == {"caption": r"a\u202eb\x00", "legitimate": LEGITIMATE}


@pytest.mark.ci
def test_only_one_room_knows_the_streams_and_the_console_of_rich():
    for file in (ROOT / "harness").rglob("*.py"):
        if file.name == "visible.py":
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        imported = {one.module for one in ast.walk(tree) if isinstance(one, ast.ImportFrom)}
        assert not imported & {"rich.console", "rich.markup"}, file
        dotted = {ast.unparse(one) for one in ast.walk(tree) if isinstance(one, ast.Attribute)}
        assert not dotted & {"sys.stdout.buffer", "sys.stderr.buffer", "sys.__stdout__", "sys.__stderr__"}, (
            file
        )


SCORE = "score other.csv --references labels.csv --metrics rouge1"


def shell(place: Path, line: str) -> subprocess.CompletedProcess:
    line = line.replace("harness", f"'{sys.executable}' -m harness")
    return subprocess.run(["bash", "-c", line], cwd=place, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("lost", [">&-", "2>&-", ">&- 2>&-", "<&-", "<&- >&- 2>&-", "2>/dev/full"])
@pytest.mark.slow
def test_a_closed_stream_loses_what_is_printed_and_nothing_else(place, lost):
    (place / "out.csv").unlink(missing_ok=True)
    done = shell(place, f"harness {SCORE} --per-image out.csv {lost}")
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    assert bool(done.stdout) == (">&-" not in lost.replace("2>&-", ""))
    assert (place / "out.csv").read_text(encoding="utf-8").count("\nI") == 0
    assert len((place / "out.csv").read_text(encoding="utf-8").split("\n")) == 5


@pytest.mark.ci
def test_a_reader_that_is_gone_ends_nothing(place):
    (place / "out.csv").unlink(missing_ok=True)
    done = shell(place, f"harness {SCORE} --per-image out.csv | true; echo ${{PIPESTATUS[0]}}")
    assert done.stdout == "0\n"
    assert "Exception" not in done.stderr
    assert (place / "out.csv").exists()


@pytest.mark.ci
@pytest.mark.parametrize("command", [SCORE, "--help", f"{SCORE} --format json", "leaderboard"])
def test_a_full_device_is_one_line(place, command):
    done = shell(place, f"harness {command} > /dev/full")
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if "error" in line] == [
        "error: standard output: No space left on device; fix it and run the same command again"
        if "--help" not in command
        else done.stderr.splitlines()[-1]
    ]
    assert "standard output: No space left on device" in done.stderr
    assert not {"Traceback", "Exception ignored"} & set(done.stderr.split())


@pytest.mark.parametrize("started", ["harness", "PATH=/usr/bin:/bin harness"])
@pytest.mark.parametrize("command", ["--help", SCORE, "leaderboard", "doctor", "run e.yaml", "sync"])
def test_a_folder_that_is_gone_is_one_line(place, command, started):
    done = shell(place, f"mkdir -p gone; cd gone; rmdir ../gone; {started} {command}")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: the working directory can't be used: No such file or directory")
    assert done.stderr.count("\n") == 1


@pytest.mark.ci
@pytest.mark.parametrize(
    "locale",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
@pytest.mark.parametrize("name", ["score", "compare", "data"])
def test_any_encoding_of_the_terminal(place, locale, name):
    command = [sys.executable, "-m", "harness", *COMMANDS[name]]
    how = {"cwd": place, "env": os.environ | locale, "capture_output": True}
    encoding = "latin-1" if "latin" in str(locale) else "ascii"
    done = subprocess.run(command, **how)
    text = (done.stdout + done.stderr).decode(encoding)
    assert "Traceback" not in text
    assert done.returncode == (2 if name == "data" else 0)
    if name == "compare":
        plain = subprocess.run([*command, "--format", "json"], **how)
        assert json.loads(plain.stdout.decode(encoding))


def reads_or_writes_text(call: ast.Call) -> bool:
    """Whether a call turns bytes into text or back by an encoding that it may leave to the locale."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    given = {word.arg: word.value for word in call.keywords}
    if name in ("read_text", "write_text"):
        return isinstance(call.func, ast.Attribute) and len(call.args) < (1 if name == "read_text" else 2)
    if name in ("run", "Popen", "check_output"):
        return "text" in given
    if name not in ("open", "NamedTemporaryFile"):
        return False
    holder = getattr(call.func.value, "id", "") if isinstance(call.func, ast.Attribute) else ""
    if holder in ("os", "Image", "archive"):
        return False
    modes = [node.value for node in [*call.args[:2], given.get("mode")] if isinstance(node, ast.Constant)]
    modes = [mode for mode in modes if isinstance(mode, str) and re.fullmatch("[rwaxbt+]+", mode)]
    return bool(modes or name == "open") and not any("b" in mode for mode in modes)


def test_no_file_is_read_or_written_in_the_encoding_of_the_locale():
    found = [
        f"{file.name}:{node.lineno}"
        for file in sorted((ROOT / "harness").rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Call)
        and reads_or_writes_text(node)
        and "encoding" not in {word.arg for word in node.keywords}
    ]
    assert found == []
