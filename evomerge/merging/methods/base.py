"""The kernel contract: prepare what no searched parameter changes, then merge one tensor.

A kernel sees one tensor of every source at a time. `prepare` is called once per tensor and set of
sources, `merge` once per tensor and candidate; both run on the device that holds the tensors. The sum is
kept in float32 and cast once, when it is written to `out`.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from evomerge.catalogue import CATALOGUE, Method
from evomerge.recipe import Scalar
from evomerge.records import Place

BLOCK_ELEMENTS = 1 << 18
"""Elements worked on at a time on a CPU: few enough to stay in cache, enough to outweigh a call's cost."""

ROW_ELEMENTS = 1 << 14
"""Elements that `total` adds up in one go: too few for torch to divide them among threads."""


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
    """

    method: Mapping[str, Scalar]
    sources: tuple[Mapping[str, Scalar], ...]
    seed: int
    whole: Any = None

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
    """

    method: Method
    prepared_by: ClassVar[tuple[str, ...]] = ()

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


KERNELS: dict[str, Kernel] = {}


def kernel(name: str) -> Callable[[type[Kernel]], type[Kernel]]:
    """Bind a kernel class to the catalogue's entry of that name."""

    def bind(cls: type[Kernel]) -> type[Kernel]:
        cls.method = CATALOGUE[name]
        KERNELS[name] = cls()
        return cls

    return bind


def weighted_sum(tensors: Sequence[Tensor], factors: Sequence[float], out: Tensor) -> None:
    """Write `sum_i factors[i] * tensors[i]` to `out`, accumulated in float32.

    Tensors with factor 0 are not read; factors (0, 1, 0) give the second tensor bit for bit.
    """
    used = [(tensor.view(-1), factor) for tensor, factor in zip(tensors, factors, strict=True) if factor != 0]
    flat_out = out.view(-1)
    if not used:
        flat_out.zero_()
        return
    if len(used) == 1 and used[0][1] == 1.0:
        flat_out.copy_(used[0][0])
        return
    (first, first_factor), *rest = used
    scratch = block_buffers(2, flat_out)
    for part in blocks(flat_out.numel(), out.device):
        target = flat_out[part]
        accumulator, cast = scratch[:, : target.numel()]
        merged = target if target.dtype == torch.float32 else accumulator
        torch.mul(in_float32(first[part], cast), first_factor, out=merged)
        for tensor, factor in rest:
            merged.add_(in_float32(tensor[part], cast), alpha=factor)
        if merged is not target:
            target.copy_(merged)


def in_float32(part: Tensor, cast: Tensor) -> Tensor:
    """Return a part of a tensor in float32, by way of the buffer `cast` if it is not already."""
    return part if part.dtype == torch.float32 else cast.copy_(part)


def block_buffers(count: int, like: Tensor) -> Tensor:
    """Return `count` float32 buffers for a block of a flat tensor, one in a row.

    They are made once for a tensor: memory that a CPU's allocator gets for every block costs more time than
    the arithmetic on it.
    """
    width = min(BLOCK_ELEMENTS, like.numel()) if like.device.type == "cpu" else like.numel()
    return torch.empty((count, width), dtype=torch.float32, device=like.device)


def blocks(count: int, device: torch.device) -> Iterator[slice]:
    """Yield the parts of a flat tensor to work on one at a time: small on a CPU, all at once elsewhere."""
    step = BLOCK_ELEMENTS if device.type == "cpu" else max(1, count)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def total(values: Tensor) -> float:
    """Return the sum of a flat tensor in float64, the same whatever the number of threads."""
    whole = values.numel() // ROW_ELEMENTS * ROW_ELEMENTS
    sums = [float(values[whole:].sum(dtype=torch.float64))]
    for rows in torch.split(values[:whole].view(-1, ROW_ELEMENTS), 16):  # torch copies them to float64
        sums += rows.sum(dim=1, dtype=torch.float64).tolist()
    return math.fsum(sums)


def uniform_codes(seed: int, key: str, count: int, device: torch.device) -> Tensor:
    """Return `count` integers uniform in [0, 2**24), a pure function of (seed, key, index), as int32.

    Counter based: the index is mixed with two 32-bit keys by the finaliser of MurmurHash3 (Appleby 2011),
    applied twice. No state, so neither the order of work nor the number of workers changes a mask.
    """
    digest = hashlib.sha256(f"{seed}\x1f{key}".encode()).digest()
    first, second = (int.from_bytes(digest[i : i + 4], "little", signed=True) for i in (0, 4))
    codes = torch.arange(count, dtype=torch.int32, device=device)
    for part in blocks(count, device):
        code = codes[part]
        for word in (first, second):
            code ^= word
            for shift, factor in ((16, -2048144789), (13, -1028477387)):
                code ^= _shift_right(code, shift)
                code *= factor
            code ^= _shift_right(code, 16)
        code.copy_(_shift_right(code, 8))
    return codes


def _shift_right(code: Tensor, bits: int) -> Tensor:
    """Logical shift of int32, which torch shifts arithmetically."""
    return (code >> bits).bitwise_and_((1 << (32 - bits)) - 1)
