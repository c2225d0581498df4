"""Population files: read, matched by content, and refused where they do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evomerge.checkpoints.layout import layout_of
from evomerge.checkpoints.source import Checkpoint
from evomerge.errors import ConfigError
from evomerge.population import PopulationFile, founders, read_population
from evomerge.recipe import SourceRef
from evomerge.spaces.parameter import ParameterSpace
from evomerge.spaces.segments import SegmentSpace
from evomerge.spaces.settings import ParameterSettings, SegmentsSettings
from tests.checkpoints.tiny import make_llama


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Checkpoint]:
    folder = tmp_path_factory.mktemp("models")
    return [Checkpoint.open(make_llama(folder / f"m{i}", seed=i)) for i in range(3)]


def refs(checkpoints: list[Checkpoint]) -> list[SourceRef]:
    return [SourceRef(name=c.path.name, path=str(c.path), fingerprint=c.fingerprint) for c in checkpoints]


def space(checkpoints: list[Checkpoint], **settings: Any) -> SegmentSpace:
    places = list(layout_of(checkpoints[0]).places.values())
    given = SegmentsSettings(kind="segments", cells=40, **settings)
    return SegmentSpace(given, refs(checkpoints), checkpoints, places)


def population(checkpoints: list[Checkpoint], **changes: Any) -> PopulationFile:
    found = space(checkpoints)
    data = {
        "kind": "segments",
        "run": "old",
        "sources": [ref.model_dump(exclude_none=True) for ref in refs(checkpoints)],
        "chromosomes": found.chromosomes,
        "entries": found.entries,
        "individuals": [{"candidate": 7, "score": 0.5, "genome": found.centre()}],
    }
    return PopulationFile.model_validate({**data, **changes})


def test_a_file_is_read_back(checkpoints: list[Checkpoint], tmp_path: Path) -> None:
    known = population(checkpoints)
    known.write(tmp_path / "p.json")
    assert read_population(tmp_path / "p.json") == known


def test_columns_follow_the_content_of_the_sources_and_new_ones_are_zero(
    checkpoints: list[Checkpoint],
) -> None:
    one, two, three = checkpoints
    known = population([one, two])
    known = known.model_copy(
        update={
            "individuals": (
                known.individuals[0].model_copy(update={"genome": (0.0, 0.9, 0.1, 1000.0, 0.2, 0.8)}),
            )
        }
    )
    here = space([three, two, one])
    (genome,) = founders(known, here, here.sources)
    rows = np.array(genome).reshape(-1, 4)
    assert rows[:, 1:].tolist() == [[0.0, 0.1, 0.9], [0.0, 0.8, 0.2]]
    assert abs(rows[1, 0] - 1000) <= np.diff(here.edges).max() / 2, "moved to the nearest cell"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chromosomes": [["mlp"], []], "entries": [5, 5]}, r"chromosomes \[\['mlp'\], 'rest'\]"),
        ({"entries": [5]}, r"with \[5\] entries, the space has \['rest'\] with"),
        ({"kind": "numbers"}, "it is of numbers, the space is not"),
        ({"individuals": [{"candidate": 7, "score": 0.5, "genome": [0.0, 1.0]}]}, "individual 7: 2 numbers"),
        (
            {"individuals": [{"candidate": 7, "score": 0.5, "genome": [5.0, 1.0, 0.0, 0.0]}]},
            "individual 7: the segments of a genome must start",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes: Any, message: str, checkpoints: list[Checkpoint]) -> None:
    here = space(checkpoints)
    with pytest.raises(ConfigError, match=message) as problem:
        founders(population(checkpoints, **changes), here, here.sources)
    assert "\n" not in str(problem.value)


def test_other_sources_need_consent(checkpoints: list[Checkpoint]) -> None:
    one, two, three = checkpoints
    known, here = population([one, two]), space([one, three])
    with pytest.raises(ConfigError, match=r"its source m1 .* is none of this run's \(m0, m2\)"):
        founders(known, here, here.sources)
    (genome,) = founders(known, here, here.sources, {"m1": "m2"})
    assert genome == here.centre()
    with pytest.raises(ConfigError, match="two of its sources are m0 here"):
        founders(known, here, here.sources, {"m1": "m0"})
    with pytest.raises(ConfigError, match="--map m1=x: expected a source of the population"):
        founders(known, here, here.sources, {"m1": "x"})


def test_numbers_need_the_same_dimensions(checkpoints: list[Checkpoint]) -> None:
    places = list(layout_of(checkpoints[0]).places.values())
    found = refs(checkpoints)
    box = ParameterSpace(ParameterSettings(method="linear"), None, found, places, 2)
    dimensions = [[d.label, d.kind, d.size] for d in box.dimensions]
    member = {"candidate": 1, "score": 0.1, "genome": [0.5] * 3}
    changes = {"kind": "numbers", "chromosomes": [], "entries": [], "individuals": [member]}
    known = population(checkpoints, **changes, dimensions=dimensions)
    assert founders(known, box, found) == [(0.5, 0.5, 0.5)]
    with pytest.raises(ConfigError, match="other dimensions"):
        founders(population(checkpoints, **changes, dimensions=dimensions[:2]), box, found)
    wrong = population(
        checkpoints, **{**changes, "individuals": [{**member, "genome": [2.0] * 3}]}, dimensions=dimensions
    )
    with pytest.raises(ConfigError, match="individual 1: "):
        founders(wrong, box, found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json", "not valid JSON"),
        ("[1]", "expected a JSON object"),
        ('{"kind": "segments"}', "run"),
        ('{"evomerge": 2}', "evomerge"),
    ],
)
def test_files_that_are_none_are_refused_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as problem:
        read_population(path)
    assert "\n" not in str(problem.value)
    with pytest.raises(ConfigError, match="not a regular file"):
        read_population(tmp_path)
