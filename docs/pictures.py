"""The screenshots of README, from a finished quickstart: docs/report.png and docs/leaderboard.png.

    make quickstart && harness leaderboard --format html && python docs/pictures.py

It needs Chromium.
"""

import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

HERE = Path(__file__).parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars")
QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync")
COLORS = 64
MOST_BYTES = 150_000


def main() -> None:
    if not (browser := next(filter(None, map(shutil.which, BROWSERS)), None)):
        sys.exit("Chromium is missing; on Debian: apt-get install chromium")
    report = Path("runs/quickstart/opt_364_dedup-s42/report.html")
    pages = {
        "report.png": (report, 1300, 900),
        "leaderboard.png": (Path("leaderboard/index.html"), 1400, 1010),
    }
    for name, (page, width, height) in pages.items():
        if not page.is_file():
            sys.exit(f"{page} is missing; the first lines of {Path(__file__).name} say how to make it")
        (HERE / name).write_bytes(small(screenshot(browser, page, width, height)))


def screenshot(browser: str, page: Path, width: int, height: int) -> bytes:
    """The top of a page in a window of `width` x `height` pixels, as PNG."""
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder, "picture.png")
        options = ("--virtual-time-budget=5000", f"--window-size={width},{height}", f"--screenshot={picture}")
        flags = (*FLAGS, *QUIET, f"--user-data-dir={folder}/profile")
        command = [browser, *flags, *options, page.resolve().as_uri()]
        subprocess.run(command, check=True, capture_output=True)
        return picture.read_bytes()


def small(picture: bytes) -> bytes:
    """A PNG in few colours."""
    out = io.BytesIO()
    Image.open(io.BytesIO(picture)).convert("RGB").quantize(COLORS).save(out, "PNG", optimize=True)
    if len(out.getvalue()) > MOST_BYTES:
        sys.exit(f"a picture has {len(out.getvalue()):,} bytes; allowed are {MOST_BYTES:,}")
    return out.getvalue()


if __name__ == "__main__":
    main()
