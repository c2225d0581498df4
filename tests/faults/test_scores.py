"""Whatever an evaluation returns or raises, the optimizer is only told numbers, and the run ends."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from evomerge.store import Store
from tests.e2e.world import write_config
from tests.faults.killing import finished
from tests.faults.promises import Book
from tests.faults.runs import ODD
from tests.nursery import Nursery

INVALID = ("nan", "inf", "minus inf", "huge")
GOOD = ("numpy", "long")


def things() -> list[str]:
    """Return the names of the odd things, in order."""
    table = next(
        node.value
        for node in ast.parse(ODD).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
    )
    return [key.value for key in table.keys if isinstance(key, ast.Constant)]


@pytest.mark.promise("bad scores")
def test_odd_results_become_outcomes_without_score(
    world: Path, nursery: Nursery, tmp_path: Path, book: Book
) -> None:
    names = things()
    write_config(
        world,
        "odd.yaml",
        name="odd",
        optimizer={"name": "random"},
        fitness={"function": "odd.py:odd"},
        budget={"evaluations": len(names) + 2, "finalists": 3},
        baselines={"task_arithmetic": [0.3]},
    )
    store = tmp_path / "store.db"
    finished(nursery.run("run", "odd.yaml", "--store", store))
    with Store.open(store) as opened:
        view = opened.run("odd")
        searched = [c.number for c in view.candidates() if c.index is not None]
        outcomes = {name: view.outcome(n, "search") for name, n in zip(names, searched, strict=False)}
        finalists = {outcome.candidate for outcome in view.outcomes("select")}
    assert len(searched) == len(names) + 2
    for number, (name, outcome) in zip(searched, outcomes.items(), strict=False):
        assert outcome is not None
        expected = "invalid" if name in INVALID else "ok" if name in GOOD else "failed"
        assert (name, outcome.status) == (name, expected), outcome.reason
        if expected != "ok":
            assert outcome.score is None
            assert outcome.reason.strip()
            assert "\n" not in outcome.reason
            assert number not in finalists
    book.report("bad scores", cases=len(names))
