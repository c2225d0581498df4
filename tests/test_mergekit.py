"""Mergekit's files: what they mean there is what they mean here.

The expected numbers of `MEASURED` were computed by mergekit 0.1.5 itself (see `probe` for what they are);
`Mergekit` restates in a few lines how mergekit finds the value of a parameter.
"""

import json
import math

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from evomerge.catalogue import CATALOGUE
from evomerge.checkpoints.layout import Layout, layout_of
from evomerge.errors import RecipeError
from evomerge.mergekit import from_mergekit, read_any_recipe
from evomerge.mergekit_writer import to_mergekit
from evomerge.merging.merger import Merger
from evomerge.merging.stream import open_sources
from evomerge.recipe import parse_recipe, value_at
from tests.checkpoints.tiny import make_llama, make_model

LAYERS = 3
PROBED = (
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.layers.2.input_layernorm.weight",
    "model.norm.weight",
    "lm_head.weight",
)

CONFIGS = {
    "linear": """
        merge_method: linear
        models:
          - {model: a, parameters: {weight: 0.3}}
          - {model: b, parameters: {weight: [0.9, 0.1]}}
        dtype: float32
        """,
    "linear_filters": """
        merge_method: linear
        models:
          - model: a
            parameters:
              weight:
                - {filter: mlp, value: [0.0, 1.0]}
                - {filter: norm, value: [0.2, 0.5, 0.9]}
                - {filter: embed_tokens, value: 0.8}
                - {value: [0.5, 0.1]}
          - {model: b, parameters: {weight: {filter: "*", value: 0.4}}}
        parameters: {normalize: false}
        dtype: float32
        """,
    "linear_with_base": """
        merge_method: linear
        base_model: base
        models:
          - {model: a, parameters: {weight: 0.3}}
          - {model: b}
        parameters: {weight: 0.5}
        dtype: float32
        """,
    "slerp": """
        merge_method: slerp
        base_model: b
        slices:
          - sources:
              - {model: a, layer_range: [0, 3]}
              - {model: b, layer_range: [0, 3]}
        parameters:
          t:
            - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
            - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
            - {value: [0.5, 0.2]}
        dtype: float32
        """,
    "slerp_in_slice": """
        merge_method: slerp
        base_model: a
        slices:
          - sources:
              - {model: a, layer_range: [0, 3]}
              - {model: b, layer_range: [0, 3]}
            parameters: {t: [{filter: mlp, value: 0.2}]}
        parameters: {t: 0.7}
        dtype: float32
        """,
    "slerp_base_unlisted": """
        merge_method: slerp
        base_model: a
        models: [{model: b}]
        parameters: {t: [0.1, 0.6]}
        dtype: float32
        """,
    "task_arithmetic": """
        merge_method: task_arithmetic
        base_model: base
        models:
          - {model: base}
          - {model: a, parameters: {weight: [{filter: mlp, value: 0.3}]}}
          - {model: b, parameters: {weight: 0.8}}
        parameters: {weight: 0.45, lambda: [0.6, 1.2], normalize: 1, int8_mask: true}
        dtype: float32
        """,
    "ties": """
        merge_method: ties
        base_model: base
        models:
          - {model: base}
          - {model: a, parameters: {weight: 0.5, density: 0.5}}
          - {model: b, parameters: {weight: [0, 0.3, 1], density: [1, 0.2]}}
        parameters: {normalize: true, int8_mask: true}
        dtype: float32
        """,
    "ties_plain_sum": """
        merge_method: ties
        base_model: base
        models:
          - {model: a, parameters: {density: 0.7}}
          - {model: b, parameters: {weight: -0.4, density: 0.4}}
        parameters: {weight: 0.6, normalize: 0.0, lambda: 0.5}
        dtype: float32
        """,
    "dare_ties_that_drops_nothing": """
        merge_method: dare_ties
        base_model: base
        models:
          - {model: a, parameters: {weight: [0.5, 1.0]}}
          - {model: b, parameters: {weight: 0.8}}
        dtype: float32
        """,
}

MEASURED = {
    "linear": (-0.904527, 1.342026, 0.176551, 0.072008, -1.905069, 0.673686),
    "linear_filters": (-0.395795, 1.217051, -0.384131, -0.20071, -0.947054, 0.769455),
    "linear_with_base": (-0.26491, 1.128714, 0.10221, -1.00685, -1.014612, 0.778606),
    "slerp": (-0.794431, 1.333637, -1.073924, -2.552179, -1.508996, 1.167341),
    "slerp_in_slice": (-1.056827, 1.913153, -1.39382, -2.263659, -2.293925, 0.979856),
    "slerp_base_unlisted": (-0.067877, 1.601634, -0.902426, -1.900843, 0.526115, 1.188774),
    "task_arithmetic": (-0.258636, 1.119711, 0.464811, -1.674458, -1.03387, 0.774497),
    "ties": (3.667818, 1.077791, -3.149433, 0.882917, 2.103886, 2.545652),
    "ties_plain_sum": (-0.998758, 0.967855, -1.355211, 0.92882, 0.942642, 0.832355),
    "dare_ties_that_drops_nothing": (0.693002, 1.64613, -1.572008, -1.164136, -1.830421, 0.854428),
}


class Mergekit:
    """How mergekit reads a config: the value of a parameter for one tensor.

    The model's own settings come first, then the slice's, then those of the whole config; of a list of
    filters the first that is in the name counts, and if none is, the next place is asked; a gradient runs
    from the first layer to the last, and everything outside the layers gets its first value.
    """

    def __init__(self, config):
        self.config = config
        self.slice = (config.get("slices") or [{}])[0]
        self.entries = config.get("models") or self.slice["sources"]

    def value(self, name, place, model=None):
        own = [e.get("parameters") or {} for e in self.entries if e["model"] == model]
        for settings in (*own, self.slice.get("parameters") or {}, self.config.get("parameters") or {}):
            if name in settings:
                value = self.resolved(settings[name], place)
                if value is not None:
                    return value
        return None

    def resolved(self, setting, place):
        if isinstance(setting, dict):
            setting = [setting]
        if isinstance(setting, list) and all(isinstance(item, dict) for item in setting):
            for item in setting:
                if item.get("filter") in (None, "*") or item["filter"] in place.name:
                    return self.resolved(item["value"], place)
            return None
        if isinstance(setting, list):
            at = (0.0 if place.layer is None else place.depth) * (len(setting) - 1)
            left, right = setting[math.floor(at)], setting[math.ceil(at)]
            return left + (right - left) * (at - math.floor(at))
        return setting


def config_of(name, folder):
    """A config of `CONFIGS` with its models in a folder."""
    config = yaml.safe_load(CONFIGS[name])
    for entry in config.get("models") or config["slices"][0]["sources"]:
        entry["model"] = str(folder / entry["model"])
    if "base_model" in config:
        config["base_model"] = str(folder / config["base_model"])
    return config


def fill(path, seed):
    """Give a checkpoint the weights cos(f * i + g), with f and g from the model and the tensor's place."""
    tensors = load_file(path / "model.safetensors")
    for place, name in enumerate(sorted(tensors)):
        index = torch.arange(tensors[name].numel(), dtype=torch.float64)
        values = torch.cos((0.31 + 0.17 * seed) * index + 0.7 * place + 1.3 * seed)
        tensors[name] = values.float().reshape(tensors[name].shape)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def probe(tensor):
    """One number that depends on every entry: the scalar product with cos(i)."""
    return float(torch.dot(tensor.double().reshape(-1), torch.cos(torch.arange(tensor.numel()).double())))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "a", "b")):
        fill(make_llama(path / name, layers=LAYERS, hidden=8, vocab=64), seed)
    make_model(path / "neox", "gpt_neox", layers=LAYERS, hidden=8)
    make_model(path / "gemma", "gemma2", layers=LAYERS, hidden=8)
    make_llama(path / "single", layers=1, hidden=8)
    return path


def layout(path) -> Layout:
    return layout_of(open_sources(parse_recipe(linear(path), "r").refs)["a"])


def linear(path, **changes):
    return {"method": "linear", "sources": [{"name": "a", "path": str(path), "parameters": changes}]}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_mergekit_file_merges_to_what_mergekit_makes_of_it(folder, name):
    recipe = from_mergekit(config_of(name, folder), name)
    opened = open_sources(recipe.refs)
    merger = Merger(
        {ref.identity: opened[ref.name] for ref in recipe.refs}, layout_of(opened[recipe.reference.name])
    )
    found = [probe(merger.merge(recipe, tensor)) for tensor in PROBED]
    assert found == pytest.approx(MEASURED[name], abs=2e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_gets_the_value_that_mergekit_gives_it(folder, name):
    config = config_of(name, folder)
    there, recipe = Mergekit(config), from_mergekit(config, name)
    check_same(there, recipe, layout(folder / "a"))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_mergekit_file_that_is_read_and_written_means_the_same(folder, name):
    recipe = from_mergekit(config_of(name, folder), name)
    written = to_mergekit(recipe, layout(folder / "a"))
    plain = json.loads(json.dumps(written))
    check_same(Mergekit(plain), recipe, layout(folder / "a"))
    again = from_mergekit(plain, name)
    for source, other in zip(recipe.sources, again.sources, strict=True):
        for parameter, setting in source.parameters.items():
            for place in layout(folder / "a").places.values():
                assert value_at(other.parameters[parameter], place) == pytest.approx(value_at(setting, place))


def check_same(there, recipe, layout):
    """Every parameter that mergekit finds a value for has this value in the recipe."""
    checked = 0
    for place in layout.places.values():
        pairs = [(None, recipe.parameters), *((source.path, source.parameters) for source in recipe.sources)]
        for model, settings in pairs:
            for parameter, setting in settings.items():
                expected = there.value(parameter, place, model)
                if parameter == "rescale":
                    expected = "none" if expected is False else "l1"
                if expected is not None:
                    found = value_at(setting, place)
                    same = found == expected if isinstance(found, str) else math.isclose(found, expected)
                    assert same, (parameter, place, found, expected)
                    checked += 1
    assert checked


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


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("family", ["a", "neox", "gemma", "single"])
def test_every_tensor_has_in_the_written_file_the_value_of_the_recipe(folder, family, weight):
    recipe = parse_recipe(linear(folder / family, weight=weight), "r")
    places = layout(folder / family)
    there = Mergekit(to_mergekit(recipe, places))
    for place in places.places.values():
        expected = value_at(recipe.sources[0].parameters["weight"], place)
        if places.num_layers == 1 and place.layer is not None:
            continue  # mergekit puts the only layer at the gradient's end; see the next test
        assert there.value("weight", place, recipe.sources[0].path) == pytest.approx(expected), place


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
        assert there.value("density", place, str(folder / "a")) == pytest.approx(keep)
        expected = value_at(parameters["weight"], place) / keep if keep else 0.0
        assert there.value("weight", place, str(folder / "a")) == pytest.approx(expected)


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


def test_either_kind_of_file_is_read(tmp_path):
    ours = parse_recipe({**linear("./a"), "parameters": {}}, "r")
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
    ("changes", "tokenizer"),
    [
        ({}, None),
        ({"tokenizer_source": "union"}, None),
        ({"tokenizer_source": "base"}, "base"),
        ({"tokenizer_source": "b"}, "b"),
        ({"tokenizer": {"source": "b"}}, "b"),
    ],
)
def test_the_tokenizer_is_that_of_a_model(changes, tokenizer):
    assert from_mergekit(theirs(**changes), "w").tokenizer == tokenizer


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
        ({"merge_method": "passthrough"}, 'merge_method: "passthrough" is not supported; known: '),
        ({"modules": {}}, 'unknown key "modules"; did you mean "models"?'),
        ({"chat_template": "auto"}, "chat_template: not supported; the tokenizer's own template is kept"),
        ({"models": None}, "expected either models or slices"),
        ({"models": {}}, "models: expected a list of mappings with a model each"),
        ({"models": [3]}, "models: expected a list of mappings with a model each"),
        ({"models": [{"modle": "a"}]}, 'models.0: unknown key "modle"; did you mean "model"?'),
        ({"models": [{}]}, "models.0: expected a path or hub id, got None"),
        (
            {"models": [{"model": "a+lora"}]},
            "models.0: a+lora: adapters are not supported yet; merge the adapter first",
        ),
        ({"base_model": None}, "base_model: missing; method ties works on deltas from a base"),
        (
            {"models": [{"model": "base", "parameters": {"weight": 1}}]},
            "models.0: the base takes no parameters",
        ),
        ({"parameters": {"wieght": 1}}, 'method "ties" has no parameter "wieght"; did you mean "weight"?'),
        (
            {"models": [{"model": "a", "parameters": {"lambda": 1}}]},
            "sources.a.parameters.lambda: this parameter belongs to the method as a whole",
        ),
        ({"parameters": [1]}, "parameters: expected a mapping"),
        (
            {"parameters": {"weight": [{"filtr": "mlp", "value": 1}]}},
            'parameters.weight: unknown key "filtr"; did you mean "filter"?',
        ),
        ({"parameters": {"weight": "x"}}, "sources.a.parameters.weight: expected a number, got 'x'"),
        ({"parameters": {"weight": [{"filter": "mlp"}]}}, "sources.0.parameters.weight.0.value: "),
        ({"parameters": {"density": 2}}, "sources.a.parameters.density: expected 0.0 to 1.0, got 2.0"),
        ({"tokenizer_source": "c"}, "tokenizer_source: c is none of the models"),
        ({"tokenizer": {"source": "a", "tokens": {}}}, "tokenizer.tokens: token surgery is not supported"),
        ({"dtype": "int8"}, "dtype: expected 'float32', 'bfloat16' or 'float16', got \"int8\""),
        ({"merge_method": "linear"}, "base_model: base takes part in the merge; give its weight"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(changes, message):
    with pytest.raises(RecipeError) as caught:
        from_mergekit(theirs(**changes), "w.yaml")
    assert str(caught.value).startswith(f"w.yaml: {message}")
    assert "\n" not in str(caught.value)


def sliced(folder, *ranges, **changes):
    sources = [{"model": str(folder / "a"), "layer_range": list(span)} for span in ranges]
    return {
        "merge_method": "linear",
        "slices": [{"sources": sources[:1], **changes}, *({} for _ in sources[1:])],
    }


def test_slices_must_hold_all_layers_of_a_model_at_hand(folder):
    assert from_mergekit(sliced(folder, (0, LAYERS)), "w").sources[0].name == "a"
    for config, message in (
        (
            sliced(folder, (0, 2)),
            r"slices.0.sources.0: layer_range: only all layers .* \[0, 3\] .*, got \[0, 2\]",
        ),
        (sliced(folder, (1, 3)), r"only all layers"),
        (sliced(folder, (0, 2), (2, 3)), r"slices: only a single slice over all layers is supported, got 2"),
        (sliced(folder, (0, 3), residual_weight=1), r'slices.0: unknown key "residual_weight"'),
        (sliced(folder / "absent", (0, 3)), r"layer_range: cannot tell whether \[0, 3\] are all layers"),
    ):
        with pytest.raises(RecipeError, match=message):
            from_mergekit(config, "w")


def test_the_catalogue_says_which_methods_mergekit_has(folder):
    assert all(method.mergekit for method in CATALOGUE.values())
