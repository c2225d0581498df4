"""A pytest plugin: counts which promises held, and prints them at the end; with workers, from all of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.faults.promises import Book

BOOK = pytest.StashKey[Book]()

_OUTPUT = "promises"
"""Where a worker of pytest-xdist leaves its book for the process that started it."""


def pytest_configure(config: pytest.Config) -> None:
    config.stash[BOOK] = Book()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    marker = item.get_closest_marker("promise")
    failed_early = report.when == "setup" and report.failed
    if marker and (report.when == "call" or failed_early) and not report.skipped:
        entry = item.config.stash[BOOK].entry(marker.args[0])
        entry.tried += 1
        entry.held += report.passed
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output[_OUTPUT] = session.config.stash[BOOK].to_json()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    # A worker that crashed has left nothing; then its test has failed.
    book = getattr(node, "workeroutput", {}).get(_OUTPUT, {})
    node.config.stash[BOOK].add(Book.from_json(book))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    book = config.stash[BOOK]
    if book.entries:
        terminalreporter.section("promises")
        for line in book.lines():
            terminalreporter.write_line(line)
