"""Recipes with segment tables: breakpoints inside tensors, live and streamed alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from evomerge.checkpoints.layout import layout_of
from evomerge.checkpoints.source import Checkpoint
from evomerge.errors import RecipeError
from evomerge.merging.live import LiveModel
from evomerge.merging.merger import Merger
from evomerge.merging.stream import write_model
from evomerge.recipe import Recipe, parse_recipe
from tests.merging.recipes import by_identity, models

ROWS = ((1.0, 0.0, 0.0), (0.25, 0.5, 0.25), (0.0, 1.1, -0.1), (0.0, 0.0, 1.0))


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def checkpoints(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    found = models(tmp_path_factory.mktemp("models"), count=3, layers=2, dtype=request.param)
    return {name: found[name] for name in list(found)[-3:]}


def recipe_of(checkpoints: dict[str, Checkpoint], segments: Any) -> Recipe:
    sources = [
        {"name": name, "path": str(found.path), "fingerprint": found.fingerprint}
        for name, found in checkpoints.items()
    ]
    return parse_recipe({"method": "linear", "sources": sources, "segments": segments}, "r")


def flat(checkpoint: Checkpoint, roles: tuple[str, ...] = ()) -> Tensor:
    places = layout_of(checkpoint).places.values()
    chosen = [place.name for place in places if not roles or place.role in roles]
    return torch.cat([checkpoint.tensor(name).double().flatten() for name in chosen])


def merged(recipe: Recipe, checkpoints: dict[str, Checkpoint]) -> dict[str, Tensor]:
    merger = Merger(by_identity(recipe, checkpoints), layout_of(checkpoints[recipe.reference.name]))
    return {name: merger.merge(recipe, name) for name in merger.layout.places}


def test_every_entry_has_the_coefficients_of_its_segment(checkpoints: dict[str, Checkpoint]) -> None:
    sources = [flat(found) for found in checkpoints.values()]
    starts = [0, 7, 1031, len(sources[0]) - 5]
    recipe = recipe_of(checkpoints, [{"starts": starts, "coefficients": ROWS}])
    found = torch.cat([tensor.flatten() for tensor in merged(recipe, checkpoints).values()])
    for row, start, stop in zip(ROWS, starts, [*starts[1:], len(sources[0])], strict=True):
        want = sum(c * source[start:stop] for c, source in zip(row, sources, strict=True))
        tolerance = 1e-6 if found.dtype == torch.float32 else 5e-3
        torch.testing.assert_close(found[start:stop].double(), want, rtol=tolerance, atol=1e-7)
    first, last = next(iter(checkpoints.values())), list(checkpoints.values())[-1]
    assert found[:7].equal(flat(first)[:7].to(found.dtype)), "a source alone is itself, bit for bit"
    assert found[-5:].equal(flat(last)[-5:].to(found.dtype))


def test_tables_share_out_the_tensors_by_role(checkpoints: dict[str, Checkpoint]) -> None:
    tables = [
        {"roles": ["attention"], "starts": [0, 100], "coefficients": [ROWS[0], ROWS[3]]},
        {"starts": [0], "coefficients": [[0.0, 1.0, 0.0]]},
    ]
    result = merged(recipe_of(checkpoints, tables), checkpoints)
    one, two, three = checkpoints.values()
    places = layout_of(one).places
    attention = torch.cat([t.flatten() for n, t in result.items() if places[n].role == "attention"]).double()
    assert attention[:100].equal(flat(one, ("attention",))[:100])
    assert attention[100:].equal(flat(three, ("attention",))[100:])
    assert all(t.equal(two.tensor(n)) for n, t in result.items() if places[n].role != "attention")


def test_live_is_what_is_written(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    first = next(iter(checkpoints.values()))
    total = len(flat(first))
    recipes = [
        recipe_of(checkpoints, [{"starts": [0, cut, total - 9], "coefficients": ROWS[1:]}])
        for cut in (5, 1203)
    ]
    live = LiveModel(by_identity(recipes[0], checkpoints), first, first)
    for number in (0, 1):
        live.apply(recipes[number])
        target = write_model(recipes[number], checkpoints, tmp_path / f"out{number}")
        written = load_file(target / "model.safetensors")
        state = live.model.state_dict()
        assert all(tensor.equal(state[name]) for name, tensor in written.items())


def test_a_table_of_a_larger_model_is_refused(checkpoints: dict[str, Checkpoint]) -> None:
    total = len(flat(next(iter(checkpoints.values()))))
    recipe = recipe_of(checkpoints, [{"starts": [0, total], "coefficients": ROWS[:2]}])
    with pytest.raises(RecipeError, match=rf"segments.0.starts: .* {total} of {total}"):
        merged(recipe, checkpoints)


def test_a_tensor_in_no_table_is_refused(checkpoints: dict[str, Checkpoint]) -> None:
    recipe = recipe_of(checkpoints, [{"roles": ["mlp"], "starts": [0], "coefficients": ROWS[:1]}])
    with pytest.raises(RecipeError, match="is in no table"):
        merged(recipe, checkpoints)
