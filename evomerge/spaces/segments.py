"""Segment space: genomes are segment tables over the flattened parameters, as M2N2 breeds them.

A genome is a flat list of rows, one for each segment: the entry at which it starts, then one coefficient for
each source. Entries are counted along the chromosomes, one behind the other, so a chromosome's first row
starts where the one before it ends. Only the optimizer `niches` varies such genomes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from evomerge.catalogue import method_named
from evomerge.checkpoints.grams import grams
from evomerge.errors import ConfigError, nearest
from evomerge.recipe import Recipe, SourceRef, parse_recipe, value_at
from evomerge.records import Genome, Place, Role
from evomerge.segments import stretches
from evomerge.spaces.cells import Cells, Chromosome, Grams, Table
from evomerge.spaces.dimensions import Dimension
from evomerge.spaces.settings import SegmentsSettings

if TYPE_CHECKING:
    from evomerge.checkpoints.source import Checkpoint

FLOATING = ("F64", "F32", "F16", "BF16")


class SegmentSpace:
    """Maps segment tables to recipes over fixed sources.

    Args:
        settings: The space section.
        sources: What is merged, with fingerprints.
        checkpoints: Their checkpoints, in the same order.
        places: Every tensor of the sources, in the checkpoint's order.
    """

    def __init__(
        self,
        settings: SegmentsSettings,
        sources: Sequence[SourceRef],
        checkpoints: Sequence[Checkpoint],
        places: Sequence[Place],
    ) -> None:
        if len(sources) < 2:
            raise ConfigError(f"sources.models: segments need two or more sources, got {len(sources)}")
        self.settings = settings
        self.method = method_named("linear")
        self.sources = tuple(sources)
        self._checkpoints = tuple(checkpoints)
        tensors = checkpoints[0].tensors
        self._places = [
            place
            for place in places
            if tensors[place.name].dtype in FLOATING and 0 not in tensors[place.name].shape
        ]
        self._sizes = {place.name: math.prod(tensors[place.name].shape) for place in self._places}
        self._roles: list[tuple[Role, ...]] = [*settings.chromosomes]
        taken = {role for roles in self._roles for role in roles}
        self._check_roles()
        if {place.role for place in self._places} - taken:
            self._roles.append(())
        lies, self._counts = stretches(self._places, self._sizes, self._roles)
        self._table_of = {name: lie.table for name, lie in lies.items()}
        self._parts, self.edges, chromosomes = self._cut()
        self.cells = Cells(chromosomes, self._grams)
        self.dimensions = tuple(Dimension(f"share of {ref.name}", "real") for ref in self.sources)

    @property
    def title(self) -> str:
        """What it searches, for people."""
        count = len(self.cells.chromosomes)
        plural = "s" if count > 1 else ""
        return (
            f"segments of {len(self.sources)} sources on {self.cells.count} cells, {count} chromosome{plural}"
        )

    @property
    def origins(self) -> list[Genome]:
        """Every source as a genome, in order."""
        rows = np.eye(len(self.sources))
        return [self.genome(np.tile(row, (self.cells.count, 1))) for row in rows]

    def centre(self) -> Genome:
        """Return the uniform average."""
        return self.genome(np.full((self.cells.count, len(self.sources)), 1.0 / len(self.sources)))

    def genome(self, table: Table) -> Genome:
        """Return a table as a genome, neighbours of equal coefficients as one segment.

        Where that makes more than `max_segments`, neighbours that differ little are merged too; the weights
        then are at most `merge_error` from the table's.
        """
        table, _ = self.cells.simplified(table, self.settings.max_segments, self.settings.merge_error)
        starts = self.cells.starts(table)
        rows = np.concatenate([self.edges[starts, None], table[starts]], axis=1)
        return tuple(rows.ravel().tolist())

    def table(self, genome: Genome) -> Table:
        """Return a genome as a table over the cells.

        Raises:
            ValueError: It is no genome of this space, or a segment starts within a cell.
        """
        starts, coefficients = self._rows(genome)
        places = np.searchsorted(self.edges, starts)
        wrong = np.flatnonzero(self.edges[places] != starts)
        if len(wrong):
            raise ValueError(f"a segment starts at entry {starts[wrong[0]]}, which is within a cell")
        return np.repeat(coefficients, np.diff([*places, self.cells.count]), axis=0)

    def nearest_table(self, genome: Genome) -> Table:
        """Return a genome as a table, each segment moved to the nearest cell that has room for it."""
        starts, coefficients = self._rows(genome)
        middles = (self.edges[:-1] + self.edges[1:]) // 2
        owner = np.searchsorted(starts, middles, side="right") - 1
        return np.asarray(coefficients[owner])

    def decode(self, genome: Genome) -> Recipe:
        """Return the recipe of a genome.

        Raises:
            ValueError: It is no genome of this space.
        """
        starts, coefficients = self._rows(genome)
        firsts = np.cumsum([0, *self._counts])
        tables = []
        for roles, first, stop in zip(self._roles, firsts[:-1], firsts[1:], strict=True):
            chosen = (starts >= first) & (starts < stop)
            tables.append(
                {
                    "roles": list(roles),
                    "starts": (starts[chosen] - first).tolist(),
                    "coefficients": coefficients[chosen].tolist(),
                }
            )
        data = {
            "method": "linear",
            "sources": [ref.model_dump(exclude_none=True) for ref in self.sources],
            "segments": tables,
            "tokenizer": self.settings.tokenizer,
            "dtype": self.settings.dtype,
        }
        return parse_recipe(data, "space")

    def encode(self, recipe: Recipe) -> tuple[Genome, bool]:
        """Return the genome nearest to a linear recipe of these sources, and whether it is the same model.

        Raises:
            ConfigError: It is of another method, or of other sources.
        """
        if recipe.method != "linear" or recipe.slices:
            raise ConfigError(f"a recipe of {recipe.method} does not lie in a space of segments")
        theirs = {source.identity: i for i, source in enumerate(recipe.sources)}
        if set(theirs) - {ref.identity for ref in self.sources}:
            raise ConfigError("a recipe over other sources does not lie in this space")
        order = [theirs.get(ref.identity) for ref in self.sources]
        if recipe.segments and [table.roles for table in recipe.segments] != self._roles:
            raise ConfigError("a recipe with other chromosomes does not lie in this space")
        if not recipe.segments:
            return self.genome(self._of_weights(recipe, order)), True
        firsts = np.cumsum([0, *self._counts])
        rows = [
            [float(first + start), *(0.0 if i is None else row[i] for i in order)]
            for first, table in zip(firsts[:-1], recipe.segments, strict=True)
            for start, row in zip(table.starts, table.coefficients, strict=True)
        ]
        given = tuple(number for row in rows for number in row)
        found = self.genome(self.nearest_table(given))
        return found, found == given

    def _of_weights(self, recipe: Recipe, order: Sequence[int | None]) -> Table:
        """Return the table of a linear recipe without segments: its weights at each tensor."""
        rows: dict[str, list[float]] = {}
        for place in self._places:
            weights = [float(value_at(s.parameters["weight"], place)) for s in recipe.sources]
            total = math.fsum(weights) if value_at(recipe.parameters["normalize"], place) else 1.0
            rows[place.name] = [0.0 if i is None else weights[i] / (total or 1.0) for i in order]
        return np.array([rows[name] for name, _, _ in self._parts])

    def _rows(self, genome: Genome) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        width = 1 + len(self.sources)
        if not genome or len(genome) % width:
            raise ValueError(f"a genome of {len(genome)} numbers, expected {width} for each segment")
        rows = np.array(genome, dtype=np.float64).reshape(-1, width)
        starts = rows[:, 0].astype(np.int64)
        firsts = np.cumsum([0, *self._counts])
        good = (
            np.isfinite(rows).all()
            and (starts == rows[:, 0]).all()
            and (np.diff(starts) > 0).all()
            and starts[-1] < firsts[-1]
            and np.isin(firsts[:-1], starts).all()
        )
        if not good:
            raise ValueError(
                "the segments of a genome must start at ascending entries, each chromosome's first too"
            )
        return starts, rows[:, 1:]

    def _check_roles(self) -> None:
        present = {place.role for place in self._places}
        for roles in self._roles:
            for role in roles:
                if role not in present:
                    raise ConfigError(f'space.chromosomes: no tensor is "{role}"{nearest(role, present)}')

    def _cut(self) -> tuple[list[tuple[str, int, int]], NDArray[np.int64], list[Chromosome]]:
        """Return the cells as parts of tensors, the entries they start at, and their chromosomes."""
        inside = self.settings.splits == "parameter"
        size = max(1, math.ceil(sum(self._sizes.values()) / self.settings.cells))
        parts: list[tuple[str, int, int]] = []
        chromosomes = []
        for table in range(len(self._roles)):
            first, splits, before = len(parts), [len(parts)], None
            for place in (p for p in self._places if self._table_of[p.name] == table):
                here: Any = {"layer": place.layer, "role": (place.layer, place.role)}.get(
                    self.settings.splits, place.name
                )
                if here != before and len(parts) > first:
                    splits.append(len(parts))
                before = here
                count = math.ceil(self._sizes[place.name] / size) if inside else 1
                cuts = [self._sizes[place.name] * i // count for i in range(count + 1)]
                splits += range(len(parts) + 1, len(parts) + count)
                parts += [(place.name, a, b) for a, b in pairwise(cuts)]
            chromosomes.append(Chromosome(first, len(parts), np.array(splits)))
        edges = np.cumsum([0, *(stop - start for _, start, stop in parts)])
        return parts, edges, chromosomes

    def _grams(self) -> Grams:
        return grams(self._checkpoints, self._parts)

    @property
    def chromosomes(self) -> tuple[tuple[Role, ...], ...]:
        """Roles of each chromosome; an empty one takes the rest."""
        return tuple(self._roles)

    @property
    def entries(self) -> tuple[int, ...]:
        """Entries of each chromosome."""
        return self._counts

    def facts(self) -> list[dict[str, Any]]:
        """Return for each chromosome its roles, its entries, and layer, role and entries of its tensors."""
        found = []
        for table, (roles, count) in enumerate(zip(self._roles, self._counts, strict=True)):
            inside = [p for p in self._places if self._table_of[p.name] == table]
            tensors = [[place.layer, place.role, self._sizes[place.name]] for place in inside]
            found.append({"roles": list(roles), "entries": count, "tensors": tensors})
        return found
