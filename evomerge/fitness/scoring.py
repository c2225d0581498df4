"""From per-document values to scores, standard errors and intervals. NumPy only.

A metric is known by how its document values are aggregated, so that a score can be recomputed on any
resample of the documents.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
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

    @property
    def sign(self) -> float:
        """1 where higher is better, else -1."""
        return 1.0 if self.higher_is_better else -1.0

    def to_json(self) -> dict[str, Any]:
        """Return plain data; `TaskRule(**data)` takes it back."""
        return asdict(self)


def aggregate(rule: TaskRule, values: Sequence[Value]) -> float:
    """Return the task's metric from one value per document."""
    table = np.asarray(values, dtype=np.float64)
    return float(_metric(rule.kind, table.sum(axis=0)[None, None], float(len(table)))[0, 0])


def _metric(kind: str, sums: Array, count: float) -> Array:
    """Return metrics, (draws, models), from sums over documents, (draws, models) or (draws, models, 2)."""
    ratio = kind in ("weighted_perplexity", "bits_per_byte")
    mean = sums[..., 0] / sums[..., 1] if ratio else sums / count
    if kind == "mean":
        return np.asarray(mean)
    if kind == "bits_per_byte":
        return np.asarray(-mean / math.log(2))
    with np.errstate(over="ignore"):
        return np.asarray(np.exp(-mean))


def plain_rules(names: Iterable[str]) -> dict[str, TaskRule]:
    """Return the rules of a callable's results: plain means, equal weights, higher is better."""
    return {name: TaskRule("mean", 1.0, True, "score", name) for name in names}


def standard_error(rule: TaskRule, values: Sequence[Value]) -> float | None:
    """Return the standard error of a mean, as lm-eval computes it; None for other kinds."""
    if rule.kind != "mean" or len(values) < 2:
        return None
    return float(np.std(np.asarray(values, dtype=np.float64), ddof=1) / math.sqrt(len(values)))


def combine(rules: Mapping[str, TaskRule], metrics: Mapping[str, Any]) -> Any:
    """Return the score from the metrics of all tasks (numbers or arrays): their weighted mean."""
    total = sum(rule.weight for rule in rules.values())
    return sum(rule.weight / total * rule.sign * metrics[name] for name, rule in rules.items())


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
    """A bootstrap percentile interval around an estimate; without ends where one document says nothing."""

    mean: float
    low: float | None
    high: float | None
    level: float = 0.95


class Resampled:
    """Scores of several models on the same resamples of the same documents.

    Documents are drawn with replacement within each task, the same ones for every model, so that
    differences between models are paired.

    Args:
        rules: Rules of all tasks.
        models: For each model its document values by task; documents in the same order for all.
        level: Coverage of the intervals.
        draws: Number of resamples.
        seed: Of the resamples.

    Raises:
        ValueError: Two models have values of different numbers of documents.
    """

    def __init__(
        self,
        rules: Mapping[str, TaskRule],
        models: Sequence[Mapping[str, Sequence[Value]]],
        *,
        level: float = 0.95,
        draws: int = 5_000,
        seed: int = 0,
    ) -> None:
        self._rules, self._level = rules, level
        self._random = stream(seed, "bootstrap")
        self._plain: dict[str, Array] = {}
        self._drawn: dict[str, Array] = {}
        self._sizes: dict[str, int] = {}
        for name, rule in rules.items():
            sizes = {len(values[name]) for values in models}
            if len(sizes) != 1:
                raise ValueError(f"task {name}: models have values of {sorted(sizes)} documents")
            table = np.stack([np.asarray(values[name], dtype=np.float64) for values in models], axis=1)
            self._sizes[name] = len(table)
            self._plain[name] = _metric(rule.kind, table.sum(axis=0)[None], len(table))[0]
            self._drawn[name] = self._resample(rule.kind, table, draws)

    def _resample(self, kind: str, table: Array, draws: int) -> Array:
        """Return metrics, (draws, models), of a task's values, (documents, models) or one more axis."""
        n = len(table)
        flat, found = table.reshape(n, -1), []
        for start in range(0, draws, 500):
            size = min(500, draws - start)
            counts = self._random.multinomial(n, np.full(n, 1.0 / n), size=size).astype(np.float64)
            found.append(_metric(kind, (counts @ flat).reshape(size, *table.shape[1:]), n))
        return np.concatenate(found)

    def score(self, model: int) -> Interval:
        """Return a model's score."""
        plain, drawn = combine(self._rules, self._plain), combine(self._rules, self._drawn)
        return self._interval(plain[model], drawn[:, model], max(self._sizes.values()))

    def task(self, model: int, name: str) -> Interval:
        """Return a model's metric on one task, as the task reports it."""
        return self._interval(self._plain[name][model], self._drawn[name][:, model], self._sizes[name])

    def gain(self, model: int, over: int) -> Interval:
        """Return the difference of two models' scores."""
        plain, drawn = combine(self._rules, self._plain), combine(self._rules, self._drawn)
        difference = drawn[:, model] - drawn[:, over]
        return self._interval(plain[model] - plain[over], difference, max(self._sizes.values()))

    def _interval(self, estimate: float, drawn: Array, documents: int) -> Interval:
        if documents < 2:
            return Interval(float(estimate), None, None, self._level)
        tail = (1 - self._level) / 2
        low, high = np.quantile(drawn, [tail, 1 - tail])
        return Interval(float(estimate), float(low), float(high), self._level)
