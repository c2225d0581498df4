"""Scores, standard errors and intervals from document values."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.fitness.scoring import (
    KINDS,
    Resampled,
    TaskRule,
    aggregate,
    combine,
    combined_error,
    plain_rules,
    standard_error,
)

VALUES = st.lists(st.floats(-20, 20), min_size=2, max_size=30)
PAIRS = st.lists(st.tuples(st.floats(-50, -0.01), st.integers(1, 50)), min_size=2, max_size=30)


def rule(kind="mean", weight=1.0, higher=True):
    return TaskRule(kind, weight, higher, "metric", "group")


def one(kind, values):
    return aggregate(rule(kind), values)


def interval(rules, values, **options):
    """The interval of one model's score."""
    return Resampled(rules, [values], **options).score(0)


def gain(rules, values, other, **options):
    """The interval of the difference of two models' scores."""
    return Resampled(rules, [values, other], **options).gain(0, 1)


@given(VALUES, PAIRS)
def test_metrics_follow_their_formulas(values, pairs):
    top, bottom = (math.fsum(part) for part in zip(*pairs, strict=True))
    mean = math.fsum(values) / len(values)
    assert one("mean", values) == pytest.approx(mean, abs=1e-12)
    assert one("perplexity", values) == pytest.approx(math.exp(-mean))
    assert one("weighted_perplexity", pairs) == pytest.approx(math.exp(-top / bottom))
    assert one("bits_per_byte", pairs) == pytest.approx(-top / bottom / math.log(2))


@given(VALUES, PAIRS)
def test_metrics_and_errors_are_those_of_lm_eval(values, pairs):
    metrics = pytest.importorskip("lm_eval.api.metrics")
    assert one("mean", values) == pytest.approx(metrics.mean(values), abs=1e-12)
    assert one("perplexity", values) == pytest.approx(metrics.perplexity(values))
    assert one("weighted_perplexity", pairs) == pytest.approx(metrics.weighted_perplexity(pairs))
    assert one("bits_per_byte", pairs) == pytest.approx(metrics.bits_per_byte(pairs))
    assert standard_error(rule(), values) == pytest.approx(metrics.mean_stderr(values), abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_ends_of_an_interval_are_metrics_of_resampled_documents(kind):
    pairs = kind in ("weighted_perplexity", "bits_per_byte")
    values = [(-3.0, 4.0), (-1.0, 2.0)] if pairs else [-3.0, -1.0]
    samples = [[a, b] for a in values for b in values]
    found = Resampled({"t": rule(kind)}, [{"t": values}], draws=600, level=0.9)
    metrics = [one(kind, sample) for sample in samples]
    assert (found.task(0, "t").low, found.task(0, "t").high) == pytest.approx((min(metrics), max(metrics)))
    assert found.task(0, "t").mean == pytest.approx(one(kind, values))


def test_a_hopeless_perplexity_is_infinite_without_a_warning():
    assert one("perplexity", [-1e4, -1e4]) == math.inf


def test_an_error_needs_two_documents_and_a_mean():
    assert standard_error(rule(), [1.0]) is None
    assert standard_error(rule("perplexity"), [1.0, 2.0]) is None
    assert standard_error(rule(), [0.0, 1.0]) == pytest.approx(0.5)


def test_the_score_is_the_weighted_mean_with_lower_is_better_negated():
    rules = {"acc": rule(weight=3.0), "loss": rule(weight=1.0, higher=False)}
    metrics = {"acc": np.array([0.8, 0.4]), "loss": np.array([2.0, 1.0])}
    assert combine(rules, metrics) == pytest.approx([(3 * 0.8 - 2.0) / 4, (3 * 0.4 - 1.0) / 4])


def test_errors_of_independent_tasks_add_in_squares():
    rules = {"a": rule(weight=3.0), "b": rule(weight=1.0, higher=False)}
    assert combined_error(rules, {"a": 0.1, "b": 0.4}) == pytest.approx(math.hypot(0.075, 0.1))
    assert combined_error(rules, {"a": 0.1, "b": None}) is None


def test_a_rule_survives_json():
    given_rule = TaskRule("bits_per_byte", 0.25, False, "bits_per_byte", "wiki")
    assert TaskRule(**given_rule.to_json()) == given_rule


def test_the_interval_of_a_mean_is_the_normal_one_for_many_documents():
    random = np.random.default_rng(0)
    values = list(random.normal(3.0, 2.0, size=2000))
    found = interval({"t": rule()}, {"t": values}, draws=4000)
    error = float(np.std(values, ddof=1)) / math.sqrt(2000)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.low == pytest.approx(found.mean - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(found.mean + 1.96 * error, abs=0.15 * error)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Two tasks, 80 documents each; the truth is known because the documents are drawn from it."""
    random = np.random.default_rng(1)
    rules = {"acc": rule(weight=2.0), "loss": rule(weight=1.0, higher=False)}
    truth = (2 * 0.6 - 1.5) / 3
    covered = 0
    for _ in range(400):
        values = {
            "acc": (random.random(80) < 0.6).astype(float),
            "loss": random.gamma(3.0, 0.5, size=80),
        }
        found = interval(rules, values, draws=400, seed=int(random.integers(1 << 30)))
        covered += found.low <= truth <= found.high
    assert covered / 400 == pytest.approx(0.95, abs=0.03)


def test_the_paired_interval_covers_a_true_difference_as_often_as_it_says():
    random = np.random.default_rng(2)
    covered = 0
    for _ in range(400):
        shared = random.normal(size=60)
        mine = {"t": shared + 0.3 + 0.4 * random.normal(size=60)}
        theirs = {"t": shared + 0.4 * random.normal(size=60)}
        found = gain({"t": rule()}, mine, theirs, draws=400, seed=int(random.integers(1 << 30)))
        covered += found.low <= 0.3 <= found.high
    assert covered / 400 == pytest.approx(0.95, abs=0.03)


def test_pairing_makes_the_interval_of_correlated_candidates_much_narrower():
    random = np.random.default_rng(3)
    shared = random.normal(size=200)
    mine = {"t": shared + 0.1 * random.normal(size=200) + 0.05}
    theirs = {"t": shared + 0.1 * random.normal(size=200)}
    rules = {"t": rule()}
    paired = gain(rules, mine, theirs, draws=2000)
    alone = [interval(rules, values, draws=2000) for values in (mine, theirs)]
    unpaired = math.hypot(*(found.high - found.low for found in alone))
    assert paired.high - paired.low < unpaired / 5
    assert paired.mean == pytest.approx(alone[0].mean - alone[1].mean)


@pytest.mark.parametrize("kind", KINDS)
def test_a_candidate_against_itself_gains_exactly_nothing(kind):
    random = np.random.default_rng(4)
    pairs = [(-float(a), float(b)) for a, b in random.uniform(1, 9, size=(30, 2))]
    values = {"t": pairs if kind in ("weighted_perplexity", "bits_per_byte") else [a for a, _ in pairs]}
    found = gain({"t": rule(kind)}, values, values, draws=200)
    assert (found.mean, found.low, found.high) == (0.0, 0.0, 0.0)


def test_an_interval_is_a_function_of_values_and_seed():
    values = {"t": [0.0, 1.0, 1.0, 0.0, 1.0]}
    rules = {"t": rule()}
    assert interval(rules, values, draws=700, seed=5) == interval(rules, values, draws=700, seed=5)
    # So few documents have few means; the ends can agree by chance, the level cannot.
    wide, narrow = (interval(rules, values, draws=700, level=level) for level in (0.95, 0.5))
    assert wide.low < narrow.low < narrow.high < wide.high
    assert (wide.level, narrow.level) == (0.95, 0.5)


def test_documents_must_be_the_same_for_all():
    with pytest.raises(ValueError, match=r"task t: models have values of \[2, 3\] documents"):
        Resampled({"t": rule()}, [{"t": [0.0, 1.0]}, {"t": [0.0, 1.0, 1.0]}])


def test_one_document_has_no_interval():
    found = interval({"t": rule()}, {"t": [0.7]}, draws=50)
    assert (found.mean, found.low, found.high) == (0.7, None, None)


def test_a_model_has_the_same_interval_in_any_company():
    random = np.random.default_rng(5)
    rules = {"a": rule(weight=2.0), "b": rule("perplexity", higher=False), "c": rule("bits_per_byte")}
    models = [
        {
            "a": random.normal(size=20).tolist(),
            "b": (-random.random(30)).tolist(),
            "c": [(-float(x), 3.0) for x in random.random(10)],
        }
        for _ in range(3)
    ]
    together = Resampled(rules, models, draws=700, seed=3)
    for i, model in enumerate(models):
        alone = interval(rules, model, draws=700, seed=3)
        for one_end in ("mean", "low", "high"):
            assert getattr(together.score(i), one_end) == pytest.approx(getattr(alone, one_end))
    assert together.gain(0, 2).mean == pytest.approx(together.score(0).mean - together.score(2).mean)
    direct = combine(rules, {name: aggregate(rules[name], models[1][name]) for name in rules})
    assert together.score(1).mean == pytest.approx(direct)


def test_a_callables_results_are_plain_means_of_equal_weight():
    rules = plain_rules(["a", "b"])
    found = Resampled(rules, [{"a": [1.0, 3.0], "b": [0.0]}], draws=50)
    assert found.score(0).mean == pytest.approx(1.0)
    assert (found.task(0, "b").low, found.task(0, "a").mean) == (None, 2.0)
