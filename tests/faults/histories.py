"""What of a run must be equal however often it was killed, and what must not have been lost or done twice."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from evomerge.config import parse_config
from evomerge.plan import Plan
from evomerge.records import Proposal
from evomerge.store import Store
from tests.e2e.world import history

ONCE = ("optimizer", "optimizer_finished", "test_opened")
"""Kinds of events that a kill must neither lose nor double."""


def whole_history(store: str | Path, name: str) -> dict[str, Any]:
    """Return everything that a killed and resumed run must share with an undisturbed one, bit for bit."""
    with Store.open(store, create=False) as opened:
        view = opened.run(name)
        log = view.log()
        last = view.latest_snapshot()
        return {
            **history(store, name),
            "told": [outcome.candidate for outcome in log.told],
            "told_before": [asked.told_before for asked in log.asked],
            "state": None if last is None else (last.asked, last.told, dict(last.state)),
            "documents": {key: view.document_set(key) for key in ("search", "select", "test")},
            "events": [(event.kind, dict(event.data)) for event in view.events() if event.kind in ONCE],
        }


def without_order(found: dict[str, Any]) -> dict[str, Any]:
    """Return a history without the order in which workers answered, which their number decides."""
    return {key: value for key, value in found.items() if key not in ("told", "told_before")}


def recorded(store: str | Path, name: str) -> dict[tuple[int, str], dict[str, Any]]:
    """Return the outcomes of a run by candidate and documents; none while there is no such run."""
    if not Path(store).exists() and "://" not in str(store):
        return {}
    with Store.open(store) as opened:
        if name not in [run.name for run in opened.runs()]:
            return {}
        return {(o.candidate, o.documents): o.to_json() for o in opened.run(name).outcomes()}


def lost(before: dict[tuple[int, str], dict[str, Any]], store: str | Path, name: str) -> int:
    """Return how many recorded outcomes are gone or another now."""
    now = recorded(store, name)
    return sum(now.get(key) != outcome for key, outcome in before.items())


def repeated(log: Path) -> int:
    """Return how many evaluations were begun again, by the log that the world's fitness writes."""
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    return sum(count - 1 for count in Counter(lines).values())


def replay(store: str | Path, name: str, folder: Path) -> None:
    """Ask a new optimizer for the whole run again; it raises where the record is not what it would do."""
    with Store.open(store, create=False) as opened:
        view = opened.run(name)
        log = view.log()
        plan = Plan(parse_config(view.config, name), folder)
        start = plan.optimizer(None)
    index = {asked.candidate.number: asked.candidate.index for asked in log.asked}
    told = list(log.told)
    for asked in log.asked:
        while told and len(log.told) - len(told) < asked.told_before:
            outcome = told.pop(0)
            start.tell(index[outcome.candidate] or 0, outcome.score, outcome.values)
        candidate = asked.candidate
        start.adopt(Proposal(candidate.index or 0, candidate.generation, candidate.genome or ()))
    for outcome in told:
        start.tell(index[outcome.candidate] or 0, outcome.score, outcome.values)
