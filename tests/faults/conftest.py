"""The worlds and nurseries of the fault tests, and the summary of what they found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.killing import Undisturbed
from tests.faults.promises import Book
from tests.faults.runs import make_fault_world
from tests.nursery import Nursery
from tests.postgres import PrivatePostgres

BOOK = pytest.StashKey[Book]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[BOOK] = Book()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("faults")


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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    book = config.stash[BOOK]
    if book.entries:
        terminalreporter.section("promises")
        for line in book.lines():
            terminalreporter.write_line(line)


@pytest.fixture
def book(request: pytest.FixtureRequest) -> Book:
    """Where a test reports its figures."""
    found: Book = request.config.stash[BOOK]
    return found


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world whose files no test changes."""
    return make_fault_world(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="session")
def nursery(world: Path) -> Nursery:
    return Nursery(world)


@pytest.fixture(scope="session")
def undisturbed(world: Path, nursery: Nursery) -> Undisturbed:
    return Undisturbed(world, nursery)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """URL of a server for the fault tests."""
    with PrivatePostgres() as url:
        yield url
