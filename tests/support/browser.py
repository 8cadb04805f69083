"""Headless Chromium by its own protocol over a pipe: real clicks and keys, console, requests, screenshots."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
QUIET = [
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]
SECONDS = 60
FAINT = """
(() => {
  const parts = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => {
    const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = parts(color).slice(0, 3).map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const color = getComputedStyle(at).backgroundColor;
      if (parts(color)[3] !== 0) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const faint = [];
  let seen = 0;
  for (const node of document.body.querySelectorAll("*")) {
    const own = [...node.childNodes].some((one) => one.nodeType === 3 && one.data.trim());
    const style = getComputedStyle(node);
    const exempt = node.closest("script, style, [aria-disabled=true]");
    if (!own || exempt || !node.getClientRects().length) continue;
    const ink = node instanceof SVGElement ? style.fill : style.color;
    const [a, b] = [light(ink), light(behind(node))].sort((x, y) => y - x);
    seen += 1;
    const name = `${node.tagName} ${node.textContent.slice(0, 40)}`;
    if ((a + 0.05) / (b + 0.05) < 4.5) faint.push(`${name}: ${ink} on ${behind(node)}`);
  }
  return { faint, seen };
})()
"""
"""Text whose contrast is below 4.5, as WCAG 2 (1.4.3) computes it, and how many texts there are."""


class Browser:
    """One page in one window; `problems` are console errors and exceptions, `requests` the URLs asked for."""

    def __init__(self, profile: Path, width: int = 1280, height: int = 900) -> None:
        to_child, self._out = _pipe()
        self._in, from_child = _pipe()
        self._process = subprocess.Popen(
            [
                CHROMIUM,
                *FLAGS,
                *QUIET,
                "--remote-debugging-pipe",
                f"--user-data-dir={profile}",
                "about:blank",
            ],
            pass_fds=(3, 4),
            preexec_fn=lambda: (os.dup2(to_child, 3), os.dup2(from_child, 4)),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_child)
        os.close(from_child)
        self._buffer, self._number, self._session = b"", 0, None
        self.events: list[dict[str, Any]] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")
        self.resize(width, height)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def resize(self, width: int, height: int) -> None:
        """The window's size in CSS pixels; below 600 it is a phone."""
        sizes = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.send("Emulation.setDeviceMetricsOverride", **sizes)

    def prefer(self, scheme: str) -> None:
        """Have pages drawn light or dark."""
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def faint(self) -> list[str]:
        """The texts of the page that are hard to read."""
        found = self.evaluate(FAINT)
        if not found["seen"]:
            raise RuntimeError("the page has no text")
        return found["faint"]

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol and wait for its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + SECONDS
        while True:
            reply = self._next(deadline)
            if reply.get("id") == self._number:
                if "error" in reply:
                    raise RuntimeError(f"{method}: {reply['error']}")
                return reply["result"]
            self.events.append(reply)

    def _next(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._in], [], [], left)[0]:
                raise TimeoutError("chromium did not answer")
            part = os.read(self._in, 1 << 20)
            if not part:
                raise RuntimeError("chromium is gone")
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def open(self, page: Path) -> float:
        """Open a file and wait until it is loaded; returns the seconds that took."""
        began = time.monotonic()
        self.events.clear()
        self.send("Page.navigate", url=page.resolve().as_uri())
        self._wait_until_loaded(began)
        return time.monotonic() - began

    def follow(self, node: str) -> None:
        """Click on a link that a JavaScript expression gives, and wait until its page is loaded."""
        self.events.clear()
        self.click(node)
        self._wait_until_loaded(time.monotonic())

    def _wait_until_loaded(self, began: float) -> None:
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next(began + SECONDS))

    def evaluate(self, script: str) -> Any:
        """The JSON value of an expression in the page."""
        done = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in done:
            raise RuntimeError(done["exceptionDetails"])
        return done["result"].get("value")

    def click(self, node: str) -> None:
        """Click with the mouse in the middle of what a JavaScript expression gives."""
        self.evaluate(f"({node}).scrollIntoView({{block: 'center', inline: 'center'}})")
        box = self.evaluate(f"(({node}).getBoundingClientRect().toJSON())")
        at = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)

    def press(self, key: str, code: int, text: str = "") -> None:
        """Press a key where the focus is."""
        shared = {"key": key, "code": key, "windowsVirtualKeyCode": code, "text": text}
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, **shared)

    def choose(self, select_id: str, value: str) -> None:
        """Choose an option of a select element, by the mouse and the keys of its list."""
        node = f"document.getElementById({json.dumps(select_id)})"
        place = self.evaluate(f"[...{node}.options].findIndex((one) => one.value === {json.dumps(value)})")
        self.click(node)
        for key, code in [("Home", 36), *[("ArrowDown", 40)] * place]:
            self.press(key, code)
        self.press("Enter", 13, "\r")
        if self.evaluate(f"{node}.value") != value:
            raise RuntimeError(f"{select_id} is not {value!r}")

    def type(self, node: str, text: str) -> None:
        """Click on a field that a JavaScript expression gives, and write over what it holds."""
        self.click(node)
        self.evaluate(f"({node}).select()")
        self.press("Backspace", 8)
        for letter in text:
            self.press(letter, 0, letter)

    def screenshot(self, file: Path) -> Path:
        """The whole page as PNG."""
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        file.write_bytes(base64.b64decode(shot["data"]))
        return file

    @property
    def problems(self) -> list[str]:
        """Console errors, violations of the page's security policy and uncaught exceptions so far."""
        self.evaluate("0")
        bad = [e for e in self.events if e.get("method") == "Runtime.exceptionThrown"]
        bad += [
            e
            for e in self.events
            if e.get("method") == "Log.entryAdded" and e["params"]["entry"]["level"] == "error"
        ]
        bad += [
            e
            for e in self.events
            if e.get("method") == "Runtime.consoleAPICalled" and e["params"]["type"] in ("error", "assert")
        ]
        return [json.dumps(event["params"])[:500] for event in bad]

    @property
    def requests(self) -> list[str]:
        """The URLs that were asked for since `open`, data: ones left out."""
        self.evaluate("0")
        asked = [e for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        urls = [event["params"]["request"]["url"] for event in asked]
        return [url for url in urls if not url.startswith("data:")]


def _pipe() -> tuple[int, int]:
    """A pipe whose ends are far from 3 and 4, which the child wants."""
    ends = os.pipe()
    high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 100) for end in ends)
    for end in ends:
        os.close(end)
    return high
