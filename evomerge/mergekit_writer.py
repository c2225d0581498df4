"""Writing recipes as mergekit's merge configs. No torch.

What mergekit cannot express is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evomerge.catalogue import Method, method_named
from evomerge.errors import RecipeError
from evomerge.mergekit_filters import FilterSource, Piece, inverse_density, rising
from evomerge.mergekit_methods import PEERS, Peer, value_there, value_written
from evomerge.mergekit_models import model_config
from evomerge.mergekit_tokens import write_tokenizer
from evomerge.recipe import Recipe, RecipeSource, Rule, Setting, SourceRef
from evomerge.slices import outline
from evomerge.stacking import as_slices

__all__ = ["FilterSource", "to_mergekit"]

FOLDED = frozenset({"lines_alpha", "lines_beta"})
"""Parameters that mergekit lacks and that are written into its `lambda` where it has one."""


def to_mergekit(recipe: Recipe, layout: FilterSource) -> dict[str, Any]:
    """Return a recipe as a mergekit config that `mergekit-yaml` runs.

    Random masks differ between the two, so for methods that draw any the result is another sample of the
    same distribution.

    Raises:
        RecipeError: mergekit cannot express it.
    """
    recipe = as_slices(recipe)
    nested = next((ref.name for ref in recipe.refs if ref.recipe is not None), None)
    if nested is not None:
        raise RecipeError(f'mergekit takes files only: "{nested}" is the model of a recipe; write it first')
    method = method_named(recipe.method)
    if not method.mergekit or method.name not in PEERS:
        raise RecipeError(f"mergekit has no method {recipe.method}")
    if recipe.segments:
        raise RecipeError("mergekit has no segments inside tensors; export the model instead")
    writer = _Writer(recipe, method, PEERS[method.name])
    writer.check()
    outputs = list(outline(recipe, layout).values())
    config: dict[str, Any] = {"merge_method": method.name}
    if recipe.slices:
        pieces = [
            Piece(i, [output for output in outputs if output.place.slice == i], layout)
            for i in range(len(recipe.slices))
        ]
        config |= writer.slices(pieces)
    else:
        whole = Piece(None, outputs, layout)
        config |= writer.models(whole)
    return config | _output(recipe) | write_tokenizer(recipe, written)


def written(ref: SourceRef) -> Any:
    """Return a source as mergekit names it."""
    return {"model": {"path": ref.path, "revision": ref.revision}} if ref.revision else ref.path


def _output(recipe: Recipe) -> dict[str, Any]:
    """Return the keys for the dtype."""
    known = model_config(recipe.reference.path, recipe.reference.revision)
    dtype = recipe.dtype or known.get("dtype") or known.get("torch_dtype")
    # mergekit works in `dtype`; float32 there and the recipe's dtype for the output is what is done here.
    return {"dtype": "float32", "out_dtype": dtype} if dtype else {}


class _Writer:
    """Writes one recipe."""

    def __init__(self, recipe: Recipe, method: Method, peer: Peer) -> None:
        self.recipe, self.method, self.peer = recipe, method, peer
        self.expectation = "rescale" in recipe.parameters and any(
            rule.value == "expectation" for rule in recipe.parameters["rescale"]
        )

    def check(self) -> None:
        """Raise RecipeError for parameters whose values mergekit does not have."""
        known = {*self.peer.source, *self.peer.method}
        known |= FOLDED if "lambda" in known else set()
        for parameters in (self.recipe.parameters, *(source.parameters for source in self.recipe.sources)):
            for name, setting in parameters.items():
                neutral = value_there(self.method.parameter(name))
                if name not in known and any(rule.value != neutral for rule in setting):
                    raise RecipeError(
                        f"mergekit has no {name} for {self.method.name}; it does what {neutral} does here"
                    )
        if not self.expectation:
            return
        if "epsilon" in self.peer.source:
            raise RecipeError(
                f"mergekit's {self.method.name} cannot rescale by 1/probability; it knows l1 and none"
            )
        if any(rule.value is not False for rule in self.recipe.parameters["normalize"]):
            raise RecipeError("mergekit cannot rescale by 1/density and normalise the weights at once")

    def models(self, whole: Piece) -> dict[str, Any]:
        """Return the keys of a config that lists its models."""
        models = [_entry(source, None, self._own(source, whole)) for source in self.recipe.sources]
        return {"models": models, **self._base(self.recipe.sources), **_parameters(self._shared(whole))}

    def slices(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Return the keys of a config with slices."""
        shared = [self._shared(piece) for piece in pieces]
        common = {
            name: value for name, value in shared[0].items() if all(each[name] == value for each in shared)
        }
        bases: list[dict[str, Any]] = []
        slices: list[dict[str, Any]] = []
        for i, (piece, settings) in enumerate(zip(pieces, shared, strict=True)):
            layers = self.recipe.slices[i].layers
            sources = [source for source in self.recipe.sources if source.name in layers]
            entries = [_entry(source, layers[source.name], self._own(source, piece)) for source in sources]
            if self.recipe.base is not None:
                entries.append(_entry(self.recipe.base, layers[self.recipe.base.name], {}))
            self._check_entries(entries, i, slices)
            bases.append(self._base(sources))
            own = {name: value for name, value in settings.items() if name not in common}
            slices.append({"sources": entries, **_parameters(own)})
        if self.peer.base == "required":
            for slice_, base in zip(slices, bases, strict=True):
                slice_ |= {key: value for key, value in base.items() if base != bases[0]}
        return {"slices": slices, **bases[0], **_parameters(common)}

    def _check_entries(self, entries: list[dict[str, Any]], index: int, before: list[dict[str, Any]]) -> None:
        models = [entry["model"] for entry in entries]
        twice = next((model for model in models if models.count(model) > 1), None)
        if twice is not None:
            raise RecipeError(
                f"slices.{index}: mergekit takes a model once in a slice, got {twice} more often"
            )
        last = index == len(self.recipe.slices) - 1
        if last and before and len(before[0]["sources"]) < len(entries):
            raise RecipeError(
                f"slices.{index}: more sources than in the first slice, so mergekit leaves the last of them "
                "out of head and final norm"
            )

    def _base(self, sources: Sequence[RecipeSource]) -> dict[str, Any]:
        """Return the key for the base model."""
        if self.recipe.base is not None:
            return {"base_model": written(self.recipe.base)}
        # Of a method that starts at the first source it is that one. Elsewhere it is only where config and
        # tokenizer are from, which mergekit leaves to chance without one.
        if self.peer.base == "required":
            return {"base_model": written(sources[0])}
        return {"base_model": written(self.recipe.reference)} if self.peer.base == "member" else {}

    def _own(self, source: RecipeSource, piece: Piece) -> dict[str, Any]:
        """Return the parameters of a source."""
        found = {}
        for name, setting in source.parameters.items():
            if name in self.peer.source:
                divided = name == "weight" and self.expectation
                scale = inverse_density(source.parameters["density"]) if divided else None
                found[name] = piece.written(self._values(name, setting), source.name, scale)
        return found

    def _shared(self, piece: Piece) -> dict[str, Any]:
        """Return the parameters of the method."""
        found = {}
        for name, setting in self.recipe.parameters.items():
            if name in self.peer.method:
                scale = rising(self.recipe.parameters) if name == "lambda" else None
                found[name] = piece.written(self._values(name, setting), None, scale)
        return found

    def _values(self, name: str, setting: Setting) -> Setting:
        """Return a setting with the values that mergekit has for them."""
        if name == "rescale" and self.expectation:
            return (Rule(value=False),)
        parameter = self.method.parameter(name)
        return tuple(
            rule
            if isinstance(rule.value, tuple)
            else rule.model_copy(update={"value": value_written(rule.value, parameter)})
            for rule in setting
        )


def _entry(ref: SourceRef, layers: tuple[int, int] | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model of a config."""
    span = {} if layers is None else {"layer_range": list(layers)}
    return {"model": written(ref), **span, **_parameters(settings)}


def _parameters(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"parameters": dict(settings)} if settings else {}
