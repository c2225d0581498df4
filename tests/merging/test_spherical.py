"""NuSLERP, multi-SLERP, Karcher mean, Model Stock: the contract, worked examples, and mergekit's results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from evomerge.errors import CandidateError
from evomerge.merging.methods.spherical import karcher_mean
from evomerge.recipe import Scalar
from tests.contracts.method import (
    DTYPES,
    SHAPES,
    Array,
    Case,
    Expected,
    MethodContract,
    flat,
    same_bits,
    scaled,
)
from tests.merging.fixture import BASE, TAU

Parameters = tuple[dict[str, Scalar], list[dict[str, Scalar]]]
THETA = tuple(BASE + tau for tau in TAU)

# What mergekit 0.1.5 makes of these three matrices and this base: its merge functions, called in float32 with
# weights 0.7, 0.5 (and 0.2), 6 digits of their results.
PEER_BASE = [[0.5, -1.0, 0.25], [2.0, 0.0, -0.75]]
PEER = (
    [[1.0, -1.5, 0.5], [2.5, 0.25, -1.0]],
    [[0.25, -0.5, 1.0], [1.0, 0.5, -0.75]],
    [[0.75, -1.25, -0.5], [2.25, -1.0, 0.0]],
)


def weighted(*weights: float) -> list[dict[str, Scalar]]:
    return [{"weight": weight} for weight in weights]


def seen(case: Case) -> list[Array]:
    """Return the flat deltas, or the flat sources where there is no base."""
    return case.deltas if case.base is not None else [flat(tensor) for tensor in case.tensors]


def composed(case: Case, terms: Sequence[Array], unclear: Any) -> Expected:
    """Return the sum of the terms on top of the base, if any."""
    total, start = np.sum(terms, axis=0), 0.0 if case.base is None else flat(case.base)
    size = np.abs(terms).sum(0) + np.abs(start)
    if case.base is not None:  # terms are multiples of differences, which cost the magnitudes of both
        for term, delta, tensor in zip(terms, case.deltas, case.tensors, strict=True):
            factor = np.linalg.norm(term) / (np.linalg.norm(delta) or 1.0)
            size = size + factor * (np.abs(flat(tensor)) + np.abs(start))
    return Expected(total + start, size, np.broadcast_to(unclear, total.shape).astype(bool))


def cosine_of(first: Array, second: Array, smallest: float) -> float:
    lengths = max(float(np.linalg.norm(first)), smallest) * max(float(np.linalg.norm(second)), smallest)
    return min(1.0, max(-1.0, float(first @ second) / lengths))


class TestNuSlerp(MethodContract):
    """Great circles between deltas."""

    name = "nuslerp"

    def expected(self, case: Case) -> Expected:
        first, second = case.numbers("weight")
        t = 0.5 if abs(first + second) < 1e-6 else second / (first + second)
        slices = self._slices(case)
        terms, unclear = [np.zeros_like(vector) for vector in seen(case)], np.zeros(slices.size, dtype=bool)
        for entries in slices:
            one, other = (vector[entries] for vector in seen(case))
            cosine = cosine_of(one, other, 1e-7)
            sine = math.sqrt((1 - cosine) * (1 + cosine))
            if sine < 1e-6:
                factors = (1 - t, t)
            else:
                angle = math.acos(cosine)
                factors = (math.sin((1 - t) * angle) / sine, math.sin(t * angle) / sine)
            terms[0][entries], terms[1][entries] = factors[0] * one, factors[1] * other
            unclear[entries] = 1e-7 < sine < 1e-5
        return composed(case, terms, unclear)

    def _slices(self, case: Case) -> Any:
        """Return the entries of each slice, one slice a row."""
        shape = tuple(case.tensors[0].shape) or (1,)
        index = np.arange(math.prod(shape))
        if case.method["nuslerp_flatten"]:
            return index.reshape(1, -1)
        if case.method["nuslerp_row_wise"]:
            return index.reshape(shape[0], -1).T
        return index.reshape(-1, shape[-1])

    def selecting(self, index: int, count: int) -> Parameters:
        return {}, weighted(*(float(i == index) for i in range(count)))

    def averaging(self, count: int) -> Parameters:
        return {}, weighted(*(0.3 + i for i in range(count)))

    @pytest.mark.parametrize(
        ("sources", "weights", "method", "merged"),
        [
            ([[2.0, 0], [0.0, 1]], (1, 3), {}, [0.76536686, 0.92387953]),
            (
                [[[1.0, 0], [0, 2]], [[0.0, 1], [0, 2]]],
                (1, 1),
                {},
                [0.52704628, 0.52704628, 0, 2.10818511],
            ),
            (
                [[[1.0, 0], [0, 2]], [[0.0, 1], [0, 2]]],
                (1, 1),
                {"nuslerp_flatten": False},
                [0.70710678, 0.70710678, 0, 2],
            ),
        ],
    )
    def test_worked_example(
        self, sources: list[Any], weights: tuple[float, float], method: dict[str, Any], merged: list[float]
    ) -> None:
        case = self.case(sources, weighted(*map(float, weights)), **method)
        np.testing.assert_allclose(flat(self.merged(case)), merged, rtol=1e-6)
        moved = self.case(
            [torch.tensor(s) + 1 for s in sources],
            list(case.sources),
            base=torch.ones_like(case.tensors[0]),
            **method,
        )
        np.testing.assert_allclose(flat(self.merged(moved)), np.add(merged, 1), rtol=1e-6)

    @pytest.mark.parametrize(
        ("base", "method", "merged"),
        [
            (None, (True, False), (0.714442, -1.126215, 0.739081, 1.949759, 0.36954, -0.932648)),
            (None, (False, False), (0.74058, -1.167825, 0.768982, 1.907654, 0.360878, -0.91191)),
            (None, (False, True), (0.688944, -1.133338, 0.728008, 1.879007, 0.372098, -0.919395)),
            (PEER_BASE, (True, False), (0.798524, -1.098246, 1.100237, 1.697689, 0.649959, -0.999402)),
            (PEER_BASE, (False, False), (0.776093, -1.096006, 1.018349, 1.634668, 0.750621, -1.033977)),
            (PEER_BASE, (False, True), (1.041011, -1.096802, 0.747311, 1.252731, 0.609183, -0.906373)),
        ],
    )
    def test_agrees_with_mergekit(
        self, base: Any, method: tuple[bool, bool], merged: tuple[float, ...]
    ) -> None:
        case = self.case(
            PEER[:2],
            weighted(0.7, 0.5),
            base=base,
            nuslerp_flatten=method[0],
            nuslerp_row_wise=method[1],
        )
        np.testing.assert_allclose(flat(self.merged(case)), merged, atol=1.5e-6)

    def test_weights_that_cancel_out_meet_half_way_as_in_mergekit(self) -> None:
        merged = (0.727938, -1.0, 1.161752, 1.544124, 0.683814, -0.977938)
        case = self.case(PEER[:2], weighted(0.7, -0.7), base=PEER_BASE)
        np.testing.assert_allclose(flat(self.merged(case)), merged, atol=1.5e-6)

    def test_delta_of_zeros_is_at_a_right_angle(self) -> None:
        case = self.case([[1.0, 2.0], [4.0, 6.0]], weighted(1.0, 1.0), base=[1.0, 2.0])
        np.testing.assert_allclose(
            flat(self.merged(case)), np.array([1, 2]) + math.sqrt(0.5) * np.array([3, 4])
        )

    def test_opposite_directions_are_interpolated_linearly(self) -> None:
        case = self.case([[0.3, -0.7, 0.11], [-0.6, 1.4, -0.22]], weighted(3.0, 1.0), base=[0.0, 0, 0])
        np.testing.assert_allclose(flat(self.merged(case)), 0.25 * flat(case.tensors[0]), atol=1e-7)

    @pytest.mark.parametrize("row_wise", [False, True])
    @pytest.mark.parametrize("shape", [*SHAPES, (3, 70_001), (70_001, 3)], ids=str)
    def test_slices_of_any_shape_and_dtype_are_merged_by_the_formula(
        self, shape: tuple[int, ...], row_wise: bool
    ) -> None:
        for seed, dtype in enumerate(DTYPES):
            case = self.random_case(
                shape, dtype=dtype, seed=seed, nuslerp_flatten=False, nuslerp_row_wise=row_wise
            )
            result = self.merged(case, torch.float32)
            if result.numel() > 1000:  # the reference is slow
                case = self._cut(case, row_wise)
                result = result[:, :5] if row_wise else result[:5]
            expected = self.expected(case)
            wrong = np.abs(flat(result) - expected.value) > 1e-6 * expected.size
            assert not (wrong & ~expected.unclear).any()

    @pytest.mark.parametrize("row_wise", [False, True])
    @pytest.mark.parametrize("shape", [(0, 4), (4, 0), (2, 0, 3)], ids=str)
    def test_slices_of_nothing_give_nothing(self, shape: tuple[int, ...], row_wise: bool) -> None:
        case = self.random_case(shape, nuslerp_flatten=False, nuslerp_row_wise=row_wise)
        assert self.merged(case).shape == shape

    def _cut(self, case: Case, row_wise: bool) -> Case:
        def cut(tensor: torch.Tensor) -> torch.Tensor:
            return (tensor[:, :5] if row_wise else tensor[:5]).contiguous()

        base = None if case.base is None else cut(case.base)
        return replace(case, base=base, tensors=tuple(cut(tensor) for tensor in case.tensors))

    @pytest.mark.parametrize("row_wise", [False, True])
    @pytest.mark.parametrize("shape", [(40_000, 5), (5, 40_000), (300, 400)], ids=str)
    def test_threads_change_no_bit_of_sliced_angles(self, shape: tuple[int, ...], row_wise: bool) -> None:
        case = self.random_case(shape, seed=31, nuslerp_flatten=False, nuslerp_row_wise=row_wise)
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append((self.prepared(case), self.merged(case)))
        assert same_bits(results[0][0], results[1][0])
        assert same_bits(results[0][1], results[1][1])


class TestNuSlerpWithoutBase(TestNuSlerp):
    """Great circles between sources."""

    def case(self, *args: Any, base: Any = None, **more: Any) -> Case:
        return super().case(*args, **more)

    # These say what they mean with a base.
    test_worked_example = None  # type: ignore[assignment]
    test_agrees_with_mergekit = None  # type: ignore[assignment]
    test_weights_that_cancel_out_meet_half_way_as_in_mergekit = None  # type: ignore[assignment]
    test_delta_of_zeros_is_at_a_right_angle = None  # type: ignore[assignment]

    def test_both_ends_are_the_sources_bit_for_bit(self) -> None:
        case = self.random_case((70_001,), seed=30)
        for index, weights in enumerate(((1.0, 0.0), (0.0, 0.3))):
            result = self.merged(replace(case, sources=tuple(weighted(*weights))))
            assert same_bits(result, case.tensors[index])


class TestMultiSlerp(MethodContract):
    """Mean directions, computed here by mergekit's formula with its step in the tangent space."""

    name = "multislerp"

    def expected(self, case: Case) -> Expected:
        vectors, eps = seen(case), case.number("eps")
        if len(vectors) == 1:
            value = flat(case.tensors[0])
            return Expected(value, np.abs(value), np.zeros(value.shape, dtype=bool))
        weights = np.array(self._weights(case))
        lengths = np.array([float(np.linalg.norm(vector)) for vector in vectors])
        divisors = np.where(lengths > 0, lengths + eps, 1.0)
        units = np.stack(vectors) / divisors[:, None]
        mean = weights @ units
        length = float(np.linalg.norm(mean))
        if length <= eps:  # all of it is zero; `sensible` leaves nothing else that small
            return composed(case, np.zeros_like(units), False)
        mean /= length
        tangent = weights @ (units - np.outer(units @ mean, mean))
        turn = float(np.linalg.norm(tangent)) + eps
        turned = math.sin(turn) / turn if turn else 1.0
        scale = float(weights @ lengths)
        result = scale * (math.cos(turn) * mean + turned * tangent)
        terms = [scale * w / (length * d) * v for w, d, v in zip(weights, divisors, vectors, strict=True)]
        expected = composed(case, terms, False)
        return replace(expected, value=result + (0.0 if case.base is None else flat(case.base)))

    def _weights(self, case: Case) -> list[float]:
        weights = case.numbers("weight")
        return [w / sum(weights) for w in weights] if case.method["normalize_weights"] else weights

    def sensible(self, case: Case) -> Case:
        case = replace(case, method={**case.method, "eps": case.number("eps") * 1e-6})
        if case.method["normalize_weights"] and abs(sum(case.numbers("weight"))) < 0.1:
            case = replace(case, method={**case.method, "normalize_weights": False})
        units = [v / (np.linalg.norm(v) or 1.0) for v in seen(case)]
        mean = np.sum([w * u for w, u in zip(self._weights(case), units, strict=True)], axis=0)
        if np.linalg.norm(mean) < 1e-3:  # two go straight and more are refused, or eps decides
            case = replace(case, sources=tuple(weighted(1.0, *[0.0] * (len(units) - 1))))
        return case

    def selecting(self, index: int, count: int) -> Parameters:
        return {}, weighted(*(float(i == index) for i in range(count)))

    def averaging(self, count: int) -> Parameters:
        return {}, weighted(*(0.3 + i for i in range(count)))

    @pytest.mark.parametrize(
        ("base", "normalize", "merged"),
        [
            (None, True, (0.696965, -1.136847, 0.737768, 2.016611, 0.261522, -0.883626)),
            (None, False, (0.975751, -1.591586, 1.032875, 2.823256, 0.36613, -1.237077)),
            (PEER_BASE, True, (1.16858, -1.48281, 0.985173, 2.11127, 0.478171, -0.927863)),
            (PEER_BASE, False, (1.436011, -1.675934, 1.279242, 2.155778, 0.66944, -0.999009)),
        ],
    )
    def test_agrees_with_mergekit(self, base: Any, normalize: bool, merged: tuple[float, ...]) -> None:
        case = self.case(PEER, weighted(0.7, 0.5, 0.2), base=base, normalize_weights=normalize)
        np.testing.assert_allclose(flat(self.merged(case)), merged, atol=1.5e-6)

    def test_a_single_source_is_copied_whatever_its_weight(self) -> None:
        case = self.case(PEER[:1], weighted(0.3), base=PEER_BASE, normalize_weights=False)
        assert same_bits(self.merged(case), case.tensors[0])

    def test_two_directions_that_cancel_out_are_averaged_linearly(self) -> None:
        case = self.case([[1.0, 2, 3], [-2.0, -4, -6]], base=[0.0, 0, 0])
        np.testing.assert_allclose(flat(self.merged(case)), [-0.5, -1, -1.5])

    def test_three_directions_that_cancel_out_are_refused(self) -> None:
        thirds = [[1.0, 0.0], [-0.5, math.sqrt(0.75)], [-0.5, -math.sqrt(0.75)]]
        with pytest.raises(CandidateError, match=r"up_proj\.weight: the sources' directions cancel out"):
            self.merged(self.case(thirds))

    def test_tensor_that_no_source_changed_stays_as_it_is(self) -> None:
        case = self.random_case((40, 50), seed=32)
        assert case.base is not None
        assert same_bits(self.merged(replace(case, tensors=(case.base,) * 3)), case.base)

    def test_weights_that_sum_to_zero_cannot_be_normalised(self) -> None:
        with pytest.raises(CandidateError, match="sum to"):
            self.merged(self.case(PEER[:2], weighted(0.5, -0.5)))


class TestMultiSlerpWithoutBase(TestMultiSlerp):
    """Mean directions of the sources themselves."""

    def case(self, *args: Any, base: Any = None, **more: Any) -> Case:
        return super().case(*args, **more)

    test_agrees_with_mergekit = None  # type: ignore[assignment]
    test_tensor_that_no_source_changed_stays_as_it_is = None  # type: ignore[assignment]


class TestKarcher(MethodContract):
    """The mean on the sphere, iterated here on the vectors themselves."""

    name = "karcher"

    def expected(self, case: Case) -> Expected:
        vectors, tol = [flat(tensor) for tensor in case.tensors], case.number("tol")
        weights = np.array(case.numbers("weight")) / sum(case.numbers("weight"))
        lengths = np.array([float(np.linalg.norm(vector)) for vector in vectors])
        used = lengths > tol
        unclear = bool(tol) and bool((np.abs(lengths - tol) < 1e-9).any())
        whole = weights[used].sum()
        zero = np.zeros_like(vectors[0])
        if not used.any() or whole == 0:
            return Expected(zero, zero, np.full(zero.shape, unclear))
        units = np.stack([v / n for v, n, u in zip(vectors, lengths, used, strict=True) if u])
        mean, doubtful = self._iterated(units, weights[used] / whole, case)
        scale = float((weights * lengths).sum())
        size = scale * np.abs(units).sum(0)
        return Expected(scale * mean, size, np.full(zero.shape, unclear or doubtful))

    def _iterated(self, units: Array, weights: Array, case: Case) -> tuple[Array, bool]:
        """Return the mean direction, and whether rounding may have decided on it."""
        tol = case.number("tol")
        mean = (weights[:, None] * units).sum(0)
        length = float(np.linalg.norm(mean))
        unclear = 5e-8 < length < 1e-5 or abs(length - tol) < 1e-8 < tol
        mean = units[0] if length <= max(tol, 1e-7) else mean / length
        for _ in range(int(case.number("max_iter"))):
            step = np.zeros_like(mean)
            for weight, unit in zip(weights, units, strict=True):
                cosine = min(1.0, max(-1.0, float(unit @ mean)))
                angle = math.acos(cosine)
                unclear |= 1e-12 < 1 + cosine < 1e-6 or abs(angle - tol) < 1e-7 < tol
                if angle <= tol or (math.sin(angle) < 1e-6 and cosine < 0):
                    continue
                step += weight * angle / math.sin(angle) * (unit - cosine * mean)
            size = float(np.linalg.norm(step))
            unclear |= abs(size - tol) < 1e-7 < tol
            if size <= tol:
                break
            mean = math.cos(size) * mean + math.sin(size) / size * step
            mean /= np.linalg.norm(mean)
        return mean, unclear

    def sensible(self, case: Case) -> Case:
        method = {**case.method, "tol": case.number("tol") * 1e-3, "max_iter": case.number("max_iter") % 30}
        weights = case.numbers("weight")
        if sum(weights) < 0.1:
            case = replace(case, sources=tuple(weighted(*[1.0] * len(weights))))
        return replace(case, method=method)

    def selecting(self, index: int, count: int) -> Parameters:
        return {}, weighted(*(float(i == index) for i in range(count)))

    def averaging(self, count: int) -> Parameters:
        return {}, weighted(*(0.3 + i for i in range(count)))

    @pytest.mark.parametrize(
        ("sources", "weights", "merged"),
        [
            ([[3.0, 0, 0], [0.0, 3, 0], [0.0, 0, 3]], (1, 1, 1), [1.73205081] * 3),
            ([[1.0, 0, 0, 0], [0.0, 2, 0, 0], [1.8, 2.4, 0, 0]], (1, 1, 1), [1.34576595, 1.47949789, 0, 0]),
            ([[1.0, 0, 0], [0.0, 2, 0], [0.0, 0, 3]], (2, 1, 1), [1.35986793, 0.77886431, 0.77886431]),
        ],
    )
    def test_worked_example(
        self, sources: list[list[float]], weights: tuple[float, ...], merged: list[float]
    ) -> None:
        case = self.case(sources, weighted(*map(float, weights)))
        np.testing.assert_allclose(flat(self.merged(case)), merged, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize(
        ("count", "method", "merged"),
        [
            (3, {}, (0.698596, -1.163403, 0.544793, 2.093017, 0.009654, -0.722727)),
            (3, {"max_iter": 1.0}, (0.698774, -1.163494, 0.54454, 2.092933, 0.009909, -0.722837)),
            (3, {"tol": 0.05}, (0.700659, -1.164236, 0.543226, 2.091389, 0.014542, -0.725195)),
            (2, {}, (0.587346, -0.974236, 0.946194, 1.748017, 0.473097, -0.960215)),
        ],
    )
    def test_agrees_with_mergekit(
        self, count: int, method: dict[str, Any], merged: tuple[float, ...]
    ) -> None:
        case = self.case(PEER[:count], **method)
        np.testing.assert_allclose(flat(self.merged(case)), merged, atol=3e-6)

    def test_squared_angles_are_least_at_the_mean(self) -> None:
        generator = np.random.default_rng(0)
        units = generator.normal(size=(4, 6)) + 1
        units /= np.linalg.norm(units, axis=1)[:, None]
        weights = np.array([0.4, 0.1, 0.2, 0.3])
        mean = np.array(karcher_mean((units @ units.T).tolist(), weights.tolist(), 100, 1e-12)) @ units

        def spread(point: Array) -> float:
            return float(weights @ np.arccos(units @ (point / np.linalg.norm(point))) ** 2)

        nearby = [spread(mean + 1e-3 * generator.normal(size=6)) for _ in range(200)]
        assert spread(mean) < min(nearby)

    def test_two_sources_meet_where_slerp_does(self) -> None:
        first, second = np.array([1.0, 0.0]), np.array([math.cos(1.2), math.sin(1.2)])
        case = self.case([first.tolist(), second.tolist()], weighted(1.0, 3.0), max_iter=100.0, tol=1e-9)
        np.testing.assert_allclose(flat(self.merged(case)), [math.cos(0.9), math.sin(0.9)], atol=1e-7)

    def test_opposite_sources_start_at_the_first_and_stay(self) -> None:
        case = self.case([[0.3, -0.7, 0.11], [-0.9, 2.1, -0.33]])
        np.testing.assert_allclose(flat(self.merged(case)), 2 * flat(case.tensors[0]), rtol=1e-6)

    def test_sources_of_zeros_count_for_the_length_only(self) -> None:
        case = self.case([[3.0, 4.0], [0.0, 0.0]])
        np.testing.assert_allclose(flat(self.merged(case)), [1.5, 2.0])
        assert self.merged(self.case([[0.0, 0.0], [0.0, 0.0]])).tolist() == [0.0, 0.0]
        assert self.merged(self.case([[3.0, 4.0], [0.0, 0.0]], weighted(0.0, 1.0))).tolist() == [0.0, 0.0]

    def test_source_that_is_no_number_is_not_averaged_away(self) -> None:
        broken = [float("nan"), 1.0]
        for sources in ([broken, broken], [broken, [3.0, 4.0]]):
            assert not self.merged(self.case(sources)).isfinite().any()

    def test_weights_that_are_all_zero_are_refused(self) -> None:
        with pytest.raises(CandidateError, match="sum to"):
            self.merged(self.case(PEER[:2], weighted(0.0, 0.0)))


class TestModelStock(MethodContract):
    """Base and mean of the sources by the deltas' angle."""

    name = "model_stock"

    def expected(self, case: Case) -> Expected:
        assert case.base is not None
        count, base = len(case.tensors), flat(case.base)
        index = np.arange(base.size)
        shape = tuple(case.tensors[0].shape) or (1,)
        value, size, unclear = base.copy(), np.abs(base), np.zeros(base.shape, dtype=bool)
        for part in index.reshape(-1, shape[-1]) if case.method["filter_wise"] else [index]:
            cosines = []
            for one, other in combinations([delta[part] for delta in case.deltas], 2):
                lengths = float(np.linalg.norm(one) * np.linalg.norm(other))
                cosines.append(min(1.0, max(-1.0, float(one @ other) / max(lengths, 1e-6))))
            cosine = sum(cosines) / len(cosines)
            divisor = 1 + (count - 1) * cosine
            t = count * cosine / divisor if abs(divisor) >= 1e-6 else 0.0
            t = case.number("lambda") * (min(1.0, max(0.0, t)) if case.method["clamp"] else t)
            value[part] += t * np.mean([delta[part] for delta in case.deltas], axis=0)
            others = np.mean([np.abs(flat(tensor)[part]) for tensor in case.tensors], axis=0)
            size[part] += abs(t) * (others + np.abs(base[part]))
            unclear[part] = 1e-9 < abs(divisor) < 1e-4
        return Expected(value, size, unclear)

    def averaging(self, count: int) -> Parameters:
        return {}, [{}] * count

    # No parameter selects a source: the ratio of mean to base follows from the angle.
    test_parameters_that_select_one_source_give_it = None  # type: ignore[assignment]

    def test_lambda_zero_gives_the_base(self) -> None:
        for filter_wise in (False, True):
            case = self.random_case((11, 13), seed=13, filter_wise=filter_wise, **scaled(0.0))
            assert case.base is not None
            assert same_bits(self.merged(case), case.base)

    def test_sources_equal_to_the_base_give_the_base(self) -> None:
        case = self.random_case((11, 13), seed=12)
        assert case.base is not None
        assert same_bits(self.merged(replace(case, tensors=(case.base,) * 3)), case.base)

    def test_worked_examples(self) -> None:
        offsets = [[3.0, 0, 4, 0], [4.0, 0, 3, 0]]
        case = self.case(offsets, base=[0.0] * 4)
        np.testing.assert_allclose(flat(self.merged(case)), [3.42857143, 0, 3.42857143, 0], rtol=1e-6)
        assert float(self.prepared(case)) == pytest.approx(0.96)
        opposed = self.case(THETA, base=BASE)
        assert float(self.prepared(opposed)) == pytest.approx(-0.22929642, abs=1e-8)
        assert same_bits(self.merged(opposed), torch.tensor(BASE, dtype=torch.float32))
        free = self.case(THETA, base=BASE, clamp=False)
        np.testing.assert_allclose(
            flat(self.merged(free)), BASE - 1.27055811 * np.mean(TAU, axis=0), rtol=1e-6
        )

    @pytest.mark.parametrize(
        ("count", "filter_wise", "merged"),
        [
            (2, False, (0.334354, -1.0, -0.412584, 2.331292, -0.496938, -0.584354)),
            (2, True, (0.408814, -1.0, -0.114743, 2.605516, -0.908274, -0.447242)),
            (3, False, (-0.720461, -0.389769, -0.360231, 2.61023, 0.610231, -1.970461)),
            (3, True, (-0.273877, -0.613061, -0.136938, 9.164398, 7.164396, -15.078796)),
        ],
    )
    def test_agrees_with_mergekit(self, count: int, filter_wise: bool, merged: tuple[float, ...]) -> None:
        case = self.case(PEER[:count], base=PEER_BASE, filter_wise=filter_wise, clamp=False)
        np.testing.assert_allclose(flat(self.merged(case)), merged, rtol=2e-6, atol=2e-6)

    def test_opposite_deltas_keep_the_base_even_unclamped(self) -> None:
        case = self.case([[1.3, 0.7, 2.9], [-0.3, 1.3, -0.9]], base=[0.5, 1.0, 1.0], clamp=False)
        assert same_bits(self.merged(case), torch.tensor([0.5, 1.0, 1.0]))
