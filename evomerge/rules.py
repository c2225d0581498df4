"""A parameter's value, which may differ between tensors: rules of which the first that applies counts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from pydantic import Field, field_validator

from evomerge.catalogue import Method, Parameter, Scope
from evomerge.errors import Gathering, RecipeError, one_line
from evomerge.records import Place, Role
from evomerge.strict import StrictModel

Scalar = bool | float | str


class Rule(StrictModel):
    """A value, and the tensors it is for.

    Attributes:
        role: Only tensors of this role; None: any.
        match: Only tensors whose name contains this text; None: any.
        slice: Only tensors of this slice of the recipe, from 0, over whose layers anchors are spread then;
            None: any.
        value: A number, switch or choice, or anchors spread evenly from the first layer to the last.
    """

    role: Role | None = None
    match: str | None = Field(default=None, min_length=1, max_length=200)
    slice: int | None = Field(default=None, ge=0)
    value: Scalar | tuple[float, ...]

    @field_validator("value")
    @classmethod
    def _shorten(cls, value: Scalar | tuple[float, ...]) -> Scalar | tuple[float, ...]:
        if isinstance(value, tuple):
            if not value:
                raise ValueError("expected a number or a list of numbers, got an empty list")
            if all(anchor == value[0] for anchor in value):
                return value[0] + 0.0
            return tuple(anchor + 0.0 for anchor in value)
        # Adding zero turns -0.0 into 0.0, so that equal numbers look equal.
        return value if isinstance(value, bool | str) else value + 0.0

    @property
    def general(self) -> bool:
        """Whether it applies to every tensor."""
        return self.role is None and self.match is None and self.slice is None

    def applies(self, place: Place) -> bool:
        """Whether it is for the tensor at `place`."""
        if self.role is not None and self.role != place.role:
            return False
        if self.slice is not None and self.slice != place.slice:
            return False
        return self.match is None or self.match in place.name

    def at(self, depth: float) -> Scalar:
        """Return the value at a depth in [0, 1]."""
        if not isinstance(self.value, tuple):
            return self.value
        position = depth * (len(self.value) - 1)
        nearest_anchor = round(position)
        if abs(position - nearest_anchor) < ON_ANCHOR:
            return self.value[nearest_anchor]
        left = int(position)
        share = position - left
        return (1 - share) * self.value[left] + share * self.value[left + 1]


Setting = tuple[Rule, ...]

LARGEST = 1e30
"""Largest parameter: what it is multiplied by must still fit into float32."""

ON_ANCHOR = 1e-9
"""Depths this near to an anchor, in steps between anchors, get its value and no blend with its neighbour."""


def rules_of(name: str, value: Any) -> Any:
    """Return a setting in its long form, whatever form it was written in."""
    if isinstance(value, dict | Rule):
        return [value]
    items = list(value) if isinstance(value, list | tuple) else []
    if items and all(isinstance(item, dict | Rule) for item in items):
        return items
    anchors = bool(items) and all(_is_number(item) for item in items)
    if not (anchors or isinstance(value, bool | str) or _is_number(value)):
        raise ValueError(
            f"{name}: expected a number, switch or choice, a list of numbers, or a list of rules with a "
            f"value each, got {one_line(json.dumps(value, default=str))[:80]}"
        )
    return [{"value": items or value}]


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def value_at(setting: Setting, place: Place) -> Scalar:
    """Return what a complete setting (its last rule is general) says for one tensor."""
    for rule in setting:
        if rule.applies(place):
            return rule.at(place.depth if rule.slice is None else place.slice_depth)
    raise RecipeError(f"no value for tensor {place.name}: the last rule must hold for every tensor")


def check_value(value: Scalar, parameter: Parameter, where: str) -> None:
    """Raise RecipeError unless a parameter may have this value."""
    if parameter.choices:
        if value not in parameter.choices or type(value) is not type(parameter.choices[0]):
            choices = ", ".join(str(choice).lower() for choice in parameter.choices)
            raise RecipeError(f"{where}: expected one of {choices}, got {value!r}")
        return
    if isinstance(value, bool | str) or not math.isfinite(value):
        raise RecipeError(f"{where}: expected a number, got {value!r}")
    if abs(value) > LARGEST:
        raise RecipeError(f"{where}: expected a number of at most {LARGEST:g}, got {value!r}")
    low, high = parameter.valid_low, parameter.valid_high
    if (low is not None and value < low) or (high is not None and value > high):
        wanted = f"{low} to {high}" if low is not None and high is not None else f"at least {low}"
        raise RecipeError(f"{where}: expected {wanted}, got {value}")


def without_unreachable(setting: Setting) -> Setting:
    """Leave out rules behind one that applies to every tensor, or to the same tensors."""
    kept: dict[tuple[Any, ...], Rule] = {}
    for rule in setting:
        kept.setdefault((rule.role, rule.match, rule.slice), rule)
        if rule.general:
            break
    return tuple(kept.values())


def plain_settings(settings: Mapping[str, Setting]) -> dict[str, Any]:
    """Return settings in their shortest written form."""
    plain: dict[str, Any] = {}
    for name, setting in settings.items():
        if len(setting) == 1:
            value = setting[0].value
            plain[name] = list(value) if isinstance(value, tuple) else value
        else:
            plain[name] = [rule.model_dump(mode="json", exclude_none=True) for rule in setting]
    return plain


def chosen_settings(settings: Mapping[str, Setting], method: Method) -> dict[str, Any]:
    """Return the settings that differ from the defaults: a parameter that is new changes no old digest."""

    def is_default(name: str, setting: Setting) -> bool:
        return len(setting) == 1 and setting[0].general and setting[0].value == method.parameter(name).default

    return plain_settings(
        {name: setting for name, setting in settings.items() if not is_default(name, setting)}
    )


def _checked(name: str, setting: Setting, method: Method, scope: Scope, where: str) -> Setting:
    parameter = method.parameter(name)
    if parameter.scope != scope:
        owner = "each source" if parameter.scope == "source" else "the method as a whole"
        raise RecipeError(f"{where}.{name}: this parameter belongs to {owner}")
    for rule in setting:
        for value in rule.value if isinstance(rule.value, tuple) else (rule.value,):
            check_value(value, parameter, f"{where}.{name}")
    setting = without_unreachable(setting)
    if not parameter.per_tensor and not (len(setting) == 1 and setting[0].general):
        raise RecipeError(f"{where}.{name}: one value for all tensors, got rules")
    return setting


def complete_settings(settings: dict[str, Setting], method: Method, scope: Scope, where: str) -> None:
    """Check the settings of one scope and fill in defaults, so that equal recipes look equal."""
    with Gathering() as gathering:
        for name, setting in settings.items():
            with gathering.kept():
                settings[name] = _checked(name, setting, method, scope, where)
    for parameter in method.parameters:
        if parameter.scope != scope:
            continue
        setting = settings.get(parameter.name, ())
        if setting and setting[-1].general:
            continue
        if parameter.default is None:
            raise RecipeError(
                f"{where}.{parameter.name}: missing; method {method.name} has no default for it"
            )
        settings[parameter.name] = (*setting, Rule(value=parameter.default))
    ordered = {p.name: settings[p.name] for p in method.parameters if p.name in settings}
    settings.clear()
    settings.update(ordered)
