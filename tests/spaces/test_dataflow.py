"""Spaces of layer paths: the paper's indicators and scales, and its starting point."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from evomerge.errors import ConfigError
from evomerge.paths import LARGEST, SMALLEST
from evomerge.recipe import SourceRef, parse_recipe
from evomerge.spaces.dataflow import DataFlowSpace, Stacks, whole_path
from evomerge.spaces.dataflow_settings import DataFlowSettings
from evomerge.strict import validated

SCALES = ("none", "slot", "matrix", "network")


def refs(*names: str) -> tuple[SourceRef, ...]:
    return tuple(SourceRef(name=n, path=f"./{n}", fingerprint=str(i) * 64) for i, n in enumerate(names))


def space(data: dict[str, Any] | None = None, counts: tuple[int, ...] = (4, 4), **more: Any) -> DataFlowSpace:
    settings = validated(DataFlowSettings, {"kind": "data_flow", **(data or {})}, "space", ConfigError)
    names = refs(*"abc"[: len(counts)])
    stacks = Stacks(names, {r.name: n for r, n in zip(names, counts, strict=True)}, **more)
    return DataFlowSpace(settings, stacks)


def genomes(of: DataFlowSpace, count: int = 50) -> list[tuple[float, ...]]:
    rng = np.random.default_rng(0)
    return [tuple(row) for row in rng.random((count, len(of.dimensions))).tolist()]


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("repeats", [1, 3])
def test_the_search_starts_at_the_first_source_as_it_is(scales: str, repeats: int) -> None:
    found = space({"scales": scales, "repeats": repeats})
    recipe = found.decode(found.centre())
    assert recipe.digest == whole_path(refs("a")[0], 4).digest
    assert found.encode(recipe) == (found.centre(), True)


def test_dimensions_are_the_paper_s() -> None:
    # T = M x r slots without the two fixed ones, and W of M x M.
    assert len(space({"scales": "none", "repeats": 3}).dimensions) == 8 * 3 - 2
    assert len(space({"scales": "matrix", "repeats": 3}).dimensions) == 8 * 3 - 2 + 64
    assert len(space({"scales": "slot"}).dimensions) == 6 + 7
    assert len(space({"scales": "network", "hidden": 3}).dimensions) == 6 + 3 * 4 + 4
    assert (
        len({dimension.label for dimension in space({"scales": "matrix", "repeats": 2}).dimensions})
        == 14 + 64
    )


@pytest.mark.parametrize("scales", SCALES)
def test_the_order_within_a_round_never_changes(scales: str) -> None:
    found = space({"scales": scales, "repeats": 2, "unused": 0.0}, (4, 3))
    order = [("a", i) for i in range(4)] + [("b", i) for i in range(3)]
    lengths = set()
    for genome in genomes(found):
        path = found.path(genome)
        steps = [(step.source, step.layer) for step in path.layers]
        assert (steps[0], steps[-1]) == (("a", 0), ("a", 3))
        places = [order.index(step) for step in steps[1:-1]]
        falls = sum(b <= a for a, b in itertools.pairwise(places))
        assert falls <= 1  # two rounds
        assert path.end == "a"
        lengths.add(len(steps))
    assert len(lengths) > 3


def test_a_slot_is_used_above_its_threshold_and_alone() -> None:
    found = space({"scales": "none"}, (3, 3))
    labels = [dimension.label for dimension in found.dimensions]
    assert labels == ["use a 1", "use b 0", "use b 1", "use b 2"]

    def steps(**genes: float) -> list[str]:
        return [
            str(s)
            for s in found.path(tuple(genes.get(label[4:].replace(" ", ""), 0.5) for label in labels)).layers
        ]

    assert steps() == ["a 0", "a 1", "a 2"]
    assert steps(b1=0.84) == ["a 0", "a 1", "b 1", "a 2"]
    assert steps(b1=0.83) == ["a 0", "a 1", "a 2"]
    assert steps(a1=0.17) == ["a 0", "a 1", "a 2"]
    assert steps(a1=0.16, b0=1.0, b2=0.9) == ["a 0", "b 0", "b 2", "a 2"]


def test_a_matrix_scales_by_the_two_layers_a_slot_by_the_second() -> None:
    matrix = space({"scales": "matrix", "repeats": 2, "scale_range": 1.5}, (3, 2))
    genes = dict.fromkeys((d.label for d in matrix.dimensions), 0.5)
    genes |= {"use a 1 in round 2": 1.0, "scale from 1 to 1": 0.0, "scale from 1 to 2": 1.0}
    path = matrix.path(tuple(genes.values()))
    assert [str(s) for s in path.layers] == ["a 0", "a 1", "a 1 -0.5", "a 2 2.5"]
    slots = space({"repeats": 2}, (3, 2))
    genes = dict.fromkeys((d.label for d in slots.dimensions), 0.5)
    genes |= {"use a 1 in round 2": 1.0, "scale before a 1": 0.7, "scale before the last layer": 0.2}
    path = slots.path(tuple(genes.values()))
    assert [str(s) for s in path.layers] == ["a 0", "a 1 1.2", "a 1", "a 2 0.7"]


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("width", [0.5, 10.0])
def test_every_genome_has_a_valid_recipe_that_encodes_back(scales: str, width: float) -> None:
    found = space({"scales": scales, "repeats": 2, "scale_range": width, "unused": 0.5}, (5, 4, 5))
    exact = 0
    for genome in genomes(found):
        recipe = found.decode(genome)
        assert parse_recipe(recipe.to_json(), "again").digest == recipe.digest
        assert recipe.path is not None
        assert all(SMALLEST <= abs(factor) <= LARGEST for factor in recipe.path.factors)
        again, same = found.encode(recipe)
        exact += same
        there = found.path(again)
        assert [(s.source, s.layer) for s in there.layers] == [
            (s.source, s.layer) for s in recipe.path.layers
        ]
        assert same == (there == recipe.path)
    assert exact == 50 if scales in ("none", "slot") and width < 1 else True


def test_too_many_slots_are_cut_to_those_with_the_largest_indicators() -> None:
    found = space({"scales": "none", "max_layers": 4}, (4, 4))
    genes = dict.fromkeys((d.label for d in found.dimensions), 0.5)
    genes |= {"use b 1": 1.0, "use a 1": 0.9, "use a 2": 0.3}
    assert [str(s) for s in found.path(tuple(genes.values())).layers] == ["a 0", "a 1", "b 1", "a 3"]
    assert all(len(found.path(genome).layers) <= 4 for genome in genomes(found))


def test_parameters_limit_the_layers() -> None:
    found = space({"max_parameters": 1000}, layer_parameters=150, other_parameters=300)
    assert found.longest == 4
    with pytest.raises(
        ConfigError, match=r"space\.max_parameters: two layers .* have 600 parameters, got 599"
    ):
        space({"max_parameters": 599}, layer_parameters=150, other_parameters=300)


def test_slices_of_the_same_layers_encode_like_the_path() -> None:
    found = space({"repeats": 2})
    sources = [ref.model_dump(exclude_none=True) for ref in refs("a", "b")]
    sliced = parse_recipe(
        {
            "method": "passthrough",
            "sources": sources,
            "slices": [{"layers": {"a": [0, 3]}}, {"layers": {"b": [1, 3]}}, {"layers": {"a": [2, 4]}}],
        },
        "r",
    )
    genome, exact = found.encode(sliced)
    assert exact
    assert [str(s) for s in found.path(genome).layers] == ["a 0", "a 1", "a 2", "b 1", "b 2", "a 2", "a 3"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (["a 1-3"], "begins with layer 0 of a and ends with its layer 3, got a 1 and a 3"),
        (["a 0-2", "a 2", "a 2", "a 3"], "layer 4 of the path, a 2, comes again .* repeats: 2"),
        ({"layers": ["a 0", "b 1", "a 3"], "ends": "b"}, 'ends of "b" does not lie in this space'),
        (["a 0", "b 7", "a 3"], "b has 4 layers, got b 7"),
    ],
)
def test_paths_outside_the_space_are_refused(path: Any, message: str) -> None:
    names = {step.split()[0] for step in (path if isinstance(path, list) else path["layers"])}
    sources = [ref.model_dump(exclude_none=True) for ref in refs("a", "b") if ref.name in names]
    recipe = parse_recipe({"method": "passthrough", "sources": sources, "path": path}, "r")
    with pytest.raises(ConfigError, match=message):
        space({"repeats": 2}).encode(recipe)


def test_recipes_of_other_kinds_and_sources_are_refused() -> None:
    linear = parse_recipe({"method": "linear", "sources": [refs("a")[0].model_dump(exclude_none=True)]}, "r")
    with pytest.raises(ConfigError, match="a recipe of linear does not lie in a space of paths"):
        space().encode(linear)
    other = SourceRef(name="a", path="./a", fingerprint="9" * 64)
    with pytest.raises(ConfigError, match='a path through "a" does not lie in this space'):
        space().encode(whole_path(other, 4))


def test_a_tokenizer_of_another_source_is_refused() -> None:
    with pytest.raises(ConfigError, match=r'space\.tokenizer: a path has that of the first source, "a"'):
        space({"tokenizer": "b"})
    with pytest.raises(ConfigError, match="a has one layer"):
        space(None, (1, 2))
