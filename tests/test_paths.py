"""Layer paths in recipes: what may be written, what is refused, what the digest sees."""

from __future__ import annotations

from typing import Any

import pytest

from evomerge.errors import RecipeError
from evomerge.paths import LayerPath
from evomerge.recipe import Recipe, parse_recipe
from evomerge.stacking import as_path, as_slices


def data(path: Any, *names: str, **more: Any) -> dict[str, Any]:
    sources = [{"name": name, "path": f"./{name}"} for name in names or ("a", "b")]
    return {"method": "passthrough", "sources": sources, "path": path, **more}


def recipe(path: Any, *names: str, **more: Any) -> Recipe:
    return parse_recipe(data(path, *names, **more), "r")


def refusal(given: dict[str, Any]) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(given, "r")
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix("r: ")


def test_a_path_is_read_from_texts_mappings_and_spans() -> None:
    short = recipe(["a 0-2", "b 1 -0.5", "b 2-3 2", "a 3"])
    assert short.path is not None
    assert [str(step) for step in short.path.layers] == [
        *("a 0", "a 1", "a 2", "b 1 -0.5", "b 2 2.0", "b 3", "a 3"),
    ]
    long = recipe(
        {
            "layers": [
                *({"source": "a", "layer": i} for i in range(3)),
                {"source": "b", "layer": 1, "scale": -0.5},
                {"source": "b", "layer": 2, "scale": 2.0},
                {"source": "b", "layer": 3},
                {"source": "a", "layer": 3},
            ],
            "ends": "a",
        }
    )
    assert long.digest == short.digest
    assert short.path.factors == (1, 1, 1, -0.5, -1, -1, -1)
    assert short.path.runs == [("a", 0, 3), ("b", 1, 4), ("a", 3, 4)]
    assert parse_recipe(short.to_json(), "again").digest == short.digest
    assert "parameters" not in short.to_json()["sources"][0]


def test_the_digest_sees_layers_scales_ends_and_nothing_of_recipes_without_a_path() -> None:
    digests = {
        recipe(path).digest
        for path in (
            ["a 0", "b 1", "a 2"],
            ["a 0", "b 1", "a 1"],
            ["a 0", "a 1", "b 2"],
            ["a 0", "b 1 0.5", "a 2"],
            ["a 0 0.5", "b 1", "a 2"],
            {"layers": ["a 0", "b 1", "a 2"], "ends": "b"},
        )
    }
    assert len(digests) == 6
    linear = parse_recipe({"method": "linear", "sources": [{"name": "a", "path": "./a"}]}, "r")
    # The digest of this recipe before there were paths.
    assert linear.digest == "9932de1d69eca0947ae11aafb173b4653554e024880f25d140250955b5f937dd"
    assert "path" not in linear.to_json()


def test_the_source_of_the_ends_is_the_reference() -> None:
    assert recipe({"layers": ["b 0", "a 1"], "ends": "a"}).reference.name == "a"
    assert recipe(["b 0", "a 1"]).reference.name == "b"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ([], "path.layers: expected at least 1 item(s), got []"),
        (["a 0 0", "b 0"], "path.layers.0.scale: expected 0.001 to 1000, or that with a minus sign, got 0"),
        (["a 0 1e4", "b 0"], "path.layers.0.scale: expected 0.001 to 1000"),
        (["a 0 500", "b 0 3"], "path.layers.1: the scales up to here multiply to 1500;"),
        (["a x", "b 0"], 'path.layers: expected SOURCE LAYER, SOURCE FIRST-LAST, or either with a scale'),
        (["a 3-1", "b 0"], 'path.layers: "a 3-1": expected the first layer, then a later one'),
        (["a 0 wide", "b 0"], 'path.layers: "a 0 wide": expected a number as the scale, got "wide"'),
        (["a 0", "c 0"], 'path.layers.1: "c" is none of a, b'),
        (["a 0"], 'path: no layer is of "b"; leave that source out'),
        ({"layers": ["a 0", "b 0"], "ends": "c"}, 'path.ends: "c" is none of a, b'),
        ({"layers": ["a 0", "b 0"], "end": "a"}, 'path: unknown key "end"; did you mean "ends"?'),
        ([{"source": "a", "layer": -1}], "path.layers.0.layer: expected at least 0, got -1"),
        ("a 0", 'path: expected a mapping, got "a 0"'),
    ],
)  # fmt: skip
def test_wrong_paths_are_refused(path: Any, message: str) -> None:
    assert refusal(data(path)).startswith(message)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"method": "linear"}, "path: needs method: passthrough, got linear; merge in a source of its own"),
        (
            {"slices": [{"layers": {"a": [0, 1]}}, {"layers": {"b": [0, 1]}}]},
            "path: expected either a path or",
        ),
        ({"tokenizer": "b"}, 'tokenizer: a path has that of its ends, "a"; leave it out'),
        ({"pad_to_multiple_of": 8, "tokenizer": "a"}, "pad_to_multiple_of: a model with a path takes"),
    ],
)
def test_what_does_not_go_with_a_path_is_refused(more: dict[str, Any], message: str) -> None:
    assert refusal(data(["a 0", "b 0"], **more)).startswith(message)


def test_parameters_of_sources_do_not_go_with_a_path() -> None:
    given = data(["a 0", "b 0"])
    given["sources"][0]["parameters"] = {"scale": 0.5}
    assert refusal(given) == "sources.a.parameters: a path has scales of its own; leave these out"


def test_a_source_may_be_a_recipe_whose_content_is_its_identity() -> None:
    inner = {"method": "linear", "sources": [{"name": "x", "path": "./x"}, {"name": "y", "path": "./y"}]}
    given = data(["m 0", "b 1", "m 2"], "m", "b")
    given["sources"][0] |= {"path": "run:first", "recipe": inner}
    found = parse_recipe(given, "r")
    assert [ref.path for ref in found.leaves] == ["./x", "./y", "./b"]
    given["sources"][0]["path"] = "elsewhere"
    assert parse_recipe(given, "r").digest == found.digest
    inner["sources"][0]["path"] = "./z"  # type: ignore[index]
    assert parse_recipe(given, "r").digest != found.digest
    assert parse_recipe(found.to_json(), "again").digest == found.digest
    bad = {
        **given,
        "sources": [{"name": "m", "path": "m", "recipe": {"method": "tise"}}, given["sources"][1]],
    }
    assert refusal(bad).startswith("sources.0.recipe.")


def test_nested_paths_become_absolute(tmp_path: Any) -> None:
    (tmp_path / "x").mkdir()
    inner = {"method": "linear", "sources": [{"name": "x", "path": "./x"}]}
    given = data(["m 0"], "m")
    given["sources"][0]["recipe"] = inner
    nested = parse_recipe(given, "r").located(tmp_path).sources[0].recipe
    assert nested is not None
    assert nested.sources[0].path == str((tmp_path / "x").resolve())


def test_paths_without_scales_are_slices_and_back() -> None:
    path = recipe(["a 0-3", "b 2-3", "b 3", "a 5"])
    slices = as_slices(path)
    assert slices.path is None
    assert [dict(piece.layers) for piece in slices.slices] == [
        *({"a": (0, 4)}, {"b": (2, 4)}, {"b": (3, 4)}, {"a": (5, 6)}),
    ]
    assert as_path(slices).digest == path.digest
    assert as_path(path) is path
    assert as_slices(slices) is slices


def test_what_slices_cannot_say_is_refused() -> None:
    with pytest.raises(RecipeError, match="slices have no scales"):
        as_slices(recipe(["a 0", "b 1 0.5", "a 2"]))
    with pytest.raises(RecipeError, match='first and last layer, not of "b"'):
        as_slices(recipe({"layers": ["a 0", "b 1", "a 2"], "ends": "b"}))
    sources = data(["a 0"])["sources"]
    slices = [{"layers": {"a": [0, 1]}}, {"layers": {"b": [0, 1]}}]
    two = parse_recipe({"method": "passthrough", "sources": sources, "slices": slices}, "r")
    with pytest.raises(RecipeError, match='the embedding is of "a" and the head of "b"'):
        as_path(two)
    linear = parse_recipe({"method": "linear", "sources": sources}, "r")
    with pytest.raises(RecipeError, match="expected a path, or slices of passthrough"):
        as_path(linear)


def test_long_paths_are_quick() -> None:
    path = LayerPath.model_validate(["a 0-999 1.5", "a 0-999"])
    assert len(path.layers) == 2000
    assert path.factors[-1] == 1.5
