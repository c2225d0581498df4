"""What every optimizer promises, as a class to inherit."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from evomerge.optimizers import Optimizer, StateError, base, create
from evomerge.records import Genome, Proposal
from evomerge.seeding import stream
from evomerge.spaces.dimensions import Dimension, check_genome

Score = float | None
Event = tuple[str, Any]

REALS = tuple(Dimension(f"r{place}", "real") for place in range(5))
ORDERED = (*REALS[:3], Dimension("layers", "integer", 9), Dimension("few", "integer", 3))
MIXED = (
    *ORDERED,
    Dimension("fixed", "integer", 1),
    Dimension("switch", "integer", 2),
    Dimension("method", "categorical", 4),
    Dimension("only", "categorical", 1),
)


def quality(dimensions: Iterable[Dimension], genome: Genome) -> float:
    """A bowl with its top at 0.7 of every range, on a grid of 1/1024 so that maps of it stay exact."""
    parts = []
    for dimension, value in zip(dimensions, genome, strict=True):
        if dimension.kind == "categorical":
            parts.append(float(value != dimension.size // 2))
        else:
            span = 1.0 if dimension.kind == "real" else max(dimension.size - 1, 1)
            parts.append((value / span - 0.7) ** 2)
    return -math.floor(1024 * sum(parts)) / 1024


class OptimizerContract:
    """Inherit, and set `name`, `settings` and `dimensions`."""

    name: str
    settings: ClassVar[dict[str, Any]]
    dimensions: tuple[Dimension, ...] = REALS
    budget: int = 60
    lag: int = 3
    big: int = 2000
    """Dimensions of the large space; 0 leaves it out."""

    # -- helpers ------------------------------------------------------------------------------------------

    def make(
        self, seed: int = 7, dimensions: tuple[Dimension, ...] | None = None, start: Genome | None = None
    ) -> Optimizer:
        return create(self.name, dimensions or self.dimensions, seed, self.settings, start)

    def score(self, proposal: Proposal) -> Score:
        """Fails on about a sixth of the candidates."""
        if stream(3, "fails", proposal.index).random() < 1 / 6:
            return None
        return quality(self.dimensions, proposal.genome)

    def values(self, score: Score) -> dict[str, list[float]] | None:
        """The scores of the documents that make up a score, for optimizers that look at them."""
        del score
        return None

    def tell(self, optimizer: Optimizer, index: int, score: Score) -> None:
        optimizer.tell(index, score, self.values(score))

    def drive(
        self,
        optimizer: Optimizer,
        score: Callable[[Proposal], Score],
        budget: int | None = None,
        lag: int = 0,
    ) -> list[Proposal]:
        """Ask and tell in order, with `lag` proposals outstanding; return what was asked."""
        asked: list[Proposal] = []
        told = 0
        while len(asked) < (budget or self.budget):
            proposal = optimizer.ask() if len(asked) - told <= lag else None
            if proposal is not None:
                asked.append(proposal)
            elif told < len(asked):
                self.tell(optimizer, asked[told].index, score(asked[told]))
                told += 1
            else:
                assert optimizer.finished, "no proposal, nothing outstanding, not finished"
                break
        return asked

    def record(self, optimizer: Optimizer, steps: int) -> list[Event]:
        """Run with up to `lag` outstanding proposals, told out of order; return what a store would hold."""
        events: list[Event] = []
        outstanding: list[Proposal] = []
        chance = stream(11, "record")
        for _ in range(steps):
            proposal = optimizer.ask() if len(outstanding) <= self.lag else None
            if proposal is not None:
                outstanding.append(proposal)
                events.append(("ask", proposal))
            elif outstanding:
                done = outstanding.pop(int(chance.integers(len(outstanding))))
                score = self.score(done)
                self.tell(optimizer, done.index, score)
                events.append(("tell", (done.index, score)))
                if (state := optimizer.state()) is not None:
                    events.append(("state", json.dumps(state, allow_nan=False)))
            else:
                break
        return events

    def resume(self, events: list[Event]) -> Optimizer:
        """Rebuild an optimizer from the first part of a record, as the driver does."""
        optimizer = self.make()
        states = [place for place, (kind, _) in enumerate(events) if kind == "state"]
        if states:
            optimizer.restore(json.loads(events[states[-1]][1]))
        first = optimizer.asked
        if optimizer.ordered_replay:
            for kind, data in events[states[-1] + 1 if states else 0 :]:
                if kind == "ask":
                    optimizer.adopt(data)
                elif kind == "tell":
                    self.tell(optimizer, *data)
            return optimizer
        for kind, data in events:
            if kind == "ask" and data.index >= first:
                optimizer.adopt(data)
        for kind, data in reversed(events):
            if kind == "tell" and data[0] >= first:
                self.tell(optimizer, *data)
        return optimizer

    # -- asking -------------------------------------------------------------------------------------------

    def test_equal_arguments_and_tells_give_equal_proposals(self) -> None:
        first = self.drive(self.make(), self.score, lag=self.lag)
        assert first == self.drive(self.make(), self.score, lag=self.lag)
        assert first != self.drive(self.make(seed=8), self.score, lag=self.lag)

    def test_genomes_are_plain_floats_within_the_coding(self) -> None:
        optimizer = self.make()
        for place, proposal in enumerate(self.drive(optimizer, self.score)):
            assert (type(proposal.index), proposal.index) == (int, place)
            assert type(proposal.generation) is int
            assert type(proposal.genome) is tuple
            assert {type(value) for value in proposal.genome} == {float}
            check_genome(self.dimensions, proposal.genome)
        assert optimizer.asked == len(self.drive(self.make(), self.score))

    def test_generations_end_with_none_and_steady_ones_never_wait(self) -> None:
        optimizer = self.make()
        asked = [optimizer.ask() for _ in range(500 if optimizer.generational else 20)]
        if not optimizer.generational:
            assert None not in asked
            return
        whole = [proposal for proposal in asked if proposal is not None]
        assert {proposal.generation for proposal in whole} == {0}
        assert asked[: len(whole)] == whole
        for proposal in whole[1:]:
            self.tell(optimizer, proposal.index, self.score(proposal))
            assert optimizer.ask() is None
        self.tell(optimizer, 0, self.score(whole[0]))
        following = optimizer.ask()
        assert following is not None
        assert (following.index, following.generation) == (len(whole), 1)

    def test_a_start_begins_the_search(self) -> None:
        start = tuple(0.9 if one.kind == "real" else float(one.size - 1) for one in self.dimensions)
        optimizer = self.make(start=start)
        asked = [optimizer.ask() for _ in range(4)]
        if optimizer.generational:
            assert np.mean([abs(one.genome[0] - start[0]) for one in asked if one]) < 0.3
        else:
            assert asked[0] is not None
            assert asked[0].genome == start
        with pytest.raises(ValueError, match="genome of"):
            self.make(start=(*start, 0.0))
        with pytest.raises(ValueError, match="not a value"):
            self.make(start=(1.5, *start[1:]))

    # -- telling ------------------------------------------------------------------------------------------

    def test_bad_tells_are_refused_and_change_nothing(self) -> None:
        optimizer, twin = self.make(), self.make()
        first = optimizer.ask()
        assert first == twin.ask()
        assert first is not None
        for bad in (math.nan, math.inf, -math.inf):
            with pytest.raises(ValueError, match="not finite"):
                self.tell(optimizer, 0, bad)
        for unknown in (-1, 1, 1000):
            with pytest.raises(ValueError, match="never asked"):
                self.tell(optimizer, unknown, 1.0)
        for one in (optimizer, twin):
            self.tell(one, 0, np.float64(0.5))
        with pytest.raises(ValueError, match="told before"):
            self.tell(optimizer, 0, 1.0)
        following = [one.ask() for one in (optimizer, twin)]
        assert following[0] == following[1]

    @given(data=st.data())
    @hypothesis_settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
    def test_the_order_of_tells_within_a_batch_changes_nothing(self, data: st.DataObject) -> None:
        self.check_batches(
            lambda size: data.draw(st.permutations(range(size))), lambda: data.draw(st.booleans()), batches=4
        )

    def check_batches(
        self, permutation: Callable[[int], list[int]], coin: Callable[[], bool], batches: int
    ) -> None:
        """Tell batches in order and permuted; generational optimizers may also be asked in between."""
        ordered, shuffled = self.make(), self.make()
        for _ in range(batches):
            batch = [proposal for proposal in (ordered.ask() for _ in range(6)) if proposal is not None]
            eager = coin() and shuffled.generational
            asked = 0
            for place in permutation(len(batch)):
                while asked < (place + 1 if eager else len(batch)):
                    assert shuffled.ask() == batch[asked]
                    asked += 1
                self.tell(shuffled, batch[place].index, self.score(batch[place]))
            for proposal in batch:
                self.tell(ordered, proposal.index, self.score(proposal))
        assert ordered.ask() == shuffled.ask()

    def test_only_the_order_of_scores_matters_if_declared(self) -> None:
        if not self.make().rank_based:
            pytest.skip("declared to use the values")
        plain = self.drive(self.make(), self.score)
        maps: list[Callable[[float], float]] = [lambda x: 4096 * x - 7, math.exp, lambda x: (x - 1) ** 3]
        for mapped in maps:

            def score(proposal: Proposal, mapped: Callable[[float], float] = mapped) -> Score:
                value = self.score(proposal)
                return None if value is None else mapped(value)

            assert self.drive(self.make(), score) == plain

    def test_failures_rank_below_every_score(self) -> None:
        if not self.make().generational:
            pytest.skip("steady-state samplers leave failures out")

        def low(proposal: Proposal) -> Score:
            score = self.score(proposal)
            return -1e9 if score is None else score

        assert self.drive(self.make(), low) == self.drive(self.make(), self.score)

    # -- resuming -----------------------------------------------------------------------------------------

    def test_killed_at_any_point_and_resumed_it_proposes_the_same(self) -> None:
        optimizer = self.make()
        events = self.record(optimizer, steps=self.budget)
        for cut in range(len(events) + 1):
            resumed = self.resume(events[:cut])
            for kind, data in events[cut:]:
                if kind == "ask":
                    assert resumed.ask() == data, f"after {cut} events"
                elif kind == "tell":
                    self.tell(resumed, *data)
                else:
                    assert json.dumps(resumed.state(), allow_nan=False) == data
            assert resumed.finished == optimizer.finished
            assert resumed.recommendation() == optimizer.recommendation()
            assert resumed.asked == optimizer.asked

    def test_without_a_snapshot_it_is_rebuilt_generation_by_generation(self) -> None:
        original, resumed = self.make(), self.make()
        events = [event for event in self.record(original, steps=self.budget) if event[0] != "state"]
        if resumed.ordered_replay:
            pytest.skip("needs the original order")
        proposals = [data for kind, data in events if kind == "ask"]
        generation = {proposal.index: proposal.generation for proposal in proposals}
        scores = dict(data for kind, data in events if kind == "tell")
        for proposal in proposals:
            for index in [one for one in reversed(scores) if generation[one] < proposal.generation]:
                self.tell(resumed, index, scores.pop(index))
            resumed.adopt(proposal)
        for index in reversed(scores):
            self.tell(resumed, index, scores[index])
        assert resumed.ask() == original.ask()

    def test_a_foreign_proposal_is_not_adopted(self) -> None:
        optimizer = self.make()
        first = self.make().ask()
        assert first is not None
        with pytest.raises(StateError):
            optimizer.adopt(Proposal(1, first.generation, first.genome))
        with pytest.raises(StateError):
            self.make().adopt(Proposal(0, first.generation, first.genome[:-1]))
        with pytest.raises(StateError):
            self.make().adopt(Proposal(0, first.generation, (2.0, *first.genome[1:])))

    def test_bad_snapshots_are_refused(self) -> None:
        optimizer = self.make()
        state = optimizer.state()
        bad: list[Any] = [{}, {"kind": "else"}]
        if state is not None:
            bad += [{key: value for key, value in state.items() if key != left} for left in state]
            bad += [{**state, key: None} for key in state if state[key] is not None]
            other = self.make(seed=9).state()
            bad.append(other)
        for one in bad:
            with pytest.raises(StateError):
                optimizer.restore(one)

    # -- hard cases ---------------------------------------------------------------------------------------

    @pytest.mark.parametrize("case", ["constant", "failing", "failing often", "plateaus", "noise"])
    def test_hard_objectives_end_or_go_on_without_a_sound(self, case: str) -> None:
        chance = stream(5, case)

        def score(proposal: Proposal) -> Score:
            value = quality(self.dimensions, proposal.genome)
            return {
                "constant": 0.25,
                "failing": None,
                "failing often": None if chance.random() < 0.3 else value,
                "plateaus": round(value),
                "noise": chance.standard_normal(),
            }[case]

        optimizer = self.make()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            asked = self.drive(
                optimizer, score, budget=60 if case in ("constant", "failing") else self.budget
            )
        for genome in [*(proposal.genome for proposal in asked), *optimizer.recommendation()]:
            check_genome(self.dimensions, genome)
            assert {type(value) for value in genome} == {float}
        if case == "failing":
            assert "failed" in optimizer.finished
            assert optimizer.ask() is None
        if case == "constant" and optimizer.generational:
            assert "equal" in "".join(optimizer.drain_notes())
            assert optimizer.drain_notes() == []

    def test_where_there_is_nothing_to_climb_it_ends_or_says_so(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(base, "FLAT", 24)
        optimizer = self.make()
        self.drive(optimizer, lambda _: 0.25, budget=2000 if optimizer.generational else 30)
        said = [optimizer.finished, *optimizer.drain_notes()]
        assert any("nothing to climb" in text or "alike" in text for text in said), said

    def test_a_plateau_restarts_it_or_is_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The first score is the best for ever; the others differ from each other, and none is better."""
        monkeypatch.setattr(base, "STALE", 24)
        optimizer = self.make()
        budget = 3000 if optimizer.generational else 40
        notes: list[str] = []

        def score(proposal: Proposal) -> Score:
            notes.extend(optimizer.drain_notes())
            return 1.0 if proposal.index == 0 else -stream(5, "plateau", proposal.index).random()

        self.drive(optimizer, score, budget)
        notes += optimizer.drain_notes()
        assert any("no better candidate" in note or "restart" in note for note in notes), notes

    def test_one_dimension(self) -> None:
        kind = self.dimensions[-1].kind
        dimension = Dimension("x", kind, 0 if kind == "real" else 5)
        self.check_space((dimension,))

    def test_many_dimensions(self) -> None:
        if not self.big:
            pytest.skip("too slow")
        self.check_space((self.dimensions * self.big)[: self.big], budget=24)

    def check_space(self, dimensions: tuple[Dimension, ...], budget: int | None = None) -> None:
        optimizer = self.make(dimensions=dimensions)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            asked = self.drive(optimizer, lambda one: quality(dimensions, one.genome), budget)
        for genome in [*(proposal.genome for proposal in asked), *optimizer.recommendation()]:
            check_genome(dimensions, genome)
