"""What people are shown while a run goes on."""

from __future__ import annotations

from typing import Any

import pytest

from evomerge.cli.display import Watcher, spent

LINE: dict[str, Any] = {
    "status": "running",
    "candidates": 28,
    "evaluations": 20,
    "budget": 24,
    "best_search_score": 0.5,
    "error": "",
}


def test_a_watcher_counts_what_the_budget_counts_and_the_rest_apart(
    capsys: pytest.CaptureFixture[str],
) -> None:
    watcher = Watcher()
    for line in (LINE, LINE, {**LINE, "candidates": 29, "evaluations": 21}, {**LINE, "status": "finished"}):
        watcher.state(line)
    watcher.event("phase", {"phase": "search"})
    assert capsys.readouterr().err.splitlines() == [
        "running: 20/24 evaluations, 8 candidates besides (baselines and the like), "
        "best search score 0.500 (baselines included)",
        "running: 21/24 evaluations, 8 candidates besides (baselines and the like), "
        "best search score 0.500 (baselines included)",
        "finished: 20/24 evaluations, 8 candidates besides (baselines and the like), "
        "best search score 0.500 (baselines included)",
        "phase: search",
    ]


def test_a_job_that_has_not_begun_has_nothing_to_count_and_no_budget_yet(
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = {**LINE, "status": "queued", "candidates": 0, "evaluations": 0, "budget": None}
    Watcher().state({**line, "best_search_score": None})
    assert capsys.readouterr().err == "queued\n"
    assert spent(line) == "0/?"
