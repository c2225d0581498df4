"""The space of a config, by its kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from evomerge.checkpoints.source import Checkpoint
from evomerge.recipe import SourceRef
from evomerge.records import Place
from evomerge.spaces.base import Space
from evomerge.spaces.dataflow import DataFlowSpace, PathSpace, Stacks
from evomerge.spaces.dataflow_edits import LayerEditsSpace
from evomerge.spaces.dataflow_settings import DataFlowSettings, LayerEditsSettings
from evomerge.spaces.joint import JointSpace, free_name, stand_in
from evomerge.spaces.parameter import ParameterSpace
from evomerge.spaces.segments import SegmentSpace
from evomerge.spaces.settings import JointSettings, ParameterSettings, SegmentsSettings, SpaceSettings


@dataclass(frozen=True, slots=True)
class Depths:
    """What spaces of layer paths need to know of the sources.

    Attributes:
        counts: Source name to its number of layers.
        layer_parameters: Parameters of one layer.
        other_parameters: Parameters outside the layers.
    """

    counts: Mapping[str, int] = field(default_factory=dict)
    layer_parameters: int = 0
    other_parameters: int = 0


def make_space(
    settings: SpaceSettings,
    base: SourceRef | None,
    sources: Sequence[SourceRef],
    places: Sequence[Place],
    num_layers: int,
    depths: Depths | None = None,
    checkpoints: Mapping[str, Checkpoint] | None = None,
) -> Space:
    """Return the space of a config.

    Args:
        settings: The space section.
        base: The base, if there is one.
        sources: What is merged, with fingerprints where known.
        places: Every tensor of the sources.
        num_layers: Number of decoder layers.
        depths: For spaces of layer paths; None: every source has `num_layers`.
        checkpoints: Source name to checkpoint, for spaces of segments.

    Raises:
        ConfigError: The section does not fit the sources.
    """
    depths = depths or Depths()
    counts = dict.fromkeys((ref.name for ref in sources), num_layers) | dict(depths.counts)

    def path_space(of: DataFlowSettings | LayerEditsSettings, refs: Sequence[SourceRef]) -> PathSpace:
        known = {ref.name: counts.get(ref.name, num_layers) for ref in refs}
        stacks = Stacks(tuple(refs), known, depths.layer_parameters, depths.other_parameters)
        return DataFlowSpace(of, stacks) if isinstance(of, DataFlowSettings) else LayerEditsSpace(of, stacks)

    if isinstance(settings, ParameterSettings):
        return ParameterSpace(settings, base, sources, places, num_layers)
    if isinstance(settings, JointSettings):
        free_name(list(counts))
        merge = ParameterSpace(settings.parameter, base, sources, places, num_layers)
        return JointSpace(merge, path_space(settings.path, [stand_in(), *sources]))
    if isinstance(settings, SegmentsSettings):
        found = checkpoints or {}
        return SegmentSpace(settings, sources, [found[ref.name] for ref in sources], places)
    return path_space(settings, sources)
