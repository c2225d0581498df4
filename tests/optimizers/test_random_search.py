"""Random search."""

from typing import ClassVar

from evomerge.optimizers import create
from evomerge.spaces.dimensions import Dimension
from tests.contracts.optimizer import MIXED, OptimizerContract


class TestRandom(OptimizerContract):
    """Uniform draws."""

    name = "random"
    settings: ClassVar = {}
    dimensions = MIXED


def test_draws_are_uniform():
    optimizer = create("random", [Dimension("x", "real"), Dimension("n", "integer", 3)], 1)
    genomes = [optimizer.ask().genome for _ in range(3000)]
    assert abs(sum(x for x, _ in genomes) / 3000 - 0.5) < 0.03
    for value in range(3):
        assert abs(sum(n == value for _, n in genomes) / 3000 - 1 / 3) < 0.04
