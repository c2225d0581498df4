"""Racing: a candidate that cannot come among the better half is not scored to the end. NumPy only.

Documents come in rungs. After each, the candidate is compared with a *pacer* (the last of the parents of the
generation before) on the documents that both have, paired. It stops once its score on all documents would lie
above the pacer's with at most the probability `error`: the remaining documents are taken as drawn from the
same finite set without replacement, and the error is shared out over the looks. (After Maron & Moore,
"Hoeffding Races", 1994; the interval here is the normal one of paired differences.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from evomerge.fitness.scoring import TaskRule, combine
from evomerge.records import Outcome, Value

FEWEST = 8
"""Documents of a task below which its differences say nothing about their spread."""


@dataclass(frozen=True, slots=True)
class Race:
    """What a candidate is raced against.

    Attributes:
        rungs: Ascending shares of each task's documents after which it is compared, each below 1.
        error: Probability of stopping a candidate that would have come out above the pacer.
        pacer: The pacer's values by task, in the order of the document set.
        score: The pacer's score on all of them.
    """

    rungs: tuple[float, ...]
    error: float
    pacer: Mapping[str, Sequence[Value]]
    score: float


@dataclass(frozen=True, slots=True)
class Standing:
    """How a candidate stands after some documents.

    Attributes:
        score: Estimate of its score on all documents: the pacer's and the paired difference so far.
        stderr: Standard error of that estimate.
        hopeless: Whether it stops here.
    """

    score: float
    stderr: float
    hopeless: bool


def rung_sizes(rungs: Sequence[float], count: int) -> list[int]:
    """Return how many of a task's documents are scored after each rung, the last of all."""
    return [max(1, min(count, round(rung * count))) for rung in rungs] + [count]


def standing(
    race: Race,
    rules: Mapping[str, TaskRule],
    ids: Mapping[str, Sequence[int]],
    values: Mapping[str, Sequence[Value]],
) -> Standing:
    """Return how a candidate stands.

    Args:
        race: The race.
        rules: Rules of all tasks, all of them means.
        ids: By task the places of the scored documents in the pacer's values.
        values: By task the candidate's values of these.
    """
    means: dict[str, float] = {}
    variance, enough = 0.0, True
    total = sum(rule.weight for rule in rules.values())
    for name, rule in rules.items():
        pacer = np.asarray(race.pacer[name], dtype=np.float64)
        differences = np.asarray(values[name], dtype=np.float64) - pacer[list(ids[name])]
        n, whole = len(differences), len(pacer)
        means[name] = float(differences.mean())
        if n < whole:
            enough &= n >= FEWEST
            spread = float(differences.var(ddof=1)) if n > 1 else 0.0
            variance += (rule.weight / total) ** 2 * spread * (1 / n - 1 / whole)
    gain, error = float(combine(rules, means)), math.sqrt(variance)
    # One-sided, and looked at once for each rung.
    quantile = NormalDist().inv_cdf(1 - race.error / max(1, len(race.rungs)))
    return Standing(race.score + gain, error, enough and error > 0 and gain + quantile * error < 0)


class Races:
    """The races of a run, one pacer for each generation.

    Which candidate paces depends on the outcomes of the generation before alone, so a resumed run sets the
    same races.

    Args:
        rungs: See `Race`.
        error: See `Race`.
    """

    def __init__(self, rungs: tuple[float, ...], error: float) -> None:
        self._rungs, self._error = rungs, error
        self._present: tuple[int, Race | None] = (0, None)

    def of(
        self,
        generation: int,
        before: Iterable[tuple[int, Outcome | None]],
        whole: Callable[[int], Outcome | None],
    ) -> Race | None:
        """Return the race of a generation; None if nobody of the one before was scored to the end.

        Args:
            generation: The generation.
            before: Numbers of the candidates of the one before, and their outcomes.
            whole: Returns a candidate's outcome with its values.
        """
        if self._present[0] != generation:
            self._present = (generation, self._race(list(before), whole))
        return self._present[1]

    def _race(
        self, before: Sequence[tuple[int, Outcome | None]], whole: Callable[[int], Outcome | None]
    ) -> Race | None:
        scored = [
            (-outcome.score, number)
            for number, outcome in before
            if outcome is not None and outcome.status == "ok" and outcome.score is not None
        ]
        if not scored:
            return None
        _, number = sorted(scored)[: max(1, len(before) // 2)][-1]
        pacer = whole(number)
        if pacer is None or pacer.score is None:
            return None
        return Race(self._rungs, self._error, pacer.values, pacer.score)
