"""The contract and the load, on both databases."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contracts.jobs import JobQueueContract
from tests.contracts.store import StoreContract
from tests.postgres import fresh_schema
from tests.store.load import StoreUnderLoad


class TestSqlite(StoreContract, JobQueueContract, StoreUnderLoad):
    """In a file."""

    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path}/store.db"


@pytest.mark.postgres
class TestPostgres(StoreContract, JobQueueContract, StoreUnderLoad):
    """On a server, a new schema for every test."""

    @pytest.fixture
    def url(self, postgres: str) -> str:
        return fresh_schema(postgres)
