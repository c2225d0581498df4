"""Segment space: cells, split points, chromosomes, genomes and recipes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from evomerge.checkpoints.layout import layout_of
from evomerge.checkpoints.source import Checkpoint
from evomerge.errors import ConfigError
from evomerge.merging.merger import Merger
from evomerge.optimizers import create
from evomerge.recipe import SourceRef, parse_recipe
from evomerge.seeding import stream
from evomerge.spaces.segments import SegmentSpace
from evomerge.spaces.settings import SegmentsSettings
from tests.checkpoints.tiny import make_llama


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Checkpoint]:
    folder = tmp_path_factory.mktemp("models")
    return [Checkpoint.open(make_llama(folder / f"m{i}", seed=i, layers=3)) for i in range(3)]


def space(checkpoints: list[Checkpoint], **settings: Any) -> SegmentSpace:
    refs = [
        SourceRef(name=f"m{i}", path=str(c.path), fingerprint=c.fingerprint)
        for i, c in enumerate(checkpoints)
    ]
    given = SegmentsSettings(kind="segments", **{"cells": 50, **settings})
    return SegmentSpace(given, refs, checkpoints, list(layout_of(checkpoints[0]).places.values()))


def explicit(found: SegmentSpace, genome: tuple[float, ...], checkpoints: list[Checkpoint]) -> torch.Tensor:
    """The weights of a genome, chromosome behind chromosome, computed from its rows alone."""
    places = layout_of(checkpoints[0]).places
    order = [
        name
        for roles in [*found.settings.chromosomes, ()]
        for name, place in places.items()
        if (place.role in roles)
        or (not roles and all(place.role not in c for c in found.settings.chromosomes))
    ]
    sources = torch.stack([torch.cat([c.tensor(n).double().flatten() for n in order]) for c in checkpoints])
    rows = np.array(genome).reshape(-1, 1 + len(checkpoints))
    owner = np.searchsorted(rows[:, 0], np.arange(sources.shape[1]), side="right") - 1
    return (torch.tensor(rows[owner, 1:].T) * sources).sum(0), order


@pytest.mark.parametrize("chromosomes", [(), (("attention",),), (("attention", "norm"), ("mlp",))], ids=str)
def test_bred_individuals_merge_to_their_explicit_weights(
    chromosomes: Any, checkpoints: list[Checkpoint]
) -> None:
    found = space(checkpoints, chromosomes=chromosomes)
    optimizer = create("niches", found.dimensions, 1, {"size": 4}, coding=found)
    genomes = []
    for index in range(40):
        proposal = optimizer.ask()
        assert proposal is not None
        genomes.append(proposal.genome)
        optimizer.tell(index, 0.5, {"t": stream(2, index).integers(0, 2, 6).astype(float).tolist()})
    assert max(len(genome) for genome in genomes) > 20
    for genome in genomes[::13]:
        recipe = found.decode(genome)
        merger = Merger({c.fingerprint: c for c in checkpoints}, layout_of(checkpoints[0]))
        want, order = explicit(found, genome, checkpoints)
        merged = torch.cat([merger.merge(recipe, name).flatten() for name in order])
        torch.testing.assert_close(merged.double(), want, rtol=1e-5, atol=1e-7)
        assert found.encode(recipe) == (genome, True)
        assert found.genome(found.table(genome)) == genome


@pytest.mark.parametrize("splits", ["tensor", "layer", "role", "parameter"])
def test_split_points_lie_at_the_starts_that_are_asked_for(
    splits: Any, checkpoints: list[Checkpoint]
) -> None:
    found = space(checkpoints, splits=splits)
    places = layout_of(checkpoints[0]).places
    tensor_starts = np.cumsum([0, *(checkpoints[0].tensors[name].nbytes // 4 for name in places)])
    at = found.edges[found.cells.chromosomes[0].splits]
    if splits == "parameter":
        assert len(at) == found.cells.count
        assert set(tensor_starts[:-1]) < set(at)
        return
    assert set(at) <= set(tensor_starts)
    if splits == "tensor":
        assert set(at) == set(tensor_starts[:-1])
    if splits == "layer":
        layers = [place.layer for place in places.values()]
        changes = [i for i in range(len(layers)) if i == 0 or layers[i] != layers[i - 1]]
        assert set(at) == {tensor_starts[i] for i in changes}
    if splits == "role":
        kinds = [(place.layer, place.role) for place in places.values()]
        changes = [i for i in range(len(kinds)) if i == 0 or kinds[i] != kinds[i - 1]]
        assert set(at) == {tensor_starts[i] for i in changes}


def test_the_sources_and_plain_averages_are_in_it(checkpoints: list[Checkpoint]) -> None:
    found = space(checkpoints, chromosomes=(("mlp",),))
    rows = np.array(found.origins[1]).reshape(-1, 4)
    assert rows[:, 1:].tolist() == [[0.0, 1.0, 0.0]] * 2
    refs = [ref.model_dump(exclude_none=True) for ref in found.sources]
    weights = [{"role": "mlp", "value": 3.0}, {"value": 1.0}]
    recipe = parse_recipe(
        {"method": "linear", "sources": [{**refs[2], "parameters": {"weight": weights}}, refs[0]]}, "r"
    )
    genome, exact = found.encode(recipe)
    assert exact
    assert np.array(genome).reshape(-1, 4)[:, 1:].tolist() == [[0.25, 0.0, 0.75], [0.5, 0.0, 0.5]]


def test_recipes_from_elsewhere_do_not_lie_in_it(checkpoints: list[Checkpoint]) -> None:
    found = space(checkpoints)
    ref = found.sources[0].model_dump(exclude_none=True)
    other = {"name": "x", "path": "x"}
    for data in (
        {"method": "karcher", "sources": [ref, {**ref, "name": "b"}]},
        {"method": "linear", "sources": [ref, other]},
        {
            "method": "linear",
            "sources": [ref],
            "segments": [{"roles": ["mlp"], "starts": [0], "coefficients": [[1]]}],
        },
    ):
        with pytest.raises(ConfigError, match="does not lie in"):
            found.encode(parse_recipe(data, "r"))


def test_bad_genomes_are_refused(checkpoints: list[Checkpoint]) -> None:
    found = space(checkpoints, chromosomes=(("mlp",),))
    good = found.centre()
    second = good[4]
    for bad in (
        (),
        good[:-1],
        (1.0, *good[1:]),
        (*good[:4], second + 1, *good[5:]),
        (*good, 1e12, 0.5, 0.5, 0.0),
        (*good[:1], float("nan"), *good[2:]),
        (0.0, 1.0, 0.0, 0.0, 0.5, 1.0, 0.0, 0.0, *good[4:]),
    ):
        with pytest.raises(ValueError, match="genome"):
            found.decode(bad)
    with pytest.raises(ValueError, match="within a cell"):
        found.table((*good[:4], 1.0, *good[1:4], *good[4:]))


def test_children_of_many_segments_are_merged_within_the_error(checkpoints: list[Checkpoint]) -> None:
    found = space(checkpoints, max_segments=5, merge_error=1.0)
    table = stream(1, "table").random((found.cells.count, 3))
    assert len(found.genome(table)) == 5 * 4
    strict = space(checkpoints, max_segments=5, merge_error=0.0)
    assert len(strict.genome(table)) == strict.cells.count * 4
