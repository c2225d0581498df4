"""The demo's world: what it holds, that it is built once, and that a seed makes it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from evomerge.demo.skills import SKILLS, TrainingDocuments, task_documents
from evomerge.demo.world import ExpertSettings, World, WorldSettings, build_world
from evomerge.errors import UserError

os.environ["HF_HUB_OFFLINE"] = "1"

TINY = WorldSettings(
    hidden=16,
    layers=2,
    heads=2,
    intermediate=32,
    batch=4,
    base_steps=2,
    experts=tuple(ExpertSettings(skill, 2, 1e-3) for skill in SKILLS),
    documents=40,
    threads=1,
)


def fingerprint(world: World) -> dict[str, str]:
    """Digest of every file of a world, by its place in it."""
    return {
        str(path.relative_to(world.folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(world.folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("demo") / "world", settings=TINY)


def test_importing_loads_no_torch() -> None:
    code = "import sys, evomerge.demo.world; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_defaults_leave_enough_documents_for_three_splits() -> None:
    settings = WorldSettings()
    assert settings.documents >= 700
    assert len(settings.experts) >= 3
    for expert in settings.experts:
        documents = task_documents(SKILLS[expert.skill], settings.documents, 0)
        assert len({document["prompt"] for document in documents}) == settings.documents
        assert max(len(str(document["prompt"])) for document in documents) <= 24
        assert max(len(str(document["answer"])) for document in documents) <= 8


def test_models_load_with_transformers(world: World) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for folder in (world.base, *world.experts.values()):
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        text = "C2xyz=zab\n"
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text)
        assert tokenizer.decode(ids) == text
        assert max(ids) < model.config.vocab_size
        assert (folder / "generation_config.json").is_file()
        assert "license:" in (folder / "README.md").read_text()


def test_experts_differ_from_the_base(world: World) -> None:
    weights = {
        (folder / "model.safetensors").read_bytes() for folder in (world.base, *world.experts.values())
    }
    assert len(weights) == 1 + len(world.experts)


def test_documents_are_right(world: World) -> None:
    for name in world.experts:
        lines = (world.folder / "documents" / f"{name}.jsonl").read_text().splitlines()
        documents = [json.loads(line) for line in lines]
        assert len(documents) == len({document["prompt"] for document in documents}) == TINY.documents
        for document in documents:
            if SKILLS[name].multiple_choice:
                assert document["choices"][document["label"]] == document["answer"]
                assert len(set(document["choices"])) == 4


def test_training_never_shows_a_task_document() -> None:
    # The two-letter documents of a skill are few, so that banning some of them is felt.
    every = frozenset(f"R{a}{b}=" for a in "abcdefghijklm" for b in "abcdefghijklmnopqrstuvwxyz")
    lessons = TrainingDocuments({"reverse": 1.0}, long_share=0.0, own=None, banned=every, seed=0)
    prompts = {prompt for prompt, _ in lessons.batch(3000)}
    assert any(len(prompt) == 4 for prompt in prompts)
    assert not prompts & every


def test_tasks_load_and_score_with_lm_eval(world: World) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(world.tasks_path), include_defaults=False)
    model = HFLM(pretrained=str(world.base), device="cpu", batch_size=16)
    results = lm_eval.simple_evaluate(
        model, tasks=list(world.tasks), task_manager=manager, limit=12, bootstrap_iters=0
    )
    kinds = set()
    for task in world.tasks:
        config = results["configs"][task]
        kinds.add(config["output_type"])
        metric = "acc" if config["output_type"] == "multiple_choice" else "exact_match"
        assert 0.0 <= results["results"][task][f"{metric},none"] <= 1.0
        for sample in results["samples"][task]:
            document = sample["doc"]
            assert sample["arguments"][0][0] == document["prompt"]
            if config["output_type"] == "multiple_choice":
                assert [pair[1] for pair in sample["arguments"]] == document["choices"]
                assert int(sample["target"]) == document["label"]
            else:
                assert sample["target"] == document["answer"]
    assert kinds == {"multiple_choice", "generate_until"}


def test_a_finished_world_is_reused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in world.folder.rglob("*")}
    monkeypatch.setitem(sys.modules, "evomerge.demo.training", None)  # importing it would now fail
    assert build_world(world.folder, settings=TINY) == world
    assert {path: path.stat().st_mtime_ns for path in world.folder.rglob("*")} == before


def test_a_seed_makes_a_world(world: World, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    again = build_world(
        tmp_path / "again",
        settings=TINY,
        progress=lambda stage, done, total: calls.append((stage, done, total)),
    )
    first, second = fingerprint(world), fingerprint(again)
    same = {name for name in first if not name.startswith("tasks/") and name != "world.json"}
    assert {name: first[name] for name in same} == {name: second[name] for name in same}
    assert calls[0] == ("base", 0, 2)
    assert [stage for stage, done, total in calls if done == total] == ["base", *SKILLS]
    other = build_world(tmp_path / "again", seed=1, settings=TINY)
    third = fingerprint(other)
    assert all(third[name] != first[name] for name in first if name.endswith((".safetensors", ".jsonl")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again"]


def test_a_moved_world_gets_new_paths(world: World, tmp_path: Path) -> None:
    old = build_world(tmp_path / "old", settings=TINY)
    old.folder.rename(tmp_path / "new")
    moved = build_world(tmp_path / "new", settings=TINY)
    for file in moved.tasks_path.iterdir():
        assert str(tmp_path / "new" / "documents") in file.read_text()


def test_other_peoples_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not a demo world"):
        build_world(tmp_path, settings=TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_world(tmp_path / "world", settings=TINY, progress=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change", [{"experts": ()}, {"experts": (ExpertSettings("juggle", 1, 1e-3),)}, {"documents": 0}]
)
def test_impossible_settings_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(UserError):
        WorldSettings(**change)  # type: ignore[arg-type]
