"""The random codes behind DARE's masks, and the sums behind its norms."""

from __future__ import annotations

import hashlib
import math
from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from evomerge.merging.blocks import total
from evomerge.merging.draws import draw_keys, uniform_codes

CPU = torch.device("cpu")
RANGE = 2**24
N = 200_000
Codes = npt.NDArray[np.int64]


def codes(seed: int = 0, key: str = "source\x1ftensor", count: int = N) -> Codes:
    return uniform_codes(draw_keys(seed, key), 0, count, CPU).numpy().astype(np.int64)


def by_hand(seed: int, key: str, index: int) -> int:
    """Mix one index with Python's own integers: MurmurHash3's 32-bit finaliser, once for each key."""
    digest = hashlib.sha256(f"{seed}\x1f{key}".encode()).digest()
    code = index
    for word in (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")):
        code ^= word
        code ^= code >> 16
        code = code * 0x85EBCA6B % 2**32
        code ^= code >> 13
        code = code * 0xC2B2AE35 % 2**32
        code ^= code >> 16
    return code >> 8


def excess(observed: npt.NDArray[np.int64], expected: float) -> float:
    """Return chi-square over its expectation in standard deviations; about normal for many cells."""
    freedom = observed.size - 1
    statistic = float(((observed - expected) ** 2 / expected).sum())
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize(("seed", "key"), [(0, ""), (1, "a\x1fb"), (2**63 - 1, "model.layers.0.ä")])
def test_codes_are_those_of_the_written_recipe(seed: int, key: str) -> None:
    assert codes(seed, key, 300).tolist() == [by_hand(seed, key, index) for index in range(300)]


def test_codes_are_pinned_so_that_recipes_stay_what_they_are() -> None:
    assert codes(7, "source\x1fmodel.norm.weight", 5).tolist() == [
        10417136,
        16645763,
        12977675,
        89178,
        10431897,
    ]


def test_same_arguments_give_the_same_codes_and_shorter_ones_are_their_start() -> None:
    whole = codes()
    assert np.array_equal(codes(), whole)
    for count in (0, 1, 13, 65_536, 65_537, N - 1):
        assert np.array_equal(codes(count=count), whole[:count])


def test_codes_beyond_two_to_the_24_are_still_those_of_their_index() -> None:
    count = 2**24 + 100
    long = uniform_codes(draw_keys(3, "key"), 0, count, CPU)
    for index in (2**24 - 1, 2**24, count - 1):
        assert int(long[index]) == by_hand(3, "key", index)
    kept = float((long < RANGE // 4).double().mean())
    assert abs(kept - 0.25) < 5 * math.sqrt(0.25 * 0.75 / count)


@pytest.mark.parametrize(
    "other", [(1, "source\x1ftensor"), (0, "source\x1ftensor2"), (0, "sourc\x1fetensor")]
)
def test_other_seed_tensor_or_source_gives_unrelated_codes(other: tuple[int, str]) -> None:
    first, second = codes(), codes(*other)
    assert np.count_nonzero(first == second) < 10
    table = np.histogram2d(first, second, bins=16, range=[[0, RANGE]] * 2)[0].astype(np.int64)
    assert abs(excess(table, N / 256)) < 5


@pytest.mark.parametrize("seed", range(3))
def test_codes_are_uniform(seed: int) -> None:
    values = codes(seed)
    assert values.min() >= 0
    assert values.max() < RANGE
    assert abs(excess(np.bincount(values >> 14, minlength=1024), N / 1024)) < 5
    assert abs(excess(np.bincount(values & 1023, minlength=1024), N / 1024)) < 5


@pytest.mark.parametrize("density", [0.001, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_fraction_kept_is_the_density_within_binomial_bounds(density: float) -> None:
    limit = round(density * RANGE)
    for seed in range(8):
        kept = np.count_nonzero(codes(seed) < limit)
        assert abs(kept - density * N) < 5 * math.sqrt(density * (1 - density) * N)


@pytest.mark.parametrize("step", [1, 2, 3, 64, 128, 1_000, 4_096, 65_536])
def test_neighbours_at_any_distance_are_uncorrelated(step: int) -> None:
    values = codes(5)
    table = np.histogram2d(values[:-step], values[step:], bins=16, range=[[0, RANGE]] * 2)[0]
    assert abs(excess(table.astype(np.int64), (N - step) / 256)) < 5
    correlation = float(np.corrcoef(values[:-step], values[step:])[0, 1])
    assert abs(correlation) < 5 / math.sqrt(N - step)


def test_masks_of_many_sources_and_seeds_overlap_as_chance_has_it() -> None:
    density, count = 0.3, 50_000
    masks = [
        codes(seed, f"{source}\x1ftensor", count) < round(density * RANGE)
        for seed in range(4)
        for source in "abcd"
    ]
    spread = math.sqrt(count * density**2 * (1 - density**2))
    for first, second in combinations(masks, 2):
        assert abs(np.count_nonzero(first & second) - count * density**2) < 5 * spread


def test_runs_of_kept_entries_are_as_long_as_chance_has_it() -> None:
    kept = codes(9) < RANGE // 2
    windows = np.sum([kept[i : N - 7 + i].astype(np.int64) << i for i in range(8)], axis=0)[::8]
    assert abs(excess(np.bincount(windows, minlength=256), windows.size / 256)) < 5


def test_codes_of_a_part_are_those_of_the_whole() -> None:
    keys, whole = draw_keys(0, "source\x1ftensor"), codes()
    for start, count in ((0, 5), (1, 70_000), (131_071, 2), (N - 3, 3)):
        assert np.array_equal(uniform_codes(keys, start, count, CPU).numpy(), whole[start : start + count])


@pytest.mark.parametrize("count", [0, 1, 16_383, 16_384, 16_385, 40_000, 131_072, 300_001])
def test_sum_is_exact_to_float64_and_the_same_for_any_number_of_threads(count: int) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(count))
    before = torch.get_num_threads()
    try:
        sums = set()
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            sums.add(total(values))
    finally:
        torch.set_num_threads(before)
    assert len(sums) == 1
    assert sums.pop() == pytest.approx(math.fsum(values.tolist()), rel=1e-12, abs=1e-9)
