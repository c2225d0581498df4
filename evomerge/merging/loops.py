"""The passes over whole tensors that merging is made of, by the fastest means for their device and dtype."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from evomerge.merging import torched
from evomerge.merging.compiled import affine, memory, thinned
from evomerge.merging.keeps import Election, Keep


def weighted_sum(tensors: Sequence[Tensor], factors: Sequence[float], out: Tensor) -> None:
    """Write `sum_i factors[i] * tensors[i]` to `out`, accumulated in float32 and rounded once.

    Tensors with factor 0 are not read; factors (0, 1, 0) give the second tensor bit for bit.

    Args:
        tensors: Of one shape, contiguous, any floating dtypes.
        factors: One for each.
        out: Of their shape, contiguous; may be one of them.
    """
    used = [(tensor, factor) for tensor, factor in zip(tensors, factors, strict=True) if factor != 0]
    if not used:
        out.view(-1).zero_()
    elif len(used) == 1 and used[0][1] == 1.0:
        out.view(-1).copy_(used[0][0].view(-1))
    else:
        terms, numbers = [tensor for tensor, _ in used], [factor for _, factor in used]
        module = affine if memory.takes(out, *terms) else _fused_or_torched(out, *terms)
        module.weighted_sum(terms, numbers, out)


def dot(first: Tensor, second: Tensor) -> float:
    """Return the scalar product of two tensors in float64, the same for any number of threads."""
    product: float = (affine if memory.takes(first, second) else torched).dot(first, second)
    return product


def gram(tensors: Sequence[Tensor]) -> list[list[float]]:
    """Return the scalar product of every pair of tensors, as `dot` does, in one pass."""
    if memory.takes(*tensors):
        return affine.gram(tensors)
    return [[torched.dot(first, second) for second in tensors] for first in tensors]


def all_finite(tensor: Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor infinity."""
    if memory.takes(tensor):
        return affine.all_finite(tensor)
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def merge_thinned(
    base: Tensor,
    tensors: Sequence[Tensor],
    keeps: Sequence[Keep],
    weights: Sequence[float],
    election: Election,
    scale: float,
    out: Tensor,
) -> None:
    """Write the base plus `scale` times the merged delta to `out`; see `compiled.thinned.merge_thinned`."""
    given = (out, base, *tensors)
    module = thinned if memory.takes(*given) else _fused_or_torched(*given)
    module.merge_thinned(base, tensors, keeps, weights, election, scale, out)


def kept_norm(base: Tensor, tensor: Tensor, keep: Keep, power: int) -> float:
    """Return the sum of `abs(entry) ** power` (1 or 2) over what is kept of a source's delta."""
    norm: float = _module(base, tensor).kept_norm(base, tensor, keep, power)
    return norm


def elected_signs(base: Tensor, tensors: Sequence[Tensor], keeps: Sequence[Keep]) -> int:
    """Return how many more entries elect plus than minus; entries whose sum is zero elect neither."""
    signs: int = _module(base, *tensors).elected_signs(base, tensors, keeps)
    return signs


def _module(*tensors: Tensor) -> ModuleType:
    return thinned if memory.takes(*tensors) else torched


def _fused_or_torched(*tensors: Tensor) -> ModuleType:
    fused = _fused() if tensors[0].device.type == "cuda" else None
    return fused if fused is not None and fused.takes(*tensors) else torched


@functools.cache
def _fused() -> ModuleType | None:
    """Return the Triton kernels; None where there is no Triton."""
    try:
        from evomerge.merging import fused
    except ImportError:
        return None
    return fused
