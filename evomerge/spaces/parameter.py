"""Parameter space: genomes are the free coefficients of one merge method.

Genes are ordered by parameter, source, group of tensors, and depth. A group is a role or a part of tensor
names from `split`, or the rest. Decoding is total on the coding and deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evomerge.catalogue import Parameter, method_named
from evomerge.errors import ConfigError, nearest
from evomerge.recipe import Recipe, Rule, Scalar, Setting, SourceRef, parse_recipe, value_at
from evomerge.records import Genome, Place, Role
from evomerge.spaces.dimensions import Dimension, check_genome
from evomerge.spaces.settings import ROLES, Granularity, SpaceSettings, Span

TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors that share genes: those of a role, those with a part in their name, or all others."""

    role: Role | None = None
    match: str | None = None

    @property
    def label(self) -> str:
        """Its name for people; empty for the rest."""
        return self.role or self.match or ""


@dataclass(frozen=True, slots=True)
class Gene:
    """One free number of the space.

    Attributes:
        parameter: The method's parameter; `seed` for the recipe's seed.
        source: Index of the source, None for parameters of the method.
        group: Its tensors.
        position: Index of its block of layers or anchor among those of the group.
        span: Bounds or choices.
    """

    parameter: str
    source: int | None
    group: Group
    position: int
    span: Span

    def value(self, gene: float) -> Scalar:
        """Return the parameter's value for a gene in its coding."""
        if self.span.choices:
            return self.span.choices[int(gene)]
        low, high = float(self.span.low or 0.0), float(self.span.high or 0.0)
        if self.span.log:
            return float(low * (high / low) ** gene)
        return low + (high - low) * gene

    def gene(self, value: Scalar) -> float:
        """Return the gene whose value is nearest to `value`."""
        if self.span.choices:
            if value in self.span.choices:
                return float(self.span.choices.index(value))
            if isinstance(value, bool | str):
                return 0.0
            numbers = [float(choice) for choice in self.span.choices]
            return float(min(range(len(numbers)), key=lambda i: abs(numbers[i] - float(value))))
        low, high, number = float(self.span.low or 0.0), float(self.span.high or 0.0), float(value)
        number = min(max(number, low), high)
        if self.span.log:
            return math.log(number / low) / math.log(high / low)
        return (number - low) / (high - low)


class ParameterSpace:
    """Maps genomes to recipes of one method over fixed sources.

    Args:
        settings: The space section.
        base: The base, if the method needs one.
        sources: What is merged, with fingerprints where known.
        places: Every tensor of the sources.
        num_layers: Number of decoder layers.
    """

    def __init__(
        self,
        settings: SpaceSettings,
        base: SourceRef | None,
        sources: Sequence[SourceRef],
        places: Sequence[Place],
        num_layers: int,
    ) -> None:
        self.settings = settings
        self.method = method_named(settings.method)
        self._base = base if self.method.needs_base else None
        self._sources = tuple(sources)
        self._places = tuple(places)
        self._layers = num_layers
        self._groups = self._find_groups()
        self.genes: tuple[Gene, ...] = tuple(self._find_genes())
        if not self.genes:
            raise ConfigError("space.parameters: nothing is free; give at least one a range")
        self.dimensions = tuple(self._dimension(gene) for gene in self.genes)

    def decode(self, genome: Genome) -> Recipe:
        """Return the recipe of a genome.

        Raises:
            ValueError: The genome is not in the dimensions' coding.
        """
        check_genome(self.dimensions, genome)
        written: dict[tuple[str, int | None, Group], list[Scalar]] = {}
        seed = self.settings.seed if isinstance(self.settings.seed, int) else 0
        for gene, number in zip(self.genes, genome, strict=True):
            if gene.parameter == "seed":
                seed = int(number)
            else:
                written.setdefault((gene.parameter, gene.source, gene.group), []).append(gene.value(number))
        free: dict[tuple[str, int | None], list[dict[str, Any]]] = {}
        for (parameter, source, group), values in written.items():
            rule: dict[str, Any] = {"value": self._over_depth(parameter, group, values)}
            if group.role:
                rule["role"] = group.role
            if group.match:
                rule["match"] = group.match
            free.setdefault((parameter, source), []).append(rule)
        return self._recipe(free, seed)

    def encode(self, recipe: Recipe) -> tuple[Genome, bool]:
        """Return the genome nearest to a recipe, and whether it decodes to the same values everywhere.

        Raises:
            ConfigError: The recipe is of another method, or of other sources.
        """
        names = {ref.identity for ref in recipe.refs}
        wanted = {ref.identity for ref in ((self._base,) if self._base else ()) + self._sources}
        if recipe.method != self.method.name or names != wanted:
            raise ConfigError(f"a recipe of {recipe.method} over other sources does not lie in this space")
        of_source = {source.identity: source for source in recipe.sources}
        genome = []
        for gene in self.genes:
            if gene.parameter == "seed":
                genome.append(float(min(recipe.seed, len(gene.span.choices) - 1)))
                continue
            settings = recipe.parameters
            if gene.source is not None:
                settings = of_source[self._sources[gene.source].identity].parameters
            genome.append(gene.gene(value_at(settings[gene.parameter], self._place_of(gene))))
        decoded = self.decode(tuple(genome))
        return tuple(genome), self._same(decoded, recipe)

    def centre(self) -> Genome:
        """Return the middle of every dimension."""
        return tuple(0.5 if d.kind == "real" else float((d.size - 1) // 2) for d in self.dimensions)

    def _recipe(self, free: dict[tuple[str, int | None], list[dict[str, Any]]], seed: int) -> Recipe:
        def settings(scope: str, source: int | None) -> dict[str, Any]:
            found: dict[str, Any] = {}
            for parameter in self.method.parameters:
                if parameter.scope == scope:
                    fixed = self.settings.span(parameter)
                    found[parameter.name] = free.get((parameter.name, source), fixed)
            return found

        sources = [
            {**ref.model_dump(exclude_none=True), "parameters": settings("source", i)}
            for i, ref in enumerate(self._sources)
        ]
        data = {
            "method": self.method.name,
            "sources": sources,
            "parameters": settings("method", None),
            "seed": seed,
            "tokenizer": self.settings.tokenizer,
            "dtype": self.settings.dtype,
        }
        if self._base:
            data["base"] = self._base.model_dump(exclude_none=True)
        return parse_recipe(data, "space")

    def _find_groups(self) -> list[Group]:
        groups = []
        for name in self.settings.split:
            role = next((role for role in ROLES if role == name), None)
            group = Group(role=role) if role else Group(match=name)
            rule = Rule(role=group.role, match=group.match, value=0.0)
            if not any(rule.applies(place) for place in self._places):
                present = sorted({place.role for place in self._places})
                raise ConfigError(f'space.split: no tensor is "{name}"{nearest(name, present)}')
            groups.append(group)
        return groups

    def _groups_for(self, granularity: Granularity) -> list[Group]:
        groups = list(self._groups)
        if granularity.layers is not None:
            roles = {place.role for place in self._places}
            taken = {group.role for group in groups}
            ends: tuple[Role, ...] = ("embedding", "head")
            groups += [Group(role=role) for role in ends if role in roles - taken]
        rules = [Rule(role=g.role, match=g.match, value=0.0) for g in groups]
        rest = any(not any(rule.applies(place) for rule in rules) for place in self._places)
        return [*groups, *([Group()] if rest else [])]

    def _find_genes(self) -> list[Gene]:
        genes = []
        for parameter in self.method.parameters:
            span = self.settings.span(parameter)
            if not isinstance(span, Span):
                continue
            span = self._bounded(span, parameter)
            granularity = span.granularity or self.settings.granularity
            owners = range(len(self._sources)) if parameter.scope == "source" else (None,)
            if not parameter.per_tensor:
                genes += [Gene(parameter.name, owner, Group(), 0, span) for owner in owners]
                continue
            for owner in owners:
                for group in self._groups_for(granularity):
                    for position in range(self._positions(granularity, group, span)):
                        genes.append(Gene(parameter.name, owner, group, position, span))
        if not isinstance(self.settings.seed, int):
            seeds = Span(choices=tuple(float(i) for i in range(self.settings.seed.count)))
            genes.append(Gene("seed", None, Group(), 0, seeds))
        return genes

    def _positions(self, granularity: Granularity, group: Group, span: Span) -> int:
        """Return how many genes a group has: one where all its tensors lie at one depth or choose."""
        depths = {place.depth for place in self._places if place.role == group.role}
        if len(depths) == 1 or (span.choices and isinstance(span.choices[0], bool | str)):
            return 1
        if granularity.layers is None:
            return granularity.anchors or 1
        return math.ceil(self._layers / granularity.layers)

    def _over_depth(self, parameter: str, group: Group, values: list[Scalar]) -> Any:
        """Return a rule's value: the only one, the anchors, or one for each layer of the blocks."""
        if len(values) == 1:
            return values[0]
        span = self.settings.span(self.method.parameter(parameter))
        granularity = (span.granularity if isinstance(span, Span) else None) or self.settings.granularity
        if granularity.layers is None:
            return values
        return [values[layer // granularity.layers] for layer in range(self._layers)]

    def _bounded(self, span: Span, parameter: Parameter) -> Span:
        if span.choices:
            return span
        low = parameter.low if span.low is None else span.low
        high = parameter.high if span.high is None else span.high
        where = f"space.parameters.{parameter.name}"
        if low is None or high is None or not low < high:
            raise ConfigError(f"{where}: low must be below high, got {low} and {high}")
        if span.log and low <= 0:
            raise ConfigError(f"{where}: a logarithmic range needs low above 0, got {low}")
        return span.model_copy(update={"low": low, "high": high})

    def _dimension(self, gene: Gene) -> Dimension:
        label = gene.parameter
        if gene.source is not None:
            label += f" {self._sources[gene.source].name}"
        if gene.group.label:
            label += f" {gene.group.label}"
        siblings = sum(
            (g.parameter, g.source, g.group) == (gene.parameter, gene.source, gene.group) for g in self.genes
        )
        if siblings > 1:
            label += f" {gene.position + 1}/{siblings}"
        if gene.span.choices:
            ordered = gene.parameter != "seed" and not isinstance(gene.span.choices[0], bool | str)
            return Dimension(label, "integer" if ordered else "categorical", len(gene.span.choices))
        return Dimension(label, "real")

    def _place_of(self, gene: Gene) -> Place:
        """Return a place at which a gene alone decides the value."""
        siblings = [
            g
            for g in self.genes
            if (g.parameter, g.source, g.group) == (gene.parameter, gene.source, gene.group)
        ]
        depth = gene.position / (len(siblings) - 1) if len(siblings) > 1 else 0.5
        span = gene.span.granularity or self.settings.granularity
        if span.layers is not None and len(siblings) > 1:
            depth = min(gene.position * span.layers / max(self._layers - 1, 1), 1.0)
        rules = [(g, Rule(role=g.role, match=g.match, value=0.0)) for g in self._groups_for(span)]
        for place in self._places:
            first = next((group for group, rule in rules if rule.applies(place)), None)
            if first == gene.group:
                return Place(place.name, place.role, place.layer, depth)
        return Place("", "other", None, depth)

    def _same(self, one: Recipe, other: Recipe) -> bool:
        def near(a: Setting, b: Setting) -> bool:
            for place in self._places:
                x, y = value_at(a, place), value_at(b, place)
                if isinstance(x, bool | str) or isinstance(y, bool | str):
                    if x != y:
                        return False
                elif abs(x - y) > TOLERANCE:
                    return False
            return True

        theirs = {source.identity: source for source in other.sources}
        pairs = [(one.parameters, other.parameters)]
        pairs += [(source.parameters, theirs[source.identity].parameters) for source in one.sources]
        seeds = one.seed == other.seed or not self.method.random
        return seeds and all(near(a[name], b[name]) for a, b in pairs for name in a)
