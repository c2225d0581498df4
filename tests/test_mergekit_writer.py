"""Files written for mergekit: every tensor has there the value that it has in the recipe."""

import json

import pytest
import torch
import yaml

from evomerge.checkpoints.layout import Layout, layout_of
from evomerge.checkpoints.source import Checkpoint
from evomerge.errors import RecipeError
from evomerge.mergekit import from_mergekit
from evomerge.mergekit_writer import to_mergekit
from evomerge.recipe import parse_recipe, value_at
from evomerge.slices import Output, outline
from tests.checkpoints.tiny import make_llama, make_model
from tests.mergekit_models import LAYERS, READ, Mergekit, check_same, config_of, make_models, reference_layout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = make_models(tmp_path_factory.mktemp("models"))
    make_model(path / "neox", "gpt_neox", layers=LAYERS, hidden=8)
    make_model(path / "gemma", "gemma2", layers=LAYERS, hidden=8)
    make_llama(path / "single", layers=1, hidden=8)
    return path


def layout(path) -> Layout:
    return layout_of(Checkpoint.open(path))


def linear(path, **changes):
    return {"method": "linear", "sources": [{"name": "a", "path": str(path), "parameters": changes}]}


@pytest.mark.parametrize("name", READ)
def test_a_mergekit_file_that_is_read_and_written_means_the_same(folder, name):
    recipe = from_mergekit(config_of(name, folder), name)
    plain = json.loads(json.dumps(to_mergekit(recipe, reference_layout(recipe))))
    check_same(Mergekit(plain), recipe)
    again = from_mergekit(plain, name)
    assert again.slices == recipe.slices
    assert [(ref.name, ref.path) for ref in again.refs] == [(ref.name, ref.path) for ref in recipe.refs]
    for output in outline(recipe, reference_layout(recipe)).values():
        for owner, other in zip((recipe, *recipe.sources), (again, *again.sources), strict=True):
            if owner is recipe or owner.name in output.inputs:
                for parameter, setting in owner.parameters.items():
                    value = value_at(other.parameters[parameter], output.place)
                    assert value == pytest.approx(value_at(setting, output.place)), (parameter, output)


WEIGHTS = {
    "one number": 0.3,
    "anchors": [0.1, 0.9, 0.4],
    "a value for each layer": [0.1, 0.2, 0.3],
    "roles": [
        {"role": "attention", "value": [0.1, 0.8]},
        {"role": "mlp", "value": 0.3},
        {"role": "norm", "value": [0.6, 0.2]},
        {"role": "embedding", "value": 0.2},
        {"role": "head", "value": 0.9},
    ],
    "a head of its own and anchors": [{"role": "head", "value": 0.05}, {"value": [0.2, 0.7]}],
    "parts of names": [{"match": "q_proj", "value": [0.9, 0.1]}, {"match": "layers.1.", "value": 0.4}],
    "role and part at once": [{"role": "norm", "match": "layers.1.", "value": 0.4}, {"value": [0.3, 0.5]}],
    "what has no role": [{"role": "other", "value": 0.2}, {"value": [0.3, 0.6]}],
    "a part that is in the head's name": [{"match": "head", "value": [0.9, 0.1]}],
    "zero": [{"role": "mlp", "value": 0.0}, {"value": [0.0, 1.0]}],
}


def alone(place):
    """A tensor of a model that is merged from one source."""
    return Output(place, {"a": place.name})


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("family", ["a", "neox", "gemma", "single"])
def test_every_tensor_has_in_the_written_file_the_value_of_the_recipe(folder, family, weight):
    recipe = parse_recipe(linear(folder / family, weight=weight), "r")
    places = layout(folder / family)
    there = Mergekit(to_mergekit(recipe, places), places.num_layers)
    for place in places.places.values():
        expected = value_at(recipe.sources[0].parameters["weight"], place)
        assert there.value("weight", alone(place), "a", recipe.sources[0].path) == pytest.approx(expected), (
            place
        )


def test_the_only_layer_of_a_model_lies_at_the_gradients_end_in_mergekit(folder):
    recipe = parse_recipe(linear(folder / "single", weight=[0.2, 0.6]), "r")
    written = to_mergekit(recipe, layout(folder / "single"))["models"][0]["parameters"]["weight"]
    exceptions = {item["filter"]: item["value"] for item in written if "filter" in item}
    assert exceptions["model.layers.0.self_attn.q_proj.weight"] == 0.2
    assert exceptions["lm_head.weight"] == 0.6


def test_written_files_hold_no_aliases(folder):
    recipe = parse_recipe(linear(folder / "neox", weight=WEIGHTS["roles"]), "r")
    assert "&" not in yaml.safe_dump(to_mergekit(recipe, layout(folder / "neox")))


def dare(folder, **parameters):
    source = {"name": "a", "path": str(folder / "a"), "parameters": parameters.pop("source")}
    return parse_recipe(
        {
            "method": "dare_linear",
            "base": {"name": "base", "path": str(folder / "base")},
            "sources": [source],
            "parameters": parameters,
        },
        "r",
    )


@pytest.mark.parametrize(
    ("weight", "density"),
    [
        (0.6, 0.5),
        ([0.2, 0.8], 0.5),
        (0.6, [0.2, 1.0]),
        ([{"role": "mlp", "value": 0.1}, {"value": 0.9}], [{"role": "mlp", "value": 0.5}, {"value": 0.2}]),
        ([{"role": "mlp", "value": 0.1}, {"value": [0.9, 0.2]}], [{"match": "q_proj", "value": [0.5, 0.8]}]),
        (0.6, [{"role": "mlp", "value": 0.0}, {"value": 0.5}]),
    ],
)
def test_rescaling_by_density_moves_into_the_weights(folder, weight, density):
    recipe = dare(folder, source={"weight": weight, "density": density})
    written = to_mergekit(recipe, layout(folder / "a"))
    assert written["parameters"]["rescale"] is False
    there, parameters = Mergekit(written), recipe.sources[0].parameters
    for place in layout(folder / "a").places.values():
        keep = value_at(parameters["density"], place)
        assert there.value("density", alone(place), "a", str(folder / "a")) == pytest.approx(keep)
        expected = value_at(parameters["weight"], place) / keep if keep else 0.0
        assert there.value("weight", alone(place), "a", str(folder / "a")) == pytest.approx(expected)


def test_rescaling_by_density_and_normalising_at_once_cannot_be_written(folder):
    with pytest.raises(RecipeError, match="cannot rescale by 1/density and normalise"):
        to_mergekit(dare(folder, source={"density": 0.5}, normalize=True), layout(folder / "a"))
    written = to_mergekit(
        dare(folder, source={"density": 0.5}, normalize=True, rescale="l1"), layout(folder / "a")
    )
    assert written["parameters"] | {"lambda": 1.0} == {"lambda": 1.0, "normalize": True, "rescale": True}


def test_the_output_has_the_recipes_dtype_or_that_of_its_reference(folder, tmp_path):
    half = make_llama(tmp_path / "half", layers=1, hidden=8, dtype=torch.bfloat16)
    found = {}
    for path, dtype in (
        (half, None),
        (half, "float16"),
        (folder / "single", None),
        (tmp_path / "absent", None),
    ):
        recipe = parse_recipe({**linear(path), "dtype": dtype}, "r")
        written = to_mergekit(recipe, layout(folder / "single"))
        found[path.name, dtype] = (written.get("dtype"), written.get("out_dtype"))
    assert found == {
        ("half", None): ("float32", "bfloat16"),
        ("half", "float16"): ("float32", "float16"),
        ("single", None): ("float32", "float32"),
        ("absent", None): (None, None),
    }


def test_base_order_tokenizer_and_revision_are_written(folder):
    recipe = parse_recipe(
        {
            "method": "slerp",
            "sources": [
                {"name": "x", "path": "org/x", "revision": "v1"},
                {"name": "y", "path": str(folder / "b")},
            ],
            "parameters": {"t": 0.3},
            "tokenizer": "y",
            "dtype": "bfloat16",
        },
        "r",
    )
    first = {"model": {"path": "org/x", "revision": "v1"}}
    written = to_mergekit(recipe, layout(folder / "a"))
    assert written == {
        "merge_method": "slerp",
        "models": [{"model": first}, {"model": str(folder / "b")}],
        "base_model": first,
        "parameters": {"t": 0.3},
        "dtype": "float32",
        "out_dtype": "bfloat16",
        "tokenizer_source": str(folder / "b"),
    }
    assert from_mergekit(written, "w").digest == recipe.digest


def deltas(folder, method, source=None, **parameters):
    sources = [{"name": name, "path": str(folder / name), "parameters": source or {}} for name in ("a", "b")]
    base = {"name": "base", "path": str(folder / "base")}
    return parse_recipe({"method": method, "base": base, "sources": sources, "parameters": parameters}, "r")


@pytest.mark.parametrize(
    "scale", [1.3, [0.4, 0.9, 0.2], [{"role": "mlp", "value": [0.2, 0.7]}, {"value": 0.6}]]
)
@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.0), (0.4, 0.8), (1.0, 0.0)])
def test_growth_of_the_merged_delta_with_depth_moves_into_lambda(folder, scale, alpha, beta):
    recipe = deltas(folder, "ties", **{"lambda": scale}, lines_alpha=alpha, lines_beta=beta)
    there = Mergekit(to_mergekit(recipe, layout(folder / "base")))
    for place in layout(folder / "base").places.values():
        factor = alpha if place.layer is None else alpha + beta * place.depth
        expected = value_at(recipe.parameters["lambda"], place) * factor
        assert there.value("lambda", alone(place)) == pytest.approx(expected), place


@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [
        ("ties", {"variant": "paper"}, "mergekit has no variant for ties; it does what mergekit does here"),
        ("dare_linear", {"rescale": "l2"}, 'mergekit cannot rescale by "l2"; it knows l1 and none'),
        ("della", {"rescale": "expectation"}, "mergekit's della cannot rescale by 1/probability"),
        ("model_stock", {"clamp": True}, "mergekit has no clamp for model_stock; it does what False does"),
        ("model_stock", {"clamp": False, "lambda": 0.5}, "mergekit has no lambda for model_stock"),
        ("model_stock", {"clamp": False, "lines_beta": 0.5}, "mergekit has no lines_beta for model_stock"),
        ("iso_c", {}, "mergekit has no method iso_c"),
    ],
)
def test_what_mergekit_lacks_is_refused_by_name(folder, method, parameters, message):
    recipe = deltas(folder, method, **parameters)
    with pytest.raises(RecipeError) as caught:
        to_mergekit(recipe, layout(folder / "base"))
    assert str(caught.value).startswith(message)
