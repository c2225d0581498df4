"""Fixtures for the tests of trackers."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("tests.contracts.tracker")
