"""Runs that search layer paths, by the command: every kind of space, the hybrid, resume, and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from evomerge.checkpoints.layout import layout_of
from evomerge.checkpoints.source import Checkpoint
from evomerge.cli import main
from evomerge.mergekit import read_any_recipe
from evomerge.mergekit_writer import to_mergekit
from evomerge.recipe import read_recipe
from evomerge.stacking import as_path
from tests.checkpoints.tiny import make_llama, make_model
from tests.e2e.world import evomerge, history, make_world, start, wait_for_outcomes, write_config

FITNESS = '''
"""Fitness for models of any number of layers: how near their answers are to a target."""

import os
import time

import torch


def score(model, tokenizer, request):
    time.sleep(float(os.environ.get("FITNESS_SECONDS", "0")))
    offset = {"search": 3, "select": 13, "test": 23}[request.split]
    ids = torch.arange(offset, offset + 10)[:, None] + torch.tensor([[0, 7, 20]])
    with torch.no_grad():
        values = model(input_ids=ids).logits[:, -1].std(1)
    return {"spread": values.tolist()}
'''
Call = Callable[..., str]
MODELS = {"models": ["./one", "./two"]}
EDITS = {"kind": "layer_edits", "edits": 2, "operations": ["skip", "repeat", "borrow"], "scale_range": 0.4}
SLOTS = {"kind": "data_flow", "repeats": 2, "scale_range": 1.5, "max_layers": 6, "unused": 0.5}
JOINT = {"kind": "joint", "parameter": {"method": "task_arithmetic"}, "path": EDITS}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_world(tmp_path_factory.mktemp("world"))
    (folder / "spread.py").write_text(FITNESS)
    write_config(folder, "merge.yaml", name="merge", fitness={"function": "spread.py:score"})
    done = evomerge(folder, "run", "merge.yaml")
    assert done.returncode == 0, done.stderr
    return folder


def config(folder: Path, name: str, space: dict[str, Any], **changes: Any) -> str:
    more: dict[str, Any] = {
        "name": name,
        "sources": MODELS,
        "space": space,
        "fitness": {"function": "spread.py:score"},
        "optimizer": {"name": "cma_es", "population": 6},
        "output": {"report": True, "export": True},
        **changes,
    }
    write_config(folder, f"{name}.yaml", **more)
    return f"{name}.yaml"


@pytest.fixture
def call(world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command in the world and in this process; return what it printed on standard output."""
    monkeypatch.chdir(world)

    def run(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["evomerge", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as raised:
            main()
        out, err = capsys.readouterr()
        assert raised.value.code == 0, err
        return out

    return run


def check_export(folder: Path, found: dict[str, Any]) -> None:
    """The winner's checkpoint is plain, has the path's layers, and scores what was recorded."""
    best, model = found["best"], folder / found["files"]["model"]
    stock = AutoModelForCausalLM.from_pretrained(model)
    assert stock.config.num_hidden_layers == len(best["recipe"]["path"]["layers"])
    assert not any(model.glob("*.py"))
    ids = torch.arange(23, 33)[:, None] + torch.tensor([[0, 7, 20]])
    with torch.no_grad():
        values = stock(input_ids=ids).logits[:, -1].std(1)
    assert float(values.mean()) == pytest.approx(best["test"]["score"], rel=1e-5)
    assert "The winner runs through" in (folder / found["files"]["report"]).read_text()


@pytest.mark.parametrize(("name", "space"), [("edits", EDITS), ("slots", SLOTS)])
def test_a_search_of_paths_ends_in_a_plain_model(
    name: str, space: dict[str, Any], world: Path, call: Call
) -> None:
    found = json.loads(call("run", config(world, name, space), "--json"))
    assert [row["name"] for row in found["baselines"]] == ["one", "two", "uniform"]
    assert found["failures"] == 0
    assert len({candidate for candidate, *_ in history(world / "runs/evomerge.db", name)["candidates"]}) >= 15
    check_export(world, found)


def test_coefficients_and_path_are_searched_together(world: Path, call: Call) -> None:
    sources = {"base": "./base", **MODELS}
    file = config(world, "joint", JOINT, sources=sources, budget={"evaluations": 12})
    found = json.loads(call("run", file, "--json"))
    assert found["best"]["recipe"]["sources"][0]["recipe"]["method"] == "task_arithmetic"
    check_export(world, found)


def test_the_winner_of_a_run_is_a_source_of_the_next(world: Path, call: Call) -> None:
    sources = {"models": [{"name": "first", "path": "run:merge"}, "./two"]}
    file = config(world, "hybrid", EDITS, sources=sources)
    assert "The config is valid" in call("validate", file)
    found = json.loads(call("run", file, "--json"))
    check_export(world, found)
    merged = json.loads(call("show", "merge", "--json"))["best"]
    (own,) = [row for row in found["baselines"] if row["name"] == "first"]
    assert own["test"]["score"] == pytest.approx(merged["test"]["score"], rel=1e-5)
    # The recipe is part of the run: the first run and its store are not needed again.
    call("resume", "hybrid", "--evaluations", "18")


def test_a_recipe_file_is_a_source_too(world: Path, call: Call) -> None:
    recipe = {
        "method": "slerp",
        "parameters": {"t": 0.4},
        "sources": [{"name": n, "path": f"./{n}"} for n in ("one", "two")],
    }
    (world / "slerp.yaml").write_text(yaml.safe_dump(recipe))
    sources = {"models": [{"name": "mixed", "path": "./slerp.yaml"}, "./two"]}
    file = config(world, "file", SLOTS, sources=sources, budget={"evaluations": 6})
    found = json.loads(call("run", file, "--json"))
    check_export(world, found)


def test_a_killed_run_of_paths_ends_as_if_it_had_never_been_killed(
    world: Path, call: Call, tmp_path: Path
) -> None:
    file = config(world, "killed", SLOTS, output={"report": False})
    call("run", file, "--store", "whole.db")
    store = tmp_path / "killed.db"
    process = start(world, "run", file, "--store", str(store), env={"FITNESS_SECONDS": "0.15"})
    assert wait_for_outcomes(process, store, "killed", 9)
    process.kill()
    call("resume", "killed", "--store", str(store))
    assert history(store, "killed") == history(world / "whole.db", "killed")


def test_a_path_survives_mergekit_s_yaml(world: Path, call: Call) -> None:
    sources = [{"name": n, "path": f"./{n}"} for n in ("one", "two")]
    path = ["one 0-1", "two 1-2", "one 1-2"]
    (world / "path.yaml").write_text(
        yaml.safe_dump({"method": "passthrough", "sources": sources, "path": path})
    )
    call("merge", "path.yaml", "direct")
    stored = yaml.safe_load((world / "direct" / "recipe.yaml").read_text())
    assert stored["path"]["layers"] == ["one 0", "one 1", "two 1", "two 2", "one 1", "one 2"]
    recipe = read_recipe(world / "direct" / "recipe.yaml")
    written = to_mergekit(recipe, layout_of(Checkpoint.open(world / "one")))
    (world / "kit.yaml").write_text(yaml.safe_dump(written))
    assert as_path(read_any_recipe(world / "kit.yaml")).path == recipe.path
    call("merge", "kit.yaml", "through")
    first, second = (load_file(world / name / "model.safetensors") for name in ("direct", "through"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


ALONE = {"kind": "layer_edits", "operations": ["skip"], "scale_range": 0.2}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("an unknown kind", {"space": {"kind": "data-flow"}}, 'did you mean "data_flow"'),
    ("an unknown key", {"space": {**SLOTS, "repeat": 1}}, 'did you mean "repeats"'),
    ("no operation", {"space": {**EDITS, "operations": []}}, "space.operations: expected distinct"),
    ("borrowing from nobody", {"sources": {"models": ["./one"]}}, "borrow needs a second source"),
    ("a limit that is too low", {"space": {**SLOTS, "max_parameters": 10}}, "space.max_parameters: two"),
    ("a foreign tokenizer", {"space": {**SLOTS, "tokenizer": "two"}}, "space.tokenizer: a path has that of"),
    ("another width", {"sources": {"models": ["./one", "./wide"]}}, "hidden_size is 32, but 16"),
    ("no paths", {"space": ALONE, "sources": {"models": ["./mixed-experts"]}}, "type mixtral are not"),
    ("no scales", {"space": ALONE, "sources": {"models": ["./olmo"]}}, "scales cannot be folded"),
    ("a run that is not there", {"sources": {"models": ["run:absent", "./two"]}}, "absent"),
    ("a run without winner", {"sources": {"models": ["run:stopped", "./two"]}}, "has no winner yet"),
    ("a file that is no recipe", {"sources": {"models": ["./merge.yaml", "./two"]}}, "is a run config"),
    ("a file that is not there", {"sources": {"models": ["./absent.yaml", "./two"]}}, "absent.yaml"),
    ("a path of another width", {"sources": {"models": ["./wide.yaml", "./two"]}}, "is 16, but 32"),
    ("a start of another kind", {"optimizer": {"start": ["slerp.yaml"]}}, "not lie in a space of paths"),
    ("a joint space without base", {"space": JOINT, "sources": MODELS}, "sources.base"),
    ("a joint path of no kind", {"space": {**JOINT, "path": {"edits": 1}}}, "space.path.kind"),
]


@pytest.fixture(scope="module")
def broken(world: Path) -> Path:
    """The world with sources that cannot be used."""
    make_llama(world / "wide", layers=3, vocab=96, hidden=32)
    make_model(world / "mixed-experts", "mixtral", layers=3, vocab=96)
    make_model(world / "olmo", "olmo2", layers=3, vocab=96)
    wide = {"method": "passthrough", "sources": [{"name": "wide", "path": "./wide"}], "path": ["wide 0-2"]}
    (world / "wide.yaml").write_text(yaml.safe_dump(wide))
    plain = {"method": "linear", "sources": [{"name": n, "path": f"./{n}"} for n in ("one", "two")]}
    (world / "slerp.yaml").write_text(yaml.safe_dump(plain))
    write_config(world, "stopped.yaml", name="stopped", fitness={"function": "fitness.py:broken"})
    assert evomerge(world, "run", "stopped.yaml").returncode == 2  # it stays in the store as failed
    return world


@pytest.mark.parametrize(("changes", "named"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_what_cannot_be_searched_is_refused_in_one_line(
    changes: dict[str, Any],
    named: str,
    broken: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = config(broken, "refused", **{"space": EDITS, **changes})
    monkeypatch.chdir(broken)
    monkeypatch.setattr("sys.argv", ["evomerge", "run", file])
    with pytest.raises(SystemExit) as raised:
        main()
    lines = [line for line in capsys.readouterr().err.splitlines() if line != "reading sources and tasks"]
    assert raised.value.code == 2, lines
    assert len(lines) == 1, lines
    assert named in lines[0]
