"""Writing checkpoints: as transformers writes them, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from evomerge.checkpoints.source import Checkpoint
from evomerge.checkpoints.vocabulary import TargetVocabulary
from evomerge.checkpoints.whole import partial_of
from evomerge.checkpoints.writer import Writer, check_target
from evomerge.errors import UserError
from tests.checkpoints.tiny import FAMILIES, make_llama, make_model

PLAN = [("a", "F32", (2, 3)), ("b", "BF16", (5,)), ("c", "F32", ()), ("d", "I64", (0, 4))]
TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.arange(5.0).bfloat16(),
    "c": torch.tensor(7.0),
    "d": torch.zeros(0, 4, dtype=torch.int64),
}


def plan_of(checkpoint: Checkpoint) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(info.name, info.dtype, info.shape) for info in checkpoint.tensors.values()]


def copy(checkpoint: Checkpoint, target: Path, **more: int) -> Path:
    with Writer(target, plan_of(checkpoint), **more) as writer:
        for name in checkpoint.tensors:
            writer.add(name, checkpoint.tensor(name))
        writer.add_json("config.json", checkpoint.config)
        TargetVocabulary(checkpoint).write(writer)
        return writer.commit()


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("limit", [2**30, 4_000], ids=["one", "shards"])
def test_copy_equals_the_original_and_loads(model_type: str, limit: int, tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", model_type)
    before = digests(source)
    original = Checkpoint.open(source)
    copied = Checkpoint.open(copy(original, tmp_path / "copy", max_shard_bytes=limit))
    assert (len(copied.files) > 1) == (limit < 2**30)
    assert set(copied.tensors) == set(original.tensors)
    assert all(torch.equal(original.tensor(name), copied.tensor(name)) for name in original.tensors)
    assert copied.tokenizer_fingerprint == original.tokenizer_fingerprint
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (source, tmp_path / "copy")]
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "copy")
    assert tokenizer.decode(tokenizer("abc 1+2")["input_ids"]) == "abc 1+2"
    assert digests(source) == before
    assert left(tmp_path) == ["copy", "source"]


def test_shards_are_named_and_indexed_as_transformers_does(tmp_path: Path) -> None:
    theirs = make_llama(tmp_path / "theirs", max_shard_size="9KB")
    ours = copy(Checkpoint.open(theirs), tmp_path / "ours", max_shard_bytes=9_000)
    name = "model.safetensors.index.json"
    a, b = (json.loads((folder / name).read_text()) for folder in (theirs, ours))
    assert a["metadata"] == b["metadata"]
    assert a["weight_map"].keys() == b["weight_map"].keys()
    assert (ours / name).read_text() == json.dumps(b, indent=2, sort_keys=True) + "\n"
    shards = sorted(set(b["weight_map"].values()))
    total = len(shards)
    assert shards == [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
    for shard in shards:
        tensors = load_file(ours / shard)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 9_000


@pytest.mark.parametrize("limit", [2**30, 1])
def test_mixed_dtypes_scalars_empty_tensors_in_any_order(tmp_path: Path, limit: int) -> None:
    with Writer(tmp_path / "out", PLAN, max_shard_bytes=limit, metadata={"format": "pt", "x": "y"}) as writer:
        for name in ("c", "d", "b", "a"):
            writer.add(name, TENSORS[name])
        writer.commit()
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == (1 if limit > 1 else 4)
    read = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(read[name], tensor)
        assert read[name].dtype == tensor.dtype


def test_non_contiguous_tensor_is_written_by_value(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).reshape(3, 2).T
    with Writer(tmp_path / "out", [("a", "F32", (2, 3))]) as writer:
        writer.add("a", tensor)
        writer.commit()
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["a"], tensor)


def test_leaving_without_commit_leaves_nothing(tmp_path: Path) -> None:
    with Writer(tmp_path / "out", PLAN) as writer:
        writer.add("a", TENSORS["a"])
        assert left(tmp_path) == [partial_of(tmp_path / "out").name]
    assert left(tmp_path) == []
    with pytest.raises(ValueError, match="not in the plan"), Writer(tmp_path / "out", PLAN) as writer:
        writer.add("z", TENSORS["a"])
    assert left(tmp_path) == []


def test_remains_of_a_dead_process_are_replaced(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    own, other = partial_of(tmp_path / "out"), partial_of(tmp_path / "else")
    stale = own.with_name(own.name.replace(str(os.getpid()), str(dead.pid)))
    alive = own.with_name(own.name.replace(str(os.getpid()), str(os.getppid())))
    for folder in (own, stale, alive, other):
        folder.mkdir()
        (folder / "junk").write_text("x")
    with Writer(tmp_path / "out", []) as writer:
        writer.add_text("a.txt", "ä")
        writer.commit()
    assert left(tmp_path / "out") == ["a.txt"]
    assert set(left(tmp_path)) == {"out", alive.name, other.name}


def test_misuse_is_a_value_error(tmp_path: Path) -> None:
    for plan in ([PLAN[0], PLAN[0]], [("a", "F4", (2,))]):
        with pytest.raises(ValueError, match="twice"):
            Writer(tmp_path / "out", plan)
    with Writer(tmp_path / "out", PLAN) as writer:
        writer.add("a", TENSORS["a"])
        with pytest.raises(ValueError, match="added before"):
            writer.add("a", TENSORS["a"])
        with pytest.raises(ValueError, match="not in the plan"):
            writer.add("z", TENSORS["a"])
        for wrong in (torch.zeros(5), torch.zeros(4).bfloat16()):
            with pytest.raises(ValueError, match="planned BF16"):
                writer.add("b", wrong)
        with pytest.raises(ValueError, match="3 planned tensors"):
            writer.commit()
        for name in ("../x", "a/b", "/x", "", "model.safetensors", ".."):
            with pytest.raises(ValueError, match="path or is taken"):
                writer.add_text(name, "")
        writer.add_json("x.json", {})
        with pytest.raises(ValueError, match="taken"):
            writer.add_json("x.json", {})
    assert left(tmp_path) == []


def test_target_must_be_new_and_makeable(tmp_path: Path) -> None:
    check_target(tmp_path / "new")
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to("nothing")
    for name in ("file", "folder", "dangling"):
        with pytest.raises(UserError, match="exists already"):
            check_target(tmp_path / name)
    for name in ("no/x", "file/x"):
        with pytest.raises(UserError, match="does not exist"):
            check_target(tmp_path / name)
    with pytest.raises(UserError, match="cannot be written"):
        Writer(tmp_path / ("x" * 250), [])


def test_parent_that_is_not_writable_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(UserError, match="not writable"):
        check_target(tmp_path / "new")


def test_target_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    with Writer(tmp_path / "out", []) as writer:
        (tmp_path / "out").mkdir()
        with pytest.raises(UserError, match="exists already"):
            writer.commit()
    assert left(tmp_path) == ["out"]


def test_too_little_space_is_found_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")(100, 60, 40)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"40 are free.*free some space"):
        Writer(tmp_path / "out", PLAN)
    assert left(tmp_path) == []


CODE = """
import resource, sys, torch
from pathlib import Path
from evomerge.checkpoints.writer import Writer
from evomerge.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))
try:
    with Writer(Path(sys.argv[1]), [(str(n), "F32", (2**18,)) for n in range(8)]) as writer:
        for n in range(8):
            writer.add(str(n), torch.zeros(2**18))
        writer.commit()
except UserError as error:
    print(error)
"""


def test_disk_that_fills_up_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", CODE, tmp_path / "out"], capture_output=True, text=True, check=True
    )
    assert "cannot be written" in run.stdout
    assert "free some space" in run.stdout
    assert run.stdout.count("\n") == 1
    assert left(tmp_path) == []


def test_memory_is_one_tensor(tmp_path: Path) -> None:
    plan = [(str(number), "F32", (2**20,)) for number in range(64)]
    tensor = torch.ones(2**20)
    with Writer(tmp_path / "out", plan) as writer:
        writer.add("0", tensor)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for name, _, _ in plan[1:]:
            writer.add(name, tensor)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 16 * 1024  # KiB; 252 MiB were written


def test_only_tokenizer_files_are_copied(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "source")
    extra = {"chat_template.jinja", "vocab.json", "merges.txt", "tokenizer.model", "special_tokens_map.json"}
    for name in (*extra, "training_args.bin", "README.md", "optimizer.pt", "notes.txt"):
        (source / name).write_text(name)
    with Writer(tmp_path / "out", []) as writer:
        TargetVocabulary(Checkpoint.open(source)).write(writer)
        writer.commit()
    assert set(left(tmp_path / "out")) == extra | {"tokenizer.json", "tokenizer_config.json"}
