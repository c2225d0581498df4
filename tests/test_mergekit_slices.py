"""Slices in mergekit's files: which layers they name, and which of them are no slices at all."""

import json

import pytest

from evomerge.errors import RecipeError
from evomerge.mergekit import from_mergekit
from evomerge.mergekit_writer import to_mergekit
from evomerge.recipe import parse_recipe, value_at
from evomerge.slices import outline
from tests.mergekit_models import Mergekit, check_same, make_models, reference_layout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


def sliced(folder, *pieces, method="linear", **changes):
    """A config of slices that are given as lists of (model, first, end, parameters)."""
    slices = [
        {
            "sources": [
                {"model": f"{folder}/{model}", "layer_range": [first, end], "parameters": parameters[0]}
                if parameters
                else {"model": f"{folder}/{model}", "layer_range": [first, end]}
                for model, first, end, *parameters in piece
            ]
        }
        for piece in pieces
    ]
    weight = {"parameters": {"weight": 1.0}} if method == "linear" else {}
    return {"merge_method": method, "slices": slices, **weight, **changes}


def test_a_slice_over_all_layers_is_no_slice(folder):
    recipe = from_mergekit(sliced(folder, [("a", 0, 3), ("b", 0, 3)]), "w")
    assert recipe.slices == ()
    models = [{"model": f"{folder}/{name}"} for name in "ab"]
    plain = {"merge_method": "linear", "models": models, "parameters": {"weight": 1.0}}
    assert recipe.digest == from_mergekit(plain, "w").digest


@pytest.mark.parametrize(
    "pieces",
    [
        [[("a", 0, 2)]],
        [[("a", 1, 3)]],
        [[("a", 0, 3)], [("a", 0, 3)]],
        [[("a", 0, 3), ("deep", 0, 3)]],
        [[("a", 0, 3), ("a", 0, 3)]],
        [[("absent", 0, 3)]],
    ],
)
def test_other_layers_make_slices(folder, pieces):
    recipe = from_mergekit(sliced(folder, *pieces), "w")
    spans = [[span for _, *span in piece] for piece in pieces]
    assert [[list(span) for span in piece.layers.values()] for piece in recipe.slices] == spans


def test_a_model_that_a_slice_names_twice_is_two_sources(folder):
    twice = [("a", 0, 2, {"weight": 0.2}), ("a", 1, 3, {"weight": 0.8})]
    recipe = from_mergekit(sliced(folder, twice, [("a", 0, 1), ("b", 0, 1)]), "w")
    assert [source.name for source in recipe.sources] == ["a", "a-2", "b"]
    assert [dict(piece.layers) for piece in recipe.slices] == [
        {"a": (0, 2), "a-2": (1, 3)},
        {"a": (0, 1), "b": (0, 1)},
    ]
    weights = [
        [value_at(source.parameters["weight"], output.place) for source in recipe.sources[:2]]
        for output in outline(recipe, reference_layout(recipe)).values()
        if output.place.slice == 0
    ]
    assert all(weight == [0.2, 0.8] for weight in weights)
    with pytest.raises(RecipeError, match=r"slices\.0: mergekit takes a model once in a slice"):
        to_mergekit(recipe, reference_layout(recipe))


def test_order_is_kept_where_it_has_a_meaning(folder):
    pieces = [[("a", 0, 1), ("b", 0, 1)], [("b", 1, 2), ("a", 1, 2)]]
    turned = from_mergekit(sliced(folder, *pieces, method="nuslerp", parameters={"weight": 1.0}), "w")
    assert [list(piece.layers) for piece in turned.slices] == [["a", "b"], ["b", "a-2"]]
    alike = from_mergekit(sliced(folder, *pieces), "w")
    assert [source.name for source in alike.sources] == ["a", "b"]


def test_slerp_starts_at_the_base_of_each_slice(folder):
    config = sliced(
        folder,
        [("a", 0, 1), ("b", 0, 1)],
        [("a", 1, 3), ("b", 1, 3)],
        method="slerp",
        base_model=f"{folder}/a",
        parameters={"t": [0.2, 0.4]},
    )
    config["slices"][1]["base_model"] = f"{folder}/b"
    recipe = from_mergekit(config, "w")
    assert [list(piece.layers) for piece in recipe.slices] == [["a", "b"], ["b", "a-2"]]
    written = to_mergekit(recipe, reference_layout(recipe))
    assert written["base_model"] == f"{folder}/a"
    assert [piece.get("base_model") for piece in written["slices"]] == [None, f"{folder}/b"]


FILTERS = [
    "experts.2.",
    "w1",
    "layers.2.",
    "layers.2.mlp",
    ".layers.0.",
    "model.layers.1.self_attn.q_proj",
    "mlp",
    "norm",
    "lm_head",
]


@pytest.mark.parametrize("part", FILTERS)
def test_filters_of_a_model_see_the_names_of_its_own_tensors(folder, part):
    weight = [{"filter": part, "value": [0.1, 0.3]}, {"value": 0.9}]
    config = sliced(
        folder,
        [("a", 0, 1), ("b", 2, 3, {"weight": weight})],
        [("b", 0, 3, {"weight": weight}), ("a", 0, 3)],
    )
    recipe = from_mergekit(config, "w")
    check_same(Mergekit(config), recipe)
    plain = json.loads(json.dumps(to_mergekit(recipe, reference_layout(recipe))))
    check_same(Mergekit(plain), recipe)


@pytest.mark.parametrize("part", ["layers.1", "1.mlp", ".2.", "rs.1.mlp"])
def test_filters_that_depend_on_layer_numbers_otherwise_are_refused(folder, part):
    weight = {"filter": part, "value": 0.1}
    config = sliced(folder, [("a", 0, 1)], [("a", 0, 3, {"weight": weight})])
    with pytest.raises(RecipeError, match=rf'the filter "{part}" depends on layer numbers'):
        from_mergekit(config, "w")
    config = sliced(folder, [("a", 0, 1)], [("a", 1, 3, {"weight": weight})])
    check_same(Mergekit(config), from_mergekit(config, "w"))


WEIGHTS = {
    "one number": 0.3,
    "anchors over the model": [0.1, 0.9, 0.4],
    "anchors over a slice": [{"slice": 1, "value": [0.1, 0.9]}, {"value": 0.2}],
    "slices and roles": [
        {"slice": 0, "role": "mlp", "value": [0.3, 0.2]},
        {"slice": 1, "match": "q_proj", "value": 0.8},
        {"role": "norm", "value": [0.4, 0.6]},
        {"slice": 2, "value": [0.7, 0.1]},
        {"value": [0.15, 0.35]},
    ],
    "parts of names": [{"match": "layers.3.", "value": 0.8}, {"match": "head", "value": 0.7}, {"value": 0.5}],
}


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_every_tensor_has_in_the_written_file_the_value_of_the_recipe(folder, weight):
    recipe = parse_recipe(
        {
            "method": "linear",
            "sources": [
                {"name": "a", "path": f"{folder}/a", "parameters": {"weight": weight}},
                {"name": "deep", "path": f"{folder}/deep", "parameters": {"weight": weight}},
            ],
            "slices": [
                {"layers": {"a": [0, 2], "deep": [3, 5]}},
                {"layers": {"deep": [0, 3]}},
                {"layers": {"deep": [4, 5], "a": [2, 3]}},
            ],
        },
        "r",
    )
    there = Mergekit(to_mergekit(recipe, reference_layout(recipe)))
    for output in outline(recipe, reference_layout(recipe)).values():
        for source in recipe.sources:
            if source.name in output.inputs:
                expected = value_at(source.parameters["weight"], output.place)
                assert there.value("weight", output, source.name, source.path) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual_weight": 1}, 'slices.0: unknown key "residual_weight"'),
        ({"sources": []}, "slices.0.sources: expected a list of mappings with a model each"),
        ({"sources": [{"model": "a"}]}, "slices.0.sources.0: layer_range: expected the first layer"),
        ({"sources": [{"model": "a", "layer_range": [2, 1]}]}, "slices.0.sources.0: layer_range: expected"),
        (
            {"sources": [{"model": "a", "layer_range": [0, 1, 2]}]},
            "slices.0.sources.0: layer_range: expected",
        ),
        ({"sources": [{"model": "a", "layers": [0, 1]}]}, 'slices.0.sources.0: unknown key "layers"'),
        (
            {"sources": [{"model": "a", "layer_range": [0, 2]}, {"model": "b", "layer_range": [0, 1]}]},
            "slices.0.layers.b: 1 layers, but 2 of a",
        ),
        ({"parameters": {"wieght": 1}}, "slices.0.parameters.wieght: method"),
    ],
)
def test_what_is_wrong_in_a_slice_is_refused_by_name(folder, change, message):
    config = sliced(folder, [("a", 0, 1)])
    config["slices"][0] |= change
    with pytest.raises(RecipeError) as caught:
        from_mergekit(config, "w.yaml")
    assert str(caught.value).startswith(f"w.yaml: {message}")


def test_bases_that_mergekit_would_refuse_are_refused(folder):
    first, second = [("base", 0, 1), ("a", 0, 1)], [("base", 1, 2), ("b", 1, 2)]
    with pytest.raises(RecipeError, match=r"slices\.1: the base model .*/base is missing"):
        from_mergekit(sliced(folder, first, second[1:], method="ties", base_model=f"{folder}/base"), "w")
    config = sliced(folder, first, second, method="ties", base_model=f"{folder}/base")
    config["slices"][1]["base_model"] = f"{folder}/b"
    with pytest.raises(RecipeError, match=r"slices\.1\.base_model: all slices have one base"):
        from_mergekit(config, "w")


def test_more_models_in_the_last_slice_than_in_the_first_are_refused(folder):
    config = sliced(folder, [("a", 0, 1)], [("a", 1, 2), ("b", 1, 2)])
    with pytest.raises(RecipeError, match=r"slices\.1\.sources: more models than in the first slice"):
        from_mergekit(config, "w")
    layers = [{"layers": {"a": [0, 1]}}, {"layers": {"a": [1, 2], "b": [1, 2]}}]
    sources = [{"name": name, "path": f"{folder}/{name}"} for name in "ab"]
    recipe = parse_recipe({"method": "linear", "sources": sources, "slices": layers}, "r")
    with pytest.raises(RecipeError, match=r"slices\.1: more sources than in the first slice"):
        to_mergekit(recipe, reference_layout(recipe))
