"""Soups: what greedy keeps, and the model that is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.checkpoints.source import Checkpoint
from evomerge.config import read_config
from evomerge.recipe import read_recipe
from evomerge.soup import choose_soup, write_soup
from tests.e2e.world import evomerge, make_world

NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models on either side of the fitness function's target, and one far away."""
    folder = make_world(tmp_path_factory.mktemp("soup"))
    count = load_file(folder / "base/model.safetensors")[NAME].numel()
    target = torch.randn(count, generator=torch.Generator().manual_seed(7)) * 0.02
    shutil.copytree(folder / "one", folder / "far")
    for name, offset in (("base", 0.05), ("one", 0.01), ("two", -0.013), ("far", 0.3)):
        path = folder / name / "model.safetensors"
        tensors = load_file(path)
        tensors[NAME] = (target + offset).view_as(tensors[NAME])
        save_file(tensors, path, {"format": "pt"})
    return folder


def test_greedy_keeps_what_raises_the_score(world: Path, tmp_path: Path) -> None:
    config = read_config(world / "config.yaml", [])
    soup = choose_soup(config, world, "greedy")
    assert soup.chosen == ("one", "two"), "each is off by about as much to the other side"
    assert [step.kept for step in soup.steps] == [True, True]
    assert soup.steps[1].score > soup.steps[0].score
    assert soup.select is not None
    assert soup.select.gain is not None
    assert soup.select.gain.interval.mean > 0
    out = write_soup(soup, tmp_path / "out")
    models = [Checkpoint.open(world / name).tensor(NAME) for name in ("one", "two")]
    torch.testing.assert_close(Checkpoint.open(out).tensor(NAME), (models[0] + models[1]) / 2)
    assert [source.name for source in read_recipe(out / "recipe.yaml").sources] == ["one", "two"]
    assert "greedy soup" in (out / "README.md").read_text()


def test_greedy_leaves_out_what_does_not(world: Path) -> None:
    config = read_config(world / "config.yaml", [])
    one = config.sources.models[0]
    models = (one.model_copy(update={"name": "far", "path": "far"}), one)
    sources = config.sources.model_copy(update={"models": models})
    soup = choose_soup(config.model_copy(update={"sources": sources}), world, "greedy")
    assert soup.chosen == ("one",)
    assert [(step.source, step.kept) for step in soup.steps] == [("one", True), ("far", False)]
    assert soup.select is not None
    assert soup.select.gain is None


def test_command(world: Path, tmp_path: Path) -> None:
    command = ("soup", "config.yaml", tmp_path / "out")
    run = evomerge(world, *command, "--json")
    assert run.returncode == 0, run.stderr
    data = json.loads(run.stdout)
    assert data["chosen"] == ["one", "two"]
    assert data["select"]["gain"]["mean"] > 0
    again = evomerge(world, *command)
    assert again.returncode == 2
    assert "exists already" in again.stderr
    run = evomerge(world, *command[:-1], tmp_path / "uniform", "--kind", "uniform")
    assert run.returncode == 0, run.stderr
    assert "uniform soup of all 2 sources" in run.stdout
