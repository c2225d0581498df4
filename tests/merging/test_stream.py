"""Recipe to files: complete, atomic, in the memory of a few tensors, and with the sources left alone."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge.checkpoints.layout import layout_of
from evomerge.checkpoints.source import Checkpoint
from evomerge.errors import CandidateError, SourceError, UserError
from evomerge.merging.merger import Merger
from evomerge.merging.stream import merged_config, open_sources, write_model
from tests.checkpoints.tiny import FAMILIES, make_llama, make_tokenizer
from tests.contracts.method import same_bits
from tests.merging.recipes import METHODS, by_identity, models, recipe_of, usual


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    return models(tmp_path_factory.mktemp("models"))


def content(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_file_holds_what_the_merger_makes(
    dtype: str | None, method: str, checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    recipe = usual(method, checkpoints, dtype=dtype)
    assert write_model(recipe, checkpoints, tmp_path / "out") == tmp_path / "out"
    written = Checkpoint.open(tmp_path / "out")
    layout = layout_of(checkpoints[recipe.reference.name])
    merger = Merger(by_identity(recipe, checkpoints), layout)
    assert written.tensors.keys() == layout.places.keys()
    for name in layout.places:
        assert same_bits(written.tensor(name), merger.merge(recipe, name))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == getattr(torch, dtype or "float32")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == (dtype or "float32")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_one_source_of_weight_one_is_that_model(model_type: str, tmp_path: Path) -> None:
    checkpoints = models(tmp_path, model_type, count=2)
    recipe = recipe_of("linear", checkpoints, {"a": {"weight": 1.0}, "b": {"weight": 0.0}})
    write_model(recipe, checkpoints, tmp_path / "out")
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("a", "out"))
    assert all(same_bits(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_sharded_sources_are_merged_like_single_files(tmp_path: Path) -> None:
    single = models(tmp_path / "single", count=2)
    sharded = models(tmp_path / "sharded", count=2, max_shard_size="9KB")
    assert len(sharded["a"].files) > 1
    for name, checkpoints in (("one", single), ("two", sharded)):
        write_model(usual("ties", checkpoints), checkpoints, tmp_path / name)
    assert content(tmp_path / "one")["tokenizer.json"] == content(tmp_path / "two")["tokenizer.json"]
    first, second = (Checkpoint.open(tmp_path / name) for name in ("one", "two"))
    assert first.tensors.keys() == second.tensors.keys()
    assert all(same_bits(first.tensor(name), second.tensor(name)) for name in first.tensors)


def test_same_recipe_writes_the_same_files(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    recipe = usual("dare_ties", checkpoints)
    for name in ("one", "two"):
        write_model(recipe, checkpoints, tmp_path / name)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_texts_are_written_beside_the_weights(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    recipe = usual("ties", checkpoints)
    texts = {"README.md": "# Märged\n", "evomerge.yaml": recipe.to_yaml()}
    out = write_model(recipe, checkpoints, tmp_path / "out", texts=texts)
    assert {name: (out / name).read_text("utf-8") for name in texts} == texts
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert {path.name for path in out.iterdir()} == {*expected, "tokenizer_config.json", *texts}


def test_progress_counts_the_bytes_written(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    out = write_model(
        usual("ties", checkpoints, dtype="bfloat16"),
        checkpoints,
        tmp_path / "out",
        progress=lambda done, total: calls.append((done, total)),
    )
    total = Checkpoint.open(out).nbytes
    assert {whole for _, whole in calls} == {total}
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert calls[-1] == (total, total)


class _FullError(Exception):
    pass


@pytest.mark.parametrize("after", [1, 7, 21])
def test_failure_leaves_nothing_behind(
    after: int, checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    count = 0

    def sink(done: int, total: int) -> None:
        nonlocal count
        count += 1
        if count == after:
            raise _FullError

    with pytest.raises(_FullError):
        write_model(usual("ties", checkpoints), checkpoints, tmp_path / "out", progress=sink)
    assert count == after
    assert list(tmp_path.iterdir()) == []


def test_recipe_without_a_merge_leaves_nothing_behind(
    checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    weights = {"a": {"weight": [{"match": "layers.1", "value": -1.0}, {"value": 1.0}]}}
    pair = {name: checkpoints[name] for name in ("a", "b")}
    with pytest.raises(CandidateError):
        write_model(recipe_of("linear", pair, weights), pair, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_target_that_exists_is_refused_before_any_work(
    kind: str, checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    target = tmp_path / "out"
    if kind == "folder":
        target.mkdir()
    elif kind == "file":
        target.write_text("mine")
    else:
        target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="exists already"):
        write_model(usual("ties", checkpoints), checkpoints, target, texts={"a/b": "would be an error"})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_tokenizer_is_that_of_the_named_source(tmp_path: Path) -> None:
    checkpoints = models(tmp_path, count=2)
    make_tokenizer(checkpoints["b"].path, extra=("<extra>",))
    (checkpoints["b"].path / "chat_template.jinja").write_text("{{ messages }}")
    checkpoints["b"] = Checkpoint.open(checkpoints["b"].path)
    for name, tokens in (("b", 1), (None, 0), ("a", 0)):
        out = write_model(usual("ties", checkpoints, tokenizer=name), checkpoints, tmp_path / f"out{name}")
        vocabulary = AutoTokenizer.from_pretrained(out).get_vocab()
        assert ("<extra>" in vocabulary) == bool(tokens)
        assert (out / "chat_template.jinja").exists() == bool(tokens)
        assert content(out)["tokenizer.json"] == content(checkpoints[name or "base"].path)["tokenizer.json"]


def test_sources_stay_as_they_are(tmp_path: Path) -> None:
    checkpoints = models(tmp_path)
    before = {name: content(checkpoint.path) for name, checkpoint in checkpoints.items()}
    write_model(usual("dare_ties", checkpoints), checkpoints, tmp_path / "out")
    assert {name: content(checkpoint.path) for name, checkpoint in checkpoints.items()} == before


def test_config_keeps_everything_but_the_dtype_and_where_it_lay(checkpoints: dict[str, Checkpoint]) -> None:
    config = {"model_type": "llama", "torch_dtype": "float32", "_name_or_path": "/home/me", "rope_theta": 1e4}
    recipe, layout = usual("linear", checkpoints), layout_of(checkpoints["a"])
    assert merged_config(config, recipe, layout) == {
        "model_type": "llama",
        "torch_dtype": "float32",
        "rope_theta": 1e4,
    }
    narrow = usual("linear", checkpoints, dtype="bfloat16")
    assert merged_config(config, narrow, layout) == {
        "model_type": "llama",
        "dtype": "bfloat16",
        "rope_theta": 1e4,
    }
    assert config["torch_dtype"] == "float32"


def test_tensor_of_integers_is_written_as_it_is(tmp_path: Path) -> None:
    single = Checkpoint.open(make_llama(tmp_path / "a"))
    path = single.path / "model.safetensors"
    steps = torch.tensor([2**40, 3])
    save_file({**load_file(path), "model.layers.0.mlp.steps": steps}, path, {"format": "pt"})
    checkpoints = {"a": Checkpoint.open(single.path)}
    out = write_model(recipe_of("linear", checkpoints, dtype="bfloat16"), checkpoints, tmp_path / "out")
    written = Checkpoint.open(out)
    assert same_bits(written.tensor("model.layers.0.mlp.steps"), steps)
    assert written.tensor("model.norm.weight").dtype == torch.bfloat16


def test_sources_of_a_recipe_are_opened_by_name(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    recipe = usual("ties", checkpoints)
    opened = open_sources(recipe)
    assert list(opened) == [ref.name for ref in recipe.refs] == ["base", "a", "b", "c"]
    assert opened["a"].path == checkpoints["a"].path


def test_source_of_a_relative_path_lies_beside_the_recipe(
    checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    recipe = usual("linear", checkpoints)
    folder = checkpoints["a"].path.parent
    sources = tuple(source.model_copy(update={"path": source.name}) for source in recipe.sources)
    relative = recipe.model_copy(update={"sources": sources})
    assert open_sources(relative, folder)["b"].path == checkpoints["b"].path
    with pytest.raises(SourceError):
        open_sources(relative, tmp_path)


@pytest.mark.parametrize("method", ["linear", "ties", "breadcrumbs", "dare_ties"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_source_with_a_value_that_is_no_number_is_named(
    bad: float, method: str, tmp_path: Path, checkpoints: dict[str, Checkpoint]
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    folder = make_llama(tmp_path / "bad", seed=9)
    tensors = load_file(folder / "model.safetensors")
    tensors[name][3, 5] = bad
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    pair = {"base": checkpoints["base"], "a": checkpoints["a"], "b": Checkpoint.open(folder)}
    with pytest.raises(SourceError, match=f'bad: tensor "{name}" holds NaN or infinity'):
        write_model(usual(method, pair), pair, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rule_for_no_tensor_is_told(tmp_path: Path, checkpoints: dict[str, Checkpoint]) -> None:
    rules = [{"match": "q_porj", "value": 0.1}, {"role": "mlp", "value": 0.2}, {"value": 0.3}]
    notices: list[str] = []
    recipe = recipe_of("linear", checkpoints, {"a": {"weight": rules}})
    write_model(recipe, checkpoints, tmp_path / "out", notice=notices.append)
    assert notices == ['sources.a.parameters.weight: no tensor is "q_porj"; this rule does nothing']


def test_merge_that_its_dtype_cannot_hold_is_refused(
    tmp_path: Path, checkpoints: dict[str, Checkpoint]
) -> None:
    huge = {name: {"weight": 1e6} for name in "ab"}
    recipe = recipe_of("linear", checkpoints, {**huge, "method": {"normalize": False}}, dtype="float16")
    with pytest.raises(CandidateError, match="exceed what float16 can hold"):
        write_model(recipe, checkpoints, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shards_are_as_small_as_asked_for(tmp_path: Path, checkpoints: dict[str, Checkpoint]) -> None:
    recipe = usual("linear", checkpoints)
    whole = write_model(recipe, checkpoints, tmp_path / "whole")
    parts = write_model(recipe, checkpoints, tmp_path / "parts", max_shard_bytes=8_000)
    assert len(list(parts.glob("model-*.safetensors"))) > 2
    first, second = Checkpoint.open(whole), Checkpoint.open(parts)
    assert all(same_bits(first.tensor(name), second.tensor(name)) for name in first.tensors)


def test_sources_that_do_not_fit_are_refused(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    other = Checkpoint.open(make_llama(tmp_path / "other", layers=3))
    recipe = usual("linear", {"a": checkpoints["a"], "b": other})
    with pytest.raises(SourceError, match="num_hidden_layers"):
        open_sources(recipe)


MEASURE = """
import sys, threading
from pathlib import Path
import torch
from evomerge.merging.stream import open_sources, write_model
from evomerge.recipe import parse_recipe, read_recipe

torch.set_num_threads(1)
recipe = read_recipe(Path(sys.argv[1]))
checkpoints = open_sources(recipe)

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

peak, done, ready = 0, threading.Event(), threading.Event()

def watch():
    global peak
    while not done.wait(0.0005):
        peak = max(peak, anonymous())
        ready.set()

write_model(recipe, checkpoints, Path(sys.argv[2] + "-warm"))  # compiles
watcher = threading.Thread(target=watch)
watcher.start()
ready.wait()
before = peak = anonymous()
write_model(recipe, checkpoints, Path(sys.argv[2]))
done.set()
watcher.join()
print((peak - before) * 1024)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """Three bfloat16 models of 72 MB, in 46 equal tensors."""
    folder, found = tmp_path_factory.mktemp("large"), {}
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(44)]
    for seed, name in enumerate(("base", "a", "b")):
        make_llama(folder / name, layers=44)
        generator = torch.Generator().manual_seed(seed)
        save_file(
            {
                key: torch.randn(768, 1024, generator=generator).bfloat16()
                for key in ("model.embed_tokens.weight", "lm_head.weight", *names)
            },
            folder / name / "model.safetensors",
            {"format": "pt"},
        )
        found[name] = Checkpoint.open(folder / name)
    return found


@pytest.mark.parametrize(
    ("method", "bytes_per_entry"), [("linear", 12), ("dare_ties", 12), ("ties", 24), ("della", 60)]
)
def test_memory_is_that_of_a_few_tensors(
    method: str, bytes_per_entry: int, large: dict[str, Checkpoint], tmp_path: Path
) -> None:
    entries = 768 * 1024
    assert sum(checkpoint.nbytes for checkpoint in large.values()) > 200e6
    (tmp_path / "recipe.yaml").write_text(usual(method, large).to_yaml())
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "recipe.yaml", tmp_path / "out"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "500000"},  # what is freed goes back at once
    )
    assert Checkpoint.open(tmp_path / "out").nbytes == 92 * entries
    assert int(run.stdout) < bytes_per_entry * entries, "a model has 92 bytes for each entry of a tensor"
