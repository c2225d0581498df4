"""Optuna loads what was written: values, states, parameters, intermediate values, attributes."""

from __future__ import annotations

import math
from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

from evomerge.records import Outcome
from evomerge.store import Store
from evomerge.trackers.optuna_study import Parameters
from evomerge.trackers.targets import parse_target
from tests.contracts.tracker import SCORES, begin, score, track


def load(folder: Path, name: str = "small") -> optuna.Study:
    return optuna.load_study(study_name=name, storage=f"sqlite:///{folder}/study.db")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a study of a run with all kinds of outcome."""
    with Store.open(tmp_path / "runs.db") as store:
        run = begin(store)
        score(run, [0, 3, 2, 1, 4])
        for number, split, found in ((3, "select", 0.7), (0, "select", 0.3), (3, "test", 0.65)):
            run.add_outcome(Outcome(number, split, "ok", found), "digest")
        track(run, parse_target("optuna:study.db", tmp_path))
    return tmp_path


def test_trials_are_the_candidates(folder: Path) -> None:
    study = load(folder)
    assert study.direction is optuna.study.StudyDirection.MAXIMIZE
    assert [trial.number for trial in study.trials] == list(SCORES)
    states = [
        TrialState.COMPLETE,
        TrialState.COMPLETE,
        TrialState.FAIL,
        TrialState.COMPLETE,
        TrialState.PRUNED,
    ]
    assert [trial.state for trial in study.trials] == states
    assert [t.value for t in study.trials if t.state is TrialState.COMPLETE] == [0.25, 0.5, 0.75]
    assert (study.best_trial.number, study.best_value) == (3, 0.75)
    assert study.trials[2].user_attrs["reason"] == "the worker died"
    assert study.trials[3].user_attrs["task sums"] == 0.75
    assert study.trials[3].duration.total_seconds() == pytest.approx(2.0)
    assert study.trials[4].intermediate_values == {40: 0.625}


def test_parameters_are_those_that_were_merged_with(folder: Path) -> None:
    first, trial = load(folder).trials[0], load(folder).trials[3]
    assert first.params == {}
    assert trial.params == {"weight of one": 0.0, "density": pytest.approx(0.1), "seed": 0}
    assert trial.distributions == {
        "weight of one": FloatDistribution(-1.0, 1.0),
        "density": FloatDistribution(0.01, 1.0, log=True),
        "seed": CategoricalDistribution((0, 1, 2)),
    }
    assert optuna.importance.get_param_importances(load(folder)).keys() == trial.params.keys()


def test_what_was_found_is_said_of_the_study(folder: Path) -> None:
    attributes = load(folder).user_attrs
    assert attributes["select"] == {"0": 0.3, "3": 0.7}
    assert attributes["test"] == {"3": 0.65}
    assert (attributes["winner"], attributes["winner scores"]) == (3, {"select": 0.7, "test": 0.65})
    assert (attributes["status"], attributes["sources"]) == ("finished", ["one", "two"])


def test_trials_run_until_they_are_scored_and_are_there_once(tmp_path: Path) -> None:
    target = parse_target("optuna:study.db", tmp_path)
    with Store.open(tmp_path / "runs.db") as store:
        run = begin(store)
        score(run, [1])
        track(run, target, status=None)
        states = [trial.state for trial in load(tmp_path).trials]
        assert states == [TrialState.RUNNING, TrialState.COMPLETE, *[TrialState.RUNNING] * 3]
        score(run, [3, 4, 2])
        assert track(run, target, status="stopped") == [1]
        assert load(tmp_path).trials[0].state is TrialState.RUNNING
        assert load(tmp_path).trials[4].intermediate_values == {40: 0.625}
        before = load(tmp_path).trials
        assert track(run, target, status="stopped") == [4]
        assert load(tmp_path).trials == before
        track(run, target)
    assert [t.state for t in load(tmp_path).trials].count(TrialState.FAIL) == 2
    assert len(load(tmp_path).trials) == 5


def test_outcomes_that_a_killed_tracker_wrote_but_did_not_count_are_not_doubled(tmp_path: Path) -> None:
    target = parse_target("optuna:study.db", tmp_path)
    with Store.open(tmp_path / "runs.db") as store:
        run = begin(store)
        score(run, [0, 1, 2])
        track(run, target, status=None)
        before = load(tmp_path).trials
        load(tmp_path).set_user_attr("evomerge:outcomes", 1)
        assert track(run, target, status=None) == [1]
    assert load(tmp_path).trials == before


def test_a_study_of_another_run_is_refused(tmp_path: Path) -> None:
    optuna.create_study(study_name="small", storage=f"sqlite:///{tmp_path}/study.db").add_trial(
        optuna.trial.create_trial(value=1.0)
    )
    with Store.open(tmp_path / "runs.db") as store, pytest.raises(AssertionError, match="another study"):
        track(begin(store), parse_target("optuna:study.db", tmp_path))


def test_spaces_without_bounds_are_shown_in_their_coding() -> None:
    facts = {"space": [["a", "real", 0], ["b", "integer", 4], ["c", "categorical", 2]]}
    values, distributions = Parameters(facts).of((0.25, 3.0, 1.0))
    assert values == {"a": 0.25, "b": 3, "c": 1}
    assert all(distributions[name]._contains(value) for name, value in values.items())
    assert Parameters(facts).of((0.25,)) == ({}, {})
    assert Parameters(facts).of(None) == ({}, {})
    assert math.isclose(values["a"], 0.25)
