"""A run that was killed, at whatever transition, ends as if it had not been."""

from __future__ import annotations

from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from evomerge.seeding import stream
from tests.faults.histories import replay, whole_history, without_order
from tests.faults.killing import Undisturbed, run_killed
from tests.faults.promises import Book
from tests.faults.runs import COVERING, GENERATIONAL, PAIRS
from tests.nursery import Nursery
from tests.postgres import fresh_schema


def few(*short: tuple[str, str]) -> list[ParameterSet]:
    """Return every pair as a parameter; all but the given ones only in the long form."""
    marks = {pair: () if pair in short else (pytest.mark.long,) for pair in PAIRS}
    return [pytest.param(*pair, id="-".join(pair), marks=mark) for pair, mark in marks.items()]


def moments(total: int, count: int, *purpose: str | int) -> list[str]:
    """Return transitions to die at, drawn alike every time; sessions get shorter towards the end."""
    draw = stream(0, "moments", *purpose)
    found, left = [], total
    for _ in range(count):
        found.append(int(draw.integers(1, max(2, left // 2))))
        left -= found[-1]
    return [f"any:{moment}" for moment in found]


@pytest.mark.promise("resume equality")
@pytest.mark.parametrize(("optimizer", "space"), few(*COVERING))
def test_killed_again_and_again_it_ends_the_same(
    optimizer: str,
    space: str,
    undisturbed: Undisturbed,
    world: Path,
    nursery: Nursery,
    tmp_path: Path,
    book: Book,
    long: bool,
) -> None:
    name, whole, total = undisturbed.made(optimizer, space)
    for attempt in range(3 if long else 1):
        store = str(tmp_path / f"{attempt}.db")
        cost = run_killed(nursery, world, name, store, moments(total, 2, name, attempt))
        book.report(
            "resume equality",
            lost=cost.lost,
            kills=cost.kills,
            repeated=cost.repeated,
            recover=cost.recover,
        )
        assert whole_history(store, name) == whole
        assert cost.kills == 2
        assert cost.lost == 0
        assert cost.repeated <= cost.kills


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.promise("resume equality")
@pytest.mark.parametrize(
    ("optimizer", "space"), [pytest.param(*pair, id="-".join(pair)) for pair in COVERING]
)
def test_killed_at_every_single_transition_it_ends_the_same(
    optimizer: str,
    space: str,
    undisturbed: Undisturbed,
    world: Path,
    nursery: Nursery,
    tmp_path: Path,
    book: Book,
) -> None:
    name, whole, total = undisturbed.made(optimizer, space)
    for moment in range(1, total + 1):
        store = str(tmp_path / f"{moment}.db")
        cost = run_killed(nursery, world, name, store, [f"any:{moment}"])
        book.report(
            "resume equality",
            lost=cost.lost,
            kills=cost.kills,
            repeated=cost.repeated,
            recover=cost.recover,
        )
        assert (cost.kills, cost.lost) == (1, 0)
        assert cost.repeated <= 1
        assert whole_history(store, name) == whole, f"killed at transition {moment}"
        for file in tmp_path.glob(f"{moment}.db*"):
            file.unlink()


@pytest.mark.promise("other workers")
@pytest.mark.parametrize(
    ("optimizer", "space"), few(("cma_es", "parameter"), ("cma_es-restarts", "joint"), ("niches", "segments"))
)
def test_resumed_with_another_number_of_workers(
    optimizer: str,
    space: str,
    undisturbed: Undisturbed,
    world: Path,
    nursery: Nursery,
    tmp_path: Path,
    book: Book,
) -> None:
    name, whole, total = undisturbed.made(optimizer, space)
    store = str(tmp_path / "store.db")
    workers = (3, 1, 2)
    cost = run_killed(nursery, world, name, store, moments(total, 2, name, "workers"), workers)
    book.report("other workers", lost=cost.lost, kills=cost.kills, repeated=cost.repeated)
    assert cost.kills == 2
    assert cost.lost == 0
    assert cost.repeated <= cost.kills * max(workers)
    found = whole_history(store, name)
    assert found["status"] == "finished"
    if optimizer in GENERATIONAL:
        assert without_order(found) == without_order(whole)
    else:
        replay(store, name, world)


@pytest.mark.postgres
@pytest.mark.promise("postgresql")
@pytest.mark.parametrize(("optimizer", "space"), few(("cma_es", "parameter"), ("tpe", "layer_edits")))
def test_on_postgresql_it_is_the_same_run(
    optimizer: str,
    space: str,
    undisturbed: Undisturbed,
    world: Path,
    nursery: Nursery,
    postgres: str,
    book: Book,
) -> None:
    name, whole, total = undisturbed.made(optimizer, space)
    store = fresh_schema(postgres)
    cost = run_killed(nursery, world, name, store, moments(total, 2, name, "postgres"))
    book.report("postgresql", lost=cost.lost, kills=cost.kills, repeated=cost.repeated)
    assert whole_history(store, name) == whole
    assert cost.kills == 2
    assert cost.lost == 0
    assert cost.repeated <= cost.kills
