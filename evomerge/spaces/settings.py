"""The `space` section of a run config."""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from evomerge.catalogue import Parameter, method_named
from evomerge.errors import RecipeError, nearest
from evomerge.recipe import Dtype, Scalar, check_value
from evomerge.records import Role
from evomerge.spaces.dataflow_settings import DataFlowSettings, LayerEditsSettings
from evomerge.strict import MOST_LOOKED_AT, StrictModel, all_wrong

ROLES: tuple[Role, ...] = ("attention", "mlp", "norm", "embedding", "head", "other")


class Granularity(StrictModel):
    """How a parameter may vary over depth. Exactly one of the two is given.

    Attributes:
        layers: One value for each block of this many layers, and for embedding and head each their own.
        anchors: This many values, piecewise-linear from the first layer to the last.
    """

    layers: int | None = Field(default=None, ge=1)
    anchors: int | None = Field(default=None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: Any) -> Any:
        if data == "model":
            return {"anchors": 1}
        if data == "layer":
            return {"layers": 1}
        if isinstance(data, str):
            raise ValueError('expected model, layer, {layers: n} or {anchors: n}, got "' + data + '"')
        return data

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.layers is None) == (self.anchors is None):
            raise ValueError("give either layers or anchors")
        return self


class Span(StrictModel):
    """What a parameter may be: a range of numbers, whole numbers of a range, or choices.

    Attributes:
        low: Smallest value; None: the method's.
        high: Largest value; None: the method's.
        log: Whether equal steps are equal factors; needs `low` above 0.
        choices: Values to choose from, in place of a range.
        granularity: Over depth; None: the space's.
    """

    low: float | None = None
    high: float | None = None
    log: bool = False
    choices: tuple[Scalar, ...] = ()
    granularity: Granularity | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.choices:
            if self.low is not None or self.high is not None or self.log:
                raise ValueError("give either choices or a range")
            if len(set(map(repr, self.choices))) != len(self.choices):
                raise ValueError(f"choices: {list(self.choices)} holds a value twice")
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise ValueError(f"low must be below high, got {self.low} and {self.high}")
        if self.log and self.low is not None and self.low <= 0:
            raise ValueError(f"a logarithmic range needs low above 0, got {self.low}")
        return self


class SeedSpan(StrictModel):
    """A searched seed of random masks.

    Attributes:
        count: Seeds to choose from: 0 to `count` - 1.
    """

    count: int = Field(ge=2, le=1000)


class ParameterSettings(StrictModel):
    """The recipes that a run may try: one method, its parameters fixed or free.

    Attributes:
        kind: `parameter`: coefficients of one method.
        method: A method of the catalogue.
        parameters: By name: a number, switch or choice holds it fixed, `{low, high}` or `{choices}` frees
            it; `free` takes the method's own range. What is left out keeps its default, except that
            weights and `t` are free.
        granularity: `model`, `layer`, `{layers: n}` or `{anchors: n}`.
        split: Roles (`attention`, `mlp`, ...) or parts of tensor names that get values of their own.
        seed: Of random masks, for methods that draw any; `{count: n}` searches it.
        dtype: Of the merged weights; None: as in the base, else first source.
        tokenizer: Name of the source that gives the tokenizer; None: base, else first.
    """

    kind: Literal["parameter"] = "parameter"
    method: str
    parameters: dict[str, Scalar | Span] = Field(default_factory=dict)
    granularity: Granularity = Granularity(anchors=1)
    split: tuple[str, ...] = ()
    seed: Annotated[int, Field(ge=0, lt=2**63)] | SeedSpan = 0
    dtype: Dtype | None = None
    tokenizer: str | None = None

    @field_validator("split")
    @classmethod
    def _distinct(cls, split: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(split)) != len(split) or "" in split:
            raise ValueError(f"expected distinct names, got {list(split)}")
        return split

    @classmethod
    def misnamed(cls, data: dict[Any, Any]) -> list[str]:
        """Return unknown keys, and the names of a method or of parameters that there are not."""
        found, name, parameters = super().misnamed(data), data.get("method"), data.get("parameters")
        if not isinstance(name, str):
            return found
        try:
            method = method_named(name)
        except RecipeError as problem:
            return [*found, f"method: {problem}"]
        for given in islice(parameters if isinstance(parameters, dict) else (), MOST_LOOKED_AT):
            try:
                method.parameter(str(given))
            except RecipeError as problem:
                found.append(f"parameters: {problem}")
        return found

    @model_validator(mode="after")
    def _check(self) -> Self:
        method, problems = method_named(self.method), []
        for name, span in self.parameters.items():
            try:
                _check_span(name, span, method.parameter(name))
            except RecipeError as problem:
                problems.append(str(problem))
        if isinstance(self.seed, SeedSpan) and not method.random:
            problems.append(f"seed: method {method.name} draws nothing at random")
        if problems:
            raise all_wrong(problems, self.parameters)
        return self

    def span(self, parameter: Parameter) -> Scalar | Span:
        """Return what a parameter is fixed to, or its span with both ends."""
        given = self.parameters.get(parameter.name)
        if given is None:
            return Span() if parameter.name in ("weight", "t") else _default(parameter)
        return Span(choices=parameter.choices) if given == "free" else given


def _default(parameter: Parameter) -> Scalar:
    if parameter.default is None:
        raise RecipeError(f"parameters.{parameter.name}: missing; it has no default")
    return parameter.default


def _check_span(name: str, span: Scalar | Span, parameter: Parameter) -> None:
    where = f"parameters.{name}"
    if not isinstance(span, Span):
        if isinstance(span, str) and span != "free" and not parameter.choices:
            raise RecipeError(f'{where}: expected a number, free, {{low, high}} or {{choices}}, got "{span}"')
        if span != "free":
            check_value(span, parameter, where)
        return
    for value in span.choices:
        check_value(value, parameter, f"{where}.choices")
    if parameter.choices and not span.choices:
        raise RecipeError(f"{where}: a switch or choice has no range; write free or choices")
    if span.granularity and not parameter.per_tensor:
        raise RecipeError(f"{where}.granularity: one value holds for all tensors")
    for end, bound in (("low", span.low), ("high", span.high)):
        if bound is not None:
            check_value(bound, parameter, f"{where}.{end}")


class JointSettings(StrictModel):
    """Coefficients of a merge and a layer path, searched together: the path runs through the merged model.

    The merge is a source of the path beside the models; it comes first, as the source `merge`.

    Attributes:
        kind: `joint`.
        parameter: The merge, as in a space of this kind.
        path: The path, as in a space of the kind `data_flow` or `layer_edits`.
    """

    kind: Literal["joint"]
    parameter: Annotated[ParameterSettings, BeforeValidator(lambda data: _of_kind(data, ("parameter",)))]
    path: Annotated[
        DataFlowSettings | LayerEditsSettings,
        BeforeValidator(lambda data: _of_kind(data, ("data_flow", "layer_edits"))),
    ]

    @property
    def dtype(self) -> Dtype | None:
        """Of the merged weights."""
        return self.parameter.dtype

    @property
    def tokenizer(self) -> str | None:
        """Name of the source that gives the tokenizer."""
        return self.parameter.tokenizer

    @property
    def scaled(self) -> bool:
        """Whether paths may have scales."""
        return self.path.scaled


class SegmentsSettings(StrictModel):
    """Mixes of the sources that change along the flattened parameters; for the optimizer `niches`.

    Attributes:
        kind: `segments`: segment tables (M2N2, arXiv 2508.16204).
        splits: Where a split point may lie: at any `parameter` (to the size of a cell), or only at the start
            of a `tensor`, a `layer`, or the tensors of one `role` in a layer.
        chromosomes: Roles that are flattened together and have a split point of their own, for each
            chromosome; what is left is the last one. Empty: one chromosome.
        cells: About how many cells the parameters are cut into where split points may lie inside tensors.
        max_segments: From more segments than this, neighbours that differ least are merged.
        merge_error: How far that may move the weights, as a share of the largest distance between two
            sources (Euclidean, over all weights); segments that differ by more stay as they are.
        dtype: Of the merged weights; None: as in the first source.
        tokenizer: Name of the source that gives the tokenizer; None: the first.
    """

    kind: Literal["segments"]
    splits: Literal["parameter", "tensor", "layer", "role"] = "parameter"
    chromosomes: tuple[tuple[Role, ...], ...] = ()
    cells: int = Field(default=4096, ge=1, le=2**16)
    max_segments: int = Field(default=64, ge=1)
    merge_error: float = Field(default=0.02, ge=0, le=1)
    dtype: Dtype | None = None
    tokenizer: str | None = None

    @field_validator("chromosomes")
    @classmethod
    def _distinct(cls, chromosomes: tuple[tuple[Role, ...], ...]) -> tuple[tuple[Role, ...], ...]:
        roles = [role for chromosome in chromosomes for role in chromosome]
        if len(set(roles)) != len(roles) or () in chromosomes:
            raise ValueError(
                f"expected one or more roles each, none twice, got {[list(c) for c in chromosomes]}"
            )
        return chromosomes


KINDS: dict[str, type[StrictModel]] = {
    "parameter": ParameterSettings,
    "data_flow": DataFlowSettings,
    "layer_edits": LayerEditsSettings,
    "joint": JointSettings,
    "segments": SegmentsSettings,
}
"""Kind of space to its settings."""


def _of_kind(data: Any, kinds: Collection[str] = KINDS) -> Any:
    """Read a section as settings of its kind, so that faults are told of that kind alone."""
    if not isinstance(data, dict):
        return data
    kind = data.get("kind", "parameter" if "parameter" in kinds else None)
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f'kind: unknown kind of space "{kind}"{nearest(str(kind), kinds)}')
    return KINDS[kind].model_validate(data)


SpaceSettings = Annotated[
    ParameterSettings | DataFlowSettings | LayerEditsSettings | JointSettings | SegmentsSettings,
    BeforeValidator(_of_kind),
]
"""The section as settings of any kind; a union of the kinds."""
