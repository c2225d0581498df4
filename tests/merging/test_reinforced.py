"""RAM and RAM+: the contract, a worked example; results of mergekit are in tests/data/mergekit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from evomerge.catalogue import CATALOGUE
from evomerge.recipe import Scalar
from tests.contracts.method import Array, Case, DeltaContract, Expected, flat, same_bits
from tests.merging.fixture import BASE, TAU

Parameters = tuple[dict[str, Scalar], list[dict[str, Scalar]]]


class Reinforced(DeltaContract):
    """What both methods promise."""

    def factors(self, case: Case, changed: Array) -> Array:
        """Return the factor of each source's own entries."""
        return np.ones(len(case.tensors))

    def expected(self, case: Case) -> Expected:
        deltas, epsilon = np.stack(case.deltas), case.number("epsilon")
        changed = np.abs(deltas) > epsilon
        count = changed.sum(axis=0)
        own = np.where(count == 1, self.factors(case, changed)[:, None], 1.0)
        assert case.base is not None
        base = flat(case.base)
        value = base + case.number("lambda") * (deltas * changed * own).sum(axis=0) / np.maximum(count, 1)
        size = np.abs(base) + np.abs(deltas).sum(axis=0) * (1 + abs(case.number("lambda")))
        # A delta as near to epsilon as its rounding may count or not, for the ratio of the whole tensor too.
        near = np.abs(np.abs(deltas) - epsilon) <= 1e-6 * (1 + np.abs(base))
        unclear = np.full(base.shape, bool(near.any())) if not case.exact else np.zeros(base.shape, bool)
        return Expected(value, size * 4, unclear)

    def sensible(self, case: Case) -> Case:
        """Return the case with an epsilon that no delta of exact cases is near to."""
        method = {**case.method, "epsilon": 0.19 if case.exact else 0.2}
        return replace(case, method=method)

    def averaging(self, count: int) -> Parameters:
        return {}, [{} for _ in range(count)]

    def test_parameters_that_select_one_source_give_it(self) -> None:
        """There are none; what one source alone changed is its own."""
        case = self.random_case((11, 13), seed=2)
        assert case.base is not None
        alone = replace(case, tensors=(case.base, case.tensors[1], case.base))
        torch.testing.assert_close(self.merged(alone), case.tensors[1], rtol=0, atol=2e-5)

    def test_weights_zero_give_the_base(self) -> None:
        """There are no weights; with an epsilon beyond every delta nothing counts as changed."""
        assert "weight" not in {parameter.name for parameter in CATALOGUE[self.name].parameters}
        case = self.random_case((11, 13), seed=14, epsilon=100.0)
        assert case.base is not None
        assert same_bits(self.merged(case), case.base)


class TestRam(Reinforced):
    """Own entries are added, shared ones averaged."""

    name = "ram"

    def test_worked_example(self) -> None:
        case = self.case([BASE + tau for tau in TAU], base=BASE, epsilon=2.2)
        expected = [1 + 4, 1 + 3, 1 - 2.5, 1 - 3, 1 + 5 / 3, 1 - 1.25]
        assert flat(self.merged(case)) == pytest.approx(expected)


class TestRamPlus(Reinforced):
    """Own entries grow with the share of the source's change that is shared."""

    name = "ramplus_tl"

    def factors(self, case: Case, changed: Array) -> Array:
        count = changed.sum(axis=0)
        own = (changed & (count == 1)).sum(axis=1)
        shared = (changed & (count > 1)).sum(axis=1)
        ratio = shared / np.maximum(own, case.number("epsilon") or 1e-300)
        grown: Array = 1 + case.number("r") * np.minimum(ratio, case.number("alpha"))
        return grown

    def test_worked_example(self) -> None:
        case = self.case([BASE + tau for tau in TAU], base=BASE, epsilon=2.2, r=0.5, alpha=2.0)
        # Changed are 0, 4, 5 by the first, 1, 2, 4 by the second, 3, 4, 5 by the third; entries 4 and 5 are
        # shared. Numbers of own entries below epsilon count as epsilon.
        first, second, third = 1 + 0.5 * 2 / 2.2, 1 + 0.5 * 1 / 2.2, 1 + 0.5 * 2 / 2.2
        own = [1 + 4 * first, 1 + 3 * second, 1 - 2.5 * second, 1 - 3 * third]
        assert flat(self.merged(case)) == pytest.approx([*own, 1 + 5 / 3, 1 - 1.25])
