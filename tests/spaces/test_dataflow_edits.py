"""Layer paths as edits of the first source."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from evomerge.errors import ConfigError
from evomerge.recipe import parse_recipe
from evomerge.spaces.dataflow import Stacks, whole_path
from evomerge.spaces.dataflow_edits import LayerEditsSpace
from evomerge.spaces.dataflow_settings import LayerEditsSettings
from evomerge.strict import validated
from tests.spaces.test_dataflow import refs


def space(counts: tuple[int, ...] = (6, 6), **data: Any) -> LayerEditsSpace:
    settings = validated(LayerEditsSettings, {"kind": "layer_edits", **data}, "space", ConfigError)
    names = refs(*"abc"[: len(counts)])
    return LayerEditsSpace(settings, Stacks(names, {r.name: n for r, n in zip(names, counts, strict=True)}))


def genome_of(of: LayerEditsSpace, **genes: float) -> tuple[float, ...]:
    """A genome with some genes, named by edit and label, such as `operation_1`."""
    found = dict(zip((d.label for d in of.dimensions), of.centre(), strict=True))
    for key, value in genes.items():
        label, number = key.rsplit("_", 1)
        assert f"edit {number} {label}" in found
        found[f"edit {number} {label}"] = value
    return tuple(found.values())


def text(of: LayerEditsSpace, **genes: float) -> str:
    return ", ".join(map(str, of.path(genome_of(of, **genes)).layers))


def test_the_search_starts_at_the_first_source_as_it_is() -> None:
    found = space(edits=3, scale_range=0.5)
    assert found.decode(found.centre()).digest == whole_path(refs("a")[0], 6).digest
    assert [(d.kind, d.size) for d in found.dimensions[:4]] == [
        ("categorical", 4),
        ("integer", 4),
        ("integer", 4),
        ("real", 0),
    ]
    starts = [g for d, g in zip(found.dimensions, found.centre(), strict=True) if d.label.endswith("first")]
    assert len(set(starts)) == 3


def test_each_operation_does_what_it_says() -> None:
    found = space(operations=("skip", "repeat", "borrow", "insert"), edits=1)
    places = {"first_1": 1.0, "length_1": 1.0}
    assert text(found, operation_1=1, **places) == "a 0, a 1, a 4, a 5"
    assert text(found, operation_1=2, **places) == "a 0, a 1, a 2, a 3, a 2, a 3, a 4, a 5"
    assert text(found, operation_1=3, **places) == "a 0, a 1, b 2, b 3, a 4, a 5"
    assert text(found, operation_1=4, **places) == "a 0, a 1, a 2, a 3, b 2, b 3, a 4, a 5"
    assert text(found, operation_1=0, **places) == "a 0, a 1, a 2, a 3, a 4, a 5"


def test_the_ends_stay_and_shared_layers_belong_to_the_first_edit() -> None:
    found = space(edits=2, operations=("skip", "repeat"))
    assert text(found, operation_1=1, first_1=3, length_1=3) == "a 0, a 1, a 2, a 3, a 5"
    both = {"operation_1": 1.0, "first_1": 2.0, "length_1": 0.0, "operation_2": 2.0, "length_2": 3.0}
    # The second edit would repeat the layers 1 to 4; 3 is skipped, so that 1 and 2 are left to it.
    assert text(found, **both, first_2=0.0) == "a 0, a 1, a 2, a 1, a 2, a 4, a 5"
    assert text(found, **both, first_2=2.0) == "a 0, a 1, a 2, a 4, a 5"


def test_a_scale_holds_for_the_stretch_alone() -> None:
    found = space(edits=1, operations=("skip", "repeat", "borrow"), scale_range=0.5)
    genes = {"first_1": 1.0, "length_1": 1.0, "scale_1": 0.8}
    assert text(found, operation_1=3, **genes) == "a 0, a 1, b 2 1.3, b 3, a 4 0.769231, a 5"
    assert text(found, operation_1=2, **genes) == "a 0, a 1, a 2, a 3, a 2 1.3, a 3, a 4 0.769231, a 5"
    assert text(found, operation_1=1, **genes) == "a 0, a 1, a 4, a 5"


def test_a_deeper_source_lends_the_layers_at_the_same_depth() -> None:
    found = space((5, 9, 5), edits=1, operations=("borrow",))
    assert "edit 1 source" in [d.label for d in found.dimensions]
    assert text(found, operation_1=1, first_1=1, length_1=1, source_1=0) == "a 0, a 1, b 4, b 6, a 4"
    assert text(found, operation_1=1, first_1=1, length_1=1, source_1=1) == "a 0, a 1, c 2, c 3, a 4"


def test_edits_that_make_the_path_too_long_are_left_out() -> None:
    found = space(edits=2, operations=("repeat",), max_layers=7)
    genes = {"operation_1": 1.0, "first_1": 2.0, "length_1": 1.0, "operation_2": 1.0, "first_2": 0.0}
    assert text(found, **genes, length_2=0.0) == "a 0, a 1, a 1, a 2, a 3, a 4, a 5"


def test_every_genome_decodes_and_paths_without_scales_encode_back() -> None:
    found = space((6, 6, 4), edits=2, operations=("skip", "repeat", "borrow", "insert"), longest=3)
    rng = np.random.default_rng(0)
    back = 0
    for _ in range(25):
        genome = tuple(float(rng.integers(d.size)) for d in found.dimensions)
        recipe = found.decode(genome)
        assert recipe.path is not None
        assert parse_recipe(recipe.to_json(), "again").digest == recipe.digest
        try:
            again, same = found.encode(recipe)
        except ConfigError:  # edits are found one by one, which is not always possible
            continue
        back += same
        assert found.decode(again).digest == recipe.digest
    assert back >= 20


def test_sections_that_do_not_fit_the_sources_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"space\.operations: borrow needs a second source"):
        space((6,))
    with pytest.raises(ConfigError, match="a has 2 layers; edits leave the first and the last one alone"):
        space((2, 2))
    with pytest.raises(ConfigError, match="operations: expected distinct operations"):
        space(operations=("skip", "skip"))
