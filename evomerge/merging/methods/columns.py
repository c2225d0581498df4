"""WIDEN: the columns of a matrix weighed by how far their length and their direction moved.

Prepared are only the ranks of the columns within each source, so a candidate costs one sweep.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from evomerge.merging.blocks import (
    BLOCK_ELEMENTS,
    ROW_ELEMENTS,
    block_buffers,
    blocks,
    in_float32,
    total,
)
from evomerge.merging.methods.base import Kernel, Sources, Values, kernel


@dataclass(frozen=True, slots=True)
class Ranks:
    """Prepared state of a tensor with matrices: int32, sources x matrices x columns, 0 the least changed.

    Attributes:
        magnitude: Ranks of the columns by the change of their Euclidean norm.
        direction: Ranks by one minus the cosine of the angle they turned by.
    """

    magnitude: Tensor
    direction: Tensor


@kernel("widen")
class Widen(Kernel):
    """`theta_0 + lambda sum_i tau_i diag(s_i)`, the scores `s_i` from ranks within each source.

    A column's score is the mean of one for its length and one for its direction. Each is the softmax, over
    the sources, of rank / number of columns, or the calibration value where the rank is above average.
    Vectors have one score per entry, made in the same way from the magnitudes of the delta itself.
    """

    def prepare(self, sources: Sources, values: Values) -> Ranks | tuple[float, ...] | None:
        """Return the ranks of the columns; of a vector, each delta's mean magnitude."""
        count = sources.given_base.numel()
        if not count:
            return None
        if sources.given_base.ndim < 2:
            origin = sources.given_base.view(-1)
            return tuple(
                total(tensor.view(-1).to(torch.float64, copy=True).sub_(origin).abs_()) / count
                for tensor in sources.tensors
            )
        changes = [_changes(sources, tensor) for tensor in sources.tensors]
        magnitude, direction = (torch.stack(kind) for kind in zip(*changes, strict=True))
        return Ranks(_ranked(magnitude), _ranked(direction))

    def merge(  # noqa: D102
        self, sources: Sources, prepared: Ranks | tuple[float, ...] | None, values: Values, out: Tensor
    ) -> None:
        if isinstance(prepared, Ranks):
            _merge_matrices(sources, prepared, values, out)
        elif prepared is not None:
            _merge_vector(sources, prepared, values, out)


def _matrices(sources: Sources, tensor: Tensor) -> Tensor:
    """Return a tensor as matrices x rows x columns."""
    return tensor.view(-1).view(-1, *sources.given_base.shape[-2:])


def _by_rows(sources: Sources) -> bool:
    """Whether the vectors that are judged lie in rows: the tokens of an embedding."""
    return sources.place.role == "embedding" and sources.given_base.ndim == 2


def _changes(sources: Sources, tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return the changes of the columns' norms and directions, float64, matrices x columns."""
    pairs = zip(_matrices(sources, tensor), _matrices(sources, sources.given_base), strict=True)
    lengths, turns = [], []
    for new, old in pairs:
        square, square_old, product = _column_sums(new, old, _by_rows(sources))
        lengths.append((square.sqrt() - square_old.sqrt()).abs_())
        cosine = product / (square * square_old).sqrt()
        # A column that stays zero has not turned, one that was or becomes zero has turned fully.
        cosine = cosine.where((square > 0) & (square_old > 0), ((square + square_old) == 0).double())
        turns.append((1.0 - cosine).clamp_(min=0.0))
    return torch.stack(lengths), torch.stack(turns)


def _column_sums(new: Tensor, old: Tensor, by_rows: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums of squares of the columns (rows) of both matrices and of their product, float64.

    Rows are added up in the same steps whatever the number of threads.
    """
    rows, columns = new.shape
    sums = torch.zeros((3, rows if by_rows else columns), dtype=torch.float64, device=new.device)
    step = max(1, ROW_ELEMENTS // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        first, second = new[part].double(), old[part].double()
        for into, left, right in zip(sums, (first, second, first), (first, second, second), strict=True):
            product = left * right
            if not by_rows:
                into += product.sum(dim=0)
            elif len(product) > 1:
                into[part] = product.sum(dim=1)
            else:
                into[start] = total(product.view(-1))
    square, square_old, both = sums
    return square, square_old, both


def _ranked(changes: Tensor) -> Tensor:
    """Return ranks along the last axis, 0 the smallest; of equal ones the earlier has the smaller rank."""
    order = changes.argsort(dim=-1, stable=True)
    places = torch.arange(changes.shape[-1], dtype=torch.int32, device=changes.device)
    return torch.empty_like(order, dtype=torch.int32).scatter_(-1, order, places.expand_as(order))


def _scores(ranks: Tensor, values: Values) -> Tensor:
    """Return the scores that ranks (sources x matrices x columns) stand for, in float64."""
    columns, ranks = ranks.shape[-1], ranks.double()
    scores = torch.softmax(ranks / columns, dim=0)
    average = (columns - 1) / 2
    important = ranks > values.number("above_average_value_ratio") * average
    return scores.masked_fill_(important, values.number("score_calibration_value"))


def _merge_matrices(sources: Sources, ranks: Ranks, values: Values, out: Tensor) -> None:
    scores = (_scores(ranks.magnitude, values) + _scores(ranks.direction, values)) / 2
    factors = (scores * values.number("lambda")).float()
    by_rows = _by_rows(sources)
    results, origins = _matrices(sources, out), _matrices(sources, sources.given_base)
    tensors = [_matrices(sources, tensor) for tensor in sources.tensors]
    for i, (result, origin) in enumerate(zip(results, origins, strict=True)):
        for part in _row_blocks(result):
            start = origin[part].float()
            merged = start.clone()
            for tensor, factor in zip(tensors, factors[:, i], strict=True):
                delta = tensor[i][part].to(torch.float32, copy=True).sub_(start)
                merged.addcmul_(delta, factor[part].unsqueeze(1) if by_rows else factor)
            result[part].copy_(merged)


def _row_blocks(matrix: Tensor) -> Iterator[slice]:
    rows, columns = matrix.shape
    step = max(1, BLOCK_ELEMENTS // columns) if matrix.device.type == "cpu" else rows
    for start in range(0, rows, step):
        yield slice(start, start + step)


def _merge_vector(sources: Sources, means: tuple[float, ...], values: Values, out: Tensor) -> None:
    scale = values.number("lambda")
    ratio, calibration = values.number("above_average_value_ratio"), values.number("score_calibration_value")
    origin, flat_out = sources.given_base.view(-1), out.view(-1)
    tensors = [tensor.view(-1) for tensor in sources.tensors]
    buffers = block_buffers(2 * len(tensors) + 1, flat_out)
    for part in blocks(flat_out.numel(), out.device):
        merged, deltas, scores = buffers[:, : part.stop - part.start].tensor_split((1, 1 + len(tensors)))
        start = in_float32(origin[part], merged[0])
        for delta, tensor in zip(deltas, tensors, strict=True):
            delta.copy_(tensor[part]).sub_(start)
        magnitudes = deltas.abs()
        torch.sub(magnitudes, magnitudes.amax(dim=0), out=scores).exp_()
        scores.div_(scores.sum(dim=0))
        for score, magnitude, mean in zip(scores, magnitudes, means, strict=True):
            score.masked_fill_(magnitude > ratio * mean, calibration)
        flat_out[part].copy_(deltas.mul_(scores).sum(dim=0).mul_(scale).add_(start))
