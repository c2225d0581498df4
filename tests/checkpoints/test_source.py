"""Opening checkpoints: sound ones, broken ones, fingerprints, where they lie."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from evomerge.checkpoints import fingerprint as fingerprint_module
from evomerge.checkpoints.header import read_header
from evomerge.checkpoints.source import Checkpoint, resolve
from evomerge.errors import SourceError
from tests.checkpoints.broken import BROKEN
from tests.checkpoints.tiny import edit_json, make_llama, make_model, make_tokenizer


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "evomerge" / "fingerprints.json"


def content(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def refused(call: Callable[[], Any], part: str = "") -> str:
    with pytest.raises(SourceError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert message.isprintable()
    assert len(message) < 900
    assert part in message
    return message


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoint_is_refused_in_one_line(case: str, copy: Path) -> None:
    change, part = BROKEN[case]
    change(copy)
    started = time.perf_counter()
    refused(lambda: Checkpoint.open(copy), part)
    assert time.perf_counter() - started < 1


def test_open_reads_names_shapes_and_values(llama: Path) -> None:
    before = content(llama)
    checkpoint = Checkpoint.open(llama)
    assert list(checkpoint.tensors) == sorted(checkpoint.tensors)
    with safe_open(llama / "model.safetensors", "pt") as stored:
        assert set(stored.keys()) == set(checkpoint.tensors)
        for name, info in checkpoint.tensors.items():
            tensor = checkpoint.tensor(name)
            assert torch.equal(tensor, stored.get_tensor(name))
            assert tuple(tensor.shape) == info.shape
            assert tensor.nbytes == info.nbytes
            tensor.zero_()  # the mapping is private
    assert checkpoint.num_parameters == 6736
    assert checkpoint.nbytes == 4 * 6736
    assert checkpoint.torch_dtype == "float32"
    assert checkpoint.ignored == ()
    checkpoint.scan_finite()
    assert content(llama) == before


def test_tensor_is_a_view_of_the_mapped_file(llama: Path) -> None:
    checkpoint = Checkpoint.open(llama)
    name = next(iter(checkpoint.tensors))
    assert checkpoint.tensor(name).data_ptr() == checkpoint.tensor(name).data_ptr()


def test_shards_are_one_checkpoint(llama: Path, tmp_path: Path) -> None:
    sharded = make_llama(tmp_path / "sharded", max_shard_size="10KB")
    one, many = Checkpoint.open(llama), Checkpoint.open(sharded)
    assert len(many.files) > 2
    assert set(one.tensors) == set(many.tensors)
    assert [info.file for info in many.tensors.values()] == sorted(
        info.file for info in many.tensors.values()
    )
    assert all(torch.equal(one.tensor(name), many.tensor(name)) for name in one.tensors)
    assert one.tokenizer_fingerprint == many.tokenizer_fingerprint


def test_pickled_checkpoint_reads_in_another_process(llama: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(llama)
    checkpoint.tensor("model.norm.weight")
    (tmp_path / "pickle").write_bytes(pickle.dumps(checkpoint))
    code = "import pickle, sys; c = pickle.load(open(sys.argv[1], 'rb'))\n"
    code += "print(c.tensor('model.norm.weight').sum().item())"
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "pickle"], capture_output=True, text=True, check=True
    )
    assert float(run.stdout) == checkpoint.tensor("model.norm.weight").sum().item()


def test_opening_loads_no_torch(llama: Path) -> None:
    code = (
        "import sys; from evomerge.checkpoints.layout import layout_of, check_compatible\n"
        "from evomerge.checkpoints.source import Checkpoint, resolve; import evomerge.checkpoints.card\n"
        "c = Checkpoint.open(resolve(sys.argv[1])); layout_of(c); check_compatible({'a': c})\n"
        "assert not {'torch', 'transformers', 'safetensors', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, llama], check=True)


def test_changed_file_and_unknown_tensor_are_refused(copy: Path) -> None:
    checkpoint = Checkpoint.open(copy)
    refused(lambda: checkpoint.tensor("nothing"), "'nothing'")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    refused(lambda: checkpoint.tensor("model.norm.weight"), "changed")
    weights.unlink()
    refused(lambda: checkpoint.tensor("model.norm.weight"), "gone")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scan_names_the_tensor_that_is_not_finite(copy: Path, dtype: torch.dtype, value: float) -> None:
    checkpoint = Checkpoint.open(copy)
    tensors = {name: checkpoint.tensor(name).to(dtype) for name in checkpoint.tensors}
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    refused(Checkpoint.open(copy).scan_finite, "model.layers.1.mlp.up_proj.weight")


def test_buffers_of_old_versions_are_left_out(copy: Path) -> None:
    checkpoint = Checkpoint.open(copy)
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
    }
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.tensors} | extra
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    again = Checkpoint.open(copy)
    assert set(again.ignored) == set(extra)
    assert again.num_parameters == checkpoint.num_parameters


@pytest.mark.parametrize("stated", [True, None])
def test_stored_head_of_a_tied_model_is_left_out_but_must_agree(tmp_path: Path, stated: bool | None) -> None:
    folder = make_model(tmp_path / "model", "gemma2")
    edit_json(folder / "config.json", tie_word_embeddings=stated)
    checkpoint = Checkpoint.open(folder)
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.tensors}
    head = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
    again = Checkpoint.open(folder)
    assert again.ignored == ("lm_head.weight",)
    assert list(again.tensors) == list(checkpoint.tensors)
    again.scan_finite()
    save_file({**tensors, "lm_head.weight": head + 1}, folder / "model.safetensors", {"format": "pt"})
    refused(Checkpoint.open(folder).scan_finite, "ties the head")


# Fingerprints


def test_fingerprint_follows_content_and_not_place(llama: Path, copy: Path) -> None:
    first = Checkpoint.open(llama).fingerprint
    assert len(first) == 64
    assert Checkpoint.open(copy).fingerprint == first
    (copy / "README.md").write_text("hello")
    assert Checkpoint.open(copy).fingerprint == first
    edit_json(copy / "config.json", rms_norm_eps=0.5)
    assert Checkpoint.open(copy).fingerprint != first


def test_tokenizer_fingerprint_is_the_vocabulary(llama: Path, copy: Path, tmp_path: Path) -> None:
    first = Checkpoint.open(llama).tokenizer_fingerprint
    data = json.loads((copy / "tokenizer.json").read_text())
    (copy / "tokenizer.json").write_text(json.dumps(dict(reversed(data.items())), indent=7))
    edit_json(copy / "tokenizer_config.json", model_max_length=3)
    assert Checkpoint.open(copy).tokenizer_fingerprint == first
    make_tokenizer(copy, extra=("<new>",))
    assert Checkpoint.open(copy).tokenizer_fingerprint != first
    (copy / "tokenizer.json").write_text('{"model": {"type": "Unigram", "vocab": [["a", 0.0], ["b", -1.0]]}}')
    unigram = Checkpoint.open(copy).tokenizer_fingerprint
    (copy / "tokenizer.json").write_text('{"model": {"vocab": {"b": 1, "a": 0}}}')
    assert Checkpoint.open(copy).tokenizer_fingerprint == unigram
    (copy / "tokenizer.json").unlink()
    assert Checkpoint.open(copy).tokenizer_fingerprint == ""
    (copy / "tokenizer.model").write_bytes(b"\x0a\x01")
    assert len(Checkpoint.open(copy).tokenizer_fingerprint) == 64


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"model": {"vocab": 3}}', '{"model": {"vocab": {"a": "x"}}}']
)
def test_broken_tokenizer_is_refused(copy: Path, text: str) -> None:
    (copy / "tokenizer.json").write_text(text)
    refused(lambda: Checkpoint.open(copy).tokenizer_fingerprint, "tokenizer.json")


def test_fingerprints_are_remembered(copy: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint_module, "_CACHED_FROM", 0)
    for path in copy.iterdir():
        path.touch()
    fresh = Checkpoint.open(copy).fingerprint
    assert not cache.exists()  # a file that has just been written may change again
    for path in copy.iterdir():
        os.utime(path, ns=(10**18, 10**18))
    assert Checkpoint.open(copy).fingerprint == fresh
    assert Checkpoint.open(copy).tokenizer_fingerprint
    remembered = json.loads(cache.read_text())
    assert {key.split("|")[0] for key in remembered} == {"content", "vocabulary"}
    weights = next(key for key in remembered if "model.safetensors" in key)
    cache.write_text(json.dumps({**remembered, weights: "0" * 64}))
    assert Checkpoint.open(copy).fingerprint != fresh  # taken from the cache
    os.utime(copy / "model.safetensors", ns=(10**18 + 1, 10**18 + 1))
    assert Checkpoint.open(copy).fingerprint == fresh  # another time: hashed again
    assert not list(cache.parent.glob(".fingerprints-*"))


@pytest.mark.parametrize("damage", ["{", "[]", '{"a": 1}', ""])
def test_damaged_or_unwritable_cache_is_ignored(
    copy: Path, cache: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint_module, "_CACHED_FROM", 0)
    expected = Checkpoint.open(copy).fingerprint
    for path in copy.iterdir():
        os.utime(path, ns=(10**18, 10**18))
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text(damage)
    assert Checkpoint.open(copy).fingerprint == expected
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))  # a file: no folder can be made under it
    assert Checkpoint.open(copy).fingerprint == expected


# Places


def test_hub_cache_links_are_followed(copy: Path, tmp_path: Path) -> None:
    """Both layouts: blobs of the repository, and blobs shared by the whole cache."""
    repository = tmp_path / "hub" / "models--a--b"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(copy.iterdir())):
        blobs = repository / "blobs" if number % 2 else tmp_path / "hub" / "blobs" / "ab"
        blobs.mkdir(parents=True, exist_ok=True)
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / path.name, snapshot))
    (tmp_path / "link").symlink_to(snapshot)
    checkpoint = Checkpoint.open(tmp_path / "link")
    checkpoint.scan_finite()
    assert checkpoint.fingerprint
    elsewhere = repository / "elsewhere.json"
    elsewhere.write_text("{}")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(elsewhere)
    refused(lambda: Checkpoint.open(snapshot), "symlink out of")


def test_resolve_finds_folders(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy.parent)
    assert resolve("model") == resolve("./model") == resolve(str(copy)) == copy
    monkeypatch.chdir("/")
    assert resolve("model", base_dir=copy.parent) == copy
    refused(lambda: resolve(str(copy), "main"), "revision")


@pytest.mark.parametrize(
    "location", ["./no-such-x", "../no-such-x", "/no/x", "~/no-such-x", "a/b/c", "", "a\0b", "a\\b"]
)
def test_paths_are_never_taken_for_hub_ids(location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    refused(lambda: resolve(location))


@pytest.mark.parametrize("location", ["owner/no-such-model", "no-such-model", "bad id!", "-a/--b"])
def test_what_the_hub_lacks_is_refused(location: str, tmp_path: Path) -> None:
    message = refused(lambda: resolve(location, "v1", base_dir=tmp_path), str(tmp_path))
    assert "Hugging Face hub at revision v1" in message


def test_hub_is_asked_for_safe_files_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda name, **more: seen.update(more, name=name) or str(tmp_path),
    )
    assert resolve("owner/model", "abc") == tmp_path
    assert (seen["name"], seen["revision"]) == ("owner/model", "abc")
    assert not any(pattern.endswith((".bin", ".pt", ".py", "*")) for pattern in seen["allow_patterns"])


def test_cached_hub_model_is_found_offline(copy: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "home" / "hub" / "models--owner--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(copy, repository / "snapshots" / commit)
    code = "import sys; from evomerge.checkpoints.source import resolve\n"
    code += "print(resolve('owner/model', sys.argv[1]))"
    for revision in ("main", commit):
        run = subprocess.run(
            [sys.executable, "-c", code, revision],
            env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert Path(run.stdout.strip()) == repository / "snapshots" / commit


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    refused(lambda: Checkpoint.open(tmp_path / "no\nsuch\x1b[31m"), "no such checkpoint folder")


# Mutations

MANY = settings(
    max_examples=300,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@MANY
@given(data=st.data())
def test_mutated_header_gives_source_error_or_success(
    llama: Path, tmp_path: Path, data: st.DataObject
) -> None:
    raw = bytearray((llama / "model.safetensors").read_bytes())
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, end - 1))
        piece = data.draw(
            st.one_of(st.binary(max_size=4), st.sampled_from([b'"', b"{", b"[", b"9", b"-", b"1e9"]))
        )
        raw[where : where + data.draw(st.integers(0, 4))] = piece
    path = tmp_path / "mutated.safetensors"
    path.write_bytes(raw)
    _opens_or_is_refused(path)


_SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-3, 2**65), st.floats(), st.text(max_size=3))
_VALUES = st.recursive(_SCALARS, lambda inner: st.lists(inner, max_size=3), max_leaves=5)
_ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.one_of(st.sampled_from(["F32", "BF16", "F4", "BOOL", "F6_E2M3", "C64", "x"]), _VALUES),
        "shape": st.one_of(st.lists(st.integers(0, 5), max_size=9), _VALUES),
        "data_offsets": st.one_of(st.lists(st.integers(0, 64), min_size=2, max_size=2), _VALUES),
        "extra": _VALUES,
    },
)


@MANY
@given(
    header=st.dictionaries(st.text(max_size=5), st.one_of(_ENTRIES, _VALUES), max_size=4),
    data=st.binary(max_size=64),
)
def test_invented_header_gives_source_error_or_success(tmp_path: Path, header: Any, data: bytes) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "invented.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    _opens_or_is_refused(path)


def _opens_or_is_refused(path: Path) -> None:
    try:
        infos = read_header(path)
    except SourceError:
        return
    with safe_open(path, "pt") as stored:  # what we accept, the library accepts
        assert set(stored.keys()) == {info.name for info in infos}
