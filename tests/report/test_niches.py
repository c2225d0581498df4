"""The merge map: mean coefficients along depth."""

from __future__ import annotations

import math

import numpy as np

from evomerge.recipe import parse_recipe
from evomerge.report.depth import merge_map, segments_over_depth
from evomerge.report.niches import segment_coefficients

SOURCES = [{"name": "one", "path": "a"}, {"name": "two", "path": "b"}]
CHROMOSOMES = [
    {"roles": ["attention"], "entries": 8, "tensors": [[0, "attention", 4], [1, "attention", 4]]},
    {
        "roles": [],
        "entries": 20,
        "tensors": [[None, "embedding", 4], [0, "mlp", 6], [1, "mlp", 6], [None, "head", 4]],
    },
]


def recipe(first, second):
    return parse_recipe({"method": "linear", "sources": SOURCES, "segments": [first, second]}, "r")


def test_means_are_weighted_by_entries():
    first = {"roles": ["attention"], "starts": [0, 3], "coefficients": [[1.0, 0.0], [0.0, 1.0]]}
    second = {"starts": [0, 7, 18], "coefficients": [[1.0, 0.0], [0.5, 0.25], [0.0, 1.0]]}
    found = merge_map(recipe(first, second), CHROMOSOMES, 2)
    assert [table["title"] for table in found] == ["coefficient, attention", "coefficient, other tensors"]
    np.testing.assert_allclose(found[0]["by_layer"], [[0.75, 0.25], [0.0, 1.0]])
    np.testing.assert_allclose(found[1]["by_layer"], [[0.75, 0.125], [0.5, 0.25]])
    assert found[1]["outside"] == {"embedding": [1.0, 0.0], "head": [0.25, 0.625]}


def test_layers_without_tensors_of_a_table_have_no_number():
    first = {"roles": ["attention"], "starts": [0], "coefficients": [[1.0, 0.0]]}
    second = {"starts": [0], "coefficients": [[0.5, 0.5]]}
    found = merge_map(recipe(first, second), CHROMOSOMES, 3)
    assert math.isnan(found[0]["by_layer"][2, 0])


def test_segments_have_the_shape_of_parameters_over_depth():
    first = {"roles": ["attention"], "starts": [0], "coefficients": [[1.0, 0.0]]}
    second = {"starts": [0], "coefficients": [[0.5, 0.25]]}
    found = segments_over_depth(recipe(first, second), CHROMOSOMES, 3)
    assert [(one["tensors"], one["values"]["two"]) for one in found] == [
        ("attention", [0.0, 0.0, None]),
        ("other tensors", [0.25, 0.25, None]),
        ("embedding", 0.25),
        ("head", 0.25),
    ]
    assert segments_over_depth(recipe(first, second), [], 3) == []


def test_runs_without_facts_have_no_map():
    whole = parse_recipe(
        {"method": "linear", "sources": SOURCES, "segments": [{"starts": [0], "coefficients": [[1.0, 0.0]]}]},
        "r",
    )
    assert segment_coefficients(whole, {}, {}) is None
