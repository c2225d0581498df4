"""Settings of a recipe as mergekit's filters and gradients. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from evomerge.errors import RecipeError
from evomerge.recipe import Rule, Scalar, Setting, value_at
from evomerge.records import Place, Role
from evomerge.slices import Layered, Output

Scale = Callable[[Scalar, Place], Scalar]
"""Returns what is written for a value at a place."""


class FilterSource(Layered, Protocol):
    """What writing needs to know of the sources' layout."""

    def filters(self, role: Role) -> tuple[str, ...]:
        """Return the parts of tensor names that make a role."""


class Piece:
    """A slice of the recipe, or the whole model.

    Args:
        index: Number of the slice; None: the recipe has no slices.
        outputs: Its tensors.
        layout: Of the sources.
    """

    def __init__(self, index: int | None, outputs: Sequence[Output], layout: FilterSource) -> None:
        self.index, self.outputs, self.layout = index, outputs, layout
        places = [output.place for output in outputs]
        self.layers = list({place.layer: place for place in places if place.layer is not None}.values())
        """One tensor of each layer."""

    def written(self, setting: Setting, source: str | None, scale: Scale | None = None) -> Any:
        """Return a setting in mergekit's form.

        Args:
            setting: The setting.
            source: Name of the source whose parameter it is, under whose tensor names mergekit looks it up;
                None: a parameter of the method.
            scale: What is written for a value; None: the value itself.

        Raises:
            RecipeError: Filters cannot say it.
        """
        rules = [rule for rule in setting if rule.slice in (None, self.index)]
        anchored = [(rule, self._anchors(rule, scale)) for rule in rules]
        wanted = []
        for output in self.outputs:
            value = value_at(setting, output.place)
            name = output.place.name if source is None else output.inputs[source]
            value = value if scale is None else scale(value, output.place)
            wanted.append(_Wanted(name, self._position(output.place), value))
        return _corrected(_filters(anchored, self.layout), wanted)

    def _anchors(self, rule: Rule, scale: Scale | None) -> Any:
        """Return a rule's number, or its gradient over the layers of this piece."""
        if scale is None and (not isinstance(rule.value, tuple) or rule.slice == self.index):
            return list(rule.value) if isinstance(rule.value, tuple) else rule.value
        values = []
        for place in self.layers:
            value = rule.at(place.depth if rule.slice is None else place.slice_depth)
            values.append(value if scale is None else scale(value, place))
        return values[0] if all(value == values[0] for value in values) else values

    def _position(self, place: Place) -> float:
        """Return where in a gradient mergekit looks: at its end for an only layer, at its start outside."""
        if place.layer is None:
            return 0.0
        if len(self.layers) == 1:
            return 1.0
        return place.depth if self.index is None else place.slice_depth


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What a tensor must get: its name and position in mergekit's eyes, and the value."""

    name: str
    position: float
    value: Scalar


def _filters(rules: Sequence[tuple[Rule, Any]], layout: FilterSource) -> list[dict[str, Any]]:
    """Return rules as filters as far as filters have the same concept."""
    written: list[dict[str, Any]] = []
    for rule, value in rules:
        if rule.role is None:
            written.append({"value": value} if rule.match is None else {"filter": rule.match, "value": value})
        elif rule.match is None:
            parts = layout.filters(rule.role)
            written += [
                {"filter": part, "value": list(value) if isinstance(value, list) else value} for part in parts
            ]
    return written


def _corrected(written: list[dict[str, Any]], wanted: Sequence[_Wanted]) -> Any:
    """Return filters that give every tensor what is wanted, with filters of their own for exceptions.

    Head and final norm lie at depth 1 here and at the gradient's beginning in mergekit, roles can overlap
    in their parts of names, and a rule may ask for role and name at once.
    """

    def wrong(filters: list[dict[str, Any]]) -> list[_Wanted]:
        return [each for each in wanted if not _near(_read_there(filters, each), each.value)]

    exceptions = [{"filter": each.name, "value": each.value} for each in wrong(written)]
    filters = [*exceptions, *written]
    left = wrong(filters)
    if left:
        raise RecipeError(f"mergekit's filters cannot tell tensor {left[0].name} from others")
    return filters[0]["value"] if len(filters) == 1 else filters


def _near(one: Scalar | None, other: Scalar) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= 1e-12 * max(1.0, abs(other))
    return one == other


def _read_there(filters: list[dict[str, Any]], wanted: _Wanted) -> Scalar | None:
    """Return what mergekit makes of filters for one tensor."""
    for item in filters:
        if item.get("filter", "") in wanted.name:
            value = item["value"]
            return Rule(value=tuple(value)).at(wanted.position) if isinstance(value, list) else value
    return None


def inverse_density(density: Setting) -> Scale:
    """Return what scales a weight by 1/density, which mergekit lacks."""

    def scaled(weight: Scalar, place: Place) -> float:
        kept = float(value_at(density, place))
        return float(weight) / kept if kept else 0.0

    return scaled


def rising(settings: Mapping[str, Setting]) -> Scale | None:
    """Return what scales `lambda` by the factor of LiNeS, which mergekit lacks; None if that is 1."""
    if "lines_alpha" not in settings:
        return None
    alpha, beta = (float(settings[name][0].at(0.0)) for name in ("lines_alpha", "lines_beta"))
    if (alpha, beta) == (1.0, 0.0):
        return None

    def scaled(value: Scalar, place: Place) -> float:
        return float(value) * (alpha if place.layer is None else alpha + beta * place.depth)

    return scaled
