"""One code path from a recipe to merged tensors, for the live model and for files alike.

A `Merger` holds the checkpoints, the tensors it keeps resident, and the prepared state of each method
used so far. Both are kept only as far as the memory budget goes; what does not fit is read or prepared
again for every candidate, with the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from evomerge.checkpoints.layout import Layout
from evomerge.checkpoints.source import Checkpoint
from evomerge.errors import RecipeError
from evomerge.merging.methods import KERNELS, Sources, Values
from evomerge.recipe import Recipe, Setting, SourceRef, value_at
from evomerge.records import Place

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Merger:
    """Merges tensors of a fixed set of checkpoints.

    Args:
        checkpoints: Each checkpoint under its source's identity (`SourceRef.identity`).
        layout: The layout they share; its order is the order of work.
        device: Where tensors are merged.
        budget_bytes: Most memory for resident tensors and prepared state; None: no limit. Tensors mapped
            from files into a CPU's memory cost nothing, as the page cache can drop them.
    """

    def __init__(
        self,
        checkpoints: Mapping[str, Checkpoint],
        layout: Layout,
        *,
        device: torch.device | str = "cpu",
        budget_bytes: int | None = None,
    ) -> None:
        self._checkpoints = checkpoints
        self._device = torch.device(device)
        self._left = float("inf") if budget_bytes is None else float(budget_bytes)
        self._kept: dict[tuple[Any, ...], tuple[int, Any]] = {}
        self.layout = layout

    @property
    def kept_bytes(self) -> int:
        """Bytes of the tensors and prepared state that are kept between candidates."""
        return sum(_nbytes(kept) for _, kept in self._kept.values())

    def dtype_of(self, recipe: Recipe, name: str) -> torch.dtype:
        """Return the dtype that the merged tensor `name` is stored in; integers stay what they are."""
        stored = self._checkpoint(recipe.reference).tensor(name).dtype
        return DTYPES[recipe.dtype] if recipe.dtype and stored.is_floating_point else stored

    def merge(self, recipe: Recipe, name: str, out: Tensor | None = None) -> Tensor:
        """Merge one tensor.

        Args:
            recipe: Its sources must be among the checkpoints.
            name: The tensor's name in the checkpoints.
            out: Written to if given: the tensor's shape, contiguous, on the merger's device. If its dtype
                is not the recipe's, the result is rounded to the recipe's dtype first.

        Returns:
            `out`, or a new tensor in the recipe's dtype.
        """
        refs = recipe.refs
        tensors = tuple(self._tensor(ref, name) for ref in refs)
        dtype = self.dtype_of(recipe, name)
        if out is not None and out.dtype == dtype:
            result = out
        else:
            result = torch.empty(tensors[0].shape, dtype=dtype, device=self._device)
        if not tensors[0].is_floating_point():
            result.copy_(tensors[0])
        else:
            self._merge(recipe, self.layout.places[name], tensors, result)
        return result if out is None or out is result else out.copy_(result)

    def _merge(self, recipe: Recipe, place: Place, tensors: tuple[Tensor, ...], out: Tensor) -> None:
        kernel = KERNELS[recipe.method]
        count = len(recipe.sources)
        sources = Sources(
            base=tensors[0] if recipe.base else None,
            tensors=tensors[-count:],
            keys=tuple(f"{source.identity}\x1f{place.name}" for source in recipe.sources),
        )
        seed = recipe.seed if kernel.method.random else 0
        identities = tuple(ref.identity for ref in recipe.refs)
        prepared = self._keep(
            ("prepared", recipe.method, identities, place.name), lambda: kernel.prepare(sources, seed), seed
        )
        values = Values(
            method=_at(recipe.parameters, place),
            sources=tuple(_at(source.parameters, place) for source in recipe.sources),
            seed=recipe.seed,
        )
        kernel.merge(sources, prepared, values, out)

    def _tensor(self, ref: SourceRef, name: str) -> Tensor:
        mapped = self._checkpoint(ref).tensor(name)
        if self._device.type == "cpu":
            return mapped.contiguous()
        kept: Tensor = self._keep(
            ("source", ref.identity, name), lambda: mapped.to(self._device).contiguous()
        )
        return kept

    def _keep(self, key: tuple[Any, ...], make: Callable[[], Any], seed: int = 0) -> Any:
        """Return what `make` makes, from memory if it was kept before; a new seed replaces the old one's."""
        kept = self._kept.get(key)
        if kept is not None and kept[0] == seed:
            return kept[1]
        if kept is not None:
            self._left += _nbytes(self._kept.pop(key)[1])
            del kept
        made = make()
        size = _nbytes(made)
        if size <= self._left:
            self._left -= size
            self._kept[key] = (seed, made)
        return made

    def _checkpoint(self, ref: SourceRef) -> Checkpoint:
        try:
            return self._checkpoints[ref.identity]
        except KeyError:
            raise RecipeError(
                f"source {ref.name} ({ref.path}) is not among the checkpoints at hand"
            ) from None


def _at(settings: Mapping[str, Setting], place: Place) -> dict[str, Any]:
    return {name: value_at(setting, place) for name, setting in settings.items()}


def _nbytes(made: Any) -> int:
    """Return the bytes of the tensors in a tensor, a tuple, or a dataclass with slots."""
    if isinstance(made, Tensor):
        return made.nbytes
    if isinstance(made, tuple):
        return sum(_nbytes(part) for part in made)
    slots = getattr(type(made), "__slots__", ())
    return sum(_nbytes(getattr(made, slot)) for slot in slots)
