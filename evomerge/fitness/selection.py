"""Honest selection: finalists by search, the winner by select, the claim by test.

Search scores choose who is looked at again and are never reported as a result: the best of many noisy
scores is too high. The winner is chosen on documents that the search never saw, and what is claimed for it
is measured on documents that nothing was chosen by.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from evomerge.fitness.scoring import Interval
from evomerge.records import Candidate, Outcome

LEVEL = 0.95

Scored = Mapping[tuple[int, str], Outcome]
"""Outcomes by (candidate number, document set key)."""


def is_baseline(candidate: Candidate) -> bool:
    """Whether it is a source or a simple merge rather than something that was searched."""
    return candidate.origin.startswith(("source:", "baseline:"))


def score(outcomes: Scored, number: int, documents: str) -> float | None:
    """Return a candidate's score on a document set; None if it has none."""
    outcome = outcomes.get((number, documents))
    return outcome.score if outcome else None


def search_score(outcomes: Iterable[Outcome]) -> dict[int, float]:
    """Return each candidate's score on search documents, on all of them where it has both.

    One that was stopped early has none: its score is an estimate.
    """
    found: dict[int, float] = {}
    for outcome in outcomes:
        split = outcome.documents.partition("@")[0]
        whole = outcome.documents == "search"
        if (
            split == "search"
            and outcome.status == "ok"
            and outcome.score is not None
            and (whole or outcome.candidate not in found)
        ):
            found[outcome.candidate] = outcome.score
    return found


def finalists(
    candidates: Sequence[Candidate], search: Mapping[int, float], count: int, means: Sequence[int] = ()
) -> list[int]:
    """Return who is scored on the select documents besides the baselines.

    Args:
        candidates: All of the run.
        search: Search score by number.
        count: How many of the best by search score; recipes that occur twice count once.
        means: Numbers of the optimizer's own recommendations; always in.
    """
    chosen = list(means)
    digests = {c.digest for c in candidates if c.number in means}
    ranked = [c for c in candidates if c.number in search and not is_baseline(c) and c.number not in means]
    for candidate in sorted(ranked, key=lambda c: (-search[c.number], c.number)):
        if len(chosen) - len(means) == count:
            break
        if candidate.digest not in digests:
            digests.add(candidate.digest)
            chosen.append(candidate.number)
    return chosen


def kept_baselines(candidates: Sequence[Candidate], search: Mapping[int, float]) -> list[Candidate]:
    """Return the baselines that count.

    They are every source and every simple merge; of one that was tried at several scales, the scale that is
    best on the search documents.
    """
    kept: dict[str, Candidate] = {}
    for candidate in candidates:
        if not is_baseline(candidate):
            continue
        name = candidate.origin.partition("@")[0]
        best = kept.get(name)
        worst = float("-inf")
        if best is None or search.get(candidate.number, worst) > search.get(best.number, worst):
            kept[name] = candidate
    return list(kept.values())


def baseline_name(candidate: Candidate) -> str:
    """Return `math` for `source:math`, `task_arithmetic` for `baseline:task_arithmetic@0.4`."""
    return candidate.origin.partition(":")[2].partition("@")[0]


@dataclass(frozen=True, slots=True)
class Gain:
    """How much better the winner is than one baseline, on the test documents, paired.

    Attributes:
        over: The baseline's name.
        interval: Of the difference of scores.
    """

    over: str
    interval: Interval

    @property
    def shown(self) -> bool:
        """Whether the interval lies above zero."""
        return self.interval.low is not None and self.interval.low > 0


def winner(chosen: Sequence[int], outcomes: Scored) -> int | None:
    """Return the finalist with the best select score, the first of equals; None if none has one."""
    scored = [(number, score(outcomes, number, "select")) for number in chosen]
    best = max((s for _, s in scored if s is not None), default=None)
    return next((number for number, s in scored if s == best), None) if best is not None else None


def by_select(baselines: Sequence[Candidate], outcomes: Scored) -> list[Candidate]:
    """Return the baselines, the best on the select documents first."""

    def on_select(candidate: Candidate) -> float:
        found = score(outcomes, candidate.number, "select")
        return float("-inf") if found is None else found

    return sorted(baselines, key=on_select, reverse=True)
