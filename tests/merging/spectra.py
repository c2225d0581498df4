"""What the methods on matrices promise beside the contract, and NumPy's view of singular values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from evomerge.errors import CandidateError
from evomerge.merging.methods import KERNELS
from evomerge.recipe import Scalar
from tests.contracts.method import (
    DTYPES,
    PLACE,
    Array,
    Case,
    DeltaContract,
    Expected,
    flat,
    same_bits,
)

Parameters = tuple[dict[str, Scalar], list[dict[str, Scalar]]]
NOISE = 2.0**-23


def singular(matrix: Array, scale: float | None = None) -> tuple[Array, Array, Array]:
    """Return the singular triplets that are more than rounding noise."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    largest = values[0] if scale is None else scale
    rank = int((values > np.sqrt(max(matrix.shape)) * NOISE * largest).sum())
    return left[:, :rank], values[:rank], right[:rank]


def polar(matrix: Array) -> Array:
    left, _, right = singular(matrix)
    return left @ right


def doubtful(matrix: Array, cut: int, scale: float | None = None) -> bool:
    """Return whether rounding may choose the leading `cut` directions of a matrix, or its rank."""
    values = np.linalg.svd(matrix, compute_uv=False)
    largest = values[0] if scale is None else scale
    near_noise = ((values > 1e-12 * largest) & (values < 1e-4 * largest)).any()
    tied = cut < len(values) and values[cut] > 1e-9 * largest
    tied = tied and cut > 0 and values[cut - 1] - values[cut] < 1e-5 * largest
    return bool(near_noise or tied)


def entries(case: Case) -> tuple[Array, list[Array]]:
    """Return the base and the deltas as stacks of matrices, count x out x in."""
    assert case.base is not None
    shape = (-1, *case.base.shape[-2:])
    return flat(case.base).reshape(shape), [delta.reshape(shape) for delta in case.deltas]


def weights(*numbers: float) -> list[dict[str, Scalar]]:
    return [{"weight": number} for number in numbers]


def rotation(size: int, seed: int) -> Array:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


class SpectralContract(DeltaContract):
    """A method on matrices; its `expected_matrix` gives a merged delta, and whether rounding may turn it."""

    bit_equal_selection = False

    def expected_matrix(self, deltas: list[Array], case: Case) -> tuple[Array, bool]:
        raise NotImplementedError

    def expected_vector(self, case: Case) -> Array:
        pairs = zip(case.numbers("weight"), case.deltas, strict=True)
        return np.sum([weight * delta for weight, delta in pairs], axis=0) / len(case.deltas)

    def expected(self, case: Case) -> Expected:
        assert case.base is not None
        scale, shape = case.number("lambda"), case.base.shape
        if len(shape) < 2:
            delta, unclear = self.expected_vector(case), np.zeros(shape.numel(), dtype=bool)
        else:
            stack = entries(case)[1]
            found = [self.expected_matrix([d[e] for d in stack], case) for e in range(len(stack[0]))]
            delta = np.concatenate([part.reshape(-1) for part, _ in found])
            unclear = np.concatenate([np.full(part.size, doubt) for part, doubt in found])
        length = sum(
            abs(w) * np.linalg.norm(d) for w, d in zip(case.numbers("weight"), case.deltas, strict=True)
        )
        size = np.abs(flat(case.base)) + abs(scale) * (np.abs(delta) + length)
        return Expected(flat(case.base) + scale * delta, size, unclear)

    def turning(self, size: int, seed: int) -> Array:
        """Return an orthogonal matrix that turns the result along with all deltas."""
        return rotation(size, seed)

    def sensible(self, case: Case) -> Case:
        """Singular values of small multiples of 1/8 are often equal: no case is beyond doubt."""
        return replace(super().sensible(case), exact=False)

    def selecting(self, index: int, count: int) -> Parameters:
        """Select one source of a tensor that is no matrix: the mean of the deltas, one of them weighted."""
        return {}, weights(*(count * float(i == index) for i in range(count)))

    def averaging(self, count: int) -> Parameters:
        return {}, weights(*(1.0,) * count)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", [(), (1,), (7,), (64,)], ids=str)
    def test_identical_sources_give_the_source(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Holds for tensors that are no matrices; spectra of matrices are changed on purpose."""
        super().test_identical_sources_give_the_source(shape, dtype)

    def test_number_of_threads_changes_no_bit_of_a_matrix(self) -> None:
        case = self.random_case((90, 130), seed=40)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(self.merged(case))
            assert torch.get_num_threads() == threads
        assert same_bits(results[0], results[1])
        assert same_bits(results[0], results[2])

    def test_experts_of_a_tensor_are_merged_one_by_one(self) -> None:
        case = self.random_case((3, 6, 5), seed=41)
        whole = self.merged(case)
        for e in range(3):
            assert same_bits(whole[e], self.merged(self.expert(case, e)))

    def expert(self, case: Case, e: int) -> Case:
        assert case.base is not None
        tensors = tuple(tensor[e].contiguous() for tensor in case.tensors)
        return replace(case, base=case.base[e].contiguous(), tensors=tensors)

    @pytest.mark.parametrize("role", ["embedding", "head"])
    def test_embedding_and_head_are_matrices_only_on_demand(self, role: Any) -> None:
        case = self.random_case((6, 5), seed=42)
        end = replace(case, place=replace(PLACE, role=role))
        assert same_bits(self.merged(replace(end, method={**case.method, "ends": True})), self.merged(case))
        self.assert_merged_as_a_vector(end)

    def test_norm_of_two_dimensions_is_no_matrix(self) -> None:
        case = self.random_case((6, 5), seed=43)
        self.assert_merged_as_a_vector(replace(case, place=replace(PLACE, role="norm")))

    def assert_merged_as_a_vector(self, case: Case) -> None:
        assert case.base is not None
        lines = replace(case, base=case.base.view(-1), tensors=tuple(t.view(-1) for t in case.tensors))
        assert same_bits(self.merged(case).view(-1), self.merged(lines))
        assert KERNELS[self.name].method.whole_model or self.prepared(case) is None

    def test_turning_all_deltas_turns_the_result(self) -> None:
        generator = np.random.default_rng(44)
        deltas = [generator.normal(size=(7, 5)) for _ in range(3)]
        left, right = self.turning(7, 0), self.turning(5, 1)
        parameters = weights(0.5, 1.0, 1.5)
        plain = self.case(deltas, parameters, base=np.zeros((7, 5)))
        turned = self.case([left @ d @ right for d in deltas], parameters, base=np.zeros((7, 5)))
        expected = left @ self.merged(plain).double().numpy() @ right
        np.testing.assert_allclose(self.merged(turned).double().numpy(), expected, atol=5e-6)

    @pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
    def test_source_that_is_not_finite_is_no_direction_but_an_error(self, wrong: float) -> None:
        case = self.random_case((6, 8), seed=46)
        case.tensors[1][2, 3] = wrong
        with pytest.raises(CandidateError, match="^a delta is not finite"):
            self.merged(case)

    def test_sources_without_a_change_or_with_the_same_one_have_a_merge(self) -> None:
        generator = np.random.default_rng(45)
        base = generator.normal(size=(6, 8))
        line = base + generator.normal(size=(6, 1)) @ generator.normal(size=(1, 8))
        full = base + generator.normal(size=(6, 8))
        for sources in ([full, full], [base, full], [line, line], [line, base, full], [base, base]):
            case = self.case(sources, base=base)
            result = self.merged(case)
            assert bool(result.isfinite().all())
            expected = self.expected(case)
            wrong = np.abs(flat(result) - expected.value) > 2e-6 * expected.size
            assert not (wrong & ~expected.unclear).any()
