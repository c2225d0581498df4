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
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from evomerge.catalogue import Method, Scope, method_named
from evomerge.errors import Gathering, RecipeError
from evomerge.paths import LayerPath, Slice, Step
from evomerge.rules import (
    Rule,
    Scalar,
    Setting,
    check_value,
    chosen_settings,
    complete_settings,
    plain_settings,
    rules_of,
    value_at,
)
from evomerge.segments import SegmentTable, check_segments, identity
from evomerge.strict import StrictModel, all_wrong, canonical_json, dump_yaml, read_yaml, validated
from evomerge.tokens import UNION, ModelToken, TokenRow, ZeroRow

__all__ = [
    "UNION",
    "Dtype",
    "LayerPath",
    "ModelToken",
    "Recipe",
    "RecipeSource",
    "Rule",
    "Scalar",
    "SegmentTable",
    "Setting",
    "Slice",
    "SourceRef",
    "Step",
    "TokenRow",
    "ZeroRow",
    "check_value",
    "parse_recipe",
    "read_recipe",
    "value_at",
]

Dtype = Literal["float32", "bfloat16", "float16"]


class SourceRef(StrictModel):
    """Names one input: a checkpoint, or the model of another recipe.

    Attributes:
        name: Its name within the recipe.
        path: Local directory or hub id; of a recipe, where it comes from, for people.
        revision: Branch, tag or commit of a hub id.
        fingerprint: SHA-256 of its content; None while it has not been read.
        recipe: The recipe whose model it is; None: a checkpoint.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    path: str = Field(min_length=1)
    revision: str | None = None
    fingerprint: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    recipe: Recipe | None = None

    @property
    def identity(self) -> str:
        """What the recipe's digest sees of it: its content if known, else where it lies."""
        if self.recipe is not None:
            return self.recipe.digest
        return self.fingerprint or f"{self.path}@{self.revision or ''}"


class RecipeSource(SourceRef):
    """A source that is merged, with its own parameters.

    Attributes:
        parameters: The method's parameters for this source, by name.
    """

    parameters: dict[str, Setting] = Field(default_factory=dict)

    @field_validator("parameters", mode="before")
    @classmethod
    def _long_form(cls, data: Any) -> Any:
        return {key: rules_of(key, value) for key, value in data.items()} if isinstance(data, dict) else data


class Recipe(StrictModel):
    """One merged model.

    Attributes:
        evomerge: Version of the recipe format.
        method: A method of the catalogue.
        base: The common ancestor, for methods that work on deltas.
        sources: What is merged, in order.
        parameters: Parameters of the method as a whole.
        seed: Of the random masks; it is part of the identity only where the method draws any.
        tokenizer: Name of the source whose tokenizer and special token ids the model takes, or `union` for
            the tokens of all sources; vocabularies that differ are then aligned by token. None: the base's,
            else the first source's, and all vocabularies must be the same.
        tokens: Token to its row in sources that lack it; default: the base's, else the mean over the sources
            that have it, else zeros. Tokens that are not in the tokenizer are added. Needs `tokenizer`.
        pad_to_multiple_of: Rows of embedding and head are rounded up to it. Needs `tokenizer`.
        chat_template: `auto` for the one that most sources have, the name of a known one, or a Jinja text;
            None: the tokenizer's own.
        slices: The layers of the merged model from first to last; empty: every layer of every source, in
            place. Embedding, head and final norm come from the sources of the first and the last slice.
        path: The layers that the model runs through, one by one, with scales; in place of `slices`. Needs
            the method `passthrough`.
        segments: In place of weights, for the method `linear`: coefficients of the sources by segments of the
            flattened parameters; empty: none.
        dtype: Of the merged weights; None: each tensor keeps the dtype it has in the base, else first source.
    """

    evomerge: Literal[1] = 1
    method: str
    base: SourceRef | None = None
    sources: tuple[RecipeSource, ...] = Field(min_length=1)
    parameters: dict[str, Setting] = Field(default_factory=dict)
    seed: int = Field(default=0, ge=0, lt=2**63)
    tokenizer: str | None = None
    tokens: dict[Annotated[str, Field(min_length=1)], TokenRow] = Field(default_factory=dict)
    pad_to_multiple_of: int | None = Field(default=None, ge=1, le=2**16)
    chat_template: str | None = Field(default=None, min_length=1)
    slices: tuple[Slice, ...] = ()
    path: LayerPath | None = None
    segments: tuple[SegmentTable, ...] = ()
    dtype: Dtype | None = None

    @field_validator("parameters", mode="before")
    @classmethod
    def _long_form(cls, data: Any) -> Any:
        return {key: rules_of(key, value) for key, value in data.items()} if isinstance(data, dict) else data

    @field_validator("segments")
    @classmethod
    def _canonical(cls, tables: tuple[SegmentTable, ...]) -> tuple[SegmentTable, ...]:
        return tuple(table.merged() for table in tables)

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            method = method_named(self.method)
            self._check_sources(method)
            self._check_slices(method)
            if self.path is not None:
                self._check_path(self.path, method)
            self._check_segments(method)
            with Gathering() as gathering:
                for where, settings in self._given().items():
                    with gathering.kept():
                        scope: Scope = "method" if where == "parameters" else "source"
                        complete_settings(settings, method, scope, where)
        except RecipeError as problem:
            raise all_wrong(problem.lines, self.method) from None
        return self

    def _check_sources(self, method: Method) -> None:
        names = [source.name for source in self.sources]
        known = [*names, *([self.base.name] if self.base else [])]
        for name in known:
            if known.count(name) > 1:
                raise RecipeError(f'sources: the name "{name}" is used twice')
        if method.needs_base and self.base is None:
            raise RecipeError(f"base: method {method.name} works on deltas from a base; name one")
        if not method.takes_base and self.base is not None:
            raise RecipeError(f"base: method {method.name} has no base; list it as a source or leave it out")
        if not self.slices and self.path is None:
            method.check_count(len(names), "sources")
        self._check_tokens(known)

    def _check_tokens(self, known: list[str]) -> None:
        if self.tokenizer is not None and self.tokenizer not in (UNION, *known):
            raise RecipeError(f'tokenizer: "{self.tokenizer}" is none of {", ".join([*known, UNION])}')
        if self.tokenizer == UNION and UNION in known:
            raise RecipeError(f'tokenizer: "{UNION}" is also the name of a source; give that another name')
        for key in ("tokens", "pad_to_multiple_of"):
            if getattr(self, key) and self.tokenizer is None:
                raise RecipeError(f"{key}: needs a tokenizer; write tokenizer: {UNION} or a source's name")
        for token, row in self.tokens.items():
            other = row.source
            if isinstance(other, ModelToken) and (other.token is None) == (other.token_id is None):
                raise RecipeError(f"tokens.{token!a}.source: expected either token or token_id")
            if row.model is not None and row.model not in known:
                raise RecipeError(f'tokens.{token!a}.source: "{row.model}" is none of {", ".join(known)}')

    def _check_slices(self, method: Method) -> None:
        names = [source.name for source in self.sources]
        known = [ref.name for ref in self.refs]
        used: set[str] = set()
        for i, piece in enumerate(self.slices):
            where = f"slices.{i}.layers"
            for name, (first, end) in piece.layers.items():
                if name not in known:
                    raise RecipeError(f'{where}: "{name}" is none of {", ".join(known)}')
                if not 0 <= first < end:
                    raise RecipeError(f"{where}.{name}: expected [first, end) from 0, got [{first}, {end}]")
                if end - first != piece.count:
                    raise RecipeError(
                        f"{where}.{name}: {end - first} layers, but {piece.count} of "
                        f"{next(iter(piece.layers))}; all sources of a slice give as many"
                    )
            if self.base is not None and self.base.name not in piece.layers:
                raise RecipeError(f'{where}: the base "{self.base.name}" is missing')
            method.check_count(sum(name in piece.layers for name in names), where)
            used |= set(piece.layers)
        if self.slices and used != set(known):
            raise RecipeError(f'slices: no slice has layers of "{next(n for n in known if n not in used)}"')

    def _check_path(self, path: LayerPath, method: Method) -> None:
        if self.slices:
            raise RecipeError("path: expected either a path or slices")
        if method.name != "passthrough":
            raise RecipeError(
                f"path: needs method: passthrough, got {method.name}; merge in a source of its own `recipe`"
            )
        for key in ("tokens", "pad_to_multiple_of"):
            if getattr(self, key):
                raise RecipeError(f"{key}: a model with a path takes embedding and head of one source")
        if self.tokenizer not in (None, path.end):
            raise RecipeError(f'tokenizer: a path has that of its ends, "{path.end}"; leave it out')
        path.check_sources([source.name for source in self.sources])
        for source in self.sources:
            if chosen_settings(source.parameters, method):
                raise RecipeError(
                    f"sources.{source.name}.parameters: a path has scales of its own; leave these out"
                )

    def _check_segments(self, method: Method) -> None:
        if not self.segments:
            return
        if method.name != "linear":
            raise RecipeError(f"segments: are coefficients of the method linear, not of {method.name}")
        if self.slices:
            raise RecipeError("segments: go with whole models; leave out slices")
        given = [name for name, settings in self._given().items() if chosen_settings(settings, method)]
        if given:
            raise RecipeError(f"{given[0]}: segments stand in place of weights; leave the parameters out")
        check_segments(self.segments, [source.name for source in self.sources])

    def _given(self) -> dict[str, dict[str, Setting]]:
        owners = {f"sources.{source.name}.parameters": source.parameters for source in self.sources}
        return {"parameters": self.parameters, **owners}

    @property
    def refs(self) -> tuple[SourceRef, ...]:
        """Every checkpoint it reads: the base, if any, then the sources."""
        return (self.base, *self.sources) if self.base else self.sources

    @property
    def reference(self) -> SourceRef:
        """What gives config, tensor order and default dtypes: a path's ends, the base, else the first."""
        if self.path is not None:
            return next(ref for ref in self.refs if ref.name == self.path.end)
        return self.refs[0]

    @property
    def stack(self) -> tuple[Slice, ...]:
        """The slices; for a path, one for each of its layers."""
        return self.slices if self.path is None else self.path.slices

    @property
    def leaves(self) -> tuple[SourceRef, ...]:
        """Every checkpoint that it reads, those of its sources' own recipes among them."""
        found: list[SourceRef] = []
        for ref in self.refs:
            found += [ref] if ref.recipe is None else ref.recipe.leaves
        return tuple(found)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over what determines the merged model, and nothing else."""
        method = method_named(self.method)
        identities = {ref.name: ref.identity for ref in self.refs}
        content = {
            "evomerge": self.evomerge,
            "method": self.method,
            "base": self.base.identity if self.base else None,
            "sources": [
                [source.identity, chosen_settings(source.parameters, method)] for source in self.sources
            ],
            "parameters": chosen_settings(self.parameters, method),
            "seed": self.seed if method.random else None,
            "tokenizer": {UNION: UNION, **identities}.get(self.tokenizer or self.reference.name),
            "dtype": self.dtype,
        }
        if self.tokens:
            content["tokens"] = [[token, *row.identity(identities)] for token, row in self.tokens.items()]
        given = {"pad_to_multiple_of": self.pad_to_multiple_of, "chat_template": self.chat_template}
        content |= {key: value for key, value in given.items() if value is not None}
        if self.slices:
            content["slices"] = [[piece.layers.get(ref.name) for ref in self.refs] for piece in self.slices]
        if self.path is not None:
            names = [ref.name for ref in self.refs]
            steps = [[names.index(step.source), step.layer, step.scale] for step in self.path.layers]
            content["path"] = [names.index(self.path.end), steps]
        if self.segments:
            content["segments"] = identity(self.segments)
        return hashlib.sha256(canonical_json(content).encode()).hexdigest()

    def located(self, base_dir: Path) -> Recipe:
        """Return it with local sources by absolute path, so that it can be used from anywhere.

        Args:
            base_dir: What its relative paths are relative to.
        """

        def located(path: str) -> str:
            folder = base_dir / Path(path).expanduser()
            if folder.is_dir():
                return str(folder.resolve())
            below, plus, above = path.partition("+")  # a base with an adapter on it
            return f"{located(below)}+{located(above)}" if plus else path

        def moved(ref: SourceRef) -> dict[str, Any]:
            if ref.recipe is not None:
                return {"recipe": ref.recipe.located(base_dir)}
            return {"path": located(ref.path)}

        base = self.base.model_copy(update=moved(self.base)) if self.base else None
        sources = tuple(source.model_copy(update=moved(source)) for source in self.sources)
        return self.model_copy(update={"base": base, "sources": sources})

    def to_json(self) -> dict[str, Any]:
        """Return plain data that `Recipe.model_validate` takes back."""
        data: dict[str, Any] = self.model_dump(mode="json", exclude_none=True)
        data["parameters"] = plain_settings(self.parameters)
        for key in ("slices", "tokens", "segments"):
            if not data[key]:
                del data[key]
        for source, written in zip(self.sources, data["sources"], strict=True):
            if self.path is None:
                written["parameters"] = plain_settings(source.parameters)
            else:
                del written["parameters"]
            if source.recipe is not None:
                written["recipe"] = source.recipe.to_json()
        if self.base is not None and self.base.recipe is not None:
            data["base"]["recipe"] = self.base.recipe.to_json()
        if self.path is not None:
            data["path"] = self.path.to_json()
        if self.segments:  # in place of all parameters
            for owner in (data, *data["sources"]):
                del owner["parameters"]
        return data

    def to_yaml(self) -> str:
        """Return the recipe as a file that `read_recipe` takes back."""
        return dump_yaml(self.to_json())


for _model in (SourceRef, RecipeSource, Recipe):
    _model.model_rebuild()  # a source may hold a recipe, which holds sources


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
