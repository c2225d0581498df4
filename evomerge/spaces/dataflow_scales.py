"""Scales of a layer path as genes: one for each slot, one for each pair of layers, or a small network.

A gene of 0.5 everywhere gives scales of 1.
"""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence

from evomerge.spaces.dataflow_settings import DataFlowSettings

Use = tuple[int, int, int, int, float]
"""Layer before, layer, slot, step, and the scale between the two layers."""


class Scales(ABC):
    """Genes for the scales of a path.

    Attributes:
        labels: What each gene is for.
    """

    labels: tuple[str, ...] = ()

    def __init__(self, width: float) -> None:
        self._width = width

    @abstractmethod
    def scale(self, genes: Sequence[float], before: int, layer: int, slot: int, step: int) -> float:
        """Return the scale of the hidden state on its way from one layer to the next.

        Args:
            genes: One for each label.
            before: Number of the layer before, of all layers.
            layer: Number of the layer.
            slot: Number of its slot; the number of slots for the last layer.
            step: Its place in the path.
        """

    @abstractmethod
    def genes(self, uses: Sequence[Use]) -> tuple[float, ...]:
        """Return genes whose scales are near to wanted ones."""

    def _value(self, gene: float) -> float:
        return 1.0 + self._width * (2.0 * gene - 1.0)

    def _gene(self, scale: float) -> float:
        return min(max(((scale - 1.0) / self._width + 1.0) / 2.0, 0.0), 1.0)


class _None(Scales):
    def scale(self, genes: Sequence[float], before: int, layer: int, slot: int, step: int) -> float:
        del genes, before, layer, slot, step
        return 1.0

    def genes(self, uses: Sequence[Use]) -> tuple[float, ...]:
        del uses
        return ()


class _OfSlots(Scales):
    def __init__(self, width: float, names: Sequence[str]) -> None:
        super().__init__(width)
        self.labels = tuple(f"scale before {name}" for name in names)

    def scale(self, genes: Sequence[float], before: int, layer: int, slot: int, step: int) -> float:
        del before, layer, step
        return self._value(genes[slot])

    def genes(self, uses: Sequence[Use]) -> tuple[float, ...]:
        found = [0.5] * len(self.labels)
        for _, _, slot, _, scale in uses:
            found[slot] = self._gene(scale)
        return tuple(found)


class _OfPairs(Scales):
    """The paper's matrix W: every pair of layers, also those that never meet."""

    def __init__(self, width: float, layers: int) -> None:
        super().__init__(width)
        self._layers = layers
        self.labels = tuple(f"scale from {i} to {j}" for i in range(layers) for j in range(layers))

    def scale(self, genes: Sequence[float], before: int, layer: int, slot: int, step: int) -> float:
        del slot, step
        return self._value(genes[before * self._layers + layer])

    def genes(self, uses: Sequence[Use]) -> tuple[float, ...]:
        found = [0.5] * len(self.labels)
        for before, layer, _, _, scale in uses:
            found[before * self._layers + layer] = self._gene(scale)
        return tuple(found)


class _Network(Scales):
    """The paper's pi(i, j, t) of both layers' numbers and the step, with one hidden layer."""

    INPUTS = 4
    """Both layers, the step, and 1."""

    def __init__(self, width: float, layers: int, hidden: int, steps: int) -> None:
        super().__init__(width)
        self._layers, self._hidden, self._steps = layers, hidden, steps
        inner = [f"network {unit}.{i}" for unit in range(hidden) for i in range(self.INPUTS)]
        self.labels = (*inner, *(f"network out {unit}" for unit in range(hidden + 1)))

    def scale(self, genes: Sequence[float], before: int, layer: int, slot: int, step: int) -> float:
        del slot
        weights = [6.0 * (gene - 0.5) for gene in genes]
        inputs = (
            _centred(before, self._layers),
            _centred(layer, self._layers),
            _centred(step, self._steps),
            1.0,
        )
        out = weights[-1]
        for unit in range(self._hidden):
            row = weights[unit * self.INPUTS : (unit + 1) * self.INPUTS]
            out += weights[self._hidden * self.INPUTS + unit] * math.tanh(sum(map(operator.mul, row, inputs)))
        return 1.0 + self._width * math.tanh(out / 2.0)

    def genes(self, uses: Sequence[Use]) -> tuple[float, ...]:
        """Return the network that gives the mean of the wanted scales everywhere."""
        mean = sum(use[-1] for use in uses) / len(uses)
        aim = min(max((mean - 1.0) / self._width, -0.99), 0.99)
        found = [0.5] * len(self.labels)
        found[-1] = min(max(0.5 + 2.0 * math.atanh(aim) / 6.0, 0.0), 1.0)
        return tuple(found)


def _centred(number: int, count: int) -> float:
    """Return a number from 0 to `count` as one from -1 to 1."""
    return 2.0 * number / max(1, count) - 1.0


def scales_of(settings: DataFlowSettings, layers: int, names: Sequence[str]) -> Scales:
    """Return the genes for the scales of a space.

    Args:
        settings: The space section.
        layers: Number of layers of all sources.
        names: Of the slots in order, and of the last layer.
    """
    width = settings.scale_range
    if settings.scales == "none":
        return _None(width)
    if settings.scales == "slot":
        return _OfSlots(width, names)
    if settings.scales == "matrix":
        return _OfPairs(width, layers)
    return _Network(width, layers, settings.hidden, len(names))
