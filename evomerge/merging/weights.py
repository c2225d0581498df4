"""A recipe's tensors one by one, for an engine that takes weights rather than files.

What is given on is plain data (recipe and sources), so that it can also be sent to the processes of an engine
that spreads a model over several GPUs; each of them then opens the checkpoints and merges for itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from evomerge.checkpoints.layout import layout_of
from evomerge.checkpoints.opening import open_checkpoint
from evomerge.errors import EvomergeError
from evomerge.merging.merger import Merger
from evomerge.recipe import Recipe, SourceRef


@dataclass(frozen=True, slots=True)
class Origin:
    """What a merger is made of, as plain data.

    Attributes:
        sources: Every checkpoint a recipe may name.
        reference: Name of the one that gives tensor names and order.
        base_dir: What paths are relative to.
        budget_bytes: Most memory for what is prepared; None: no limit.
    """

    sources: tuple[SourceRef, ...]
    reference: str
    base_dir: str
    budget_bytes: int | None = None


@lru_cache(maxsize=1)
def merger_of(origin: Origin) -> Merger:
    """Return this process's merger of an origin, which works on the CPU."""
    base_dir = Path(origin.base_dir)
    opened = {ref.name: open_checkpoint(ref.path, ref.revision, base_dir) for ref in origin.sources}
    return Merger(
        {ref.identity: opened[ref.name] for ref in origin.sources},
        layout_of(opened[origin.reference]),
        budget_bytes=origin.budget_bytes,
    )


@dataclass(slots=True)
class MergedWeights:
    """Yields (name, tensor) in the order of the layers, each merged when it is asked for.

    A recipe that has no merged model yields NaN from there on instead of raising: the engine in the middle
    of its weights is then left whole, and `problem` says what happened.

    Attributes:
        origin: Where the sources are.
        recipe: What is merged.
        rolled: Yield every tensor with its rows moved on by one: other weights, sure to answer otherwise.
        problem: Why there is no merged model; known after the last tensor, in this process only.
    """

    origin: Origin
    recipe: Recipe
    rolled: bool = False
    problem: EvomergeError | None = field(default=None, compare=False)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        merger = merger_of(self.origin)
        self.problem = None
        for name in merger.outputs(self.recipe):
            tensor = self._merged(merger, name)
            yield name, tensor.roll(1, dims=0) if self.rolled and tensor.is_floating_point() else tensor

    def _merged(self, merger: Merger, name: str) -> Tensor:
        if self.problem is None:
            try:
                return merger.merge(self.recipe, name)
            except EvomergeError as problem:
                self.problem = problem
        ref, own = merger.inputs_of(self.recipe, merger.outputs(self.recipe)[name])[0]
        stored = merger.tensor(ref, own, torch.device("cpu"))
        return torch.full_like(stored, torch.nan) if stored.is_floating_point() else stored
