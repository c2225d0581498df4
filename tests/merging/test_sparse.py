"""TIES and DARE: the contract, and the worked examples of their papers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from evomerge.errors import CandidateError
from evomerge.merging.methods import KERNELS, Sources, Values, sparse
from evomerge.merging.methods.base import uniform_codes
from evomerge.recipe import Scalar
from tests.contracts.method import Array, Case, Expected, ThinningContract, elected, flat, scaled
from tests.merging.fixture import BASE, TAU

Parameters = tuple[dict[str, Scalar], list[dict[str, Scalar]]]
THETA = tuple(BASE + tau for tau in TAU)
CPU = torch.device("cpu")


def sources(weights: Sequence[float], densities: Sequence[float]) -> list[dict[str, Scalar]]:
    return [{"weight": w, "density": d} for w, d in zip(weights, densities, strict=True)]


def largest(delta: Array, count: int) -> Array:
    """Return the delta with all but its `count` largest magnitudes zero; the earlier of equal ones stays."""
    order = sorted(range(delta.size), key=lambda i: (-abs(delta[i]), i))
    kept = np.zeros_like(delta)
    kept[order[:count]] = delta[order[:count]]
    return kept


class TestTies(ThinningContract):
    """Trim, elect, merge."""

    name = "ties"

    def expected(self, case: Case) -> Expected:
        assert case.base is not None
        weights = case.numbers("weight")
        trimmed = [
            largest(delta, int(density * delta.size))
            for delta, density in zip(case.deltas, case.numbers("density"), strict=True)
        ]
        pieces = [weight * delta for weight, delta in zip(weights, trimmed, strict=True)]
        value, size, unclear = elected(pieces, weights, bool(case.method["normalize"]), case.exact)
        scale = case.number("lambda")
        return Expected(flat(case.base) + scale * value, np.abs(flat(case.base)) + abs(scale) * size, unclear)

    def sensible(self, case: Case) -> Case:
        return case  # the weights of the sources that agree are divided by, not their sum

    def selecting(self, index: int, count: int) -> Parameters:
        return {}, sources([float(i == index) for i in range(count)], [1.0] * count)

    def averaging(self, count: int) -> Parameters:
        return {}, sources([0.3 + i for i in range(count)], [1.0] * count)

    def f6(self, weights: Sequence[float], densities: Sequence[float], **method: Any) -> Array:
        case = self.case(THETA, sources(weights, densities), base=BASE, **method)
        return flat(self.merged(case)) - BASE

    def test_trimming_keeps_the_largest_magnitudes_of_the_worked_example(self) -> None:
        trimmed: tuple[list[float], ...] = (
            [4, 0, 0, 0, 3, -5],
            [0, 3, -2.5, 0, -4, 0],
            [0, 0, 0, -3, 6, 2.5],
        )
        for i, kept in enumerate(trimmed):
            alone = sources([float(i == j) for j in range(3)], [0.5] * 3)
            case = self.case(THETA, alone, base=BASE)
            np.testing.assert_allclose(flat(self.merged(case)) - BASE, kept, atol=1e-6)

    @pytest.mark.parametrize(
        ("weights", "merged"),
        [((1, 1, 1), (4, 3, -2.5, -3, 4.5, -5)), ((1, 0.5, 2), (4, 3, -2.5, -3, 5, 2.5))],
    )
    def test_worked_example(self, weights: tuple[float, ...], merged: tuple[float, ...]) -> None:
        np.testing.assert_allclose(self.f6(weights, [0.5] * 3), merged, atol=1e-6)

    def test_worked_example_of_the_disjoint_sum_keeping_four(self) -> None:
        sums = self.f6([1, 1, 1], [4 / 6] * 3, normalize=False)
        means = self.f6([1, 1, 1], [4 / 6] * 3)
        np.testing.assert_allclose(sums, [6, 3, -2.5, -3, 9, -5], atol=1e-6)
        np.testing.assert_allclose(means, [3, 3, -2.5, -3, 4.5, -5], atol=1e-6)

    def test_lambda_scales_the_merged_delta(self) -> None:
        merged = self.f6([1, 1, 1], [0.5] * 3, **scaled(0.5))
        np.testing.assert_allclose(merged, np.array([4, 3, -2.5, -3, 4.5, -5]) / 2, atol=1e-6)

    def test_trim_is_per_tensor(self) -> None:
        deltas = ([10.0, 9.0], [1.0, 2.0])
        for delta, kept in zip(deltas, ([10.0, 0.0], [0.0, 2.0]), strict=True):
            case = self.case([delta], sources([1.0], [0.5]), base=[0.0, 0.0])
            assert self.merged(case).tolist() == kept

    def test_negative_weight_turns_the_vote_of_its_source(self) -> None:
        case = self.case([[1.0], [3.0]], sources([1.0, -1.0], [1.0, 1.0]), base=[0.0], normalize=False)
        assert self.merged(case).tolist() == [-3.0]

    def test_equal_votes_elect_plus(self) -> None:
        for first, second in ((2.0, -2.0), (-2.0, 2.0)):
            case = self.case([[first], [second]], sources([0.7, 0.7], [1.0, 1.0]), base=[0.0])
            assert self.merged(case).tolist() == [2.0]

    def test_zero_entries_do_not_count_in_the_mean(self) -> None:
        case = self.case([[4.0], [0.0], [2.0]], sources([1.0] * 3, [1.0] * 3), base=[0.0])
        assert self.merged(case).tolist() == [3.0]

    @pytest.mark.parametrize("density", [0.0, 0.001, 0.1, 1 / 3, 0.5, 0.777, 0.999, 1.0])
    @pytest.mark.parametrize("levels", [1, 2, 7])
    def test_counts_are_exact_among_many_equal_magnitudes(self, levels: int, density: float) -> None:
        n = 10_007
        generator = np.random.default_rng(levels)
        delta = generator.integers(1, levels + 1, size=n) * generator.choice([-1.0, 1.0], size=n)
        base = np.full(n, 64.0)
        case = self.case([base + delta], sources([1.0], [density]), base=base, dtype=torch.bfloat16)
        assert np.array_equal(case.deltas[0], delta), "whole numbers below 128 are bfloat16 numbers"
        kept = flat(self.merged(case, torch.float32)) - base
        assert np.count_nonzero(kept) == int(density * n)
        assert np.array_equal(kept, largest(delta, int(density * n)))

    def test_ranks_order_magnitudes_and_then_places(self) -> None:
        delta = torch.tensor([0.0, -3.0, 3.0, -0.0, 1e-40, -7.0, 3.0, float("inf")])
        assert sparse.magnitude_ranks(delta).tolist() == [6, 2, 3, 7, 5, 1, 4, 0]

    def test_ranks_are_those_of_a_stable_sort(self) -> None:
        delta = torch.randn(50_000, generator=torch.Generator().manual_seed(0)).bfloat16().float()
        order = torch.argsort(delta.abs(), descending=True, stable=True)
        assert torch.equal(sparse.magnitude_ranks(delta)[order], torch.arange(50_000, dtype=torch.int32))


class DareContract(ThinningContract):
    """What both forms of DARE promise; `votes` tells them apart."""

    votes: bool

    def expected(self, case: Case) -> Expected:
        assert case.base is not None
        normalize, rescale = bool(case.method["normalize"]), case.method["rescale"]
        weights = case.numbers("weight")
        if normalize and not self.votes:
            weights = [weight / sum(weights) for weight in weights]
        pieces = []
        for key, delta, density, weight in zip(
            case.keys, case.deltas, case.numbers("density"), weights, strict=True
        ):
            kept = np.where(mask_of(case.seed, key, delta.size, density), delta, 0.0)
            left = float(np.abs(kept).sum())
            if rescale == "expectation" and density > 0:
                kept = kept / density
            elif rescale == "l1" and left > 0:
                kept = kept * (np.abs(delta).sum() / left)
            pieces.append(weight * kept)
        exact = case.exact and rescale == "none"
        scale, base = case.number("lambda"), flat(case.base)
        if self.votes:
            value, size, unclear = elected(pieces, weights, normalize, exact)
        else:
            value, size = np.sum(pieces, axis=0), np.abs(np.stack(pieces)).sum(0)
            unclear = np.zeros(value.shape, dtype=bool)
        return Expected(base + scale * value, np.abs(base) + abs(scale) * size, unclear & (not case.exact))

    def sensible(self, case: Case) -> Case:
        """Densities whose inverse is exact, so that `exact` holds with any rescaling but the one to norms."""
        case = case if self.votes else super().sensible(case)
        if not case.exact:
            # A density below the resolution of the draws keeps nothing, or is one step away from it.
            low = [{**s, "density": max(float(s["density"]), 0.01)} for s in case.sources if s["density"]]
            return case if len(low) < len(case.sources) else replace(case, sources=tuple(low))
        steps = tuple(
            {**source, "density": 2.0 ** round(-4 * (1 - float(source["density"])))}
            for source in case.sources
        )
        method = dict(case.method)
        if method["rescale"] == "l1":
            method["rescale"] = "expectation"
        return replace(case, sources=steps, method=method)

    def selecting(self, index: int, count: int) -> Parameters:
        return {}, sources([float(i == index) for i in range(count)], [1.0] * count)

    def averaging(self, count: int) -> Parameters:
        return {"normalize": True}, sources([0.3 + i for i in range(count)], [1.0] * count)

    def with_masks(
        self,
        taus: Sequence[Array],
        masks: Sequence[Sequence[int]],
        weights: Sequence[float],
        density: float,
        **method: Any,
    ) -> Array:
        """Merge with given masks in place of drawn ones; returns the merged delta."""
        case = self.case(
            [BASE + tau for tau in taus],
            sources(weights, [density] * len(taus)),
            base=BASE,
            **method,
        )
        limit = round(density * 2**24)
        codes = tuple(
            torch.tensor([limit - 1 if bit else limit for bit in mask], dtype=torch.int32) for mask in masks
        )
        prepared = replace(self.prepared(case), codes=codes)
        out = torch.empty(6)
        values = Values(case.method, case.sources, case.seed)
        KERNELS[self.name].merge(Sources(case.base, case.tensors, case.keys), prepared, values, out)
        return flat(out) - BASE

    @pytest.mark.parametrize(
        ("rescale", "merged"),
        [
            ("expectation", (8, 0, 4, 0, 6, 0)),
            ("l1", (6.6666667, 0, 3.3333333, 0, 5, 0)),
            ("none", (4, 0, 2, 0, 3, 0)),
        ],
    )
    def test_worked_example_of_rescaling(self, rescale: str, merged: tuple[float, ...]) -> None:
        got = self.with_masks(TAU[:1], [[1, 0, 1, 0, 1, 0]], [1.0], 0.5, rescale=rescale)
        np.testing.assert_allclose(got, merged, rtol=1e-6, atol=1e-6)

    def test_rescaling_to_the_norm_leaves_an_empty_delta_empty(self) -> None:
        got = self.with_masks(TAU[:1], [[0] * 6], [1.0], 0.5, rescale="l1")
        assert got.tolist() == [0.0] * 6

    def test_seed_changes_the_result_and_nothing_else_does(self) -> None:
        case = self.random_case((1_000,), seed=30)
        first = self.merged(case)
        assert torch.equal(first, self.merged(case))
        assert not torch.equal(first, self.merged(replace(case, seed=1)))

    def test_mean_over_seeds_is_the_merge_without_dropping(self) -> None:
        case = self.case(
            [np.full(20_000, 1.0)], sources([1.0], [0.25]), base=np.zeros(20_000), rescale="expectation"
        )
        means = [float(self.merged(replace(case, seed=seed)).mean()) for seed in range(8)]
        spread = np.sqrt(3 / 20_000)  # of one mean: variance (1 - p) / p for each entry
        assert abs(np.mean(means) - 1.0) < 5 * spread / np.sqrt(8)
        assert max(abs(mean - 1.0) for mean in means) < 5 * spread


def mask_of(seed: int, key: str, count: int, density: float) -> npt.NDArray[np.bool_]:
    uniform: npt.NDArray[np.float64] = uniform_codes(seed, key, count, CPU).numpy() / 2**24
    return uniform < round(density * 2**24) / 2**24


class TestDareLinear(DareContract):
    """DARE, then a weighted sum."""

    name = "dare_linear"
    votes = False

    def test_worked_example(self) -> None:
        masks = [[1, 0, 1, 0, 1, 0], [0, 1, 1, 0, 1, 1]]
        got = self.with_masks(TAU[:2], masks, [0.5, 0.5], 0.5) + BASE
        np.testing.assert_allclose(got, [5, 4, 0.5, 1, 0, 0], atol=1e-6)

    def test_weights_that_sum_to_zero_cannot_be_normalised(self) -> None:
        case = self.case(THETA[:2], sources([1.0, -1.0], [1.0, 1.0]), base=BASE, normalize=True)
        with pytest.raises(CandidateError, match="sum to"):
            self.merged(case)


class TestDareTies(DareContract):
    """DARE, then the sign election."""

    name = "dare_ties"
    votes = True

    def test_worked_example(self) -> None:
        masks = [[1, 0, 1, 0, 1, 0], [0, 1, 1, 0, 1, 1]]
        got = self.with_masks(TAU[:2], masks, [0.5, 0.5], 0.5)
        np.testing.assert_allclose(got, [4, 3, -2.5, 0, -4, -1], atol=1e-6)

    def test_drop_replaces_the_trim(self) -> None:
        """Small entries that are drawn stay, however large the others are."""
        got = self.with_masks(TAU[:1], [[0, 1, 0, 0, 0, 0]], [1.0], 0.5, rescale="none")
        assert got.tolist() == [0, -1, 0, 0, 0, 0]


def test_deltas_of_the_prepared_state_are_float32_differences() -> None:
    base, tensor = torch.tensor([1.0, 3.0]), torch.tensor([1.5, -1.0], dtype=torch.bfloat16)
    prepared: sparse.Thinned = KERNELS["ties"].prepare(Sources(base, (tensor,), ("a",)), 0)
    deltas: tuple[Tensor, ...] = prepared.deltas
    assert deltas[0].dtype == torch.float32
    assert deltas[0].tolist() == [0.5, -4.0]
