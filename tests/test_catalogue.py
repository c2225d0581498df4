"""The table of merge methods."""

import math

import pytest

from evomerge.catalogue import CATALOGUE, method_named
from evomerge.errors import RecipeError
from evomerge.recipe import check_value, parse_recipe

METHODS = sorted(CATALOGUE.values(), key=lambda method: method.name)
PARAMETERS = [
    pytest.param(method, parameter, id=f"{method.name}.{parameter.name}")
    for method in METHODS
    for parameter in method.parameters
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_method_is_filed_under_its_name_and_documented(method):
    assert CATALOGUE[method.name] is method
    assert method.title
    assert method.paper
    assert 1 <= method.min_sources <= (method.max_sources or method.min_sources)
    names = [parameter.name for parameter in method.parameters]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("method", "parameter"), PARAMETERS)
def test_a_parameter_has_a_range_or_choices_and_a_valid_default(method, parameter):
    assert parameter.doc
    if parameter.choices:
        assert (parameter.low, parameter.high, parameter.valid_low) == (None, None, None)
        assert len({type(choice) for choice in parameter.choices}) == 1
    else:
        assert parameter.low < parameter.high
        for bound in (parameter.low, parameter.high):
            check_value(bound, parameter, "bound")
    if parameter.default is not None:
        check_value(parameter.default, parameter, "default")


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_defaults_alone_make_a_recipe(method):
    required = {p.name: p.low for p in method.parameters if p.default is None}
    assert all(p.scope == "method" for p in method.parameters if p.default is None)
    recipe = parse_recipe(
        {
            "method": method.name,
            "base": {"name": "base", "path": "b"} if method.needs_base else None,
            "sources": [{"name": f"s{i}", "path": f"s{i}"} for i in range(method.min_sources)],
            "parameters": required,
        },
        "r",
    )
    assert set(recipe.parameters) == {p.name for p in method.parameters if p.scope == "method"}


@pytest.mark.parametrize(("method", "parameter"), PARAMETERS)
def test_values_outside_what_has_a_meaning_are_refused(method, parameter):
    wrong = [None, "other", math.nan, math.inf] if not parameter.choices else ["other", 1.0, 0]
    if parameter.valid_high is not None:
        wrong += [parameter.valid_high + 1e-9, parameter.valid_low - 1e-9]
    for value in wrong:
        if value is not None:
            with pytest.raises(RecipeError, match=r"^here: expected "):
                check_value(value, parameter, "here")


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(RecipeError, match='unknown merge method "dare_tis"; did you mean "dare_ties"'):
        method_named("dare_tis")
    with pytest.raises(RecipeError, match='method "ties" has no parameter "densty"; did you mean "density"'):
        method_named("ties").parameter("densty")
    assert method_named("slerp").parameter("t").default is None
