"""Adapters merged as adapters: exact sums, LoRA-LEGO, reversible merging, extraction, and what is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from typer import Typer
from typer.testing import CliRunner

from evomerge.catalogue.adapters import read_settings
from evomerge.checkpoints.adapters import CONFIG, WEIGHTS, Adapter
from evomerge.checkpoints.opening import open_checkpoint
from evomerge.checkpoints.source import Checkpoint
from evomerge.cli.adapters import COMMANDS
from evomerge.errors import RecipeError, SourceError, UserError
from evomerge.merging.adapters import (
    LowRank,
    Merged,
    ReversibleLora,
    extract,
    lego,
    merge_adapters,
    relative_error,
    weighted_delta,
)
from evomerge.strict import dump_yaml
from tests.checkpoints.test_adapters import make_adapter, merged_by_peft
from tests.checkpoints.tiny import edit_json, make_llama, make_model

CLOSE: dict[str, float] = {"rtol": 1e-9, "atol": 1e-10}


def part(seed: int, rank: int, m: int = 7, k: int = 5) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(m, rank, generator=generator, dtype=torch.float64)
    return LowRank(up, torch.randn(rank, k, generator=generator, dtype=torch.float64))


def exactly(values: list[Any]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def delta(factors: LowRank) -> torch.Tensor:
    return factors.up @ factors.down


def test_sum_has_no_cross_terms() -> None:
    first = LowRank(exactly([[1.0], [0.0]]), exactly([[2.0, 0.0]]))
    second = LowRank(exactly([[0.0], [1.0]]), exactly([[0.0, 3.0]]))
    fit = weighted_delta([first, second], [0.5, 0.5])
    torch.testing.assert_close(delta(fit.factors), exactly([[1.0, 0.0], [0.0, 1.5]]), **CLOSE)
    assert fit.lost == 0.0


@settings(deadline=None, max_examples=40)
@given(
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    weights=st.lists(st.floats(-2, 2, width=32), min_size=4, max_size=4),
    rank=st.integers(1, 20),
    shape=st.sampled_from([(7, 5), (5, 9), (1, 4), (30, 30)]),
)
def test_sum_is_the_best_of_its_rank(
    ranks: list[int], weights: list[float], rank: int, shape: tuple[int, int]
) -> None:
    parts = [part(i, r, *shape) for i, r in enumerate(ranks)]
    fit = weighted_delta(parts, weights[: len(parts)], rank)
    exact = sum((delta(p) * w for p, w in zip(parts, weights, strict=False)), torch.zeros(shape).double())
    left, values, right = np.linalg.svd(exact.numpy(), full_matrices=False)
    best = torch.from_numpy(left[:, :rank] * values[:rank] @ right[:rank])
    torch.testing.assert_close(delta(fit.factors), best, rtol=1e-7, atol=1e-8)
    assert fit.factors.rank == min(rank, sum(ranks), *shape)
    assert fit.lost == pytest.approx(float(np.square(values[rank:]).sum()), abs=1e-8)
    assert fit.whole == pytest.approx(float(exact.square().sum()), abs=1e-8)
    if rank >= sum(ranks):
        torch.testing.assert_close(delta(fit.factors), exact, rtol=1e-9, atol=1e-9)


def test_relative_error_of_nothing_is_zero() -> None:
    fit = weighted_delta([part(0, 2)], [0.0], 1)
    assert relative_error(fit.lost, fit.whole) == 0.0
    assert relative_error(1.0, 4.0) == 0.5


def test_lego_of_the_worked_example() -> None:
    eye = torch.eye(2).double()
    second = LowRank(exactly([[0.8, 0.0], [0.0, 1.0]]), exactly([[1.0, 0.0], [0.0, 0.8]]))
    fit = lego([LowRank(eye, eye), second], [1.0, 1.0], 2)
    # The sheet gives 0.9 without equal norms; with them both halves of the shorter units are sqrt(0.8) long.
    torch.testing.assert_close(delta(fit.factors), eye * ((1 + 0.8**0.5) / 2) ** 2, **CLOSE)


def test_lego_reweighting_gives_centroids_the_mean_norm_of_their_units() -> None:
    first = LowRank(exactly([[1.0], [0.0]]), exactly([[1.0, 0.0]]))
    second = LowRank(exactly([[0.0], [2.0]]), exactly([[0.0, 2.0]]))
    plain, wide = (lego([first, second], [1.0, 1.0], 1, reweight=wanted) for wanted in (False, True))
    norm = torch.cat([wide.factors.up[:, 0], wide.factors.down[0]]).norm()
    assert float(norm) == pytest.approx((2**0.5 + 8**0.5) / 2)
    ratio = delta(wide.factors) / delta(plain.factors)
    assert float(ratio.max()) == pytest.approx(float(ratio.min()))
    assert float(ratio.min()) > 1.0


def test_lego_with_all_units_is_the_exact_sum() -> None:
    parts, weights = [part(0, 3), part(1, 2)], [0.5, -1.5]
    exact = delta(parts[0]) * 0.5 - delta(parts[1]) * 1.5
    for rank in (5, 9):
        fit = lego(parts, weights, rank)
        torch.testing.assert_close(delta(fit.factors), exact, **CLOSE)
        assert fit.factors.rank == 5
        assert fit.lost == pytest.approx(0.0, abs=1e-12)


def test_lego_does_not_see_how_a_unit_is_written() -> None:
    parts = [part(0, 4), part(1, 4), part(2, 2)]
    factors = exactly([-1.0, 3.0, -0.2, 7.0])
    same = LowRank(parts[0].up * factors, parts[0].down / factors[:, None])
    first = lego(parts, [1.0, 0.5, 1.0], 3, seed=5)
    other = lego([same, *parts[1:]], [1.0, 0.5, 1.0], 3, seed=5)
    torch.testing.assert_close(delta(first.factors), delta(other.factors), **CLOSE)
    assert 0 < first.lost < first.whole
    assert torch.equal(delta(first.factors), delta(lego(parts, [1.0, 0.5, 1.0], 3, seed=5).factors))


def test_lego_finds_the_clusters_there_are() -> None:
    centres = part(3, 3, 20, 20)
    parts = []
    for seed in range(4):
        order = torch.randperm(3, generator=torch.Generator().manual_seed(seed))
        noise = part(10 + seed, 3, 20, 20)
        parts.append(
            LowRank(
                centres.up[:, order] + noise.up[:, order] * 1e-3,
                centres.down[order] + noise.down[order] * 1e-3,
            )
        )
    fit = lego(parts, [1.0] * 4, 3)
    torch.testing.assert_close(delta(fit.factors), delta(centres), rtol=0.02, atol=0.02)
    assert relative_error(fit.lost, fit.whole) < 2e-3


def test_lego_of_zero_deltas_is_zero() -> None:
    zero = LowRank(torch.zeros(7, 2).double(), part(0, 2).down)
    assert not delta(lego([zero], [1.0], 2).factors).any()
    with_zero = lego([zero, part(1, 2)], [1.0, 1.0], 4)
    torch.testing.assert_close(delta(with_zero.factors), delta(part(1, 2)), **CLOSE)


def test_rmm_of_the_worked_example() -> None:
    rows = exactly([[1.0, 2.0], [3.0, 2.0], [5.0, 5.0]])
    parts = [LowRank(row[None], torch.zeros(2, 1).double()) for row in rows]
    space = ReversibleLora.fit(parts, 1)
    assert torch.equal(space.up.mean, exactly([[3.0, 3.0]]))
    expected = [[1.34240405, 1.59580557], [2.50680304, 2.58219949], [5.15079291, 4.82199494]]
    for i, row in enumerate(expected):
        torch.testing.assert_close(space.member(i).up[0], exactly(row), rtol=0, atol=1e-8)
    component = space.up.components[0, 0].abs()
    torch.testing.assert_close(component, exactly([0.76301998, 0.6463749]), rtol=0, atol=1e-8)
    coefficients = space.up.coefficients[0, :, 0].abs()
    wanted = exactly([2.17241486, 0.6463749, 2.81878976])
    torch.testing.assert_close(coefficients, wanted, rtol=0, atol=1e-8)
    gone = sum(float((space.member(i).up[0] - row).square().sum()) for i, row in enumerate(rows))
    assert space.lost == pytest.approx(gone)


@pytest.mark.parametrize("components", [1, 2, 3, 9])
def test_rmm_gives_members_back(components: int) -> None:
    parts = [part(seed, 3) for seed in range(4)]
    space = ReversibleLora.fit(parts, components)
    errors = [float((delta(space.member(i)) - delta(p)).norm()) for i, p in enumerate(parts)]
    if components >= 3:
        assert max(errors) < 1e-12
        assert relative_error(space.lost, space.whole) < 1e-12
    else:
        assert max(errors) > 1e-2
    mean = LowRank(sum(p.up for p in parts) / 4, sum(p.down for p in parts) / 4)
    for weights in ([0.0] * 4, [0.7] * 4):
        torch.testing.assert_close(delta(space.point(weights)), delta(mean), **CLOSE)
    half = space.point([0.5, 0.5, 0.0, 0.0])
    torch.testing.assert_close(half.up, (space.member(0).up + space.member(1).up) / 2, **CLOSE)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5), (1, 4)])
def test_extract_is_the_truncated_svd(shape: tuple[int, int]) -> None:
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    left, values, right = np.linalg.svd(whole.numpy(), full_matrices=False)
    for rank in (1, 3, 20):
        fit = extract(whole, rank)
        best = torch.from_numpy(left[:, :rank] * values[:rank] @ right[:rank])
        torch.testing.assert_close(delta(fit.factors), best, rtol=1e-8, atol=1e-8)
        assert fit.factors.rank == min(rank, *shape)
        assert fit.lost == pytest.approx(float(np.square(values[rank:]).sum()), abs=1e-12)
    low = extract(delta(part(0, 2, *shape)), 4)
    torch.testing.assert_close(delta(low.factors), delta(part(0, 2, *shape)), rtol=1e-8, atol=1e-8)
    assert not delta(extract(torch.zeros(shape), 2).factors).any()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    base = make_llama(root / "base", hidden=24)
    make_adapter(base, root / "a", 0, r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"])
    make_adapter(base, root / "b", 1, r=2, use_rslora=True, target_modules=["q_proj", "embed_tokens"])
    make_adapter(base, root / "c", 2, r=3, lora_alpha=3, target_modules=["q_proj", "up_proj"])
    return root


def merge(folder: Path, out: Path, **config: Any) -> Merged:
    path = out.with_name(f"{out.name}.yaml")
    path.write_text(dump_yaml(config))
    return merge_adapters(read_settings(path), folder, out)


def expected_sum(folder: Path, weights: dict[str, float]) -> dict[str, torch.Tensor]:
    base = Checkpoint.open(folder / "base")
    result = {name: base.tensor(name).double() for name in base.tensors}
    for adapter, weight in weights.items():
        adapted = open_checkpoint(str(folder / adapter))
        for name in result:
            result[name] += weight * (adapted.tensor(name).double() - base.tensor(name).double())
    return result


def same_weights(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name].double(), tensor.double(), rtol=1e-5, atol=2e-6)


def test_peft_loads_the_sum(folder: Path, tmp_path: Path) -> None:
    adapters = [{"path": "a", "weight": 0.5}, {"path": "b", "weight": -1.25}, "c"]
    merged = merge(folder, tmp_path / "out", method="sum", adapters=adapters)
    expected = expected_sum(folder, {"a": 0.5, "b": -1.25, "c": 1.0})
    same_weights(merged_by_peft(folder / "base", merged.path), expected)
    opened = open_checkpoint(str(merged.path))
    same_weights({name: opened.tensor(name) for name in opened.tensors}, expected)
    assert merged.error < 1e-10
    assert merged.modules["model.layers.0.self_attn.q_proj"][0] == 8
    assert merged.modules["model.layers.1.mlp.down_proj"][0] == 3
    assert merged.modules["model.embed_tokens"][0] == 2
    assert merged.left_out == ()


def test_cut_sum_reports_its_error(folder: Path, tmp_path: Path) -> None:
    merged = merge(folder, tmp_path / "out", method="sum", adapters=["a", "b", "c"], rank=4, dtype="bfloat16")
    stored = load_file(merged.path / WEIGHTS)
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    exact = expected_sum(folder, {"a": 1.0, "b": 1.0, "c": 1.0})
    got = merged_by_peft(folder / "base", merged.path)
    base = Checkpoint.open(folder / "base")
    lost = {name: float((got[name].double() - tensor).square().sum()) for name, tensor in exact.items()}
    whole = {n: float((tensor - base.tensor(n).double()).square().sum()) for n, tensor in exact.items()}
    assert merged.error == pytest.approx((sum(lost.values()) / sum(whole.values())) ** 0.5, rel=0.02)
    module = "model.layers.0.self_attn.q_proj"
    error = (lost[f"{module}.weight"] / whole[f"{module}.weight"]) ** 0.5
    assert merged.modules[module] == (4, pytest.approx(error, rel=0.02))


def test_peft_loads_lego(folder: Path, tmp_path: Path) -> None:
    merged = merge(folder, tmp_path / "all", method="lego", adapters=["a", "c"], rank=64)
    same_weights(merged_by_peft(folder / "base", merged.path), expected_sum(folder, {"a": 1.0, "c": 1.0}))
    few = [
        merge(folder, tmp_path / f"few{i}", method="lego", adapters=["a", "b"], rank=2, seed=3)
        for i in (0, 1)
    ]
    assert {rank for rank, _ in few[0].modules.values()} == {2}
    assert few[0].error > 0.1
    first, second = (load_file(merged.path / WEIGHTS) for merged in few)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_peft_loads_a_member_of_rmm(folder: Path, tmp_path: Path) -> None:
    adapters = [{"path": "a", "weight": 0.0}, {"path": "c", "weight": 1.0}]
    merged = merge(folder, tmp_path / "out", method="rmm", adapters=adapters, components=1)
    same_weights(merged_by_peft(folder / "base", merged.path), expected_sum(folder, {"c": 1.0}))
    with pytest.raises(SourceError, match="one rank"):
        merge(folder, tmp_path / "odd", method="rmm", adapters=["a", "b"], components=1)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_extracted_adapter_gives_the_model_back(kind: str, tmp_path: Path) -> None:
    more = {"config": {"n_embd": 24, "n_layer": 2, "n_head": 2}} if kind == "gpt2" else {}
    base, model = (make_model(tmp_path / f"m{i}", kind, hidden=24, seed=i, **more) for i in (0, 1))
    merged = merge(tmp_path, tmp_path / "out", method="extract", base="m0", model="m1", rank=64)
    got = merged_by_peft(base, merged.path)
    wanted, before = Checkpoint.open(model), Checkpoint.open(base)
    left = set(merged.left_out)
    assert left == {name for name in wanted.tensors if wanted.tensor(name).ndim == 1 or ".h." not in name} - {
        name for name in wanted.tensors if ".layers." in name and wanted.tensor(name).ndim == 2
    }
    same_weights(got, {name: (before if name in left else wanted).tensor(name) for name in wanted.tensors})
    assert merged.error < 1e-7
    name = "q_proj" if kind == "llama" else "c_fc"
    some = merge(tmp_path, tmp_path / "some", method="extract", base="m0", model="m1", rank=2, modules=[name])
    assert {module.rpartition(".")[2] for module in some.modules} == {name}
    assert 0.1 < some.error < 1
    with pytest.raises(SourceError, match="nothing to extract"):
        merge(tmp_path, tmp_path / "no", method="extract", base="m0", model="m1", rank=2, modules=["x"])


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_experts_and_routers_are_left_out(kind: str, tmp_path: Path) -> None:
    base, model = (make_model(tmp_path / f"m{i}", kind, hidden=24, seed=i) for i in (0, 1))
    merged = merge(tmp_path, tmp_path / "out", method="extract", base="m0", model="m1", rank=64)
    got = merged_by_peft(base, merged.path)
    wanted = Checkpoint.open(model)
    taken = [name for name in wanted.tensors if name not in merged.left_out]
    same_weights(got, {name: wanted.tensor(name) for name in taken})
    assert [name for name in taken if "q_proj" in name]
    assert not [name for name in taken if ".experts." in name or name.endswith(".gate.weight")]


def test_base_must_be_the_same_or_be_given(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "c", tmp_path / "c")
    edit_json(tmp_path / "c" / CONFIG, base_model_name_or_path="owner/name", revision="v1")
    adapters = [str(folder / "a"), str(tmp_path / "c")]
    with pytest.raises(SourceError, match="owner/name"):
        merge(folder, tmp_path / "x", method="sum", adapters=adapters)
    merged = merge(folder, tmp_path / "y", method="sum", adapters=adapters, base="base")
    assert Adapter.open(merged.path).base == (str((folder / "base").resolve()), None)
    hub = merge(folder, tmp_path / "z", method="sum", adapters=adapters[1:])
    assert Adapter.open(hub.path).base == ("owner/name", "v1")
    edit_json(tmp_path / "c" / CONFIG, base_model_name_or_path=None)
    with pytest.raises(SourceError, match="names no base model"):
        merge(folder, tmp_path / "x", method="sum", adapters=adapters[1:])


def test_numbers_that_cannot_be_merged_or_stored(folder: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(folder / "a", tmp_path / "broken"))
    stored = load_file(broken / WEIGHTS)
    name = next(name for name in stored if "lora_A" in name)
    for value, dtype, problem in ((float("nan"), "float32", "NaN"), (1e30, "float16", "fit into float16")):
        stored[name][0, 0] = value
        save_file(stored, broken / WEIGHTS)
        with pytest.raises(SourceError, match=problem):
            merge(folder, tmp_path / "out", method="sum", adapters=[str(broken)], dtype=dtype)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("method: sun\nadapters: [a]", 'did you mean "sum"'),
        (
            "adapters: [a]",
            "method: expected a way to merge adapters, got None; known: extract, lego, rmm, sum",
        ),
        ("[a]", "expected a mapping"),
        ("method: sum", "adapters: missing"),
        ("method: sum\nadapters: [a]\nseed: 1", "unknown key"),
        ("method: rmm\nadapters: [a]\ncomponents: 1", "at least 2"),
        ("method: sum\nadapters: [{path: a, weight: x}]", "expected a number"),
        ("method: sum\nadapters: [{path: a, weigth: 1}]", 'did you mean "weight"'),
        ("method: extract\nbase: a\nrank: 1", "model: missing"),
    ],
)
def test_faulty_files_are_refused_in_one_line(text: str, part: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        read_settings(path)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def run(arguments: list[str]) -> Any:
    app = Typer()
    for command in COMMANDS:
        app.command()(command)
    app.callback()(lambda: None)
    return CliRunner().invoke(app, arguments)


def test_command_writes_and_tells(folder: Path, tmp_path: Path) -> None:
    path = folder / "sum.yaml"
    path.write_text("method: sum\nadapters: [a, c]\nrank: 2\n")
    result = run(["merge-adapters", str(path), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "6 modules, rank 2" in result.output
    assert "relative error" in result.output
    result = run(["merge-adapters", str(path), str(tmp_path / "other"), "--json"])
    told = json.loads(result.output)
    assert told["modules"]["model.layers.0.mlp.up_proj"]["rank"] == 2
    assert 0 < told["relative_error"] < 1
    again = run(["merge-adapters", str(path), str(tmp_path / "out")])
    assert isinstance(again.exception, UserError)
    assert "exists already" in str(again.exception)


def test_command_says_what_it_left_out(tmp_path: Path) -> None:
    for i in (0, 1):
        make_llama(tmp_path / f"m{i}", seed=i)
    (tmp_path / "x.yaml").write_text("method: extract\nbase: m0\nmodel: m1\nrank: 4\n")
    result = run(["merge-adapters", str(tmp_path / "x.yaml"), str(tmp_path / "out")])
    assert "left out: 7 other tensors" in result.output
