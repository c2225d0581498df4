"""The worlds and nurseries of the fault tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.killing import Undisturbed
from tests.faults.promises import Book
from tests.faults.runs import make_fault_world
from tests.faults.summary import BOOK
from tests.nursery import Nursery
from tests.postgres import PrivatePostgres


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("faults")


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
