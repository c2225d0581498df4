"""The model card: metadata that the hub's own library reads, and text that says what happened."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from evomerge.checkpoints.card import Row, SourceCard, model_card, read_license

A = SourceCard("math", "org/math-7b", "abc123", "f" * 64, "apache-2.0")
B = SourceCard("code", "org/code-7b", None, "e" * 64, "apache-2.0")
LOCAL = SourceCard("own", "/data/models/own", None, "d" * 64, "apache-2.0")
ROWS = [
    Row("winner", {"gsm8k": (0.5, 0.01), "mbpp": (0.25, None)}, (0.375, 0.35, 0.4)),
    Row("math", {"gsm8k": (0.4, 0.02)}, (0.3, None, None)),
]


def make(**changes: Any) -> str:
    settings: dict[str, Any] = {
        **{"name": "My merge", "base_models": [A, B], "method": "ties", "recipe_yaml": "method: ties\n"},
        **{"results": ROWS, "gain": (0.05, 0.01, 0.09), "gain_over": "uniform average"},
    }
    return model_card(**{**settings, **changes})


def test_card_reads_back_with_the_hub_library() -> None:
    card = ModelCard(make())
    data = card.data.to_dict()
    assert data["base_model"] == ["org/math-7b", "org/code-7b"]
    assert data["base_model_relation"] == "merge"
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert data["tags"] == ["merge", "evomerge", "ties"]
    assert data["license"] == "apache-2.0"
    assert "| winner | 0.3750 [0.3500, 0.4000] | 0.5000 ± 0.0100 | 0.2500 |" in card.text
    assert "| math | 0.3000 | 0.4000 ± 0.0200 |  |" in card.text
    assert "+0.0500 [+0.0100, +0.0900]. The merge is better than it" in card.text
    assert "abc123" in card.text
    assert "f" * 64 in card.text
    assert "```yaml\nmethod: ties\n```" in card.text


@pytest.mark.parametrize(
    ("gain", "verdict"), [((0.1, -0.1, 0.3), "not shown to differ from"), ((-0.2, -0.3, -0.1), "worse than")]
)
def test_card_says_so_when_nothing_was_gained(gain: tuple[float, float, float], verdict: str) -> None:
    assert verdict in make(gain=gain)


def test_local_sources_are_in_the_text_only() -> None:
    card = ModelCard(make(base_models=[A, LOCAL]))
    assert card.data.to_dict()["base_model"] == ["org/math-7b"]
    assert "`/data/models/own`" in card.text
    data = ModelCard(make(base_models=[LOCAL], results=(), gain=None)).data.to_dict()
    assert "base_model" not in data
    assert "base_model_relation" not in data


def test_existing_folder_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert A.hub_id == "org/math-7b"
    (tmp_path / "org" / "math-7b").mkdir(parents=True)
    assert A.hub_id is None


def test_licenses_are_combined() -> None:
    other = dataclasses.replace(B, license="llama3.1")
    card = ModelCard(make(base_models=[A, other]))
    assert card.data.license == "other"
    assert "math: apache-2.0, code: llama3.1" in card.text
    card = ModelCard(make(base_models=[A, dataclasses.replace(B, license=None)]))
    assert card.data.license is None
    assert "License unknown for code" in card.text
    custom = [dataclasses.replace(source, license="other:my-terms") for source in (A, B)]
    data = ModelCard(make(base_models=custom)).data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", "my-terms")


def test_hostile_text_stays_text() -> None:
    name = 'x: "y"\n---\n<script>alert(1)</script> | # [a]'
    rows = [Row(name, {name: (1.0, None)}, (1.0, None, None))]
    sources = [dataclasses.replace(A, name=name, revision=name, license=name), LOCAL]
    text = make(
        name=name,
        base_models=sources,
        method=name,
        results=rows,
        recipe_yaml="a: ```\n````\n",
        warnings=[name],
    )
    card = ModelCard(text)
    assert card.data.tags[2] == name
    assert "<script>" not in card.text
    assert "`````yaml" in card.text
    table = [line for line in card.text.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in table} == {4, 6}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: mit\n---\n# x", "mit"),
        ("---\r\nlicense: mit\r\n---\r\n", "mit"),
        ("---\nlicense:\n- mit\n---\n", "mit"),
        ("---\nlicense: other\nlicense_name: terms\n---\n", "other:terms"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlicense: 3\n---\n", None),
        ("---\ntags: [a]\n---\n", None),
        ("---\n- a\n---\n", None),
        ("---\na: [\n---\n", None),
        ("---\n!!python/object/apply:os.system [ls]\n---\n", None),
        ("# no metadata", None),
        ("", None),
    ],
)
def test_license_is_read_from_a_card(tmp_path: Path, text: str, expected: str | None) -> None:
    assert read_license(tmp_path) is None
    (tmp_path / "README.md").write_bytes(text.encode())
    assert read_license(tmp_path) == expected


def test_recipe_block_is_the_recipe() -> None:
    recipe = yaml.safe_dump({"method": "ties", "sources": [{"name": "ä"}]})
    assert recipe.rstrip() in make(recipe_yaml=recipe)
