"""Populations as files: individuals of one run, with the sources they are over, to begin another run from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from evomerge.checkpoints.whole import write_whole
from evomerge.errors import ConfigError
from evomerge.reading import parse_json, read_bytes
from evomerge.recipe import SourceRef
from evomerge.records import Genome, Role
from evomerge.spaces.base import Space
from evomerge.spaces.dimensions import check_genome
from evomerge.spaces.segments import SegmentSpace
from evomerge.strict import StrictModel, validated

MAX_BYTES = 2**28
MOST_VALUES = 10_000_000


class Member(StrictModel):
    """One individual.

    Attributes:
        candidate: Its number in the run it comes from.
        score: Its search score there.
        parents: Numbers of its parents there.
        genome: Of the population's space.
    """

    candidate: int
    score: float
    parents: tuple[int, ...] = ()
    genome: tuple[float, ...]


class PopulationFile(StrictModel):
    """What `evomerge population export` writes.

    Attributes:
        evomerge: Version of the format.
        kind: `segments`: genomes are segment tables; `numbers`: one number for each dimension.
        run: The run they come from.
        sources: What they are over, in the order of their coefficients, with fingerprints.
        chromosomes: Roles of each chromosome; an empty one takes the rest (segments only).
        entries: Entries of each chromosome (segments only).
        dimensions: Label, kind and size of each (numbers only).
        individuals: At least one.
    """

    evomerge: Literal[1] = 1
    kind: Literal["segments", "numbers"]
    run: str
    sources: tuple[SourceRef, ...] = Field(min_length=1)
    chromosomes: tuple[tuple[Role, ...], ...] = ()
    entries: tuple[int, ...] = ()
    dimensions: tuple[tuple[str, str, int], ...] = ()
    individuals: tuple[Member, ...] = Field(min_length=1)

    def write(self, path: Path) -> None:
        """Write the file; ConfigError if it cannot be written."""
        try:
            text = json.dumps(self.model_dump(mode="json", exclude_none=True)) + "\n"
            write_whole(path, text.encode())
        except OSError as problem:
            raise ConfigError(f"{path}: cannot be written ({problem.strerror})") from None


def read_population(path: Path) -> PopulationFile:
    """Return the population in a file.

    Raises:
        ConfigError: It is no such file; in one line.
    """
    where = f"population: {path}"
    data = parse_json(read_bytes(path, MAX_BYTES, ConfigError), where, ConfigError, most=MOST_VALUES)
    return validated(PopulationFile, data, f"population {path}", ConfigError)


def founders(
    population: PopulationFile,
    space: Space,
    sources: Sequence[SourceRef],
    renamed: Mapping[str, str] | None = None,
) -> list[Genome]:
    """Return a population's individuals as genomes of a space.

    Sources are matched by their content. Those of the space that the population lacks have coefficient 0.

    Args:
        population: The population.
        space: Where they shall live.
        sources: What the space is over, with fingerprints.
        renamed: Names of the population's sources to names of others that take their place, by consent.

    Raises:
        ConfigError: The population is over other sources, or of another kind of space.
    """
    order = _matched(population, sources, renamed or {})
    if isinstance(space, SegmentSpace) != (population.kind == "segments"):
        raise ConfigError(f"population of run {population.run}: it is of {population.kind}, the space is not")
    if isinstance(space, SegmentSpace):
        return _segments(population, space, order)
    known = [[dimension.label, dimension.kind, dimension.size] for dimension in space.dimensions]
    if [list(dimension) for dimension in population.dimensions] != known:
        raise ConfigError(f"population of run {population.run}: the space has other dimensions")
    for member in population.individuals:
        try:
            check_genome(space.dimensions, member.genome)
        except ValueError as problem:
            raise ConfigError(f"population: individual {member.candidate}: {problem}") from None
    return [member.genome for member in population.individuals]


def _matched(
    population: PopulationFile, sources: Sequence[SourceRef], renamed: Mapping[str, str]
) -> list[int | None]:
    """Return for each source of the space its column in the population; None where it has none."""
    names = [ref.name for ref in population.sources]
    for name, other in renamed.items():
        if name not in names or other not in [ref.name for ref in sources]:
            raise ConfigError(
                f"--map {name}={other}: expected a source of the population ({', '.join(names)}) and one of "
                f"the config ({', '.join(ref.name for ref in sources)})"
            )
    found: dict[str, int] = {}
    for column, ref in enumerate(population.sources):
        wanted = renamed.get(ref.name)
        twin = next(
            (s for s in sources if (s.name == wanted if wanted else s.identity == ref.identity)), None
        )
        if twin is None:
            raise ConfigError(
                f"population of run {population.run}: its source {ref.name} (fingerprint "
                f"{ref.identity[:12]}) is none of this run's ({', '.join(s.name for s in sources)}); put "
                f"another in its place by `evomerge population import --map {ref.name}=NAME`"
            )
        if twin.name in found:
            raise ConfigError(f"population of run {population.run}: two of its sources are {twin.name} here")
        found[twin.name] = column
    return [found.get(ref.name) for ref in sources]


def _segments(population: PopulationFile, space: SegmentSpace, order: Sequence[int | None]) -> list[Genome]:
    if (population.chromosomes, population.entries) != (space.chromosomes, space.entries):
        raise ConfigError(
            f"population of run {population.run}: chromosomes {_shown(population.chromosomes)} with "
            f"{list(population.entries)} entries, the space has {_shown(space.chromosomes)} with "
            f"{list(space.entries)}"
        )
    width = 1 + len(population.sources)
    genomes = []
    for member in population.individuals:
        if len(member.genome) % width:
            raise ConfigError(f"population: individual {member.candidate}: {len(member.genome)} numbers")
        rows = np.array(member.genome).reshape(-1, width)
        columns = [np.zeros(len(rows)) if i is None else rows[:, 1 + i] for i in order]
        given = tuple(np.stack([rows[:, 0], *columns], axis=1).ravel().tolist())
        try:
            genomes.append(space.genome(space.nearest_table(given)))
        except ValueError as problem:
            raise ConfigError(f"population: individual {member.candidate}: {problem}") from None
    return genomes


def _shown(chromosomes: Sequence[Sequence[str]]) -> list[Any]:
    return [list(roles) or "rest" for roles in chromosomes]
