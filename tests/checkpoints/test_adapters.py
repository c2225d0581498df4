"""LoRA adapters as sources: the same weights as peft's merge_and_unload, and everything else refused."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from evomerge.checkpoints.adapters import CONFIG, WEIGHTS, Adapter, is_adapter, write_adapter
from evomerge.checkpoints.opening import AdaptedCheckpoint, located, open_adapters, open_checkpoint
from evomerge.checkpoints.source import Checkpoint
from evomerge.errors import SourceError, UserError
from tests.checkpoints.tiny import edit_json, make_llama, make_model

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"]}),
    "rslora": ("llama", {"r": 4, "lora_alpha": 12, "use_rslora": True, "target_modules": "all-linear"}),
    "patterns": (
        "llama",
        {
            "r": 4,
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, "^model.layers.0.mlp.up_proj": 3},
            "alpha_pattern": {"v_proj": 32, ".*up_proj": 5},
        },
    ),
    "some layers": ("llama", {"r": 2, "target_modules": ["k_proj"], "layers_to_transform": [1]}),
    "dora": ("llama", {"r": 4, "use_dora": True, "target_modules": ["q_proj", "gate_proj"]}),
    "embedding": ("llama", {"r": 4, "lora_alpha": 6, "target_modules": ["embed_tokens", "o_proj"]}),
    "embedding of dora": ("llama", {"r": 4, "use_dora": True, "target_modules": ["embed_tokens"]}),
    "head": ("llama", {"r": 4, "target_modules": ["lm_head"]}),
    "saved modules": (
        "llama",
        {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "input_layernorm"]},
    ),
    "biases": ("qwen2", {"r": 4, "target_modules": ["q_proj", "down_proj"], "bias": "all"}),
    "lora bias": ("qwen2", {"r": 4, "lora_alpha": 9, "target_modules": ["q_proj"], "lora_bias": True}),
    "transposed": ("gpt2", {"r": 4, "fan_in_fan_out": True, "target_modules": ["c_attn", "c_proj"]}),
    "transposed dora": ("gpt2", {"r": 2, "use_dora": True, "target_modules": ["c_attn", "c_proj", "c_fc"]}),
}


def make_adapter(base: Path, folder: Path, seed: int = 0, **settings: Any) -> Path:
    """Save an adapter on a base whose every trained tensor is random, and return its folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **settings)
        )
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder)
    return folder


def merged_by_peft(base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Return the state dict that peft's own merging gives."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), str(adapter))
    merged: dict[str, torch.Tensor] = model.merge_and_unload().state_dict()
    return merged


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {
        "llama": make_llama(root / "llama", hidden=24),
        "qwen2": make_model(root / "qwen2", "qwen2", hidden=24),
        "gpt2": make_model(
            root / "gpt2", "gpt2", hidden=24, config={"n_embd": 24, "n_layer": 2, "n_head": 2}
        ),
    }


@pytest.fixture(scope="module")
def plain(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(bases["llama"], tmp_path_factory.mktemp("plain") / "a", **SETTINGS["plain"][1])


@pytest.fixture
def copy(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "adapter"))


def refused(call: Callable[[], Any], *parts: str) -> None:
    with pytest.raises(SourceError) as caught:
        call()
    message = str(caught.value)
    assert message.isprintable()
    for part in parts:
        assert part in message


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", SETTINGS)
def test_weights_are_those_of_peft(case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    kind, settings = SETTINGS[case]
    folder = make_adapter(bases[kind], tmp_path / "adapter", **settings)
    opened = open_checkpoint(str(folder))
    assert isinstance(opened, AdaptedCheckpoint)
    expected = merged_by_peft(bases[kind], folder)
    base = Checkpoint.open(bases[kind])
    changed = 0
    for name, info in opened.tensors.items():
        tensor = opened.tensor(name)
        assert tuple(tensor.shape) == info.shape
        torch.testing.assert_close(tensor, expected[name], rtol=2e-6, atol=1e-6)
        changed += not torch.equal(tensor, base.tensor(name))
        assert opened.is_stored(name) == (opened.tensor(name).data_ptr() == opened.tensor(name).data_ptr())
    assert changed > 0
    opened.scan_finite()
    again = pickle.loads(pickle.dumps(opened))
    assert all(torch.equal(again.tensor(name), opened.tensor(name)) for name in opened.tensors)
    assert again.fingerprint == opened.fingerprint


def test_delta_is_exact_float32_on_a_bfloat16_base(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base", dtype=torch.bfloat16)
    folder = make_adapter(base, tmp_path / "adapter", r=4, target_modules=["q_proj"])
    opened = open_checkpoint(str(folder))
    stored = load_file(folder / WEIGHTS)
    name = "model.layers.0.self_attn.q_proj"
    up, down = (stored[f"base_model.model.{name}.lora_{letter}.weight"].double() for letter in "BA")
    exact = Checkpoint.open(base).tensor(f"{name}.weight").double() + 8 / 4 * up @ down
    assert opened.tensor(f"{name}.weight").dtype == torch.float32
    assert torch.equal(opened.tensor(f"{name}.weight"), exact.float())
    assert opened.tensors[f"{name}.weight"].dtype == "BF16"
    assert opened.torch_dtype == "bfloat16"


def test_untouched_tensors_are_views_of_the_base(bases: dict[str, Path], plain: Path) -> None:
    base = Checkpoint.open(bases["llama"])
    opened = AdaptedCheckpoint(base, Adapter.open(plain))
    touched = {name for name in opened.tensors if not opened.is_stored(name)}
    assert touched == {name for name in opened.tensors if "q_proj" in name or "down_proj" in name}
    for name in set(opened.tensors) - touched:
        assert opened.tensor(name).data_ptr() == base.tensor(name).data_ptr()
    assert not opened.is_stored("no such tensor")
    assert opened.tokenizer_fingerprint == base.tokenizer_fingerprint


def test_threads_change_no_digit(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = make_adapter(
        bases["llama"], tmp_path / "a", r=8, use_dora=True, target_modules=["embed_tokens", "up_proj"]
    )
    opened = open_checkpoint(str(folder))
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append({name: opened.tensor(name) for name in opened.tensors})
    torch.set_num_threads(threads)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_fingerprint_covers_base_and_adapter(
    bases: dict[str, Path], plain: Path, copy: Path, tmp_path: Path
) -> None:
    llama = bases["llama"]
    other = make_llama(tmp_path / "other", seed=1, hidden=24)
    first = open_checkpoint(f"{llama}+{plain}").fingerprint
    assert open_checkpoint(f"{llama}+{copy}").fingerprint == first
    edit_json(copy / CONFIG, lora_alpha=13)
    prints = {
        first,
        open_checkpoint(f"{llama}+{copy}").fingerprint,
        open_checkpoint(f"{other}+{plain}").fingerprint,
    }
    assert len(prints | {Checkpoint.open(llama).fingerprint}) == 4


def test_base_is_found_by_location_or_by_the_config(
    bases: dict[str, Path], copy: Path, tmp_path: Path
) -> None:
    llama = bases["llama"]
    assert not isinstance(open_checkpoint(str(llama)), AdaptedCheckpoint)
    (tmp_path / "base+1").symlink_to(llama)
    edit_json(copy / CONFIG, base_model_name_or_path="../base+1")
    opened = open_checkpoint("adapter", base_dir=tmp_path)
    assert opened.path == llama.resolve()
    assert open_checkpoint("base+1+adapter", base_dir=tmp_path).fingerprint == opened.fingerprint
    assert open_checkpoint("base+1", base_dir=tmp_path).path == llama.resolve()
    absolute = located("base+1+adapter", tmp_path)
    assert absolute == f"{llama.resolve()}+{copy}"
    assert open_checkpoint(absolute).fingerprint == opened.fingerprint
    assert located("owner/name+owner/adapter", tmp_path) == "owner/name+owner/adapter"


def test_adapters_stack(bases: dict[str, Path], plain: Path, tmp_path: Path) -> None:
    second = make_adapter(bases["llama"], tmp_path / "b", seed=1, r=2, target_modules=["q_proj"])
    once, both = open_checkpoint(str(plain)), open_checkpoint(f"{bases['llama']}+{plain}+{second}")
    alone, base = open_checkpoint(str(second)), Checkpoint.open(bases["llama"])
    for name in base.tensors:
        expected = once.tensor(name).double() + alone.tensor(name).double() - base.tensor(name).double()
        torch.testing.assert_close(both.tensor(name).double(), expected, rtol=1e-6, atol=1e-6)


def test_no_base_is_refused(bases: dict[str, Path], copy: Path, tmp_path: Path) -> None:
    edit_json(copy / CONFIG, base_model_name_or_path=None)
    refused(lambda: open_checkpoint(str(copy)), "names no base", "BASE+ADAPTER")
    edit_json(copy / CONFIG, base_model_name_or_path="./gone")
    refused(lambda: open_checkpoint(str(copy)), "gone", "BASE+ADAPTER")
    llama = bases["llama"]
    refused(lambda: open_checkpoint(f"{llama}+{llama}"), "expected an adapter")


def test_another_base_is_refused(bases: dict[str, Path], plain: Path, tmp_path: Path) -> None:
    wide = make_llama(tmp_path / "wide", hidden=32)
    refused(
        lambda: open_checkpoint(f"{wide}+{plain}"), "of shape", "(24, 48)", "(32, 64)", str(bases["llama"])
    )
    flat = make_llama(tmp_path / "flat", hidden=24, layers=1)
    refused(lambda: open_checkpoint(f"{flat}+{plain}"), "layers.1", "no tensor of that name")
    tied = make_llama(tmp_path / "tied", hidden=24, config={"tie_word_embeddings": True})
    head = make_adapter(bases["llama"], tmp_path / "head", **SETTINGS["head"][1])
    refused(lambda: open_checkpoint(f"{tied}+{head}"), "lm_head", "ties its head")
    edit_json(tied / "config.json", quantization_config={"bits": 4})
    refused(lambda: open_checkpoint(f"{tied}+{plain}"), "quantised")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"peft_type": "LOKR"}, "LOKR"),
        ({"peft_type": "VERA"}, "VERA"),
        ({"target_parameters": ["experts.down"]}, "target_parameters"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"use_qalora": True}, "use_qalora"),
        ({"some_new_variant": {"x": 1}}, "some_new_variant"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"use_dora": True}, "magnitude"),
        ({"r": 3}, "rank 3"),
        ({"r": "4"}, "positive integer"),
        ({"r": True}, "positive integer"),
        ({"lora_alpha": "x"}, "lora_alpha"),
        ({"lora_alpha": 10**400, "use_rslora": True}, "lora_alpha"),
        ({"r": 10**400}, "positive integer"),
        ({"init_lora_weights": {"a": []}}, "init_lora_weights"),
        ({"rank_pattern": [1]}, "rank_pattern"),
        ({"rank_pattern": {"(": 1}}, "rank_pattern"),
        ({"alpha_pattern": {"(a+)+b": 1}}, "too involved"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path"),
    ],
)
def test_other_settings_are_refused_by_name(changes: dict[str, Any], part: str, copy: Path) -> None:
    edit_json(copy / CONFIG, **changes)
    refused(lambda: Adapter.open(copy), part)


def test_loha_by_peft_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(bases["llama"]), LoHaConfig(r=2, target_modules=["q_proj"])
    )
    model.save_pretrained(tmp_path / "loha")
    refused(lambda: open_checkpoint(str(tmp_path / "loha")), "LOHA")


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda stored: stored.pop(f"{Q}.lora_A.weight"), "factor A is missing"),
        (lambda stored: stored.pop(f"{Q}.lora_B.weight"), "factor B is missing"),
        (lambda stored: stored.update({f"{Q}.lora_E": torch.ones(1)}), "lora_E"),
        (lambda stored: stored.update({f"{Q}.lora_B.weight": torch.ones(24, 5)}), "expected matrices"),
        (lambda stored: stored.update({f"{Q}.lora_B.bias": torch.ones(5)}), "expected 24 values"),
        (lambda stored: stored.update({f"{Q}.lora_A.weight": torch.ones(4, 24).int()}), "I32"),
        (lambda stored: stored.update({f"{Q}.lora_embedding_A": torch.ones(4, 24)}), "factor B is missing"),
        (
            lambda stored: stored.update(
                {f"{Q}.lora_embedding_A": torch.ones(4, 24), f"{Q}.lora_embedding_B": torch.ones(24, 4)}
            ),
            "of an embedding and of a linear",
        ),
        (lambda stored: stored.clear(), "no tensor"),
    ],
)
def test_broken_weights_are_refused(change: Callable[[dict[str, Any]], Any], part: str, copy: Path) -> None:
    stored = load_file(copy / WEIGHTS)
    change(stored)
    save_file(stored, copy / WEIGHTS)
    refused(lambda: Adapter.open(copy), part)


def test_non_finite_adapter_is_found(copy: Path) -> None:
    stored = load_file(copy / WEIGHTS)
    stored[f"{Q}.lora_B.weight"][0, 0] = float("nan")
    save_file(stored, copy / WEIGHTS)
    refused(open_checkpoint(str(copy)).scan_finite, "layers.0.self_attn.q_proj.weight", "NaN")


def test_changed_and_pickled_adapters_are_refused(copy: Path) -> None:
    opened = open_checkpoint(str(copy))
    save_file({"x": torch.ones(1)}, copy / WEIGHTS)
    refused(lambda: opened.tensor("model.layers.0.self_attn.q_proj.weight"), "changed or gone")
    (copy / WEIGHTS).rename(copy / "adapter_model.bin")
    refused(lambda: Adapter.open(copy), "pickled")


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"use_dora": True}, "DoRA's magnitude"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight"),
    ],
)
def test_more_than_a_low_rank_delta_is_not_merged_with_others(
    settings: dict[str, Any], part: str, bases: dict[str, Path], plain: Path, tmp_path: Path
) -> None:
    folder = make_adapter(bases["llama"], tmp_path / "a", r=2, target_modules=["q_proj"], **settings)
    refused(lambda: open_adapters([(str(plain), None), (str(folder), None)], tmp_path), part)


def test_adapters_to_be_merged_must_fit(bases: dict[str, Path], plain: Path, tmp_path: Path) -> None:
    make_adapter(make_llama(tmp_path / "wide", hidden=32), tmp_path / "w", r=2, target_modules=["q_proj"])
    refused(lambda: open_adapters([(str(plain), None), ("w", None)], tmp_path), "(32, 32)", "(24, 24)")
    refused(lambda: open_adapters([("wide", None)], tmp_path), "expected an adapter")
    refused(lambda: open_adapters([("x/y/z", None)], tmp_path), "no such folder")


def test_row_of_zeros_stays_zero_with_dora(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = make_adapter(bases["llama"], tmp_path / "a", r=2, use_dora=True, target_modules=["q_proj"])
    base = Path(shutil.copytree(bases["llama"], tmp_path / "base"))
    weights = load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    weights[f"{name}.weight"][3] = 0.0
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    stored = load_file(folder / WEIGHTS)
    stored[f"{Q}.lora_B.weight"][3] = 0.0
    save_file(stored, folder / WEIGHTS)
    row = open_checkpoint(f"{base}+{folder}").tensor(f"{name}.weight")[3]
    assert torch.equal(row, torch.zeros(24))


def test_written_adapter_is_whole_or_absent(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    tensors = {"m.lora_A.weight": torch.ones(1, 2), "m.lora_B.weight": torch.ones(3, 1)}
    made = write_adapter(tmp_path / "made", config, tensors)
    assert is_adapter(made)
    assert Adapter.open(made).targets["m"].shape == (3, 2)
    assert json.loads((made / CONFIG).read_text()) == config
    with pytest.raises(UserError, match="exists already"):
        write_adapter(made, config, tensors)
    with pytest.raises(UserError, match="parent folder"):
        write_adapter(tmp_path / "gone" / "made", config, tensors)
    with pytest.raises(TypeError):
        write_adapter(tmp_path / "bad", {"r": object()}, tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
