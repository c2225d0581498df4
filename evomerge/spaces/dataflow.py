"""Spaces of layer paths: what they share, and the indicator space of arXiv 2403.13187."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evomerge.catalogue import method_named
from evomerge.errors import ConfigError, RecipeError
from evomerge.paths import LARGEST, SMALLEST, LayerPath, Step
from evomerge.recipe import Recipe, RecipeSource, SourceRef
from evomerge.records import Genome
from evomerge.spaces.dataflow_scales import Scales, scales_of
from evomerge.spaces.dataflow_settings import DataFlowSettings, PathSettings
from evomerge.spaces.dimensions import Dimension, check_genome
from evomerge.stacking import as_path

DIGITS = 6
"""Decimals of a scale."""


@dataclass(frozen=True, slots=True)
class Stacks:
    """The layers that paths are made of.

    Attributes:
        refs: The sources in order; the first gives the ends, its first layer begins and its last one ends.
        counts: Source name to its number of layers.
        layer_parameters: Parameters of one layer.
        other_parameters: Parameters outside the layers.
    """

    refs: tuple[SourceRef, ...]
    counts: Mapping[str, int]
    layer_parameters: int = 0
    other_parameters: int = 0

    @property
    def first(self) -> str:
        """Name of the first source."""
        return self.refs[0].name

    @property
    def layers(self) -> list[tuple[str, int]]:
        """All layers of all sources in order: source and number."""
        return [(ref.name, layer) for ref in self.refs for layer in range(self.counts[ref.name])]

    def longest(self, settings: PathSettings) -> int | None:
        """Return how many layers a path may have.

        Raises:
            ConfigError: Less than two.
        """
        limits = [] if settings.max_layers is None else [settings.max_layers]
        if settings.max_parameters is not None:
            left = settings.max_parameters - self.other_parameters
            limits.append(left // max(1, self.layer_parameters))
            if limits[-1] < 2:
                least = self.other_parameters + 2 * self.layer_parameters
                raise ConfigError(
                    f"space.max_parameters: two layers and all that is outside the layers have {least:,} "
                    f"parameters, got {settings.max_parameters:,}"
                )
        return min(limits, default=None)


def whole_path(ref: SourceRef, layers: int, dtype: str | None = None) -> Recipe:
    """Return the recipe that runs through one source as it is."""
    steps = tuple(Step(source=ref.name, layer=layer) for layer in range(layers))
    return path_recipe(LayerPath(layers=steps), [ref], dtype)


def path_recipe(path: LayerPath, refs: Sequence[SourceRef], dtype: str | None) -> Recipe:
    """Return the recipe of a path over those of the sources that it uses."""
    used = {path.end, *(step.source for step in path.layers)}
    sources = [RecipeSource(**dict(ref)) for ref in refs if ref.name in used]
    return Recipe.model_validate({"method": "passthrough", "sources": sources, "path": path, "dtype": dtype})


class PathSpace(ABC):
    """Maps genomes to layer paths.

    Args:
        settings: The space section.
        stacks: The layers.

    Attributes:
        dimensions: What optimizers know of it.
    """

    method = method_named("passthrough")
    dimensions: tuple[Dimension, ...]

    def __init__(self, settings: PathSettings, stacks: Stacks) -> None:
        if settings.tokenizer not in (None, stacks.first):
            raise ConfigError(
                f'space.tokenizer: a path has that of the first source, "{stacks.first}"; leave it out, or '
                "put another source first"
            )
        self.stacks = stacks
        self.longest = stacks.longest(settings)
        self._dtype = settings.dtype
        if stacks.counts[stacks.first] < 2:
            raise ConfigError(
                f"space: {stacks.first} has one layer; a path begins and ends with two of its own"
            )

    @property
    @abstractmethod
    def title(self) -> str:
        """What it searches, for people."""

    @abstractmethod
    def path(self, genome: Genome) -> LayerPath:
        """Return the path of a genome."""

    @abstractmethod
    def genome(self, path: LayerPath) -> Genome:
        """Return the genome whose path is nearest to a path.

        Raises:
            ConfigError: No genome has these layers in this order.
        """

    @abstractmethod
    def centre(self) -> Genome:
        """Return the genome of the first source as it is."""

    def decode(self, genome: Genome) -> Recipe:
        """Return the recipe of a genome.

        Raises:
            ValueError: The genome is not in the dimensions' coding.
        """
        return path_recipe(self.path(genome), self.stacks.refs, self._dtype)

    def encode(self, recipe: Recipe) -> tuple[Genome, bool]:
        """Return the genome nearest to a recipe, and whether it decodes to the same path.

        Args:
            recipe: With a path, or with slices that say the same.

        Raises:
            ConfigError: It is another kind of recipe, or of other sources or layers.
        """
        try:
            found = as_path(recipe)
        except RecipeError as problem:
            raise ConfigError(
                f"a recipe of {recipe.method} does not lie in a space of paths: {problem}"
            ) from None
        path = _renamed(found, self.stacks)
        if path.end != self.stacks.first:
            raise ConfigError(
                f'a path with the ends of "{path.end}" does not lie in this space, whose first source is '
                f'"{self.stacks.first}"'
            )
        genome = self.genome(path)
        return genome, self.path(genome) == path

    def _path(self, steps: Sequence[tuple[str, int, float]]) -> LayerPath:
        """Return the path of source, layer and wished scale, each scale rounded and kept within bounds."""
        product, found = 1.0, []
        for source, layer, scale in steps:
            scale = round(scale, DIGITS)
            size = max(abs(scale), SMALLEST)
            # A little less than the bounds, as rounding may go either way.
            size = min(max(size, 1.01 * SMALLEST / abs(product)), 0.99 * LARGEST / abs(product))
            if size != abs(scale):
                scale = math.copysign(round(min(max(size, SMALLEST), LARGEST), DIGITS), scale)
            product *= scale
            found.append(Step(source=source, layer=layer, scale=scale))
        return LayerPath(layers=tuple(found))


def _renamed(recipe: Recipe, stacks: Stacks) -> LayerPath:
    """Return a recipe's path in the names of a space's sources, matched by content."""
    if recipe.path is None:
        raise ValueError("a recipe without path")
    ours = {ref.identity: ref.name for ref in reversed(stacks.refs)}
    names = {source.name: ours.get(source.identity, "") for source in recipe.sources}
    for name, own in names.items():
        if not own:
            raise ConfigError(
                f'a path through "{name}" does not lie in this space: it is none of its sources'
            )
    steps = tuple(step.model_copy(update={"source": names[step.source]}) for step in recipe.path.layers)
    end = names[recipe.path.end]
    return LayerPath(layers=steps, ends=None if end == steps[0].source else end)


class DataFlowSpace(PathSpace):
    """Indicators say which slots are used, scales what the hidden state is multiplied by.

    The slots are all layers of all sources in order, as often as `repeats` says, without the first source's
    first and last layer of the first round: between these two the used slots stand in their order. A gene of
    0.5 is the start. The indicator of a slot is the gene's distance from it in sixths of the range, plus 2
    where the slot is used at the start, minus `unused` elsewhere; above 0 the slot is used. If they are too
    many, those with the largest indicators are.
    """

    def __init__(self, settings: DataFlowSettings, stacks: Stacks) -> None:
        super().__init__(settings, stacks)
        self.settings = settings
        self.layers = stacks.layers
        self.last = stacks.counts[stacks.first] - 1
        every = [(turn, index) for turn in range(settings.repeats) for index in range(len(self.layers))]
        self.slots = tuple(slot for slot in every if slot not in ((0, 0), (0, self.last)))
        names = [self._name(slot) for slot in self.slots]
        self._scales: Scales = scales_of(settings, len(self.layers), [*names, "the last layer"])
        use = (Dimension(f"use {name}", "real") for name in names)
        self.dimensions = (*use, *(Dimension(label, "real") for label in self._scales.labels))

    @property
    def title(self) -> str:
        """What it searches, for people."""
        scales = "" if self.settings.scales == "none" else f", scales by {self.settings.scales}"
        return f"layer paths of {len(self.slots) + 2} slots{scales}"

    def path(self, genome: Genome) -> LayerPath:
        """Return the path of a genome.

        Raises:
            ValueError: The genome is not in the dimensions' coding.
        """
        check_genome(self.dimensions, genome)
        count = len(self.slots)
        indicators = [6.0 * (genome[i] - 0.5) + self._shift(i) for i in range(count)]
        used = [i for i in range(count) if indicators[i] > 0.0]
        if self.longest is not None and len(used) > self.longest - 2:
            used = sorted(sorted(used, key=lambda i: -indicators[i])[: self.longest - 2])
        steps = [(0, -1), *((self.slots[i][1], i) for i in used), (self.last, count)]
        scaled = [(*self.layers[0], 1.0)]
        for number in range(1, len(steps)):
            (before, _), (layer, slot) = steps[number - 1 : number + 1]
            scale = self._scales.scale(genome[count:], before, layer, slot, number)
            scaled.append((*self.layers[layer], scale))
        return self._path(scaled)

    def genome(self, path: LayerPath) -> Genome:
        """Return the genome whose path is nearest to a path.

        Raises:
            ConfigError: No genome has these layers in this order.
        """
        wanted = [self._index(step) for step in path.layers]
        if len(wanted) < 2 or (wanted[0], wanted[-1]) != (0, self.last):
            raise ConfigError(
                f"a path of this space begins with layer 0 of {self.stacks.first} and ends with its layer "
                f"{self.last}, got {path.layers[0]} and {path.layers[-1]}"
            )
        if self.longest is not None and len(wanted) > self.longest:
            raise ConfigError(f"a path of {len(wanted)} layers; the space allows {self.longest}")
        used: list[int] = []
        for number, index in enumerate(wanted[1:-1], 1):
            free = range(used[-1] + 1 if used else 0, len(self.slots))
            slot = next((i for i in free if self.slots[i][1] == index), None)
            if slot is None:
                raise ConfigError(
                    f"layer {number} of the path, {path.layers[number]}, comes again or too early for "
                    f"repeats: {self.settings.repeats}; allow more"
                )
            used.append(slot)
        genes = [self._gene(i, i in used) for i in range(len(self.slots))]
        steps = [(0, -1), *((self.slots[i][1], i) for i in used), (self.last, len(self.slots))]
        pairs = [(steps[k - 1][0], *steps[k], k, path.layers[k].scale) for k in range(1, len(steps))]
        return (*genes, *self._scales.genes(pairs))

    def centre(self) -> Genome:
        """Return the genome of the first source as it is."""
        return (0.5,) * len(self.dimensions)

    def _shift(self, slot: int) -> float:
        turn, index = self.slots[slot]
        return 2.0 if turn == 0 and index <= self.last else -self.settings.unused

    def _gene(self, slot: int, used: bool) -> float:
        """Return 0.5 where the start already has a slot as wanted, else the gene furthest from it."""
        if (self._shift(slot) > 0.0) == used:
            return 0.5
        return 1.0 if used else 0.0

    def _index(self, step: Step) -> int:
        try:
            return self.layers.index((step.source, step.layer))
        except ValueError:
            raise ConfigError(
                f"{step.source} has {self.stacks.counts[step.source]} layers, got {step}"
            ) from None

    def _name(self, slot: tuple[int, int]) -> str:
        source, layer = self.layers[slot[1]]
        return f"{source} {layer}" + (f" in round {slot[0] + 1}" if slot[0] else "")
