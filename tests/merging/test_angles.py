"""Lengths and cosines of whole tensors and of slices."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from evomerge.merging.methods.angles import Slices, rays
from tests.contracts.method import Case, flat

SIZES = (0, 1, 16_383, 16_384, 16_385, 3 * 262_144 + 16_384 + 5)


@pytest.mark.parametrize("size", SIZES)
def test_every_entry_counts_once(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    tensors = tuple(torch.randn(size, generator=generator) for _ in range(3))
    for base in (None, torch.randn(size, generator=generator).bfloat16()):
        case = Case(base, tensors, {}, ({}, {}, {}))
        start = 0.0 if base is None else flat(base)
        vectors = np.stack([flat(tensor) - start for tensor in tensors])
        lengths = np.linalg.norm(vectors, axis=1)
        found = rays(case.inputs)
        np.testing.assert_allclose(found.lengths, lengths, rtol=1e-12)
        if size:
            cosines = vectors @ vectors.T / np.outer(lengths, lengths)
            np.testing.assert_allclose(found.cosines, cosines, atol=1e-13)


def test_small_deltas_of_large_weights_keep_their_angle() -> None:
    base = torch.full((1000,), 100.0)
    steps = [2.0**-10 * (torch.arange(1000) % k == 0).float() for k in (2, 3)]
    found = rays(Case(base, tuple(base + step for step in steps), {}, ({}, {})).inputs)
    assert found.cosines[0][1] == pytest.approx(167 / math.sqrt(500 * 334), rel=1e-12)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("shape", [(), (5,), (3, 40_000), (40_000, 3), (4, 5, 6), (0, 3), (3, 0)], ids=str)
def test_products_of_slices(shape: tuple[int, ...], first: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    one, other = (torch.randn(shape, generator=generator) for _ in range(2))
    slices = Slices.of(one, first)
    got = slices.dots(Case(None, (one, other), {}, ({}, {})).inputs, 0, 1)
    product = one.double() * other.double()
    if not shape:
        expected = product.reshape(1)
    else:
        expected = product.sum(0).reshape(-1) if first else product.sum(-1).reshape(-1)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
