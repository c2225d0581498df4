"""Races: the stopping rule against simulation and by hand, and what the harness makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge.errors import FitnessError
from evomerge.fitness.harness import Evaluation, Harness
from evomerge.fitness.racing import Race, Races, rung_sizes, standing
from evomerge.fitness.scoring import TaskRule, plain_rules
from evomerge.fitness.settings import FitnessSettings
from evomerge.fitness.tasks import TaskSet
from evomerge.records import DocumentSet, Outcome
from tests.checkpoints.tiny import make_llama
from tests.fitness import tiny_tasks as tiny

SEARCH = DocumentSet("search")
RULES = plain_rules(["t"])


def race(pacer: Any, rungs: tuple[float, ...] = (0.5,), error: float = 0.05) -> Race:
    values = np.asarray(pacer, dtype=float)
    return Race(rungs, error, {"t": values}, float(values.mean()))


def test_the_estimate_is_the_pacers_score_and_the_paired_difference() -> None:
    pacer = [1.0, 0.0] * 10
    ids = range(10)
    found = standing(race(pacer), RULES, {"t": ids}, {"t": [0.0] * 8 + [1.0, 0.0]})
    assert found.score == pytest.approx(0.5 - 0.4)
    differences = np.array([-1.0, 0.0] * 4 + [0.0, 0.0])
    assert found.stderr == pytest.approx(np.sqrt(differences.var(ddof=1) * (1 / 10 - 1 / 20)))
    assert found.hopeless


def test_what_says_nothing_stops_nobody() -> None:
    pacer = [1.0] * 40
    alike = standing(race(pacer), RULES, {"t": range(20)}, {"t": [1.0] * 20})
    assert not alike.hopeless
    few = standing(race(pacer), RULES, {"t": range(7)}, {"t": [0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]})
    assert not few.hopeless
    better = standing(race([0.0, 1.0] * 20), RULES, {"t": range(20)}, {"t": [1.0] * 20})
    assert not better.hopeless


def test_tasks_count_by_weight_and_lower_may_be_better() -> None:
    rules = {
        "a": TaskRule("mean", 3.0, True, "acc", "a"),
        "b": TaskRule("mean", 1.0, False, "length", "b"),
    }
    pacer = {"a": [0.5] * 20, "b": [4.0] * 20}
    found = standing(
        Race((0.5,), 0.05, pacer, score=-0.625),
        rules,
        {"a": range(10), "b": range(10)},
        {"a": [0.25] * 10, "b": [2.0] * 10},
    )
    assert found.score == pytest.approx(-0.625 + 0.75 * -0.25 + 0.25 * 2.0)


@pytest.mark.parametrize("error", [0.05, 0.2])
def test_few_who_would_have_come_out_above_are_stopped(error: float) -> None:
    draw, wrong, stopped, above = np.random.default_rng(0), 0, 0, 0
    for _ in range(3000):
        skill = draw.random(100)
        pacer = (draw.random(100) < skill).astype(float)
        other = (draw.random(100) < np.clip(skill + draw.normal(0, 0.15), 0, 1)).astype(float)
        set_race = race(pacer, (0.25, 0.5), error)
        order = draw.permutation(100)
        lost = any(
            standing(set_race, RULES, {"t": order[:n]}, {"t": other[order[:n]]}).hopeless
            for n in rung_sizes(set_race.rungs, 100)[:-1]
        )
        above += other.mean() > pacer.mean()
        stopped += lost
        wrong += lost and other.mean() > pacer.mean()
    assert wrong / above <= error
    assert stopped > 300


def outcome(number: int, score: float, status: Any = "ok") -> Outcome:
    return Outcome(number, "search", status, score, values={"t": (score, score)} if status == "ok" else {})


def test_the_pacer_is_the_last_parent_that_was_scored_to_the_end() -> None:
    before = {1: outcome(1, 0.9), 2: outcome(2, 0.8, "stopped"), 3: outcome(3, 0.7), 4: outcome(4, 0.6)}
    races = Races((0.5,), 0.1)
    assert races.of(0, [], before.get) is None
    first = races.of(1, before.items(), before.get)
    assert first == Race((0.5,), 0.1, {"t": (0.7, 0.7)}, 0.7)
    assert races.of(1, [], before.get) is first
    assert races.of(2, [(2, before[2]), (5, None)], before.get) is None


# The harness


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    path = make_llama(tmp_path_factory.mktemp("llama"))
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def task_set(folder: Path, *tasks: Any, **more: Any) -> TaskSet:
    counts = {"search": 40, "select": 2, "test": 2}
    data = {"tasks": tasks, "include_paths": [str(folder)], "documents": counts, **more}
    return TaskSet(FitnessSettings.model_validate(data), 7, folder)


def shifted(whole: Evaluation, step: float) -> Race:
    """Return a race against one who is better by `step` and a little on every document."""
    pacer = {
        name: [value + step + 0.01 * (i % 3) for i, value in enumerate(values)]
        for name, values in whole.values.items()
    }
    return Race((0.25, 0.5), 0.05, pacer, whole.score + step + 0.01)


def test_a_lost_race_ends_after_a_rung_and_one_that_is_not_changes_nothing(
    llama: tuple[Any, Any], tmp_path: Path
) -> None:
    tiny.write_choice(tmp_path, "choice", 44)
    tiny.write_generation(tmp_path, "answer", 44)
    harness = Harness.of_model(
        task_set(tmp_path, {"name": "choice", "also": {"gold_loglikelihood": 0.1}}, "answer"), *llama
    )
    whole = harness.evaluate(SEARCH)
    assert not whole.stopped
    assert (whole.counts["documents"], whole.counts["skipped_documents"]) == (80, 0)
    lost = harness.evaluate(SEARCH, shifted(whole, 0.3))
    assert lost.stopped
    assert (lost.counts["documents"], lost.counts["skipped_documents"]) == (20, 60)
    assert lost.counts["tokens"] < 0.5 * whole.counts["tokens"]
    assert lost.score == pytest.approx(whole.score, abs=0.02)
    assert not lost.values
    won = harness.evaluate(SEARCH, shifted(whole, -0.3))
    assert not won.stopped
    assert won.values.keys() == whole.values.keys()
    for name, values in whole.values.items():
        assert won.values[name] == pytest.approx(values, abs=1e-5)
    assert won.counts["documents"] == 80
    with pytest.raises(ValueError, match="a race on select documents"):
        harness.evaluate(DocumentSet("select"), shifted(whole, 0.3))


def test_rungs_have_every_document_once(tmp_path: Path) -> None:
    tiny.write_choice(tmp_path, "choice", 44)
    tasks = task_set(tmp_path, "choice")
    rungs = tasks.rungs(SEARCH, (0.1, 0.5))
    assert [len(rung["choice"]) for rung in rungs] == [4, 16, 20]
    assert sorted(i for rung in rungs for i in rung["choice"]) == list(range(40))
    assert rungs == task_set(tmp_path, "choice").rungs(SEARCH, (0.1, 0.5))


def test_a_metric_that_is_no_mean_cannot_be_raced(tmp_path: Path) -> None:
    tiny.write_text(tmp_path, "text", 44)
    with pytest.raises(FitnessError, match="fitness.racing: text's word_perplexity is no mean"):
        task_set(tmp_path, "text", racing={})


@pytest.mark.parametrize(
    ("racing", "more", "message"),
    [
        ({"rungs": [0.5, 0.25]}, {}, "expected ascending shares"),
        ({"rungs": [0.5, 1.0]}, {}, "expected ascending shares"),
        ({"error": 0.5}, {}, "less than 0.5"),
        ({}, {"resample": 3}, "leave out resample"),
        ({}, {"function": "f.py:f", "tasks": []}, "leave out a function"),
    ],
)
def test_settings_that_make_no_race_are_refused(racing: Any, more: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FitnessSettings.model_validate({"tasks": ["t"], "racing": racing, **more})
