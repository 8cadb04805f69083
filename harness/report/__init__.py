"""One run as a page: how it was made, how it trained, what it scores, and every caption beside its image.

The page is one file that needs neither network nor server. Captions, ids and names of concepts are untrusted
text: they travel as JSON, and the page only sets them as text. The page of an unfinished run says what is
missing.
"""

from collections.abc import Callable
from pathlib import Path

from harness import records, store
from harness.pages import filled
from harness.report import sources
from harness.report.contents import REPORT, as_dict
from harness.report.gallery import SIDE

__all__ = ["REPORT", "SIDE", "as_dict", "write"]


def write(folder: Path, out: Path | None = None, say: Callable[[str], None] = lambda text: None) -> Path:
    """Write the page of the run in `folder`, by default to its `report.html`, and return the page's path.

    `say` hears of each file that the page leaves out, since it is not what the run left.

    A page in its default place is listed among the artifacts of a run that has ended, so that the next mirror
    takes it to MLflow. Raises `UserError` where there is no run.
    """
    run = sources.of(folder)
    page = out or folder / REPORT
    store.write(page, filled(REPORT, as_dict(run, page.parent)))
    for problem in dict.fromkeys(run.left_out):
        say(f"left out: {problem}")
    if out is None and run.record["status"] != "RUNNING":
        record = dict(sources.of(folder).record)
        record["artifacts"] |= {REPORT: f"{record['name']}/{run.name}/{REPORT}"}
        store.write_json(folder / records.FILE, record)
    return page
