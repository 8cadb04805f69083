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
REPORT = """
<style>nav, #facts, #scores, #training, #lengths, #config, #origin { display: none }</style>
<script>document.getElementById("high").click()</script>
"""
"""The captions alone, the best first."""


def main() -> None:
    if not (browser := next(filter(None, map(shutil.which, BROWSERS)), None)):
        sys.exit("Chromium is missing; on Debian: apt-get install chromium")
    report = Path("runs/quickstart/opt_364_dedup-s42/report.html")
    pages = {
        "report.png": (report, REPORT, 1200, 690),
        "leaderboard.png": (Path("leaderboard/index.html"), "", 1400, 900),
    }
    for name, (page, change, width, height) in pages.items():
        if not page.is_file():
            sys.exit(f"{page} is missing; the first lines of {Path(__file__).name} say how to make it")
        (HERE / name).write_bytes(small(screenshot(browser, page, change, width, height)))


def screenshot(browser: str, page: Path, change: str, width: int, height: int) -> bytes:
    """The top of a page with `change` at its end, in a window of `width` x `height` pixels, as PNG."""
    with tempfile.TemporaryDirectory() as folder:
        copy, picture = Path(folder, "page.html"), Path(folder, "picture.png")
        copy.write_text(page.read_text(encoding="utf-8") + change, encoding="utf-8")
        options = ("--virtual-time-budget=5000", f"--window-size={width},{height}", f"--screenshot={picture}")
        command = [browser, *FLAGS, *QUIET, f"--user-data-dir={folder}/profile", *options, copy.as_uri()]
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
