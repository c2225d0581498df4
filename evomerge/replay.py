"""Bringing an optimizer to where a run left it."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from evomerge.optimizers import Optimizer
from evomerge.records import Candidate, Outcome, Proposal
from evomerge.store import RunView


def replay(
    optimizer: Optimizer, run: RunView, candidates: Mapping[int, Candidate]
) -> tuple[int, list[Outcome]]:
    """Restore the newest good snapshot, and repeat what came after it in the order in which it happened.

    Args:
        optimizer: As it was when the run began.
        run: The run.
        candidates: Its candidates by number.

    Returns:
        How many outcomes the optimizer has been told, and those that wait to be told, by candidate.

    Raises:
        StateError: The optimizer proposes something else than the run recorded.
    """
    snapshot = run.latest_snapshot()
    count = 0
    if snapshot is not None:
        optimizer.restore(dict(snapshot.state))
        count = snapshot.told
    log = run.log(snapshot)
    told = deque(log.told)

    def tell_up_to(wanted: int) -> None:
        nonlocal count
        while told and count < wanted:
            outcome = told.popleft()
            index = candidates[outcome.candidate].index
            if index is not None:
                optimizer.tell(index, outcome.score, outcome.values)
            count += 1

    for asked in log.asked:
        tell_up_to(asked.told_before)
        candidate = asked.candidate
        optimizer.adopt(Proposal(candidate.index or 0, candidate.generation, candidate.genome or ()))
    tell_up_to(count + len(told))
    return count, sorted(log.waiting, key=lambda outcome: outcome.candidate)
