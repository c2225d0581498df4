"""The joint space: the coefficients of a merge, and a layer path through the merged model and the sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from evomerge.errors import ConfigError
from evomerge.recipe import Recipe, SourceRef
from evomerge.records import Genome
from evomerge.spaces.dataflow import PathSpace, path_recipe
from evomerge.spaces.dimensions import check_genome
from evomerge.spaces.parameter import ParameterSpace

MERGE = "merge"
"""Name of the merged model as a source of paths."""


class JointSpace:
    """Genomes are those of the merge, followed by those of the path.

    Args:
        merge: The parameter space of the merge.
        path: The space of paths; its first source stands for the merged model.

    Attributes:
        method: The merge's.
        dimensions: What optimizers know of it.
    """

    def __init__(self, merge: ParameterSpace, path: PathSpace) -> None:
        self.merge, self.paths = merge, path
        self.method = merge.method
        self.dimensions = (
            *merge.dimensions,
            *(replace(dimension, label=f"path: {dimension.label}") for dimension in path.dimensions),
        )

    @property
    def title(self) -> str:
        """What it searches, for people."""
        return f"{self.merge.title} and {self.paths.title}"

    def centre(self) -> Genome:
        """Return the middle of the merge's dimensions, and the merged model as it is."""
        return (*self.merge.centre(), *self.paths.centre())

    def decode(self, genome: Genome) -> Recipe:
        """Return the recipe of a genome.

        Raises:
            ValueError: The genome is not in the dimensions' coding.
        """
        check_genome(self.dimensions, genome)
        count = len(self.merge.dimensions)
        inner = self.merge.decode(genome[:count])
        refs = [merged(inner), *self.paths.stacks.refs[1:]]
        return path_recipe(self.paths.path(genome[count:]), refs, None)

    def encode(self, recipe: Recipe) -> tuple[Genome, bool]:
        """Return the genome nearest to a recipe, and whether it decodes to the same model.

        Args:
            recipe: A merge alone, or a path whose first source is one.

        Raises:
            ConfigError: It is of another method, or of other sources or layers.
        """
        if recipe.path is None:
            genome, exact = self.merge.encode(recipe)
            return (*genome, *self.paths.centre()), exact
        first = recipe.reference
        if first.recipe is None:
            raise ConfigError("a path that is not through a merge does not lie in a joint space")
        coefficients, exact = self.merge.encode(first.recipe)
        stand_in = self.paths.stacks.refs[0]
        sources = [
            source.model_copy(update={"recipe": None, "fingerprint": stand_in.fingerprint})
            if source.name == first.name
            else source
            for source in recipe.sources
        ]
        data = recipe.to_json() | {"sources": [source.model_dump(exclude_none=True) for source in sources]}
        genome, same = self.paths.encode(Recipe.model_validate(data))
        return (*coefficients, *genome), exact and same


def merged(recipe: Recipe) -> SourceRef:
    """Return a merge as a source of paths."""
    names = ", ".join(source.name for source in recipe.sources)
    return SourceRef(name=MERGE, path=f"{recipe.method} of {names}", recipe=recipe)


def stand_in() -> SourceRef:
    """Return what stands for the merge where only its place among the sources matters."""
    return SourceRef(name=MERGE, path=MERGE, fingerprint="0" * 64)


def free_name(names: Sequence[str]) -> None:
    """Raise ConfigError if a source has the name of the merge."""
    if MERGE in names:
        raise ConfigError(f'sources: the name "{MERGE}" is that of the merged model in a joint space')
