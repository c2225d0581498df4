"""Methods that decide entry by entry what the sources contribute.

Consensus and nearswap need nothing but one sweep over the tensors. SCE keeps the rank of every entry's
variance (int32), Arcee Fusion the mask of what it takes over (1 byte per entry), VaRM three sums per source.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evomerge.merging.blocks import ROW_ELEMENTS, block_buffers, blocks, in_float32, total
from evomerge.merging.loops import weighted_sum
from evomerge.merging.methods.affine import shares
from evomerge.merging.methods.base import Kernel, Sources, Values, View, kernel
from evomerge.merging.methods.competition import check_same_sources, order_statistics
from evomerge.records import Place

SMALLEST_ENERGY = 1e-6
"""Sum of mean squares below which mergekit's SCE gives equal weights."""

SMALLEST_DIVISOR = 1e-6
_CHUNK = 16 * ROW_ELEMENTS


@kernel("consensus")
class Consensus(Kernel):
    """`theta_0 + lambda M tau`: the sum of the deltas where at least `agreement` sources count.

    Source t counts where `|tau_t| > tall_lambda_t |tau - tau_t|`.
    """

    def merge(self, sources: Sources, prepared: Any, values: Values, out: Tensor) -> None:  # noqa: D102
        scale, agreement = values.number("lambda"), values.number("agreement")
        limits = values.numbers("tall_lambda")
        base, flat_out = sources.given_base.view(-1), out.view(-1)
        tensors = [tensor.view(-1) for tensor in sources.tensors]
        buffers = block_buffers(len(tensors) + 3, flat_out)
        for part in blocks(flat_out.numel(), out.device):
            whole, votes, others, *deltas = buffers[:, : part.stop - part.start]
            whole.zero_()
            for delta, tensor in zip(deltas, tensors, strict=True):
                whole.add_(delta.copy_(tensor[part]).sub_(base[part]))
            votes.zero_()
            for delta, limit in zip(deltas, limits, strict=True):
                torch.sub(whole, delta, out=others).abs_().mul_(limit)
                votes.add_(delta.abs_() > others)
            whole.mul_(votes >= agreement).mul_(scale).add_(in_float32(base[part], others))
            flat_out[part].copy_(whole)


@dataclass(frozen=True, slots=True)
class Spread:
    """Prepared state of SCE.

    Attributes:
        ranks: For each entry the rank of its variance among the sources, 0 the largest, int32.
        varied: Number of entries with a variance.
    """

    ranks: Tensor
    varied: int


@kernel("sce")
class Sce(Kernel):
    """Select the entries of largest variance, calculate weights from what is left, erase minority signs."""

    def prepare(self, sources: Sources, values: Values) -> Spread:
        """Return the entries' ranks by variance.

        The variance times N^2 is `N sum_i u_i^2 - (sum_i u_i)^2` with `u_i = theta_i - theta_1`: zero if and
        only if the sources are equal, whatever the rounding.
        """
        first, *others = (tensor.view(-1) for tensor in sources.tensors)
        spread = torch.empty(first.shape, dtype=torch.float32, device=first.device)
        _, step, summed = block_buffers(3, first)
        for part in blocks(first.numel(), first.device):
            squares, size = spread[part].zero_(), part.stop - part.start
            summed.zero_()
            for other in others:
                step[:size].copy_(other[part]).sub_(first[part])
                summed[:size].add_(step[:size])
                squares.addcmul_(step[:size], step[:size], value=1 + len(others))
            squares.sub_(summed[:size].square_()).clamp_(min=0.0)
        varied = int(torch.count_nonzero(spread))
        return Spread(_descending_ranks(spread), varied)

    def merge(self, sources: Sources, prepared: Spread, values: Values, out: Tensor) -> None:  # noqa: D102
        scale, topk = values.number("lambda"), values.number("select_topk")
        masked = values.method["variant"] == "mergekit"
        count = out.numel() if topk >= 1 else int(topk * prepared.varied)
        weights = _energies(sources, prepared.ranks, count, SMALLEST_ENERGY if masked else 0.0)
        base, flat_out = sources.given_base.view(-1), out.view(-1)
        tensors = [tensor.view(-1) for tensor in sources.tensors]
        buffers = block_buffers(len(tensors) + 3, flat_out)
        for part in blocks(flat_out.numel(), out.device):
            sign, merged, divisor, *deltas = buffers[:, : part.stop - part.start]
            sign.zero_()
            for delta, tensor in zip(deltas, tensors, strict=True):
                delta.copy_(tensor[part]).sub_(base[part])
                if masked:
                    delta.mul_(prepared.ranks[part] < count)
                sign.add_(delta)
            torch.ge(sign, 0.0, out=sign).mul_(2.0).sub_(1.0)
            merged.zero_()
            divisor.zero_()
            for delta, weight in zip(deltas, weights, strict=True):
                merged.add_(delta.mul_(sign).clamp_(min=0.0), alpha=weight)
                divisor.add_(delta.sign_(), alpha=weight)
            merged.mul_(sign)
            if masked:
                divisor.clamp_(min=SMALLEST_DIVISOR)
            else:
                divisor.masked_fill_(divisor == 0, 1.0)
            merged.div_(divisor).mul_(scale).add_(in_float32(base[part], sign))
            flat_out[part].copy_(merged)


def _descending_ranks(numbers: Tensor) -> Tensor:
    """Return each number's rank, 0 the largest, as int32; of equal ones the earlier ranks first."""
    order = numbers.argsort(descending=True, stable=True)
    places = torch.arange(len(order), dtype=torch.int32, device=order.device)
    return torch.empty_like(places).scatter_(0, order, places)


def _chunks(count: int) -> Iterator[slice]:
    """Yield the parts that a sum over a tensor is made of; always the same ones, unlike `blocks`."""
    for start in range(0, count, _CHUNK):
        yield slice(start, min(start + _CHUNK, count))


def _energies(sources: Sources, ranks: Tensor, count: int, least: float) -> list[float]:
    """Return each source's share in the squares of the selected deltas.

    Args:
        sources: The tensor.
        ranks: Ranks of its entries.
        count: Entries of a rank below this are selected.
        least: The shares are equal where the sources' mean squares do not sum to more than that.
    """
    base = sources.given_base.view(-1)
    means = []
    for tensor in (tensor.view(-1) for tensor in sources.tensors):
        sums = []
        for part in _chunks(base.numel()):
            delta = tensor[part].to(torch.float64, copy=True).sub_(base[part])
            sums.append(total(delta.square_().mul_(ranks[part] < count)))
        means.append(math.fsum(sums) / max(1, base.numel()))
    energy = math.fsum(means)
    if energy == 0 or energy < least:
        return [1 / len(means)] * len(means)
    return [mean / energy for mean in means]


@dataclass(frozen=True, slots=True)
class Moments:
    """Prepared state of VaRM: sums over a tensor's deltas, one for each source.

    Attributes:
        square: Sums of squares.
        abs: Sums of magnitudes.
        mean: Sums.
        count: Number of entries.
    """

    square: tuple[float, ...]
    abs: tuple[float, ...]
    mean: tuple[float, ...]
    count: int


@kernel("varm")
class Varm(Kernel):
    """`sum_i w_i theta_i`, the weights from a statistic of each delta over a group of tensors."""

    def prepare(self, sources: Sources, values: Values) -> Moments:
        """Return the sums that every statistic at every granularity is made of."""
        base = sources.given_base.view(-1)
        sums = []
        for tensor in (tensor.view(-1) for tensor in sources.tensors):
            parts = []
            for part in _chunks(base.numel()):
                delta = tensor[part].to(torch.float64, copy=True).sub_(base[part])
                parts.append((total(delta.square()), total(delta.abs()), total(delta)))
            sums.append([math.fsum(column) for column in zip(*parts, strict=True)] or [0.0] * 3)
        square, magnitude, mean = (tuple(column) for column in zip(*sums, strict=True))
        return Moments(square, magnitude, mean, base.numel())

    def whole(self, tensors: Sequence[View]) -> Mapping[Hashable, list[float]]:
        """Return the weights of each group of tensors."""
        method = tensors[0].values.method
        groups: dict[Hashable, list[View]] = {}
        for view in tensors:
            group = _group(view.sources().place, str(method["granularity"]))
            groups.setdefault(group, []).append(view)
        weights = {}
        for group, views in groups.items():
            first, *others = (view.sources() for view in views)
            for other in others:
                check_same_sources(first, other, f"varm with granularity {method['granularity']}")
            moments = [view.prepared() for view in views]
            count = max(1, sum(moment.count for moment in moments))
            columns = zip(*(getattr(moment, str(method["statistic"])) for moment in moments), strict=True)
            statistics = [math.fsum(column) / count for column in columns]
            weights[group] = _variation_weights(statistics, float(method["temperature"]))
        return weights

    def merge(self, sources: Sources, prepared: Any, values: Values, out: Tensor) -> None:  # noqa: D102
        group = _group(sources.place, str(values.method["granularity"]))
        weighted_sum(sources.tensors, values.whole[group], out)


def _group(place: Place, granularity: str) -> Hashable:
    """Return what tensors must have in common to share their weights."""
    return {
        "tensor": place.name,
        "layer": place.layer,
        "role": (place.layer, place.role),
        "model": None,
    }[granularity]


def _variation_weights(statistics: list[float], temperature: float) -> list[float]:
    """Return weights that sum to one.

    Raises:
        CandidateError: The statistics cancel out.
    """
    if not any(statistics):
        return [1 / len(statistics)] * len(statistics)
    if temperature == 0:
        largest = max(map(abs, statistics))
        return shares([statistic / largest for statistic in statistics], normalize=True)
    most = max(statistics)
    return shares([math.exp((statistic - most) / temperature) for statistic in statistics], normalize=True)


@kernel("nearswap")
class Nearswap(Kernel):
    """`theta_1 + clamp(theta_2 - theta_1, -t, t)`.

    The weight of the second source is `t / |difference|`, 1 at most.
    """

    def merge(self, sources: Sources, prepared: Any, values: Values, out: Tensor) -> None:  # noqa: D102
        t = values.number("t")
        first, second = (tensor.view(-1) for tensor in sources.tensors)
        flat_out = out.view(-1)
        buffers = block_buffers(3, flat_out)
        for part in blocks(flat_out.numel(), out.device):
            start, end, step = buffers[:, : part.stop - part.start]
            start.copy_(first[part])
            end.copy_(second[part])
            torch.sub(end, start, out=step)
            near = step.abs() <= t
            flat_out[part].copy_(torch.where(near, end, start.add_(step.clamp_(-t, t))))


@kernel("arcee_fusion")
class ArceeFusion(Kernel):
    """`theta_0 + lambda M tau`, the mask `M` from the importance of each entry."""

    def prepare(self, sources: Sources, values: Values) -> Tensor:
        """Return the mask: importance at or above median + 1.5 (third quartile - first quartile)."""
        importance = _importance(sources)
        last = importance.numel() - 1
        if last < 0:
            return importance >= 0
        ranks = [int(quarter * last) for quarter in (0.25, 0.5, 0.75)]
        [[low, median, high]] = order_statistics(lambda: iter([[importance]]), 1, ranks)
        return importance >= median + 1.5 * (high - low)

    def merge(self, sources: Sources, prepared: Tensor, values: Values, out: Tensor) -> None:  # noqa: D102
        scale = values.number("lambda")
        base, source, flat_out = sources.given_base.view(-1), sources.tensors[0].view(-1), out.view(-1)
        buffers = block_buffers(2, flat_out)
        for part in blocks(flat_out.numel(), out.device):
            start, delta = buffers[:, : part.stop - part.start]
            start.copy_(base[part])
            delta.copy_(source[part]).sub_(start).mul_(prepared[part])
            flat_out[part].copy_(delta.mul_(scale).add_(start))


def _importance(sources: Sources) -> Tensor:
    """Return `|theta - theta_0|` times the Kullback-Leibler divergence of the row's softmax, flat, float32.

    Rows are the last axis. As in mergekit 1e-8 is added to every probability.
    """
    shape = sources.given_base.shape
    columns = shape[-1] if shape else 1
    base, source = sources.given_base.view(-1), sources.tensors[0].view(-1)
    importance = torch.empty(base.shape, dtype=torch.float32, device=base.device)
    step = max(1, ROW_ELEMENTS // max(1, columns)) * columns
    for start in range(0, base.numel(), max(1, step)):
        part = slice(start, start + step)
        old, new = (flat[part].double().view(-1, columns) for flat in (base, source))
        p, q = (torch.softmax(rows, dim=1).add_(1e-8) for rows in (new, old))
        terms = p.div(q).log_().mul_(p)
        divergence = terms.sum(dim=1) if len(terms) > 1 else terms.new_tensor([total(terms.view(-1))])
        scores = (new - old).abs_().mul_(divergence.clamp_(min=0.0).unsqueeze(1))
        importance[part].copy_(scores.view(-1))
    return importance
