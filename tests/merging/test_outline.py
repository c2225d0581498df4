"""The tensors of a model that slices make, where each comes from, and its config."""

import pytest
import torch

from evomerge.checkpoints.layout import layout_of
from evomerge.checkpoints.source import Checkpoint
from evomerge.errors import RecipeError
from evomerge.merging.merger import Merger
from evomerge.merging.outline import check_slices, outline, outlined_config
from evomerge.recipe import parse_recipe
from tests.checkpoints.tiny import make_model


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    layers = {"a": 3, "b": 3, "deep": 5}
    return {
        name: Checkpoint.open(make_model(path / name, seed=seed, layers=count, hidden=8))
        for seed, (name, count) in enumerate(layers.items())
    }


def recipe_of(checkpoints, *slices, **more):
    names = {name: None for piece in slices for name in piece} or dict.fromkeys("ab")
    sources = [{"name": name, "path": str(checkpoints[name].path)} for name in names]
    layers = [{"layers": piece} for piece in slices]
    return parse_recipe({"method": "linear", "sources": sources, "slices": layers, **more}, "r")


def outputs_of(checkpoints, recipe):
    return outline(recipe, layout_of(checkpoints[recipe.reference.name]))


def test_without_slices_every_tensor_stays_in_its_place(checkpoints):
    found = outputs_of(checkpoints, recipe_of(checkpoints))
    assert list(found) == list(checkpoints["a"].tensors)
    assert all(output.inputs == {"a": name, "b": name} for name, output in found.items())
    assert all(output.place.slice is None for output in found.values())


def test_layers_are_numbered_anew_and_ends_come_from_the_first_and_the_last_slice(checkpoints):
    recipe = recipe_of(checkpoints, {"a": [1, 3]}, {"deep": [3, 5], "b": [0, 2]}, {"b": [2, 3]})
    found = outputs_of(checkpoints, recipe)
    name = "model.layers.{}.self_attn.q_proj.weight"
    assert {i: dict(found[name.format(i)].inputs) for i in range(5)} == {
        0: {"a": name.format(1)},
        1: {"a": name.format(2)},
        2: {"deep": name.format(3), "b": name.format(0)},
        3: {"deep": name.format(4), "b": name.format(1)},
        4: {"b": name.format(2)},
    }
    assert found["model.embed_tokens.weight"].inputs == {"a": "model.embed_tokens.weight"}
    assert found["lm_head.weight"].inputs == {"b": "lm_head.weight"}
    assert found["model.norm.weight"].inputs == {"b": "model.norm.weight"}
    assert len(found) == 3 + 5 * (len(checkpoints["a"].tensors) - 3) // 3


def test_depths_run_over_the_model_and_over_each_slice(checkpoints):
    found = outputs_of(checkpoints, recipe_of(checkpoints, {"a": [0, 3]}, {"a": [2, 3]}, {"a": [0, 1]}))
    places = [found[f"model.layers.{i}.mlp.up_proj.weight"].place for i in range(5)]
    assert [place.depth for place in places] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert [(place.slice, place.slice_depth) for place in places] == [
        (0, 0),
        (0, 0.5),
        (0, 1),
        (1, 0),
        (2, 0),
    ]
    assert {place.role for place in places} == {"mlp"}
    ends = [
        found[name].place for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    ]
    assert [(p.layer, p.slice, p.depth, p.slice_depth) for p in ends] == [
        (None, 0, 0.0, 0.0),
        (None, 2, 1.0, 1.0),
        (None, 2, 1.0, 1.0),
    ]


def test_layers_beyond_those_of_the_reference_have_its_tensors(checkpoints):
    found = outputs_of(checkpoints, recipe_of(checkpoints, {"a": [0, 1]}, {"deep": [4, 5]}))
    name = "model.layers.{}.mlp.down_proj.weight"
    assert found[name.format(1)].inputs == {"deep": name.format(4)}


def test_a_stacked_model_has_the_very_tensors_of_its_sources(checkpoints):
    recipe = recipe_of(checkpoints, {"a": [0, 2]}, {"b": [1, 3]}, method="passthrough")
    merger = Merger({ref.identity: checkpoints[ref.name] for ref in recipe.refs}, layout_of(checkpoints["a"]))
    for name, output in outputs_of(checkpoints, recipe).items():
        ((source, stored),) = output.inputs.items()
        assert torch.equal(merger.merge(recipe, name), checkpoints[source].tensor(stored))


def test_slices_over_all_layers_merge_to_the_plain_model(checkpoints):
    plain = recipe_of(checkpoints)
    cut = recipe_of(checkpoints, {"a": [0, 2], "b": [0, 2]}, {"a": [2, 3], "b": [2, 3]})
    merger = Merger({ref.identity: checkpoints[ref.name] for ref in cut.refs}, layout_of(checkpoints["a"]))
    for name in checkpoints["a"].tensors:
        assert torch.equal(merger.merge(cut, name), merger.merge(plain, name))


def test_layers_that_a_source_lacks_are_refused(checkpoints):
    recipe = recipe_of(checkpoints, {"a": [1, 3], "deep": [3, 5]}, {"deep": [3, 6]})
    message = r"slices\.1\.layers\.deep: expected layers within \[0, 5\], got \[3, 6\]"
    with pytest.raises(RecipeError, match=message):
        check_slices(recipe, {"a": 3, "deep": 5})
    check_slices(recipe, {"a": 3, "deep": 6})
    with pytest.raises(RecipeError, match=r"slices\.0\.layers\.a: expected layers within \[0, 3\]"):
        outputs_of(checkpoints, recipe_of(checkpoints, {"a": [1, 4]}))


def test_the_config_follows_the_layers(checkpoints):
    recipe = recipe_of(checkpoints, {"a": [0, 2], "b": [1, 3]}, {"b": [1, 3]})
    layout = layout_of(checkpoints["a"])
    config = {
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "layer_types": ["x", "y", "z"],
        "eos_token_id": [1, 2, 3],
        "mlp_only_layers": [1],
    }
    expected = {
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "layer_types": ["x", "y", "y", "z"],
        "eos_token_id": [1, 2, 3],
        "mlp_only_layers": [1, 2],
    }
    assert outlined_config(config, recipe, layout) == expected
    nested = {"text_config": config, "vision_config": {"num_hidden_layers": 3}}
    assert outlined_config(nested, recipe, layout) == {**nested, "text_config": expected}
    assert outlined_config(config, recipe_of(checkpoints), layout) == config


def test_the_config_of_a_deeper_source_ends_like_that_of_the_reference(checkpoints):
    recipe = recipe_of(checkpoints, {"a": [0, 1]}, {"deep": [1, 5]})
    found = outlined_config(
        {"num_hidden_layers": 3, "layer_types": ["x", "y", "z"]}, recipe, layout_of(checkpoints["a"])
    )
    assert found == {"num_hidden_layers": 5, "layer_types": ["x", "y", "z", "z", "z"]}
