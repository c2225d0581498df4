"""Linear, slerp and task arithmetic: the contract, and the worked examples of their papers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch

from evomerge.errors import CandidateError
from evomerge.merging.methods import KERNELS, Sources, Values
from evomerge.recipe import Scalar
from tests.contracts.method import (
    DTYPES,
    PLACE,
    Case,
    DeltaContract,
    Expected,
    MethodContract,
    flat,
    same_bits,
    scaled,
)
from tests.merging.fixture import BASE, TAU

Parameters = tuple[dict[str, Scalar], list[dict[str, Scalar]]]
THETA = tuple(BASE + tau for tau in TAU)


def divided(case: Case) -> list[float]:
    weights = case.numbers("weight")
    return [weight / sum(weights) for weight in weights] if case.method["normalize"] else weights


def weighted(*weights: float) -> list[dict[str, Scalar]]:
    return [{"weight": weight} for weight in weights]


class TestLinear(MethodContract):
    """Weighted averages."""

    name = "linear"

    def expected(self, case: Case) -> Expected:
        terms = np.stack([w * flat(t) for w, t in zip(divided(case), case.tensors, strict=True)])
        return Expected(terms.sum(0), np.abs(terms).sum(0), np.zeros(terms.shape[1], dtype=bool))

    def selecting(self, index: int, count: int) -> Parameters:
        return {}, weighted(*(float(i == index) for i in range(count)))

    def averaging(self, count: int) -> Parameters:
        return {"normalize": True}, weighted(*(0.3 + i for i in range(count)))

    @pytest.mark.parametrize(
        ("weights", "normalize", "merged"),
        [
            ((0.5, 0.3, 0.2), True, (3.8, 1, 1.35, 0.7, 2.5, -1.3)),
            ((0.5, 0.3, 0.2), False, (3.8, 1, 1.35, 0.7, 2.5, -1.3)),
            ((1, 1, 2), True, (3, 0.5, 1.125, -0.25, 3.75, 0.75)),
            ((1, 1, 2), False, (12, 2, 4.5, -1, 15, 3)),
        ],
    )
    def test_worked_example(
        self, weights: tuple[float, ...], normalize: bool, merged: tuple[float, ...]
    ) -> None:
        case = self.case(THETA, weighted(*map(float, weights)), normalize=normalize)
        np.testing.assert_allclose(flat(self.merged(case)), merged, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("weights", [(0.0, 0.0), (1.0, -1.0), (0.1, -0.1 + 1e-10), (0.3, 0.1, -0.4)])
    def test_weights_that_sum_to_zero_cannot_be_normalised(self, weights: tuple[float, ...]) -> None:
        case = self.case(THETA[: len(weights)], weighted(*weights))
        with pytest.raises(CandidateError, match="sum to"):
            self.merged(case)

    def test_source_with_weight_zero_is_not_read(self) -> None:
        broken = torch.full((6,), float("nan"))
        case = self.case([*THETA[:2], broken], weighted(0.5, 0.5, 0.0))
        assert bool(self.merged(case).isfinite().all())

    def test_source_of_weight_one_keeps_every_bit_of_float64(self) -> None:
        wide = [torch.tensor([1 / 3, 1e-300]).double(), torch.ones(2).double()]
        case = self.case(wide, weighted(1.0, 0.0), dtype=torch.float64)
        assert same_bits(self.merged(case), case.tensors[0])

    def test_bfloat16_sum_of_many_sources_does_not_lose_the_small_ones(self) -> None:
        ones = torch.ones(8, dtype=torch.bfloat16)
        case = self.case([ones * 256, *[ones] * 16], weighted(*[1.0] * 17), dtype=torch.bfloat16)
        assert self.merged(replace(case, method={"normalize": False})).tolist() == [272.0] * 8


class TestTaskArithmetic(DeltaContract):
    """Base plus weighted deltas."""

    name = "task_arithmetic"

    def expected(self, case: Case) -> Expected:
        assert case.base is not None
        scale, base = case.number("lambda"), flat(case.base)
        shares = [scale * weight for weight in divided(case)]
        terms = np.stack([share * delta for share, delta in zip(shares, case.deltas, strict=True)])
        sizes = np.stack(
            [abs(share) * np.abs(flat(t)) for share, t in zip(shares, case.tensors, strict=True)]
        )
        size = (1 + sum(map(abs, shares))) * np.abs(base) + sizes.sum(0)
        return Expected(base + terms.sum(0), size, np.zeros(base.shape, dtype=bool))

    def selecting(self, index: int, count: int) -> Parameters:
        return {}, weighted(*(float(i == index) for i in range(count)))

    def averaging(self, count: int) -> Parameters:
        return {"normalize": True}, weighted(*(0.3 + i for i in range(count)))

    def test_worked_example(self) -> None:
        case = self.case(THETA, base=BASE, **scaled(0.5))
        np.testing.assert_allclose(flat(self.merged(case)), [4.5, 1, 1, 0, 3.5, -0.75], atol=1e-6)

    def test_negative_lambda_takes_a_task_away(self) -> None:
        case = self.case(THETA[:1], base=BASE, **scaled(-1.0))
        np.testing.assert_allclose(flat(self.merged(case)), BASE - TAU[0], atol=1e-6)

    def test_weights_that_sum_to_zero_cannot_be_normalised(self) -> None:
        case = self.case(THETA[:2], weighted(0.5, -0.5), base=BASE, normalize=True)
        with pytest.raises(CandidateError, match="sum to"):
            self.merged(case)


class TestSlerp(MethodContract):
    """Great circles between two tensors."""

    name = "slerp"

    def expected(self, case: Case) -> Expected:
        t = case.number("t")
        first, second = (flat(tensor) for tensor in case.tensors)
        norms = float(np.linalg.norm(first) * np.linalg.norm(second))
        cosine = float(first @ second) / norms if norms else 1.0
        if abs(cosine) > 0.9995:
            factors = (1 - t, t)
        else:
            angle = math.acos(cosine)
            factors = (math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle))
        terms = np.stack([factors[0] * first, factors[1] * second])
        edge = np.full(first.shape, abs(abs(cosine) - 0.9995) < 1e-9)
        return Expected(terms.sum(0), np.abs(terms).sum(0), edge)

    def selecting(self, index: int, count: int) -> Parameters:
        return {"t": float(index)}, [{}, {}]

    def averaging(self, count: int) -> Parameters:
        return {"t": 0.3}, [{}, {}]

    def permuted(self, case: Case, order: Sequence[int]) -> Case:
        turned = super().permuted(case, order)
        return turned if order == (0, 1) else replace(turned, method={"t": 1.0 - case.number("t")})

    EXAMPLES: ClassVar = [
        ([2.0, 0, 0, 0], [0.0, 1, 0, 0], 0.5, [1.41421356, 0.70710678, 0, 0]),
        ([1.0, 0, 0, 0], [0.5, math.sqrt(3) / 2, 0, 0], 0.25, [0.96592583, 0.25881905, 0, 0]),
    ]

    @pytest.mark.parametrize(("first", "second", "t", "merged"), EXAMPLES)
    def test_worked_example(
        self, first: list[float], second: list[float], t: float, merged: list[float]
    ) -> None:
        case = self.case([first, second], t=t)
        np.testing.assert_allclose(flat(self.merged(case)), merged, rtol=1e-6, atol=1e-7)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", [(70_001,), (3, 5), ()], ids=str)
    def test_both_ends_are_the_sources_bit_for_bit(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        case = self.random_case(shape, dtype=dtype, seed=20)
        for t in (0, 1):
            assert same_bits(self.merged(replace(case, method={"t": float(t)})), case.tensors[t])

    def test_tensor_of_zeros_is_interpolated_along_a_line(self) -> None:
        case = self.case([torch.zeros(4), torch.ones(4)], t=0.25)
        assert self.merged(case).tolist() == [0.25] * 4

    @pytest.mark.parametrize("sign", [1.0, -1.0])
    def test_directions_that_agree_within_the_threshold_are_interpolated_along_a_line(
        self, sign: float
    ) -> None:
        first = torch.tensor([1.0, 0.0])
        for angle, straight in ((0.0316, True), (0.0317, False)):  # acos(0.9995) is 0.031624
            second = sign * torch.tensor([math.cos(angle), math.sin(angle)])
            inputs = Sources(None, (first, second), ("", ""), PLACE, 4)
            state = KERNELS["slerp"].prepare(inputs, Values({}, (), 0))
            assert (state is None) == straight

    def test_point_between_directions_of_one_length_has_that_length(self) -> None:
        generator = torch.Generator().manual_seed(0)
        first, second = (torch.randn(1000, generator=generator) for _ in range(2))
        case = self.case([first / first.norm(), second / second.norm()], t=0.37)
        assert float(self.merged(case).norm()) == pytest.approx(1.0, rel=1e-6)
