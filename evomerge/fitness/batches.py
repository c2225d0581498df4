"""The passes that answer a list of log-likelihood requests, planned once and used for every candidate."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from evomerge.fitness.encoding import TokenRequest
from evomerge.fitness.prefixes import Bundle, Costs, Stage, Tokens, divide, side_by_side

SHORTEST_WIDTH = 256
"""Rows behind a trunk are filled up to a quarter of its length, at most this many tokens."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a pass may hold.

    Attributes:
        tokens: Most tokens with padding.
        logits: Most positions that need logits.
        looks: Most pairs of a query and a key in a mask of our own.
        stage: What one more pass costs, in tokens.
    """

    tokens: int
    logits: int
    looks: int
    stage: float


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward.

    Attributes:
        ids: Tokens, (rows, width), padded with 0 on the right.
        depths: Their positions, likewise; None where they are 0, 1, 2 and so on in every row.
        ends: See `Bundle`, likewise; None where every token sees all before it.
        level: Trunks it is read behind.
        before: Tokens of these trunks.
        keeps: Whether it is a trunk itself.
        places: Positions that need logits, among all tokens of the batch, rows one after the other.
        scored: For every scored token: its place as an index of `places`, its id, its request and its number
            in it, (4, scored).
        tokens: Tokens without padding.
    """

    ids: Tensor
    depths: Tensor | None
    ends: Tensor | None
    level: int
    before: int
    keeps: bool
    places: Tensor
    scored: Tensor
    tokens: int


@dataclass(slots=True)
class Plan:
    """The passes for a list of requests, in order; a trunk comes before what is read behind it.

    Attributes:
        requests: What is answered.
        passes: How.
        alone: Tokens that would be read if each request were forwarded by itself.
    """

    requests: Sequence[TokenRequest]
    passes: list[Pass] = field(default_factory=list)

    @property
    def alone(self) -> int:
        """Tokens that forwarding each request by itself would take."""
        return sum(len(request.tokens) for request in self.requests)


class Planner:
    """Makes plans.

    Args:
        costs: Of passes; None: rows are not shared beyond those that are equal.
        limits: Of each pass.
    """

    def __init__(self, costs: Costs | None, limits: Limits) -> None:
        self._costs, self._limits = costs, limits

    def plan(self, requests: Sequence[TokenRequest]) -> Plan:
        """Return the passes for requests; which rows share one depends on no order."""
        readers: dict[Tokens, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            readers[request.tokens].append(i)
        rows = sorted(readers)
        plan = _Filled(requests, rows, [readers[row] for row in rows], self._limits)
        if self._costs is None:
            plan.add_stage(_unshared(rows), 0)
        else:
            plan.add_stage(divide(rows, self._costs), 0)
        return Plan(requests, plan.passes)


def _unshared(rows: Sequence[Tokens]) -> Stage:
    root = Stage(0, (), range(len(rows)))
    for i, row in enumerate(rows):
        size = len(row)
        root.bundles.append(Bundle(row, tuple(range(size)), (size,) * size, {i: ((0, 0),)}))
    return root


class _Filled:
    """Fills a plan stage by stage."""

    def __init__(
        self,
        requests: Sequence[TokenRequest],
        rows: Sequence[Tokens],
        readers: Sequence[Sequence[int]],
        limits: Limits,
    ) -> None:
        self._requests, self._rows, self._readers, self._limits = requests, rows, readers, limits
        self._first = [
            len(row) - max(len(requests[i].targets) for i in own)
            for row, own in zip(rows, readers, strict=True)
        ]
        self.passes: list[Pass] = []

    def add_stage(self, stage: Stage, level: int) -> None:
        """Add the passes of a trunk and of all behind it."""
        if stage.tokens:
            size = len(stage.tokens)
            trunk = Bundle(
                stage.tokens,
                tuple(range(stage.start, stage.end)),
                (size,) * size,
                dict.fromkeys(stage.rows, ((stage.start, 0),)),
            )
            self._add([trunk], level, stage.start, (stage.start, stage.end), keeps=True)
            level += 1
        before = stage.end
        if before:
            width = max((len(b.tokens) for b in stage.bundles), default=0)
            groups = [side_by_side(stage.bundles, max(width, min(before // 4, SHORTEST_WIDTH)))]
        else:
            straight = [bundle for bundle in stage.bundles if not bundle.branches]
            groups = [side_by_side(straight, 0), side_by_side([b for b in stage.bundles if b.branches], 0)]
        for group in groups:
            for part in self._parts(group, before):
                self._add(part, level, before, (before, None), keeps=False)
        for longer in stage.stages:
            self.add_stage(longer, level)

    def _parts(self, bundles: Sequence[Bundle], before: int) -> Iterator[Sequence[Bundle]]:
        """Yield runs of bundles, widest first, that go into one pass: those that cost least.

        A run costs its tokens with padding, and what a pass costs.
        """
        count = len(bundles)
        logits = np.cumsum([0, *(self._logits(bundle, before) for bundle in bundles)])
        costs, ends = np.zeros(count + 1), np.zeros(count, dtype=np.int64)
        for begin in range(count - 1, -1, -1):
            width = len(bundles[begin].tokens)
            looks = width * (before + width) if before or bundles[begin].branches else 0
            most = min(self._limits.tokens // width, self._limits.looks // looks if looks else count)
            last = int(np.searchsorted(logits, logits[begin] + self._limits.logits, side="right")) - 1
            last = max(begin + 1, min(begin + most, last, count))
            sizes = np.arange(1, last - begin + 1)
            found = self._limits.stage + width * sizes + costs[begin + 1 : last + 1]
            best = int(found.argmin())
            costs[begin], ends[begin] = found[best], begin + 1 + best
        begin = 0
        while begin < count:
            yield bundles[begin : ends[begin]]
            begin = int(ends[begin])

    def _logits(self, bundle: Bundle, before: int) -> int:
        """Return at most how many positions of a bundle need logits."""
        wanted = sum(len(self._rows[row]) - max(self._first[row], before) for row in bundle.columns)
        return min(wanted, len(bundle.tokens))

    def _add(
        self, bundles: Sequence[Bundle], level: int, before: int, span: tuple[int, int | None], *, keeps: bool
    ) -> None:
        width = len(bundles[0].tokens)
        shape = (len(bundles), width)
        ids = torch.zeros(shape, dtype=torch.int32)
        depths = torch.zeros(shape, dtype=torch.int32)
        ends = (torch.arange(width, dtype=torch.int32) + 1).repeat(len(bundles), 1)  # padding sees itself
        for i, bundle in enumerate(bundles):
            size = len(bundle.tokens)
            for table, values in ((ids, bundle.tokens), (depths, bundle.depths), (ends, bundle.ends)):
                table[i, :size] = torch.tensor(values, dtype=torch.int32)
        plain = not before and not any(bundle.branches for bundle in bundles)
        places: dict[int, int] = {}
        scored: list[tuple[int, int, int, int]] = []
        for i, bundle in enumerate(bundles):
            for row in bundle.columns:
                stop = len(self._rows[row]) if span[1] is None else min(span[1], len(self._rows[row]))
                for position in range(max(self._first[row], span[0]), stop):
                    flat = i * width + bundle.column(row, position)
                    place = places.setdefault(flat, len(places))
                    scored += [
                        (place, *self._target(request, position))
                        for request in self._readers[row]
                        if len(self._rows[row]) - position <= len(self._requests[request].targets)
                    ]
        self.passes.append(
            Pass(
                ids=ids,
                depths=None if plain else depths,
                ends=None if plain else ends,
                level=level,
                before=before,
                keeps=keeps,
                places=torch.tensor(list(places), dtype=torch.long),
                scored=torch.tensor(scored, dtype=torch.long).reshape(-1, 4).T.contiguous(),
                tokens=sum(len(bundle.tokens) for bundle in bundles),
            )
        )

    def _target(self, request: int, position: int) -> tuple[int, int, int]:
        """Return (id, request, number in it) of the target that is predicted at a position."""
        wanted = self._requests[request]
        number = position - (len(wanted.tokens) - len(wanted.targets))
        return wanted.targets[number], request, number
