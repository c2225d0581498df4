"""Faults: what is broken on purpose, and what must hold all the same."""

import pytest

pytest.register_assert_rewrite("tests.faults.killing", "tests.faults.histories")
