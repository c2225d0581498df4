"""A real Chromium for tests of the dashboard, which writes down everything that must not happen."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.service.live import TOKEN, Live

NAMES = ("chromium", "chromium-browser", "google-chrome")
SLOW = 150_000
"""Milliseconds for what a driver process does."""

WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation",
  (e) => window.violations.push(`${e.violatedDirective} ${e.blockedURI}`));
"""

# Returns every text whose contrast to what is behind it is below 4.5, as WCAG 2 computes it.
CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const paint = (...colours) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const one of colours) { canvas.fillStyle = one; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const linear = (v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = (rgb) => rgb.map((v) => linear(v / 255))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const found = [];
  for (const node of document.querySelectorAll("main *, header *")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    const box = node.getBoundingClientRect();
    if (!own || !box.width || node.closest("[disabled], .unseen, .arrow")) continue;
    const behind = [];
    for (let at = node; at; at = at.parentElement) behind.unshift(getComputedStyle(at).backgroundColor);
    const style = getComputedStyle(node);
    const colour = node instanceof SVGElement ? style.fill : style.color;
    const [one, two] = [light(paint(...behind)), light(paint(...behind, colour))];
    const ratio = (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
    const what = `${node.tagName} ${node.getAttribute("class")} ${node.textContent.slice(0, 30)}`;
    if (ratio < 4.5) found.push(`${what} ${ratio.toFixed(2)}`);
  }
  return found;
}"""

expect.set_options(timeout=15_000)


def chromium() -> str:
    """Return the browser's path; skip the test where there is none."""
    given = os.environ.get("EVOMERGE_CHROMIUM")
    found = given or next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no {', '.join(NAMES)} on the PATH; install one or set EVOMERGE_CHROMIUM")
    return found


@contextmanager
def launched() -> Iterator[Browser]:
    """Run a browser while the block lasts."""
    path = chromium()
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


class Dash:
    """One tab of the dashboard.

    Attributes:
        page: It.
        live: The service.
        expected: Pairs of HTTP status and path's end whose console message is no fault.
    """

    def __init__(self, page: Page, live: Live) -> None:
        self.page, self.live = page, live
        self.expected: list[tuple[int, str]] = []
        self.faults: list[str] = []
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        page.on("request", self._request)

    def _console(self, message: Any) -> None:
        if message.type not in ("error", "warning"):
            return
        place = urlsplit(message.location.get("url", "")).path
        known = any(
            f"status of {status}" in message.text and place.endswith(end) for status, end in self.expected
        )
        if not known:
            self.faults.append(f"console: {message.text} {place}")

    def _request(self, request: Any) -> None:
        url = urlsplit(request.url)
        if url.scheme not in ("blob", "data") and f"{url.scheme}://{url.netloc}" != self.live.service.address:
            self.faults.append(f"another host: {request.url}")
        if TOKEN in request.url:
            self.faults.append(f"token in a URL: {request.url}")

    def open(self, place: str = "") -> Page:
        """Go to a place of the dashboard with the token."""
        begun = self.page.url != "about:blank"
        if not begun:
            self.page.add_init_script(f"sessionStorage.setItem('evomerge-token', '{TOKEN}')")
        self.page.goto(f"{self.live.service.address}/#/{place}")
        if begun:
            self.page.reload()
        self.page.wait_for_selector("h1")
        return self.page

    def check(self) -> None:
        """Fail if anything happened that must not."""
        self.faults += self.page.evaluate("window.violations ?? []")
        assert not self.faults, self.faults

    def overflow(self) -> int:
        """Return how far the page can be scrolled sideways, in pixels."""
        found = self.page.evaluate(
            "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        return int(found)


@contextmanager
def tab(browser: Browser, live: Live, **options: Any) -> Iterator[Dash]:
    """Open a tab with a session of its own; on leaving, fail if anything happened that must not."""
    context = browser.new_context(**{"viewport": {"width": 1200, "height": 800}, **options})
    try:
        page = context.new_page()
        page.add_init_script(WATCH)
        dash = Dash(page, live)
        yield dash
        dash.check()
    finally:
        context.close()
