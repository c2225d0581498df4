"""Sharing, attraction, replacement and crossover, against the formulas and explicit weights."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from evomerge.optimizers.niches_archive import EliteGrid, NicheArchive, draw
from evomerge.optimizers.niches_crossover import Angle, Cut, cross, draw_cuts
from evomerge.optimizers.niches_evolution import Evolution
from evomerge.optimizers.niches_sharing import (
    attraction,
    coverage,
    entropy,
    plain_fitness,
    shared_fitness,
    worth,
)
from evomerge.seeding import stream
from evomerge.spaces.cells import Cells, Chromosome

matrices = arrays.arrays(
    np.float64, st.tuples(st.integers(1, 6), st.integers(1, 8)), elements=st.sampled_from([0.0, 0.25, 1.0])
)


@given(matrices, st.sampled_from([0.0, 0.5, 1.0, 2.0]))
def test_shared_fitness_is_the_formula(scores: Any, alpha: float) -> None:
    weights = np.arange(1.0, scores.shape[1] + 1)
    found = shared_fitness(scores, weights, alpha)
    for i in range(len(scores)):
        want = 0.0
        for j in range(scores.shape[1]):
            z = scores[:, j].sum()
            if z > 0:
                want += weights[j] * scores[i, j] * scores[:, j].max() / z**alpha
        assert found[i] == pytest.approx(want, rel=1e-12)


@given(matrices)
def test_attraction_is_the_formula_and_nobody_attracts_himself(scores: Any) -> None:
    shared = worth(scores, np.ones(scores.shape[1]), 1.0)
    for a in range(len(scores)):
        found = attraction(scores, shared, a)
        assert found[a] == 0.0
        for b in range(len(scores)):
            want = sum(
                scores[:, j].max() / scores[:, j].sum() * max(scores[b, j] - scores[a, j], 0.0)
                for j in range(scores.shape[1])
                if scores[:, j].sum() > 0
            )
            assert found[b] == pytest.approx(want, rel=1e-12)


def test_a_document_is_shared_in_full_among_its_solvers() -> None:
    scores = np.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    assert shared_fitness(scores, np.ones(3), 1.0).tolist() == pytest.approx([4 / 3, 1 / 3, 1 / 3])
    assert shared_fitness(scores, np.ones(3), 0.0).tolist() == plain_fitness(scores, np.ones(3)).tolist()
    assert coverage(scores) == pytest.approx(2 / 3)
    share = 1 / 3
    bits = -(share * math.log2(share) + (1 - share) * math.log2(1 - share))
    assert entropy(scores) == pytest.approx(bits / 3)


def test_equal_rows_are_equally_fit_to_the_last_bit() -> None:
    scores = stream(0, "rows").random((1, 1437)).repeat(21, axis=0)
    assert len(set(shared_fitness(scores, np.full(1437, 1 / 1437), 1.0).tolist())) == 1


def test_the_least_fit_leaves_and_of_equals_the_oldest() -> None:
    archive = NicheArchive(3, np.ones(4))
    rows = {0: [1, 1, 0, 0], 1: [1, 0, 0, 0], 2: [1, 0, 0, 0], 3: [0, 0, 0, 1]}
    left = [archive.add(number, np.array(row, dtype=float)) for number, row in rows.items()]
    assert left == [None, None, None, 1]
    assert archive.numbers == [0, 2, 3]
    assert archive.scores.tolist() == [rows[n] for n in (0, 2, 3)]
    assert archive.add(4, np.zeros(4)) == 4


def test_without_competition_the_best_by_plain_score_stay() -> None:
    archive = NicheArchive(2, np.ones(4), competition="none")
    for number, solved in enumerate((3, 1, 2)):
        archive.add(number, np.array([1.0] * solved + [0.0] * (4 - solved)))
    assert archive.numbers == [0, 2]


def test_the_second_parent_brings_what_the_first_lacks() -> None:
    archive = NicheArchive(3, np.ones(3))
    for number, row in enumerate(([1, 1, 0], [0, 0, 1], [1, 0, 0])):
        archive.add(number, np.array(row, dtype=float))
    pairs = {archive.parents(stream(1, "parents", i)) for i in range(300)}
    assert {pair for pair in pairs if pair[0] == 0} == {(0, 1)}, "2 has nothing that 0 lacks"
    assert {(1, 0), (1, 2), (2, 0), (2, 1)} <= pairs
    assert all(a != b for a, b in pairs)


def test_draws_follow_the_chances_and_survive_zeros() -> None:
    drawn = [draw(np.array([0.0, 1.0, 3.0, 0.0]), stream(2, i)) for i in range(2000)]
    assert set(drawn) == {1, 2}
    assert np.mean([place == 2 for place in drawn]) == pytest.approx(0.75, abs=0.03)
    even = [draw(np.zeros(3), stream(3, i), other_than=1) for i in range(200)]
    assert set(even) == {0, 2}
    assert draw(np.zeros(1), stream(4), other_than=0) == 0


def test_a_grid_keeps_the_best_of_each_cell_and_has_room_for_a_perfect_score() -> None:
    grid = EliteGrid(2, [np.array([0, 1, 2]), np.array([3, 4, 5])], np.ones(6))
    assert grid.add(0, np.array([1.0, 1, 1, 1, 1, 1])) is None
    assert grid.add(1, np.array([0.0, 0, 0, 1, 1, 0])) is None
    assert grid.add(2, np.array([1.0, 0, 0, 1, 1, 0])) == 1, "better in the same cell"
    assert grid.add(3, np.array([0.0, 0, 0, 1, 1, 0])) == 3
    assert grid.numbers == [0, 2]


# Crossing, against explicit weights in float64.


def slerp(first: Any, second: Any, t: float, angle: float) -> Any:
    if math.sin(angle) <= 1e-6:
        return (1 - t) * first + t * second
    return (math.sin((1 - t) * angle) * first + math.sin(t * angle) * second) / math.sin(angle)


def between(first: Any, second: Any) -> float:
    cosine = first @ second / (np.linalg.norm(first) * np.linalg.norm(second))
    return math.acos(min(1.0, max(-1.0, cosine)))


@pytest.mark.parametrize("angle", ["global", "per_segment", "none"])
@pytest.mark.parametrize("related", [True, False], ids=["fine-tunes of one base", "unrelated"])
def test_generations_of_tables_are_those_of_explicit_weights(angle: Angle, related: bool) -> None:
    chance = stream(7, "weights")
    sizes = chance.integers(1, 40, size=50)
    edges = np.cumsum([0, *sizes])
    total = int(edges[-1])
    base = chance.standard_normal(total) if related else 0.0
    sources = base + (0.02 if related else 1.0) * chance.standard_normal((4, total))
    grams = np.array([sources[:, a:b] @ sources[:, a:b].T for a, b in pairwise(edges)])
    chromosomes = (Chromosome(0, 20, np.arange(20)), Chromosome(20, 50, np.arange(20, 50)))
    cells = Cells(chromosomes, lambda: grams)
    tables = [np.tile(row, (50, 1)) for row in np.eye(4)]
    weights = list(sources)
    for step in range(60):
        a, b = chance.choice(len(tables), 2, replace=False)
        cuts = draw_cuts(cells, stream(8, step), split_point=True)
        tables.append(cross(tables[a], tables[b], cells, cuts, angle))
        child = np.empty(total)
        for chromosome, cut in zip(chromosomes, cuts, strict=True):
            ends = edges[[chromosome.start, cut.split, chromosome.stop]]
            for part, t in ((slice(ends[0], ends[1]), cut.share), (slice(ends[1], ends[2]), 1 - cut.share)):
                if part.start == part.stop:
                    continue
                one, other = weights[a][part], weights[b][part]
                whole = between(weights[a], weights[b]) if angle == "global" else between(one, other)
                child[part] = slerp(one, other, t, 0.0 if angle == "none" else whole)
        weights.append(child)
    for table, explicit in zip(tables, weights, strict=True):
        found = np.einsum("ec,ce->e", np.repeat(table, sizes, axis=0), sources)
        assert np.linalg.norm(found - explicit) <= 1e-9 * np.linalg.norm(explicit)


def test_merged_segments_are_within_the_bound_that_is_given() -> None:
    chance = stream(9, "merge")
    parts = chance.standard_normal((3, 200, 7)) + 1.0
    cells = Cells(
        (Chromosome(0, 90, np.arange(90)), Chromosome(90, 200, np.arange(90, 200))),
        lambda: np.einsum("ace,bce->cab", parts, parts),
    )
    steps = np.cumsum(chance.random((200, 3)) * (chance.random((200, 1)) < 0.6), axis=0)
    table = steps / steps.sum(axis=1, keepdims=True).clip(1e-9)
    explicit = np.einsum("cs,sce->ce", table, parts)
    for most, error in ((40, 1.0), (10, 0.05), (2, 1.0), (1, 0.0)):
        merged, bound = cells.simplified(table, most, error)
        distance = np.linalg.norm(np.einsum("cs,sce->ce", merged, parts) - explicit) / cells.widest
        assert distance <= bound + 1e-12
        assert bound <= error + 1e-12
        assert 90 in cells.starts(merged), "chromosomes stay apart"
        if error == 1.0:
            assert len(cells.starts(merged)) <= max(most, 2)
    assert cells.simplified(table, 200, 1.0)[0] is table


def test_split_points_lie_where_they_may() -> None:
    cells = Cells((Chromosome(0, 9, np.array([0, 4, 7])),))
    cuts = [draw_cuts(cells, stream(1, i), split_point=True)[0].split for i in range(100)]
    assert set(cuts) == {0, 4, 7}
    assert {draw_cuts(cells, stream(1, i), split_point=False)[0].split for i in range(9)} == {0}


def test_a_zero_parent_is_mixed_along_a_line() -> None:
    cells = Cells.vector(4)
    child = cross(np.zeros(4), np.ones(4), cells, (Cut(0.25, 2),), "global")
    assert child.tolist() == [0.25, 0.25, 0.75, 0.75]


def test_evolution_keeps_the_weights_of_those_who_live_and_mutates_only_if_told() -> None:
    archive = NicheArchive(4, np.ones(6))
    evolution = Evolution(Cells.vector(6), archive)
    for number in range(2):
        evolution.add(number, np.full(6, float(number), dtype=np.float32), stream(number).random(6) > 0.5)
    for number in range(2, 30):
        child, parents = evolution.breed(stream(3, number))
        assert ((child >= 0) & (child <= 1)).all()
        assert len(parents) == 2
        evolution.add(number, child, stream(number).random(6) > 0.5)
    assert sorted(evolution.tables) == sorted(archive.numbers)
    mutating = Evolution(Cells.vector(6), NicheArchive(4, np.ones(6)), crossover=False, mutation=0.1)
    mutating.add(0, np.zeros(6, dtype=np.float32), np.ones(6))
    child, parents = mutating.breed(stream(5))
    assert parents == (0,)
    assert child.dtype == np.float32
    assert 0.0 < np.abs(child).max() < 1.0
