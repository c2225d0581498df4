"""The reference pool."""

from __future__ import annotations

from tests.contracts.pool import PoolContract


class TestInlinePool(PoolContract):
    overrides = ()
