"""What tests of pages share: a browser for a file of tests, and checks that hold for every page."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from support.browser import CHROMIUM, Browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    """One window for all tests of a file; they are skipped without Chromium."""
    if CHROMIUM is None:
        pytest.skip("needs chromium (Debian: apt install chromium)")
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


def button(text: str, place: str) -> str:
    """The button with this text in a part of the page, as a JavaScript expression."""
    return f"[...document.querySelectorAll('{place} button')].find((one) => one.textContent === '{text}')"


def check_readable(browser: Browser, pages: Sequence[Path], scheme: str) -> None:
    """All text has contrast and the page is not wider than its window, on a screen and on a phone.

    A table that is wider scrolls, and says so.
    """
    browser.prefer(scheme)
    try:
        for page in pages:
            for width in (1400, 400):
                browser.resize(width, 900)
                browser.open(page)
                browser.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
                assert browser.faint() == []
                assert browser.evaluate("document.documentElement.scrollWidth") <= width
                check_signs(browser)
            browser.evaluate("document.body.style.color = getComputedStyle(document.body).backgroundColor")
            assert browser.faint(), "the check sees text that can't be read"
    finally:
        browser.prefer("light")
        browser.resize(1280, 900)


def check_signs(browser: Browser) -> None:
    """What is wider than its place scrolls, and has a sign as long as there is more to the right."""
    boxes = browser.evaluate(
        """new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(
          [...document.querySelectorAll('.scroll')].map((box) => [
            box.scrollWidth > box.clientWidth + 1, box.hasAttribute('data-more'),
            !box.previousElementSibling.hidden])))))"""
    )
    assert all(more == marked == signed for more, marked, signed in boxes), boxes
    cut = browser.evaluate(
        """[...document.querySelectorAll('main *')].filter((one) => one.scrollWidth > one.clientWidth + 1
          && getComputedStyle(one).overflowX === 'hidden' && one.clientWidth > 1)
          .map((one) => one.outerHTML.slice(0, 80))"""
    )
    assert cut == [], "cut without a sign"


def tabbed(browser: Browser, start: str, count: int) -> list[str]:
    """The ids, or texts, of what Tab reaches from the element with id `start`; each shows its focus."""
    browser.evaluate(f"document.getElementById('{start}').focus()")
    reached = []
    for _ in range(count):
        browser.press("Tab", 9)
        active = "document.activeElement"
        assert browser.evaluate(f"getComputedStyle({active}).outlineStyle") == "solid"
        reached.append(browser.evaluate(f"{active}.id || {active}.textContent"))
    return reached
