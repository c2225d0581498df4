"""Fixtures for the tests of the service."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.report.synthetic import finished
from tests.service.live import Live, running, settings_in


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A service that starts no drivers (`at_once` is 0), with a finished run `demo` in its store."""
    settings = settings_in(tmp_path_factory.mktemp("service"), at_once=0)
    with running(settings) as live:
        finished(live.store, 60)
        yield live
