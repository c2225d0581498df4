"""Division of rows into trunks and bundles: every token of every row is there, once, where it says."""

from __future__ import annotations

import random
from collections.abc import Iterator

from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.fitness.prefixes import (
    MAX_BRANCHINGS,
    Bundle,
    Costs,
    Stage,
    Tokens,
    beginnings,
    divide,
    side_by_side,
    tree,
)

CHEAP = Costs(stage=4, pair=0.001, widest=200)
ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12).map(tuple), min_size=1, max_size=20)


def stages(stage: Stage, trunk: Tokens = ()) -> Iterator[tuple[Stage, Tokens]]:
    """Yield every stage with all tokens in front of its bundles."""
    trunk = trunk + stage.tokens
    yield stage, trunk
    for longer in stage.stages:
        yield from stages(longer, trunk)


def read(bundle: Bundle, row: int, start: int, end: int) -> Tokens:
    return tuple(bundle.tokens[bundle.column(row, position)] for position in range(start, end))


def check(rows: list[Tokens], root: Stage) -> int:
    """Assert that every row can be read from the division; return the number of tokens forwarded."""
    seen: dict[int, Tokens] = {}
    count = 0
    for stage, trunk in stages(root):
        assert stage.end == len(trunk)
        count += len(stage.tokens)
        for row in stage.rows:
            assert rows[row][: len(trunk)] == trunk
            if len(rows[row]) == len(trunk) and trunk:
                seen[row] = trunk
        for bundle in stage.bundles:
            count += len(bundle.tokens)
            for row in bundle.columns:
                assert row not in seen
                seen[row] = trunk + read(bundle, row, stage.end, len(rows[row]))
            check_sight(bundle, {row: rows[row][stage.end :] for row in bundle.columns}, stage.end)
    assert seen == dict(enumerate(rows))
    return count


def check_sight(bundle: Bundle, rows: dict[int, Tokens], start: int) -> None:
    """Assert that a row's last token sees just the row's own tokens, in order of position."""
    for row, tokens in rows.items():
        last = bundle.column(row, start + len(tokens) - 1)
        sees = [column for column in range(last + 1) if last < bundle.ends[column]]
        assert tuple(bundle.tokens[column] for column in sees) == tokens
        assert [bundle.depths[column] for column in sees] == list(range(start, start + len(tokens)))


@settings(max_examples=200, deadline=None)
@given(rows=ROWS, stage=st.sampled_from([0, 3, 50]), pair=st.sampled_from([0.0, 0.01, 1.0]))
def test_every_row_can_be_read_from_its_division(rows: list[Tokens], stage: float, pair: float) -> None:
    distinct = sorted(set(rows))
    count = check(distinct, divide(distinct, Costs(stage, pair, widest=30)))
    assert count <= sum(map(len, distinct))


@settings(max_examples=100, deadline=None)
@given(rows=ROWS, width=st.integers(0, 60))
def test_bundles_side_by_side_see_what_they_saw_alone(rows: list[Tokens], width: int) -> None:
    distinct = sorted(set(rows))
    alone = list(divide(distinct, CHEAP).bundles)
    joined = side_by_side(alone, width)
    assert sum(len(bundle.tokens) for bundle in joined) == sum(len(bundle.tokens) for bundle in alone)
    assert [len(b.tokens) for b in joined] == sorted((len(b.tokens) for b in joined), reverse=True)
    for bundle in joined:
        assert len(bundle.tokens) <= max(width, *(len(b.tokens) for b in alone))
        check_sight(bundle, {row: distinct[row] for row in bundle.columns}, 0)


def test_choices_share_their_question_and_questions_their_examples() -> None:
    shots = tuple(range(100))
    questions = [tuple(200 + 20 * q + k for k in range(20)) for q in range(5)]
    rows = sorted(shots + q + (1000 + c, 2000 + c) for q in questions for c in range(4))
    root = divide(rows, Costs(stage=64, pair=1e-4, widest=64))
    assert check(rows, root) == 100 + 5 * (20 + 4 * 2)
    (trunk,) = root.stages
    assert trunk.tokens == shots
    assert [len(bundle.tokens) for bundle in trunk.bundles] == [28] * 5
    assert all(bundle.branches for bundle in trunk.bundles)


def test_a_short_common_beginning_is_read_again_rather_than_kept() -> None:
    rows = sorted((1, *(10 + 30 * k + i for i in range(30))) for k in range(9))
    root = divide(rows, Costs(stage=64, pair=1e-2, widest=100))
    assert not root.stages
    assert len(root.bundles) == 9
    assert not any(bundle.branches for bundle in root.bundles)


def test_rows_that_part_ever_again_are_no_deeper_than_the_limit() -> None:
    rows = sorted((7,) * k for k in range(1, 4 * MAX_BRANCHINGS))
    node, depth = tree(rows), 0
    while node.children:
        node, depth = node.children[0], depth + 1
    assert depth == MAX_BRANCHINGS + 1
    check(rows, divide(rows, CHEAP))


def test_prompts_are_grouped_by_the_beginnings_worth_keeping() -> None:
    draw = random.Random(0)
    one, two = (tuple(draw.choices(range(9), k=40)) for _ in range(2))
    rows = sorted(
        {(0, *head, *draw.choices(range(9), k=6)) for head in (one, two) for _ in range(8)} | {(3,)}
    )
    found = beginnings(rows, 50)
    assert sorted((length, len(part)) for length, part in found) == [(0, 1), (41, 8), (41, 8)]
    for length, part in found:
        assert len({rows[i][:length] for i in part}) == 1
        assert all(len(rows[i]) > length for i in part)
    assert sorted(i for _, part in found for i in part) == list(range(len(rows)))


@settings(max_examples=100, deadline=None)
@given(rows=ROWS, cost=st.sampled_from([0, 2, 30]))
def test_beginnings_cover_every_prompt_once(rows: list[Tokens], cost: float) -> None:
    distinct = sorted(set(rows))
    found = beginnings(distinct, cost)
    assert sorted(i for _, part in found for i in part) == list(range(len(distinct)))
    for length, part in found:
        assert len({distinct[i][:length] for i in part}) == 1
        assert all(len(distinct[i]) > length for i in part)
