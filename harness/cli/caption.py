"""`harness caption`: any images, captioned by a finished run."""

import contextlib
import csv
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness.cli import outputs
from harness.cli.terminal import DeviceName, OfRun, Terminal
from harness.errors import UserError
from harness.output.visible import print_csv

if TYPE_CHECKING:
    from harness.captioning import Captioner
    from harness.data.given import Found


def caption(
    run: OfRun,
    images: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGES ...", help="Files, and folders with all that is below them."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT.csv",
            dir_okay=False,
            help="Where the captions go; by default they are printed.",
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="PAGE.html", dir_okay=False, help="Write a page with images and captions too."),
    ] = None,
    device: Annotated[DeviceName | None, typer.Option(help="Overrides the device of the run.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images decoded together; by default as in the run.")
    ] = None,
) -> None:
    """Caption images as the run captions its own: the same decoding, consensus and post-processing.

    It reads PNG, JPEG, TIFF, GIF, BMP, WebP, JPEG 2000 and, with the package pydicom, DICOM.

    An id is the name of a file without its suffix. If two images share a name, ids are paths.

    If some images can't be read, it names each, captions the others and ends with exit code 1.

    Example: harness caption runs/quickstart/opt_364-s42 my_images --out captions.csv
    """
    from harness import captioning
    from harness.data import given
    from harness.records.files import same_in, write_captions

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    outputs.check({"--out": out, "--html": html}, images)
    terminal = Terminal()
    captioner = captioning.of(run, device, batch_size)
    with tempfile.TemporaryDirectory() as converted:
        with terminal.progress("Reading images") as advance:
            found = given.look(images, Path(converted), advance)
        for remark in [*captioner.remarks, *found.remarks, *_done(found)]:
            terminal.say(remark)
        with _work(out, captioner, found) as work:
            captions = captioner.captions(found.images, work, terminal)
            for warning in same_in("warning", captions):
                terminal.say(warning)
            if out:
                write_captions(out, captions)
                terminal.say(f"captions of {len(captions):,} images: {out}")
            else:
                text = io.StringIO()
                csv.writer(text, lineterminator="\n").writerows([("ID", "caption"), *captions.items()])
                print_csv(text.getvalue())
            if html:
                captioning.write_page(captioner, found, captions, html)
                terminal.say(f"page: {html}")
    if found.problems:
        hint = f"They have no caption. The other {len(captions):,} images have one."
        raise UserError(found.problems, hint, exit_code=1)


def _done(found: "Found") -> list[str]:
    """What was done to images that are more than a plain picture: a line for each way, with its images."""
    notes: dict[str, list[str]] = {}
    for one in found.images:
        if one.note:
            notes.setdefault(one.note, []).append(one.file.name)
    return [
        f"{', '.join(names[:3])}{f' and {len(names) - 3:,} more' if len(names) > 3 else ''}: {note}"
        for note, names in notes.items()
    ]


@contextlib.contextmanager
def _work(out: Path | None, captioner: "Captioner", found: "Found") -> Iterator[Path]:
    """A folder for captions that are done: beside `out`, so that the same command continues from it."""
    if out is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    folder = out.parent / f".{out.name}-{captioner.fingerprint(found.images)}"
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    shutil.rmtree(folder)
