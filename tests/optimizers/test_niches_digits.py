"""A short cut of the published classifier experiment; `scripts/reproduce_m2n2` runs the whole of it."""

from __future__ import annotations

import importlib.util
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "reproduce_m2n2"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    loader = SourceFileLoader("reproduce_m2n2", str(SCRIPT))
    spec = importlib.util.spec_from_loader("reproduce_m2n2", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_the_paper_s_network_and_data(script: ModuleType) -> None:
    network = script.Network(256)
    assert network.size == 19_210
    assert (len(network.train[0]), len(network.test[0])) == (1437, 360)
    vector = network.drawn(np.random.default_rng(0))
    first = vector[: 64 * 256].reshape(64, 256)
    bias, second = vector[64 * 256 : 65 * 256], vector[65 * 256 : 75 * 256].reshape(256, 10)
    pixels, labels = network.test
    answers = np.maximum(pixels[:, :64] @ first + bias, 0.0) @ second + vector[75 * 256 :]
    assert (network.right(vector, network.test) == (answers.argmax(axis=1) == labels)).all()


def test_split_points_find_more_than_any_one_mixing_ratio(script: ModuleType) -> None:
    network = script.Network(256)
    ends = {
        method: [script.run(network, method, seed, True, 500)["trace"][-1][1] for seed in (42, 43, 46)]
        for method in ("m2n2", "without split point")
    }
    halves = [network.right(v, network.train).mean() for v in script.founders(network, 42, True)]
    assert max(halves) < 0.52, "each knows half of the digits"
    assert np.mean(ends["without split point"]) > 65.0
    assert np.mean(ends["m2n2"]) > np.mean(ends["without split point"]) + 1.0
