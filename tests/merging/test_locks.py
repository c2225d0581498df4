"""Products of attention: the worked example, and configs whose heads are not known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.checkpoints.source import Checkpoint
from evomerge.merging.locks import Attention, attention_of, group_drifts
from tests.checkpoints.tiny import make_llama

ONE_HEAD = Attention(heads=1, groups=1, size=2, rotary=(False,), gain_offset=0.0)


def test_worked_example_of_a_lock() -> None:
    value, output = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    basis = torch.tensor([[2.0, 1.0], [1.0, 1.0]])
    shield = [basis @ value, output @ torch.linalg.inv(basis)]
    assert shield[0].tolist() == [[5.0, 8.0], [4.0, 6.0]]
    torch.testing.assert_close(shield[1], torch.tensor([[1.0, -1.0], [0.0, 1.0]]))
    ((drift,),) = group_drifts(ONE_HEAD, "vo", [[value, output], shield], 0)
    assert drift.raw == pytest.approx(0.81649658, abs=1e-6), "of value and output the lesser"
    assert drift.product < 1e-6
    assert drift.locked


def test_training_drifts_products_as_much_as_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    base = [torch.randn(2, 6, generator=generator), torch.randn(6, 2, generator=generator)]
    tuned = [factor + 0.5 * torch.randn(factor.shape, generator=generator) for factor in base]
    ((drift,),) = group_drifts(ONE_HEAD, "vo", [base, tuned], 0)
    product, other = base[1] @ base[0], tuned[1] @ tuned[0]
    assert drift.product == pytest.approx(float((other - product).norm() / product.norm()), rel=1e-5)
    assert not drift.locked


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": [1]},
        {"no_rope_layers": 3},
        {"no_rope_layers": [1]},
        {"num_key_value_heads": 3},
        {"partial_rotary_factor": 0.5},
        {"model_type": "smollm3"},
    ],
    ids=str,
)
def test_heads_of_an_odd_config_are_not_known(change: dict[str, Any], tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "model")
    assert attention_of(Checkpoint.open(folder), 2) is not None
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    assert attention_of(Checkpoint.open(folder), 2) is None
