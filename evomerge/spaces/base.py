"""What every space can do."""

from __future__ import annotations

from typing import Protocol

from evomerge.catalogue import Method
from evomerge.recipe import Recipe
from evomerge.records import Genome
from evomerge.spaces.dimensions import Dimension


class Space(Protocol):
    """Maps genomes to recipes.

    Attributes:
        method: The method of its recipes.
        dimensions: What optimizers know of it.
    """

    method: Method
    dimensions: tuple[Dimension, ...]

    @property
    def title(self) -> str:
        """What it searches, for people."""

    def centre(self) -> Genome:
        """Return the genome that a search starts from if nothing better is known."""

    def decode(self, genome: Genome) -> Recipe:
        """Return the recipe of a genome; the same one each time.

        Raises:
            ValueError: The genome is not in the dimensions' coding.
        """

    def encode(self, recipe: Recipe) -> tuple[Genome, bool]:
        """Return the genome nearest to a recipe, and whether it decodes to the same model.

        Raises:
            ConfigError: The recipe does not lie in a space of this kind.
        """
