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
from evomerge.recipe import Recipe, RecipeSource, Rule, Scalar, Setting, SourceRef, parse_recipe, value_at
from evomerge.records import Genome, Place, Role
from evomerge.spaces.dimensions import Dimension, check_genome
from evomerge.spaces.settings import ROLES, Granularity, ParameterSettings, Span

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
        low, high = self._bounds
        if gene in (0.0, 1.0):
            return high if gene else low
        if self.span.log:
            value = math.exp((1.0 - gene) * math.log(low) + gene * math.log(high))
        else:
            value = (1.0 - gene) * low + gene * high
        return min(max(value, low), high)

    def gene(self, value: Scalar) -> float:
        """Return the gene whose value is nearest to `value`."""
        if self.span.choices:
            if value in self.span.choices:
                return float(self.span.choices.index(value))
            if isinstance(value, bool | str):
                return 0.0
            numbers = [float(choice) for choice in self.span.choices]
            return float(min(range(len(numbers)), key=lambda i: abs(numbers[i] - float(value))))
        low, high = self._bounds
        number = min(max(float(value), low), high)
        if self.span.log:
            gene = (math.log(number) - math.log(low)) / (math.log(high) - math.log(low))
        else:
            gene = (number - low) / (high - low)
        return min(max(gene, 0.0), 1.0)

    @property
    def _bounds(self) -> tuple[float, float]:
        return float(self.span.low or 0.0), float(self.span.high or 0.0)


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
        settings: ParameterSettings,
        base: SourceRef | None,
        sources: Sequence[SourceRef],
        places: Sequence[Place],
        num_layers: int,
    ) -> None:
        self.settings = settings
        self.method = method_named(settings.method)
        self._base = base if self.method.takes_base else None
        self._sources = tuple(sources)
        self._places = tuple(places)
        self._layers = num_layers
        self._groups = self._find_groups()
        self._check_reachable()
        self.genes: tuple[Gene, ...] = tuple(self._find_genes())
        if not self.genes:
            raise ConfigError("space.parameters: nothing is free; give at least one a range")
        self.dimensions = tuple(self._dimension(gene) for gene in self.genes)

    @property
    def title(self) -> str:
        """What it searches, for people."""
        return self.method.name

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
        for rules in free.values():
            # No tensor is left behind the last group, so that its rule may as well hold for all the rest.
            rules[-1] = {"value": rules[-1]["value"]}
        return self._recipe(free, seed)

    def encode(self, recipe: Recipe) -> tuple[Genome, bool]:
        """Return the genome nearest to a recipe, and whether it decodes to the same values everywhere.

        Raises:
            ConfigError: The recipe is of another method, or of other sources.
        """
        if recipe.segments:
            raise ConfigError("a recipe with segments lies in a space of kind segments only")
        if recipe.method != self.method.name:
            raise ConfigError(f"a recipe of {recipe.method} does not lie in a space of {self.method.name}")
        theirs = self._matched(recipe)
        genome = []
        for gene in self.genes:
            if gene.parameter == "seed":
                genome.append(float(min(recipe.seed, len(gene.span.choices) - 1)))
                continue
            settings = recipe.parameters
            if gene.source is not None:
                settings = theirs[gene.source].parameters
            genome.append(gene.gene(value_at(settings[gene.parameter], self._place_of(gene))))
        decoded = self.decode(tuple(genome))
        pairs = [(decoded.parameters, recipe.parameters)]
        pairs += [
            (ours.parameters, their.parameters) for ours, their in zip(decoded.sources, theirs, strict=True)
        ]
        seeds = decoded.seed == recipe.seed or not self.method.random
        return tuple(genome), seeds and all(self._same(a[name], b[name]) for a, b in pairs for name in a)

    def _matched(self, recipe: Recipe) -> list[RecipeSource]:
        """Return the recipe's sources in the order of the space's own, matched by content, then by name."""
        ordered = self.method.max_sources is not None
        left = list(recipe.sources)
        found = []
        for ref in self._sources:
            alike = [source for source in left if source.identity == ref.identity]
            if not alike or (ordered and alike[0] is not left[0]):
                break
            found.append(next((source for source in alike if source.name == ref.name), alike[0]))
            left.remove(found[-1])
        bases = [ref.identity if ref else None for ref in (self._base, recipe.base)]
        if left or len(found) < len(self._sources) or bases[0] != bases[1]:
            order = ", or in another order," if ordered else ""
            raise ConfigError(
                f"a recipe of {recipe.method} over other sources{order} does not lie in this space"
            )
        return found

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

    def _check_reachable(self) -> None:
        for group, tensors in _shared_out(self._groups, self._places).items():
            if not tensors:
                raise ConfigError(
                    f'space.split: every tensor of "{group.label}" belongs to a name before it; '
                    "put the narrower one first"
                )

    def _groups_for(self, granularity: Granularity) -> list[Group]:
        groups = list(self._groups)
        if granularity.layers is not None:
            roles = {place.role for place in self._places}
            taken = {group.role for group in groups}
            ends: tuple[Role, ...] = ("embedding", "head")
            groups += [Group(role=role) for role in ends if role in roles - taken]
        shared = _shared_out([*groups, Group()], self._places)
        return [group for group in (*groups, Group()) if shared[group]]

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
                shared = _shared_out(self._groups_for(granularity), self._places)
                for group, tensors in shared.items():
                    for position in range(self._positions(granularity, tensors, span)):
                        genes.append(Gene(parameter.name, owner, group, position, span))
        if not isinstance(self.settings.seed, int):
            seeds = Span(choices=tuple(float(i) for i in range(self.settings.seed.count)))
            genes.append(Gene("seed", None, Group(), 0, seeds))
        return genes

    def _positions(self, granularity: Granularity, tensors: list[Place], span: Span) -> int:
        """Return how many genes a group has: one where all its tensors lie at one depth or choose."""
        if len({place.depth for place in tensors}) == 1 or (
            span.choices and isinstance(span.choices[0], bool | str)
        ):
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
            ordered = not isinstance(span.choices[0], bool | str)
            return span.model_copy(update={"choices": tuple(sorted(span.choices))}) if ordered else span
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
        shared = _shared_out(self._groups_for(span), self._places)
        place = shared.get(gene.group, self._places)[0]
        return Place(place.name, place.role, place.layer, depth)

    def _same(self, one: Setting, other: Setting) -> bool:
        for place in self._places:
            x, y = value_at(one, place), value_at(other, place)
            if isinstance(x, bool | str) or isinstance(y, bool | str):
                if x != y:
                    return False
            elif abs(x - y) > TOLERANCE:
                return False
        return True


def _shared_out(groups: Sequence[Group], places: Sequence[Place]) -> dict[Group, list[Place]]:
    """Return the tensors of each group: a tensor belongs to the first group that applies to it."""
    rules = [(group, Rule(role=group.role, match=group.match, value=0.0)) for group in groups]
    shared: dict[Group, list[Place]] = {group: [] for group in groups}
    for place in places:
        first = next((group for group, rule in rules if rule.applies(place)), None)
        if first is not None:
            shared[first].append(place)
    return shared
