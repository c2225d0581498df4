"""Writing recipes as mergekit's merge configs. No torch.

What mergekit cannot express is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from evomerge.catalogue import method_named
from evomerge.errors import RecipeError
from evomerge.mergekit import model_config
from evomerge.recipe import (
    Recipe,
    RecipeSource,
    Rule,
    Scalar,
    Setting,
    value_at,
)
from evomerge.records import Place, Role


class FilterSource(Protocol):
    """What writing needs to know of the sources' layout."""

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""

    @property
    def places(self) -> Mapping[str, Place]:
        """The place of every tensor."""

    def filters(self, role: Role) -> tuple[str, ...]:
        """Return the parts of tensor names that make a role."""


def to_mergekit(recipe: Recipe, layout: FilterSource) -> dict[str, Any]:
    """Return a recipe as a mergekit config that `mergekit-yaml` runs.

    Random masks differ between the two, so for methods that draw any the result is another sample of the
    same distribution.

    Raises:
        RecipeError: mergekit cannot express it.
    """
    method = method_named(recipe.method)
    if not method.mergekit:
        raise RecipeError(f"mergekit has no method {recipe.method}")
    expectation = _rescales_by_expectation(recipe)
    models = []
    for source in recipe.sources:
        settings = {name: _setting_written(rules, layout) for name, rules in source.parameters.items()}
        if expectation:
            settings["weight"] = _weight_written(source, layout)
        models.append({"model": _written(source.path, source.revision), "parameters": settings})
    shared = {name: _setting_written(rules, layout) for name, rules in recipe.parameters.items()}
    if "rescale" in shared:
        shared["rescale"] = shared["rescale"] == "l1"
    config: dict[str, Any] = {"merge_method": recipe.method, "models": models}
    if recipe.base:
        config["base_model"] = _written(recipe.base.path, recipe.base.revision)
    elif recipe.method == "slerp":
        config["base_model"] = models[0]["model"]
        for model in models:
            del model["parameters"]
    config["parameters"] = shared
    known = model_config(recipe.reference.path, recipe.reference.revision)
    dtype = recipe.dtype or known.get("dtype") or known.get("torch_dtype")
    if dtype:
        # mergekit works in `dtype`; float32 there and the recipe's dtype for the output is what is done here.
        config["dtype"] = "float32"
        config["out_dtype"] = dtype
    if recipe.tokenizer and recipe.tokenizer != recipe.reference.name:
        ref = next(ref for ref in recipe.refs if ref.name == recipe.tokenizer)
        config["tokenizer_source"] = _written(ref.path, ref.revision)
    return config


def _written(path: str, revision: str | None) -> Any:
    return {"model": {"path": path, "revision": revision}} if revision else path


def _setting_written(setting: Setting, layout: FilterSource) -> Any:
    """Return a setting in mergekit's form."""
    return _corrected(
        _rules_written(setting, layout),
        {place: value_at(setting, place) for place in layout.places.values()},
        layout,
    )


def _weight_written(source: RecipeSource, layout: FilterSource) -> Any:
    """Return the weights with the rescaling by 1/density in them, which mergekit lacks."""

    def divided(weight: Scalar, density: Scalar) -> float:
        return float(weight) / float(density) if density else 0.0

    weight, density = source.parameters["weight"], source.parameters["density"]
    depths = [i / max(layout.num_layers - 1, 1) for i in range(layout.num_layers)]
    rules = []
    for rule in weight:
        other = next((d for d in density if (d.role, d.match) == (rule.role, rule.match)), density[-1])
        values = tuple(divided(rule.at(depth), other.at(depth)) for depth in depths)
        rules.append(Rule(role=rule.role, match=rule.match, value=values))
    wanted: dict[Place, Scalar] = {
        place: divided(value_at(weight, place), value_at(density, place)) for place in layout.places.values()
    }
    return _corrected(_rules_written(tuple(rules), layout), wanted, layout)


def _rescales_by_expectation(recipe: Recipe) -> bool:
    rescale = recipe.parameters.get("rescale")
    if rescale is None or rescale[0].value != "expectation":
        return False
    if any(rule.value is not False for rule in recipe.parameters["normalize"]):
        raise RecipeError("mergekit cannot rescale by 1/density and normalise the weights at once")
    return True


def _rules_written(setting: Setting, layout: FilterSource) -> list[dict[str, Any]]:
    """Return the rules as filters as far as filters have the same concept."""
    written: list[dict[str, Any]] = []
    for rule in setting:
        value = _plain_value(rule.value)
        if rule.general:
            written.append({"value": value})
        elif rule.role is None:
            written.append({"filter": rule.match, "value": value})
        elif rule.match is None:
            parts = layout.filters(rule.role)
            written += [{"filter": part, "value": _plain_value(rule.value)} for part in parts]
    return written


def _corrected(written: list[dict[str, Any]], wanted: Mapping[Place, Scalar], layout: FilterSource) -> Any:
    """Return filters that give every tensor what is wanted, with filters of their own for exceptions.

    Head and final norm lie at depth 1 here and at the gradient's beginning in mergekit, roles can overlap
    in their parts of names, and a rule may ask for role and name at once.
    """
    several = layout.num_layers > 1

    def wrong(filters: list[dict[str, Any]]) -> list[Place]:
        return [place for place in wanted if not _near(_read_there(filters, place, several), wanted[place])]

    exceptions = [{"filter": place.name, "value": wanted[place]} for place in wrong(written)]
    filters = [*exceptions, *written]
    left = wrong(filters)
    if left:
        raise RecipeError(f"mergekit's filters cannot tell tensor {left[0].name} from others")
    return filters[0]["value"] if len(filters) == 1 else filters


def _near(one: Scalar | None, other: Scalar) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= 1e-12 * max(1.0, abs(other))
    return one == other


def _read_there(filters: list[dict[str, Any]], place: Place, several: bool) -> Scalar | None:
    """Return what mergekit makes of filters for one tensor."""
    depth = 0.0 if place.layer is None else place.depth if several else 1.0
    for item in filters:
        if item.get("filter", "") in place.name:
            value = item["value"]
            return Rule(value=tuple(value)).at(depth) if isinstance(value, list) else value
    return None


def _plain_value(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
