"""The commands; the only room that prints and sets exit codes."""

import inspect
from typing import Any

import typer
from typer.core import TyperGroup

from harness.cli import (
    best,
    caption,
    compare,
    consensus,
    data,
    doctor,
    export,
    init,
    keeping,
    leaderboard,
    process,
    reference,
    report,
    run,
    score,
    soups,
    study,
    submission,
    sync,
)
from harness.output.program import spelled

_PANELS = ("Run and study", "Score and compare", "Submit", "Data", "Keep house")
_RUN, _SCORE, _SUBMIT, _DATA, _HOUSE = _PANELS


class _InPanels(TyperGroup):
    """Lists the commands in the order of their panels."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(self.commands, key=lambda name: _PANELS.index(self.commands[name].rich_help_panel))


def _paragraphs(text: str) -> str:
    """The text with one line a paragraph, so that help wraps at the width of the terminal alone."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


app = typer.Typer(
    name="harness",
    cls=_InPanels,
    help="From one YAML file to a trained captioner, its scores and an official submission file.\n\n"
    "Example: harness run experiments/quickstart.yaml",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.callback()(keeping.version)
app.command("run", rich_help_panel=_RUN)(run.run)
app.command("soup", rich_help_panel=_RUN)(soups.soup)
app.add_typer(study.app, name="study", rich_help_panel=_RUN)
app.command("init", rich_help_panel=_DATA)(init.init)
app.command("caption", rich_help_panel=_RUN)(caption.caption)
app.command("score", rich_help_panel=_SCORE)(score.score)
app.command("compare", rich_help_panel=_SCORE)(compare.compare)
app.command("consensus", rich_help_panel=_SCORE)(consensus.consensus)
app.command("best", rich_help_panel=_SCORE)(best.best)
app.command("report", rich_help_panel=_SCORE)(report.report)
app.command("leaderboard", rich_help_panel=_SCORE)(leaderboard.leaderboard)
app.add_typer(submission.app, name="submission", rich_help_panel=_SUBMIT)
app.add_typer(data.app, name="data", rich_help_panel=_DATA)
app.command("ls", rich_help_panel=_HOUSE)(keeping.ls)
app.command("rm", rich_help_panel=_HOUSE)(keeping.rm)
app.command("gc", rich_help_panel=_HOUSE)(keeping.gc)
app.command("export", rich_help_panel=_HOUSE)(export.export)
app.command("reference", rich_help_panel=_HOUSE)(reference.reference)
app.command("sync", rich_help_panel=_HOUSE)(sync.sync)
app.command("doctor", rich_help_panel=_HOUSE)(doctor.doctor)
for _every in (app, study.app, submission.app, data.app):
    _every.info.help = spelled(str(_every.info.help))
    for _one in _every.registered_commands:
        _one.help = spelled(_paragraphs(inspect.getdoc(_one.callback) or ""))


def main() -> None:
    """Run the command line and exit with its code; `process.main` lists the codes."""
    process.main(app)
