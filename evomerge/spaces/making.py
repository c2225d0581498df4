"""The space of a config, by its kind."""

from __future__ import annotations

from collections.abc import Sequence

from evomerge.recipe import SourceRef
from evomerge.records import Place
from evomerge.spaces.base import Space
from evomerge.spaces.parameter import ParameterSpace
from evomerge.spaces.settings import SpaceSettings


def make_space(
    settings: SpaceSettings,
    base: SourceRef | None,
    sources: Sequence[SourceRef],
    places: Sequence[Place],
    num_layers: int,
) -> Space:
    """Return the space of a config.

    Args:
        settings: The space section.
        base: The base, if there is one.
        sources: What is merged, with fingerprints where known.
        places: Every tensor of the sources.
        num_layers: Number of decoder layers.

    Raises:
        ConfigError: The section does not fit the sources.
    """
    return ParameterSpace(settings, base, sources, places, num_layers)
