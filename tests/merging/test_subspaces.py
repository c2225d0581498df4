"""Polar factors, ranks and Adam, and which tensors are matrices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from evomerge.merging.methods import Sources
from evomerge.merging.methods.subspaces import (
    adam,
    is_matrix,
    matrices,
    one_thread,
    polar_factor,
    tolerance,
    triplets,
)
from tests.contracts.method import PLACE
from tests.merging.spectra import rotation


def of_spectrum(values: list[float], shape: tuple[int, int]) -> torch.Tensor:
    count = len(values)
    left, right = rotation(shape[0], 0)[:, :count], rotation(shape[1], 1)[:count]
    return torch.tensor(left * values @ right)


@pytest.mark.parametrize("shape", [(5, 5), (5, 9), (9, 5), (1, 7), (7, 1), (1, 1)])
def test_polar_factor_is_that_of_the_singular_vectors(shape: tuple[int, int]) -> None:
    matrix = torch.tensor(np.random.default_rng(0).normal(size=shape))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    factor, rank = polar_factor(matrix)
    assert rank == min(shape)
    torch.testing.assert_close(factor, left @ right)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("smallest", [1e-2, 1e-4, 1e-5])
def test_polar_factor_of_an_ill_conditioned_matrix_is_orthogonal(smallest: float, size: float) -> None:
    factor, rank = polar_factor(size * of_spectrum([1.0, 0.5, 0.1, smallest], (4, 6)))
    assert rank == 4
    torch.testing.assert_close(factor @ factor.T, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-12)
    expected = of_spectrum([1.0, 1.0, 1.0, 1.0], (4, 6))
    torch.testing.assert_close(factor, expected, rtol=0, atol=1e-9)


def test_polar_factor_is_zero_on_the_null_space() -> None:
    factor, rank = polar_factor(of_spectrum([2.0, 1.0, 1e-9], (6, 8)))
    assert rank == 2
    torch.testing.assert_close(factor, of_spectrum([1.0, 1.0], (6, 8)), rtol=0, atol=1e-8)
    factor, rank = polar_factor(torch.zeros((3, 4), dtype=torch.float64))
    assert rank == 0
    assert not factor.any()


def test_polar_factor_of_stacked_copies_is_shared_among_them() -> None:
    columns = torch.tensor(rotation(6, 2)[:, :2])
    factor, rank = polar_factor(torch.cat([columns, columns], dim=1))
    assert rank == 2
    torch.testing.assert_close(factor, torch.cat([columns, columns], dim=1) / 2**0.5)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (40, 40), (1, 5)])
def test_triplets_are_those_of_an_svd(shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(1).normal(size=shape)
    found = triplets(torch.tensor(matrix))
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    np.testing.assert_allclose(found.values.numpy(), values, rtol=1e-9)
    first = found.first(3)
    expected = left[:, :3] * values[:3] @ right[:3]
    np.testing.assert_allclose((first.left * first.values @ first.right).numpy(), expected, atol=1e-12)
    for vectors in (found.left.T, found.right):
        torch.testing.assert_close(
            vectors @ vectors.T, torch.eye(min(shape), dtype=torch.float64), rtol=0, atol=1e-9
        )


def test_triplets_leave_out_what_rounding_decides() -> None:
    matrix = of_spectrum([3.0, 1.0, 1e-9], (5, 7))
    found = triplets(matrix)
    torch.testing.assert_close(found.values, torch.tensor([3.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(found.left * found.values @ found.right, matrix, rtol=0, atol=1e-8)
    assert len(triplets(matrix, 6e6).values) == 1
    assert len(found.first(1).values) == len(found.first(1).right) == 1
    assert len(found.first(9).values) == 2
    assert not len(triplets(torch.zeros((3, 2), dtype=torch.float64)).values)
    assert tolerance((9, 4)) == 3 * 2.0**-23


@pytest.mark.parametrize(
    ("shape", "role", "ends", "taken"),
    [
        ((2, 3), "mlp", False, True),
        ((2, 3), "attention", False, True),
        ((2, 3), "other", False, True),
        ((4, 2, 3), "mlp", False, True),
        ((2, 3), "embedding", False, False),
        ((2, 3), "embedding", True, True),
        ((2, 3), "head", True, True),
        ((2, 3), "norm", True, False),
        ((6,), "mlp", True, False),
        ((), "mlp", True, False),
        ((0, 3), "mlp", True, False),
        ((2, 2, 3, 3), "mlp", True, False),
    ],
)
def test_matrices_are_tensors_of_two_or_three_dimensions(
    shape: tuple[int, ...], role: Any, ends: bool, taken: bool
) -> None:
    tensor = torch.zeros(shape)
    assert is_matrix(Sources(tensor, (tensor,), ("",), replace(PLACE, role=role), 4), ends) == taken


def test_matrices_of_experts_are_views_and_their_deltas_exact() -> None:
    base = torch.ones((2, 3, 4), dtype=torch.bfloat16)
    tensor = (base.float() + 2.0**-20).contiguous()
    first, second = matrices(Sources(base, (tensor, tensor), ("", ""), PLACE, 4))
    assert second.base.data_ptr() == base[1].data_ptr()
    assert first.side == 3
    assert all(bool((delta == 2.0**-20).all()) for delta in first.deltas())
    assert bool((first.weighted([0.5, 1.0]) == 1.5 * 2.0**-20).all())


def test_adam_takes_the_steps_of_torchs() -> None:
    target = torch.tensor(np.random.default_rng(3).normal(size=(4, 5)))
    point = torch.zeros_like(target, requires_grad=True)
    optimizer = torch.optim.Adam([point], lr=0.01)
    for _ in range(50):
        optimizer.zero_grad()
        (point - target).square().sum().backward()
        optimizer.step()
    found = adam(torch.zeros_like(target), lambda at: 2.0 * (at - target), 50, 0.01)
    torch.testing.assert_close(found, point.detach(), rtol=0, atol=1e-12)


def test_number_of_threads_is_put_back_after_an_error() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        with pytest.raises(torch.linalg.LinAlgError), one_thread():
            torch.linalg.cholesky(-torch.eye(2))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
