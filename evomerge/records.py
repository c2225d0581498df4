"""Frozen records that cross a process or a table: candidate, outcome, document set."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["ok", "stopped", "invalid", "failed"]
Genome = tuple[float, ...]
Value = float | tuple[float, float]
"""One document's value: a number, or (numerator, weight) for metrics that are ratios of sums."""

SPLITS = ("search", "select", "test")

Role = Literal["attention", "mlp", "norm", "embedding", "head", "other"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor sits in a model.

    Attributes:
        name: Its name in the checkpoint.
        role: What it belongs to; everything inside an attention block is `attention`, also its norms.
        layer: Index of its decoder layer; None outside the layers.
        depth: 0 at the first layer and before it, 1 at the last layer and behind it, linear between.
        slice: Index of the recipe's slice it belongs to; None for recipes without slices.
        slice_depth: Depth within the slice, likewise.
    """

    name: str
    role: Role
    layer: int | None
    depth: float
    slice: int | None = None
    slice_depth: float = 0.0


@dataclass(frozen=True, slots=True)
class Proposal:
    """What an optimizer asks to be scored.

    Attributes:
        index: Its place in the optimizer's own sequence, from 0 without gaps.
        generation: The optimizer's generation it belongs to (steady-state optimizers: the index).
        genome: One number per dimension of the space; see `spaces.Dimension` for the coding.
    """

    index: int
    generation: int
    genome: Genome


@dataclass(frozen=True, slots=True)
class Candidate:
    """One model of a run.

    Attributes:
        number: Its identity within the run, from 0 in the order of creation.
        origin: `source:NAME`, `baseline:NAME`, `start:NAME` (warm start), `optimizer`, or `mean`.
        generation: The optimizer's generation; 0 for those that no optimizer proposed.
        index: The optimizer's own index; None for those that no optimizer proposed.
        genome: None where the recipe lies outside the space.
        recipe: The recipe as canonical JSON data.
        digest: The recipe's digest.
    """

    number: int
    origin: str
    generation: int
    index: int | None
    genome: Genome | None
    recipe: Mapping[str, Any]
    digest: str


@dataclass(frozen=True, slots=True)
class DocumentSet:
    """Which documents a candidate is scored on.

    Attributes:
        split: `search`, `select` or `test`.
        draw: None for the whole split; else the number of the draw (one draw a generation).
    """

    split: str
    draw: int | None = None

    @property
    def key(self) -> str:
        """Its name in the store: `search`, `search@3`, `select`, `test`."""
        return self.split if self.draw is None else f"{self.split}@{self.draw}"

    @classmethod
    def of_key(cls, key: str) -> DocumentSet:
        """Return the set with that name."""
        split, _, draw = key.partition("@")
        return cls(split, int(draw) if draw else None)


@dataclass(frozen=True, slots=True)
class TaskScore:
    """One task's result: the metric as the task reports it, and its standard error (None: unknown)."""

    metric: float
    stderr: float | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came back for one candidate on one document set.

    Attributes:
        candidate: The candidate's number.
        documents: The document set's key.
        status: `ok`; `stopped`: it lost a race and was not scored to the end; `invalid`: the candidate itself
            is at fault; `failed`: it could not be scored.
        score: Weighted mean of the tasks, higher is better; of a stopped one an estimate, good for ranking
            only; None if invalid or failed. Always finite.
        stderr: Its standard error from the tasks' own, or that of the estimate; None if unknown.
        tasks: Task name to its metric.
        values: Task name to one value per document, in the order of the document set; none if stopped.
        reason: Why it is not ok, in one line.
        cost: Seconds by phase (`merge`, `evaluate`, `total`), `attempts`, and counts such as `tokens`.
    """

    candidate: int
    documents: str
    status: Status
    score: float | None = None
    stderr: float | None = None
    tasks: Mapping[str, TaskScore] = field(default_factory=dict)
    values: Mapping[str, Sequence[Value]] = field(default_factory=dict)
    reason: str = ""
    cost: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        finite = self.score is not None and math.isfinite(self.score)
        if finite != (self.status in ("ok", "stopped")):
            raise ValueError(f"outcome with status {self.status} cannot have score {self.score}")

    def to_json(self) -> dict[str, Any]:
        """Return plain data for a store or a process border."""
        return {
            "candidate": self.candidate,
            "documents": self.documents,
            "status": self.status,
            "score": self.score,
            "stderr": self.stderr,
            "tasks": {name: [task.metric, task.stderr] for name, task in self.tasks.items()},
            "values": {name: list(values) for name, values in self.values.items()},
            "reason": self.reason,
            "cost": dict(self.cost),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Outcome:
        """Return the outcome that `to_json` wrote."""
        tasks = {name: TaskScore(metric, stderr) for name, (metric, stderr) in data["tasks"].items()}
        values = {
            name: tuple(tuple(value) if isinstance(value, list) else value for value in values)
            for name, values in data["values"].items()
        }
        return cls(**{**data, "tasks": tasks, "values": values})
