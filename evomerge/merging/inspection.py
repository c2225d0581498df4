"""Comparing sources with their base, tensor by tensor: every one is read once, memory holds a few."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evomerge.checkpoints.layout import layout_of
from evomerge.checkpoints.source import Checkpoint
from evomerge.errors import SourceError
from evomerge.merging.drift import LARGE_DRIFT, Inspection, PartDrift, ProductDrift, SourceDrift
from evomerge.merging.locks import Pair, attention_of, group_drifts
from evomerge.merging.loops import all_finite
from evomerge.records import Place

_LEAVES = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o"}
_PAIRS: tuple[tuple[Pair, tuple[str, ...]], ...] = (
    ("vo", ("v_proj", "o_proj")),
    ("qk", ("q_proj", "k_proj", "q_norm", "k_norm")),
)
_BLOCK = 1 << 16  # entries of each model in float64 at a time: half a megabyte

Progress = Callable[[int, int], None]


def inspect_sources(
    checkpoints: Mapping[str, Checkpoint],
    base: str | None = None,
    *,
    all_products: bool = True,
    progress: Progress = lambda done, total: None,
) -> Inspection:
    """Compare sources with their base, tensor by tensor.

    Args:
        checkpoints: Name to checkpoint, of one architecture.
        base: Name of the base among them; None: the first of them.
        all_products: Whether the products of all attention heads are compared, which costs more than reading
            them; else only those of layers whose attention drifts more than `LARGE_DRIFT`.
        progress: Called with bytes of the base compared and bytes in all.

    Raises:
        SourceError: A checkpoint is broken, the base holds NaN or infinity, or a source has no float tensor
            of the same name and shape.
    """
    base = next(iter(checkpoints)) if base is None else base
    comparison = _Comparison(base, checkpoints, all_products)
    total, done = checkpoints[base].nbytes, 0
    for unit in comparison.units():
        comparison.add(unit)
        done += sum(checkpoints[base].tensors[place.name].nbytes for place in unit.places)
        progress(done, total)
    return comparison.result()


def check_sources(
    checkpoints: Mapping[str, Checkpoint], base_name: str | None = None, progress: Progress = lambda *_: None
) -> list[str]:
    """Return one line for each source that a merge is likely to fail with, for one read of all models.

    Args:
        checkpoints: Name to checkpoint, of one architecture.
        base_name: Name of the base among them; None: the first of them.
        progress: Called with bytes of the base compared and bytes in all.

    Raises:
        SourceError: As for `inspect_sources`.
    """
    if len(checkpoints) < 2:
        return []
    return inspect_sources(checkpoints, base_name, all_products=False, progress=progress).warnings()


@dataclass(frozen=True, slots=True)
class _Unit:
    """Tensors that are read together: the factors of an attention product in their order, or one tensor."""

    places: tuple[Place, ...]
    pair: Pair | None = None


class _Comparison:
    """The sums of one inspection, tensor after tensor."""

    def __init__(self, base: str, checkpoints: Mapping[str, Checkpoint], all_products: bool) -> None:
        self.base = base
        self.models = [checkpoints[base], *(found for name, found in checkpoints.items() if name != base)]
        self.sources = [SourceDrift(name) for name in checkpoints if name != base]
        self.layout = layout_of(checkpoints[base])
        count = self.layout.num_layers
        known = [attention_of(model, count) for model in self.models]
        self.attention = known[0] if all(one == known[0] for one in known) else None
        self.all_products = all_products
        self.deltas: dict[str, Tensor] = {}
        for source, model in zip(self.sources, self.models[1:], strict=True):
            source.skipped = sorted(model.tensors.keys() - self.models[0].tensors.keys())

    def units(self) -> Iterator[_Unit]:
        """Yield all tensors of the base, in an order in which those of one product come together."""
        left = dict(self.layout.places)
        while left:
            name = next(iter(left))
            unit = self._unit(left, name)
            for place in unit.places:
                del left[place.name]
            yield unit

    def _unit(self, left: Mapping[str, Place], name: str) -> _Unit:
        prefix, found, _ = name.rpartition("self_attn.")
        alone = _Unit((left[name],))
        if self.attention is None or not found or left[name].layer is None:
            return alone
        for pair, leaves in _PAIRS:
            names = [f"{prefix}self_attn.{leaf}.weight" for leaf in leaves]
            if name not in names:
                continue
            there = [factor for factor in names if factor in left]
            shapes = [self.models[0].tensors[factor].shape for factor in there]
            if len(there) in (2, 4) and there[:2] == names[:2] and self.attention.fits(pair, shapes):
                return _Unit(tuple(left[factor] for factor in there), pair)
        return alone

    def add(self, unit: _Unit) -> None:
        """Compare the tensors of a unit, and their products."""
        read = [self._read(place) for place in unit.places]
        whole = [all(there[source] for _, there in read) for source in range(len(self.sources))]
        if unit.pair is None or self.attention is None or not any(whole):
            return
        layer = unit.places[0].layer
        drifting = max(
            (drift for source in self.sources for drift in self._drifts(source, unit)), default=0.0
        )
        if layer is None or not (self.all_products or drifting > LARGE_DRIFT):
            return
        chosen = [0, *(number + 1 for number, there in enumerate(whole) if there)]
        models = [[tensors[number] for tensors, _ in read] for number in chosen]
        for number, drifts in zip(
            chosen[1:], group_drifts(self.attention, unit.pair, models, layer), strict=True
        ):
            self.sources[number - 1].products.setdefault(unit.pair, ProductDrift()).add(layer, drifts)

    def result(self) -> Inspection:
        """Return what was found."""
        notes = []
        if self.attention is None:
            notes.append("heads of this architecture are not known: products of attention were not compared")
        cosines = {part: _cosines(gram) for part, gram in self.deltas.items()}
        if self.deltas:
            cosines["all"] = _cosines(torch.stack(list(self.deltas.values())).sum(0))
        return Inspection(self.base, tuple(self.sources), cosines, tuple(notes))

    def _read(self, place: Place) -> tuple[list[Tensor], list[bool]]:
        """Count a tensor's drift for every source.

        Returns:
            The tensor of every model, the base first, and for each source whether it was compared.
        """
        name = place.name
        base = self.models[0].tensor(name)
        if not base.is_floating_point():
            return [base] * len(self.models), [False] * len(self.sources)
        if not all_finite(base.contiguous()):
            raise SourceError(f'{self.models[0].path}: tensor "{name}" holds NaN or infinity; it is damaged')
        tensors, there = [base], []
        for source, model in zip(self.sources, self.models[1:], strict=True):
            info = model.tensors.get(name)
            fits = info is not None and info.shape == tuple(base.shape)
            tensor = model.tensor(name) if fits else base
            if not fits:
                source.skipped.append(name)
            elif not all_finite(tensor.contiguous()):
                source.non_finite.append(name)
                fits = False
            tensors.append(tensor)
            there.append(fits)
        self._count(place, tensors, there)
        return tensors, there

    def _count(self, place: Place, tensors: Sequence[Tensor], there: Sequence[bool]) -> None:
        """Add a tensor's sums to its part."""
        part, size = _part(place, tensors[0].dim()), len(tensors)
        sums = torch.zeros(size, size, dtype=torch.float64)
        changed = [0] * len(self.sources)
        for block in _parts(tensors[0].numel()):
            rows = torch.stack([tensor.reshape(-1)[block].double() for tensor in tensors])
            rows[1:] -= rows[0]
            sums += rows @ rows.T
            for i, row in enumerate(rows[1:]):
                changed[i] += int(row.count_nonzero())
        for i, (source, compared) in enumerate(zip(self.sources, there, strict=True), start=1):
            if compared:
                squares = float(sums[i, i]), float(sums[0, 0]), float(sums[i, 0])
                drift = source.parts.setdefault(part, PartDrift())
                drift.add(place.name, tensors[0].numel(), changed[i - 1], squares)
        gram = self.deltas.setdefault(part, torch.zeros(size - 1, size - 1, dtype=torch.float64))
        gram += sums[1:, 1:]

    def _drifts(self, source: SourceDrift, unit: _Unit) -> list[float]:
        """Return a source's drift of the parts that a unit's tensors belong to."""
        parts = {_part(place, 2) for place in unit.places}
        return [source.parts[part].relative for part in parts if part in source.parts]


def _parts(count: int) -> Iterator[slice]:
    return (slice(start, min(start + _BLOCK, count)) for start in range(0, count, _BLOCK))


def _part(place: Place, dimensions: int) -> str:
    """Return the part of the model that a tensor belongs to."""
    if place.role != "attention":
        return place.role
    if dimensions < 2:
        return "attention bias" if place.name.endswith("bias") else "attention norm"
    return next((part for leaf, part in _LEAVES.items() if f".{leaf}." in place.name), "attention")


def _cosines(gram: Tensor) -> list[list[float | None]]:
    norms = gram.diagonal().sqrt()
    return [
        [
            float(gram[i, j] / (norms[i] * norms[j])) if norms[i] * norms[j] > 0 else None
            for j in range(len(gram))
        ]
        for i in range(len(gram))
    ]
