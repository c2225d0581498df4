"""Every command, once, on one finished run over real tasks."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge.cli import main
from evomerge.store import Store
from tests.e2e.world import TASKS, evomerge, evomerge_anew, make_world, write_config


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world with one finished run, its report and its exported winner."""
    folder = make_world(tmp_path_factory.mktemp("world"))
    write_config(folder, fitness=TASKS, output={"report": True, "export": True})
    done = evomerge_anew(folder, "run", "config.yaml", "--json")
    assert done.returncode == 0, done.stderr
    (folder / "run.json").write_text(done.stdout)
    return folder


@pytest.fixture
def call(world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run a command in the world; return what it printed on standard output."""
    monkeypatch.chdir(world)

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["evomerge", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as raised:
            main()
        out, err = capsys.readouterr()
        assert raised.value.code == 0, err
        return out

    return run


def test_run_prints_what_show_prints_and_the_files_it_wrote(world: Path, call) -> None:
    printed = json.loads((world / "run.json").read_text())
    files = printed.pop("files")
    shown = json.loads(call("show", "small", "--json"))
    assert shown == printed
    assert {"name", "status", "evaluations", "best", "baselines", "gain"} <= set(shown)
    assert {"candidate", "recipe", "search", "select", "test"} <= set(shown["best"])
    assert {"score", "stderr", "tasks", "low", "high"} <= set(shown["best"]["test"])
    assert [row["name"] for row in shown["baselines"]] == ["base", "one", "two", "uniform", "task_arithmetic"]
    assert {"over", "mean", "low", "high", "level"} <= set(shown["gain"])
    assert shown["gain"]["low"] <= shown["gain"]["mean"] <= shown["gain"]["high"]
    assert shown["evaluations"] == 12
    assert all((world / path).exists() for path in files.values())


def test_show_runs_watch_and_methods_are_readable(world: Path, call) -> None:
    assert "winner" in call("show", "small")
    assert "finished" in call("runs")
    (row,) = json.loads(call("runs", "--json"))
    assert (row["name"], row["status"]) == ("small", "finished")
    call("watch", "small")
    assert "2306.01708" in call("methods")
    assert {"ties", "dare_ties"} <= {method["name"] for method in json.loads(call("methods", "--json"))}


def test_validate_says_what_a_run_would_do(world: Path, call) -> None:
    found = json.loads(call("validate", "config.yaml", "--json"))
    assert found["documents"] == {"search": 60, "select": 60, "test": 60}
    assert len(found["dimensions"]) == 4
    assert "valid" in call("validate", "config.yaml")


def test_the_exported_model_is_plain_and_carries_its_card_and_recipes(world: Path, call) -> None:
    out = world / "winner"
    assert str(out) in call("export", "small", out)
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    generated = model.generate(**tokenizer("abc", return_tensors="pt"), max_new_tokens=2, do_sample=False)
    assert generated.shape[1] >= 2
    card = ModelCard.load(out / "README.md")
    assert "merge" in card.data.tags
    assert "not shown to beat" in card.text or "beats" in card.text or "worse" in card.text
    assert yaml.safe_load((out / "mergekit.yaml").read_text())["merge_method"] == "task_arithmetic"


def test_merging_the_exported_recipe_gives_the_same_tensors(world: Path, call) -> None:
    out, again = world / "exported", world / "again"
    call("export", "small", out)
    call("merge", out / "recipe.yaml", again)
    call("merge", out / "mergekit.yaml", world / "through-mergekit")
    first = load_file(out / "model.safetensors")
    for other in (again, world / "through-mergekit"):
        tensors = load_file(other / "model.safetensors")
        assert tensors.keys() == first.keys()
        assert all(torch.equal(tensors[name], first[name]) for name in first)
    call("merge", again / "recipe.yaml", world / "a-third-time")


def test_evaluating_the_exported_model_gives_the_recorded_scores(world: Path, call) -> None:
    best = json.loads((world / "run.json").read_text())["best"]
    call("export", "small", world / "scored")
    for split in ("select", "test"):
        found = json.loads(call("evaluate", world / "scored", "config.yaml", "--split", split, "--json"))
        assert found["score"] == best[split]["score"]
        metrics = {name: task["metric"] for name, task in best[split]["tasks"].items()}
        assert {name: task[0] for name, task in found["tasks"].items()} == metrics


def test_recipe_and_report_are_written(world: Path, call) -> None:
    assert yaml.safe_load(call("recipe", "small"))["method"] == "task_arithmetic"
    assert (
        yaml.safe_load(call("recipe", "small", "--format", "mergekit"))["merge_method"] == "task_arithmetic"
    )
    assert json.loads(call("recipe", "small", "--candidate", "1", "--json"))["method"] == "linear"
    assert call("report", "small", "--out", world / "r.html").strip().endswith("r.html")
    assert "<svg" in (world / "r.html").read_text()


def test_the_schema_is_json(call) -> None:
    assert json.loads(call("schema"))["title"] == "evomerge run config"


def test_an_equal_run_of_the_same_store_scores_nothing_again(world: Path) -> None:
    write_config(world, "again.yaml", name="again", fitness=TASKS)
    done = evomerge(world, "run", "again.yaml", "--json")
    assert done.returncode == 0, done.stderr
    with Store.open(world / "runs" / "evomerge.db") as store:
        known, repeated = (store.run(name).outcomes() for name in ("small", "again"))
    assert [replace(outcome, cost={}) for outcome in known] == repeated
