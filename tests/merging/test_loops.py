"""The compiled loops and the torch operations that stand in for them on other devices do the same."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from evomerge.merging import loops, torched
from evomerge.merging.compiled import affine, memory, thinned
from evomerge.merging.compiled.order import magnitude_order
from evomerge.merging.draws import draw_keys
from evomerge.merging.keeps import ALL_ABOVE, GOLDEN, NONE_ABOVE, Band, Cut, Draw, Election, Graded, Keep

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
N = 600_011
"""Enough for several threads, and no multiple of anything."""

SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 65504.0, 65520.0, 3.4e38, 1.0, 1.00390625]


def raw(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def numbers(dtype: torch.dtype, seed: int, count: int = N) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("out", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_special_number_is_read_and_rounded_as_torch_does(dtype: torch.dtype, out: torch.dtype) -> None:
    values = torch.cat([torch.tensor(SPECIAL), torch.linspace(-70_000, 70_000, 5_001)]).to(dtype)
    got = torch.empty_like(values, dtype=out)
    affine.weighted_sum([values, torch.zeros_like(values)], (1.0, 0.0), got)
    wanted = (values.float() + 0.0).to(out)
    nan = wanted.isnan()
    assert torch.equal(got.isnan(), nan)
    assert torch.equal(raw(got)[~nan], raw(wanted)[~nan])


@pytest.mark.parametrize("bits", range(0, 2**16, 2**14))
def test_half_precision_rounds_to_the_nearest_and_even_for_every_pattern_of_low_bits(bits: int) -> None:
    low = torch.arange(2**16, dtype=torch.int32)
    values = (low | ((0x3F80 + bits // 2**14) << 16)).view(torch.float32)
    for out in (torch.bfloat16, torch.float16):
        got = torch.empty_like(values, dtype=out)
        affine.weighted_sum([values], (1.0,), got)
        assert torch.equal(raw(got), raw(values.to(out)))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 12])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weighted_sums_are_the_same(count: int, dtype: torch.dtype, threads: int) -> None:
    tensors = [numbers(dtype, seed) for seed in range(count)]
    factors = [0.7 - 0.3 * i for i in range(count)]
    first, second = torch.empty(N, dtype=dtype), torch.empty(N, dtype=dtype)
    affine.weighted_sum(tensors, factors, first)
    torched.weighted_sum(tensors, factors, second)
    assert torch.equal(first, second)


def test_mixed_dtypes_are_read_as_the_numbers_they_are() -> None:
    tensors = [numbers(dtype, seed) for seed, dtype in enumerate(DTYPES)]
    mixed, wide = torch.empty(N), torch.empty(N)
    affine.weighted_sum(tensors, (0.5, 0.3, 0.2), mixed)
    affine.weighted_sum([tensor.float() for tensor in tensors], (0.5, 0.3, 0.2), wide)
    assert torch.equal(mixed, wide)


def test_output_may_be_an_input() -> None:
    first, second = numbers(torch.bfloat16, 0), numbers(torch.bfloat16, 1)
    wanted = torch.empty_like(first)
    affine.weighted_sum([first, second], (0.3, 0.7), wanted)
    affine.weighted_sum([first, second], (0.3, 0.7), second)
    assert torch.equal(second, wanted)


def test_float64_goes_the_way_of_torch() -> None:
    tensors, out = [numbers(torch.float64, seed) for seed in range(2)], torch.empty(N)
    assert not memory.takes(*tensors)
    loops.weighted_sum(tensors, (0.5, 0.5), out)
    torch.testing.assert_close(out, ((tensors[0] + tensors[1]) / 2).float(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scalar_products_are_those_of_float64(dtype: torch.dtype, threads: int) -> None:
    first, second = numbers(dtype, 0), numbers(dtype, 1)
    exact = math.fsum((first.double() * second.double()).tolist())
    assert affine.dot(first, second) == pytest.approx(exact, rel=1e-12, abs=1e-9)
    assert torched.dot(first, second) == pytest.approx(exact, rel=1e-12, abs=1e-9)


def test_scalar_product_does_not_depend_on_the_number_of_threads() -> None:
    first, second = numbers(torch.float32, 0), numbers(torch.float32, 1)
    before = torch.get_num_threads()
    products = set()
    for count in (1, 2, 3, 4):
        torch.set_num_threads(count)
        products.add(affine.dot(first, second))
    torch.set_num_threads(before)
    assert len(products) == 1


def keeps(kind: str) -> list[Keep]:
    keys = [draw_keys(0, name) for name in "abc"]
    if kind == "band":
        cuts = (Cut(0x3E800000, 2**30), Cut(0x3F000000, 2**31), ALL_ABOVE)
        highs = (NONE_ABOVE, Cut(0x3FC00000, 2**29), NONE_ABOVE)
        return [Band(0.5 + i, low, high) for i, (low, high) in enumerate(zip(cuts, highs, strict=True))]
    if kind == "draw":
        return [Draw(0.5 + i, key, 2**24 // (i + 1)) for i, key in enumerate(keys)]
    codes = torch.arange(N).remainder(1_000).to(torch.uint16)
    return [Graded(0.5 + i, key, codes, 0.1, 0.8 / 999, i != 1) for i, key in enumerate(keys)]


@pytest.mark.parametrize("election", [Election(False), Election(True), Election(True, True, -1)], ids=str)
@pytest.mark.parametrize("kind", ["band", "draw", "graded"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_thinned_merges_are_the_same(kind: str, election: Election, dtype: torch.dtype, threads: int) -> None:
    # Multiples of 1/8 make equal magnitudes and votes that cancel out.
    base, *tensors = ((numbers(torch.float32, i) * 8).round().div(8).to(dtype) for i in range(4))
    results: list[Any] = []
    for module in (thinned, torched):
        out = torch.empty(N, dtype=dtype)
        module.merge_thinned(base, tensors, keeps(kind), (0.5, 1.5, 2.5), election, 0.9, out)
        results.append(out)
    assert torch.equal(*results)


@pytest.mark.parametrize("kind", ["band", "draw", "graded"])
def test_sums_over_what_is_kept_are_the_same(kind: str, threads: int) -> None:
    base, *tensors = (numbers(torch.bfloat16, i) for i in range(4))
    for power in (1, 2):
        for tensor, keep in zip(tensors, keeps(kind), strict=True):
            compiled = thinned.kept_norm(base, tensor, keep, power)
            assert compiled == pytest.approx(torched.kept_norm(base, tensor, keep, power), rel=1e-9)
    assert thinned.elected_signs(base, tensors, keeps(kind)) == torched.elected_signs(
        base, tensors, keeps(kind)
    )


def test_order_is_by_magnitude_and_then_by_fraction() -> None:
    base, tensor = numbers(torch.bfloat16, 0), numbers(torch.bfloat16, 1)
    order = magnitude_order(base, tensor)
    assert torch.equal(torch.from_numpy(order.view("int64")), torched.magnitude_order(base, tensor))
    magnitudes = (tensor.float() - base.float()).abs().numpy()
    fractions = np.arange(N) * GOLDEN % 2**32
    assert np.array_equal(order.argsort(), np.lexsort((fractions, -magnitudes)))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_none_is_found(bad: float, dtype: torch.dtype, threads: int) -> None:
    values = numbers(dtype, 0)
    values[7] = torch.finfo(dtype).max
    assert loops.all_finite(values)
    for place in (0, 16_384, N - 1):
        spoilt = values.clone()
        spoilt[place] = bad
        assert not loops.all_finite(spoilt)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("module", [thinned, torched], ids=["compiled", "torched"])
def test_number_that_is_none_does_not_vanish_in_a_vote(module: Any, bad: float) -> None:
    base, *tensors = (numbers(torch.float32, i, 100) for i in range(4))
    tensors[1][50] = bad
    for election in (Election(False), Election(True), Election(True, True)):
        out = torch.empty(100)
        everything: list[Keep] = [Band(0.5, ALL_ABOVE)] * 3
        module.merge_thinned(base, tensors, everything, (0.5,) * 3, election, 1.0, out)
        assert out.isfinite().logical_not().nonzero().tolist() == [[50]]


def test_tensors_that_are_not_contiguous_are_refused() -> None:
    turned = torch.zeros(4, 3).T
    with pytest.raises(RuntimeError, match="view"):
        affine.weighted_sum([turned], (2.0,), torch.zeros(3, 4))
