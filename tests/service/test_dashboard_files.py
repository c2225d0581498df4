"""The dashboard's files by themselves: what they must not do, and how YAML is written and found in."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

pytest.importorskip("playwright.sync_api", reason="the Python package playwright is missing")

from playwright.sync_api import Page

from evomerge.service.app import STATIC
from tests.service.browser import launched, tab
from tests.service.live import Live


@pytest.fixture(scope="module")
def page(live: Live) -> Iterator[Page]:
    with launched() as browser, tab(browser, live) as dash:
        yield dash.open()


FORBIDDEN = (
    "innerHTML",
    "outerHTML",
    "insertAdjacentHTML",
    "document.write",
    "DOMParser",
    "eval(",
    "Function(",
    "srcdoc",
    "http:",
)


def test_the_files_make_elements_of_no_text() -> None:
    for file in STATIC.iterdir():
        text = file.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
        assert [word for word in FORBIDDEN if word in text] == [], file.name
        assert "https:" not in text
        if file.suffix == ".html":
            assert not re.search(r"<style|\bstyle=|\bon\w+=|<script>|<script(?! [^>]*src=)", text)


def test_the_package_has_the_files(repository: Path) -> None:
    text = (repository / "pyproject.toml").read_text("utf-8")
    assert '"service/static/*"' in text
    assert not [path for path in STATIC.iterdir() if path.is_dir()]


DATA = {
    "name": "x",
    "numbers": [1, -2.5, 1e-7, 1e300, 0.1],
    "text": [
        "yes",
        "null",
        "1.0",
        "a: b",
        "# c",
        "",
        " x ",
        "é\n\u2028'\"",
        "- a",
        "[",
        "./base",
        "a b",
        "1e5",
    ],
    "nested": [{"a": {"b": [], "c": {}}, "d": [[1], [{"e": None}]]}, {"key with: colon": True}],
    "~": {"on": False},
}


def test_yaml_is_written_so_that_it_is_read_back(page: Page) -> None:
    text = page.evaluate("async (data) => (await import('/static/yaml.js')).yaml(data)", DATA)
    assert yaml.safe_load(text) == DATA


LINES = """\
# name: not this
sources: {base: {name: inner, path: ./b}}
name: outer
space:
  parameters:
    weight:
      low: 0
    name: deep
  method: ties
models:
  - name: one
    path: x
  - {name: two, path: y}
"""


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("name", 3),
        ("sources.base.path", 2),
        ("space.method", 9),
        ("space.parameters.weight.low", 7),
        ("space.parameters.weight.high", 6),
        ("models.0.path", 12),
        ("models.1.path", 13),
        ("nothing", None),
    ],
)
def test_the_line_of_a_key_is_found(page: Page, key: str, line: int | None) -> None:
    for text in (LINES, json.dumps(yaml.safe_load(LINES), indent=2)):
        found = page.evaluate(
            "async ([text, key]) => (await import('/static/yaml.js')).lineOf(text, key)", [text, key]
        )
        if text is LINES:
            assert (None if found is None else found + 1) == line
        else:
            assert (found is None) == (line is None)
