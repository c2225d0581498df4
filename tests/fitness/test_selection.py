"""Honest selection: finalists by search, winner by select, claim by test."""

import pytest

from evomerge.fitness.scoring import Interval
from evomerge.fitness.selection import (
    Gain,
    baseline_name,
    by_select,
    finalists,
    is_baseline,
    kept_baselines,
    score,
    search_score,
    winner,
)
from evomerge.records import Candidate, DocumentSet, Outcome, TaskScore


def candidate(number, origin="optimizer", digest=None):
    return Candidate(number, origin, 0, None, None, {}, digest or f"digest{number}")


def outcome(number, documents, value):
    if value is None:
        return Outcome(number, documents, "failed", reason="crash")
    return Outcome(number, documents, "ok", value)


def scored(*outcomes):
    return {(o.candidate, o.documents): o for o in outcomes}


def test_finalists_are_the_best_by_search_score_with_ties_to_the_first():
    candidates = [candidate(i) for i in range(5)]
    search = {0: 0.1, 1: 0.9, 2: 0.5, 3: 0.9, 4: 0.5}
    assert finalists(candidates, search, 3) == [1, 3, 2]
    assert finalists(candidates, search, 99) == [1, 3, 2, 4, 0]


def test_equal_recipes_are_one_finalist():
    candidates = [candidate(0, digest="x"), candidate(1, digest="x"), candidate(2)]
    assert finalists(candidates, {0: 0.8, 1: 0.9, 2: 0.1}, 2) == [1, 2]


def test_means_are_always_in_and_do_not_take_a_place():
    candidates = [candidate(0), candidate(1), candidate(2, "mean"), candidate(3, digest="digest2")]
    search = {0: 0.5, 1: 0.4, 3: 0.9}
    assert finalists(candidates, search, 2, means=[2]) == [2, 0, 1]


def test_neither_baselines_nor_unscored_candidates_are_finalists():
    candidates = [candidate(0, "source:math"), candidate(1, "baseline:uniform"), candidate(2), candidate(3)]
    assert finalists(candidates, {0: 0.9, 1: 0.9, 3: 0.1}, 5) == [3]
    assert finalists(candidates, {}, 5) == []


def test_warm_starts_compete_like_searched_candidates():
    candidates = [candidate(0, "start:a.yaml"), candidate(1)]
    assert finalists(candidates, {0: 0.9, 1: 0.1}, 1) == [0]


def test_the_whole_search_split_counts_before_draws_of_it():
    found = search_score(
        [
            outcome(0, "search@1", 0.2),
            outcome(0, "search", 0.5),
            outcome(0, "search@2", 0.9),
            outcome(1, "search@4", 0.3),
            outcome(1, "select", 0.8),
            outcome(2, "search", None),
            outcome(3, "test", 1.0),
        ]
    )
    assert found == {0: 0.5, 1: 0.3}


def test_of_baselines_at_several_scales_the_best_on_search_is_kept():
    candidates = [
        candidate(0, "source:math"),
        candidate(1, "baseline:uniform"),
        candidate(2, "baseline:task_arithmetic@0.2"),
        candidate(3, "baseline:task_arithmetic@0.4"),
        candidate(4, "baseline:task_arithmetic@0.6"),
        candidate(5),
    ]
    search = {0: 0.1, 2: 0.3, 3: 0.6, 4: 0.6, 5: 0.99}
    kept = kept_baselines(candidates, search)
    assert [c.number for c in kept] == [0, 1, 3]
    assert [baseline_name(c) for c in kept] == ["math", "uniform", "task_arithmetic"]


def test_a_scale_that_failed_is_kept_only_if_all_did():
    candidates = [candidate(0, "baseline:task_arithmetic@0.2"), candidate(1, "baseline:task_arithmetic@0.4")]
    assert [c.number for c in kept_baselines(candidates, {1: -9.0})] == [1]
    assert [c.number for c in kept_baselines(candidates, {})] == [0]


def test_a_source_named_like_a_simple_merge_stays_a_baseline_of_its_own():
    candidates = [candidate(0, "source:uniform"), candidate(1, "baseline:uniform")]
    kept = kept_baselines(candidates, {0: 0.1, 1: 0.2})
    assert [c.number for c in kept] == [0, 1]


def test_baselines_are_sources_and_simple_merges():
    origins = ("source:a", "baseline:uniform", "optimizer", "mean", "start:x")
    assert [is_baseline(candidate(0, origin)) for origin in origins] == [True, True, False, False, False]


def test_the_winner_has_the_best_select_score_and_the_first_of_equals():
    outcomes = scored(
        outcome(4, "select", 0.5),
        outcome(2, "select", 0.7),
        outcome(9, "select", 0.7),
        outcome(1, "search", 0.99),
        outcome(3, "select", None),
    )
    assert winner([4, 9, 2, 1, 3], outcomes) == 9
    assert winner([4, 2, 9], outcomes) == 2
    assert winner([1, 3], outcomes) is None
    assert winner([], outcomes) is None


def test_a_negative_or_zero_score_can_win():
    assert winner([0, 1], scored(outcome(0, "select", -2.0), outcome(1, "select", -1.0))) == 1
    assert winner([0, 1], scored(outcome(0, "select", 0.0), outcome(1, "select", -1.0))) == 0


def test_a_score_is_none_where_there_is_no_outcome_or_no_success():
    outcomes = scored(outcome(0, "select", 0.0), outcome(1, "select", None))
    assert [score(outcomes, number, "select") for number in range(3)] == [0.0, None, None]


def test_the_best_baseline_on_select_comes_first_and_the_unscored_last():
    outcomes = scored(
        outcome(0, "select", -0.5),
        outcome(1, "select", 0.0),
        outcome(3, "select", None),
        outcome(4, "select", 0.0),
        outcome(2, "test", 0.9),
    )
    baselines = [candidate(number, f"source:{number}") for number in range(5)]
    assert [found.number for found in by_select(baselines, outcomes)] == [1, 4, 0, 2, 3]


@pytest.mark.parametrize(("low", "shown"), [(0.01, True), (0.0, False), (-0.1, False), (None, False)])
def test_a_gain_is_shown_only_where_the_interval_lies_above_zero(low, shown):
    assert Gain("math", Interval(0.3, low, None if low is None else 0.5)).shown is shown


def test_an_outcome_survives_json_with_values_of_both_kinds():
    given = Outcome(
        candidate=3,
        documents=DocumentSet("search", 2).key,
        status="ok",
        score=0.5,
        stderr=None,
        tasks={"a": TaskScore(0.5, 0.1), "b": TaskScore(2.0)},
        values={"a": (0.0, 1.0), "b": ((-3.0, 4.0), (-1.0, 2.0))},
        cost={"total": 1.5},
    )
    assert Outcome.from_json(given.to_json()) == given
    assert DocumentSet.of_key("search@2") == DocumentSet("search", 2)
    assert DocumentSet.of_key("test") == DocumentSet("test")


@pytest.mark.parametrize(
    ("status", "value"), [("ok", None), ("ok", float("nan")), ("failed", 0.5), ("invalid", 0.0)]
)
def test_only_a_finite_score_is_ok(status, value):
    with pytest.raises(ValueError, match=f"status {status} cannot have score {value}"):
        Outcome(0, "search", status, value)
