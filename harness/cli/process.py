"""The process of a command: signals, errors without a traceback, exit codes."""

import contextlib
import errno
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import typer
from typer.exceptions import TyperException as ClickException

from harness.errors import UserError
from harness.machine import launch, ranks
from harness.machine.launch import INTERRUPTED
from harness.output.masking import masked
from harness.output.program import spelled
from harness.output.visible import STANDARD_OUTPUT, guard

_INTERRUPTED = "interrupted; the same command continues where this one stopped"
_IN_WORDS = {
    "Value error, ": "",
    "Input should be a valid integer, unable to parse string as an integer": "a whole number is allowed",
    "Input should be greater than or equal to ": "at least this is allowed: ",
}
"""What a usage error says of a mistyped value, by how pydantic says it."""
_heard = threading.Event()
_PATIENCE = 2.0
"""Seconds for threads to end by themselves after an interruption."""
REPAIRABLE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}
"""Errors that a user can repair: a full or read-only disk, a path that can't be written to."""


def main(app: Callable[..., Any]) -> None:
    """Run the command line `app` and exit with its code; user errors are printed without a traceback.

    Exit codes: 0 ok, 1 failed run, 2 usage, config or data, 3 invalid submission, 130 interrupted.
    """
    code = 0
    try:
        guard()
        _hear_signals()
        launch.adopt_slurm(os.environ)
        launch.share_host()
        _run_command(app)
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:  # a second one, while the first was reported
        code = INTERRUPTED
    except Exception:
        if _heard.is_set():  # a library turned the KeyboardInterrupt into another error
            print(_INTERRUPTED, file=sys.stderr)
            code = INTERRUPTED
        else:
            if ranks.rank():
                ranks.say_why(traceback.format_exc().splitlines()[-1])
            print(masked(traceback.format_exc()), file=sys.stderr, end="")
            code = 1
    code = _all_written(code)
    if code == INTERRUPTED:
        _end_children()
    if not code:
        ranks.end()
    if ranks.world_size() > 1 or code == INTERRUPTED:
        ranks.leave(code)
    sys.exit(code)


def _hear_signals() -> None:
    sys.unraisablehook = _interrupt_again
    signal.signal(signal.SIGTERM, _interrupt)
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup and a shell's & set SIG_IGN
            signal.signal(number, _interrupt)


def _run_command(app: Callable[..., Any]) -> None:
    try:
        if gone := _without_folder():
            _fail(gone, 2)
        launch.end_with_parent()
        if (
            app(prog_name="harness", standalone_mode=False) == INTERRUPTED
        ):  # typer returns this after a KeyboardInterrupt
            _fail(_INTERRUPTED, INTERRUPTED)
    except UserError as error:
        _fail(str(error), error.exit_code, len(error.problems))
    except typer.Abort as abort:
        if isinstance(abort.__cause__, EOFError):  # a file is cut short; nobody interrupted
            raise abort.__cause__ from None
        _fail(_INTERRUPTED, INTERRUPTED)
    except KeyboardInterrupt:
        _fail(_INTERRUPTED, INTERRUPTED)
    except ClickException as error:
        for theirs, ours in _IN_WORDS.items():
            error.message = error.message.replace(theirs, ours)
        error.show()
        sys.exit(2)
    except RuntimeError as error:
        if circle := _circle(error):
            _fail(_not_written(circle.filename, circle), 1)
        if not ranks.cut_off(error):
            raise
        if ranks.rank():  # rank 0 reports it, unless rank 0 is the one that ended
            sys.exit(1)
        _fail("error: another rank of this launch has ended; the same command continues", 1)
    except OSError as error:
        if gone := _without_folder():
            _fail(gone, 1)
        if error.errno not in REPAIRABLE and error.filename != STANDARD_OUTPUT:
            raise
        _fail(_not_written(error.filename or "writing", error), 1)


def _not_written(what: str | bytes | int, error: OSError) -> str:
    return f"error: {what}: {error.strerror}; fix it and run the same command again"


def _circle(error: RuntimeError) -> OSError | None:
    """The error of a link that leads to itself: pathlib before Python 3.13 raises a RuntimeError for it."""
    cause = error.__context__
    return cause if isinstance(cause, OSError) and cause.errno == errno.ELOOP else None


def _without_folder() -> str | None:
    """The error if the working directory is gone: torch and others crash there without a message."""
    try:
        os.getcwd()
    except OSError as error:
        return f"error: the working directory can't be used: {error.strerror}; cd to a folder that exists"
    return None


def _all_written(code: int) -> int:
    """The exit code; 0 becomes 1 if standard output can't be written."""
    try:
        sys.stdout.flush()
    except OSError as error:
        print(_not_written(STANDARD_OUTPUT, error), file=sys.stderr)
        return code or 1
    return code


def _end_children() -> None:
    """End the child processes (Java, MedCAT), and wait up to `_PATIENCE` for the threads that use them.

    Processes with their own session keep running: they notice by themselves that this one ends.
    """
    import psutil

    session = os.getsid(0)
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error, OSError):
            if os.getsid(child.pid) == session:
                child.kill()
    until = time.monotonic() + _PATIENCE
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(max(0.0, until - time.monotonic()))


def _interrupt(*_: Any) -> None:
    _heard.set()
    raise KeyboardInterrupt


def _interrupt_again(swallowed: Any) -> None:
    """Repeat an interruption that Python dropped in a finaliser or a weak reference's callback."""
    if issubclass(swallowed.exc_type, KeyboardInterrupt):
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    else:
        sys.__unraisablehook__(swallowed)


def _fail(text: str, code: int, problems: int = 0) -> None:
    # this rank is ending already; the launcher signals all ranks when one exits
    if ranks.world_size() > 1 or code == INTERRUPTED:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
    if ranks.rank():  # rank 0 prints it, or the launcher if this rank fails alone
        if code != INTERRUPTED:
            ranks.say_why(text.removeprefix("error: "))
            if not launch.report(text):
                signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
                if not ranks.first_fails_too():
                    print(f"rank {ranks.rank()}: {text}", file=sys.stderr)
        sys.exit(code)
    print(masked(spelled(text)), file=sys.stderr)
    if problems and code == 2:
        noun = "problem" if problems == 1 else "problems"
        print(f"{problems} {noun}; nothing was run.", file=sys.stderr)
    sys.stderr.flush()
    ranks.say_failed()
    sys.exit(code)
