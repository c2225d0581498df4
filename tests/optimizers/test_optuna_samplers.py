"""Optuna's samplers."""

import time
from typing import ClassVar

import pytest

from evomerge.errors import ConfigError
from evomerge.optimizers import create
from evomerge.spaces.dimensions import Dimension
from tests.contracts.optimizer import MIXED, ORDERED, REALS, OptimizerContract


class TestTpe(OptimizerContract):
    """Multivariate TPE with constant liar."""

    name = "optuna"
    settings: ClassVar = {"sampler": "tpe", "startup": 5}
    dimensions = MIXED
    budget = 36
    big = 100


class TestIndependentTpe(OptimizerContract):
    """TPE, one dimension at a time."""

    name = "optuna"
    settings: ClassVar = {"sampler": "tpe", "startup": 5, "multivariate": False, "constant_liar": False}
    dimensions = ORDERED
    budget = 26
    big = 0


class TestSobol(OptimizerContract):
    """Scrambled Sobol points."""

    name = "optuna"
    settings: ClassVar = {"sampler": "qmc"}
    dimensions = MIXED
    big = 200


class TestHalton(OptimizerContract):
    """Scrambled Halton points."""

    name = "optuna"
    settings: ClassVar = {"sampler": "qmc", "sequence": "halton"}
    big = 0


class TestNsga2(OptimizerContract):
    """NSGA-II with one objective."""

    name = "optuna"
    settings: ClassVar = {"sampler": "nsga2", "population": 6}
    dimensions = MIXED
    budget = 40
    big = 100


class TestCmaes(OptimizerContract):
    """Optuna's CMA-ES."""

    name = "optuna"
    settings: ClassVar = {"sampler": "cmaes", "population": 5}
    dimensions = ORDERED
    budget = 40
    big = 50


class TestGp(OptimizerContract):
    """Gaussian process; small, it is slow."""

    name = "optuna"
    settings: ClassVar = {"sampler": "gp", "startup": 5}
    dimensions = (*REALS[:1], *MIXED[-2:])
    budget = 14
    big = 0

    def test_the_order_of_tells_within_a_batch_changes_nothing(self):
        self.check_batches(lambda size: [*range(size)][::-1], lambda: False, batches=2)


def test_a_thousand_past_proposals_are_adopted_within_two_seconds():
    proposals = create("optuna", REALS, 1, {"sampler": "qmc"})
    past = [proposals.ask() for _ in range(1000)]
    optimizer = create("optuna", REALS, 2, {"sampler": "tpe"})
    began = time.perf_counter()
    for proposal in past:
        optimizer.adopt(proposal)
    for proposal in past:
        optimizer.tell(proposal.index, sum(proposal.genome))
    assert time.perf_counter() - began < 2
    assert optimizer.ask().index == 1000


def test_the_sequence_does_not_depend_on_outcomes():
    def genomes(score):
        optimizer = create("optuna", REALS, 1, {"sampler": "qmc"})
        asked = []
        for _ in range(20):
            asked.append(optimizer.ask())
            optimizer.tell(asked[-1].index, score)
        return [proposal.genome for proposal in asked]

    assert genomes(None) == genomes(1.0)


@pytest.mark.parametrize(("sampler", "most"), [("cmaes", "500"), ("gp", "1,000"), ("tpe", "5,000")])
def test_more_dimensions_than_a_sampler_can_take_are_refused(sampler, most):
    space = [Dimension(f"x{i}", "real") for i in range(6000)]
    with pytest.raises(ConfigError, match=f"sampler: {sampler} takes too long over 6,000 .* at most {most}"):
        create("optuna", space, 1, {"sampler": sampler})


def test_cmaes_refuses_categories():
    with pytest.raises(ConfigError, match=r"optimizer.sampler: .*categorical"):
        create("optuna", MIXED, 1, {"sampler": "cmaes"})


def test_tpe_beats_random_search_on_a_mixed_space():
    from tests.contracts.optimizer import quality

    def best(name, seed):
        optimizer = create(name, MIXED, seed)
        scores = []
        for _ in range(80):
            proposal = optimizer.ask()
            scores.append(quality(MIXED, proposal.genome))
            optimizer.tell(proposal.index, scores[-1])
        return max(scores)

    wins = sum(best("optuna", seed) > best("random", seed) for seed in range(6))
    assert wins >= 5
