"""Scalar products of checkpoints within parts of tensors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from evomerge.checkpoints import grams as module
from evomerge.checkpoints.grams import grams
from evomerge.checkpoints.source import Checkpoint
from tests.checkpoints.tiny import make_llama


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_they_are_the_products_of_the_weights(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", 100)
    found = [Checkpoint.open(make_llama(tmp_path / str(i), seed=i, dtype=dtype)) for i in range(3)]
    name = next(n for n in found[0].tensors if "down_proj" in n)
    other = next(n for n in found[0].tensors if "embed" in n)
    parts = [(name, 0, 333), (name, 333, 400), (other, 5, 6)]
    result = grams(found, parts)
    for gram, (tensor, start, stop) in zip(result, parts, strict=True):
        rows = torch.stack([c.tensor(tensor).double().flatten()[start:stop] for c in found]).numpy()
        np.testing.assert_allclose(gram, rows @ rows.T, rtol=1e-12, atol=1e-15)


def test_no_torch_is_loaded(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m", dtype=torch.bfloat16)
    code = (
        "import sys; from pathlib import Path; from evomerge.checkpoints.grams import grams;"
        "from evomerge.checkpoints.source import Checkpoint;"
        f"c = Checkpoint.open(Path({str(folder)!r}));"
        "print(grams([c, c], [(n, 0, 8) for n in c.tensors]).shape, 'torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip().endswith("2, 2) False")
