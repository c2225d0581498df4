"""Segment tables as data."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.errors import RecipeError
from evomerge.recipe import parse_recipe
from evomerge.records import Place
from evomerge.segments import SegmentTable, pieces, stretches

SOURCES = [{"name": "one", "path": "a"}, {"name": "two", "path": "b"}]
TABLE = {"starts": [0, 5], "coefficients": [[1.0, 0.0], [0.5, 0.5]]}


def recipe(**changes):
    return parse_recipe({"method": "linear", "sources": SOURCES, "segments": [TABLE], **changes}, "r")


def test_equal_neighbours_are_one_segment_and_one_digest():
    long = {"starts": [0, 2, 5, 9], "coefficients": [[1.0, 0.0], [1, 0], [0.5, 0.5], [0.5, 0.5]]}
    assert recipe(segments=[long]) == recipe()
    assert recipe(segments=[long]).digest == recipe().digest


def test_the_digest_depends_on_segments_and_only_where_they_are_given():
    plain = recipe(segments=[])
    assert plain.digest == parse_recipe({"method": "linear", "sources": SOURCES}, "r").digest
    digests = {plain.digest, recipe().digest}
    digests.add(recipe(segments=[{**TABLE, "starts": [0, 6]}]).digest)
    digests.add(recipe(segments=[{**TABLE, "coefficients": [[1.0, 0.0], [0.5, 0.25]]}]).digest)
    digests.add(recipe(segments=[{**TABLE, "roles": ["mlp"]}, TABLE]).digest)
    assert len(digests) == 5


def test_a_recipe_with_segments_is_read_back():
    tables = [{**TABLE, "roles": ["mlp"]}, {**TABLE, "roles": []}]
    one = recipe(segments=tables)
    assert parse_recipe(one.to_json(), "r") == one
    assert "parameters" not in one.to_json()
    assert "parameters" not in one.to_json()["sources"][0]
    assert "segments" not in recipe(segments=[]).to_json()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"method": "ties", "base": {"name": "b", "path": "b"}},
            "segments: are coefficients of the method linear",
        ),
        ({"parameters": {"normalize": False}}, "parameters: segments stand in place of weights"),
        ({"sources": [{**SOURCES[0], "parameters": {"weight": 0.5}}, SOURCES[1]]}, "sources.one.parameters"),
        ({"segments": [{**TABLE, "starts": [0, 0]}]}, "expected ascending numbers, got 0 after 0"),
        ({"segments": [{**TABLE, "starts": [1, 5]}]}, "expected 0 first, got 1"),
        ({"segments": [{**TABLE, "starts": [0]}]}, "1 starts, but coefficients of 2 segments"),
        ({"segments": [{**TABLE, "coefficients": [[1.0], [1.0]]}]}, "one for each of one, two, got 1"),
        ({"segments": [{**TABLE, "coefficients": [[1.0, float("nan")], [1, 0]]}]}, "finite"),
        ({"segments": [TABLE, TABLE]}, "only the last table may leave them out"),
        (
            {"segments": [{**TABLE, "roles": ["mlp"]}, {**TABLE, "roles": ["mlp"]}]},
            "belongs to a table before",
        ),
        ({"slices": [{"layers": {"one": [0, 1], "two": [0, 1]}}]}, "leave out slices"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, message):
    with pytest.raises(RecipeError, match=message) as problem:
        recipe(**changes)
    assert "\n" not in str(problem.value)


@given(data=st.data())
def test_pieces_are_the_segments_of_a_stretch(data):
    total = data.draw(st.integers(1, 60))
    starts = sorted({0, *data.draw(st.lists(st.integers(0, total - 1)))})
    table = SegmentTable(starts=tuple(starts), coefficients=tuple((float(s),) for s in starts))
    start = data.draw(st.integers(0, total - 1))
    size = data.draw(st.integers(0, total - start))
    found = [p.coefficients[0] for p in pieces(table, start, size) for _ in range(p.start, p.stop)]
    assert found == [float(max(s for s in starts if s <= start + i)) for i in range(size)]


def test_stretches_follow_the_order_of_the_model_within_each_table():
    places = [Place(n, r, 0, 0.0) for n, r in (("a", "mlp"), ("b", "attention"), ("c", "mlp"))]
    found, counts = stretches(places, {"a": 3, "b": 4, "c": 5}, [["attention"], []])
    assert {name: (s.table, s.start) for name, s in found.items()} == {"a": (1, 0), "b": (0, 0), "c": (1, 3)}
    assert counts == (4, 8)
