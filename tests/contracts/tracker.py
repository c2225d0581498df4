"""What every tracker has to do: what is in the store is there, once, however often it is tracked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from evomerge.records import Candidate, Outcome, TaskScore
from evomerge.store import Run, Store
from evomerge.trackers.feed import Feed
from evomerge.trackers.targets import Target, parse_target

SCORES: dict[int, float | None] = {0: 0.25, 1: 0.5, 2: None, 3: 0.75, 4: 0.625}
"""Search score by candidate: a source, two proposals, one that failed, one that lost a race."""

FACTS = {
    "space": [["weight of one", "real", 0], ["density", "real", 0], ["seed", "categorical", 3]],
    "spans": [
        {"low": -1.0, "high": 1.0, "log": False, "choices": []},
        {"low": 0.01, "high": 1.0, "log": True, "choices": []},
        {"low": None, "high": None, "log": False, "choices": [0, 1, 2]},
    ],
    "sources": {"one": {}, "two": {}},
}


def outcome_of(number: int) -> Outcome:
    """Return the search outcome of a candidate of `SCORES`."""
    score = SCORES[number]
    cost = {"merge": 0.5, "evaluate": 1.5, "total": 2.0, "documents": 40.0}
    if score is None:
        return Outcome(number, "search", "failed", reason="the worker died", cost=cost)
    status = "stopped" if number == 4 else "ok"
    tasks = {} if number == 4 else {"sums": TaskScore(score, 0.01)}
    return Outcome(number, "search", status, score, 0.01, tasks, {}, cost=cost)


def begin(store: Store, name: str = "small") -> Run:
    """Create the run with its candidates; 1 to 4 are proposals."""
    run = store.create_run(name, {"name": name, "optimizer": {"name": "cma_es"}}, FACTS)
    for number in SCORES:
        proposed = number > 0
        genome = (0.25 * number - 0.25, 0.5, float(number % 3)) if proposed else None
        origin = "optimizer" if proposed else "source:one"
        index = number - 1 if proposed else None
        run.add_candidate(
            Candidate(number, origin, 0, index, genome, {"method": "ties"}, f"{number:064d}"), 0
        )
    return run


def score(run: Run, numbers: Sequence[int]) -> None:
    """Record search outcomes in this order."""
    for number in numbers:
        run.add_outcome(outcome_of(number), "digest")


def track(run: Run, *targets: Target, status: str | None = "finished") -> list[int]:
    """Track what there is; return how many outcomes each target had before."""

    def failed(target: Target, reason: str) -> None:
        raise AssertionError(f"{target}: {reason}")

    feed = Feed(run, targets, failed)
    try:
        feed.pull()
        known = list(feed.known.values())
        if status is not None:
            feed.end(status)
    finally:
        feed.close()
    return known


class TrackerContract:
    """Inherit it, say what the kind is, and how to read it back."""

    where: str

    def read(self, folder: Path) -> dict[int, dict[str, float]]:
        """Return the metrics by step; raise AssertionError where a step or metric is there twice."""
        raise NotImplementedError

    @pytest.fixture
    def run(self, tmp_path: Path) -> Iterator[Run]:
        with Store.open(tmp_path / "runs.db") as store:
            yield begin(store)

    @pytest.fixture
    def target(self, tmp_path: Path) -> Target:
        return parse_target(self.where, tmp_path)

    def test_everything_arrives_in_the_order_of_the_log(
        self, run: Run, target: Target, tmp_path: Path
    ) -> None:
        score(run, [0, 3, 2, 1, 4])
        run.add_outcome(Outcome(3, "test", "ok", 0.7, tasks={"sums": TaskScore(0.7)}), "digest")
        track(run, target)
        found = self.read(tmp_path)
        assert list(found) == [1, 2, 3, 4, 5, 6]
        assert found[1]["baselines/score"] == 0.25
        assert found[2] == {
            "outcomes": 2.0,
            "failures": 0.0,
            "search/score": 0.75,
            "search/best": 0.75,
            "search/sums": 0.75,
            "seconds/merge": 0.5,
            "seconds/evaluate": 1.5,
        }
        assert "search/score" not in found[3]
        assert found[3]["failures"] == 1.0
        assert (found[4]["search/score"], found[4]["search/best"]) == (0.5, 0.75)
        assert [found[6][name] for name in ("test/score", "test/sums")] == pytest.approx([0.7, 0.7])

    def test_a_run_tracked_twice_is_there_once(self, run: Run, target: Target, tmp_path: Path) -> None:
        score(run, [0, 1, 2])
        assert track(run, target) == [0]
        before = self.read(tmp_path)
        assert list(before) == [1, 2, 3]
        assert track(run, target) == [3]
        assert self.read(tmp_path) == before

    def test_a_resumed_run_goes_on_where_it_was(self, run: Run, target: Target, tmp_path: Path) -> None:
        score(run, [0, 2])
        track(run, target, status=None)  # as if killed
        score(run, [1])
        track(run, target, status="stopped")
        score(run, [4, 3])
        assert track(run, target) == [3]
        found = self.read(tmp_path)
        assert [found[step].get("search/score", 0.0) for step in found] == [0.0, 0.0, 0.5, 0.625, 0.75]


def plain(data: Any) -> dict[str, float]:
    """Return what is a number in the metrics' names."""
    kinds = ("baselines/", "search/", "select/", "test/", "seconds/", "outcomes", "failures")
    return {name: float(value) for name, value in data.items() if name.startswith(kinds)}
