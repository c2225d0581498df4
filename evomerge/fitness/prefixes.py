"""Which tokens of a list of rows are the same from the start, and how to read each of them once. No torch.

Rows that begin alike form a tree. A *trunk* is a long beginning of many rows: it is forwarded once and its
keys and values are kept for all of them. What hangs below a trunk is cut into *bundles*: the branches of one
tree laid side by side in one row, each token seeing only those it descends from.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

Tokens = tuple[int, ...]

MAX_BRANCHINGS = 100
"""Branchings on the way from the root to a leaf that are looked for; rows that part later share no more."""


@dataclass(slots=True)
class Node:
    """Tokens that the same rows share.

    Attributes:
        start: Position of its first token in these rows.
        end: Position behind its last.
        rows: The rows that go through it, as a range of the sorted rows.
        children: What follows it, in order; a row that ends with it has no child.
    """

    start: int
    end: int
    rows: range
    children: list[Node] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Costs:
    """What a forward pass costs, in tokens.

    Attributes:
        stage: Of one more pass, however short.
        pair: Of one query looking at one key.
        widest: Most tokens in one row.
    """

    stage: float
    pair: float
    widest: int

    def of(self, tokens: int, before: int) -> float:
        """Return the cost of one row of `tokens` behind `before` tokens that were read already."""
        return tokens * (1.0 + self.pair * (tokens + before))


@dataclass(frozen=True, slots=True)
class Bundle:
    """One row of tokens to forward, trees laid out depth first.

    Attributes:
        tokens: Ids.
        depths: Position of each token in the rows that it belongs to.
        ends: For each token the column behind the last one that descends from it.
        columns: Row (as an index of the sorted rows) to pairs (first position, its column), ascending: where
            its tokens stand.
    """

    tokens: Tokens
    depths: Tokens
    ends: Tokens
    columns: dict[int, tuple[tuple[int, int], ...]]

    @property
    def branches(self) -> bool:
        """Whether any token is not seen by all behind it."""
        return any(end != len(self.tokens) for end in self.ends)

    def column(self, row: int, position: int) -> int:
        """Return where a row's token of that position stands."""
        start, first = max(pair for pair in self.columns[row] if pair[0] <= position)
        return first + position - start


@dataclass(slots=True)
class Stage:
    """A trunk and what is read behind it.

    Attributes:
        start: Position of its first token.
        tokens: The trunk's tokens; empty for the root of all.
        rows: The rows that begin with it, as a range of the sorted rows.
        bundles: Rows to forward behind it.
        stages: Longer trunks that begin with it.
    """

    start: int
    tokens: Tokens
    rows: range
    bundles: list[Bundle] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)

    @property
    def end(self) -> int:
        """Position behind its last token."""
        return self.start + len(self.tokens)


def tree(rows: Sequence[Tokens]) -> Node:
    """Return the tree of distinct rows in ascending order."""
    shared = [0, *(_common(a, b) for a, b in itertools.pairwise(rows))]
    root = Node(0, 0, range(len(rows)))
    todo = [(root, 0)]
    while todo:
        node, branchings = todo.pop()
        for part in _parted(node, shared, rows):
            single = len(part) == 1 or branchings == MAX_BRANCHINGS
            for own in (range(row, row + 1) for row in part) if single else (part,):
                end = len(rows[own[0]]) if single else min(shared[row] for row in own[1:])
                child = Node(node.end, end, own)
                node.children.append(child)
                if not single:
                    todo.append((child, branchings + 1))
    return root


def _parted(node: Node, shared: Sequence[int], rows: Sequence[Tokens]) -> Iterator[range]:
    """Yield runs of a node's rows that go on alike behind it."""
    begin = node.rows.start
    if len(rows[begin]) == node.end:
        begin += 1
    for row in range(begin + 1, node.rows.stop + 1):
        if row == node.rows.stop or shared[row] <= node.end:
            yield range(begin, row)
            begin = row


def _common(one: Tokens, other: Tokens) -> int:
    """Return how many tokens two rows share from the start."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # comparing slices is faster than a loop over tokens
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def divide(rows: Sequence[Tokens], costs: Costs) -> Stage:
    """Return how to read distinct rows, in ascending order, at the least cost."""
    root = Stage(0, (), range(len(rows)))
    if rows:
        _Division(rows, costs).fill(root, tree(rows), 0)
    return root


class _Division:
    def __init__(self, rows: Sequence[Tokens], costs: Costs) -> None:
        self._rows, self._costs = rows, costs
        self._sizes: dict[int, int] = {}

    def fill(self, stage: Stage, node: Node, begin: int) -> None:
        """Add to a stage what reads a node's rows from position `begin` on."""
        todo = [(stage, node, begin)]
        while todo:
            stage, node, begin = todo.pop()
            if self._stays_whole(stage, node, begin):
                stage.bundles.append(self._bundle(node, begin))
            elif self._is_trunk(node, begin):
                tokens = self._rows[node.rows[0]][begin : node.end]
                longer = Stage(begin, tokens, node.rows)
                stage.stages.append(longer)
                todo += [(longer, child, node.end) for child in node.children]
            else:
                todo += [(stage, child, begin) for child in node.children]
                if self._ends_here(node):
                    last = Node(node.start, node.end, range(node.rows[0], node.rows[0] + 1))
                    stage.bundles.append(self._bundle(last, begin))

    def _ends_here(self, node: Node) -> bool:
        return len(self._rows[node.rows[0]]) == node.end

    def _size(self, node: Node) -> int:
        """Return how many tokens a node and all below it have."""
        known = self._sizes.get(id(node))
        if known is None:
            known = node.end - node.start + sum(map(self._size, node.children))
            self._sizes[id(node)] = known
        return known

    def _is_trunk(self, node: Node, begin: int) -> bool:
        return (node.end - begin) * (len(node.children) - 1) > self._costs.stage

    def _stays_whole(self, stage: Stage, node: Node, begin: int) -> bool:
        """Whether one bundle is the cheapest way to read all below a node."""
        if not node.children:
            return True
        size = node.start - begin + self._size(node)
        return size <= self._costs.widest and self._costs.of(size, stage.end) <= self._parted(
            node, begin, stage.end
        )

    def _parted(self, node: Node, begin: int, before: int) -> float:
        """Return the cost of reading what is below a node in several rows."""
        costs, head = self._costs, node.end - begin
        cost = 0.0
        if self._is_trunk(node, begin):
            cost += costs.stage + costs.of(head, before)
            before, head = node.end, 0
        elif self._ends_here(node):
            cost += costs.of(head, before)
        return cost + sum(costs.of(head + self._size(child), before) for child in node.children)

    def _bundle(self, node: Node, begin: int) -> Bundle:
        """Lay out what is below a node, depth first, from position `begin` on."""
        tokens: list[int] = []
        depths: list[int] = []
        ends: list[int] = []
        columns: dict[int, tuple[tuple[int, int], ...]] = {}

        def lay(node: Node, start: int, path: tuple[tuple[int, int], ...]) -> None:
            first = len(tokens)
            path = (*path, (start, first))
            tokens.extend(self._rows[node.rows[0]][start : node.end])
            depths.extend(range(start, node.end))
            ends.extend([0] * (node.end - start))
            if self._ends_here(node):
                columns[node.rows[0]] = path
            for child in node.children:
                lay(child, node.end, path)
            ends[first : first + node.end - start] = [len(tokens)] * (node.end - start)

        lay(node, begin, ())
        return Bundle(tuple(tokens), tuple(depths), tuple(ends), columns)


def side_by_side(bundles: Sequence[Bundle], width: int) -> list[Bundle]:
    """Return fewer, wider bundles, each of those that fit into `width` together; widest first."""
    rows: list[list[Bundle]] = []
    room: list[int] = []
    for bundle in sorted(bundles, key=lambda bundle: (-len(bundle.tokens), bundle.tokens)):
        size = len(bundle.tokens)
        place = next((i for i, free in enumerate(room) if free >= size), None)
        if place is None:
            rows.append([bundle])
            room.append(width - size)
        else:
            rows[place].append(bundle)
            room[place] -= size
    joined = [_joined(row) for row in rows]
    return sorted(joined, key=lambda bundle: (-len(bundle.tokens), bundle.tokens))


def _joined(bundles: Sequence[Bundle]) -> Bundle:
    if len(bundles) == 1:
        return bundles[0]
    tokens: list[int] = []
    depths: list[int] = []
    ends: list[int] = []
    columns: dict[int, tuple[tuple[int, int], ...]] = {}
    for bundle in bundles:
        first = len(tokens)
        tokens += bundle.tokens
        depths += bundle.depths
        ends += [first + end for end in bundle.ends]
        columns |= {
            row: tuple((start, first + column) for start, column in pairs)
            for row, pairs in bundle.columns.items()
        }
    return Bundle(tuple(tokens), tuple(depths), tuple(ends), columns)


def beginnings(rows: Sequence[Tokens], cost: float) -> list[tuple[int, range]]:
    """Return the trunks worth a pass of their own, for rows that each need a row of their own.

    Args:
        rows: Distinct rows in ascending order.
        cost: Of one more pass, in tokens.

    Returns:
        Pairs (length of the trunk, the rows that begin with it); length 0 for rows without one. A trunk is
        shorter than each of its rows.
    """
    found: list[tuple[int, range]] = []
    todo = [tree(rows)] if rows else []
    while todo:
        node = todo.pop()
        shortest = min(len(rows[row]) for row in node.rows)
        length = min(node.end, shortest - 1)
        if length * (len(node.rows) - 1) > cost:
            found.append((length, node.rows))
            continue
        if not node.children:
            found.append((0, node.rows))
        elif len(rows[node.rows[0]]) == node.end:
            found.append((0, range(node.rows[0], node.rows[0] + 1)))
        todo += node.children[::-1]
    return found
