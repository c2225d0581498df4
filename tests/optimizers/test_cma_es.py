"""CMA-ES."""

import dataclasses
import json
import math
from typing import ClassVar

import cmaes
import numpy as np
import pytest

from evomerge.errors import ConfigError
from evomerge.optimizers import StateError, create
from evomerge.optimizers.cma_models import MixedModel, RealModel
from evomerge.seeding import stream
from evomerge.spaces.dimensions import Dimension, check_genome
from tests.contracts.optimizer import MIXED, ORDERED, REALS, OptimizerContract, quality

CATEGORIES = (
    Dimension("a", "categorical", 3),
    Dimension("b", "categorical", 2),
    Dimension("c", "integer", 2),
)


class TestFull(OptimizerContract):
    """Full covariance with learning-rate adaptation."""

    name = "cma_es"
    settings: ClassVar = {"population": 6}


class TestFullPlain(OptimizerContract):
    """Full covariance without it, restarting often."""

    name = "cma_es"
    settings: ClassVar = {"population": 4, "lr_adapt": False, "restart_after": 3, "separable_above": 1000}
    big = 0


class TestSeparable(OptimizerContract):
    """Diagonal covariance."""

    name = "cma_es"
    settings: ClassVar = {"population": 6, "separable_above": 1}


class TestMixed(OptimizerContract):
    """CatCMA with margin over every kind of dimension."""

    name = "cma_es"
    settings: ClassVar = {"population": 6}
    dimensions = MIXED


class TestOrdered(OptimizerContract):
    """CatCMA with margin without categories, restarting often."""

    name = "cma_es"
    settings: ClassVar = {"population": 5, "restart_after": 2}
    dimensions = ORDERED
    big = 0


class TestCategories(OptimizerContract):
    """CatCMA with margin without a Gaussian part."""

    name = "cma_es"
    settings: ClassVar = {"population": 6}
    dimensions = CATEGORIES

    test_a_start_begins_the_search = None  # its first dimension is not real


class TestTiny(OptimizerContract):
    """The smallest population."""

    name = "cma_es"
    settings: ClassVar = {"population": 2, "restart_after": 4}
    dimensions = MIXED
    big = 0


def drive(optimizer, score, budget):
    """Run until the budget or the end; return the genomes asked."""
    asked = []
    while len(asked) < budget and (proposal := optimizer.ask()) is not None:
        asked.append(proposal.genome)
        optimizer.tell(proposal.index, score(proposal.genome))
    return asked


@pytest.mark.parametrize("size", [6, 24])
def test_its_mean_beats_random_search_on_a_noisy_sphere(size):
    space = [Dimension(f"r{place}", "real") for place in range(size)]
    gains = []
    for seed in range(8):
        chance = stream(seed, "sphere")
        top = chance.uniform(0.2, 0.8, size)

        def true(genome, top=top):
            return -float(np.mean((np.array(genome) - top) ** 2))

        def noisy(genome, chance=chance, true=true):
            return true(genome) + 0.02 * chance.standard_normal()

        optimizer = create("cma_es", space, seed)
        drive(optimizer, noisy, 400)
        random = drive(create("random", space, seed), noisy, 400)
        best = max(random, key=noisy)
        gains.append(true(optimizer.recommendation()[0]) - true(best))
    assert sum(gain > 0 for gain in gains) >= 7
    assert np.mean(gains) > 0.01


@pytest.mark.parametrize(
    ("space", "settings"),
    [
        (REALS, {}),
        (REALS, {"lr_adapt": False}),
        (REALS, {"separable_above": 0}),
        (MIXED, {}),
        (CATEGORIES, {}),
    ],
)
def test_it_finds_the_top(space, settings):
    optimizer = create("cma_es", space, 3, settings)
    asked = drive(optimizer, lambda genome: quality(space, genome), 900)
    best = max(quality(space, genome) for genome in asked)
    reachable = max(
        quality(space, genome) for genome in drive(create("random", space, 3), lambda _: 0.0, 2000)
    )
    assert best >= min(reachable, -0.02)
    assert quality(space, optimizer.recommendation()[0]) >= best - 0.02


@pytest.mark.parametrize("sizes", [(9, 9), (3, 40)])
def test_integers_of_unequal_sizes_reach_their_last_value(sizes):
    space = [Dimension("x", "real"), *(Dimension(f"n{size}", "integer", size) for size in sizes)]
    tops = [size - 1 for size in sizes]
    hits = 0
    for seed in range(5):
        optimizer = create("cma_es", space, seed)
        asked = drive(optimizer, lambda g: -((g[0] - 0.4) ** 2) + sum(g[1:]) / sum(tops), 400)
        hits += any(list(genome[1:]) == tops for genome in asked)
    assert hits == 5


@pytest.mark.parametrize(
    "model",
    [
        RealModel(REALS, 6, 0.2, None, adapt=True, separable=False),
        RealModel(REALS, 6, 0.2, None, adapt=False, separable=False),
        RealModel(REALS, 6, 0.2, None, adapt=True, separable=True),
        MixedModel(MIXED, 6, 0.2, None),
        MixedModel(CATEGORIES, 6, 0.2, None),
        MixedModel([Dimension("n", "integer", 5)], 6, 0.2, None),
    ],
)
def test_every_attribute_that_the_library_changes_is_carried_over(model):
    """Guards against a library version with more state."""

    def plain(library):
        return {
            name: np.array(value, dtype=float).tolist()
            for name, value in vars(library).items()
            if name not in model.varying and name != "_rng"
        }

    library = model._new()
    before = plain(library)
    numbers = model.initial()
    for generation in range(4):
        library = model._load(numbers)
        ranked = model.sample(numbers, generation)
        library.tell([(solution, float(rank)) for rank, solution in enumerate(ranked)])
        numbers, reason = model.update(numbers, ranked)
        assert reason == ""
    # Caches that are rebuilt, and what is set anew from its inputs within each tell.
    scratch = {"_B", "_D", "_int_succ", "_eps", "_funhist_values"}
    changed = {name for name, value in plain(library).items() if value != before[name]}
    assert changed <= scratch


def test_it_samples_what_the_library_alone_would_sample():
    """Building the library object anew each generation changes nothing but rounding in its caches."""
    model = RealModel(REALS, 6, 0.2, None, adapt=True, separable=False)
    library = cmaes.CMA(
        np.full(5, 0.5), 0.2, np.tile([0.0, 1.0], (5, 1)), population_size=6, lr_adapt=True, seed=0
    )
    numbers = model.initial()
    for generation in range(20):
        library.reseed_rng(generation)
        plain = [library.ask() for _ in range(6)]
        ours = model.sample(numbers, generation)
        np.testing.assert_allclose(plain, ours, atol=1e-9)
        order = np.argsort([np.sum((x - 0.2) ** 2) for x in ours])
        library.tell([(plain[place], float(rank)) for rank, place in enumerate(order)])
        numbers, _ = model.update(numbers, [ours[place] for place in order])


def test_restarts_grow_the_population_to_a_limit_and_say_why():
    optimizer = create("cma_es", REALS, 1, {"population": 4, "restart_after": 1, "population_growth": 3.0})
    scores = iter(range(100_000, 0, -1))
    drive(optimizer, lambda _: float(next(scores)), 400)
    notes = optimizer.drain_notes()
    assert "no better candidate for 1 generations; population 4 -> 12" in notes[0]
    assert "12 -> 32" in notes[1]
    assert "32 -> 32" in notes[2]
    assert not optimizer.finished


def test_equal_scores_restart_twice_and_then_end():
    optimizer = create("cma_es", REALS, 1)
    drive(optimizer, lambda _: 0.5, 10_000)
    assert len(optimizer.drain_notes()) == 2
    assert optimizer.finished == "every score so far is 0.5: there is nothing to climb"


def test_equal_scores_after_different_ones_only_restart():
    optimizer = create("cma_es", CATEGORIES, 1, {"population": 4})
    drive(optimizer, lambda genome: genome[0], 3000)
    assert len(optimizer.drain_notes()) > 2
    assert not optimizer.finished


def test_failing_generations_end_it_also_across_a_restart():
    optimizer = create("cma_es", REALS, 1, {"population": 4, "restart_after": 2})
    scores = iter([1.0, 2.0, 3.0, 4.0] + [None] * 100)
    asked = drive(optimizer, lambda _: next(scores), 100)
    assert len(asked) <= 4 * 1 + 4 * 2 + 8
    assert "failed" in optimizer.finished


def test_the_best_mean_of_earlier_restarts_is_recommended_too():
    optimizer = create("cma_es", REALS, 1, {"population": 6, "restart_after": 5})
    assert optimizer.recommendation() == []
    bonus = {0: 10.0}

    def score(genome):
        return quality(REALS, genome) + bonus.get(optimizer._restart, 0.0)

    while not optimizer.drain_notes():
        drive(optimizer, score, 1)
    first = optimizer.recommendation()
    assert len(first) == 1
    drive(optimizer, score, 40)
    both = optimizer.recommendation()
    assert both[0] == first[0]
    assert len(both) == 2


def test_convergence_and_divergence_restart():
    optimizer = create("cma_es", REALS[:2], 1, {"lr_adapt": False, "restart_after": 10_000})
    drive(optimizer, lambda g: -((g[0] - 0.3) ** 2) - (g[1] - 0.6) ** 2, 3000)
    assert any("converged" in note or "condition" in note for note in optimizer.drain_notes())
    optimizer = create("cma_es", REALS, 1, {"restart_after": 10_000})
    drive(optimizer, lambda g: max(abs(x - 0.5) for x in g), 3000)
    assert optimizer.asked == 3000


@pytest.mark.parametrize("space", [REALS, ORDERED, MIXED], ids=["real", "ordered", "mixed"])
@pytest.mark.parametrize("damage", ["zeros", "a huge condition"])
def test_a_degenerate_covariance_restarts_with_a_reason(space, damage):
    optimizer = create("cma_es", space, 1)
    size = len(optimizer._numbers["_C"])
    covariance = {
        "zeros": np.zeros((size, size)),
        "a huge condition": np.diag([1.0] * (size - 1) + [1e-30]),
    }
    optimizer._numbers["_C"] = covariance[damage]
    drive(optimizer, lambda genome: quality(space, genome), 60)
    note = optimizer.drain_notes()[0]
    assert "breakdown" in note or "condition" in note
    assert not optimizer.finished


def test_it_climbs_although_a_third_of_the_candidates_fails():
    chance = stream(2, "fails")
    optimizer = create("cma_es", REALS, 1)
    drive(optimizer, lambda genome: None if chance.random() < 0.3 else quality(REALS, genome), 600)
    assert quality(REALS, optimizer.recommendation()[0]) > -0.01


def test_a_full_covariance_over_thousands_of_dimensions_is_refused():
    with pytest.raises(ConfigError, match=r"separable_above: a full covariance over 2,000 .* at most 1,000"):
        create("cma_es", [Dimension(f"x{i}", "real") for i in range(2000)], 1, {"separable_above": 3000})


def test_a_start_in_a_corner_is_fine():
    for space in (REALS, MIXED, ORDERED):
        start = tuple(0.0 for _ in space)
        optimizer = create("cma_es", space, 1, {}, start)
        asked = drive(optimizer, lambda genome, space=space: quality(space, genome), 200)
        for genome in asked:
            check_genome(space, genome)
        assert all(math.isfinite(value) for genome in optimizer.recommendation() for value in genome)


def test_a_snapshot_of_other_shapes_or_with_infinities_is_refused():
    def fresh():
        return create("cma_es", REALS, 1).state()

    for name, value in (("_mean", [0.5] * 4), ("_sigma", 1e999), ("_C", None), ("_extra", 1.0)):
        state = fresh()
        state["numbers"][name] = value
        with pytest.raises(StateError):
            create("cma_es", REALS, 1).restore(state)
    state = json.loads(json.dumps(fresh()))
    state["numbers"]["_mean"]["bytes"] = "AAAA"
    with pytest.raises(StateError):
        create("cma_es", REALS, 1).restore(state)


def test_a_space_without_choice_is_refused():
    for name in ("cma_es", "optuna", "random"):
        with pytest.raises(ConfigError, match="nothing to search"):
            create(name, [Dimension("one", "categorical", 1)], 1)


def test_draws_that_differ_by_rounding_are_adopted_with_one_note():
    original = create("cma_es", MIXED, 1)
    resumed = create("cma_es", MIXED, 1)
    for _ in range(3):
        proposal = original.ask()
        rounded = tuple(
            value + 1e-13 if one.kind == "real" else value
            for one, value in zip(MIXED, proposal.genome, strict=True)
        )
        resumed.adopt(dataclasses.replace(proposal, genome=rounded))
    assert ["round differently" in note for note in resumed.drain_notes()] == [True]
    proposal = create("cma_es", MIXED, 1).ask()
    for shift, place in ((1e-6, 0), (math.nan, 0), (1e-13, 3)):
        other = list(proposal.genome)
        other[place] += shift
        with pytest.raises(StateError):
            create("cma_es", MIXED, 1).adopt(dataclasses.replace(proposal, genome=tuple(other)))
