"""Methods that tell entries that one source changed from those that several changed: RAM and RAM+."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from evomerge.merging.blocks import block_buffers, blocks, in_float32
from evomerge.merging.methods.base import Kernel, Sources, Values, kernel


@kernel("ram")
class Ram(Kernel):
    """`theta_0 + lambda sum_i tau_i / n` over the `n` sources whose `|tau_i|` exceeds epsilon."""

    def merge(self, sources: Sources, prepared: Any, values: Values, out: Tensor) -> None:  # noqa: D102
        _merge(sources, values, [1.0] * len(sources.tensors), out)


@kernel("ramplus_tl")
class RamPlus(Kernel):
    """RAM with the factor `1 + r min(shared_i / own_i, alpha)` on the entries that `i` alone changed."""

    prepared_by: ClassVar[tuple[str, ...]] = ("epsilon",)

    def prepare(self, sources: Sources, values: Values) -> tuple[tuple[int, int], ...]:
        """Return for each source how many entries it changed with others, and how many alone."""
        counts = [[0, 0] for _ in sources.tensors]
        base = sources.given_base.view(-1)
        buffers = block_buffers(len(sources.tensors) + 2, base)
        for part in blocks(base.numel(), base.device):
            deltas, changers, _ = _deltas(sources, part, buffers, values.number("epsilon"))
            for count, delta in zip(counts, deltas, strict=True):
                changed = delta != 0
                own = int((changed & (changers == 1)).sum())
                count[0] += int(changed.sum()) - own
                count[1] += own
        return tuple((shared, own) for shared, own in counts)

    def merge(self, sources: Sources, prepared: Any, values: Values, out: Tensor) -> None:  # noqa: D102
        r, most, smallest = values.number("r"), values.number("alpha"), values.number("epsilon")
        # mergekit divides by epsilon where a source has no entries of its own.
        ratios = [shared / max(own, smallest) if shared else 0.0 for shared, own in prepared]
        _merge(sources, values, [1.0 + r * min(ratio, most) for ratio in ratios], out)


def _merge(sources: Sources, values: Values, factors: Sequence[float], out: Tensor) -> None:
    """Write the base plus the mean of each entry's changes, changes of one source alone by its factor."""
    scale, base, flat_out = values.number("lambda"), sources.given_base.view(-1), out.view(-1)
    buffers = block_buffers(len(sources.tensors) + 2, flat_out)
    for part in blocks(flat_out.numel(), out.device):
        deltas, changers, spare = _deltas(sources, part, buffers, values.number("epsilon"))
        alone = changers == 1
        changers.clamp_(min=1)
        merged, *others = deltas
        for delta, factor in zip(deltas, factors, strict=True):
            if factor != 1.0:
                torch.where(alone, delta * factor, delta, out=delta)
        for delta in others:
            merged.add_(delta)
        merged.div_(changers).mul_(scale).add_(in_float32(base[part], spare))
        flat_out[part].copy_(merged)


def _deltas(
    sources: Sources, part: slice, buffers: Tensor, epsilon: float
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return a block of each delta with zeros where it is no change, the number of changes, and a buffer."""
    base = sources.given_base.view(-1)
    changers, spare, *deltas = buffers[:, : part.stop - part.start]
    changers.zero_()
    for delta, tensor in zip(deltas, sources.tensors, strict=True):
        delta.copy_(tensor.view(-1)[part]).sub_(in_float32(base[part], spare))
        changed = delta.abs() > epsilon
        delta.mul_(changed)
        changers.add_(changed)
    return deltas, changers, spare
