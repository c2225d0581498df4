"""One code path from a recipe to merged tensors, for the live model and for files alike.

A `Merger` holds the checkpoints, the tensors it keeps resident, and the prepared state of each method
used so far. Both are kept only as far as the memory budget goes; what does not fit is read or prepared
again for every candidate, with the same result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, overload

import torch
from torch import Tensor

from evomerge.checkpoints.flows import flow_of
from evomerge.checkpoints.layout import Layout
from evomerge.checkpoints.source import Checkpoint
from evomerge.checkpoints.writer import DTYPES as STORED
from evomerge.errors import RecipeError
from evomerge.merging.folding import folded
from evomerge.merging.methods import KERNELS, Kernel, Sources, Values
from evomerge.merging.outline import Output, outline
from evomerge.merging.spreading import Spread
from evomerge.recipe import Recipe, Setting, SourceRef, value_at
from evomerge.records import Place
from evomerge.segments import Piece, Stretch, pieces, stretches

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Merger:
    """Merges tensors of a fixed set of checkpoints.

    Args:
        checkpoints: Each checkpoint under its source's identity (`SourceRef.identity`).
        layout: The layout they share; its order is the order of work.
        device: Where tensors are merged; a `Spread` says it by layer.
        budget_bytes: Most memory for resident tensors and prepared state; None: no limit. Tensors mapped
            from files into a CPU's memory cost nothing, as the page cache can drop them.
    """

    def __init__(
        self,
        checkpoints: Mapping[str, Checkpoint],
        layout: Layout,
        *,
        device: Spread | torch.device | str = "cpu",
        budget_bytes: int | None = None,
    ) -> None:
        self._checkpoints = checkpoints
        self._spread = device if isinstance(device, Spread) else Spread([device])
        self._left = float("inf") if budget_bytes is None else float(budget_bytes)
        self._keeps = budget_bytes != 0
        self._unfit: set[tuple[Any, ...]] = set()
        self._kept: dict[tuple[Any, ...], tuple[Any, Any]] = {}
        self._outlined: tuple[Recipe, dict[str, Output]] | None = None
        self._whole: tuple[str, Any] | None = None
        self._stretched: tuple[Any, dict[str, Stretch], tuple[int, ...]] | None = None
        self._parameters: tuple[Recipe, _Parameters, tuple[_Parameters, ...]] | None = None
        self.layout = layout

    @property
    def kept_bytes(self) -> int:
        """Bytes of the tensors and prepared state that are kept between candidates."""
        return sum(_nbytes(kept) for _, kept in self._kept.values())

    def outputs(self, recipe: Recipe) -> Mapping[str, Output]:
        """Return the tensors of the recipe's model by name, in their order."""
        known = self._outlined
        if known is None or (known[0] is not recipe and not _same_outline(known[0], recipe)):
            known = (recipe, outline(recipe, self.layout))
        self._outlined = (recipe, known[1])
        return known[1]

    def layers(self, recipe: Recipe) -> int:
        """Return the number of layers of the recipe's model."""
        return sum(piece.count for piece in recipe.stack) or self.layout.num_layers

    def dtype_of(self, recipe: Recipe, name: str) -> torch.dtype:
        """Return the dtype that the merged tensor `name` is stored in; integers stay what they are."""
        ref, stored_name = self.inputs_of(recipe, self.outputs(recipe)[name])[0]
        stored = STORED[self._checkpoint(ref).tensors[stored_name].dtype]
        return DTYPES[recipe.dtype] if recipe.dtype and stored.is_floating_point else stored

    def merge(self, recipe: Recipe, name: str, out: Tensor | None = None) -> Tensor:
        """Merge one tensor.

        Args:
            recipe: Its sources must be among the checkpoints.
            name: The tensor's name in the merged model.
            out: Written to if given: the tensor's shape, contiguous, on its device. If its dtype
                is not the recipe's, the result is rounded to the recipe's dtype first.

        Returns:
            `out`, or a new tensor in the recipe's dtype.
        """
        work = _Work(self, recipe, self.outputs(recipe)[name])
        sources = work.sources()
        dtype = self.dtype_of(recipe, name)
        first = sources.tensors[0] if sources.base is None else sources.base
        if out is not None and out.dtype == dtype:
            result = out
        else:
            result = torch.empty(first.shape, dtype=dtype, device=first.device)
        if not first.is_floating_point():
            result.copy_(first)
        elif recipe.path is not None:
            flow = flow_of(self._checkpoint(recipe.reference).config)
            place = self.outputs(recipe)[name].place
            result.copy_(folded(first, place, recipe.path, self.layout, flow))
        else:
            values = replace(work.values, whole=self._whole_of(recipe))
            KERNELS[recipe.method].merge(sources, work.prepared(), values, result)
        return result if out is None or out is result else out.copy_(result)

    def pieces_of(self, recipe: Recipe, name: str) -> tuple[Piece, ...]:
        """Return a tensor's part of the recipe's segment tables; nothing where there are none.

        Raises:
            RecipeError: A table has more entries than its tensors, or a tensor is in no table.
        """
        if not recipe.segments or not self.dtype_of(recipe, name).is_floating_point:
            return ()
        tensors = self._checkpoint(recipe.reference).tensors
        key = recipe.reference.identity, tuple(table.roles for table in recipe.segments)
        if self._stretched is None or self._stretched[0] != key:
            places = [p for n, p in self.layout.places.items() if self.dtype_of(recipe, n).is_floating_point]
            sizes = {place.name: math.prod(tensors[place.name].shape) for place in places}
            self._stretched = (key, *stretches(places, sizes, key[1]))
        _, lies, counts = self._stretched
        lie = lies[name]
        table, count = recipe.segments[lie.table], counts[lie.table]
        if table.starts[-1] >= count:
            raise RecipeError(
                f"segments.{lie.table}.starts: a segment starts at entry {table.starts[-1]} of {count}; "
                "the table is of other models"
            )
        return pieces(table, lie.start, math.prod(tensors[name].shape))

    def _whole_of(self, recipe: Recipe) -> Any:
        """Return what the recipe's method needs to know of the whole model, found once per candidate."""
        kernel = KERNELS[recipe.method]
        if not kernel.method.whole_model:
            return None
        if self._whole is None or self._whole[0] != recipe.digest:
            self._whole = None
            floating = [
                output
                for name, output in self.outputs(recipe).items()
                if self.dtype_of(recipe, name).is_floating_point
            ]
            self._whole = (recipe.digest, kernel.whole(_Works(self, recipe, floating)))
        return self._whole[1]

    def inputs_of(self, recipe: Recipe, output: Output) -> list[tuple[SourceRef, str]]:
        """Return what takes part in a tensor, the base first, and the tensor's name there."""
        return [(ref, output.inputs[ref.name]) for ref in recipe.refs if ref.name in output.inputs]

    def device_of(self, recipe: Recipe, place: Place) -> torch.device:
        """Return the device on which a tensor is merged."""
        return self._spread.device_of(place, self.layers(recipe))

    def tensor(self, ref: SourceRef, name: str, device: torch.device) -> Tensor:
        """Return a tensor of a source on a device; what had to be computed or moved is kept."""
        checkpoint = self._checkpoint(ref)
        if device.type == "cpu" and checkpoint.is_stored(name):
            return checkpoint.tensor(name).contiguous()
        kept: Tensor = self.keep(
            ("source", ref.identity, name, device),
            lambda: checkpoint.tensor(name).to(device).contiguous(),
        )
        return kept

    def keep(self, key: tuple[Any, ...], make: Callable[[], Any], state: Any = None) -> Any:
        """Return what `make` makes, from memory if it was kept in this state; another state replaces it."""
        kept = self._kept.get(key)
        if kept is not None and kept[0] == state:
            return kept[1]
        if kept is not None:
            self._left += _nbytes(self._kept.pop(key)[1])
            del kept
        made = make()
        size = _nbytes(made)
        if size <= self._left:
            self._left -= size
            self._kept[key] = (state, made)
        else:
            self._unfit.add(key)
        return made

    def will_keep(self, key: tuple[Any, ...]) -> bool:
        """Return whether what is made under a key may serve another candidate, as far as is known."""
        return self._keeps and key not in self._unfit

    def parameters_of(self, recipe: Recipe) -> tuple[_Parameters, tuple[_Parameters, ...]]:
        """Return the method's parameters and each source's, ready to be read for many tensors."""
        if self._parameters is None or self._parameters[0] is not recipe:
            sources = tuple(_Parameters(source.parameters) for source in recipe.sources)
            self._parameters = recipe, _Parameters(recipe.parameters), sources
        return self._parameters[1:]

    def _checkpoint(self, ref: SourceRef) -> Checkpoint:
        try:
            return self._checkpoints[ref.identity]
        except KeyError:
            raise RecipeError(
                f"source {ref.name} ({ref.path}) is not among the checkpoints at hand"
            ) from None


def _same_outline(one: Recipe, other: Recipe) -> bool:
    same = one.slices == other.slices and one.path == other.path
    return same and [r.name for r in one.refs] == [r.name for r in other.refs]


class _Parameters:
    """Settings whose rules are looked at for the tensors that they distinguish only."""

    __slots__ = ("_constant", "_varying")

    def __init__(self, settings: Mapping[str, Setting]) -> None:
        self._constant: dict[str, Any] = {}
        self._varying: dict[str, Setting] = {}
        for name, setting in settings.items():
            first = setting[0]
            if first.general and not isinstance(first.value, tuple):
                self._constant[name] = first.value
            else:
                self._varying[name] = setting

    def at(self, place: Place) -> dict[str, Any]:
        """Return what holds for one tensor."""
        varying = {name: value_at(setting, place) for name, setting in self._varying.items()}
        return {**self._constant, **varying}


class _Work:
    """One tensor of one candidate; reads and prepares when asked to."""

    __slots__ = ("inputs", "merged", "merger", "output", "recipe", "values")

    def __init__(self, merger: Merger, recipe: Recipe, output: Output) -> None:
        self.merger, self.recipe, self.output = merger, recipe, output
        self.inputs = merger.inputs_of(recipe, output)
        method, sources = merger.parameters_of(recipe)
        merged = [
            (source, parameters)
            for source, parameters in zip(recipe.sources, sources, strict=True)
            if source.name in output.inputs
        ]
        self.merged = [source for source, _ in merged]
        self.values = Values(
            method=_scaled_by_depth(method.at(output.place), output.place),
            sources=tuple(parameters.at(output.place) for _, parameters in merged),
            seed=recipe.seed,
            pieces=merger.pieces_of(recipe, output.place.name),
        )

    def sources(self) -> Sources:
        names = self.output.inputs
        device = self.merger.device_of(self.recipe, self.output.place)
        tensors = [self.merger.tensor(ref, name, device) for ref, name in self.inputs]
        return Sources(
            base=tensors[0] if self.recipe.base else None,
            tensors=tuple(tensors[-len(self.merged) :]),
            keys=tuple(f"{source.identity}\x1f{names[source.name]}" for source in self.merged),
            place=self.output.place,
            layers=self.merger.layers(self.recipe),
        )

    def prepared(self) -> Any:
        kernel = KERNELS[self.recipe.method]
        if type(kernel).prepare is Kernel.prepare:
            return None
        state = tuple(
            self.values.seed
            if name == "seed"
            else (self.values.method.get(name), *(source.get(name) for source in self.values.sources))
            for name in kernel.prepared_by
        )
        identities = ((ref.identity, name) for ref, name in self.inputs)
        key = ("prepared", self.recipe.method, self.output.place.layer, *identities)
        if kernel.one_shot and not self.merger.will_keep(key):
            return None
        return self.merger.keep(key, lambda: kernel.prepare(self.sources(), self.values), state)


class _Works(Sequence[_Work]):
    """The work on several tensors, each begun when it is asked for."""

    def __init__(self, merger: Merger, recipe: Recipe, outputs: Sequence[Output]) -> None:
        self._merger, self._recipe, self._outputs = merger, recipe, outputs

    def __len__(self) -> int:
        return len(self._outputs)

    @overload
    def __getitem__(self, index: int) -> _Work: ...
    @overload
    def __getitem__(self, index: slice) -> list[_Work]: ...
    def __getitem__(self, index: int | slice) -> _Work | list[_Work]:
        if isinstance(index, slice):
            return [_Work(self._merger, self._recipe, output) for output in self._outputs[index]]
        return _Work(self._merger, self._recipe, self._outputs[index])


def _scaled_by_depth(method: dict[str, Any], place: Place) -> dict[str, Any]:
    """Return the method's parameters with the factor of LiNeS in `lambda` (arXiv 2410.17146, section 4)."""
    alpha, beta = method.get("lines_alpha", 1.0), method.get("lines_beta", 0.0)
    if "lambda" in method and (alpha, beta) != (1.0, 0.0):
        factor = alpha if place.layer is None else alpha + beta * place.depth
        method["lambda"] *= factor
    return method


def _nbytes(made: Any) -> int:
    """Return the bytes of the tensors in a tensor, a tuple, or a dataclass with slots."""
    if isinstance(made, Tensor):
        return made.nbytes
    if isinstance(made, tuple):
        return sum(_nbytes(part) for part in made)
    slots = getattr(type(made), "__slots__", ())
    return sum(_nbytes(getattr(made, slot)) for slot in slots)
