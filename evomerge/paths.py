"""Which layers of which sources a model is made of: slices of them, or a path through them with scales."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from evomerge.errors import RecipeError
from evomerge.strict import StrictModel

SMALLEST, LARGEST = 1e-3, 1e3
"""Bounds of a scale's magnitude, and of the product of the scales up to any layer."""

LONGEST = 10_000
"""Most layers of a path."""

_SPAN = re.compile(r"(\S+) +(\d{1,5})(?:-(\d{1,5}))?(?: +(\S+))?")


class Slice(StrictModel):
    """Consecutive layers of the merged model, and the layers of each source that they are made of.

    Attributes:
        layers: Name of a source, or of the base, to its first layer and the one behind its last, from 0; all
            of one length. Sources that are not named do not take part.
    """

    layers: dict[str, tuple[int, int]] = Field(min_length=1)

    @property
    def count(self) -> int:
        """Number of layers."""
        first, end = next(iter(self.layers.values()))
        return end - first


def _within(scale: float) -> float:
    if not SMALLEST <= abs(scale) <= LARGEST:
        raise ValueError(f"expected {SMALLEST:g} to {LARGEST:g}, or that with a minus sign, got {scale:g}")
    return scale


class Step(StrictModel):
    """One layer of a path; as a text, `SOURCE LAYER` or `SOURCE LAYER SCALE`.

    Attributes:
        source: Name of the source that the layer is of.
        layer: Its number there, from 0.
        scale: The hidden state is multiplied by it before the layer.
    """

    source: str = Field(min_length=1)
    layer: int = Field(ge=0)
    scale: Annotated[float, AfterValidator(_within)] = 1.0

    def __str__(self) -> str:
        scale = "" if self.scale == 1.0 else f" {self.scale!r}"
        return f"{self.source} {self.layer}{scale}"


class LayerPath(StrictModel):
    """The layers of a model, in the order in which it runs through them.

    In a file it may be the list of layers alone, and `a 0-7` stands for the layers 0 to 7 of `a`; a scale
    behind it is that of the first of them.

    Attributes:
        layers: From the first to the last; a layer may occur more than once.
        ends: Name of the source that gives embedding, final norm, head, config and tokenizer; None: that of
            the first layer.
    """

    layers: tuple[Step, ...] = Field(min_length=1, max_length=LONGEST)
    ends: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _listed(cls, data: Any) -> Any:
        return {"layers": data} if isinstance(data, list | tuple) else data

    @field_validator("layers", mode="before")
    @classmethod
    def _read(cls, data: Any) -> Any:
        if not isinstance(data, list | tuple):
            return data
        steps: list[Any] = []
        for item in data:
            steps += _steps(item) if isinstance(item, str) else [item]
        return steps

    @model_validator(mode="after")
    def _check(self) -> Self:
        for number, factor in enumerate(self.factors):
            if not SMALLEST <= abs(factor) <= LARGEST:
                raise ValueError(
                    f"layers.{number}: the scales up to here multiply to {factor:g}; expected a magnitude of "
                    f"{SMALLEST:g} to {LARGEST:g}"
                )
        return self

    @property
    def end(self) -> str:
        """Name of the source that gives embedding, final norm and head."""
        return self.ends or self.layers[0].source

    @property
    def factors(self) -> tuple[float, ...]:
        """The product of the scales up to and with each layer."""
        product, found = 1.0, []
        for step in self.layers:
            product *= step.scale
            found.append(product)
        return tuple(found)

    @property
    def scaled(self) -> bool:
        """Whether any scale is not 1."""
        return any(step.scale != 1.0 for step in self.layers)

    @property
    def slices(self) -> tuple[Slice, ...]:
        """One slice for each layer."""
        return tuple(Slice(layers={step.source: (step.layer, step.layer + 1)}) for step in self.layers)

    @property
    def runs(self) -> list[tuple[str, int, int]]:
        """Stretches of consecutive layers of one source, whatever the scales: source, first, end."""
        found: list[tuple[str, int, int]] = []
        for step in self.layers:
            if found and found[-1][0::2] == (step.source, step.layer):
                found[-1] = (step.source, found[-1][1], step.layer + 1)
            else:
                found.append((step.source, step.layer, step.layer + 1))
        return found

    def check_sources(self, names: Sequence[str]) -> None:
        """Raise RecipeError unless all its layers are of these sources, and some layer of each is used."""
        for i, step in enumerate(self.layers):
            if step.source not in names:
                raise RecipeError(f'path.layers.{i}: "{step.source}" is none of {", ".join(names)}')
        if self.end not in names:
            raise RecipeError(f'path.ends: "{self.end}" is none of {", ".join(names)}')
        used = {self.end, *(step.source for step in self.layers)}
        for name in names:
            if name not in used:
                raise RecipeError(f'path: no layer is of "{name}"; leave that source out')

    def to_json(self) -> dict[str, Any]:
        """Return its shortest written form."""
        ends = {} if self.ends is None else {"ends": self.ends}
        return {"layers": [str(step) for step in self.layers], **ends}


def _steps(text: str) -> list[dict[str, Any]]:
    match = _SPAN.fullmatch(text.strip())
    if match is None:
        raise ValueError(f'expected SOURCE LAYER, SOURCE FIRST-LAST, or either with a scale, got "{text}"')
    source, first, last, scale = match[1], int(match[2]), int(match[3] or match[2]), match[4]
    if last < first or last - first >= LONGEST:
        raise ValueError(f'"{text}": expected the first layer, then a later one')
    steps: list[dict[str, Any]] = [{"source": source, "layer": layer} for layer in range(first, last + 1)]
    if scale is not None:
        try:
            steps[0]["scale"] = float(scale)
        except ValueError:
            raise ValueError(f'"{text}": expected a number as the scale, got "{scale}"') from None
    return steps
