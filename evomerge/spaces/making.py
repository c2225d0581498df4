"""The space of a config, by its kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from evomerge.checkpoints.source import Checkpoint
from evomerge.recipe import SourceRef
from evomerge.records import Place
from evomerge.spaces.base import Space
from evomerge.spaces.parameter import ParameterSpace
from evomerge.spaces.segments import SegmentSpace
from evomerge.spaces.settings import SegmentsSettings, SpaceSettings


def make_space(
    settings: SpaceSettings,
    base: SourceRef | None,
    sources: Sequence[SourceRef],
    places: Sequence[Place],
    num_layers: int,
    checkpoints: Mapping[str, Checkpoint],
) -> Space:
    """Return the space of a config.

    Args:
        settings: The space section.
        base: The base, if there is one.
        sources: What is merged, with fingerprints where known.
        places: Every tensor of the sources.
        num_layers: Number of decoder layers.
        checkpoints: Source name to checkpoint.

    Raises:
        ConfigError: The section does not fit the sources.
    """
    if isinstance(settings, SegmentsSettings):
        return SegmentSpace(settings, sources, [checkpoints[ref.name] for ref in sources], places)
    return ParameterSpace(settings, base, sources, places, num_layers)
