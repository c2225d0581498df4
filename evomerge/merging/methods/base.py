"""The kernel contract: prepare what no searched parameter changes, then merge one tensor.

A kernel sees one tensor of every source at a time. `prepare` is called once per tensor and set of
sources, `merge` once per tensor and candidate; both run on the device that holds the tensors. The sum is
kept in float32 and cast once, when it is written to `out`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from evomerge.catalogue import CATALOGUE, Method
from evomerge.merging.blocks import BLOCK_ELEMENTS, ROW_ELEMENTS, block_buffers, blocks, in_float32, total
from evomerge.merging.loops import weighted_sum
from evomerge.recipe import Scalar
from evomerge.records import Place
from evomerge.segments import Piece


@dataclass(frozen=True, slots=True)
class Sources:
    """One tensor as it is in the base and in every source.

    Attributes:
        base: The base's tensor; None where there is no base.
        tensors: The sources' tensors, all of one shape, any floating dtype, contiguous.
        keys: For each source, what its random mask is keyed by besides the recipe's seed: the source's
            content and the tensor's name.
        place: Where the tensor sits in the merged model.
        layers: Number of layers of the merged model.
    """

    base: Tensor | None
    tensors: tuple[Tensor, ...]
    keys: tuple[str, ...]
    place: Place
    layers: int

    @property
    def given_base(self) -> Tensor:
        """The base's tensor, for methods that need one."""
        if self.base is None:
            raise ValueError("a kernel that works on deltas was given no base")
        return self.base


@dataclass(frozen=True, slots=True)
class Values:
    """The parameters that hold for one tensor: of the method, and of each source in order.

    Attributes:
        method: Parameters of the method; `lambda` has the factor of LiNeS in it.
        sources: Parameters of each source.
        seed: The recipe's seed.
        whole: What `Kernel.whole` returned for this candidate; None for methods that look at one tensor.
        pieces: The tensor's part of the recipe's segment tables, which stand in place of weights; often none.
    """

    method: Mapping[str, Scalar]
    sources: tuple[Mapping[str, Scalar], ...]
    seed: int
    whole: Any = None
    pieces: tuple[Piece, ...] = ()

    def number(self, name: str) -> float:
        """Return a real parameter of the method."""
        return float(self.method[name])

    def numbers(self, name: str) -> list[float]:
        """Return a real parameter of every source."""
        return [float(source[name]) for source in self.sources]


class View(Protocol):
    """One tensor of a candidate as `Kernel.whole` sees it; reading and preparing happen when asked for."""

    values: Values

    def sources(self) -> Sources:
        """Return the tensor of the base and every source."""

    def prepared(self) -> Any:
        """Return what the kernel's `prepare` made of it."""


class Kernel(ABC):
    """One method's arithmetic on one tensor; stateless.

    Attributes:
        method: Its entry of the catalogue.
        prepared_by: Names of the parameters that prepared state depends on, besides `seed` if it is named.
            A search that varies one of them prepares again.
        one_shot: Whether `merge` also takes None for prepared state, and is then faster for a single
            candidate than preparing and merging. The result is the same.
    """

    method: Method
    prepared_by: ClassVar[tuple[str, ...]] = ()
    one_shot: ClassVar[bool] = False

    def prepare(self, sources: Sources, values: Values) -> Any:
        """Return what does not depend on searched parameters, or None where there is nothing to keep.

        Of `values` it may read what `prepared_by` names, and nothing else. What it returns is a tensor, a
        number, None, or a tuple or dataclass with slots of these; the tensors in it count as memory.
        """
        del sources, values

    def whole(self, tensors: Sequence[View]) -> Any:
        """Return what merging any tensor of a candidate needs to know of all of them.

        Called once per candidate, for methods whose catalogue entry says `whole_model`.

        Args:
            tensors: Every floating tensor of the model, in its order.
        """
        del tensors

    @abstractmethod
    def merge(self, sources: Sources, prepared: Any, values: Values, out: Tensor) -> None:
        """Write the merged tensor to `out` (the sources' shape, any floating dtype, contiguous)."""


__all__ = [
    "BLOCK_ELEMENTS",
    "KERNELS",
    "ROW_ELEMENTS",
    "Kernel",
    "Sources",
    "Values",
    "View",
    "block_buffers",
    "blocks",
    "in_float32",
    "kernel",
    "total",
    "weighted_sum",
]

KERNELS: dict[str, Kernel] = {}


def kernel(name: str) -> Callable[[type[Kernel]], type[Kernel]]:
    """Bind a kernel class to the catalogue's entry of that name."""

    def bind(cls: type[Kernel]) -> type[Kernel]:
        cls.method = CATALOGUE[name]
        KERNELS[name] = cls()
        return cls

    return bind
