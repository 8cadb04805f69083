"""One run as a page: its origin, training curves, scores, and every caption with its image.

The page is one file that needs neither network nor server. Captions, ids and names of concepts are untrusted
text: the page gets them as JSON and inserts them only as text. The page of an unfinished run states what is
missing.
"""

from collections.abc import Callable
from pathlib import Path

from harness import records, store
from harness.pages import filled
from harness.report import picture, sources
from harness.report.contents import REPORT, as_dict
from harness.report.gallery import SIDE

__all__ = ["REPORT", "SIDE", "as_dict", "write"]


def write(folder: Path, out: Path | None = None, say: Callable[[str], None] = lambda text: None) -> Path:
    """Write the page of the run in `folder`, by default to its `report.html` -> the page's path.

    `say` gets a line for each file that the page omits because it can't be read or has changed. The page in
    its default place and a picture of its examples become artifacts of a finished run, so the next mirror
    copies them to MLflow. Raises `UserError` if there is no run.
    """
    run = sources.of(folder)
    page = out or folder / REPORT
    content = as_dict(run, page.parent)
    store.write(page, filled(REPORT, content))
    for problem in dict.fromkeys(run.left_out):
        say(f"left out: {problem}")
    if out is None and run.record["status"] != "RUNNING":
        record = dict(sources.of(folder).record)
        made = [REPORT, *picture.write(content, record, folder)]
        record["artifacts"] |= {name: f"{records.full_name(record)}/{name}" for name in made}
        store.write_json(folder / records.FILE, record)
    return page
