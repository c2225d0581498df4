"""M2N2 behind the ask/tell contract."""

from __future__ import annotations

import json
import math
from typing import Any, ClassVar

import numpy as np
import pytest

from evomerge.errors import ConfigError, FitnessError
from evomerge.optimizers import create
from evomerge.optimizers.niches import Niches
from evomerge.optimizers.niches_sharing import attraction, plain_fitness, worth
from evomerge.records import Proposal
from evomerge.seeding import stream
from evomerge.spaces.cells import Cells, Chromosome
from evomerge.spaces.dimensions import Dimension
from tests.contracts.optimizer import MIXED, REALS, OptimizerContract, Score


class Contract(OptimizerContract):
    """Nine documents, eight of them solved or not by thresholds."""

    name = "niches"
    settings: ClassVar = {"size": 6}

    def values(self, score: Score) -> dict[str, list[float]] | None:
        if score is None:
            return None
        solved = [float(score > -0.2 * place) for place in range(8)]
        return {
            "a": solved[:5],
            "b": [*solved[5:], math.exp(min(score, 0.0)) if math.isfinite(score) else 0.0],
        }

    def test_the_order_of_tells_within_a_batch_changes_nothing(self) -> None:
        pytest.skip("results count in their order of arrival, which is recorded")


class TestNiches(Contract):
    """Real numbers."""


class TestMixed(Contract):
    """Integers and categories too."""

    dimensions = MIXED


class TestMapElites(Contract):
    """The grid of elites."""

    settings: ClassVar = {"archive": "map_elites", "warm_up": 8}


class TestGeneticAlgorithm(Contract):
    """No competition, no attraction."""

    settings: ClassVar = {"competition": "none", "attraction": False, "size": 6}


class Tables:
    """A space of segments over random vectors: 3 sources, 24 cells of 5 entries, 2 chromosomes."""

    def __init__(self) -> None:
        self.sources = stream(1, "sources").standard_normal((3, 120)) + 1.0
        parts = self.sources.reshape(3, 24, 5)
        grams = np.einsum("ace,bce->cab", parts, parts)
        chromosomes = (Chromosome(0, 10, np.arange(10)), Chromosome(10, 24, np.arange(10, 24)))
        self.cells = Cells(chromosomes, lambda: grams)

    @property
    def origins(self) -> list[tuple[float, ...]]:
        return [self.genome(np.tile(row, (24, 1))) for row in np.eye(3)]

    def genome(self, table: Any) -> tuple[float, ...]:
        starts = self.cells.starts(table)
        return tuple(np.concatenate([starts[:, None], table[starts]], axis=1).ravel().tolist())

    def table(self, genome: Any) -> Any:
        rows = np.array(genome).reshape(-1, 4)
        return np.repeat(rows[:, 1:], np.diff([*rows[:, 0].astype(int), 24]), axis=0)

    def weights(self, genome: Any) -> Any:
        return np.einsum("cs,sce->ce", self.table(genome), self.sources.reshape(3, 24, 5)).ravel()

    def values(self, genome: Any) -> dict[str, list[float]]:
        """20 documents: whether the weights lie on the right side of a plane each."""
        planes = stream(2, "planes").standard_normal((20, 120))
        solved = (planes @ self.weights(genome) > 0.0).astype(float).tolist()
        return {"a": solved[:8], "b": solved[8:]}


def made(**settings: Any) -> Niches:
    found = create("niches", REALS[:3], 5, {"size": 6, **settings}, coding=Tables())
    assert isinstance(found, Niches)
    return found


def record(optimizer: Niches, count: int, lag: int = 4) -> list[tuple[str, Any]]:
    """Run with several outstanding proposals that come back out of order; return what a store would hold."""
    events: list[tuple[str, Any]] = []
    outstanding: list[Proposal] = []
    chance, space = stream(3, "order"), Tables()
    while len(events) < count:
        if len(outstanding) < lag:
            proposal = optimizer.ask()
            assert proposal is not None
            outstanding.append(proposal)
            events.append(("ask", proposal))
        else:
            done = outstanding.pop(int(chance.integers(lag)))
            values = None if done.index % 7 == 5 else space.values(done.genome)
            score = None if values is None else float(np.mean(values["a"]))
            optimizer.tell(done.index, score, values)
            events.append(("tell", (done.index, score, values)))
            if (state := optimizer.state()) is not None:
                events.append(("state", json.dumps(state, allow_nan=False)))
    return events


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"slerp_angle": "per_segment"},
        {"archive": "map_elites"},
        {"split_point": False},
        {"attraction": False},
    ],
    ids=str,
)
def test_a_search_over_segments_killed_anywhere_goes_on_as_it_was(settings: dict[str, Any]) -> None:
    whole = made(**settings)
    events = record(whole, 120)
    snapshots = [place for place, (kind, _) in enumerate(events) if kind == "state"]
    assert len(snapshots) == 2
    for cut in range(0, len(events), 11):
        resumed = made(**settings)
        known = [place for place in snapshots if place < cut]
        if known:
            resumed.restore(json.loads(events[known[-1]][1]))
        for place, (kind, data) in list(enumerate(events))[known[-1] + 1 if known else 0 :]:
            if kind == "tell":
                resumed.tell(*data)
            elif kind == "state":
                assert json.dumps(resumed.state()) == data
            elif place < cut:
                resumed.adopt(data)
            else:
                assert resumed.ask() == data
        assert resumed.archive is not None
        assert whole.archive is not None
        assert resumed.archive.numbers == whole.archive.numbers
        assert (resumed.archive.scores == whole.archive.scores).all()


def test_snapshots_are_as_far_apart_as_proposals_are_under_way() -> None:
    for lag, places in ((4, [20, 40, 60, 80]), (30, [40, 80])):
        kinds = [kind for kind, _ in record(made(), 180 + lag, lag)]
        told = [kinds[:place].count("tell") for place, kind in enumerate(kinds) if kind == "state"]
        assert told == places


def test_scores_of_zero_and_one_take_the_quick_way_to_the_same_numbers() -> None:
    chance = stream(4, "scores")
    scores = chance.integers(0, 2, (9, 301)).astype(float)
    scores[5] = scores[2]
    weights = chance.random(301)
    for alpha in (0.0, 1.0, 1.5):
        shared = worth(scores, weights, alpha)
        assert (shared == worth(scores, weights, alpha, binary=True)).all()
        fitness = plain_fitness(scores, shared)
        assert fitness[5] == fitness[2]
        assert (plain_fitness(scores[1:], shared) == fitness[1:]).all()
        for parent in range(9):
            plain = attraction(scores, shared, parent)
            assert (plain == attraction(scores, shared, parent, binary=True)).all()
            assert plain[parent] == 0.0


def test_founders_come_first_and_then_their_merges() -> None:
    space, optimizer = Tables(), made(warm_up=8)
    extra = space.genome(np.tile([0.5, 0.5, 0.0], (24, 1)))
    optimizer = create("niches", REALS[:3], 5, {"warm_up": 8}, coding=space, founders=[extra])
    assert isinstance(optimizer, Niches)
    asked = [optimizer.ask() for _ in range(40)]
    assert [one.genome for one in asked[:4] if one] == [*space.origins, extra]
    assert all(set(optimizer.parents[i]) <= {0, 1, 2, 3} for i in range(40))
    assert {len(optimizer.parents[i]) for i in range(4, 40)} == {2}


def test_a_proposal_recorded_with_other_rounding_is_taken_as_it_was() -> None:
    events = [event for event in record(made(), 60) if event[0] != "state"]
    resumed = made()
    for kind, data in events:
        if kind == "tell":
            resumed.tell(*data)
            continue
        genome = list(data.genome)
        genome[1] += 1e-12
        resumed.adopt(Proposal(data.index, data.generation, tuple(genome)))
    assert "round differently" in "".join(resumed.drain_notes())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, "needs the score of every document, the fitness gives one number"),
        ({"score": [0.5]}, "needs the score of every document, the fitness gives one number"),
        ({"t": [0.5, 1.5]}, "scores from 0 to 1: task t has 1.5 for document 1 of candidate 1"),
        ({"t": [0.5, -0.1]}, "task t has -0.1"),
        ({"t": [(1.0, 2.0), (1.0, 2.0)]}, "scores from 0 to 1"),
        ({"t": [1.0, 0.0, 1.0]}, "the same documents for all: candidate 1 has values of 3 documents"),
        ({"u": [1.0, 0.0]}, "the same documents for all"),
    ],
)
def test_documents_that_cannot_be_shared_are_refused_in_one_line(values: Any, message: str) -> None:
    optimizer = made()
    for _ in range(3):
        optimizer.ask()
    optimizer.tell(0, 0.5, {"t": [1.0, 0.0]})
    with pytest.raises(FitnessError, match=message) as problem:
        optimizer.tell(1, 0.5, values)
    assert "\n" not in str(problem.value)
    optimizer.tell(1, 0.5, {"t": [1.0, 0.0]})


def test_an_archive_of_one_behaviour_goes_on_and_says_so() -> None:
    for archive in ("niches", "map_elites"):
        optimizer = made(archive=archive, size=4)
        for index in range(40):
            assert optimizer.ask() is not None
            optimizer.tell(index, 0.0, {"t": [0.0, 0.0]})
        if archive == "niches":
            notes = optimizer.drain_notes()
            assert len(notes) == 1
            assert "answer alike" in notes[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mutation": 0.1}, "optimizer.mutation: segments are only mixed"),
        ({"crossover": False}, "optimizer.crossover: without it and without mutation"),
        ({"size": 1}, "optimizer.size: must be 2 or more"),
        ({"archive": "map_elites", "alpha": 0.5}, "optimizer.alpha: has no effect with archive map_elites"),
        ({"competition": "none", "alpha": 0.5}, "optimizer.alpha: has no effect with competition none"),
        ({"alpha": -1.0}, "optimizer.alpha: must be 0 or more"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(**settings)


def test_numbers_have_no_angles() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.slerp_angle"):
        create("niches", REALS, 1, {"slerp_angle": "global"})


def test_categories_come_from_a_parent() -> None:
    dimensions = (Dimension("m", "categorical", 9), Dimension("x", "real"))
    optimizer = create("niches", dimensions, 3, {"size": 4, "mutation": 0.0})
    assert isinstance(optimizer, Niches)
    seen: dict[int, float] = {}
    for index in range(60):
        proposal = optimizer.ask()
        assert proposal is not None
        seen[index] = proposal.genome[0]
        parents = optimizer.parents[index]
        assert not parents or seen[index] in {seen[parent] for parent in parents}
        optimizer.tell(index, 0.5, {"t": [float(proposal.genome[1] > 0.5), float(seen[index] > 4)]})
