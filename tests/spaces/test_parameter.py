"""Parameter space: genes, decoding, encoding."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.catalogue import CATALOGUE
from evomerge.errors import ConfigError
from evomerge.recipe import SourceRef, parse_recipe, value_at
from evomerge.records import Place
from evomerge.spaces.parameter import ParameterSpace
from evomerge.spaces.settings import ParameterSettings
from evomerge.strict import validated

BASE = SourceRef(name="base", path="./base", fingerprint="0" * 64)


def places(layers, *, tied=False):
    """The tensors of a llama."""
    parts = {"self_attn.q_proj": "attention", "self_attn.o_proj": "attention", "mlp.up_proj": "mlp"}
    parts |= {"input_layernorm": "norm"}
    found = [Place("model.embed_tokens.weight", "embedding", None, 0.0)]
    for i in range(layers):
        depth = i / max(1, layers - 1)
        found += [Place(f"model.layers.{i}.{part}.weight", role, i, depth) for part, role in parts.items()]
    found.append(Place("model.norm.weight", "norm", None, 1.0))
    return found if tied else [*found, Place("lm_head.weight", "head", None, 1.0)]


def sources(count):
    return [SourceRef(name=f"s{i}", path=f"./s{i}", fingerprint=f"{i + 1:064x}") for i in range(count)]


def space(data, count=2, layers=4, *, tied=False):
    settings = validated(ParameterSettings, {"method": "ties", **data}, "space", ConfigError)
    needs_base = CATALOGUE[settings.method].needs_base
    return ParameterSpace(
        settings, BASE if needs_base else None, sources(count), places(layers, tied=tied), layers
    )


def number(data, *args, **kwargs):
    return len(space(data, *args, **kwargs).dimensions)


def refusal(data, *args, **kwargs):
    with pytest.raises(ConfigError) as caught:
        space(data, *args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@st.composite
def spaces(draw):
    """Spaces of any method, granularity, split and kind of span."""
    method = draw(st.sampled_from(sorted(CATALOGUE)))
    known = CATALOGUE[method]
    granularity = st.sampled_from(
        ["model", "layer", {"layers": 2}, {"layers": 3}, {"anchors": 3}, {"anchors": 2}]
    )
    parameters = {}
    for parameter in known.parameters:
        kinds = (
            ["free", "default"]
            if parameter.choices
            else ["free", "range", "log", "choices", "fixed", "default"]
        )
        kind = draw(st.sampled_from(kinds))
        if kind == "free":
            parameters[parameter.name] = "free"
        elif kind == "fixed":
            parameters[parameter.name] = within(parameter, 0.5)
        elif kind == "choices":
            parameters[parameter.name] = {
                "choices": draw(st.permutations([within(parameter, x) for x in (0.0, 0.25, 0.6, 1.0)]))
            }
        elif kind != "default":
            low = within(parameter, draw(st.sampled_from([0.01, 0.3, 0.7])))
            high = within(parameter, draw(st.sampled_from([0.71, 0.9, 1.0])))
            parameters[parameter.name] = {"low": low, "high": high, "log": kind == "log"}
        if isinstance(parameters.get(parameter.name), dict) and parameter.per_tensor and draw(st.booleans()):
            parameters[parameter.name]["granularity"] = draw(granularity)
    split = draw(
        st.sampled_from(
            [
                [],
                ["attention"],
                ["attention", "mlp", "norm"],
                ["q_proj", "attention"],
                ["embed_tokens", "lm_head"],
                ["attention", "mlp", "norm", "embedding", "head"],
                ["layers.1."],
            ]
        )
    )
    data = {"method": method, "parameters": parameters, "split": split, "granularity": draw(granularity)}
    if known.random and draw(st.booleans()):
        data["seed"] = {"count": 5}
    free = any(isinstance(v, dict) or v == "free" for v in parameters.values()) or "seed" in data
    if not free:
        names = [parameter.name for parameter in known.parameters]
        parameters[next((name for name in names if name in ("weight", "t")), names[0])] = "free"
    layers = draw(st.integers(2, 7))
    count = max(known.min_sources, min(2, known.max_sources or 2))
    return space(data, count, layers), places(layers)


def within(parameter, share):
    """Return a value that the parameter may have, 0 the lowest and 1 at most one above."""
    low = parameter.valid_low or 0.0
    high = min(low + 1.0, parameter.valid_high or low + 1.0)
    return low + share * (high - low)


@st.composite
def spaces_and_genomes(draw):
    found, tensors = draw(spaces())
    genome = tuple(
        draw(st.floats(0, 1) | st.sampled_from([0.0, 0.5, 1.0]))
        if dimension.kind == "real"
        else float(draw(st.integers(0, dimension.size - 1)))
        for dimension in found.dimensions
    )
    return found, genome, tensors


@given(spaces_and_genomes())
def test_every_genome_decodes_to_one_recipe(drawn):
    found, genome, _ = drawn
    recipe = found.decode(genome)
    assert recipe.digest == found.decode(genome).digest
    assert parse_recipe(recipe.to_json(), "r").digest == recipe.digest


@given(spaces_and_genomes())
def test_encoding_a_decoded_genome_gives_it_back(drawn):
    found, genome, _ = drawn
    encoded, exact = found.encode(found.decode(genome))
    assert exact
    assert encoded == pytest.approx(genome, abs=1e-12)


@given(spaces())
def test_labels_are_unique_and_every_dimension_is_free(drawn):
    found, _ = drawn
    labels = [dimension.label for dimension in found.dimensions]
    assert len(set(labels)) == len(labels)
    assert all(dimension.free for dimension in found.dimensions)
    for genome in (found.centre(), *_corners(found)):
        found.decode(genome)


def _corners(found):
    for high in (False, True):
        yield tuple((1.0 if d.kind == "real" else d.size - 1.0) if high else 0.0 for d in found.dimensions)


@given(spaces_and_genomes(), st.data())
def test_every_gene_changes_the_model(drawn, data):
    """No gene may be without effect, or the optimizer would search it in vain."""
    found, genome, tensors = drawn
    i = data.draw(st.integers(0, len(genome) - 1))
    dimension, gene = found.dimensions[i], found.genes[i]
    if dimension.label == "seed" or found.method.parameter(gene.parameter).per_tensor is False:
        return
    granularity = gene.span.granularity or found.settings.granularity
    layers = len({place.layer for place in tensors} - {None})
    if (granularity.anchors or 1) > layers or "layers.1." in found.settings.split:
        return  # anchors between layers, or a block all of whose layers belong to another group
    other = (1.0 - round(genome[i])) if dimension.kind == "real" else float((genome[i] + 1) % dimension.size)
    changed = found.decode((*genome[:i], other, *genome[i + 1 :]))
    before = found.decode(genome)
    pairs = [(before.parameters, changed.parameters)]
    pairs += [(a.parameters, b.parameters) for a, b in zip(before.sources, changed.sources, strict=True)]
    assert any(
        value_at(a[name], place) != value_at(b[name], place)
        for a, b in pairs
        for name in a
        for place in tensors
    )


@pytest.mark.parametrize("wrong", [(), (0.5,), (0.5, 0.5, 0.5), (0.5, 1.1), (0.5, float("nan")), (-0.1, 0.5)])
def test_a_genome_outside_the_coding_is_refused(wrong):
    with pytest.raises(ValueError, match=r"genome of|is not a value"):
        space({}).decode(wrong)


def test_the_papers_setting_has_weight_and_density_per_layer_and_end():
    data = {"method": "dare_ties", "granularity": "layer", "parameters": {"density": "free"}}
    assert number(data, 3, 32) == 2 * 3 * (32 + 2)
    assert number(data, 3, 32, tied=True) == 2 * 3 * (32 + 1)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({}, 2),
        ({"granularity": "model"}, 2),
        ({"parameters": {"density": "free"}}, 4),
        ({"parameters": {"density": "free", "lambda": "free"}}, 5),
        ({"parameters": {"weight": 1.0, "lambda": "free"}}, 1),
        ({"granularity": "layer"}, 2 * (5 + 2)),
        ({"granularity": {"layers": 2}}, 2 * (3 + 2)),
        ({"granularity": {"layers": 5}}, 2 * (1 + 2)),
        ({"granularity": {"layers": 99}}, 2 * (1 + 2)),
        ({"granularity": {"anchors": 3}}, 2 * 3),
        ({"split": ["attention"]}, 2 * 2),
        ({"split": ["attention", "mlp"], "granularity": {"anchors": 3}}, 2 * 3 * 3),
        # The embedding lies at one depth, so that anchors would have no effect there.
        ({"split": ["embed_tokens"], "granularity": {"anchors": 3}}, 2 * (1 + 3)),
        ({"split": ["embedding", "head"], "granularity": {"anchors": 3}}, 2 * (1 + 1 + 3)),
        ({"split": ["layers.2."], "granularity": {"anchors": 3}}, 2 * (1 + 3)),
        ({"split": ["attention", "mlp", "norm", "embedding", "head"]}, 2 * 5),
        ({"split": ["q_proj"], "granularity": "layer"}, 2 * (5 + 5 + 2)),
        ({"parameters": {"normalize": "free"}}, 3),
        ({"parameters": {"normalize": "free"}, "split": ["attention"]}, 2 * 2 + 2),
        ({"parameters": {"weight": {"granularity": "layer"}, "lambda": "free"}}, 2 * 7 + 1),
        ({"method": "dare_ties", "seed": {"count": 4}}, 2 + 1),
        ({"method": "dare_ties", "parameters": {"rescale": "free"}, "granularity": "layer"}, 2 * 7 + 1),
        ({"method": "slerp"}, 1),
        ({"method": "slerp", "granularity": "layer"}, 7),
        ({"method": "slerp", "split": ["attention", "mlp"], "granularity": {"anchors": 4}}, 12),
    ],
)
def test_the_number_of_genes(data, expected):
    assert number(data, 2, 5) == expected


def test_tied_heads_have_no_gene_of_their_own():
    assert number({"granularity": "layer"}, 2, 5, tied=True) == 2 * (5 + 1)
    labels = [d.label for d in space({"granularity": "layer"}, tied=True).dimensions]
    assert not any("head" in label for label in labels)


def test_genes_are_ordered_by_parameter_source_group_and_depth():
    found = space({"parameters": {"density": "free"}, "split": ["mlp"], "granularity": {"anchors": 2}})
    labels = [dimension.label for dimension in found.dimensions]
    assert labels == [
        f"{parameter} {source}{group} {i}/2"
        for parameter, source, group, i in itertools.product(
            ("weight", "density"), ("s0", "s1"), (" mlp", ""), (1, 2)
        )
    ]


def test_blocks_of_layers_share_a_value_and_ends_have_their_own():
    found = space({"granularity": {"layers": 2}}, count=1, layers=5)
    recipe = found.decode((0.0, 0.2, 0.4, 0.6, 0.8))  # embedding, head, then three blocks, if so ordered
    by_label = dict(zip([d.label for d in found.dimensions], (0.0, 0.2, 0.4, 0.6, 0.8), strict=True))
    weight = recipe.sources[0].parameters["weight"]

    def at(name, role, layer, depth):
        return value_at(weight, Place(name, role, layer, depth)) / 1.5

    layers = [at(f"model.layers.{i}.mlp.up_proj.weight", "mlp", i, i / 4) for i in range(5)]
    blocks = [by_label[f"weight s0 {i}/3"] for i in (1, 2, 3)]
    assert layers == pytest.approx([blocks[0]] * 2 + [blocks[1]] * 2 + [blocks[2]])
    assert at("model.embed_tokens.weight", "embedding", None, 0.0) == pytest.approx(
        by_label["weight s0 embedding"]
    )
    assert at("lm_head.weight", "head", None, 1.0) == pytest.approx(by_label["weight s0 head"])


def test_bounds_are_met_exactly_and_logarithms_have_equal_factors():
    found = space({"parameters": {"weight": {"low": 0.01, "high": 1.0, "log": True}}}, count=1)

    def weight(gene):
        return found.decode((gene,)).sources[0].parameters["weight"][0].value

    assert (weight(0.0), weight(1.0)) == (0.01, 1.0)
    assert weight(0.5) == pytest.approx(0.1)


@given(st.floats(1e-9, 0.5), st.floats(0.51, 1.0), st.booleans(), st.floats(0, 1))
def test_no_gene_leaves_its_range(low, high, log, gene):
    found = space({"parameters": {"weight": 1, "density": {"low": low, "high": high, "log": log}}}, count=1)
    density = found.decode((gene,)).sources[0].parameters["density"][0].value
    assert low <= density <= high


def test_choices_of_numbers_are_ordered_and_switches_are_not():
    found = space({"parameters": {"weight": {"choices": [0.9, 0.1, 0.5]}, "normalize": "free"}}, count=1)
    kinds = {d.label: (d.kind, d.size) for d in found.dimensions}
    assert kinds == {"weight s0": ("integer", 3), "normalize": ("categorical", 2)}
    values = [found.decode((float(i), 0.0)).sources[0].parameters["weight"][0].value for i in range(3)]
    assert values == [0.1, 0.5, 0.9]
    switches = {found.decode((0.0, float(i))).parameters["normalize"][0].value for i in range(2)}
    assert switches == {True, False}


def test_rescale_choices_and_seeds_are_categories():
    data = {"method": "dare_ties", "parameters": {"rescale": "free"}, "seed": {"count": 3}}
    found = space(data, count=1)
    kinds = [(d.label, d.kind, d.size) for d in found.dimensions]
    assert kinds == [("weight s0", "real", 0), ("rescale", "categorical", 4), ("seed", "categorical", 3)]
    recipe = found.decode((0.5, 1.0, 2.0))
    assert (recipe.parameters["rescale"][0].value, recipe.seed) == ("l1", 2)


def test_what_is_not_free_keeps_its_fixed_value_or_default():
    found = space(
        {"method": "dare_ties", "parameters": {"density": 0.3, "rescale": "l1"}, "seed": 11}, count=1
    )
    recipe = found.decode((0.5,))
    assert recipe.sources[0].parameters["density"][0].value == 0.3
    assert recipe.parameters["rescale"][0].value == "l1"
    assert recipe.parameters["lambda"][0].value == 1.0
    assert recipe.seed == 11


def test_dtype_and_tokenizer_go_into_every_recipe():
    recipe = space({"dtype": "bfloat16", "tokenizer": "s1"}).decode((0.5, 0.5))
    assert (recipe.dtype, recipe.tokenizer) == ("bfloat16", "s1")


def recipe_of(found, *weights, method="ties", **changes):
    refs = sources(len(weights))
    data = {
        "method": method,
        "base": BASE.model_dump(exclude_none=True) if CATALOGUE[method].needs_base else None,
        "sources": [
            {
                **ref.model_dump(exclude_none=True),
                "parameters": {"weight": weight} if weight is not None else {},
            }
            for ref, weight in zip(refs, weights, strict=True)
        ],
        **changes,
    }
    return parse_recipe(data, "r")


def test_a_recipe_outside_the_bounds_is_encoded_to_the_nearest_and_flagged():
    found = space({})
    genome, exact = found.encode(recipe_of(found, 0.75, 9.0))
    assert genome == (0.5, 1.0)
    assert not exact


def test_a_recipe_finer_than_the_space_is_flagged():
    found = space({})
    assert found.encode(recipe_of(found, [0.75, 0.75], 1.5)) == ((0.5, 1.0), True)
    assert found.encode(recipe_of(found, [0.3, 0.9], 1.5))[1] is False
    assert found.encode(recipe_of(found, [{"role": "mlp", "value": 0.1}, {"value": 0.75}], 1.5))[1] is False


def test_a_recipe_with_another_fixed_value_is_flagged():
    found = space({})
    assert found.encode(recipe_of(found, 0.75, 0.75, parameters={"lambda": 0.5}))[1] is False
    assert found.encode(recipe_of(found, 0.75, 0.75, parameters={"normalize": False}))[1] is False


def test_the_seed_counts_for_exactness_only_where_masks_are_drawn():
    found = space({})
    assert found.encode(recipe_of(found, 0.75, 0.75, seed=5))[1] is True
    drawn = space({"method": "dare_ties"})
    assert drawn.encode(recipe_of(drawn, 0.75, 0.75, method="dare_ties", seed=5))[1] is False
    searched = space({"method": "dare_ties", "seed": {"count": 9}})
    recipe = recipe_of(searched, 0.75, 0.75, method="dare_ties", seed=5)
    assert searched.encode(recipe) == ((0.5, 0.5, 5.0), True)


def test_sources_are_matched_by_content_whatever_their_names_and_order():
    found = space({})
    recipe = recipe_of(found, 0.3, 0.9)
    data = recipe.to_json()
    data["sources"].reverse()
    for entry in data["sources"]:
        entry["name"] = "x" + entry["name"]
    assert found.encode(parse_recipe(data, "r")) == found.encode(recipe)


def test_two_sources_of_equal_content_keep_their_own_values():
    twins = [SourceRef(name=name, path="./x", fingerprint="1" * 64) for name in ("one", "two")]
    settings = ParameterSettings(method="linear")
    found = ParameterSpace(settings, None, twins, places(4), 4)
    genome = (0.2, 0.7)
    assert found.encode(found.decode(genome)) == (genome, True)


def test_slerp_takes_no_recipe_with_its_sources_in_another_order():
    found = space({"method": "slerp"})
    data = found.decode((0.25,)).to_json()
    assert found.encode(parse_recipe(data, "r")) == ((0.25,), True)
    data["sources"].reverse()
    with pytest.raises(ConfigError, match="in another order"):
        found.encode(parse_recipe(data, "r"))


def test_recipes_of_other_methods_and_sources_do_not_lie_in_the_space():
    found = space({})
    with pytest.raises(ConfigError, match="a recipe of linear does not lie in a space of ties"):
        found.encode(recipe_of(found, 0.5, 0.5, method="linear"))
    with pytest.raises(ConfigError, match="other sources"):
        found.encode(recipe_of(found, 0.5))
    with pytest.raises(ConfigError, match="other sources"):
        found.encode(recipe_of(found, 0.5, 0.5, 0.5))
    data = recipe_of(found, 0.5, 0.5).to_json()
    data["base"]["fingerprint"] = "f" * 64
    with pytest.raises(ConfigError, match="other sources"):
        found.encode(parse_recipe(data, "r"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"method": "tiess"}, 'space: method: unknown merge method "tiess"; did you mean "ties"?'),
        (
            {"parameters": {"wieght": 1}},
            'space: parameters: method "ties" has no parameter "wieght"; did you mean "weight"?',
        ),
        ({"parameters": {"density": 5}}, "space: parameters.density: expected 0.0 to 1.0, got 5.0"),
        (
            {"parameters": {"density": {"low": -1}}},
            "space: parameters.density.low: expected 0.0 to 1.0, got -1.0",
        ),
        (
            {"parameters": {"density": {"choices": [0.5, 2]}}},
            "space: parameters.density.choices: expected 0.0 to 1.0, got 2.0",
        ),
        (
            {"parameters": {"weight": {"choices": ["a"]}}},
            "space: parameters.weight.choices: expected a number, got 'a'",
        ),
        (
            {"parameters": {"weight": "fre"}},
            'space: parameters.weight: expected a number, free, {low, high} or {choices}, got "fre"',
        ),
        (
            {"parameters": {"normalize": 3}},
            "space: parameters.normalize: expected one of true, false, got 3.0",
        ),
        (
            {"parameters": {"normalize": {"low": 0}}},
            "space: parameters.normalize: a switch or choice has no range; write free or choices",
        ),
        (
            {"parameters": {"weight": {"low": "x"}}},
            'space: parameters.weight.low: expected a number, got "x"',
        ),
        (
            {"parameters": {"weight": {"low": 2, "high": 1}}},
            "space: parameters.weight: low must be below high, got 2.0 and 1.0",
        ),
        (
            {"parameters": {"weight": {"high": -1}}},
            "space.parameters.weight: low must be below high, got 0.0 and -1.0",
        ),
        (
            {"parameters": {"weight": {"log": True}}},
            "space.parameters.weight: a logarithmic range needs low above 0, got 0.0",
        ),
        (
            {"parameters": {"weight": {"choices": [1, 1.0]}}},
            "space: parameters.weight.choices: [1.0, 1.0] holds a value twice",
        ),
        (
            {"parameters": {"weight": {"choices": [1], "low": 0}}},
            "space: parameters.weight: give either choices or a range",
        ),
        ({"parameters": {"weight": 1.0}}, "space.parameters: nothing is free; give at least one a range"),
        (
            {"granularity": "layers"},
            'space: granularity: expected model, layer, {layers: n} or {anchors: n}, got "layers"',
        ),
        ({"granularity": {"layers": 0}}, "space: granularity.layers: expected at least 1, got 0"),
        ({"granularity": {"layers": 1, "anchors": 2}}, "space: granularity: give either layers or anchors"),
        ({"split": ["a", "a"]}, "space: split: expected distinct names, got ['a', 'a']"),
        ({"split": ["atention"]}, 'space.split: no tensor is "atention"; did you mean "attention"?'),
        (
            {"split": ["attention", "q_proj"]},
            'space.split: every tensor of "q_proj" belongs to a name before it; put the narrower one first',
        ),
        ({"seed": -1}, "space: seed: expected at least 0, got -1"),
        ({"seed": {"count": 1}, "method": "dare_ties"}, "space: seed.count: expected at least 2, got 1"),
        ({"seed": {"count": 3}}, "space: seed: method ties draws nothing at random"),
        (
            {"method": "dare_ties", "parameters": {"rescale": {"choices": ["l1"], "granularity": "layer"}}},
            "space: parameters.rescale.granularity: one value holds for all tensors",
        ),
    ],
)
def test_wrong_settings_are_refused_by_name(data, message):
    assert refusal(data) == message
