"""What a user can get wrong in a recipe and its sources: one line, exit code 2, nothing left behind."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.checkpoints.source import Checkpoint
from evomerge.cli import main
from tests.checkpoints.tiny import make_llama

DELTA = {"method": "ties", "base": {"name": "base", "path": "base"}}


def two(first: dict[str, Any] | None = None, second: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    return [
        {"name": "a", "path": "a", "parameters": first or {}},
        {"name": "b", "path": "b", "parameters": second or {}},
    ]


RECIPES: list[tuple[str, dict[str, Any], str]] = [
    ("density above 1", {**DELTA, "sources": two({"density": 1.5})}, "density: expected 0.0 to 1.0, got 1.5"),
    ("density below 0", {**DELTA, "sources": two({"density": -0.1})}, "density: expected 0.0 to 1.0"),
    (
        "epsilon",
        {**DELTA, "method": "della", "sources": two({"density": 0.9, "epsilon": 0.2})},
        "epsilon: expected below min(density, 1 - density) = 0.1, got 0.2",
    ),
    (
        "weights sum to zero",
        {"method": "linear", "sources": two({"weight": 1.0}, {"weight": -1.0})},
        "sum to 0 and cannot be normalised",
    ),
    (
        "one source of two",
        {"method": "slerp", "sources": two()[:1], "parameters": {"t": 0.5}},
        "takes 2, got 1",
    ),
    (
        "one source of many",
        {**DELTA, "method": "model_stock", "sources": two()[:1]},
        "takes at least 2, got 1",
    ),
    (
        "slice out of range",
        {"method": "passthrough", "sources": two()[:1], "slices": [{"layers": {"a": [0, 9]}}]},
        "slices.0.layers.a: expected layers within [0, 2], got [0, 9]",
    ),
    (
        "slices of other lengths",
        {"method": "linear", "sources": two(), "slices": [{"layers": {"a": [0, 2], "b": [0, 1]}}]},
        "1 layers, but 2 of a",
    ),
    (
        "source in no slice",
        {"method": "passthrough", "sources": two(), "slices": [{"layers": {"a": [0, 2]}}]},
        'no slice has layers of "b"',
    ),
    ("no base", {"method": "ties", "sources": two()}, "works on deltas from a base"),
    ("unknown method", {"method": "tiess", "sources": two()}, 'did you mean "ties"'),
    (
        "unknown tokenizer",
        {"method": "linear", "sources": two(), "tokenizer": "c"},
        '"c" is none of a, b, union',
    ),
    ("no such folder", {"method": "linear", "sources": [{"name": "a", "path": "./none"}]}, "none"),
]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for seed, name in enumerate(("base", "a", "b")):
        make_llama(tmp_path / name, seed=seed)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    before = sorted(Path().rglob("*"))
    monkeypatch.setattr(sys, "argv", ["evomerge", *arguments])
    with pytest.raises(SystemExit) as raised:
        main()
    captured = capsys.readouterr()
    assert raised.value.code == 2, captured.err
    assert sorted(Path().rglob("*")) == before
    lines = [line for line in captured.err.strip().splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1, captured.err
    return lines[0]


@pytest.mark.parametrize(("recipe", "message"), [r[1:] for r in RECIPES], ids=[r[0] for r in RECIPES])
def test_wrong_recipe_is_refused(
    recipe: dict[str, Any],
    message: str,
    world: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("recipe.yaml").write_text(yaml.safe_dump({"evomerge": 1, **recipe}))
    assert message in refused(monkeypatch, capsys, "merge", "recipe.yaml", "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shard-size", "big"], "--shard-size: expected a size such as 500MB or 5GB, got 'big'"),
        (["--shard-size", "0"], "--shard-size: expected a size"),
        (["--device", "tpu9"], 'device: "tpu9" cannot be used here'),
    ],
)
def test_wrong_option_is_refused(
    options: list[str],
    message: str,
    world: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("recipe.yaml").write_text(yaml.safe_dump({"method": "linear", "sources": two()}))
    assert message in refused(monkeypatch, capsys, "merge", "recipe.yaml", "out", *options)


@pytest.mark.parametrize("target", ["a", "a/model.safetensors", "recipe.yaml"])
def test_output_onto_an_input_is_refused(
    target: str, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("recipe.yaml").write_text(yaml.safe_dump({"method": "linear", "sources": two()}))
    assert "exists already" in refused(monkeypatch, capsys, "merge", "recipe.yaml", target)


def test_sources_of_other_depths_need_slices(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree("b")
    make_llama(Path("b"), layers=3)
    Path("recipe.yaml").write_text(yaml.safe_dump({"method": "linear", "sources": two()}))
    assert "num_hidden_layers" in refused(monkeypatch, capsys, "merge", "recipe.yaml", "out")
    slices = [{"layers": {"a": [0, 2], "b": [1, 3]}}]
    Path("recipe.yaml").write_text(yaml.safe_dump({"method": "linear", "sources": two(), "slices": slices}))
    monkeypatch.setattr(sys, "argv", ["evomerge", "merge", "recipe.yaml", "out"])
    with pytest.raises(SystemExit) as raised:
        main()
    assert not raised.value.code
    assert Checkpoint.open(Path("out")).config["num_hidden_layers"] == 2


def test_options_of_a_merge(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("recipe.yaml").write_text(yaml.safe_dump({"method": "linear", "sources": two()}))
    options = ["--dtype", "bfloat16", "--shard-size", "5kB", "--device", "cpu", "--check"]
    monkeypatch.setattr(sys, "argv", ["evomerge", "merge", "recipe.yaml", "out", *options])
    with pytest.raises(SystemExit) as raised:
        main()
    assert not raised.value.code
    assert len(list(Path("out").glob("model-*.safetensors"))) > 1
    assert Checkpoint.open(Path("out")).torch_dtype == "bfloat16"
    assert '"b" unaligned: attention and mlp' in capsys.readouterr().err


def test_one_method_in_full_and_all_in_short(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, words in (
        (["methods", "della"], ("epsilon", "arXiv 2406.11617", "draws at random")),
        (["methods"], ("spectral", "tsv_m", "dare_ties", "base and 1 or more")),
        (["methods", "ties", "--json"], ('"whole_model": true',)),
    ):
        monkeypatch.setattr(sys, "argv", ["evomerge", *arguments])
        with pytest.raises(SystemExit) as raised:
            main()
        assert not raised.value.code
        out = capsys.readouterr().out
        assert all(word in out for word in words)
    assert 'did you mean "della"' in refused(monkeypatch, capsys, "methods", "dela")
