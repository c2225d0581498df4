"""Coefficients and path in one genome."""

from __future__ import annotations

import pytest

from evomerge.config import ConfigError
from evomerge.recipe import parse_recipe
from evomerge.records import Place
from evomerge.spaces.joint import JointSpace
from evomerge.spaces.making import make_space
from evomerge.spaces.settings import JointSettings
from evomerge.strict import validated
from tests.spaces.test_dataflow import refs

PLACES = [
    Place("model.embed_tokens.weight", "embedding", None, 0.0),
    *(Place(f"model.layers.{i}.mlp.up_proj.weight", "mlp", i, i / 3) for i in range(4)),
]


def space(path: dict[str, object] | None = None) -> JointSpace:
    data = {
        "kind": "joint",
        "parameter": {"method": "task_arithmetic"},
        "path": path or {"kind": "layer_edits", "edits": 1},
    }
    settings = validated(JointSettings, data, "space", ConfigError)
    base, *models = refs("base", "a", "b")
    found = make_space(settings, base, models, PLACES, 4)
    assert isinstance(found, JointSpace)
    return found


def test_a_genome_is_a_merge_and_a_path_through_it() -> None:
    found = space()
    labels = [d.label for d in found.dimensions]
    assert labels[:3] == ["weight a", "weight b", "path: edit 1 operation"]
    recipe = found.decode((0.2, 0.6, 3.0, 0.0, 1.0, 1.0))
    assert recipe.path is not None
    assert [str(step) for step in recipe.path.layers] == ["merge 0", "b 1", "b 2", "merge 3"]
    merge = recipe.reference.recipe
    assert merge is not None
    assert merge.method == "task_arithmetic"
    assert [source.name for source in recipe.sources] == ["merge", "b"]
    assert [leaf.name for leaf in recipe.leaves] == ["base", "a", "b", "b"]
    genome, exact = found.encode(recipe)
    assert exact
    assert genome == pytest.approx((0.2, 0.6, 3.0, 0.0, 1.0, 1.0))
    assert found.method.needs_base


def test_the_search_starts_at_the_middle_merge_as_it_is() -> None:
    found = space({"kind": "data_flow"})
    recipe = found.decode(found.centre())
    assert recipe.path is not None
    assert [str(step) for step in recipe.path.layers] == [f"merge {i}" for i in range(4)]
    assert found.encode(recipe) == (found.centre(), True)
    plain = recipe.reference.recipe
    assert plain is not None
    assert found.encode(plain) == (found.centre(), True)
    other = found.decode((0.1, *found.centre()[1:]))
    assert other.digest != recipe.digest


def test_recipes_that_are_no_merge_are_refused() -> None:
    sources = [refs("a")[0].model_dump(exclude_none=True)]
    recipe = parse_recipe({"method": "passthrough", "sources": sources, "path": ["a 0-3"]}, "r")
    with pytest.raises(ConfigError, match="not through a merge"):
        space().encode(recipe)
    settings = validated(
        JointSettings,
        {"kind": "joint", "parameter": {"method": "linear"}, "path": {"kind": "data_flow"}},
        "space",
        ConfigError,
    )
    with pytest.raises(ConfigError, match='the name "merge" is that of the merged model'):
        make_space(settings, None, refs("merge", "b"), PLACES, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": {"kind": "parameter"}}, 'space: path.kind: unknown kind of space "parameter"'),
        (
            {"path": {"kind": "data_flow", "repeat": 2}},
            'space: path: unknown key "repeat"; did you mean "repeats"?',
        ),
        ({"parameter": {"method": "teis"}}, 'space: parameter.method: unknown merge method "teis"'),
    ],
)
def test_faults_are_told_of_the_part(changes: dict[str, object], message: str) -> None:
    data = {"kind": "joint", "parameter": {"method": "linear"}, "path": {"kind": "data_flow"}, **changes}
    with pytest.raises(ConfigError) as caught:
        validated(JointSettings, data, "space", ConfigError)
    assert str(caught.value).startswith(message)
