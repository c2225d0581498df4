"""The merge methods: their parameters, ranges, defaults, needs and papers. No torch.

Recipe, space and kernels all read this one table, so a parameter exists here or nowhere.
"""

from __future__ import annotations

from evomerge.catalogue.averages import AVERAGES
from evomerge.catalogue.elementwise import ELEMENTWISE
from evomerge.catalogue.entry import Method, Parameter, Scope
from evomerge.catalogue.reinforced import REINFORCED
from evomerge.catalogue.spectral import SPECTRAL
from evomerge.catalogue.thinned import THINNED
from evomerge.errors import RecipeError, nearest

__all__ = ["CATALOGUE", "FAMILIES", "Method", "Parameter", "Scope", "method_named"]

FAMILIES: dict[str, tuple[Method, ...]] = {
    "averages": AVERAGES,
    "thinned deltas": THINNED,
    "entry by entry": (*ELEMENTWISE, *REINFORCED),
    "spectral": SPECTRAL,
}
"""The methods by kind, as they are listed for people."""

CATALOGUE: dict[str, Method] = {method.name: method for family in FAMILIES.values() for method in family}


def method_named(name: str) -> Method:
    """Return a method of the catalogue.

    Raises:
        RecipeError: There is none of that name.
    """
    try:
        return CATALOGUE[name]
    except KeyError:
        hint = nearest(name, CATALOGUE) or "; `evomerge methods` lists them"
        raise RecipeError(f'unknown merge method "{name}"{hint}') from None
