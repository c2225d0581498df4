"""The recipe: a frozen, validated, canonical description of one merged model.

Its digest is its identity: equal digests over equal sources give bit-equal weights on one device type.
A parameter's value may be one number, a list of anchors (piecewise-linear over depth), or a list of
rules of which the first that applies to a tensor counts:

```yaml
evomerge: 1
method: ties
base: {name: base, path: ./base}
sources:
  - name: math
    path: ./math
    parameters:
      weight: [0.2, 0.9, 0.5]                 # anchors over depth
      density:
        - {role: attention, value: 0.3}       # first rule that applies
        - {match: embed_tokens, value: 1.0}
        - {value: 0.6}
parameters: {lambda: 1.0}
dtype: bfloat16
```
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from evomerge.catalogue import Method, Parameter, Scope, method_named
from evomerge.errors import RecipeError
from evomerge.records import Place, Role
from evomerge.strict import StrictModel, canonical_json, dump_yaml, one_line, read_yaml, validated

Scalar = bool | float | str
Dtype = Literal["float32", "bfloat16", "float16"]


class Rule(StrictModel):
    """A value, and the tensors it is for.

    Attributes:
        role: Only tensors of this role; None: any.
        match: Only tensors whose name contains this text; None: any.
        value: A number, switch or choice, or anchors spread evenly from the first layer to the last.
    """

    role: Role | None = None
    match: str | None = Field(default=None, min_length=1, max_length=200)
    value: Scalar | tuple[float, ...]

    @field_validator("value")
    @classmethod
    def _shorten(cls, value: Scalar | tuple[float, ...]) -> Scalar | tuple[float, ...]:
        if isinstance(value, tuple):
            if all(anchor == value[0] for anchor in value):
                return value[0] + 0.0
            return tuple(anchor + 0.0 for anchor in value)
        # Adding zero turns -0.0 into 0.0, so that equal numbers look equal.
        return value if isinstance(value, bool | str) else value + 0.0

    @property
    def general(self) -> bool:
        """Whether it applies to every tensor."""
        return self.role is None and self.match is None

    def applies(self, place: Place) -> bool:
        """Whether it is for the tensor at `place`."""
        if self.role is not None and self.role != place.role:
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

ON_ANCHOR = 1e-9
"""Depths this near to an anchor, in steps between anchors, get its value and no blend with its neighbour."""


def _rules(name: str, value: Any) -> Any:
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
            return rule.at(place.depth)
    raise RecipeError(f"no value for tensor {place.name}: the last rule must have neither role nor match")


class SourceRef(StrictModel):
    """Names one input checkpoint.

    Attributes:
        name: Its name within the recipe.
        path: Local directory or hub id.
        revision: Branch, tag or commit of a hub id.
        fingerprint: SHA-256 of its content; None while it has not been read.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    path: str = Field(min_length=1)
    revision: str | None = None
    fingerprint: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")

    @property
    def identity(self) -> str:
        """What the recipe's digest sees of it: its content if known, else where it lies."""
        return self.fingerprint or f"{self.path}@{self.revision or ''}"


class RecipeSource(SourceRef):
    """A source that is merged, with its own parameters."""

    parameters: dict[str, Setting] = Field(default_factory=dict)

    @field_validator("parameters", mode="before")
    @classmethod
    def _long_form(cls, data: Any) -> Any:
        return {key: _rules(key, value) for key, value in data.items()} if isinstance(data, dict) else data


class Recipe(StrictModel):
    """One merged model.

    Attributes:
        evomerge: Version of the recipe format.
        method: A method of the catalogue.
        base: The common ancestor, for methods that work on deltas.
        sources: What is merged, in order.
        parameters: Parameters of the method as a whole.
        seed: Of the random masks; it is part of the identity only where the method draws any.
        tokenizer: Name of the source whose tokenizer and configs the model takes; None: base, else first.
        dtype: Of the merged weights; None: each tensor keeps the dtype it has in the base, else first source.
    """

    evomerge: Literal[1] = 1
    method: str
    base: SourceRef | None = None
    sources: tuple[RecipeSource, ...] = Field(min_length=1)
    parameters: dict[str, Setting] = Field(default_factory=dict)
    seed: int = Field(default=0, ge=0, lt=2**63)
    tokenizer: str | None = None
    dtype: Dtype | None = None

    @field_validator("parameters", mode="before")
    @classmethod
    def _long_form(cls, data: Any) -> Any:
        return {key: _rules(key, value) for key, value in data.items()} if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            method = method_named(self.method)
            self._check_sources(method)
            _complete(self.parameters, method, "method", "parameters")
            for source in self.sources:
                _complete(source.parameters, method, "source", f"sources.{source.name}.parameters")
        except RecipeError as problem:
            raise ValueError(str(problem)) from None
        return self

    def _check_sources(self, method: Method) -> None:
        names = [source.name for source in self.sources]
        known = [*names, *([self.base.name] if self.base else [])]
        for name in known:
            if known.count(name) > 1:
                raise RecipeError(f'sources: the name "{name}" is used twice')
        if method.needs_base and self.base is None:
            raise RecipeError(f"base: method {method.name} works on deltas from a base; name one")
        if not method.needs_base and self.base is not None:
            raise RecipeError(f"base: method {method.name} has no base; list it as a source or leave it out")
        if len(names) < method.min_sources or len(names) > (method.max_sources or len(names)):
            wanted = str(method.min_sources) if method.max_sources else f"at least {method.min_sources}"
            raise RecipeError(f"sources: method {method.name} takes {wanted}, got {len(names)}")
        if self.tokenizer is not None and self.tokenizer not in known:
            raise RecipeError(f'tokenizer: "{self.tokenizer}" is none of {", ".join(known)}')

    @property
    def refs(self) -> tuple[SourceRef, ...]:
        """Every checkpoint it reads: the base, if any, then the sources."""
        return (self.base, *self.sources) if self.base else self.sources

    @property
    def reference(self) -> SourceRef:
        """The checkpoint that gives config, tensor order and default dtypes: the base, else the first."""
        return self.refs[0]

    @cached_property
    def digest(self) -> str:
        """SHA-256 over what determines the merged model, and nothing else."""
        method = method_named(self.method)
        tokenizer = next((r.identity for r in self.refs if r.name == self.tokenizer), self.reference.identity)
        content = {
            "evomerge": self.evomerge,
            "method": self.method,
            "base": self.base.identity if self.base else None,
            "sources": [[source.identity, _plain(source.parameters)] for source in self.sources],
            "parameters": _plain(self.parameters),
            "seed": self.seed if method.random else None,
            "tokenizer": tokenizer,
            "dtype": self.dtype,
        }
        return hashlib.sha256(canonical_json(content).encode()).hexdigest()

    def located(self, base_dir: Path) -> Recipe:
        """Return it with local sources by absolute path, so that it can be used from anywhere.

        Args:
            base_dir: What its relative paths are relative to.
        """

        def moved(ref: SourceRef) -> dict[str, str]:
            folder = base_dir / ref.path
            return {"path": str(folder.resolve())} if folder.is_dir() else {}

        base = self.base.model_copy(update=moved(self.base)) if self.base else None
        sources = tuple(source.model_copy(update=moved(source)) for source in self.sources)
        return self.model_copy(update={"base": base, "sources": sources})

    def to_json(self) -> dict[str, Any]:
        """Return plain data that `Recipe.model_validate` takes back."""
        data: dict[str, Any] = self.model_dump(mode="json", exclude_none=True)
        data["parameters"] = _plain(self.parameters)
        for source, written in zip(self.sources, data["sources"], strict=True):
            written["parameters"] = _plain(source.parameters)
        return data

    def to_yaml(self) -> str:
        """Return the recipe as a file that `read_recipe` takes back."""
        return dump_yaml(self.to_json())


def _complete(settings: dict[str, Setting], method: Method, scope: Scope, where: str) -> None:
    """Check the settings of one scope and fill in defaults, so that equal recipes look equal."""
    for name, setting in settings.items():
        parameter = method.parameter(name)
        if parameter.scope != scope:
            owner = "each source" if parameter.scope == "source" else "the method as a whole"
            raise RecipeError(f"{where}.{name}: this parameter belongs to {owner}")
        for rule in setting:
            for value in rule.value if isinstance(rule.value, tuple) else (rule.value,):
                check_value(value, parameter, f"{where}.{name}")
        setting = settings[name] = _without_unreachable(setting)
        if not parameter.per_tensor and not (len(setting) == 1 and setting[0].general):
            raise RecipeError(f"{where}.{name}: one value for all tensors, got rules")
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


def _without_unreachable(setting: Setting) -> Setting:
    """Leave out rules behind one that applies to every tensor, or to the same tensors."""
    kept: dict[tuple[Role | None, str | None], Rule] = {}
    for rule in setting:
        kept.setdefault((rule.role, rule.match), rule)
        if rule.general:
            break
    return tuple(kept.values())


def check_value(value: Scalar, parameter: Parameter, where: str) -> None:
    """Raise RecipeError unless a parameter may have this value."""
    if parameter.choices:
        if value not in parameter.choices or type(value) is not type(parameter.choices[0]):
            choices = ", ".join(str(choice).lower() for choice in parameter.choices)
            raise RecipeError(f"{where}: expected one of {choices}, got {value!r}")
        return
    if isinstance(value, bool | str) or not math.isfinite(value):
        raise RecipeError(f"{where}: expected a number, got {value!r}")
    low, high = parameter.valid_low, parameter.valid_high
    if (low is not None and value < low) or (high is not None and value > high):
        raise RecipeError(f"{where}: expected {low} to {high}, got {value}")


def _plain(settings: Mapping[str, Setting]) -> dict[str, Any]:
    """Return settings in their shortest written form."""
    plain: dict[str, Any] = {}
    for name, setting in settings.items():
        if len(setting) == 1:
            value = setting[0].value
            plain[name] = list(value) if isinstance(value, tuple) else value
        else:
            plain[name] = [rule.model_dump(mode="json", exclude_none=True) for rule in setting]
    return plain


def parse_recipe(data: Any, where: str) -> Recipe:
    """Return plain data in evomerge's own form as a recipe.

    Raises:
        RecipeError: In one line naming `where`, the key, what was expected and what was got.
    """
    if not isinstance(data, dict):
        raise RecipeError(f"{where}: expected a mapping with a method and sources, got {type(data).__name__}")
    return validated(Recipe, data, where, RecipeError)


def read_recipe(path: Path) -> Recipe:
    """Return the recipe in an evomerge YAML file; for mergekit files see `evomerge.mergekit`."""
    return parse_recipe(read_yaml(path, RecipeError), str(path))
