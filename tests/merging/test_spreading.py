"""A model over several devices answers as it does on one; between a GPU and the CPU where there is a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from evomerge.checkpoints.layout import layout_of
from evomerge.checkpoints.source import Checkpoint
from evomerge.fitness.encoding import TokenRequest
from evomerge.fitness.engine import Engine
from evomerge.merging.live import LiveModel
from evomerge.merging.spreading import Spread
from evomerge.recipe import parse_recipe
from evomerge.records import Place
from tests.checkpoints.tiny import make_model
from tests.merging.recipes import models, usual

DEVICES = [["cpu", "cpu"], *([["cuda:0", "cpu"]] if torch.cuda.is_available() else [])]


def requests(kind: str) -> list[TokenRequest]:
    """Return rows with a common beginning of 40 tokens and branches, or prompts to generate from."""
    rows = [
        tuple(4 + (7 * k) % 50 for k in range(40)) + tuple(4 + (5 * i + k) % 50 for k in range(4 + i))
        for i in range(12)
    ]
    if kind == "generate":
        return [TokenRequest(row, (), stops=("z",), max_new_tokens=8) for row in rows]
    return [TokenRequest(row, (target, 9)) for row in rows for target in range(5, 9)]


def answers(live: LiveModel, kind: str) -> list[Any]:
    engine = Engine(live.model, live.tokenizer, 256)
    if kind == "generate":
        return list(engine.generate(requests(kind)))
    return [total for total, _ in engine.loglikelihoods(engine.plan(requests(kind)))]


def hooks(live: LiveModel) -> int:
    """Return how many entries the resident models' tables of hooks have."""
    residents = [resident.model for resident, _ in live._residents.values()]
    return sum(
        len(table)
        for model in residents
        for module in model.modules()
        for name, table in vars(module).items()
        if "_hooks" in name and isinstance(table, dict)
    )


def test_layers_are_divided_equally_and_the_head_lies_with_the_last() -> None:
    spread = Spread(["cpu", "meta"])
    found = [spread.device_of(Place(f"l.{i}", "mlp", i, i / 4), 5).type for i in range(5)]
    assert found == ["cpu", "cpu", "cpu", "meta", "meta"]
    roles = {
        role: spread.device_of(Place(role, role, None, 0.0), 5).type for role in ("embedding", "norm", "head")
    }
    assert roles == {"embedding": "cpu", "norm": "meta", "head": "meta"}


def test_each_part_goes_to_its_device_and_runs_there(tmp_path: Path) -> None:
    path = make_model(tmp_path / "m", layers=4)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    layout = layout_of(Checkpoint.open(path))
    # What has been on `meta` cannot come back: the second half must never have been there.
    Spread(["meta", "cpu"]).settle(model, layout.layers, layout.places)
    found = {name: tensor.device.type for name, tensor in model.named_parameters()}
    assert found == {
        name: "meta" if place.role == "embedding" or place.layer in (0, 1) else "cpu"
        for name, place in layout.places.items()
    }
    hidden = torch.zeros(1, 3, model.config.hidden_size)
    rotary = (torch.ones(1, 3, model.config.head_dim), torch.zeros(1, 3, model.config.head_dim))
    assert model.model.layers[0](hidden, position_embeddings=rotary).device.type == "meta"
    assert model.model.layers[3](hidden, position_embeddings=rotary).device.type == "cpu"


@pytest.mark.parametrize("devices", DEVICES, ids="+".join)
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_neox", "mistral"])
def test_candidates_score_as_on_one_device(model_type: str, devices: list[str], tmp_path: Path) -> None:
    options = {"config": {"sliding_window": 9}} if model_type == "mistral" else {}
    checkpoints = models(tmp_path, model_type, count=2, layers=4, **options)
    everyone = {checkpoint.fingerprint: checkpoint for checkpoint in checkpoints.values()}
    lives = [
        LiveModel(everyone, checkpoints["base"], checkpoints["base"], device=device)
        for device in ("cpu", devices)
    ]
    for shift in (0.0, 0.2):
        for live in lives:
            live.apply(usual("ties", checkpoints, shift))
        alone, spread = (answers(live, "score") for live in lives)
        assert spread == pytest.approx(alone, rel=1e-5)
        assert answers(lives[0], "generate") == answers(lives[1], "generate")
    places = {p.device.type for p in lives[1].model.parameters()}
    assert places == {torch.device(device).type for device in devices}


@pytest.mark.parametrize("devices", DEVICES, ids="+".join)
def test_layer_paths_run_over_several_devices(devices: list[str], tmp_path: Path) -> None:
    checkpoints = models(tmp_path, count=2, layers=4)
    steps = [
        {"source": s, "layer": i, "scale": scale}
        for s, i, scale in (
            ("a", 0, 1.0),
            ("b", 3, 0.9),
            ("a", 1, -1.1),
            ("a", 2, 1.0),
            ("a", 2, 1.0),
            ("b", 3, 1.0),
        )
    ]
    recipe = parse_recipe(
        {
            "method": "passthrough",
            "sources": [
                {"name": n, "path": str(checkpoints[n].path), "fingerprint": checkpoints[n].fingerprint}
                for n in "ab"
            ],
            "path": {"layers": steps, "ends": "a"},
        },
        "test",
    )
    everyone = {checkpoint.fingerprint: checkpoint for checkpoint in checkpoints.values()}
    found = []
    for device in ("cpu", devices):
        live = LiveModel(everyone, checkpoints["a"], checkpoints["a"], device=device)
        live.apply(recipe)
        found.append((answers(live, "score"), answers(live, "generate")))
        before = hooks(live)
        for _ in range(3):
            live.apply(recipe)
        assert hooks(live) == before
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert found[1][1] == found[0][1]
