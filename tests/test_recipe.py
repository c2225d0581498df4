"""Recipes: canonical form, digest, round trips, messages."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.catalogue import CATALOGUE
from evomerge.catalogue.adapters import read_settings
from evomerge.errors import RecipeError
from evomerge.recipe import Recipe, Rule, parse_recipe, read_recipe, value_at
from evomerge.records import Place
from evomerge.spaces.settings import ROLES

FINGERPRINT = "ab" * 32
EXAMPLES = Path(__file__).parent.parent / "configs/recipes"


def source(name, **parameters):
    return {"name": name, "path": f"./{name}", "parameters": parameters}


def ties(**changes):
    return {
        "method": "ties",
        "base": {"name": "base", "path": "./base"},
        "sources": [source("a", weight=0.5), source("b")],
        **changes,
    }


def parsed(**changes):
    return parse_recipe(ties(**changes), "r")


def digest(**changes):
    return parsed(**changes).digest


def with_weight(weight, name="a"):
    return parsed(sources=[source(name, weight=weight), source("b")])


def refusal(data):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(data, "r.yaml")
    message = str(caught.value)
    assert message.startswith("r.yaml: ")
    assert "\n" not in message
    return message.removeprefix("r.yaml: ")


def values(parameter):
    """Any value that a recipe may give a parameter, in any of its written forms."""
    if parameter.choices:
        scalar = st.sampled_from(parameter.choices)
    else:
        low = -5.0 if parameter.valid_low is None else parameter.valid_low
        high = 5.0 if parameter.valid_high is None else parameter.valid_high
        scalar = st.floats(low, high) | st.integers(int(low), int(high))
    if not parameter.per_tensor:
        return scalar
    one = scalar if parameter.choices else scalar | st.lists(scalar, min_size=1, max_size=4)
    rule = st.fixed_dictionaries(
        {"value": one},
        optional={"role": st.sampled_from(ROLES), "match": st.sampled_from(["q_proj", "layers.1.", "é x"])},
    )
    rules = st.lists(rule, max_size=3).flatmap(lambda r: one.map(lambda v: [*r, {"value": v}]))
    return one | rules


@st.composite
def recipes(draw):
    method = draw(st.sampled_from(sorted(CATALOGUE.values(), key=lambda m: m.name)))

    def settings(scope):
        wanted = [p for p in method.parameters if p.scope == scope]
        return {p.name: draw(values(p)) for p in wanted if p.default is None or draw(st.booleans())}

    low = method.min_sources
    count = draw(st.integers(low, method.max_sources or low + 2))
    sources = [
        {
            "name": f"s{i}",
            "path": draw(st.sampled_from(["./x", "org/model", "/a b/é", "1e3", "010", "no", "a: b #c"])),
            **({"fingerprint": FINGERPRINT} if draw(st.booleans()) else {}),
            **({"revision": draw(st.sampled_from(["main", "08", "12e4"]))} if draw(st.booleans()) else {}),
            "parameters": settings("source"),
        }
        for i in range(count)
    ]
    return {
        "method": method.name,
        **({"base": {"name": "base", "path": "./b"}} if method.needs_base else {}),
        "sources": sources,
        "parameters": settings("method"),
        "seed": draw(st.integers(0, 2**63 - 1)),
        **({"tokenizer": "s0"} if draw(st.booleans()) else {}),
        **({"dtype": "bfloat16"} if draw(st.booleans()) else {}),
    }


@given(recipes())
def test_a_recipe_survives_json_and_yaml(data):
    recipe = parse_recipe(data, "r")
    written = json.loads(json.dumps(recipe.to_json(), allow_nan=False))
    assert Recipe.model_validate(written) == recipe
    assert parse_recipe(written, "r").digest == recipe.digest


@given(recipes())
def test_a_recipe_survives_its_file(tmp_path_factory, data):
    recipe = parse_recipe(data, "r")
    path = tmp_path_factory.mktemp("recipe") / "r.yaml"
    path.write_text(recipe.to_yaml(), "utf-8")
    assert read_recipe(path) == recipe
    assert read_recipe(path).to_yaml() == recipe.to_yaml()


@given(recipes(), st.randoms(use_true_random=False))
def test_the_order_of_keys_does_not_change_the_digest(data, random):
    def shuffled(node):
        if isinstance(node, dict):
            keys = list(node)
            random.shuffle(keys)
            return {key: shuffled(node[key]) for key in keys}
        return [shuffled(item) for item in node] if isinstance(node, list) else node

    assert parse_recipe(shuffled(data), "r").digest == parse_recipe(data, "r").digest


@given(recipes())
def test_a_complete_setting_has_a_value_everywhere(data):
    recipe = parse_recipe(data, "r")
    method = CATALOGUE[recipe.method]
    for settings, scope in [
        (recipe.parameters, "method"),
        *((s.parameters, "source") for s in recipe.sources),
    ]:
        assert list(settings) == [p.name for p in method.parameters if p.scope == scope]
        for name, setting in settings.items():
            parameter = method.parameter(name)
            for role in ROLES:
                for depth in (0.0, 1 / 3, 1.0):
                    value = value_at(setting, Place("model.layers.1.x", role, 1, depth))
                    assert value in parameter.choices or isinstance(value, float)


def test_defaults_that_are_written_out_do_not_change_the_digest():
    full = {"density": 1.0, "weight": 0.5}
    written = parsed(
        sources=[source("a", **full), source("b", density=1, weight=1.0)],
        parameters={"normalize": True, "lambda": 1},
        tokenizer="base",
        seed=0,
        dtype=None,
        evomerge=1,
    )
    assert written.digest == digest()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0),
        (0.5, [0.5]),
        (0.5, [0.5, 0.5, 0.5]),
        (0.5, [{"value": 0.5}]),
        (0.5, {"value": [0.5, 0.5]}),
        (0.0, -0.0),
        ([0.0, 1.0], [-0.0, 1]),
        ([{"role": "mlp", "value": 2}], {"role": "mlp", "value": 2.0}),
        ([{"role": "mlp", "value": 2}], [{"role": "mlp", "value": 2}, {"value": 1.0}]),
        (0.5, [{"value": 0.5}, {"role": "mlp", "value": 2}]),
        (
            [{"role": "mlp", "value": 2}, {"role": "mlp", "value": 3}, {"value": 0}],
            [{"role": "mlp", "value": 2}, {"value": 0}],
        ),
    ],
)
def test_two_ways_to_write_one_weight_have_one_digest(one, other):
    assert with_weight(one).digest == with_weight(other).digest


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (0.5, 0.5000000000000001),
        ([0.1, 0.2], [0.2, 0.1]),
        ([0.1, 0.2], [0.1, 0.15, 0.2]),
        ([{"role": "mlp", "value": 2}], [{"match": "mlp", "value": 2}]),
        (
            [{"role": "mlp", "value": 2}, {"match": "up", "value": 3}],
            [{"match": "up", "value": 3}, {"role": "mlp", "value": 2}],
        ),
    ],
)
def test_other_weights_have_other_digests(one, other):
    assert with_weight(one).digest != with_weight(other).digest


def test_names_of_sources_are_no_part_of_the_identity():
    renamed = [{**source("x", weight=0.5), "path": "./a"}, {**source("y"), "path": "./b"}]
    assert digest(sources=renamed) == digest()


def test_a_fingerprint_is_the_identity_wherever_the_source_lies():
    here = [{**source("a"), "fingerprint": FINGERPRINT}, source("b")]
    there = [{**source("a"), "path": "/else/where", "revision": "x", "fingerprint": FINGERPRINT}, source("b")]
    assert digest(sources=here) == digest(sources=there)
    assert digest(sources=here) != digest(sources=[source("a"), source("b")])


def test_without_a_fingerprint_path_and_revision_are_the_identity():
    def of(**changes):
        return digest(sources=[{**source("a"), **changes}, source("b")])

    assert of() != of(path="./c")
    assert of() != of(revision="main")
    assert of(path="x@y") != of(path="x", revision="y") or of(path="x@y@") != of(path="x@y")


def test_what_changes_the_model_changes_the_digest():
    variants = [
        {},
        {"sources": [source("b"), source("a", weight=0.5)]},
        {"sources": [source("a", weight=0.5)]},
        {"base": {"name": "base", "path": "./other"}},
        {"parameters": {"lambda": 0.9}},
        {"parameters": {"normalize": False}},
        {"dtype": "bfloat16"},
        {"tokenizer": "a"},
        {"method": "task_arithmetic"},
    ]
    assert len({digest(**variant) for variant in variants}) == len(variants)


def test_the_seed_counts_only_where_masks_are_drawn():
    assert digest(seed=0) == digest(seed=7)
    assert digest(method="dare_ties", seed=0) != digest(method="dare_ties", seed=7)


def test_the_digest_of_a_recipe_never_changes():
    # A changed digest would make every stored outcome worthless; raise the recipe's version instead.
    assert digest() == "894e8c62e2c0343de079940967a0766b15cd9ecbe1c4606c2586764115bf7a33"


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_the_digest_does_not_depend_on_the_interpreters_hash_seed(hash_seed):
    code = f"from evomerge.recipe import parse_recipe; print(parse_recipe({ties()!r}, 'r').digest)"
    env = {**os.environ, "PYTHONHASHSEED": hash_seed}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert run.stdout.strip() == digest()


@pytest.mark.parametrize(
    ("value", "depth", "expected"),
    [
        (0.7, 0.3, 0.7),
        ((0.0, 1.0), 0.25, 0.25),
        ((0.0, 1.0, 0.0), 0.75, 0.5),
        ((1.0, 2.0, 4.0), 0.0, 1.0),
        ((1.0, 2.0, 4.0), 0.5, 2.0),
        ((1.0, 2.0, 4.0), 1.0, 4.0),
    ],
)
def test_anchors_are_joined_by_straight_lines(value, depth, expected):
    assert Rule(value=value).at(depth) == expected


@given(st.integers(2, 200).flatmap(lambda n: st.lists(st.floats(-3, 3), min_size=n, max_size=n)))
def test_one_anchor_per_layer_gives_each_layer_exactly_its_own(anchors):
    rule = Rule(value=tuple(anchors))
    assert [rule.at(i / (len(anchors) - 1)) for i in range(len(anchors))] == anchors


def test_the_first_rule_that_applies_counts():
    weight = (
        with_weight(
            [
                {"match": "q_proj", "value": 1},
                {"role": "attention", "match": "1.", "value": 2},
                {"role": "attention", "value": 3},
                {"value": 4},
            ]
        )
        .sources[0]
        .parameters["weight"]
    )
    places = [
        Place("model.layers.1.self_attn.q_proj.weight", "attention", 1, 1.0),
        Place("model.layers.1.self_attn.k_proj.weight", "attention", 1, 1.0),
        Place("model.layers.0.self_attn.k_proj.weight", "attention", 0, 0.0),
        Place("model.layers.1.mlp.up_proj.weight", "mlp", 1, 1.0),
    ]
    assert [value_at(weight, place) for place in places] == [1, 2, 3, 4]


def test_a_setting_without_a_general_rule_names_the_tensor_it_misses():
    with pytest.raises(
        RecipeError, match=r"no value for tensor x\.y: the last rule must hold for every tensor"
    ):
        value_at((Rule(role="mlp", value=1.0),), Place("x.y", "norm", None, 1.0))


def test_base_then_sources_are_what_a_recipe_reads():
    recipe = parsed()
    assert [ref.name for ref in recipe.refs] == ["base", "a", "b"]
    assert recipe.reference.name == "base"
    linear = parse_recipe({"method": "linear", "sources": [source("a"), source("b")]}, "r")
    assert (linear.reference.name, linear.base) == ("a", None)


A_WEIGHT = "sources.a.parameters.weight"
SHAPES = "expected a number, switch or choice, a list of numbers, or a list of rules with a value each, got"


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ("x", f"{A_WEIGHT}: expected a number, got 'x'"),
        ("0.5", f"{A_WEIGHT}: expected a number, got '0.5'"),
        (True, f"{A_WEIGHT}: expected a number, got True"),
        ([0.1, "x"], f'sources.0.parameters.weight: {SHAPES} [0.1, "x"]'),
        ([True, 0.5], f"sources.0.parameters.weight: {SHAPES} [true, 0.5]"),
        ([], f"sources.0.parameters.weight: {SHAPES} []"),
        (None, f"sources.0.parameters.weight: {SHAPES} null"),
        (float("nan"), f"sources.0.parameters.weight: {SHAPES} NaN"),
        ([0.1, float("inf")], f"sources.0.parameters.weight: {SHAPES} [0.1, Infinity]"),
        ([{"value": 1}, 3], f'sources.0.parameters.weight: {SHAPES} [{{"value": 1}}, 3]'),
        (
            [{"roel": "mlp", "value": 1}],
            'sources.0.parameters.weight.0: unknown key "roel"; did you mean "role"?',
        ),
        ([{"role": "mlp"}], "sources.0.parameters.weight.0.value: missing; it has no default"),
        (
            [{"value": 1, "match": ""}],
            'sources.0.parameters.weight.0.match: expected at least 1 character(s), got ""',
        ),
        (
            [{"role": "mlpp", "value": 1}],
            "sources.0.parameters.weight.0.role: expected 'attention', 'mlp', 'norm', 'embedding', 'head' or "
            "'other', got \"mlpp\"",
        ),
        ([{"role": "mlp", "value": "x"}], f"{A_WEIGHT}: expected a number, got 'x'"),
    ],
)
def test_wrong_values_are_refused_by_name(weight, message):
    assert refusal(ties(sources=[source("a", weight=weight), source("b")])) == message


def test_a_number_too_large_for_a_float_is_refused_in_one_short_line():
    assert len(refusal(ties(sources=[source("a", weight=10**400)]))) < 300


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "tiess"}, 'unknown merge method "tiess"; did you mean "ties"?'),
        ({"metod": 1}, 'unknown key "metod"; did you mean "method"?'),
        ({"evomerge": 2}, "evomerge: expected 1, got 2"),
        ({"base": None}, "base: method ties works on deltas from a base; name one"),
        ({"base": "./b"}, 'base: expected a mapping, got "./b"'),
        ({"method": "linear"}, "base: method linear has no base; list it as a source or leave it out"),
        ({"sources": []}, "sources: expected at least 1 item(s), got []"),
        ({"sources": "x"}, 'sources: expected a list, got "x"'),
        ({"sources": [source("a"), source("a")]}, 'sources: the name "a" is used twice'),
        ({"sources": [source("base")]}, 'sources: the name "base" is used twice'),
        ({"sources": [{"name": "a"}]}, "sources.0.path: missing; it has no default"),
        (
            {"sources": [{"name": "../a", "path": "x"}]},
            'sources.0.name: expected a text that matches ^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$, got "../a"',
        ),
        (
            {"sources": [source("a", densty=1)]},
            'method "ties" has no parameter "densty"; did you mean "density"?',
        ),
        (
            {"sources": [source("a", density=1.5)]},
            "sources.a.parameters.density: expected 0.0 to 1.0, got 1.5",
        ),
        (
            {"sources": [source("a", density=[0.5, -0.1])]},
            "sources.a.parameters.density: expected 0.0 to 1.0, got -0.1",
        ),
        (
            {"sources": [source("a", **{"lambda": 1})]},
            "sources.a.parameters.lambda: this parameter belongs to the method as a whole",
        ),
        ({"parameters": {"weight": 1}}, "parameters.weight: this parameter belongs to each source"),
        ({"parameters": [1]}, "parameters: expected a mapping, got [1]"),
        ({"parameters": {"normalize": 1}}, "parameters.normalize: expected one of true, false, got 1.0"),
        ({"tokenizer": "c"}, 'tokenizer: "c" is none of a, b, base, union'),
        ({"seed": -1}, "seed: expected at least 0, got -1"),
        ({"seed": True}, "seed: expected a number, got true"),
        ({"seed": 2**63}, "seed: expected less than 9223372036854775808, got 9223372036854775808"),
        ({"dtype": "fp8"}, "dtype: expected 'float32', 'bfloat16' or 'float16', got \"fp8\""),
        (
            {"method": "dare_ties", "parameters": {"rescale": [{"role": "mlp", "value": "l1"}]}},
            "parameters.rescale: one value for all tensors, got rules",
        ),
        (
            {"method": "dare_ties", "parameters": {"rescale": "l3"}},
            "parameters.rescale: expected one of expectation, l1, l2, none, got 'l3'",
        ),
    ],
)
def test_wrong_recipes_are_refused_by_name(changes, message):
    assert refusal(ties(**changes)) == message


def test_slerp_needs_two_sources_and_a_t():
    two = {"method": "slerp", "sources": [source("a"), source("b")]}
    assert refusal(two) == "parameters.t: missing; method slerp has no default for it"
    assert refusal({**two, "parameters": {"t": [{"role": "mlp", "value": 0.5}]}}) == (
        "parameters.t: missing; method slerp has no default for it"
    )
    three = {**two, "sources": [source("a"), source("b"), source("c")], "parameters": {"t": 0.5}}
    assert refusal(three) == "sources: method slerp takes 2, got 3"


@pytest.mark.parametrize("data", [None, [], "x", 3])
def test_a_recipe_file_that_is_no_mapping_is_refused(data):
    assert refusal(data).startswith("expected a mapping with a method and sources, got ")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_is_a_recipe(path):
    if path.stem == "merge-adapters":
        assert read_settings(path).method == "sum"
    else:
        assert read_recipe(path).located(path.parent).sources


def test_a_wrong_item_does_not_make_its_list_too_short():
    with pytest.raises(RecipeError) as caught:
        parse_recipe(ties(sources=[{"name": "a"}]), "r")
    assert caught.value.lines == ["r: sources.0.path: missing; it has no default"]


def test_what_is_wrong_with_the_parameters_of_all_sources_is_told_at_once():
    sources = [source("a", weight=1.0, densty=0.5), source("b", weight=1.0, density=7)]
    with pytest.raises(RecipeError) as caught:
        parse_recipe(ties(sources=sources, parameters={"lines_alpa": 1, "lambda": 0.5}), "r")
    assert caught.value.lines == [
        'r: method "ties" has no parameter "lines_alpa"; did you mean "lines_alpha"?',
        'r: method "ties" has no parameter "densty"; did you mean "density"?',
        "r: sources.b.parameters.density: expected 0.0 to 1.0, got 7.0",
    ]
