"""Fixtures for the tests of the store."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.postgres import PrivatePostgres

pytest.register_assert_rewrite(
    "tests.contracts.jobs", "tests.contracts.store", "tests.store.load", "tests.store.processes"
)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """URL of a server for the whole session."""
    with PrivatePostgres() as url:
        yield url
