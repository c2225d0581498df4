"""What the catalogue says of a method and its parameters, and the parameters that many methods share."""

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
        base: Whether a base checkpoint is required, may not be given, or changes what is done.
        min_sources: Fewest sources besides the base.
        max_sources: Most sources besides the base; None: any number.
        parameters: Its parameters.
        random: Whether the recipe's seed changes the result.
        mergekit: Whether mergekit has a method of this name that does the same.
        ordered: Whether the order of the sources has a meaning.
        whole_model: Whether a tensor's result depends on other tensors.
        state_bytes: Bytes of prepared state for each entry of each source, about; what does not fit into the
            memory budget is made again for every candidate.
        notes: Where implementations differ, and what is done here.
        unverified: What of the published method could not be checked against its source; empty: nothing.
    """

    name: str
    title: str
    paper: str
    base: Literal["required", "none", "optional"] = "required"
    min_sources: int = 1
    max_sources: int | None = None
    parameters: tuple[Parameter, ...] = field(default=())
    random: bool = False
    mergekit: bool = False
    ordered: bool = False
    whole_model: bool = False
    state_bytes: float = 0.0
    notes: str = ""
    unverified: str = ""

    @property
    def needs_base(self) -> bool:
        """Whether a base must be given."""
        return self.base == "required"

    @property
    def takes_base(self) -> bool:
        """Whether a base may be given."""
        return self.base != "none"

    def check_count(self, count: int, where: str) -> None:
        """Raise RecipeError unless the method takes so many sources besides the base."""
        if count < self.min_sources or count > (self.max_sources or count):
            wanted = str(self.min_sources) if self.max_sources else f"at least {self.min_sources}"
            raise RecipeError(f"{where}: method {self.name} takes {wanted}, got {count}")

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


def weight(default: float | None, low: float, high: float, doc: str) -> Parameter:
    """Return the weight of a source."""
    return Parameter(name="weight", scope="source", default=default, low=low, high=high, doc=doc)


def normalize(default: bool, doc: str) -> Parameter:
    """Return the switch that divides by the weights."""
    return Parameter(name="normalize", scope="method", default=default, choices=(True, False), doc=doc)


DENSITY = Parameter(
    name="density",
    scope="source",
    default=1.0,
    low=0.1,
    high=1.0,
    valid_low=0.0,
    valid_high=1.0,
    doc="fraction of the entries of each delta tensor that is kept",
)
LAMBDA = Parameter(
    name="lambda", scope="method", default=1.0, low=0.3, high=1.5, doc="scale of the merged delta"
)
LINES_ALPHA = Parameter(
    name="lines_alpha",
    scope="method",
    default=1.0,
    low=0.0,
    high=1.0,
    per_tensor=False,
    doc="LiNeS: factor of the merged delta in the first layer and outside the layers",
)
LINES_BETA = Parameter(
    name="lines_beta",
    scope="method",
    default=0.0,
    low=0.0,
    high=1.5,
    per_tensor=False,
    doc="LiNeS: what the factor grows by from the first layer to the last",
)
MERGED_DELTA = (LAMBDA, LINES_ALPHA, LINES_BETA)
"""Of every method that adds one merged delta to the base: its scale, and how that grows with depth."""

RESCALE = Parameter(
    name="rescale",
    scope="method",
    default="expectation",
    choices=("expectation", "l1", "l2", "none"),
    per_tensor=False,
    doc="what survivors are scaled by: 1 / their probability (the papers), to the delta's own L1 norm "
    "(mergekit) or L2 norm, or not",
)
