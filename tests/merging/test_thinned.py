"""TIES, Breadcrumbs, DARE and DELLA: the contract, and the worked examples of their papers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from evomerge.errors import CandidateError
from evomerge.merging.draws import draw_keys, uniform_codes
from evomerge.merging.keeps import DRAWS, GOLDEN
from evomerge.merging.ladder import ladder_of
from evomerge.merging.methods import KERNELS, Values
from evomerge.merging.methods.thinned import row_codes
from evomerge.recipe import Scalar
from tests.contracts.method import (
    Array,
    Case,
    Expected,
    MethodContract,
    Single,
    ThinningContract,
    elected,
    flat,
    scaled,
)
from tests.merging.fixture import BASE, TAU

Parameters = tuple[dict[str, Scalar], list[dict[str, Scalar]]]
THETA = tuple(BASE + tau for tau in TAU)
CPU = torch.device("cpu")


def sources(weights: Sequence[float], densities: Sequence[float]) -> list[dict[str, Scalar]]:
    return [{"weight": w, "density": d} for w, d in zip(weights, densities, strict=True)]


def largest(delta: Array, count: int) -> Array:
    """Return the delta with all but its `count` largest magnitudes zero.

    Of equal ones those come first whose index, times the golden ratio, has the smaller fraction.
    """
    return np.where(above(delta, count), delta, 0.0)


def above(delta: Array, count: int) -> npt.NDArray[np.bool_]:
    fractions = np.arange(delta.size) * GOLDEN % 2**32
    order = np.lexsort((fractions, -np.abs(delta.astype(np.float32))))
    chosen = np.zeros(delta.size, dtype=bool)
    chosen[order[: max(0, count)]] = True
    return chosen


def kept_of(density: float, count: int) -> int:
    return max(1, int(density * count)) if density > 0 else 0


class TestTies(ThinningContract):
    """Trim, elect, merge."""

    name = "ties"

    def expected(self, case: Case) -> Expected:
        assert case.base is not None
        weights = case.numbers("weight")
        trimmed = [
            largest(delta, kept_of(density, delta.size))
            for delta, density in zip(case.deltas, case.numbers("density"), strict=True)
        ]
        pieces = [weight * delta for weight, delta in zip(weights, trimmed, strict=True)]
        surplus = np.sign(np.sum(pieces, axis=0)).sum()
        tie = -1 if case.method["variant"] == "paper" and surplus < 0 else 1
        value, size, unclear = elected(pieces, weights, bool(case.method["normalize"]), case.exact, tie)
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
    @pytest.mark.parametrize("n", [10_007, 300_007])
    def test_density_is_met_among_many_equal_magnitudes(self, n: int, levels: int, density: float) -> None:
        generator = np.random.default_rng(levels)
        delta = generator.integers(1, levels + 1, size=n) * generator.choice([-1.0, 1.0], size=n)
        base = np.full(n, 64.0)
        case = self.case([base + delta], sources([1.0], [density]), base=base, dtype=torch.bfloat16)
        assert np.array_equal(case.deltas[0], delta), "whole numbers below 128 are bfloat16 numbers"
        kept = flat(self.merged(case, torch.float32)) - base
        count = np.count_nonzero(kept)
        assert abs(count - int(density * n)) <= (0 if n <= 2**14 else n / 2**14 + 1)
        smallest = np.abs(kept[kept != 0]).min() if count else np.inf
        assert (kept != 0)[np.abs(delta) > smallest].all()
        assert not (kept != 0)[np.abs(delta) < smallest].any()
        halves = np.count_nonzero(kept[: n // 2]), np.count_nonzero(kept[n // 2 :])
        assert abs(halves[0] - halves[1]) < 0.03 * n, "equal entries are kept all over the tensor"

    @pytest.mark.parametrize("n", [1, 2, 100, 16_384, 16_385, 1_000_003])
    def test_ladder_meets_every_rank(self, n: int) -> None:
        delta = torch.randn(n, generator=torch.Generator().manual_seed(n))
        sizes = delta.abs().sort(descending=True).values
        ladder = ladder_of(torch.zeros(n), delta)
        for rank in {0, 1, n // 1000, n // 16, n // 3, n // 2, n - 1, n}:
            bits, share = ladder.cut(rank)
            reached = int((sizes.view(torch.int32) > bits).sum()) + (share > 0)
            tolerance = 0 if n <= 2**14 else n / 2**18 + 1 if rank <= n // 16 else n / 2**14 + 1
            assert abs(reached - rank) <= tolerance

    def test_variant_of_the_paper_trims_the_whole_model(self) -> None:
        deltas = {"x": [10.0, 9.0], "y": [1.0, 2.0]}
        case = self.case([[0.0]], sources([1.0], [0.5]), base=[0.0], variant="paper")
        merged = merged_model("ties", case, {name: [delta] for name, delta in deltas.items()})
        assert merged["x"].tolist() == [10.0, 9.0]
        assert merged["y"].tolist() == [0.0, 0.0]

    @pytest.mark.parametrize(("rest", "sign"), [([-1.0, -1.0, 1.0], -2.0), ([1.0, 1.0, -1.0], 2.0)])
    def test_variant_of_the_paper_elects_the_more_frequent_sign_on_a_tie(
        self, rest: list[float], sign: float
    ) -> None:
        case = self.case([[0.0]] * 2, sources([1.0] * 2, [1.0] * 2), base=[0.0], variant="paper")
        merged = merged_model("ties", case, {"x": [[2.0], [-2.0]], "y": [rest, rest]})
        assert merged["x"].tolist() == [sign]

    def test_variant_of_the_paper_takes_one_density(self) -> None:
        case = self.case([[0.0]], sources([1.0], [0.5]), base=[0.0], variant="paper")
        views = [
            view("ties", case, [[1.0]]),
            view("ties", replace(case, sources=({"weight": 1.0, "density": 0.4},)), [[1.0]]),
        ]
        with pytest.raises(CandidateError, match="one density"):
            KERNELS["ties"].whole(views)


def view(name: str, case: Case, deltas: Sequence[Sequence[float]]) -> Single:
    """Return one tensor of a model over a base of zeros."""
    tensors = tuple(torch.tensor(delta) for delta in deltas)
    own = replace(case, base=torch.zeros_like(tensors[0]), tensors=tensors)
    values = Values(own.method, own.sources, own.seed)
    return Single(values, own.inputs, KERNELS[name].prepare(own.inputs, values))


def merged_model(name: str, case: Case, model: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Merge a model of several tensors over a base of zeros, given by name and source as deltas."""
    views = {key: view(name, case, deltas) for key, deltas in model.items()}
    whole = KERNELS[name].whole(list(views.values()))
    merged = {}
    for key, single in views.items():
        merged[key] = torch.empty_like(single.tensors.given_base)
        values = replace(single.values, whole=whole)
        KERNELS[name].merge(single.tensors, single.state, values, merged[key])
    return merged


class BreadcrumbsContract(ThinningContract):
    """What both forms of Breadcrumbs promise; `votes` tells them apart."""

    votes: bool

    def expected(self, case: Case) -> Expected:
        assert case.base is not None
        weights, normalize = case.numbers("weight"), bool(case.method["normalize"])
        if normalize and not self.votes:
            weights = [weight / sum(weights) for weight in weights]
        pieces = []
        for delta, weight, density, gamma in zip(
            case.deltas, weights, case.numbers("density"), case.numbers("gamma"), strict=True
        ):
            wanted = int(density * delta.size)
            top = min(int(gamma * delta.size), delta.size - wanted)
            kept = above(delta, top + wanted) & ~above(delta, top) if wanted else np.zeros(delta.size, bool)
            pieces.append(weight * np.where(kept, delta, 0.0))
        return combined(case, pieces, weights, self.votes, case.exact)

    def sensible(self, case: Case) -> Case:
        return case if self.votes else super().sensible(case)

    def selecting(self, index: int, count: int) -> Parameters:
        return {}, sources([float(i == index) for i in range(count)], [1.0] * count)

    def averaging(self, count: int) -> Parameters:
        return {"normalize": True}, sources([0.3 + i for i in range(count)], [1.0] * count)

    def at_density(self, density: float) -> dict[str, Scalar]:
        return {"weight": 1.0, "density": density, "gamma": 0.01}

    @pytest.mark.parametrize(
        ("gamma", "kept"), [(0.2, (4, 0, 2, 0, 3, 0)), (0.1, (4, 0, 0, 0, 3, -5)), (1.0, (0, -1, 2, 0, 0, 0))]
    )
    def test_worked_example(self, gamma: float, kept: tuple[float, ...]) -> None:
        case = self.case([THETA[0]], [{"weight": 1.0, "density": 0.5, "gamma": gamma}], base=BASE)
        np.testing.assert_allclose(flat(self.merged(case)) - BASE, kept, atol=1e-6)


class TestBreadcrumbs(BreadcrumbsContract):
    """Breadcrumbs, then a weighted sum."""

    name = "breadcrumbs"
    votes = False


class TestBreadcrumbsTies(BreadcrumbsContract):
    """Breadcrumbs, then the sign election."""

    name = "breadcrumbs_ties"
    votes = True


def combined(
    case: Case, pieces: Sequence[Array], weights: Sequence[float], votes: bool, exact: bool
) -> Expected:
    """Return the base plus the scaled sum of the pieces, of those that agree if there is a vote."""
    assert case.base is not None
    scale, base = case.number("lambda"), flat(case.base)
    if votes:
        value, size, unclear = elected(pieces, weights, bool(case.method["normalize"]), exact)
    else:
        value, size = np.sum(pieces, axis=0), np.abs(np.stack(pieces)).sum(0)
        unclear = np.zeros(value.shape, dtype=bool)
    return Expected(base + scale * value, np.abs(base) + abs(scale) * size, unclear & (not case.exact))


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
            elif rescale == "l2" and left > 0:
                kept = kept * np.sqrt(np.square(delta).sum() / np.square(kept).sum())
            pieces.append(weight * kept)
        return combined(case, pieces, weights, self.votes, case.exact and rescale == "none")

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
        if method["rescale"] in ("l1", "l2"):
            method["rescale"] = "expectation"
        return replace(case, sources=steps, method=method)

    def selecting(self, index: int, count: int) -> Parameters:
        return {}, sources([float(i == index) for i in range(count)], [1.0] * count)

    def averaging(self, count: int) -> Parameters:
        return {"normalize": True}, sources([0.3 + i for i in range(count)], [1.0] * count)

    def chances(self, delta: Array, density: float) -> Array:
        """Return the probability of every entry to be kept at the other parameters' defaults."""
        return np.full(delta.size, density)

    def with_masks(
        self,
        taus: Sequence[Array],
        masks: Sequence[Sequence[int]],
        weights: Sequence[float],
        density: float,
        **method: Any,
    ) -> Array:
        """Merge with keys that draw the masks; returns the merged delta."""
        case = self.case(
            [BASE + tau for tau in taus],
            sources(weights, [density] * len(taus)),
            base=BASE,
            **method,
        )
        chances = [self.chances(tau, density) for tau in taus]
        keys = tuple(key_with(mask, p) for mask, p in zip(masks, chances, strict=True))
        values, out = Values(case.method, case.sources, case.seed), torch.empty(6)
        KERNELS[self.name].merge(replace(case.inputs, keys=keys), self.prepared(case), values, out)
        return flat(out) - BASE

    @pytest.mark.parametrize(
        ("rescale", "merged"),
        [
            ("expectation", (8, 0, 4, 0, 6, 0)),
            ("l1", (6.6666667, 0, 3.3333333, 0, 5, 0)),
            ("l2", tuple(np.array([4, 0, 2, 0, 3, 0]) * np.sqrt(55 / 29))),
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
    return uniform(seed, key, count) < round(density * DRAWS) / DRAWS


def uniform(seed: int, key: str, count: int) -> Array:
    drawn: Array = uniform_codes(draw_keys(seed, key), 0, count, CPU).numpy() / DRAWS
    return drawn


def key_with(mask: Sequence[int], probabilities: Sequence[float] | Array) -> str:
    """Return a key whose draws for seed 0 keep exactly the entries of a mask."""
    keys = (str(number) for number in range(100_000))
    wanted = np.array(mask, dtype=bool)
    return next(k for k in keys if np.array_equal(uniform(0, k, len(mask)) < np.array(probabilities), wanted))


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


class DellaContract(DareContract):
    """What both forms of DELLA promise: DARE, with probabilities that grow with rank."""

    def probabilities(self, delta: Array, shape: Sequence[int], density: float, epsilon: float) -> Array:
        if not 0 < density < 1:
            return np.full(delta.size, density)
        width = shape[-1] if shape else 1
        rows = np.abs(delta.astype(np.float32)).reshape(-1, width)
        ranks = rows.argsort(axis=1, kind="stable").argsort(axis=1)
        if width == 1:
            return np.full(delta.size, density)
        graded: Array = (density - epsilon + ranks / (width - 1) * 2 * epsilon).reshape(-1)
        return graded

    def expected(self, case: Case) -> Expected:
        normalize, rescale = bool(case.method["normalize"]), case.method["rescale"]
        weights = case.numbers("weight")
        if normalize and not self.votes:
            weights = [weight / sum(weights) for weight in weights]
        pieces, unclear = [], np.zeros(case.tensors[0].numel(), dtype=bool)
        for key, delta, source, weight in zip(case.keys, case.deltas, case.sources, weights, strict=True):
            density, epsilon = float(source["density"]), float(source["epsilon"])
            p = self.probabilities(delta, case.tensors[0].shape, density, epsilon)
            drawn = uniform(case.seed, key, delta.size)
            unclear |= np.abs(drawn - p) < 1e-6
            kept = np.where(drawn < p, delta, 0.0)
            if rescale == "expectation" and density > 0:
                kept = np.where(drawn < p, delta / np.maximum(p, 1e-9), 0.0)
            elif rescale == "l1" and np.abs(kept).sum() > 0:
                kept = kept * (np.abs(delta).sum() / np.abs(kept).sum())
            elif rescale == "l2" and np.abs(kept).sum() > 0:
                kept = kept * np.sqrt(np.square(delta).sum() / np.square(kept).sum())
            pieces.append(weight * kept)
        found = combined(replace(case, exact=False), pieces, weights, self.votes, False)
        norms = rescale in ("l1", "l2") and unclear.any()
        return replace(found, unclear=found.unclear | unclear | norms)

    def sensible(self, case: Case) -> Case:
        case = case if self.votes else MethodContract.sensible(self, case)
        fitting = []
        for source in case.sources:
            density, epsilon = float(source["density"]), float(source["epsilon"])
            if 0 < density < 1:
                density = min(max(density, 0.05), 0.95)
                epsilon = min(epsilon, 0.9 * min(density, 1 - density))
            fitting.append({**source, "density": density, "epsilon": epsilon})
        return replace(case, sources=tuple(fitting), exact=False)

    def chances(self, delta: Array, density: float) -> Array:
        return self.probabilities(delta, delta.shape, density, 0.15)

    def at_density(self, density: float) -> dict[str, Scalar]:
        return {"weight": 1.0, "density": density, "epsilon": 0.5 * min(density, 1 - density)}

    def test_probabilities_are_those_of_the_worked_example(self) -> None:
        p = self.probabilities(TAU[0], (6,), 0.5, 0.2)
        np.testing.assert_allclose(p, [0.62, 0.38, 0.46, 0.30, 0.54, 0.70], atol=1e-12)

    @pytest.mark.parametrize(
        ("rescale", "merged"),
        [
            ("expectation", (6.4516129, 0, 4.34782609, 0, 5.55555556, -7.14285714)),
            ("l1", (4.28571429, 0, 2.14285714, 0, 3.21428571, -5.35714286)),
            ("none", (4, 0, 2, 0, 3, -5)),
        ],
    )
    def test_worked_example_of_rescaling(self, rescale: str, merged: tuple[float, ...]) -> None:
        parameters: list[dict[str, Scalar]] = [{"weight": 1.0, "density": 0.5, "epsilon": 0.2}]
        case = self.case(THETA[:1], parameters, base=BASE, rescale=rescale)
        key = key_with([1, 0, 1, 0, 1, 1], [0.62, 0.38, 0.46, 0.30, 0.54, 0.70])
        values, out = Values(case.method, case.sources, 0), torch.empty(6)
        KERNELS[self.name].merge(replace(case.inputs, keys=(key,)), self.prepared(case), values, out)
        np.testing.assert_allclose(flat(out) - BASE, merged, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize(("density", "epsilon"), [(0.9, 0.1), (0.3, 0.3), (0.2, 0.4)])
    def test_epsilon_that_leaves_no_probability_is_refused(self, density: float, epsilon: float) -> None:
        case = self.case(THETA[:1], [{"weight": 1.0, "density": density, "epsilon": epsilon}], base=BASE)
        with pytest.raises(CandidateError, match="epsilon: expected below min"):
            self.merged(case)

    def test_large_entries_are_kept_more_often(self) -> None:
        rows = np.tile(np.arange(1.0, 101.0), (2_000, 1))
        case = self.case(
            [rows],
            [{"weight": 1.0, "density": 0.5, "epsilon": 0.4}],
            base=np.zeros_like(rows),
            rescale="none",
        )
        kept = (self.merged(case) != 0).double().mean(0)
        assert abs(float(kept[:10].mean()) - (0.1 + 0.8 * 4.5 / 99)) < 0.02
        assert abs(float(kept[-10:].mean()) - (0.9 - 0.8 * 4.5 / 99)) < 0.02

    def test_rank_is_within_the_row_also_of_stacked_matrices(self) -> None:
        flat_rows = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
        codes = row_codes(torch.zeros(2, 3, 50), flat_rows.view(2, 3, 50))
        wanted = flat_rows.abs().argsort(1).argsort(1)
        assert torch.equal(codes.to(torch.int64).view(6, 50), wanted)

    def test_ranks_of_a_very_long_row_fit_16_bits(self) -> None:
        row = torch.arange(1.0, 200_001.0)
        codes = row_codes(torch.zeros(200_000), row).to(torch.int64)
        assert codes[0] == 0
        assert codes[-1] == 65_535
        assert bool((codes[1:] >= codes[:-1]).all())


class TestDella(DellaContract):
    """DELLA, then the sign election."""

    name = "della"
    votes = True


class TestDellaLinear(DellaContract):
    """DELLA, then a weighted sum."""

    name = "della_linear"
    votes = False
