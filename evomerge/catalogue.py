"""The merge methods: their parameters, ranges, defaults, needs and papers. No torch.

Recipe, space and kernels all read this one table, so a parameter exists here or nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from evomerge.errors import RecipeError, nearest

Scope = Literal["source", "method"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """One parameter of a method.

    Attributes:
        name: Its name in recipes, configs and mergekit files.
        scope: `source`: one value for each source; `method`: one value for the merge.
        default: Used where a recipe leaves it out; None means that a recipe must give it.
        low: Smallest value a search draws by default; None for switches and choices.
        high: Largest value a search draws by default.
        valid_low: Smallest value that has a meaning at all; None: unbounded.
        valid_high: Largest value that has a meaning at all; None: unbounded.
        choices: The allowed values of a switch or choice; empty for a real number.
        per_tensor: Whether the value may differ between tensors (role, name, depth).
        doc: One line for people.
    """

    name: str
    scope: Scope
    doc: str
    default: float | bool | str | None = None
    low: float | None = None
    high: float | None = None
    valid_low: float | None = None
    valid_high: float | None = None
    choices: tuple[bool | str, ...] = ()
    per_tensor: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One merge method.

    Attributes:
        name: Its name in recipes, configs and, where mergekit has it, mergekit files.
        title: One line for people.
        paper: Where it was published.
        needs_base: Whether a base checkpoint is required; if not, one may not be given.
        min_sources: Fewest sources besides the base.
        max_sources: Most sources besides the base; None: any number.
        parameters: Its parameters.
        random: Whether the recipe's seed changes the result.
        mergekit: Whether mergekit has a method of this name.
        notes: Where implementations differ, and what is done here.
    """

    name: str
    title: str
    paper: str
    needs_base: bool
    min_sources: int = 1
    max_sources: int | None = None
    parameters: tuple[Parameter, ...] = field(default=())
    random: bool = False
    mergekit: bool = True
    notes: str = ""

    def parameter(self, name: str) -> Parameter:
        """Return the parameter of that name.

        Raises:
            RecipeError: The method has no such parameter.
        """
        for parameter in self.parameters:
            if parameter.name == name:
                return parameter
        known = [parameter.name for parameter in self.parameters]
        raise RecipeError(f'method "{self.name}" has no parameter "{name}"{nearest(name, known)}')


def _weight(default: float | None, low: float, high: float, doc: str) -> Parameter:
    return Parameter(name="weight", scope="source", default=default, low=low, high=high, doc=doc)


def _normalize(default: bool, doc: str) -> Parameter:
    return Parameter(name="normalize", scope="method", default=default, choices=(True, False), doc=doc)


_DENSITY = Parameter(
    name="density",
    scope="source",
    default=1.0,
    low=0.1,
    high=1.0,
    valid_low=0.0,
    valid_high=1.0,
    doc="fraction of the entries of each delta tensor that is kept",
)
_LAMBDA = Parameter(
    name="lambda", scope="method", default=1.0, low=0.3, high=1.5, doc="scale of the merged delta"
)
_RESCALE = Parameter(
    name="rescale",
    scope="method",
    default="expectation",
    choices=("expectation", "l1", "none"),
    per_tensor=False,
    doc="what survivors are scaled by: 1/density (the paper), to the delta's own L1 norm (mergekit), or not",
)

CATALOGUE: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="linear",
            title="Weighted average of the sources",
            paper="Model soups, arXiv 2203.05482",
            needs_base=False,
            parameters=(
                _weight(1.0, 0.0, 1.0, "share of the source"),
                _normalize(True, "divide by the sum of the weights"),
            ),
        ),
        Method(
            name="slerp",
            title="Spherical interpolation of two sources, tensor by tensor",
            paper="Shoemake 1985, doi 10.1145/325165.325242",
            needs_base=False,
            min_sources=2,
            max_sources=2,
            parameters=(
                Parameter(
                    name="t",
                    scope="method",
                    low=0.0,
                    high=1.0,
                    valid_low=0.0,
                    valid_high=1.0,
                    doc="0 is the first source, 1 the second",
                ),
            ),
            notes="Tensors whose directions agree within |cos| > 0.9995 are interpolated linearly, "
            "as in mergekit.",
        ),
        Method(
            name="task_arithmetic",
            title="Base plus weighted sum of deltas",
            paper="Editing models with task arithmetic, arXiv 2212.04089",
            needs_base=True,
            parameters=(
                _weight(1.0, 0.0, 1.5, "factor of the source's delta"),
                _LAMBDA,
                _normalize(False, "divide by the sum of the weights"),
            ),
        ),
        Method(
            name="ties",
            title="Trim deltas by magnitude, elect a sign, average those that agree",
            paper="TIES-Merging, arXiv 2306.01708",
            needs_base=True,
            parameters=(
                _weight(1.0, 0.0, 1.5, "factor of the source's trimmed delta, and of its vote"),
                _DENSITY,
                _LAMBDA,
                _normalize(True, "divide by the weights of the sources that agree"),
            ),
            notes="Trimmed tensor by tensor with exact counts, vote by weighted sum, a tie elects plus "
            "(mergekit's rules); the paper trims over the whole model vector and has no weights.",
        ),
        Method(
            name="dare_linear",
            title="Drop delta entries at random and rescale, then task arithmetic",
            paper="Language Models are Super Mario (DARE), arXiv 2311.03099",
            needs_base=True,
            random=True,
            parameters=(
                _weight(1.0, 0.0, 1.5, "factor of the source's delta"),
                _DENSITY,
                _LAMBDA,
                _normalize(False, "divide by the sum of the weights"),
                _RESCALE,
            ),
            notes="Masks come from a counter-based generator keyed by seed, source and tensor, and are "
            "nested in density; mergekit's masks depend on the order of its work.",
        ),
        Method(
            name="dare_ties",
            title="Drop delta entries at random and rescale, then elect a sign and sum those that agree",
            paper="Language Models are Super Mario (DARE), arXiv 2311.03099",
            needs_base=True,
            random=True,
            parameters=(
                _weight(1.0, 0.0, 1.5, "factor of the source's delta, and of its vote"),
                _DENSITY,
                _LAMBDA,
                _normalize(False, "divide by the weights of the sources that agree"),
                _RESCALE,
            ),
            notes="The random drop replaces the magnitude trim, as in mergekit.",
        ),
    )
}


def method_named(name: str) -> Method:
    """Return a method of the catalogue.

    Raises:
        RecipeError: There is none of that name.
    """
    try:
        return CATALOGUE[name]
    except KeyError:
        raise RecipeError(f'unknown merge method "{name}"{nearest(name, CATALOGUE)}') from None
