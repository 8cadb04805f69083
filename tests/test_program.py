"""Experiments by their names, variants alone, commands that work where they are read, completion."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from harness.cli import app, process
from harness.cli.terminal import by_name, run_by_name
from harness.config.experiment import load
from harness.errors import UserError
from harness.output import program

ROOT = Path(__file__).parents[1]


def invoke(*arguments: str):
    return CliRunner().invoke(app, [*arguments], catch_exceptions=True)


def test_an_experiment_is_found_by_its_name(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert by_name(Path("quickstart")) == Path("experiments/quickstart.yaml")
    assert by_name(Path("quickstart.yaml")) == Path("quickstart.yaml")
    assert by_name(Path("runs/quickstart/opt_224-s42")) == Path("runs/quickstart/opt_224-s42")
    assert by_name(None) is None


def test_a_run_is_found_by_the_name_that_ls_prints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/x/base-s42")
    folder.mkdir(parents=True)
    assert run_by_name(Path("x/base-s42")) == run_by_name(folder) == folder
    assert run_by_name(Path("y/base-s42")) == Path("y/base-s42")
    assert run_by_name(None) is None
    Path("x/base-s42").mkdir(parents=True)
    assert run_by_name(Path("x/base-s42")) == Path("x/base-s42")


@pytest.mark.parametrize("command", ["report", "export", "caption", "sync", "score", "compare", "consensus"])
def test_commands_of_finished_runs_take_that_name(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    Path("runs/x/base-s42").mkdir(parents=True)
    more = {"export": ["out"], "caption": ["images"], "compare": ["x/base-s42"]}
    options = ["--out", "c.csv"] if command == "consensus" else []
    found = invoke(command, "x/base-s42", *more.get(command, []), *options)
    assert "runs/x/base-s42" in str(found.exception)


def test_a_missing_run_is_not_said_to_be_too_few(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = invoke("compare", "runs/x/*").exception
    assert str(error) == "error: runs/x/*: no such file or folder\n       Your runs: harness ls"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["ls", "--sort", "x"], "'x' is not one of 'date'"),
        (["leaderboard", "--edition", "x"], "a whole number is allowed"),
        (["run", "x", "--nproc", "0"], "at least this is allowed: 1"),
    ],
)
def test_a_mistyped_option_is_told_in_words(monkeypatch, capsys, given, told):
    monkeypatch.setattr(sys, "argv", ["harness", *given])
    with pytest.raises(SystemExit):
        process._run_command(app)
    error = capsys.readouterr().err
    assert told in error
    assert "Value error" not in error
    assert "Input" not in error


def test_paragraphs_of_help_are_as_wide_as_the_terminal():
    for one in app.registered_commands:
        assert not re.search(r"[^\n]\n[^\n]", one.help), one.name


def test_a_name_that_is_near_is_offered_and_all_others_are_listed(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=r"Did you mean experiments/quickstart\.yaml"):
        load(Path("quickstrat"))
    with pytest.raises(UserError, match=r"In experiments: ablation_224, .*table3"):
        load(Path("zzz"))


def test_variants_alone_and_in_the_order_of_the_file(monkeypatch):
    monkeypatch.chdir(ROOT)
    file = Path("experiments/quickstart.yaml")
    found = load(file, only=["opt_364", "qformer_224"])
    assert [config.variant for config in found] == ["qformer_224", "opt_364"]
    with pytest.raises(UserError, match=r"no variant x\n.*qformer_224, opt_224") as error:
        load(file, only=["x", "opt_224", "y"])
    assert len(error.value.problems) == 2


def test_every_command_is_spelled(monkeypatch):
    """A command that `program` does not know would be printed as it may not work."""
    named = {info.name for info in (*app.registered_commands, *app.registered_groups)}
    assert {name for name in named if not re.fullmatch(program._COMMANDS, name)} == set()
    monkeypatch.setattr(program, "program", lambda: "P")
    text = "run `harness run x`, or: harness study y; a harness, the harness runs, bin/harness run, harness"
    shown = "run `P run x`, or: P study y; a harness, the harness runs, bin/harness run, harness"
    assert program.spelled(text) == shown
    assert program.spelled("made by python -m harness run x") == "made by P run x"


@pytest.mark.parametrize("place", ["script", "path", "module"])
def test_what_starts_the_program_follows_what_is_there(place, tmp_path, monkeypatch):
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.touch(0o755)
    if place != "module":
        python.with_name("harness").touch(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("PATH", str(python.parent) if place == "script" else "/usr/bin")
    monkeypatch.chdir(tmp_path)
    told = {"script": "harness", "path": "bin/harness", "module": "bin/python -m harness"}[place]
    program.program.cache_clear()
    try:
        assert program.program() == told
    finally:
        program.program.cache_clear()


def test_no_text_names_the_module():
    """Sources and documents write `harness ...`; the exceptions are about processes."""
    known = {"program.py", "__main__.py", "workers.py"}
    files = [*(ROOT / "harness").rglob("*.py"), *(ROOT / "experiments").glob("*.yaml")]
    files += [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    assert [
        f.name for f in files if "python -m harness" in f.read_text("utf-8") and f.name not in known
    ] == []


@pytest.mark.parametrize("started", ["script", "module"])
def test_completion_in_bash(started, tmp_path):
    """The script that --show-completion prints, sourced by a real bash that then completes."""
    if not shutil.which("bash") or not Path(sys.executable).with_name("harness").is_file():
        pytest.skip("needs bash and the installed script")
    start = ["harness"] if started == "script" else [sys.executable, "-m", "harness"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": path, "SHELL": "/bin/bash"}
    environment |= {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    how = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "timeout": 60}
    script = subprocess.run([*start, "--show-completion", "bash"], **how)
    assert script.returncode == 0, script.stderr
    (tmp_path / "completion.sh").write_text(script.stdout)
    shell = (
        f"source {tmp_path}/completion.sh\n"
        "COMP_WORDS=(harness le) COMP_CWORD=1\n"
        "$(complete -p harness | sed 's/.*-F \\([^ ]*\\) .*/\\1/') harness\n"
        'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(["bash", "-c", shell], **how)
    assert done.stdout.split() == ["leaderboard"], done.stderr
