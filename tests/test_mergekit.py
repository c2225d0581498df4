"""Mergekit's files: what they mean there is what they mean here.

The models in tests/data/mergekit were made by mergekit 0.1.5 itself; `Mergekit` restates in a few lines how
mergekit finds the value of a parameter.
"""

import pytest
import torch
from safetensors.torch import load_file

from evomerge.catalogue import CATALOGUE
from evomerge.errors import RecipeError
from evomerge.mergekit import from_mergekit, read_any_recipe
from evomerge.mergekit_methods import PEERS
from evomerge.recipe import parse_recipe
from tests.mergekit_models import DATA, READ, Mergekit, check_same, config_of, make_models, merged


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("name", READ)
def test_a_mergekit_file_merges_to_what_mergekit_makes_of_it(folder, name):
    found = merged(from_mergekit(config_of(name, folder), name))
    expected = load_file(DATA / f"{name}.safetensors")
    assert found.keys() == expected.keys()
    for tensor, values in expected.items():
        torch.testing.assert_close(found[tensor], values, rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", READ)
def test_every_tensor_gets_the_value_that_mergekit_gives_it(folder, name):
    config = config_of(name, folder)
    check_same(Mergekit(config), from_mergekit(config, name))


def test_either_kind_of_file_is_read(tmp_path):
    ours = parse_recipe({"method": "linear", "sources": [{"name": "a", "path": "./a"}]}, "r")
    (tmp_path / "ours.yaml").write_text(ours.to_yaml(), "utf-8")
    (tmp_path / "theirs.yaml").write_text("merge_method: linear\nmodels:\n- {model: ./a}\n", "utf-8")
    assert read_any_recipe(tmp_path / "ours.yaml").digest == ours.digest
    assert read_any_recipe(tmp_path / "theirs.yaml").digest == ours.digest


def theirs(**changes):
    found = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": "a"}, {"model": "b"}],
        **changes,
    }
    return {key: value for key, value in found.items() if value is not None}


@pytest.mark.parametrize(
    ("model", "path", "revision", "name"),
    [
        ("org/m@v1", "org/m", "v1", "m"),
        ({"model": {"path": "org/m", "revision": "v1"}}, "org/m", "v1", "m"),
        ("./modèle é", "./modèle é", None, "mod-le--"),
        ("x/" + "m" * 200, "x/" + "m" * 200, None, "m" * 90),
    ],
)
def test_models_are_named_after_their_last_part(model, path, revision, name):
    recipe = from_mergekit(theirs(models=[{"model": model}, {"model": "b"}]), "w")
    source = recipe.sources[0]
    assert (source.path, source.revision, source.name) == (path, revision, name)


def test_models_of_one_name_are_told_apart():
    recipe = from_mergekit(theirs(models=[{"model": "x/m"}, {"model": "y/m"}], base_model="z/m"), "w")
    assert [ref.name for ref in recipe.refs] == ["m-3", "m", "m-2"]


@pytest.mark.parametrize(
    ("rescale", "expected"), [(None, "l1"), (True, "l1"), (1, "l1"), (False, "none"), (0, "none")]
)
def test_dare_rescales_to_the_norm_unless_told_otherwise(rescale, expected):
    parameters = {} if rescale is None else {"rescale": rescale}
    recipe = from_mergekit(theirs(merge_method="dare_linear", parameters=parameters), "w")
    assert recipe.parameters["rescale"][0].value == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merge_method": "tis"}, 'merge_method: "tis" is not supported; did you mean "ties"?'),
        ({"merge_method": "iso_c"}, 'merge_method: "iso_c" is not supported; '),
        ({"modelss": []}, 'unknown key "modelss"; did you mean "models"?'),
        ({"modules": {"vision": {}}}, 'modules: only the module "default" alone is supported'),
        ({"models": None, "modules": {"default": {}}}, "expected either models or slices"),
        (
            {"models": None, "modules": {"default": {"model": []}}},
            'modules.default: unknown key "model"; did you mean "models"?',
        ),
        ({"models": None}, "expected either models or slices"),
        ({"models": {}}, "models: expected a list of mappings with a model each"),
        ({"models": [3]}, "models: expected a list of mappings with a model each"),
        ({"models": [{"modle": "a"}]}, 'models.0: unknown key "modle"; did you mean "model"?'),
        ({"models": [{}]}, "models.0: expected a path or hub id, got None"),
        (
            {"models": [{"model": {"model": "a", "override_architecture": "b"}}]},
            "models.0: override_architecture: not",
        ),
        ({"merge_method": "slerp", "base_model": None}, "base_model: missing; method slerp starts at"),
        ({"merge_method": "sce", "parameters": {"select_topk": "x"}}, "parameters.select_topk: expected a"),
        ({"parameters": {"rescale": True}}, "parameters.rescale: not supported; False is, got True"),
        ({"models": [{"model": "base"}, {"model": "base"}]}, "models.0: the base is there twice"),
        ({"base_model": None}, "base_model: missing; method ties works on deltas from a base"),
        (
            {"models": [{"model": "base", "parameters": {"weight": 1}}]},
            "models.0: the base takes no parameters",
        ),
        (
            {"parameters": {"wieght": 1}},
            'parameters.wieght: method "ties" has no parameter "wieght"; did you mean "weight"?',
        ),
        (
            {"models": [{"model": "a", "parameters": {"lambda": 1}}]},
            "models.0.parameters.lambda: this parameter belongs to the method as a whole",
        ),
        ({"parameters": [1]}, "parameters: expected a mapping"),
        (
            {"parameters": {"weight": [{"filtr": "mlp", "value": 1}]}},
            'parameters.weight: unknown key "filtr"; did you mean "filter"?',
        ),
        ({"parameters": {"weight": "x"}}, "sources.a.parameters.weight: expected a number, got 'x'"),
        ({"parameters": {"weight": [{"filter": "mlp"}]}}, "parameters.weight: expected a value or a list"),
        ({"parameters": {"weight": []}}, "parameters.weight: expected a value or a list of values, got []"),
        ({"parameters": {"weight": [[1, 2]]}}, "parameters.weight: expected a value or a list of values"),
        ({"parameters": {"density": 2}}, "sources.a.parameters.density: expected 0.0 to 1.0, got 2.0"),
        ({"dtype": "int8"}, "dtype: expected 'float32', 'bfloat16' or 'float16', got \"int8\""),
        ({"merge_method": "linear"}, "base_model: base takes part in the merge; give its weight"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(changes, message):
    with pytest.raises(RecipeError) as caught:
        from_mergekit(theirs(**changes), "w.yaml")
    assert str(caught.value).startswith(f"w.yaml: {message}")
    assert "\n" not in str(caught.value)


def test_the_catalogue_says_which_methods_mergekit_has():
    assert {name for name, method in CATALOGUE.items() if method.mergekit} <= set(PEERS)


def test_parameters_that_a_file_leaves_out_have_the_values_of_mergekit():
    recipe = from_mergekit(theirs(merge_method="model_stock"), "w")
    values = {name: setting[0].value for name, setting in recipe.parameters.items()}
    assert (values["filter_wise"], values["clamp"]) == (False, False)


def test_parameters_without_effect_in_mergekit_are_passed_over():
    plain = from_mergekit(theirs(merge_method="task_arithmetic"), "w")
    given = theirs(
        merge_method="task_arithmetic", parameters={"density": 0.3, "rescale": 1, "int8_mask": True}
    )
    given["models"][0]["parameters"] = {"density": [0.1, 0.9]}
    assert from_mergekit(given, "w").digest == plain.digest


def test_a_base_that_is_a_model_like_any_other_gives_config_and_tokenizer():
    models = [{"model": "a"}, {"model": "b"}]
    recipe = from_mergekit({"merge_method": "karcher", "base_model": "b", "models": models}, "w")
    assert recipe.reference.name == "b"
    assert (recipe.base, recipe.tokenizer) == (None, None)


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16"])
def test_the_dtype_is_that_of_the_output(dtype):
    assert from_mergekit(theirs(dtype="float32", out_dtype=dtype), "w").dtype == "bfloat16"
    assert from_mergekit(theirs(dtype=dtype), "w").dtype == "bfloat16"
