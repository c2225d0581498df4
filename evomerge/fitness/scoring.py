"""From per-document values to scores, standard errors and intervals. NumPy only.

A metric is known by how its document values are aggregated, so that a score can be recomputed on any
resample of the documents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.records import Value
from evomerge.seeding import stream

KINDS = ("mean", "perplexity", "weighted_perplexity", "bits_per_byte")
"""Aggregations by lm-eval's names: mean(v), exp(-mean(v)), exp(-sum(a)/sum(b)), -sum(a)/sum(b)/ln 2."""

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TaskRule:
    """How one task's document values become its share of the score.

    Attributes:
        kind: One of `KINDS`.
        weight: Share in the score.
        higher_is_better: If not, the metric counts negative.
        metric: The metric's name, for people.
        group: The task or group of the config that it belongs to.
    """

    kind: str
    weight: float
    higher_is_better: bool
    metric: str
    group: str

    def to_json(self) -> dict[str, Any]:
        """Return plain data; `TaskRule(**data)` takes it back."""
        return asdict(self)


def aggregate(rule: TaskRule, values: Sequence[Value], counts: Array | None = None) -> Array:
    """Return the task's metric.

    Args:
        rule: The task's rule.
        values: One value per document, n of them.
        counts: How often each document is drawn, (draws, n); None: each once.

    Returns:
        One metric per draw, (draws,); (1,) without counts.
    """
    table = np.asarray(values, dtype=np.float64)
    weights = np.ones((1, len(table))) if counts is None else counts
    sums = weights @ table
    if rule.kind in ("weighted_perplexity", "bits_per_byte"):
        mean = sums[:, 0] / sums[:, 1]
    else:
        mean = sums / weights.sum(axis=1)
    if rule.kind == "mean":
        return np.asarray(mean)
    if rule.kind == "bits_per_byte":
        return np.asarray(-mean / math.log(2))
    with np.errstate(over="ignore"):
        return np.asarray(np.exp(-mean))


def standard_error(rule: TaskRule, values: Sequence[Value]) -> float | None:
    """Return the standard error of a mean, as lm-eval computes it; None for other kinds."""
    if rule.kind != "mean" or len(values) < 2:
        return None
    return float(np.std(np.asarray(values, dtype=np.float64), ddof=1) / math.sqrt(len(values)))


def combine(rules: Mapping[str, TaskRule], metrics: Mapping[str, Array]) -> Array:
    """Return the score from the metrics of all tasks: their weighted mean, higher is better."""
    total = sum(rule.weight for rule in rules.values())
    parts = [
        rule.weight / total * (1.0 if rule.higher_is_better else -1.0) * metrics[name]
        for name, rule in rules.items()
    ]
    return np.asarray(sum(parts))


def combined_error(rules: Mapping[str, TaskRule], errors: Mapping[str, float | None]) -> float | None:
    """Return the standard error of the score from those of independent tasks; None if one is unknown."""
    total = sum(rule.weight for rule in rules.values())
    squares = 0.0
    for name, rule in rules.items():
        error = errors[name]
        if error is None:
            return None
        squares += (rule.weight / total * error) ** 2
    return math.sqrt(squares)


@dataclass(frozen=True, slots=True)
class Interval:
    """A bootstrap percentile interval around an estimate."""

    mean: float
    low: float
    high: float
    level: float = 0.95


def bootstrap(
    rules: Mapping[str, TaskRule],
    values: Mapping[str, Sequence[Value]],
    against: Mapping[str, Sequence[Value]] | None = None,
    *,
    level: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Return the score, or its paired difference to another candidate's, with its interval.

    Documents are drawn with replacement within each task; with `against`, the same documents for both.

    Args:
        rules: Rules of all tasks.
        values: Document values of each task.
        against: Those of the other candidate on the same documents in the same order.
        level: Coverage of the interval.
        draws: Number of resamples.
        seed: Of the resamples.
    """
    random = stream(seed, "bootstrap")
    sampled, other = {}, {}
    plain, plain_other = {}, {}
    for name, rule in rules.items():
        n = len(values[name])
        sampled[name], plain[name] = np.empty(draws), aggregate(rule, values[name])
        if against is not None:
            if len(against[name]) != n:
                raise ValueError(f"task {name}: {n} documents against {len(against[name])}")
            other[name], plain_other[name] = np.empty(draws), aggregate(rule, against[name])
        for start in range(0, draws, 500):
            part = slice(start, min(start + 500, draws))
            size = part.stop - part.start
            counts = random.multinomial(n, np.full(n, 1.0 / n), size=size).astype(np.float64)
            sampled[name][part] = aggregate(rule, values[name], counts)
            if against is not None:
                other[name][part] = aggregate(rule, against[name], counts)
    scores, estimate = combine(rules, sampled), float(combine(rules, plain)[0])
    if against is not None:
        scores = scores - combine(rules, other)
        estimate -= float(combine(rules, plain_other)[0])
    low, high = np.quantile(scores, [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate, float(low), float(high), level)
