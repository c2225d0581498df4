"""What is said of sources before a merge: drift, locked models, other initialisations."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from evomerge.checkpoints.source import Checkpoint
from evomerge.errors import SourceError
from evomerge.merging.inspection import check_sources, inspect_sources
from tests.checkpoints.tiny import make_model
from tests.e2e.world import evomerge

SIZES = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
FILE = "model.safetensors"


def made(folder: Path, family: str = "llama", seed: int = 0) -> Path:
    return make_model(folder, family, seed=seed, hidden=32, layers=2, config=SIZES)


def changed(source: Path, target: Path, tensors: dict[str, Tensor]) -> Checkpoint:
    shutil.copytree(source, target)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, target / FILE, {"format": "pt"}
    )
    return Checkpoint.open(target)


def tuned(source: Path, target: Path, size: float = 0.02, seed: int = 1) -> Checkpoint:
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(source / FILE)
    for name, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=generator)
        tensors[name] = tensor + size * tensor.norm() / max(1.0, tensor.numel() ** 0.5) * noise
    return changed(source, target, tensors)


def locked(source: Path, target: Path) -> Checkpoint:
    """Put invertible matrices between the factors of every kv group; the model stays what it is."""
    generator = torch.Generator().manual_seed(5)
    tensors = {name: tensor.double() for name, tensor in load_file(source / FILE).items()}
    size, groups, shared = 8, 2, 2
    for layer in range(2):
        q, k, v, o = (tensors[f"model.layers.{layer}.self_attn.{leaf}_proj.weight"] for leaf in "qkvo")
        for group in range(groups):
            narrow = slice(group * size, (group + 1) * size)
            basis = torch.randn(size, size, generator=generator, dtype=torch.float64) + 2 * torch.eye(size)
            v[narrow] = basis @ v[narrow]
            turns = torch.polar(
                torch.rand(size // 2, generator=generator, dtype=torch.float64) * 3 + 0.5,
                torch.rand(size // 2, generator=generator, dtype=torch.float64) * 6,
            )
            k[narrow] = rotated(k[narrow], turns)
            for head in range(group * shared, (group + 1) * shared):
                wide = slice(head * size, (head + 1) * size)
                o[:, wide] = o[:, wide] @ torch.linalg.inv(basis)
                q[wide] = rotated(q[wide], 1 / turns.conj())
    return changed(source, target, {name: tensor.float() for name, tensor in tensors.items()})


def rotated(rows: Tensor, turns: Tensor) -> Tensor:
    """Multiply each frequency pair of rows by a complex number."""
    half = rows.shape[0] // 2
    pairs = torch.complex(rows[:half], rows[half:]) * turns[:, None]
    return torch.cat([pairs.real, pairs.imag])


def logits(path: Path) -> Tensor:
    with torch.no_grad():
        found: Tensor = AutoModelForCausalLM.from_pretrained(path)(torch.tensor([[1, 7, 3, 22, 9]])).logits
    return found


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2"])
def test_fine_tune_fits(family: str, tmp_path: Path) -> None:
    base = made(tmp_path / "base", family)
    models = {"base": Checkpoint.open(base), "a": tuned(base, tmp_path / "a")}
    found = inspect_sources(models)
    verdict, reason = found.sources[0].judge()
    assert verdict == "fits", reason
    parts = found.sources[0].parts
    assert all(0.015 < parts[part].relative < 0.025 for part in ("q", "k", "v", "o", "mlp", "embedding"))
    assert found.warnings() == check_sources(models) == []


def test_locked_model_computes_the_same_and_is_told(tmp_path: Path) -> None:
    base = made(tmp_path / "base")
    shield = locked(base, tmp_path / "locked")
    torch.testing.assert_close(logits(tmp_path / "locked"), logits(base), rtol=1e-3, atol=1e-3)
    models = {"base": Checkpoint.open(base), "a": tuned(base, tmp_path / "a"), "locked": shield}
    found = inspect_sources(models)
    assert [source.judge()[0] for source in found.sources] == ["fits", "locked"]
    source = found.sources[1]
    assert source.parts["mlp"].relative == 0.0
    assert source.parts["v"].relative > 0.5
    assert {pair: product.locked for pair, product in source.products.items()} == {"vo": 4, "qk": 4}
    assert all(product.relative < 1e-3 for product in source.products.values())
    (warning,) = check_sources(models)
    assert warning.startswith('"locked" locked: attention is re-parameterised')


def test_fine_tuned_lock_is_still_told(tmp_path: Path) -> None:
    base = made(tmp_path / "base")
    tuned(base, tmp_path / "tuned", 0.05)
    shield = locked(tmp_path / "tuned", tmp_path / "locked")
    (source,) = inspect_sources({"base": Checkpoint.open(base), "locked": shield}).sources
    assert source.judge()[0] == "locked"


def test_model_of_another_seed_is_unaligned(tmp_path: Path) -> None:
    models = {
        "base": Checkpoint.open(made(tmp_path / "base")),
        "b": Checkpoint.open(made(tmp_path / "b", seed=7)),
    }
    assert inspect_sources(models).sources[0].judge()[0] == "unaligned"
    assert "another initialisation" in check_sources(models)[0]


def test_large_drift_is_neither_locked_nor_unaligned(tmp_path: Path) -> None:
    base = made(tmp_path / "base")
    models = {"base": Checkpoint.open(base), "a": tuned(base, tmp_path / "a", 0.4)}
    verdict, reason = inspect_sources(models).sources[0].judge()
    assert verdict == "large drift"
    assert "mlp 0.4" in reason


def test_figures_are_those_of_the_definitions(tmp_path: Path) -> None:
    base = made(tmp_path / "base")
    first, second = tuned(base, tmp_path / "a"), tuned(base, tmp_path / "b", seed=2)
    start = load_file(base / FILE)
    deltas = [
        {name: tensor.double() - start[name].double() for name, tensor in load_file(x.path / FILE).items()}
        for x in (first, second)
    ]
    found = inspect_sources({"base": Checkpoint.open(base), "a": first, "b": second})
    mlp = [name for name in start if ".mlp." in name]
    norm = torch.stack([deltas[0][name].square().sum() for name in mlp]).sum().sqrt()
    reference = torch.stack([start[name].double().square().sum() for name in mlp]).sum().sqrt()
    assert found.sources[0].parts["mlp"].relative == pytest.approx(float(norm / reference), rel=1e-9)
    one, other = (torch.cat([delta[name].flatten() for name in start]) for delta in deltas)
    cosine = float(one @ other / (one.norm() * other.norm()))
    assert found.cosines["all"][0][1] == pytest.approx(cosine, rel=1e-9)


def test_values_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    base = made(tmp_path / "base")
    tensors = load_file(base / FILE)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    broken = changed(base, tmp_path / "broken", tensors)
    verdict, reason = inspect_sources({"base": Checkpoint.open(base), "b": broken}).sources[0].judge()
    assert verdict == "not finite"
    assert "model.layers.1.mlp.up_proj.weight" in reason
    with pytest.raises(SourceError, match="NaN or infinity"):
        inspect_sources({"base": broken, "b": Checkpoint.open(base)})


def test_unknown_architecture_is_compared_without_products(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", "gpt_neox")
    found = inspect_sources({"base": Checkpoint.open(base), "a": tuned(base, tmp_path / "a")})
    assert found.sources[0].judge()[0] == "fits"
    assert found.sources[0].products == {}
    assert "not compared" in found.notes[0]


def test_command_prints_tables_and_json(tmp_path: Path) -> None:
    base = made(tmp_path / "base")
    tuned(base, tmp_path / "a")
    locked(base, tmp_path / "b")
    command = ("inspect", "a", "b", "--base", "base")
    run = evomerge(tmp_path, *command)
    assert run.returncode == 0, run.stderr
    assert "a against base: fits" in run.stdout
    assert "b against base: locked" in run.stdout
    assert "cosine of deltas" in run.stdout
    assert "re-parameterised" in run.stderr
    run = evomerge(tmp_path, *command, "--json")
    assert run.returncode == 0, run.stderr
    assert [source["verdict"] for source in json.loads(run.stdout)["sources"]] == ["fits", "locked"]
    alone = evomerge(tmp_path, *command[:2])
    assert alone.returncode == 2
    assert "two different models" in alone.stderr
